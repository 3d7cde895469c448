"""Wherever a crash ends, and whichever operation it loses: the same command goes on, to the same bits.

Every operation on the disk is logged. From the log follow all states that a crash may leave: each beginning
of the operations, and each beginning without one that no `fsync` has ordered before the others. Each state is
written to a folder of its own, and gone on with. A state that is equal to an earlier one is not tried again.
"""
import shutil
from pathlib import Path

import pytest
from disk import Operation, crashes, logged, report, signature, write_tree
from scenarios import SCENARIOS, Scenario, training

# How many states there are at least.
LEAST = {"training": 50, "training_with_few_checkpoints": 40, "publishing": 40, "publishing_again": 40,
         "saving": 15, "keeping_maps": 12}


def survive(name: str, scenario: Scenario, done: list[Operation], tmp_path: Path) -> int:
    "Go on from every state that a crash of these operations may leave; how many there are."
    tried: set[str] = set()
    total = 0
    for text, lost, kept, tree in crashes(scenario.before, done):
        total += 1
        key = signature(tree)
        if lost.startswith("mkdir"):   # looks as if nothing had been done yet, but something was
            key += f"{len(kept)} operations"
        if key in tried:
            continue
        tried.add(key)
        place = write_tree(tmp_path / f"state{len(tried)}", tree)
        try:
            scenario.go_on(place, lost, kept)
        except Exception as error:
            raise AssertionError(f"{name}: lost after {text}: {type(error).__name__}: {error}") from error
        shutil.rmtree(place)
    report(f"crash_orders_{name}", operations=len(done), crashes=total, states=len(tried), lost=0)
    return len(tried)


def operations(scenario: Scenario, place: Path) -> list[Operation]:
    "What the scenario does to a disk when nothing disturbs it."
    with logged(write_tree(place, scenario.before)) as done:
        scenario.act(place)
    return done


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_every_crash_is_survived(scenario, tmp_path):
    (tmp_path / "home").mkdir()
    prepared = scenario(tmp_path / "home")
    done = operations(prepared, tmp_path / "logged")
    assert survive(scenario.__name__, prepared, done, tmp_path) >= LEAST.get(scenario.__name__, 3)


@pytest.mark.parametrize("forgotten", ["contents", "names", "new folders"])
def test_the_crashes_would_find_a_missing_fsync(tmp_path, forgotten):
    """Without the fsync of contents files are empty; without that of names a checkpoint has no best weights;
    without that of a new folder's name all that is in it may be gone."""
    (tmp_path / "home").mkdir()
    prepared = training(tmp_path / "home")
    done = operations(prepared, tmp_path / "logged")
    kinds = {"contents": [found.content is not None for found in done],
             "names": [found.content is None for found in done],
             "new folders": [before.name == "mkdir" for before in [done[0], *done]]}
    careless = [found for found, omitted in zip(done, kinds[forgotten], strict=False)
                if not (found.name == "fsync" and omitted)]
    assert len(careless) < len(done)
    with pytest.raises(AssertionError, match="lost after .* without "):
        survive("careless", prepared, careless, tmp_path)

