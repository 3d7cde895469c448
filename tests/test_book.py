"""A small book, built, broken and mended with the real configuration; and the report's pages, executed."""
import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import change_lines, unpack_run
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from page_checks import browser, faults, report

from thesis_ltc.book import build as book
from thesis_ltc.book.execution import executed_pages
from thesis_ltc.book.kernels import POSSIBLE
from thesis_ltc.core.files import PACKAGE, atomic_write

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.timeout(240)
TOC = """\
format: jb-book
root: nbs/index
parts:
  - caption: Pages
    chapters:
      - file: nbs/other
      - file: nbs/prose-0
      - file: nbs/prose-1
      - file: nbs/prose-2
      - file: nbs/experiments
        sections:
          - glob: appendix/*
"""
KERNEL = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}


def write_page(path: Path, title: str, *sources: str) -> None:
    cells = [new_markdown_cell(f"# {title}\n\n$x^2$ {{cite:p}}`lechner2020neural`", id="title")]
    cells += [new_code_cell(source, id=f"cell-{number}") for number, source in enumerate(sources)]
    if title == "Experiments":
        cells.append(new_markdown_cell("```{bibliography}\n```", id="bibliography"))
    atomic_write(path, nbformat.writes(new_notebook(cells=cells, metadata=KERNEL)))


FROM_THE_NETWORK = (
    r"""<(?:script|img|iframe)[^>]*\ssrc="(?:https?:)?//"""
    r"""|<link[^>]*rel="stylesheet"[^>]*href="(?:https?:)?//""")
FROM_FILES = r"""<(?:script|img)[^>]*\ssrc="([^":?]+)|<link[^>]*rel="stylesheet"[^>]*href="([^":?]+)"""
READS = """\
#| inputs: runs/*/seed*/record.json
from pathlib import Path
import json"""
TELLS = """\
#| echo: false
records = Path('..').glob('runs/*/seed*/record.json')
print('scores', sorted(json.loads(path.read_text())["seed"] for path in records))"""
WARM = """\
#| echo: false
import sys
print('kernel', 'warm' if 'seaborn' in sys.modules else 'cold')"""
COUNTS = """\
#| export
from pathlib import Path
count = Path('../count')
count.write_text(count.read_text() + 'x' if count.exists() else 'x')"""
DRAWS = """\
import matplotlib.pyplot as plt
from thesis_ltc.data import load
plt.imshow(load('digits').images[0, 0])
plt.show()"""


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    "A book: one page reads records, one counts its executions, one lists the experiments."
    root = tmp_path_factory.mktemp("small")
    for name in ("_config.yml", "references.bib"):
        shutil.copy(ROOT / name, root / name)
    shutil.copytree(ROOT / "figures", root / "figures")
    atomic_write(root / "_toc.yml", TOC)
    pages = root / "nbs"
    hidden = "#| hide\nprint('nobody sees this')"
    write_page(pages / "index.ipynb", "Start", "#| default_exp files", READS, TELLS, WARM, hidden)
    write_page(pages / "other.ipynb", "Other", COUNTS)
    for number in range(3):
        write_page(pages / f"prose-{number}.ipynb", f"Prose {number}")
    write_page(pages / "experiments.ipynb", "Experiments", "'executed once for each study'")
    return root


def add_cell(page: Path, source: str) -> None:
    "Append a code cell to a page."
    notebook = json.loads(page.read_text(encoding="utf-8"))
    notebook["cells"].append(new_code_cell(source, id="added"))
    atomic_write(page, json.dumps(notebook))


def write_run(folder: Path, *cells, **metadata) -> None:
    "Write an experiment's notebook as papermill leaves it."
    notebook = new_notebook(cells=list(cells), metadata=KERNEL | metadata)
    atomic_write(folder / "run.ipynb", nbformat.writes(notebook))


def text_of(root: Path, page: str) -> str:
    html = (root / "_build" / "html" / f"{page}.html").read_text(encoding="utf-8")
    return re.sub(r"<[^>]+>", "", html.split("<main", 1)[1].split("</main>")[0])


def executions(root: Path) -> int:
    return len((root / "count").read_text())


def test_a_book_without_runs_is_whole_and_needs_no_network(small, capfd):
    assert book.build(small) == 0
    said = capfd.readouterr()
    assert "The book:" in said.out and "6 of 6 pages executed: nbs/" in said.err
    assert executions(small) == 1, "what was executed before Sphinx reads it is executed again"
    assert "scores []" in text_of(small, "nbs/index") and "nobody sees" not in text_of(small, "nbs/index")
    assert f"kernel {'warm' if POSSIBLE else 'cold'}" in text_of(small, "nbs/index")
    pages = list((small / "_build" / "html").rglob("*.html"))
    assert pages
    for page in pages:
        html = page.read_text(encoding="utf-8")
        assert "#|" not in re.sub(r"<[^>]+>", "", html), f"{page.name} shows a directive"
        assert not re.findall(FROM_THE_NETWORK, html), page
        for names in re.findall(FROM_FILES, html):
            assert (page.parent / "".join(names)).exists(), f"{page.name} loads {names}, which was removed"
    assert (small / "_build" / "html" / "_static" / "mathjax" / "tex-chtml.js").exists()
    assert (small / "_build" / "html" / "searchindex.js").exists()


def test_its_pages_can_be_read_in_a_browser(small):
    with browser() as chrome:
        for name in ("nbs/index", "nbs/experiments", "search"):
            found = report(faults(chrome, small / "_build" / "html" / f"{name}.html"))
            assert not found, f"{name}\n{found}"


def test_only_pages_whose_records_changed_are_executed_again(small):
    before = executions(small)
    unpack_run("assay", 7, small / "runs")
    assert book.build(small) == 0
    assert "scores [7]" in text_of(small, "nbs/index") and executions(small) == before
    shutil.rmtree(small / "runs")
    assert book.build(small) == 0
    assert "scores []" in text_of(small, "nbs/index") and executions(small) == before


def test_results_that_were_changed_by_hand_fail_the_build(small, capfd):
    "Of a run and of a published study; `tests/test_doctored.py` has every field."
    record = unpack_run("assay", 7, small / "runs") / "record.json"
    atomic_write(record, record.read_text().replace('"stopped": "epochs"', '"stopped": "early"'))
    shutil.copytree(ROOT / "results" / "covid-ct", small / "results" / "covid-ct")
    lines = small / "results" / "covid-ct" / "records.jsonl.gz"
    change_lines(lines, lambda found: [found[0].replace('"epoch":40', '"epoch":39', 1), *found[1:]])
    assert book.build(small) == 1
    said = capfd.readouterr().err
    assert f"{record}, stopped: is 'early', but its curves give 'epochs'" in said
    assert f"{lines}, line 1" in said and "metrics.last.epoch: is 39, but its curves give 40" in said
    for folder in ("runs", "results"):
        shutil.rmtree(small / folder)


def test_a_failed_experiment_is_shown_as_failed_and_its_page_goes_with_it(small, capfd):
    trace = ["\x1b[0;31mValueError\x1b[0m: no images"]
    error = new_output("error", ename="ValueError", evalue="no images", traceback=trace)
    cell = new_code_cell("raise ValueError('no images')", outputs=[error])
    write_run(small / "runs" / "digits_fc_s1_0a", new_markdown_cell("# Run"), cell)
    assert book.build(small) == 0, capfd.readouterr().err
    page = text_of(small, "appendix/digits_fc_s1_0a")
    assert "fc on digits, setting 1 (0a): failed" in page and "no images" in page
    menu = (small / "_build" / "html" / "nbs" / "other.html").read_text(encoding="utf-8")
    assert "fc on digits, setting 1 (0a): failed" in menu, "the menu of an unchanged page lacks the new one"
    shutil.rmtree(small / "runs")
    assert book.build(small) == 0
    assert not (small / "appendix" / "digits_fc_s1_0a.ipynb").exists()


def test_pictures_that_may_not_be_shown_fail_the_build(small, capfd):
    "In an experiment's notebook, and on a page that loads images."
    hidden = unpack_run("end-to-end", 0, small / "runs").parent
    bitmap = new_output("display_data", {"text/html": "<img src='data:image/png;base64,AAAA'>"})
    write_run(hidden, new_code_cell("show()", outputs=[bitmap]), papermill={"end_time": "2022"})
    assert book.build(small) == 1
    assert "no record says that pictures of its images may be shown" in capfd.readouterr().err
    html = small / "_build" / "html" / "appendix"
    shown = (html / f"{hidden.name}.html").read_text(encoding="utf-8")
    assert "AAAA" not in shown and "Pictures were taken out" in shown

    shutil.rmtree(hidden)
    folder = unpack_run("assay", 0, small / "runs").parent
    write_run(folder, new_code_cell("show()", outputs=[bitmap]), papermill={"end_time": "2022"})
    page = small / "nbs" / "other.ipynb"
    whole = page.read_text(encoding="utf-8")
    for source, status in ((DRAWS, 1), (f"#| pictures: digits, CC BY 4.0\n{DRAWS}", 0)):
        atomic_write(page, whole)
        add_cell(page, source)
        assert book.build(small) == status
        complains = "nbs/other.ipynb: the cell that begins `import matplotlib" in capfd.readouterr().err
        assert complains == bool(status)
    assert "AAAA" in (html / f"{folder.name}.html").read_text(encoding="utf-8")
    shutil.rmtree(small / "runs")
    atomic_write(page, whole)


def test_a_page_that_raises_fails_the_build_until_it_is_mended(small, capfd):
    page = small / "nbs" / "other.ipynb"
    whole = page.read_text(encoding="utf-8")
    add_cell(page, "print('the last words')\n1 / 0")
    for attempt in ("first", "again"):
        before = executions(small)
        assert book.build(small) == 1, f"a page that raises passed the {attempt} time"
        said = capfd.readouterr()
        assert "ZeroDivisionError" in said.err and "has faults" in said.out
        assert executions(small) == before + 1, "a page that fails is executed once in each build"
        assert "the last words" in text_of(small, "nbs/other"), "the page doesn't show what happened"
    atomic_write(page, whole)
    assert book.build(small) == 0


def test_nbdev_leaves_only_pages_without_exports_to_the_book():
    silent = {path.parent.relative_to(ROOT).as_posix() for path in (ROOT / "nbs").rglob(".notest")}
    assert silent == {"nbs", "nbs/report", "nbs/experiments"}
    for folder in silent:
        for path in (ROOT / folder).glob("*.ipynb"):
            assert "#| export" not in path.read_text(encoding="utf-8"), f"nobody tests {path}"


CHECK_PAGES = """
import sys
from thesis_ltc.book.execution import check_pages
sys.exit(check_pages(*sys.argv[1:]))
"""


@pytest.mark.timeout(1800)
def test_every_page_of_the_report_executes():
    "What has passed since it changed is in the book's cache, and the book doesn't execute it again."
    command = [sys.executable, "-c", CHECK_PAGES, "nbs/*.ipynb", "nbs/report/*.ipynb"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    hidden = [(name, cell.id) for name, page in executed_pages(ROOT).items() for cell in page.cells
              if "remove-cell" in cell.metadata.get("tags", []) and cell.get("outputs")]
    assert [place for place in hidden if place[0].startswith("nbs/report/")] == []   # a reader never sees it


def test_wings_only_hand_on_names():
    "The rule of what a page depends on relies on it: importing a wing computes nothing."
    allowed = ast.Import | ast.ImportFrom | ast.Assign | ast.FunctionDef
    for path in PACKAGE.rglob("__init__.py"):
        documentation, *statements = ast.parse(path.read_text(encoding="utf-8")).body
        assert isinstance(documentation, ast.Expr | ast.Assign), path
        for statement in statements:
            assert isinstance(statement, allowed), f"{path}:{statement.lineno}"
            names = [target.id for target in statement.targets] if isinstance(statement, ast.Assign) else []
            assert set(names) <= {"__all__", "__version__"}, f"{path}:{statement.lineno}"
            assert not isinstance(statement, ast.FunctionDef) or statement.name == "__getattr__", path
            imported = statement.names if isinstance(statement, ast.ImportFrom) else []
            modules = {module.stem for module in path.parent.glob("*.py")}
            assert not {alias.name for alias in imported} & modules, f"{path}: a name hides its module"
