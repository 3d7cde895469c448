"""The experiment notebook through papermill's own command, as a user types it."""
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import nbformat
import papermill
import pytest
from conftest import ROOT, TINY
from nbclient.exceptions import DeadKernelError
from typer.testing import CliRunner

from thesis_ltc.cli import app, run_notebook
from thesis_ltc.study import Experiment
from thesis_ltc.study.notebook import PARAMETERS

TEMPLATE = "nbs/experiments/run.ipynb"

pytestmark = pytest.mark.timeout(240)


def papermill_command(output: Path, values: dict) -> subprocess.CompletedProcess:
    words = [word for name, value in values.items() for word in ("-p", name, str(value))]
    command = [sys.executable, "-m", "papermill", TEMPLATE, str(output), *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_parameters_cell_is_the_experiment():
    "Its names, their order and their defaults are those of the dataclass."
    found = papermill.inspect_notebook(str(ROOT / TEMPLATE))
    assert list(found) == list(PARAMETERS)
    defaults = {name: eval(about["default"]) for name, about in found.items()}  # noqa: S307, our own file
    assert defaults == vars(Experiment()) | {"seeds": 1, "runs": None, "design": None}


def test_a_notebook_shows_what_it_ran(tmp_path):
    values = TINY | {"epochs": 2, "seeds": 2, "runs": tmp_path / "runs"}
    result = papermill_command(tmp_path / "out.ipynb", values)
    assert result.returncode == 0, result.stderr
    assert len(list((tmp_path / "runs").glob("digits_ncp-z_s1_*/seed*/record.json"))) == 2
    notebook = nbformat.read(tmp_path / "out.ipynb", 4)
    shown = "\n".join(str(output) for cell in notebook.cells for output in cell.get("outputs", []))
    for words in ("thesis-ltc run data=digits", "Training images of digits", "16 x 8 x 8",
                  "multiply-accumulates",
                  "Confusion matrix", "Loss and accuracy", "surest mistakes"):
        assert words in shown, words


def test_the_book_finds_a_notebook_that_was_written_elsewhere(tmp_path):
    runs, page = tmp_path / "runs", tmp_path / "elsewhere" / "page.ipynb"
    values = [f"{name}={value}" for name, value in (TINY | {"epochs": 1, "runs": runs}).items()]
    for notebook in (page, None):   # the second lies where the first was copied to
        notebook = notebook or next(runs.glob("*/run.ipynb"))
        result = CliRunner().invoke(app, ["run", *values, "--notebook", str(notebook)])
        assert result.exit_code == 0, result.output
        (kept,) = runs.glob("digits_ncp-z_s1_*/run.ipynb")
        said = f"executed: {notebook}\n" + f"for the book: {kept}\n" * (notebook == page)
        assert result.stdout == said
    assert len(list(kept.parent.glob("seed*/record.json"))) == 1


@pytest.mark.parametrize("name, said", [
    ("__import__('os').mkdir('{trap}') #", "nothing was run"),
    ("import os; os.mkdir('{trap}'); x", "nothing was run"),
    ("hed", "did you mean head?"),
])
def test_a_program_or_an_unknown_name_is_refused(tmp_path, name, said):
    trap = tmp_path / "trap"
    values = TINY | {name.format(trap=trap): 1, "runs": tmp_path / "runs"}
    result = papermill_command(tmp_path / "out.ipynb", values)
    assert result.returncode != 0 and said in result.stderr and not trap.exists()
    assert not (tmp_path / "runs").exists()


def test_a_mistyped_value_is_refused_before_anything_runs(tmp_path):
    result = papermill_command(tmp_path / "out.ipynb", TINY | {"epochs": "many", "runs": tmp_path / "runs"})
    assert result.returncode != 0 and "epochs is 'many', but must be a whole number" in result.stderr
    assert not (tmp_path / "runs").exists()


def test_the_command_line_refuses_the_same(tmp_path):
    "`thesis-ltc run --notebook` leaves a page with the error, and prints it in a line."
    page, trap = tmp_path / "out" / "page.ipynb", tmp_path / "trap"
    values = [f"{name}={value}" for name, value in (TINY | {"runs": tmp_path / "runs"}).items()]
    command = [sys.executable, "-m", "thesis_ltc.cli", "run", "--notebook", str(page), *values]
    command.append(f"open({str(trap)!r}, 'w') #=1")
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert "the experiment failed, ExperimentError: parameters must be plain names" in result.stderr
    assert "IPKernelApp" not in result.stderr
    assert page.exists() and not trap.exists() and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("dead, ended", [(1, None), (2, RuntimeError), (0, DeadKernelError)])
def test_a_kernel_that_never_answered_is_tried_once_more(monkeypatch, tmp_path, capsys, dead, ended):
    """A RuntimeError of Jupyter comes before the first cell, so nothing has run.

    A kernel that dies in a cell may have trained, and is not started again.
    """
    calls = []

    def execute(source, page, values, **options):
        calls.append(values)
        if len(calls) <= dead:
            raise RuntimeError("Kernel didn't respond in 60 seconds")
        if ended is DeadKernelError:
            raise DeadKernelError("Kernel died")

    monkeypatch.setattr(papermill, "execute_notebook", execute)
    with pytest.raises(ended) if ended else nullcontext():
        run_notebook({"epochs": 1}, tmp_path / "page.ipynb")
    assert calls == [{"epochs": 1}] * max(1, min(2, dead + (ended is None)))
    assert capsys.readouterr().err.count("once more") == min(dead, 1)
