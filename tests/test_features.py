"""A frozen trunk: its maps are made once, whole or not at all, and its heads are runs like any other."""
import multiprocessing
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from thesis_ltc.book.records import load_records
from thesis_ltc.book.tables import varied_factors
from thesis_ltc.core.files import read_json, temporary_name
from thesis_ltc.data import load
from thesis_ltc.data.imageset import ImageSet
from thesis_ltc.heads import classifier
from thesis_ltc.study import runs as runs_module
from thesis_ltc.study.definition import read_study
from thesis_ltc.study.experiment import Experiment, ExperimentError, build_model, recipe_of, resolve
from thesis_ltc.study.plan import JOB, make_plan
from thesis_ltc.study.runs import is_finished, load_images, run, run_seeds
from thesis_ltc.training import (
    Images,
    Interrupted,
    Learner,
    Recipe,
    StackedLearner,
    Training,
    TrunkError,
    features_of,
    fit_all,
    learner_of,
    predict,
    read_trunk,
    reproducible,
)
from thesis_ltc.training.checkpoint import (
    CheckpointError,
    RunIsBusy,
    load_tensors,
    read_status,
    run_lock,
)
from thesis_ltc.training.trunk import Features

pytestmark = pytest.mark.timeout(300)
SMALL = dict(data="digits", image_size=64, width=0.125, limit=60, epochs=2)
SMALL |= dict(threads=1, device="cpu", precision="float32")


def silent(history: list) -> None:
    "Show no progress."


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "A folder of runs."
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def trunk(runs):
    "The folder of a finished run."
    record = run(Experiment(**SMALL, head="fc"), 0, runs, echo=silent)
    return runs / record["id"] / "seed0"


def of_head(trunk: Path, **values) -> Experiment:
    "An experiment with a head on the trunk."
    return Experiment(**SMALL | {"head": "ncp-z", "trunk": str(trunk), "passes": 2} | values)


def images_of(experiment: Experiment):
    "The images of an experiment, its limit applied."
    return load_images(experiment).limited(experiment.limit)


def maps_of(
    trunk: Path,
    directory: Path,
    passes: int = 2,
    data: ImageSet | None = None,                # by default the experiment's
    check: Callable[[], None] = lambda: None,
    **recipe,                                    # changes of the recipe
) -> Features:
    "The trunk's maps."
    experiment = of_head(trunk)
    data = images_of(experiment) if data is None else data
    recipe = replace(recipe_of(experiment, 0), **recipe)
    return features_of(read_trunk(str(trunk)), data, recipe, passes, directory, check)


def folders_in(directory: Path) -> list[Path]:
    return [path for path in directory.iterdir() if path.is_dir()]


# Maps

def test_maps_are_the_same_for_every_seed_and_head(trunk, tmp_path):
    first = run(of_head(trunk), 0, tmp_path, echo=silent)
    second = run(of_head(trunk), 1, tmp_path, echo=silent)
    other = run(of_head(trunk, head="fc"), 0, tmp_path, echo=silent)
    assert len({record["trunk"]["hash"] for record in (first, second, other)}) == 1
    assert len(folders_in(tmp_path / "features")) == 2   # the whole maps, and those of pool:2
    assert first["metrics"] != second["metrics"]
    for seed, record in enumerate((first, second)):
        again = run(of_head(trunk), seed, tmp_path / f"elsewhere{seed}", echo=silent)
        for part in ("trunk", "metrics", "experiment"):
            assert again[part] == record[part]   # the same bits from maps that were computed anew


def test_an_interrupted_computation_leaves_nothing(trunk, tmp_path):
    calls = iter(range(99))

    def stop() -> None:
        if next(calls) == 2:
            raise Interrupted("enough")

    with pytest.raises(Interrupted):
        maps_of(trunk, tmp_path, passes=3, check=stop)
    assert not list(tmp_path.glob("*/features.json"))
    whole = maps_of(trunk, tmp_path, passes=3)
    assert whole.passes.shape[:2] == (3, 60) and whole.passes.isfinite().all()
    assert not list(tmp_path.glob(".*.tmp"))


def compute(trunk: Path, directory: Path) -> None:
    maps_of(trunk, directory)


def test_two_processes_compute_once(trunk, tmp_path):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=compute, args=(trunk, tmp_path)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert len(list(tmp_path.glob("*/features.json"))) == 1


def test_what_was_lost_is_made_again(trunk, tmp_path):
    first = maps_of(trunk, tmp_path)
    place, = folders_in(tmp_path)
    part = temporary_name(place)
    (place / "passes.npy").unlink()
    part.mkdir()
    (part / "plain.npy").write_bytes(b"half")   # left by a killed process
    again = maps_of(trunk, tmp_path)
    assert again.about["hash"] == first.about["hash"]
    assert (place / "passes.npy").exists() and not part.exists()


def test_each_seed_draws_its_own_passes(trunk, tmp_path):
    maps = maps_of(trunk, tmp_path)
    rows = images_of(of_head(trunk)).rows("train")[None, :30]
    first, second = maps.training(np.concatenate([rows, rows]), [0, 1], 1, 0)
    assert not torch.equal(first, second)


def test_maps_follow_what_decides_them(trunk, runs, tmp_path):
    "No change of data, trunk or recipe is served with the maps of another; the seed shares them."
    other = run(Experiment(**SMALL, head="fc"), 1, runs, echo=silent)
    found = {
        "as it is": maps_of(trunk, tmp_path),
        "fewer images": maps_of(trunk, tmp_path, data=load_images(of_head(trunk)).limited(50)),
        "passes": maps_of(trunk, tmp_path, passes=3),
        "threads": maps_of(trunk, tmp_path, threads=2),
        "precision": maps_of(trunk, tmp_path, precision="bfloat16"),
        "layout": maps_of(trunk, tmp_path, memory_format="contiguous"),
        "augment": maps_of(trunk, tmp_path, augment=False),
        "trunk": maps_of(runs / other["id"] / "seed1", tmp_path),
    }
    usual = found["as it is"]
    assert len(list(tmp_path.glob("*/features.json"))) == len(found)
    assert len(found["fewer images"].plain) < len(usual.plain) and len(found["passes"].passes) == 3
    changed = ("passes", "precision", "trunk", "augment")
    content = {found[name].about["hash"] for name in ("as it is", *changed)}
    assert len(content) == 1 + len(changed)   # the hash follows the content
    files = list(tmp_path.glob("*/*.npy"))
    before = [path.stat().st_mtime_ns for path in files]
    assert maps_of(trunk, tmp_path, seed=7).about == usual.about
    assert [path.stat().st_mtime_ns for path in files] == before   # none is made anew


@pytest.mark.parametrize("image_size", [32, 72, 128])
def test_a_trunk_makes_no_maps_of_images_of_another_size(trunk, image_size, tmp_path):
    "Neither here nor in a run, and nothing is written."
    with pytest.raises(TrunkError, match=f"image_size is {image_size}, but .* trained with 64; give"):
        maps_of(trunk, tmp_path, image_size=image_size)
    with pytest.raises(TrunkError, match="give image_size=64, or train a trunk"):
        run(of_head(trunk, image_size=image_size), 0, tmp_path, echo=silent)
    assert folders_in(tmp_path) == []


def test_normalised_images_are_for_trunks_that_were_trained_on_them(trunk, tmp_path):
    "A trunk, its maps and its heads see images prepared in one way, whichever it is."
    with pytest.raises(TrunkError, match="normalise_image is True, but .* trained with False; give"):
        maps_of(trunk, tmp_path, normalise_image=True)
    with pytest.raises(TrunkError, match="or train a trunk with normalise_image=True"):
        run(of_head(trunk, normalise_image=True), 0, tmp_path, echo=silent)
    record = run(Experiment(**SMALL, head="fc", normalise_image=True), 0, tmp_path, echo=silent)
    other = tmp_path / record["id"] / "seed0"
    assert record["experiment"]["normalise_image"] and record["id"] != trunk.parent.name
    with pytest.raises(TrunkError, match="give normalise_image=True"):
        run(of_head(other), 0, tmp_path, echo=silent)
    head = run(of_head(other, normalise_image=True), 0, tmp_path, echo=silent)
    maps = features_of(
        read_trunk(str(other)), images_of(of_head(other)),
        replace(recipe_of(of_head(other), 0), normalise_image=True), 2, tmp_path / "features")
    assert maps.about["normalise_image"] is True and head["trunk"]["run"] == record["id"]


def test_outputs_are_those_of_the_whole_network(trunk, tmp_path):
    experiment = of_head(trunk)
    data, recipe, model = images_of(experiment), recipe_of(experiment, 0), build_model(experiment, 10, 3)
    model.backbone.load_state_dict(read_trunk(str(trunk)).tensors)
    from_maps = predict(model.head, data, data.rows("test"), recipe, inputs=maps_of(trunk, tmp_path))
    torch.testing.assert_close(from_maps, predict(model, data, data.rows("test"), recipe), rtol=0, atol=1e-5)


# Runs on a trunk

def test_the_backbone_stays_and_the_head_learns(trunk, runs):
    record = run(of_head(trunk, epochs=5, learning_rate=0.01), 0, runs, echo=silent)
    folder = runs / record["id"] / "seed0"
    weights = load_tensors(folder / "model.safetensors")[0]
    trained = load_tensors(trunk / "model.safetensors")[0]
    start = build_model(of_head(trunk), 10, 0).state_dict()
    for name, tensor in weights.items():
        if name.startswith("backbone."):
            assert torch.equal(tensor, trained[name])
        if name.startswith("head.circuit") and not name.endswith(".wiring"):
            assert not torch.equal(tensor, start[name])
    assert {name.partition(".")[0] for name in weights} == {"backbone", "head"}
    assert len((folder / "history.csv").read_text().splitlines()) == 6
    assert record["trunk"]["run"] == trunk.parent.name


def test_identity_follows_the_weights_and_not_the_place(trunk, tmp_path):
    shutil.copytree(trunk, tmp_path / "moved")
    here, there = of_head(trunk), of_head(tmp_path / "moved")
    images = load_images(here)
    assert resolve(here, images).id == resolve(there, images).id
    others = of_head(trunk, passes=4), Experiment(**SMALL, head="ncp-z")
    assert len({resolve(experiment, images).id for experiment in (here, *others)}) == 3
    record = run(here, 0, tmp_path / "runs", echo=silent)
    assert run(there, 0, tmp_path / "runs", echo=lambda history: 1 / 0) == record


def test_what_is_refused(trunk, tmp_path):
    with pytest.raises(TrunkError, match="no finished run in .*train it first"):
        run(of_head(tmp_path / "nothing"), 0, tmp_path, echo=silent)
    with pytest.raises(TrunkError, match="give width=0.125"):
        run(of_head(trunk, width=0.25), 0, tmp_path, echo=silent)
    with pytest.raises(TrunkError, match="has seen .* of the pictures that are tested here"):
        run(of_head(trunk, repeat=1), 0, tmp_path, echo=silent)
    with pytest.raises(TrunkError, match="has seen .* of the pictures that are tested here"):
        run(of_head(trunk, folds=5), 0, tmp_path, echo=silent)
    with pytest.raises(ExperimentError, match="passes is 0"):
        of_head(trunk, passes=0)
    accepted = run(of_head(trunk, repeat=1, accept_leakage=True, epochs=1), 0, tmp_path, echo=silent)
    assert accepted["data"]["leakage_accepted"]


def test_a_trunk_is_refused_in_another_fold_and_taken_in_its_own(tmp_path):
    fold = run(Experiment(**SMALL, head="fc", folds=2, fold=1), 0, tmp_path, echo=silent)
    trunk = tmp_path / fold["id"] / "seed0"
    with pytest.raises(TrunkError, match="has seen .* of the pictures that are tested here"):
        run(of_head(trunk, folds=2, fold=0), 0, tmp_path, echo=silent)
    with pytest.raises(TrunkError, match="has seen .* of the pictures that are tested here"):
        run(of_head(trunk, folds=2, fold=1, repeat=1), 0, tmp_path, echo=silent)
    record = run(of_head(trunk, folds=2, fold=1), 0, tmp_path, echo=silent)
    assert record["experiment"]["trunk"] == f"{fold['id']}/seed0"
    assert record["data"]["split"] == fold["data"]["split"]


def test_a_study_on_a_trunk_shares_records_and_tables(trunk, tmp_path):
    path = tmp_path / "frozen.yaml"
    fixed = {name: value for name, value in SMALL.items() if name != "data"}
    fixed |= {"trunk": str(trunk), "passes": 2}
    study = {
        "question": "q?",
        "hypothesis": "h",
        "margin": {"metric": "accuracy", "value": 0.02},
        "primary": ["ncp-z", "fc"],
        "budget": "seconds",
        "data": "digits",
        "fixed": fixed,
        "vary": {"head": ["fc", "ncp-z"]},
        "seeds": 1,
    }
    path.write_text(yaml.safe_dump(study))
    plan = make_plan(read_study(path), tmp_path / "runs")
    for cell in plan["cells"]:
        values = read_json(tmp_path / "runs" / cell["id"] / JOB)
        chosen = {name: values[name] for name in (*SMALL, "head", "trunk", "passes")}
        assert run(Experiment(**chosen), 0, tmp_path / "runs", echo=silent)["id"] == cell["id"]
    table = load_records(tmp_path / "runs")
    assert len(table) == 2 and set(table["head"]) == {"fc", "ncp-z"}
    assert varied_factors(table) == ["data", "head", "setting"]
    assert table["trunk.hash"].nunique() == 1 and table.passes.tolist() == [2, 2]


@pytest.mark.parametrize("head", ["z-lstm", "z-cfc", "z-frozen", "z-random", "z-state", "ncp-z-bi", "fc"])
def test_a_record_says_what_a_circuit_remembers_and_how_far_it_travelled(head, trunk, tmp_path):
    record = run(of_head(trunk, head=head, epochs=3, learning_rate=0.01), 0, tmp_path, echo=silent)
    sequences = {"fc": 0, "ncp-z-bi": 2}.get(head, 1)
    for when in ("before", "after"):
        curves = record["memory"][when]
        assert [len(curve) for curve in curves] == [16] * sequences
        assert all(value >= 0 for curve in curves for value in curve)
    assert (record["memory"]["before"] != record["memory"]["after"]) == (sequences > 0)
    travelled = record["travelled"]
    assert travelled and all(name.startswith("head.") and way["moved"] > 0 for name, way in travelled.items())
    assert any(name.startswith("head.circuit") for name in travelled) == (head not in ("fc", "z-frozen"))


# Many seeds at once

def results(directory: Path, seed: int) -> dict[str, bytes]:
    "Outputs and weights of a seed of the only experiment in a directory."
    folder, = directory.glob(f"digits_*/seed{seed}")
    return {name: (folder / name).read_bytes() for name in ("predictions.parquet", "model.safetensors")}


def test_a_seed_has_the_same_bits_in_any_company(trunk, tmp_path):
    "Five seeds are two stacks; one of them alone is the same."
    experiment = of_head(trunk, epochs=3)
    together = run_seeds(experiment, [0, 1, 2, 3, 4], tmp_path / "all", echo=silent)
    alone = run(experiment, 2, tmp_path / "one", echo=silent)
    assert alone["metrics"] == together[2]["metrics"]
    assert results(tmp_path / "all", 2) == results(tmp_path / "one", 2) != results(tmp_path / "all", 3)


def test_seeds_that_were_stopped_go_on_while_one_is_locked(trunk, tmp_path):
    experiment, calls = of_head(trunk, epochs=3), iter(range(99))
    undisturbed = run_seeds(experiment, [0, 1, 2, 3], tmp_path / "all", echo=silent)

    def stop(history: list) -> None:
        if next(calls) == 5:   # two of four seeds have their second epoch
            raise Interrupted("enough")

    directory = tmp_path / "stopped"
    with pytest.raises(Interrupted):
        run_seeds(experiment, [0, 1, 2, 3], directory, echo=stop)
    place = directory / undisturbed[0]["id"]
    states = [read_json(place / f"seed{seed}" / "status.json") for seed in range(4)]
    assert [state["state"] for state in states] == ["interrupted"] * 4
    assert [state["epoch"] for state in states] == [2, 2, 1, 1]
    with run_lock(place / "seed3"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs_module, "LOCK_WAIT", 0.1)
        found = run_seeds(experiment, [0, 1, 2, 3], directory, echo=silent)
    assert isinstance(found[3], RunIsBusy)
    assert run_seeds(experiment, [3], directory, echo=silent)[3]["metrics"] == undisturbed[3]["metrics"]
    for seed in range(4):
        assert results(directory, seed) == results(tmp_path / "all", seed)
        assert is_finished(place / f"seed{seed}")


def test_a_broken_checkpoint_stops_its_seed_alone(trunk, tmp_path):
    experiment = of_head(trunk)
    place = tmp_path / resolve(experiment, load_images(experiment)).id
    (place / "seed1").mkdir(parents=True)
    (place / "seed1" / "checkpoint.safetensors").write_bytes(b"no checkpoint")
    found = run_seeds(experiment, [0, 1], tmp_path, echo=silent)
    assert isinstance(found[1], CheckpointError) and "delete it" in str(found[1]) and found[0]["epochs"] == 2
    assert read_status(place / "seed1")["state"] == "failed"
    assert read_status(place / "seed0")["state"] == "done"


class Maps(Images):
    "Maps of a random backbone."
    backbone = classifier("pool:1 | flat | - | - | - | fc", 10, 48, width=0.125, seed=9).backbone
    backbone.eval().requires_grad_(False)

    def training(self, rows: np.ndarray, seeds: Sequence[int], epoch: int, number: int) -> list[torch.Tensor]:
        return [self.backbone(images) for images in super().training(rows, seeds, epoch, number)]

    def evaluation(self, rows: np.ndarray) -> torch.Tensor:
        return self.backbone(super().evaluation(rows))


HEADS = [   # scan, normaliser, circuit, readout, options
    ("z+reverse", "unit", "ncp:6/4/2:3/2/2/2", "fc", {}),
    ("z+reverse:shared", "layer", "ncp:6/4/2:3/2/2/2", "attention", {}),
    ("y+x+z", "layer", "cfc:6/4/2:3/2/2/2", "mean:5", {"density": 0.7}),
    ("y>x>reverse", "unit", "ltc:6/3", "fc:last2", {"learn_elapsed": True}),
    ("z:shuffled", "-", "ncp:6/4/2:3/2/2/2:frozen", "fc:4:tanh twin", {"dropout": 0.2}),
    ("z", "batch", "ncp:6/4/2:3/2/2/2", "fc", {}),
    ("y", "batch", "ncp:6/4/2:3/2/2/2:frozen", "fc damage:20", {}),
    ("z", "layer", "random:6/4/2:3/2/2/2", "fc", {"density": 1.4, "wiring_seed": 3}),
    ("z", "unit", "ncp:6/4/2:3/2/2/2:state", "fc", {}),
    ("z", "unit", "random:6/4/2:3/2/2/2:state:frozen", "fc", {}),
]
NORMALISED_AWAY = ("shrink.mix.bias", "project.0.bias", "normalise.0.running_mean")   # gradients are rounding


@pytest.mark.parametrize("circuit_learning_rate", [None, 0.01])
@pytest.mark.parametrize("scan, normaliser, circuit, readout, options", HEADS)
def test_every_kind_of_head_shares_a_step(scan, normaliser, circuit, readout, options, circuit_learning_rate):
    "Seeds at once agree with seeds apart up to rounding; a seed alone in the stack agrees to the bit."
    sentence = f"pool:1 mix:4 | {scan} | linear:6 | {normaliser} | {circuit} | {readout}"
    digits = load("digits").limited(60)
    recipe = Recipe("bce-dice", 25, 3e-3, 2, 50, 48, 0, "cpu", "float32", 1)
    recipe = replace(recipe, circuit_learning_rate=circuit_learning_rate)

    def head(seed: int) -> torch.nn.Module:
        return classifier(sentence, 10, 48, width=0.125, seed=seed, **options).head

    def trained(seeds: list[int], learner: type[Learner]) -> list[dict[str, torch.Tensor]]:
        "States of heads after training."
        folder = Path(tempfile.mkdtemp())
        trainings = [Training(head(seed), replace(recipe, seed=seed), folder / str(seed)) for seed in seeds]
        with reproducible(1):
            fit_all(trainings, digits, inputs=Maps(digits, recipe), learner=learner)
        assert not any(training.failure for training in trainings)
        return [training.model.state_dict() for training in trainings]

    assert learner_of(head(0), "cpu") == (StackedLearner, 4)
    single, stacked = trained([4, 5, 6], Learner), trained([4, 5, 6], StackedLearner)
    alone, = trained([5], StackedLearner)
    assert all(torch.equal(tensor, stacked[1][name]) for name, tensor in alone.items())
    for seed, one, other in zip((4, 5, 6), single, stacked, strict=True):
        start = head(seed).state_dict()
        for name, tensor in one.items():
            if "frozen" in circuit and name.startswith("circuit."):
                assert torch.equal(other[name], start[name])   # keeps every bit
            if not (normaliser == "batch" and name in NORMALISED_AWAY):
                tolerance = 1e-5 * float(tensor.abs().max()) + 1e-7
                torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=tolerance, msg=name)
        assert any(not torch.equal(other[name], start[name]) for name in start)
