"""Numbers depend on an experiment and its seed, and on nothing else that a process did before or had set."""

import ast
import gc
import hashlib
import itertools
import pickle
import random
from dataclasses import fields, replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
import torch

from thesis_ltc.heads import HEADS, classifier
from thesis_ltc.heads.models import find_head
from thesis_ltc.heads.scan import draw_orders
from thesis_ltc.ltc import LTC, ncp
from thesis_ltc.ltc.wiring import Wiring
from thesis_ltc.study import Experiment, run
from thesis_ltc.study.experiment import build_model, recipe_of
from thesis_ltc.study.runs import load_images
from thesis_ltc.training import predict
from thesis_ltc.training.checkpoint import load_model, load_tensors
from thesis_ltc.training.recipe import SWITCHES

QUICK = Experiment(
    data="digits", head="pool:1 mix:8 | z:shuffled-each | linear:6 | batch | ncp:6/4/2:3/2/2/2 | fc:6",
    image_size=24, width=0.125, limit=30, batch_size=10, threads=1, precision="float32", epochs=2,
    device="cpu")
silent = lambda history: None


def generators() -> list:
    "The state of every global generator."
    return [torch.random.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()]


def seed_all(number: int) -> None:
    torch.manual_seed(number), np.random.seed(number), random.seed(number)


def content(folder: Path) -> dict[str, str]:
    "Hashes of what a run computed."
    names = ("model.safetensors", "predictions.parquet")
    files = [path for name in names for path in folder.glob(f"*/seed0/{name}")]
    assert len(files) == 2
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def usual(tmp_path_factory) -> dict[str, str]:
    "What the run computes in a process that has set nothing."
    folder = tmp_path_factory.mktemp("usual")
    run(QUICK, 0, folder, echo=silent)
    return content(folder)


@pytest.mark.parametrize("user_seed", [1, 2, 3])
def test_a_run_leaves_the_generators_and_does_not_depend_on_them(user_seed, usual, tmp_path):
    seed_all(user_seed)
    before, following = generators(), (torch.rand(3).tolist(), np.random.rand(), random.random())
    seed_all(user_seed)
    run(QUICK, 0, tmp_path, echo=silent)
    assert generators() == before and content(tmp_path) == usual
    assert (torch.rand(3).tolist(), np.random.rand(), random.random()) == following


def stop(history: list[dict]) -> None:
    torch.rand(1), np.random.rand(), random.random()
    raise KeyboardInterrupt


@pytest.mark.parametrize(("changes", "echo", "error"), [
    ({}, stop, KeyboardInterrupt), ({"learning_rate": 1e30}, silent, ArithmeticError),
    ({"head": "pool:900 | y | fc"}, silent, ValueError), ({"trunk": "nowhere/seed0"}, silent, ValueError),
])
def test_so_does_a_run_that_ends_early(changes, echo, error, tmp_path):
    seed_all(5)
    before, switches = generators(), [switch.read() for switch in SWITCHES.values()]
    with pytest.raises(error):
        run(Experiment.of(vars(QUICK) | changes), 0, tmp_path, echo=echo)
    assert generators() == before and [switch.read() for switch in SWITCHES.values()] == switches


MODES = {
    "inference": torch.inference_mode, "no gradient": torch.no_grad, "place": lambda: torch.device("meta"),
    "precision": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.fixture(scope="module")
def usual_bfloat16(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("usual")
    run(replace(QUICK, precision="bfloat16"), 0, folder, echo=silent)
    return content(folder)


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_bits_do_not_depend_on_modes(name, precision, usual, usual_bfloat16, tmp_path):
    data = load_images(QUICK)
    with MODES[name]():
        run(replace(QUICK, precision=precision), 0, tmp_path, data=data, echo=silent)
    assert content(tmp_path) == {"float32": usual, "bfloat16": usual_bfloat16}[precision]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_predictions_are_those_of_the_trained_weights(precision, tmp_path):
    "They round the weights that there are, not those of the first step, which a cache may keep."
    experiment = replace(QUICK, precision=precision, head="fc", learning_rate=0.02)
    run(experiment, 0, tmp_path, echo=silent)
    folder, data = next(tmp_path.glob("*/seed0")), load_images(experiment).limited(experiment.limit)
    model = build_model(experiment, len(data.classes), 0).eval()
    load_model(load_tensors(folder / "model.safetensors")[0], model)
    recipe, table = recipe_of(experiment, 0), pd.read_parquet(folder / "predictions.parquet")
    logits = predict(model, data, data.rows("test"), recipe)
    found = table[table.split == "test"].filter(regex=r"^best_\d+$").to_numpy()
    np.testing.assert_allclose(logits.float().softmax(1).numpy(), found, atol=0.02)
    assert np.ptp(found, 0).max() > 0.2   # training has moved them far


@pytest.mark.parametrize(("name", "value"), [
    ("default type", torch.float64), ("float32_matmul_precision", "medium"),
    ("backends.fp32_precision", "tf32"), ("deterministic algorithms", (False, False)),
])
def test_bits_do_not_depend_on_switches(name, value, usual, tmp_path):
    before = [switch.read() for switch in SWITCHES.values()]
    SWITCHES[name].write(value)
    try:
        run(QUICK, 0, tmp_path, echo=silent)
    finally:
        for switch, found in reversed(list(zip(SWITCHES.values(), before, strict=True))):
            switch.write(found)
    assert content(tmp_path) == usual


def test_the_smallest_numbers_are_kept(tmp_path):
    "Steps so short that parameters which begin at zero become denormal numbers."
    short = Experiment.of(vars(QUICK) | {"learning_rate": 1e-41, "epochs": 1})
    run(short, 0, tmp_path / "usual", echo=silent)
    model = load_tensors(next((tmp_path / "usual").glob("*/seed0/model.safetensors")))
    smallest = torch.finfo(torch.float32).tiny
    assert any(((0 < one.abs()) & (one.abs() < smallest)).any() for one in model[0].values())
    torch.set_flush_denormal(True)
    try:
        run(short, 0, tmp_path / "flushed", echo=silent)
    finally:
        torch.set_flush_denormal(False)
    assert content(tmp_path / "flushed") == content(tmp_path / "usual")


def test_a_run_tells_the_allocator_once_to_keep_its_memory(tmp_path):
    with patch("thesis_ltc.study.runs.keep_memory") as told:
        run(QUICK, 0, tmp_path, echo=silent)
    told.assert_called_once_with()


def inference_tensors() -> int:
    "How many tensors are alive that were made under inference_mode."
    gc.collect()
    return sum(issubclass(type(one), torch.Tensor) and one.is_inference() for one in gc.get_objects())


SHUFFLED = ("y:shuffled", "x:shuffled-each", "patch:4:shuffled-each")
ONE_OF_A_KIND = {   # of a circuit and a readout
    (str(sentence.circuit).split(":")[0], sentence.readout[0].name): name
    for name, sentence in ((name, find_head(name)) for name in HEADS)}
SENTENCES = [*ONE_OF_A_KIND.values(), *(f"grid:8 mix:4 | {scan} | linear:6 | unit | ncp:6/4/2:3/2/2/2 | fc"
                       for scan in SHUFFLED)]


@pytest.mark.parametrize("head", SENTENCES)
def test_what_is_read_first_never_spoils_training(head):
    "No tensor of inference_mode stays, in no cache and in no module, and a step of training works."
    draw_orders.cache_clear()
    model, images = classifier(head, 2, 136, width=0.125, seed=0), torch.rand(3, 1, 136, 136)
    for part in model.modules():
        if isinstance(part, LTC):   # so that its indices are made anew while it reads
            part.recurrent.source.fill_(0)
    before = inference_tensors()
    with torch.inference_mode():
        model.eval()(images)
    assert inference_tensors() == before == 0
    model.train()(images).square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.requires_grad)


def functions_of(root: Path) -> list[tuple[Path, ast.FunctionDef]]:
    "All functions of the package, with their files."
    return [(path, node) for path in sorted((root / "thesis_ltc").rglob("*.py"))
            for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]


def test_no_function_keeps_a_tensor(root):
    "A cached tensor would have the mode of its first caller."
    found = functions_of(root)
    kept = [(path.name, node.name) for path, node in found for one in node.decorator_list
            if "cache" in ast.unparse(one) and "Tensor" in ast.unparse(node.returns or ast.Constant(""))]
    assert len(found) > 1000 and kept == []


def test_only_the_streams_seed_global_generators(root):
    seeding = {"torch.manual_seed", "torch.cuda.manual_seed_all", "np.random.seed", "random.seed",
               "torch.default_generator.manual_seed", "torch.cuda.manual_seed", "torch.seed"}
    places = {path.name for path in (root / "thesis_ltc").rglob("*.py")
              for node in ast.walk(ast.parse(path.read_text()))
              if isinstance(node, ast.Call) and ast.unparse(node.func) in seeding}
    assert places == {"streams.py"}


def test_no_function_takes_its_values_from_the_order_of_names(root):
    calls = [path.name for path in (root / "thesis_ltc").rglob("*.py")
             for node in ast.walk(ast.parse(path.read_text()))
             if isinstance(node, ast.Call) and ast.unparse(node.func) in ("locals", "globals")]
    assert calls == []


NUMBERS = {"sensory": 5, "inter": 4, "command": 3, "motor": 2, "sensory_out": 2, "inter_out": 3,
           "recurrent": 4, "motor_in": 1}


def test_wirings_do_not_depend_on_the_order_of_names():
    "Of keywords in ncp, and of the attributes of a wiring that is copied or pickled."
    right = ncp(**NUMBERS)
    for names in itertools.islice(itertools.permutations(NUMBERS), 0, None, 997):
        assert ncp(**{name: NUMBERS[name] for name in names}) == right
    orders = itertools.permutations([field.name for field in fields(Wiring)])
    for names in itertools.islice(orders, 0, None, 90_000):
        other = ncp(**NUMBERS)
        values = {name: vars(other).pop(name) for name in names}
        vars(other).update(values)
        assert pickle.loads(pickle.dumps(other)) == right == Wiring(**other.to_dict())
