"""Published results are replayed by the present code; changing its text changes no answer."""
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from thesis_ltc.study.confirmation import NOT_CHECKABLE, REPRODUCED, by_experiment, replay_experiment
from thesis_ltc.study.shelf import Shelf, find_shelves

ASSAY = Shelf(ROOT / "results" / "assay")
RECORDS = by_experiment(ASSAY)
RUNS = ROOT / "runs"


@pytest.mark.parametrize("identifier", list(RECORDS))
def test_every_experiment_of_the_assay_is_reproduced(identifier: str) -> None:
    answer = replay_experiment(RECORDS[identifier], ASSAY, RUNS)
    assert answer.state == REPRODUCED, answer.detail


@pytest.mark.parametrize("name", [shelf.folder.name for shelf in find_shelves(ROOT / "results")])
def test_what_differs_on_a_shelf_is_explained(name: str) -> None:
    shelf = Shelf(ROOT / "results" / name)
    assert set(shelf.replays) == set(by_experiment(shelf)), f"run `thesis-ltc confirm {name}`"
    for identifier, answer in shelf.replays.items():
        explained = answer["state"] in (REPRODUCED, NOT_CHECKABLE) or answer.get("explanation")
        assert explained, f"{identifier} differs, and nobody said why"


REPLAY = """
from pathlib import Path
import sys
import thesis_ltc
from thesis_ltc.study.confirmation import by_experiment, replay_experiment
from thesis_ltc.study.shelf import Shelf

shelf = Shelf(Path(sys.argv[1]))
records = by_experiment(shelf)[sys.argv[2]]
print(thesis_ltc.__file__)
print(replay_experiment(records, shelf, Path(sys.argv[3])).detail)
"""


def replayed_by(package: Path, identifier: str) -> str:
    "What a copy of the package answers for an experiment of the assay."
    command = [sys.executable, "-c", REPLAY, str(ASSAY.folder), identifier, str(package.parent / "runs")]
    environment = os.environ | {"PYTHONPATH": str(package.parent)}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=package.parent, check=True)
    place, detail = done.stdout.splitlines()
    assert Path(place).parent == package
    return detail


def test_a_changed_text_changes_no_answer_and_a_changed_number_does(tmp_path: Path) -> None:
    package = tmp_path / "thesis_ltc"
    shutil.copytree(ROOT / "thesis_ltc", package, ignore=shutil.ignore_patterns("__pycache__"))
    identifier = next(name for name in RECORDS if "rows-ncp_" in name)
    before = replayed_by(package, identifier)
    for module in package.rglob("*.py"):
        module.write_text(module.read_text() + "\n# reworded\n")
    heads = package / "heads" / "models.py"
    text = heads.read_text()
    added = re.sub(r"(?m)^REPORT = \{", 'REPORT = {\n    "added": "pool:4 | flat | - | - | - | fc",', text)
    assert added != text
    heads.write_text(added)
    assert replayed_by(package, identifier) == before
    objective = package / "training" / "objective.py"
    text = objective.read_text()
    changed = text.replace("DICE_WEIGHT = 1.0\n", "DICE_WEIGHT = 1.001\n")
    assert changed != text
    objective.write_text(changed)
    assert "largest relative difference" in replayed_by(package, identifier) != before
