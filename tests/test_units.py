"""Studies of heads on several trunks: planned before training, run in units, stopped, published in part."""
import io
import os
import shutil
import signal
import time
from pathlib import Path

import pandas as pd
import pytest

from thesis_ltc.core.files import read_json, read_lines
from thesis_ltc.study import runner
from thesis_ltc.study.confirmation import NOT_CHECKABLE, REPRODUCED, confirm
from thesis_ltc.study.consistency import runs_faults, shelf_faults
from thesis_ltc.study.crate import RECORDS
from thesis_ltc.study.definition import Study, read_study
from thesis_ltc.study.plan import JOB, files_missing, make_plan, start_command, states
from thesis_ltc.study.shelf import Shelf, publish, run_places
from thesis_ltc.study.stress import STRESS
from thesis_ltc.study.unit import run_unit
from thesis_ltc.training import resume
from thesis_ltc.training.checkpoint import read_status

pytestmark = pytest.mark.timeout(600)
TEXT = """
question: Does it matter who trained the trunk?
hypothesis: It does not.
margin: {metric: accuracy, value: 0.04}
primary: [ncp-z, z-fc]
data: digits
fixed: {folds: 2, image_size: 48, width: 0.125, limit: 40, epochs: 2, batch_size: 20, passes: 1,
        stacked: false, precision: float32, threads: 1, device: cpu}
trunk: {head: [fc, ncp-z], epochs: 1}
vary: {fold: [0, 1], head: [ncp-z, z-fc]}
adjust:
- {when: {head: ncp-z}, set: {learning_rate: 0.01}}
- {count: [fold], set: {wiring_seed: 100, trunk.seed: 0}}
- {count: [fold], set: {seeds: 0}}
seeds: 1
stress: {across: []}
"""


def study_in(folder: Path, text: str = TEXT) -> Study:
    "A study of two trunks in each of two folds of digits."
    (folder / "trunks.yaml").write_text(text)
    return read_study(folder / "trunks.yaml")


def train(plan: dict, *jobs: dict) -> None:
    "Do jobs of a plan in this process."
    for job in jobs:
        run_unit(read_json(Path(plan["folder"]) / job["name"] / JOB))


# From a file to tables


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Study, dict]:
    "The study, and its plan before anything was trained; then all of its jobs are done."
    folder = tmp_path_factory.mktemp("study")
    study = study_in(folder)
    plan = make_plan(study, folder / "runs")
    assert not list((folder / "runs").glob("*/seed*"))
    train(plan, *plan["jobs"])
    return study, plan


def test_every_head_reads_the_trunk_of_its_fold(finished):
    _, plan = finished
    runs = Path(plan["runs"])
    assert len(plan["trunks"]) == 4 and len(plan["cells"]) == 8 and len(plan["jobs"]) == 8
    assert files_missing(plan) == [] == runs_faults(runs) and (states(plan).state == "done").all()
    for cell in plan["cells"]:
        (seed,) = cell["seeds"]
        place = runs / cell["id"] / f"seed{seed}"
        record = read_json(place / "record.json")
        fold, head = cell["varied"]["fold"], cell["varied"]["head"]
        assert record["experiment"]["trunk"] == cell["trunk"] and record["design"] == plan["design"]
        assert record["trunk"]["head"] == cell["varied"]["trunk.head"] and record["trunk"]["data"] == "digits"
        assert record["trunk"]["seed"] == seed == fold
        of_trunk = read_json(runs / cell["trunk"] / "record.json")
        assert of_trunk["data"]["hash"] == record["data"]["hash"] and of_trunk["epochs"] == 1
        values = record["experiment"]
        adjusted = values["learning_rate"] == 0.01, values["wiring_seed"] == 100 + fold
        assert values["fold"] == fold and adjusted == (head == "ncp-z",) * 2   # a layer has no wiring
        assert pd.read_parquet(place / STRESS).condition.nunique() > 5
    for trunk in plan["trunks"]:   # trunks are not tested under stress
        assert not list((runs / trunk["id"]).glob(f"seed*/{STRESS}"))


def test_snakemake_does_the_same_jobs(finished, tmp_path):
    study, done = finished
    plan = make_plan(study, tmp_path / "runs")
    assert runner.start(plan) and files_missing(plan) == []
    for place in run_places(plan):
        here, there = (read_json(Path(one["runs"]) / place / "record.json") for one in (plan, done))
        assert here["metrics"] == there["metrics"] and here["trunk"] == there["trunk"]
    pages = [Path(plan["runs"]) / job["name"] / "run.ipynb" for job in plan["jobs"]]
    assert all("One unit of a study" in page.read_text() for page in pages)


def test_a_plan_is_the_same_before_and_after_its_trunks_are_trained(finished, tmp_path):
    study, plan = finished
    again = make_plan(study, Path(plan["runs"]))
    elsewhere = make_plan(study, tmp_path / "runs")
    for part in ("trunks", "cells", "jobs", "data_hashes", "design"):
        assert again[part] == plan[part] == elsewhere[part]
    changed = make_plan(study_in(tmp_path, TEXT.replace("epochs: 1}", "epochs: 3}")), tmp_path / "runs")
    for part in ("trunks", "cells"):   # the heads of another trunk are other experiments
        assert {cell["id"] for cell in changed[part]}.isdisjoint(cell["id"] for cell in plan[part])


def test_a_study_is_not_complete_before_its_runs_are_tested_under_stress(finished):
    _, plan = finished
    runs = Path(plan["runs"])
    unit = plan["jobs"][1]
    lost = runs / next(file for file in unit["files"] if file.endswith(STRESS))
    before = lost.read_bytes()
    records = {path: path.stat().st_mtime_ns for path in runs.glob("*/*/record.json")}
    lost.unlink()
    assert files_missing(plan) == [lost.relative_to(runs).as_posix()]
    assert "1 run is not tested under stress yet" in runner.summary(plan)
    train(plan, unit)
    pd.testing.assert_frame_equal(pd.read_parquet(lost), pd.read_parquet(io.BytesIO(before)))
    assert records == {path: path.stat().st_mtime_ns for path in runs.glob("*/*/record.json")}


# Publication


def test_a_study_is_published_unit_by_unit(finished, tmp_path):
    "The directories of the first unit are gone when the second is published: nothing of it is lost."
    _, plan = finished
    whole, runs, results = Path(plan["runs"]), tmp_path / "runs", tmp_path / "results"
    plan = plan | {"folder": str(runs)}
    first, second = plan["jobs"][:2], plan["jobs"][2:4]
    with pytest.raises(ValueError, match="12 runs have no record.*" + start_command(plan)):
        publish(plan, results)

    copy_runs(whole, runs, first)
    assert publish(plan, results) == 3
    shelf = Shelf(results / "trunks")
    there = run_places(shelf.plan)
    assert shelf_faults(shelf.folder) == [] and len(shelf.plan["waiting"]) == 9
    assert there == [Path(file).parent.as_posix() for job in first for file in job["files"]
                     if file.endswith("record.json")]
    lines, stress, curves = read_lines(shelf.folder / RECORDS), shelf.stress, shelf.histories

    shutil.rmtree(runs)
    copy_runs(whole, runs, second)
    assert publish(plan, results) == 6
    shelf = Shelf(shelf.folder)
    assert shelf_faults(shelf.folder) == [] and len(shelf.plan["waiting"]) == 6
    assert set(lines) < set(read_lines(shelf.folder / RECORDS)) and set(there) < set(run_places(shelf.plan))
    for before, after in ((stress, shelf.stress), (curves, shelf.histories)):
        kept = after[after.id.isin(before.id)].reset_index(drop=True)
        pd.testing.assert_frame_equal(kept.astype(before.dtypes), before, check_exact=True)

    shutil.rmtree(runs)
    copy_runs(whole, runs, plan["jobs"][4:])
    assert publish(plan, results) == 12 and shelf_faults(shelf.folder) == []
    complete = Shelf(shelf.folder)
    assert "waiting" not in complete.plan and complete.stress.id.nunique() == 8
    together = tmp_path / "together"
    publish(plan | {"folder": str(whole)}, together)
    assert read_lines(together / "trunks" / RECORDS) == read_lines(shelf.folder / RECORDS)


def copy_runs(source: Path, target: Path, jobs: list[dict]) -> None:
    "Copy what jobs have left, as another machine would have it."
    for place in {Path(file).parent for job in jobs for file in job["files"]}:
        shutil.copytree(source / place, target / place)


def test_half_a_unit_is_not_published(finished, tmp_path):
    _, plan = finished
    runs = tmp_path / "runs"
    copy_runs(Path(plan["runs"]), runs, plan["jobs"][:2])
    for file in plan["jobs"][1]["files"]:
        if file.endswith(STRESS):
            (runs / file).unlink()
            break
    assert publish(plan | {"folder": str(runs)}, tmp_path / "results") == 1   # the trunk
    shelf = Shelf(tmp_path / "results" / "trunks")
    assert shelf_faults(shelf.folder) == [] and len(shelf.plan["waiting"]) == 11


def test_each_trunk_of_a_study_is_trained_again_for_its_heads(finished, tmp_path):
    _, plan = finished
    publish(plan, tmp_path / "results")
    shelf = Shelf(tmp_path / "results" / "trunks")
    heads = [next(cell["id"] for cell in plan["cells"] if cell["trunk"] == f"{trunk['id']}/seed{seed}")
             for trunk in plan["trunks"][:2] for seed in trunk["seeds"]]
    assert {answer.state for _, answer in confirm(shelf, tmp_path / "none", only=heads)} == {NOT_CHECKABLE}
    found = dict(confirm(shelf, tmp_path / "fresh", train_trunk=True, only=heads))
    assert {answer.state for answer in found.values()} == {REPRODUCED} and len(found) == 2
    trained = {path.parent.parent.name for path in (tmp_path / "fresh").glob("*/seed*/record.json")}
    assert trained == {trunk["id"] for trunk in plan["trunks"][:2]}


# A stop


def train_slowly(job: str) -> None:
    "In a process of its own: a unit, a checkpoint each epoch, on a disk whose every flush takes a while."
    resume.SAVE_SECONDS = 0.0
    flush = os.fsync
    os.fsync = lambda descriptor: (time.sleep(0.03), flush(descriptor))
    run_unit(read_json(job))


def test_a_killed_unit_goes_on(processes, finished, tmp_path):
    "It is killed in its first head, in its second, and between the tables of its stress test."
    study, before = finished
    runs = tmp_path / "runs"
    plan = make_plan(study, runs)
    first, unit = plan["jobs"][:2]
    copy_runs(Path(before["runs"]), runs, [first])
    one, other = [runs / Path(file).parent for file in unit["files"] if file.endswith("record.json")]
    moments = (lambda: (one / "checkpoint.safetensors").exists(),
               lambda: (one / "record.json").exists() and (other / "status.json").exists(),
               lambda: (other / "record.json").exists())
    for has_come in moments:
        process = processes.Process(target=train_slowly, args=(str(runs / unit["name"] / JOB),))
        process.start()
        while not has_come():
            assert process.is_alive(), "the unit ended before it could be killed"
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert not all((runs / file).exists() for file in unit["files"])
    assert read_status(one)["state"] == "done"
    finished_at = (one / "record.json").stat().st_mtime_ns
    train(plan, unit)
    assert (one / "record.json").stat().st_mtime_ns == finished_at
    for place in (one, other):
        undisturbed = Path(before["runs"]) / place.relative_to(runs)
        for name in ("model.safetensors", "predictions.parquet", STRESS):
            assert (place / name).read_bytes() == (undisturbed / name).read_bytes()
        assert not list(place.glob(".*.tmp"))
