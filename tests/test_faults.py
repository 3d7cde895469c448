"""An operation on a disk may fail, and a process may end: nothing is lost, and a message says what to do.

A full disk, a broken one, one that became read-only, and a process without a free file handle: at each
operation, once or from then on. SIGTERM and SIGKILL at each operation. A disk that is full indeed. Two
studies that need one trunk. A clock that jumps back.
"""
import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import conftest
import pytest
from disk import SOAK, harmed, logged, report, seed_folder, write_tree
from scenarios import EPOCHS, SCENARIOS, TINY, Scenario, training, without_echo

from thesis_ltc.core.files import FULL, DiskIsFull, read_json
from thesis_ltc.study import run, runs
from thesis_ltc.study.definition import Study
from thesis_ltc.study.plan import JOB, make_plan
from thesis_ltc.study.unit import run_unit
from thesis_ltc.training import checkpoint
from thesis_ltc.training.checkpoint import read_status
from thesis_ltc.training.loop import Interrupted

pytestmark = pytest.mark.timeout(3000 if SOAK else 300)
ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EMFILE)


def failure(number: int) -> Callable[[Callable], None]:
    "What raises that error, as the system does, and leaves the operation undone."
    def fail(action: Callable) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def count_operations(scenario: Scenario, place: Path) -> int:
    with logged(write_tree(place, scenario.before)) as done:
        scenario.act(place)
    return len(done)


def faults(operations: int) -> list[tuple[int, int, bool]]:
    "Operation, error, and whether all that follow fail, too: each error at each operation, or one of them."
    if SOAK:
        return [(at, number, forever) for at in range(operations) for number in ERRORS
                for forever in (False, True)]
    return [(at, ERRORS[at % 4], at // 4 % 2 == 0) for at in range(operations)]


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_every_error_of_a_disk_is_survived(scenario, tmp_path):
    (tmp_path / "home").mkdir()
    prepared = scenario(tmp_path / "home")
    tried, told = faults(count_operations(prepared, tmp_path / "logged")), 0
    for at, number, forever in tried:
        place = write_tree(tmp_path / "place", prepared.before)
        with harmed(place, at, failure(number), forever) as done:
            try:
                prepared.act(place)
            except OSError as error:
                told += 1
                assert error.errno == number and str(place) in str(error), error
                assert isinstance(error, DiskIsFull) == (number in FULL)
                if number in FULL:
                    assert "mounted at" in str(error) and "complete is lost" in str(error)
        try:
            prepared.go_on(place, "", done)
        except Exception as error:
            raise AssertionError(f"lost after {os.strerror(number)} at {at}, {forever=}: {error}") from error
        shutil.rmtree(place)
    report(f"faults_{scenario.__name__}", faults=len(tried), told=told, lost=0)
    assert told > len(tried) / 2


def test_sigterm_at_every_operation_is_survived(tmp_path):
    "The run stops between two batches, or is over before; the same command goes on to the same bits."
    (tmp_path / "home").mkdir()
    prepared = training(tmp_path / "home")
    tried, stopped = 0, 0

    def terminate(action: Callable) -> object:
        if signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:   # else the signal is that of a kill
            os.kill(os.getpid(), signal.SIGTERM)
        return action()

    for at in range(0, count_operations(prepared, tmp_path / "logged"), 1 if SOAK else 7):
        place = write_tree(tmp_path / "place", {})
        with harmed(place, at, terminate) as done:
            try:
                without_echo(place)
            except Interrupted:
                stopped += 1
                status = read_status(seed_folder(place))
                assert status["state"] == "interrupted" and "the same command goes on" in status["message"]
        prepared.go_on(place, "", done)
        shutil.rmtree(place)
        tried += 1
    report("sigterm", signals=tried, stopped=stopped, lost=0)
    assert stopped > tried / 3


def train_and_die(place: str, at: int, number: int) -> None:
    "In a process of its own: a run that is ended by a signal before, or after, one of its operations."
    def die(action: Callable) -> None:
        if at % 2:
            action()
        os.kill(os.getpid(), number)

    with harmed(Path(place), at, die):
        without_echo(Path(place))


def test_sigkill_at_every_operation_is_survived(processes, tmp_path):
    (tmp_path / "home").mkdir()
    prepared = training(tmp_path / "home")
    count = count_operations(prepared, tmp_path / "logged")
    numbers = range(count) if SOAK else range(3, count, 18)
    for at in numbers:
        place = write_tree(tmp_path / "place", {})
        process = processes.Process(target=train_and_die, args=(str(place), at, signal.SIGKILL))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert at < 8 or read_status(seed_folder(place))["state"] in ("killed", "done")
        prepared.go_on(place, "", [])
        shutil.rmtree(place)
    report("sigkill", kills=len(numbers), lost=0)


FULL_DISK = """
import subprocess, sys
from pathlib import Path
sys.path.insert(0, "tests")
from disk import outcome
from scenarios import without_echo

place = Path(sys.argv[1])
try:
    without_echo(place / "runs")
except OSError as error:
    print(error, flush=True)
subprocess.run(["mount", "-o", "remount,size=64m", place], check=True)
without_echo(place / "runs")
without_echo(place / "undisturbed")
assert outcome(place / "runs") == outcome(place / "undisturbed")
print("the same bits")
"""


def in_a_small_disk(place: Path, size: str, command: list[str]) -> subprocess.CompletedProcess:
    "What a command does while a disk of that size is mounted at a place, for it alone."
    mount = 'mount -t tmpfs -o size=$0 none "$1" && shift && exec "$@"'
    return subprocess.run(["unshare", "-rm", "sh", "-c", mount, size, str(place), *command],
                          cwd=conftest.ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("size", ["24k", "80k"])
def test_a_disk_that_is_full_is_named_and_the_run_goes_on(tmp_path, size):
    if shutil.which("unshare") is None or in_a_small_disk(tmp_path, "64k", ["true"]).returncode:
        pytest.skip("no disk can be mounted here for a process alone")
    done = in_a_small_disk(tmp_path, size, [sys.executable, "-c", FULL_DISK, str(tmp_path)])
    assert done.returncode == 0, done.stderr
    message, end = done.stdout.splitlines()
    assert message.startswith(f"the disk mounted at {tmp_path} is full: {tmp_path}/runs/digits_fc"), message
    assert " needs " in message and " are free. Nothing that was complete is lost" in message
    assert end == "the same bits"


FROZEN = {name: value for name, value in conftest.TINY.items() if name not in ("data", "head")}
FROZEN["epochs"] = 2


def plan_with_trunk(place: str, name: str) -> None:
    "In a process of its own: the first job of a study. Each epoch leaves a line."
    runs.LOCK_WAIT = 240.0   # the other is waited for, on a busy machine, too
    begun = runs.make_training

    def signed(*arguments):
        training = begun(*arguments)
        report_epoch = training.on_epoch

        def on_epoch(history):
            with open(Path(place) / "trainers", "a") as file:
                file.write(f"{os.getpid()}\n")
            report_epoch(history)

        training.on_epoch = on_epoch
        return training

    runs.make_training = signed
    margin = {"metric": "accuracy", "value": 0.02}
    study = Study(name, "Is it?", "It is.", margin, ["fc", "ncp-z"], {"head": ["fc", "ncp-z"]}, 1, FROZEN,
                  "digits", trunk={"head": "fc"})
    plan = make_plan(study, Path(place))
    run_unit(read_json(Path(place) / plan["jobs"][0]["name"] / JOB))
    (trunk,) = plan["trunks"]
    assert (Path(place) / trunk["id"] / "seed0" / "record.json").exists()


def test_two_studies_train_the_trunk_that_they_share_once(processes, tmp_path):
    pair = [processes.Process(target=plan_with_trunk, args=(str(tmp_path), name)) for name in ("one", "two")]
    for process in pair:
        process.start()
    for process in pair:
        process.join()
    assert [process.exitcode for process in pair] == [0, 0]
    trainers = (tmp_path / "trainers").read_text().split()
    assert len(trainers) == FROZEN["epochs"] and len(set(trainers)) == 1
    assert len(list(tmp_path.glob("*.plan.json"))) == 2


def test_a_clock_that_jumps_back_changes_nothing(tmp_path):
    "A run is stopped; then the clock shows a year before, and its files are from the future."
    (tmp_path / "home").mkdir()
    prepared = training(tmp_path / "home")
    place = write_tree(tmp_path / "place", {})

    def stop(history: list) -> None:
        if len(history) == 2:
            raise Interrupted("for the test")

    with pytest.raises(Interrupted):
        run(TINY, 0, place, echo=stop)
    assert read_status(seed_folder(place))["epoch"] == 2 < EPOCHS
    for path in place.rglob("*"):
        os.utime(path, (time.time() + 1e8,) * 2)
    before = time.time() - 3e7
    with patch.object(checkpoint, "now", lambda: "2025-12-01T00:00:00+0000"), \
            patch.object(time, "time", lambda: before):
        trained = []
        run(TINY, 0, place, echo=trained.append)
    assert len(trained) == EPOCHS - 2
    prepared.go_on(place, "", [])
