"""A run may be killed at any instant: the same command goes on, and no bit of the result changes."""
import json
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, TINY
from disk import SOAK, outcome, report, seed_folder

from thesis_ltc.training.checkpoint import load_tensors, read_status

EPOCHS = 20
VALUES = TINY | {"epochs": EPOCHS}


def train(directory: str, slow_disk: float, every: int = 0, last: int = 0) -> None:
    """In a process of its own: one seed, on a disk whose every flush takes `slow_disk` seconds.

    Each epoch leaves the process's number in the file `trainers`. A checkpoint is written every few seconds,
    or after every so many epochs. After the `last` epoch the process is killed.
    """
    from thesis_ltc.study import Experiment, run, runs
    from thesis_ltc.training import loop

    # A second runner waits for the first, on a busy machine too.
    runs.LOCK_WAIT = 240.0
    flush = os.fsync
    os.fsync = lambda fd: (time.sleep(slow_disk), flush(fd))
    if every:
        loop.is_due = lambda trainings: (len(trainings[0].history) + 1) % every == 0

    def sign(history: list) -> None:
        with open(Path(directory) / "trainers", "a") as file:
            file.write(f"{os.getpid()}\n")
        if len(history) == last:
            os.kill(os.getpid(), signal.SIGKILL)

    run(Experiment(**VALUES), 0, directory, echo=sign)


def epochs_trained(directory: Path) -> int:
    "Epochs that any process has trained, those included that a kill has cost."
    path = directory / "trainers"
    return len(path.read_text().split()) if path.exists() else 0


@pytest.fixture(scope="module")
def expected(processes, tmp_path_factory):
    "What the run leaves when nobody disturbs it."
    directory = tmp_path_factory.mktemp("undisturbed")
    train_undisturbed(processes, directory)
    return outcome(directory)


def wait_until(condition, process, seconds: float = 120) -> bool:
    "Whether the condition came true while the process lived."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        if process.poll() is not None if hasattr(process, "poll") else not process.is_alive():
            return False
        time.sleep(0.002)
    raise AssertionError("nothing happened for two minutes")


def epochs_done(directory: Path) -> int:
    "Epochs in the checkpoint."
    folder = seed_folder(directory)
    if folder is None or not (folder / "checkpoint.safetensors").exists():
        return 0
    return len(load_tensors(folder / "checkpoint.safetensors")[1]["history"])


def is_training(directory: Path, process) -> bool:
    "Whether this very process, and no earlier one, has begun to train."
    folder = seed_folder(directory)
    if folder is None or not (folder / "status.json").exists():
        return False
    return json.loads((folder / "status.json").read_text())["pid"] == process.pid


def is_writing(directory: Path, process) -> bool:
    "Whether this very process is writing a checkpoint."
    folder = seed_folder(directory)
    return folder is not None and any(folder.glob(f".checkpoint.safetensors.{process.pid}.*.tmp"))


def is_finishing(directory: Path, process) -> bool:
    "Whether this very process is past the last epoch, and the record isn't there yet."
    folder = seed_folder(directory)
    names = ("predictions.parquet", "history.csv", "model.safetensors", "record.json")
    return folder is not None and any(list(folder.glob(f".{name}.{process.pid}.*.tmp")) for name in names)


EARLY = "the process ended before it could be killed"


def reached(kind: str, directory: Path, process, before: int):
    "A function that says whether the instant for a kill has come; `before`: epochs that were safe."
    return {
        "after": lambda: epochs_done(directory) > before,
        "writing": lambda: is_writing(directory, process),
        "anywhere": lambda: True,
        "at the end": lambda: is_finishing(directory, process),
    }[kind]


def train_undisturbed(processes, directory: Path) -> None:
    "Train to the end, and wait for it."
    process = processes.Process(target=train, args=(str(directory), 0.0))
    process.start()
    process.join()
    assert process.exitcode == 0


@pytest.mark.parametrize("number", range(32 if SOAK else 1))
def test_forked_runs_killed_at_every_kind_of_instant(processes, expected, tmp_path, number):
    "6 after a checkpoint, 4 while one is written, 3 anywhere, 2 between the last epoch and the record."
    kinds = ["after"] * 3 + ["writing"] * 4 + ["anywhere"] * 3 + ["after"] * 3 + ["at the end"] * 2
    dice = random.Random(number)
    for kind in kinds:
        before, slow = epochs_done(tmp_path), 0.2 if kind in ("writing", "at the end") else 0.05
        every = 0 if kind == "at the end" else 1 + (kind == "anywhere")
        process = processes.Process(target=train, args=(str(tmp_path), slow, every))
        process.start()
        assert wait_until(partial(is_training, tmp_path, process), process), EARLY
        if kind == "anywhere":
            time.sleep(dice.uniform(0, 0.15))
        assert wait_until(reached(kind, tmp_path, process, before), process), f"{EARLY} ({kind})"
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert epochs_done(tmp_path) >= before, "a kill lost an epoch that was safe"
        status = read_status(seed_folder(tmp_path))
        assert status["state"] == "killed" and before <= status["epoch"] <= EPOCHS, status
    train_undisturbed(processes, tmp_path)
    assert outcome(tmp_path) == expected
    report(f"kills_of_runs_{number}", kills=len(kinds), lost=0)


def test_a_kill_costs_the_epochs_since_the_last_checkpoint_and_no_bit(processes, expected, tmp_path):
    "A checkpoint every third epoch; kills before the first, at it, and after the second."
    trained = 0
    for last, safe in ((2, 0), (3, 3), (8, 6)):
        before = epochs_done(tmp_path)
        process = processes.Process(target=train, args=(str(tmp_path), 0.0, 3, last))
        process.start()
        process.join()
        trained += last - before
        assert process.exitcode == -signal.SIGKILL and epochs_done(tmp_path) == safe
        assert read_status(seed_folder(tmp_path))["epoch"] == safe and epochs_trained(tmp_path) == trained
    train_undisturbed(processes, tmp_path)
    assert outcome(tmp_path) == expected and epochs_trained(tmp_path) == trained + EPOCHS - 6


def papermill(directory: Path) -> subprocess.Popen:
    values = [part for name, value in VALUES.items() for part in ("-p", name, str(value))]
    command = [sys.executable, "-m", "papermill", "nbs/experiments/run.ipynb", str(directory / "out.ipynb"),
               *values, "-p", "runs", str(directory)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.mark.parametrize("number", range(4 if SOAK else 1))
def test_notebooks_killed_apart_from_their_kernels(expected, tmp_path, number):
    """3 kills of papermill's process, whose kernel is then an orphan, and 3 of the kernel under it.

    An orphan notices between two batches, and leaves a checkpoint of its last whole epoch, unless Jupyter,
    which asks every second, ends it before.
    """
    for turn in range(6):
        before, process = epochs_done(tmp_path), papermill(tmp_path)
        assert wait_until(psutil.Process(process.pid).children, process), EARLY
        kernel = psutil.Process(process.pid).children()[0]
        assert wait_until(partial(is_training, tmp_path, kernel), process), EARLY
        time.sleep(0.3)
        (kernel if turn % 2 else process).kill()
        process.wait()  # without its kernel, papermill gives up by itself
        assert not psutil.wait_procs([kernel], timeout=10)[1], "an orphaned kernel went on"
        status = read_status(seed_folder(tmp_path))
        assert status["state"] in ("killed", "interrupted")
        assert before <= epochs_done(tmp_path) == status["epoch"]
    assert papermill(tmp_path).wait() == 0
    assert outcome(tmp_path) == expected
    report(f"kills_of_notebooks_{number}", kills=6, lost=0)


def test_sigterm_stops_with_a_clear_status(processes, expected, tmp_path):
    "And with a checkpoint of the last whole epoch, although none was due."
    process = processes.Process(target=train, args=(str(tmp_path), 0.02, EPOCHS))
    process.start()
    assert wait_until(lambda: epochs_trained(tmp_path) >= 2, process)
    assert epochs_done(tmp_path) == 0
    process.terminate()
    process.join()
    status = read_status(seed_folder(tmp_path))
    assert process.exitcode == 1 and status["state"] == "interrupted"
    assert status["epoch"] >= 2
    assert f"the same command goes on after epoch {status['epoch']}" in status["message"]
    assert epochs_done(tmp_path) == status["epoch"] == epochs_trained(tmp_path)
    train_undisturbed(processes, tmp_path)
    assert outcome(tmp_path) == expected


def test_a_second_runner_may_not_write(processes, tmp_path):
    "Two processes start the same run: both end well, and only one has trained."
    pair = [processes.Process(target=train, args=(str(tmp_path), 0.02)) for _ in range(2)]
    for process in pair:
        process.start()
    for process in pair:
        process.join()
    assert [process.exitcode for process in pair] == [0, 0]
    trainers = (tmp_path / "trainers").read_text().split()
    assert len(trainers) == EPOCHS and len(set(trainers)) == 1
    assert len(list(tmp_path.glob("*/seed0/record.json"))) == 1
