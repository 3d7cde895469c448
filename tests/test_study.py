"""Studies run by Snakemake: failures, repeats, stops, and the command for a cluster."""
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, TINY

from thesis_ltc.core.files import write_json
from thesis_ltc.study import runner
from thesis_ltc.study.definition import Study
from thesis_ltc.study.plan import make_plan, states

pytestmark = pytest.mark.timeout(300)
FIXED = {name: value for name, value in TINY.items() if name not in ("data", "head")}


def plan_in(runs: Path, heads: list[str], seeds: int, **fixed) -> dict:
    "The plan of a study of some heads on digits."
    margin, vary = {"metric": "accuracy", "value": 0.02}, {"head": heads}
    study = Study("small", "Is it?", "It is.", margin, heads[:2], vary, seeds, FIXED | fixed, "digits")
    return make_plan(study, runs)


def state_of(plan: dict) -> dict[str, list[str]]:
    "States of the seeds of each head."
    table, heads = states(plan), {cell["id"]: cell["head"] for cell in plan["cells"]}
    return {head: table[table.experiment == identifier].state.tolist() for identifier, head in heads.items()}


@pytest.fixture(scope="module")
def halfway(tmp_path_factory):
    "A study of two heads that work and one whose 16 rows don't exist at 112 px, after its first start."
    runs = tmp_path_factory.mktemp("study") / "runs"
    plan = plan_in(runs, ["fc", "ncp-z", "ncp-y-double"], 2, epochs=1, image_size=112)
    return plan, runner.start(plan)


def records(plan: dict) -> dict[str, int]:
    "When each record was written."
    paths = Path(plan["runs"]).glob("*/seed*/record.json")
    return {str(path.relative_to(plan["runs"])): path.stat().st_mtime_ns for path in paths}


def test_a_failing_experiment_leaves_its_page_and_stops_nobody(halfway, capfd):
    plan, complete = halfway
    assert not complete
    assert state_of(plan) == {"fc": ["done"] * 2, "ncp-z": ["done"] * 2, "ncp-y-double": ["failed"] * 2}
    failed = next(cell["id"] for cell in plan["cells"] if cell["head"] == "ncp-y-double")
    page = (Path(plan["runs"]) / failed / "run.ipynb").read_text()
    assert "UpsamplingError" in page and "the map at 112 px has 13" in page
    assert "UpsamplingError: grid:16 needs at least 16 rows" in states(plan).message.iloc[-1]
    assert "UpsamplingError" in runner.summary(plan)


def test_only_what_is_missing_is_run_again(halfway):
    plan, _ = halfway
    before = records(plan)
    gone = next(path for path in before if "_fc_" in path and "seed1" in path)
    shutil.rmtree(Path(plan["runs"]) / Path(gone).parent)
    assert not runner.start(plan)
    after = records(plan)
    assert after.keys() == before.keys() and {path for path in after if after[path] != before[path]} == {gone}


def test_nothing_is_started_when_all_is_there(halfway, tmp_path):
    plan, _ = halfway
    failed = {cell["id"] for cell in plan["cells"] if cell["head"] == "ncp-y-double"}
    finished = plan | {"cells": [cell for cell in plan["cells"] if cell["id"] not in failed],
                       "jobs": [job for job in plan["jobs"] if job["name"] not in failed]}
    log = Path(plan["runs"]) / "small.snakemake.log"
    before = log.stat().st_mtime_ns
    began = time.monotonic()
    assert runner.start(finished) and time.monotonic() - began < 5 and log.stat().st_mtime_ns == before


def test_the_log_of_a_job_that_ended_before_its_run_is_shown(tmp_path, capfd):
    plan = plan_in(tmp_path / "runs", ["fc"], 1, epochs=1)
    folder = Path(plan["runs"]) / plan["cells"][0]["id"]
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho RuntimeError: the kernel is ill\nexit 1\n")
    python.chmod(0o755)
    write_json(plan["file"], plan | {"python": str(python)})
    assert not runner.start(plan) and state_of(plan) == {"fc": ["waiting"]}
    assert f"the end of {folder / 'run.log'}:\nRuntimeError: the kernel is ill" in capfd.readouterr().err


START = """
from thesis_ltc.study import runner
from thesis_ltc.study.plan import load_plans
(plan,) = load_plans({runs!r})
runner.start(plan)
"""


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_study_stops_its_jobs_and_goes_on(tmp_path, stop):
    plan = plan_in(tmp_path / "runs", ["fc"], 2, epochs=30)
    code = START.format(runs=plan["runs"])
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 120
    while "running" not in set(states(plan).state):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.1)
    time.sleep(0.5)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(stop)
    said = process.communicate(timeout=60)[1]
    if stop == signal.SIGTERM:
        assert process.returncode == 143 and "the same command goes on from the last whole epochs" in said
    else:
        assert process.returncode == -signal.SIGKILL and not said
    psutil.wait_procs(children, timeout=15)
    alive = [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    assert not alive, "jobs outlived their study"
    stopped = states(plan).iloc[0]
    assert stopped.state in ("interrupted", "killed") and stopped.epoch < stopped.epochs
    assert "the same command goes on" in stopped.message
    assert runner.start(plan) and state_of(plan) == {"fc": ["done"] * 2}


def test_the_slurm_profile_is_accepted(tmp_path):
    "A dry run: on a cluster this command would submit a job for each experiment."
    values = ["--set", "data=digits", "--set", "device=cpu", "--set", "precision=float32"]
    command = [sys.executable, "-m", "thesis_ltc.cli", "study", "quick", *values,
               "--profile", "profiles/slurm", "--dry-run"]
    before = {path: path.stat().st_mtime_ns for path in ROOT.glob("runs/*")}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    after = {path: path.stat().st_mtime_ns for path in ROOT.glob("runs/*")}
    own = {ROOT / "runs" / ".snakemake"}   # where Snakemake keeps its notes
    assert after.keys() - own == before.keys() - own, "a dry run left something behind"
    changed = [path for path in after if path.suffix == ".json" and after[path] != before[path]]
    assert not changed, "a dry run changed a plan"
    assert "7 experiments, 14 runs" in result.stdout
    assert len(re.findall(r"(?m)^would run digits_[\w-]+, seeds 0, 1$", result.stdout)) == 7
