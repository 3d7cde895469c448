"""A frozen trunk: its maps are made once, whole or not at all, and its heads are runs like any other."""
import multiprocessing
import shutil
import tempfile
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from thesis_ltc.training.checkpoint import CheckpointError, RunIsBusy, load_tensors, read_status, run_lock
from thesis_ltc.study.experiment import Experiment, ExperimentError, build_model, recipe_of, resolve
from thesis_ltc.study.run import is_finished, load_images, run, run_seeds
from thesis_ltc.training.trunk import TrunkError, features_of, read_trunk
from thesis_ltc.core.files import read_json
from thesis_ltc.heads import classifier
from thesis_ltc.book.records import load_records, varied_factors
from thesis_ltc.data import load
from thesis_ltc.study.definition import read_study
from thesis_ltc.study.plan import make_plan
from thesis_ltc.training.stacked import StackedLearner, learner_of
from thesis_ltc.training.loop import Images, Interrupted, Learner, Recipe, Training, fit_all, predict
from thesis_ltc.training.recipe import reproducible

pytestmark = pytest.mark.timeout(300)
SMALL = dict(data="digits", image_size=64, width=0.125, limit=60, epochs=2, threads=1, device="cpu", precision="float32")
silent = lambda history: None


@pytest.fixture(scope="module")
def trunk(tmp_path_factory):
    "A finished run, and the folder of runs that it lies in."
    runs = tmp_path_factory.mktemp("runs")
    record = run(Experiment(**SMALL, head="fc"), 0, runs, echo=silent)
    return runs / record["id"] / "seed0", runs


def of_head(trunk, **values) -> Experiment:
    return Experiment(**SMALL | {"head": "ncp-z", "trunk": str(trunk), "passes": 2} | values)


def compute(experiment: Experiment, directory: str) -> None:
    data = load_images(experiment).limited(experiment.limit)
    features_of(read_trunk(experiment.trunk), data, recipe_of(experiment, 0), experiment.passes, directory)


def test_the_backbone_stays_and_the_head_learns(trunk, tmp_path):
    folder, runs = trunk
    record = run(of_head(folder, epochs=5, learning_rate=0.01), 0, runs, echo=silent)
    weights = load_tensors(runs / record["id"] / "seed0" / "model.safetensors")[0]
    before, trained = build_model(of_head(folder), 10, 0).state_dict(), load_tensors(folder / "model.safetensors")[0]
    assert all(torch.equal(tensor, trained[name]) for name, tensor in weights.items() if name.startswith("backbone."))
    assert all(not torch.equal(tensor, before[name]) for name, tensor in weights.items() if name.startswith("head.circuit"))
    history = (runs / record["id"] / "seed0" / "history.csv").read_text().splitlines()
    assert len(history) == 6 and record["trunk"]["run"] == folder.parent.name


def test_the_same_maps_for_every_seed_and_head_and_none_left_half(trunk, tmp_path):
    folder, _ = trunk
    records = [run(of_head(folder, head=head), seed, tmp_path, echo=silent) for head, seed in (("ncp-z", 0), ("ncp-z", 1), ("fc", 0))]
    assert len({record["trunk"]["hash"] for record in records}) == 1 and len([path for path in (tmp_path / "features").iterdir() if path.is_dir()]) == 2   # whole maps, and those of pool:2
    for seed in (0, 1):
        again = run(of_head(folder), seed, tmp_path / f"elsewhere{seed}", echo=silent)
        for part in ("trunk", "metrics", "experiment"):
            assert again[part] == records[seed][part]   # the same bits from maps computed anew, and for both seeds the same maps
    assert records[0]["metrics"] != records[1]["metrics"]

    calls = []

    def stop() -> None:
        calls.append(1)
        if len(calls) > 2:
            raise Interrupted("enough")

    data = load_images(of_head(folder)).limited(60)
    with pytest.raises(Interrupted):
        features_of(read_trunk(str(folder)), data, recipe_of(of_head(folder), 0), 3, tmp_path / "half", stop)
    assert not list((tmp_path / "half").glob("*/features.json"))
    whole = features_of(read_trunk(str(folder)), data, recipe_of(of_head(folder), 0), 3, tmp_path / "half")
    assert whole.passes.shape[:2] == (3, 60) and whole.passes.isfinite().all() and not list((tmp_path / "half").glob("*.part"))


def test_two_processes_compute_once(trunk, tmp_path):
    folder, _ = trunk
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=compute, args=(of_head(folder), str(tmp_path))) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0] and len(list(tmp_path.glob("*/features.json"))) == 1


def test_its_outputs_are_those_of_the_whole_network(trunk, tmp_path):
    folder, _ = trunk
    experiment = of_head(folder)
    data = load_images(experiment).limited(60)
    model = build_model(experiment, 10, 3)
    weights = read_trunk(str(folder)).tensors
    model.backbone.load_state_dict(weights)
    recipe = recipe_of(experiment, 0)
    features = features_of(read_trunk(str(folder)), data, recipe, 1, tmp_path)
    from_maps = predict(model.head, data, data.rows("test"), recipe, inputs=features)
    torch.testing.assert_close(from_maps, predict(model, data, data.rows("test"), recipe), rtol=0, atol=1e-5)


def test_each_seed_draws_passes_of_its_own_and_maps_follow_what_decides_them(trunk, tmp_path):
    folder, _ = trunk
    values, found = of_head(folder), {}
    data = load_images(values).limited(60)
    of = lambda data=data, passes=2, folder=folder, **recipe: features_of(read_trunk(str(folder)), data, replace(recipe_of(values, 0), **recipe), passes, tmp_path)
    rows = data.rows("train")[None, :30]
    drawn = of().training(np.concatenate([rows, rows]), [0, 1], 1, 0)
    assert not torch.equal(drawn[0], drawn[1])
    other = run(Experiment(**SMALL, head="fc"), 1, tmp_path / "runs", echo=silent)
    for name, maps in {"as it is": of(), "fewer images": of(load_images(values).limited(50)), "passes": of(passes=3), "size": of(image_size=72), "threads": of(threads=2),
                       "precision": of(precision="bfloat16"), "layout": of(memory_format="contiguous"), "trunk": of(folder=tmp_path / "runs" / other["id"] / "seed1")}.items():
        found[name] = len(maps.plain), tuple(maps.passes.shape), maps.about["hash"]
    assert len([path for path in tmp_path.iterdir() if (path / "features.json").exists()]) == len(found)   # none stands for another
    assert found["fewer images"][0] < found["as it is"][0] and found["passes"][1][0] == 3 and found["size"][1] != found["as it is"][1]
    hashes = {name: found[name][2] for name in ("as it is", "passes", "size", "precision", "trunk")}
    assert len(set(hashes.values())) == len(hashes)   # the hash follows the content
    seed = replace(recipe_of(values, 0), seed=7)
    assert features_of(read_trunk(str(folder)), data, seed, 2, tmp_path).about["made"] == of().about["made"]   # whoever asks


def test_what_was_lost_is_made_again(trunk, tmp_path):
    folder, _ = trunk
    experiment = of_head(folder)
    data = load_images(experiment).limited(60)
    make = lambda: features_of(read_trunk(str(folder)), data, recipe_of(experiment, 0), 2, tmp_path)
    first = make()
    place, = (path for path in tmp_path.iterdir() if path.is_dir())
    (place / "passes.npy").unlink()
    (place.with_name(place.name + ".part")).mkdir()
    ((place.with_name(place.name + ".part")) / "plain.npy").write_bytes(b"half")   # of one who was killed
    assert make().about["hash"] == first.about["hash"] and (place / "passes.npy").exists() and not list(tmp_path.glob("*.part"))


def test_seeds_share_steps_and_do_not_notice(trunk, tmp_path):
    "Five seeds, two stacks, against each alone; one is killed on the way and goes on; one is locked by somebody else."
    folder, _ = trunk
    experiment = of_head(folder, epochs=3)
    at_once = run_seeds(experiment, [0, 1, 2, 3, 4], tmp_path / "all", echo=silent)
    alone = run(experiment, 2, tmp_path / "one", echo=silent)
    read = lambda root, seed: {name: (root / alone["id"] / f"seed{seed}" / name).read_bytes() for name in ("predictions.parquet", "model.safetensors")}
    assert read(tmp_path / "all", 2) == read(tmp_path / "one", 2) and alone["metrics"] == at_once[2]["metrics"]
    calls = []

    def stop(history: list) -> None:
        calls.append(len(history))
        if len(calls) == 6:   # two of four seeds have their second epoch
            raise Interrupted("enough")

    with pytest.raises(Interrupted):
        run_seeds(experiment, [0, 1, 2, 3], tmp_path / "killed", echo=stop)
    states = [read_json(tmp_path / "killed" / alone["id"] / f"seed{seed}" / "status.json") for seed in range(4)]
    assert [state["state"] for state in states] == ["interrupted"] * 4 and [state["epoch"] for state in states] == [2, 2, 1, 1]
    with run_lock(tmp_path / "killed" / alone["id"] / "seed3"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_module("thesis_ltc.study.run"), "PATIENCE", 0.1)
        found = run_seeds(experiment, [0, 1, 2, 3], tmp_path / "killed", echo=silent)
    assert isinstance(found[3], RunIsBusy) and all(read(tmp_path / "killed", seed) == read(tmp_path / "all", seed) for seed in (0, 1, 2))
    assert run_seeds(experiment, [3], tmp_path / "killed", echo=silent)[3]["metrics"] == at_once[3]["metrics"]
    assert all(is_finished(tmp_path / "killed" / alone["id"] / f"seed{seed}") for seed in range(4))


def test_a_broken_checkpoint_stops_its_seed_alone(trunk, tmp_path):
    folder, _ = trunk
    experiment = of_head(folder)
    place = tmp_path / resolve(experiment, load_images(experiment)).id
    (place / "seed1").mkdir(parents=True)
    (place / "seed1" / "checkpoint.safetensors").write_bytes(b"no checkpoint")
    found = run_seeds(experiment, [0, 1], tmp_path, echo=silent)
    assert isinstance(found[1], CheckpointError) and "delete it" in str(found[1]) and found[0]["epochs"] == 2
    assert read_status(place / "seed1")["state"] == "failed" and read_status(place / "seed0")["state"] == "done"


def test_identity_follows_the_weights_and_not_the_place(trunk, tmp_path):
    folder, _ = trunk
    shutil.copytree(folder, tmp_path / "moved")
    here, there = of_head(folder), of_head(tmp_path / "moved")
    images = load_images(here)
    assert resolve(here, images).id == resolve(there, images).id
    assert resolve(of_head(folder, passes=4), images).id != resolve(here, images).id
    assert resolve(here, images).id != resolve(Experiment(**SMALL, head="ncp-z"), images).id
    record = run(here, 0, tmp_path / "runs", echo=silent)
    assert run(there, 0, tmp_path / "runs", echo=lambda history: 1 / 0) == record


def test_what_is_refused(trunk, tmp_path):
    folder, _ = trunk
    with pytest.raises(TrunkError, match="no finished run in .*train it first"):
        run(of_head(tmp_path / "nothing"), 0, tmp_path, echo=silent)
    with pytest.raises(TrunkError, match="give width=0.125"):
        run(of_head(folder, width=0.25), 0, tmp_path, echo=silent)
    with pytest.raises(TrunkError, match="has seen .* of the pictures that are tested here"):
        run(of_head(folder, repeat=1), 0, tmp_path, echo=silent)
    with pytest.raises(ExperimentError, match="passes is 0"):
        of_head(folder, passes=0)
    run(of_head(folder, repeat=1, accept_leakage=True, epochs=1), 0, tmp_path, echo=silent)   # said expressly


def test_a_study_on_a_trunk_shares_records_and_tables(trunk, tmp_path):
    folder, _ = trunk
    path = tmp_path / "frozen.yaml"
    fixed = {name: value for name, value in SMALL.items() if name != "data"} | {"trunk": str(folder), "passes": 2}
    path.write_text(yaml.safe_dump({"question": "q?", "hypothesis": "h", "margin": {"metric": "accuracy", "value": 0.02}, "primary": ["ncp-z", "fc"], "budget": "seconds",
                                    "data": "digits", "fixed": fixed, "vary": {"head": ["fc", "ncp-z"]}, "seeds": 1}))
    plan = make_plan(read_study(path), tmp_path / "runs")
    for cell in plan["cells"]:
        values = read_json(tmp_path / "runs" / cell["id"] / "experiment.json")
        experiment = Experiment(**{name: value for name, value in values.items() if name in SMALL or name in ("head", "trunk", "passes")})
        assert run(experiment, 0, tmp_path / "runs", echo=silent)["id"] == cell["id"]
    table = load_records(tmp_path / "runs")
    assert len(table) == 2 and set(table["head"]) == {"fc", "ncp-z"} and varied_factors(table) == ["data", "head", "setting"]
    assert table.trunk.nunique() == 1 and table.passes.tolist() == [2, 2]


class Maps(Images):
    "Images as a random backbone sees them."
    backbone = classifier("pool:1 | flat | - | - | - | fc", 10, 48, width=0.125, seed=9).backbone.eval().requires_grad_(False)

    def training(self, rows, seeds, epoch, number):
        return [self.backbone(images) for images in super().training(rows, seeds, epoch, number)]

    def evaluation(self, rows):
        return self.backbone(super().evaluation(rows))


@pytest.mark.parametrize("circuit_learning_rate", [None, 0.01])
@pytest.mark.parametrize("scan, normaliser, circuit, readout, options", [
    ("z+reverse", "unit", "ncp:6/4/2:3/2/2/2", "fc", {}),
    ("z+reverse:shared", "layer", "ncp:6/4/2:3/2/2/2", "attention", {}),
    ("y+x+z", "layer", "cfc:6/4/2:3/2/2/2", "mean:5", {"density": 0.7}),
    ("y>x>reverse", "unit", "ltc:6/3", "fc:last2", {"learn_elapsed": True}),
    ("z:shuffled", "-", "ncp:6/4/2:3/2/2/2:frozen", "fc:4:tanh twin", {"dropout": 0.2}),
    ("z", "batch", "ncp:6/4/2:3/2/2/2", "fc", {}),
    ("y", "batch", "ncp:6/4/2:3/2/2/2:frozen", "fc damage:20", {}),
])
def test_every_kind_of_head_shares_a_step(scan, normaliser, circuit, readout, options, circuit_learning_rate):
    "Seeds at once agree with seeds apart up to rounding; and a seed in company with itself alone, to the bit."
    sentence = f"pool:1 mix:4 | {scan} | linear:6 | {normaliser} | {circuit} | {readout}"
    digits = load("digits").limited(60)
    recipe = Recipe("bce-dice", 25, 3e-3, 2, 50, 48, 0, "cpu", "float32", 1, circuit_learning_rate=circuit_learning_rate)

    def trained(seeds, learner):
        heads = {seed: classifier(sentence, 10, 48, width=0.125, seed=seed, **options).head for seed in seeds}
        assert all(learner_of(head, "cpu")[0] is StackedLearner for head in heads.values())
        trainings = [Training(head, replace(recipe, seed=seed), Path(tempfile.mkdtemp())) for seed, head in heads.items()]
        with reproducible(1):
            fit_all(trainings, digits, inputs=Maps(digits, recipe), learner=learner)
        assert not any(training.failure for training in trainings)
        return [training.model.state_dict() for training in trainings]

    if "frozen" in circuit:   # keeps every bit of its start
        for seed, state in zip([4, 5, 6], trained([4, 5, 6], StackedLearner), strict=True):
            start = classifier(sentence, 10, 48, width=0.125, seed=seed, **options).head.circuit.state_dict()
            assert start and all(torch.equal(tensor, state[f"circuit.{name}"]) for name, tensor in start.items())
    apart, at_once, (alone,) = trained([4, 5, 6], Learner), trained([4, 5, 6], StackedLearner), trained([5], StackedLearner)
    for one, other in zip(apart, at_once, strict=True):
        for name, tensor in one.items():
            if normaliser == "batch" and name in ("shrink.mix.bias", "project.0.bias", "normalise.0.running_mean"):
                continue   # the normaliser takes the bias off again, so that its gradient is nothing but rounding, and its mean follows the bias
            torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-5 * float(tensor.abs().max()) + 1e-7, msg=name)
    assert all(torch.equal(tensor, at_once[1][name]) for name, tensor in alone.items())


@pytest.mark.parametrize("head", ["z-lstm", "z-cfc", "z-frozen", "ncp-z-bi", "fc"])
def test_a_record_says_what_a_circuit_remembers_and_how_far_it_travelled(head, trunk, tmp_path):
    folder, _ = trunk
    record = run(of_head(folder, head=head, epochs=3, learning_rate=0.01), 0, tmp_path, echo=silent)
    sequences = {"fc": 0, "ncp-z-bi": 2}.get(head, 1)
    for when in ("before", "after"):
        assert [len(curve) for curve in record["memory"][when]] == [16] * sequences and all(value >= 0 for curve in record["memory"][when] for value in curve)
    assert (record["memory"]["before"] != record["memory"]["after"]) == (sequences > 0)
    names = set(record["travelled"])
    assert all(name.startswith("head.") for name in names) and all(way["moved"] > 0 for way in record["travelled"].values())
    assert any(name.startswith("head.circuit") for name in names) == (head not in ("fc", "z-frozen"))
