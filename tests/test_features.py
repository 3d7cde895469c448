"""A frozen trunk: its maps are made once, whole or not at all, and its heads are runs like any other."""
import multiprocessing
import shutil

import numpy as np
import pytest
import torch
import yaml

from thesis_ltc.checkpoint import load_tensors
from thesis_ltc.experiment import Experiment, ExperimentError, build_model, experiment_id, load_images, recipe_of, run
from thesis_ltc.features import TrunkError, features_of, read_trunk
from thesis_ltc.files import read_json
from thesis_ltc.results import load_records, varied
from thesis_ltc.study import make_plan, read_study
from thesis_ltc.training import Interrupted, predict

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
    assert len({record["trunk"]["hash"] for record in records}) == 1 and len([path for path in (tmp_path / "features").iterdir() if path.is_dir()]) == 1
    again = run(of_head(folder), 0, tmp_path / "elsewhere", echo=silent)
    for part in ("trunk", "metrics", "experiment"):
        assert again[part] == records[0][part]   # the same bits from maps computed anew

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
    assert whole.passes.shape[:2] == (3, 60) and np.isfinite(whole.passes).all() and not list((tmp_path / "half").glob("*.part"))


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


def test_identity_follows_the_weights_and_not_the_place(trunk, tmp_path):
    folder, _ = trunk
    shutil.copytree(folder, tmp_path / "moved")
    here, there = of_head(folder), of_head(tmp_path / "moved")
    digest = load_images(here).digest
    assert experiment_id(here, digest) == experiment_id(there, digest)
    assert experiment_id(of_head(folder, passes=4), digest) != experiment_id(here, digest) != experiment_id(Experiment(**SMALL, head="ncp-z"), digest)
    record = run(here, 0, tmp_path / "runs", echo=silent)
    assert run(there, 0, tmp_path / "runs", echo=lambda history: 1 / 0) == record


def test_what_is_refused(trunk, tmp_path):
    folder, _ = trunk
    with pytest.raises(TrunkError, match="no finished run in .*train it first"):
        run(of_head(tmp_path / "nothing"), 0, tmp_path, echo=silent)
    with pytest.raises(TrunkError, match="give width=0.125"):
        run(of_head(folder, width=0.25), 0, tmp_path, echo=silent)
    with pytest.raises(TrunkError, match="may have learned from images that are tested now"):
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
    assert len(table) == 2 and set(table["head"]) == {"fc", "ncp-z"} and varied(table) == ["data", "head", "setting"]
    assert table.trunk.nunique() == 1 and table.passes.tolist() == [2, 2]
