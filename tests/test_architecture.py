"""The rules of the code: order of imports, style, length of cells; each notices a violation."""
import json
import shutil
import statistics
import subprocess
from pathlib import Path

import pytest

LONGEST, MEDIAN = 60, 20   # lines of an exported cell


def lint_imports(folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(["lint-imports", "--no-cache"], cwd=folder, capture_output=True, text=True)


def ruff(folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(["ruff", "check", "--no-cache"], cwd=folder, capture_output=True, text=True)


def write_notebook(path: Path, source: str) -> None:
    cell = {"cell_type": "code", "id": "a", "metadata": {}, "execution_count": None, "outputs": []}
    notebook = {"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [cell | {"source": source}]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(notebook))


@pytest.fixture
def house(root, tmp_path) -> Path:
    "A copy of the package with the rules."
    without_caches = shutil.ignore_patterns("__pycache__")
    shutil.copytree(root / "thesis_ltc", tmp_path / "thesis_ltc", ignore=without_caches)
    shutil.copy(root / "pyproject.toml", tmp_path)
    return tmp_path


def test_imports_keep_the_order_of_wings_and_rooms(root):
    found = lint_imports(root)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize(("room", "text", "complaint"), [
    ("heads/scan.py", "from ..book.style import BLUE", "Seven wings, imports left to right BROKEN"),
    ("heads/scan.py", "from .models import HEADS", "heads: a room imports those before it BROKEN"),
    ("ltc/cell.py", "from ..core.files import PACKAGE", "takes nothing from core but processes BROKEN"),
    ("heads/attic.py", "A_ROOM_THAT_NOBODY_LISTED = True", "heads: a room imports those before it"),
])
def test_a_wrong_import_is_noticed(house, room, text, complaint):
    with open(house / "thesis_ltc" / room, "a") as file:
        file.write(f"\n{text}\n")
    found = lint_imports(house)
    assert found.returncode == 1 and complaint in found.stdout, found.stdout


def test_ruff_is_content(root):
    found = ruff(root)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize(("rule", "source"), [
    ("E501", f"name = '{'x' * 110}'\n"),
    ("F401", "import os\n"),
    ("I001", "import sys\nimport os\nos, sys\n"),
    ("B006", "def f(x=[]):\n    return x\n"),
    ("UP006", "from typing import List\n\nx: List[int] = []\n"),
])
@pytest.mark.parametrize("place", ["nbs/heads/10_x.ipynb", "tests/test_x.py", "benchmarks/x.py"])
def test_ruff_is_heard_everywhere(house, rule, source, place):
    path = house / place
    if path.suffix == ".ipynb":
        write_notebook(path, source)
    else:
        path.parent.mkdir(exist_ok=True)
        path.write_text(source)
    found = ruff(house)
    assert found.returncode == 1 and rule in found.stdout, found.stdout


def test_no_exported_cell_is_long(root):
    cells = {}
    for path in sorted(root.glob("nbs/**/*.ipynb")):
        for cell in json.loads(path.read_text())["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] == "code" and source.startswith("#| export"):
                cells[f"{path.relative_to(root)}, cell {cell['id']}"] = source.count("\n") + 1
    assert len(cells) > 500 and statistics.median(cells.values()) <= MEDIAN
    assert {name: lines for name, lines in cells.items() if lines > LONGEST} == {}


def test_only_the_command_line_is_a_flat_module(root):
    modules = sorted(path.name for path in (root / "thesis_ltc").glob("*.py"))
    assert modules == ["__init__.py", "_modidx.py", "cli.py"]
