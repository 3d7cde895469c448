"""The rules of the code: order of imports, style, length of cells; each notices a violation."""
import ast
import json
import re
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


# Calls that change a disk: functions with the module that has them, and methods of a path or an object.
FUNCTIONS = {
    "os": {"replace", "rename", "renames", "remove", "unlink", "mkdir", "makedirs", "rmdir", "removedirs",
           "link", "symlink", "truncate", "write", "fsync"},
    "shutil": {"rmtree", "copy", "copy2", "copyfile", "copyfileobj", "copytree", "move"},
    "np": {"save", "savez", "savez_compressed", "savetxt", "memmap"},
    "torch": {"save"},
}
METHODS = {"write_text", "write_bytes", "mkdir", "unlink", "rmdir", "touch", "symlink_to", "hardlink_to",
           "tofile", "savefig", "save_as", "save_file", "open_memmap"}
LAYER = "core/files.py"
ELSEWHERE = {   # module and call, and why it may stand there
    "book/appendix.py touch": "pages of the book are made again from the records",
    "book/build.py rmdir": "pages of the book are made again from the records",
    "book/build.py unlink": "pages of the book are made again from the records",
    "book/dependencies.py unlink": "pages of the book are made again from the records",
    "book/execution.py rmtree": "executed pages are a cache of Jupyter's",
    "book/drawings.py savefig": "figures are drawn again",
    "book/style.py savefig": "into memory",
    "book/kernels.py rmtree": "sockets of a kernel, in a temporary folder",
    "data/dicom.py mkdir": "a made-up series, for tests and pages",
    "data/dicom.py save_as": "a made-up series, for tests and pages",
    "data/fashion.py mkdir": "apt-get's lists, in a temporary folder",
    "data/fashion.py touch": "apt-get's lists, in a temporary folder",
    "data/packs.py memmap": "a nameless temporary file, whose room is reserved",
    "data/packs.py ZipFile": "within `perform`",
    "study/outcome.py write_text": "to /proc: resets the peak of memory",
    "study/runner.py open": "the output of Snakemake, a log",
}


def calls_that_write(source: str) -> set[str]:
    "Names of the functions that a module calls, or hands to `partial`, and that change a disk."
    found = set()
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        function, given = call.func, call.args
        if getattr(function, "id", "") == "partial":
            function, given = given[0], given[1:]
        name = getattr(function, "attr", getattr(function, "id", ""))
        owner = getattr(getattr(function, "value", None), "id", None)
        values = [*given, *(keyword.value for keyword in call.keywords)]
        texts = [str(value.value) for value in values if isinstance(value, ast.Constant)]
        is_mode = any(len(text) < 4 and set(text) & set("wax+") for text in texts)
        is_path_method = name in ("replace", "rename") and len(given) == 1 and not call.keywords
        is_opened = name in ("open", "ZipFile", "GzipFile", "TarFile") and is_mode
        if name in METHODS or name in FUNCTIONS.get(owner, ()) or is_path_method or is_opened:
            found.add(name)
    return found


def test_only_one_layer_writes(root):
    found = {}
    for path in sorted((root / "thesis_ltc").rglob("*.py")):
        room = path.relative_to(root / "thesis_ltc").as_posix()
        found |= {f"{room} {name}": room for name in calls_that_write(path.read_text()) if room != LAYER}
    others, gone = sorted(set(found) - set(ELSEWHERE)), sorted(set(ELSEWHERE) - set(found))
    assert not others, f"write through core.files, or say here why not: {others}"
    assert not gone, f"these write no more: {gone}"
    layer = calls_that_write((root / "thesis_ltc" / LAYER).read_text())
    assert layer >= {"open", "replace", "rmtree", "unlink", "fsync"}


@pytest.mark.parametrize(("source", "name"), [
    ("open(path, 'w')", "open"), ("open(path, mode='ab')", "open"), ("path.open('r+')", "open"),
    ("path.write_text(text)", "write_text"), ("path.rename(other)", "rename"),
    ("path.replace(other)", "replace"), ("os.replace(one, two)", "replace"), ("np.save(path, a)", "save"),
    ("shutil.copyfile(one, two)", "copyfile"), ("torch.save(a, path)", "save"),
    ("partial(open, path, 'wb')", "open"), ("partial(path.unlink)", "unlink"),
    ("zipfile.ZipFile(path, 'a')", "ZipFile"), ("os.makedirs(path)", "makedirs"),
])
def test_a_write_elsewhere_is_noticed(source, name):
    assert calls_that_write(source) == {name}


@pytest.mark.parametrize("source", [
    "open(path)", "open(path, 'rb')", "text.replace('a', 'b')", "replace(experiment, seed=1)",
    "data.save(folder)", "table.rename(columns=names)", "zipfile.ZipFile(path)", "atomic_write(path, text)",
    "copy.copy(model)",
])
def test_reading_is_no_writing(source):
    assert calls_that_write(source) == set()


DRAWS = re.compile(r"\btorch\.(rand|randn|randint|randperm|rand_like|randn_like)\((?!.*generator)")
SEEDED = re.compile(r"manual_seed\(|seeded\(")


def unseeded_cells(cells: list[dict]) -> list[str]:
    "Cells of a page, not exported, that draw from torch's own generator before anything has seeded it."
    drawing, seeded = [], False
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and "#| export" not in source:
            seeded = seeded or bool(SEEDED.search(source))
            if DRAWS.search(source) and not seeded:
                drawing.append(cell["id"])
    return drawing


def test_pages_draw_the_same_numbers_each_time(root):
    "Torch seeds its generator anew in each process: a check of drawn numbers would fail now and then."
    found = {}
    for path in sorted((root / "nbs").rglob("*.ipynb")):
        if drawing := unseeded_cells(json.loads(path.read_text(encoding="utf-8"))["cells"]):
            found[path.name] = drawing
    assert found == {}


@pytest.mark.parametrize("sources, drawing", [
    (["torch.rand(3)", "torch.manual_seed(0)"], ["0"]), (["torch.manual_seed(0)\nx = torch.randn(3)"], []),
    (["torch.randint(3, generator=stream)"], []), (["#| export\ntorch.rand(3)", "torch.randperm(4)"], ["1"])])
def test_an_unseeded_draw_is_noticed(sources, drawing):
    cells = [{"cell_type": "code", "id": str(place), "source": [text]} for place, text in enumerate(sources)]
    assert unseeded_cells(cells) == drawing
