"""A small book, built, broken and mended with the real configuration."""
import json
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from thesis_ltc.book import build as book
from thesis_ltc.core.files import atomic_write, write_json
from thesis_ltc.book.kernels import POSSIBLE

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
    cells += [new_markdown_cell("```{bibliography}\n```", id="bibliography")] if title == "Experiments" else []
    atomic_write(path, nbformat.writes(new_notebook(cells=cells, metadata=KERNEL)))


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    "A book: one page reads records, one counts its executions, one lists the experiments; with prose, enough to be read in parallel."
    root = tmp_path_factory.mktemp("small")
    for name in ("_config.yml", "references.bib", "figures/book.css"):
        (root / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    atomic_write(root / "_toc.yml", TOC)
    reads = "#| inputs: runs/*/seed*/record.json\nfrom pathlib import Path\nimport json"
    tells = "#| echo: false\nprint('scores', sorted(json.loads(p.read_text()) for p in Path('..').glob('runs/*/seed*/record.json')))"
    warm = "#| echo: false\nimport sys\nprint('kernel', 'warm' if 'seaborn' in sys.modules else 'cold')"
    write_page(root / "nbs" / "index.ipynb", "Start", "#| default_exp files", reads, tells, warm, "#| hide\nprint('nobody sees this')")
    counts = "from pathlib import Path\ncount = Path('../count')\ncount.write_text(count.read_text() + 'x' if count.exists() else 'x')"
    write_page(root / "nbs" / "other.ipynb", "Other", f"#| export\n{counts}")
    for number in range(3):
        write_page(root / "nbs" / f"prose-{number}.ipynb", f"Prose {number}")
    write_page(root / "nbs" / "experiments.ipynb", "Experiments", "'executed once for each study'")
    return root


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
        assert not re.findall(r"<(?:script|img|iframe)[^>]*\ssrc=\"(?:https?:)?//|<link[^>]*rel=\"stylesheet\"[^>]*href=\"(?:https?:)?//", html), page
    assert (small / "_build" / "html" / "_static" / "mathjax" / "tex-chtml.js").exists()
    assert (small / "_build" / "html" / "searchindex.js").exists()


def test_only_pages_whose_records_changed_are_executed_again(small):
    before = executions(small)
    write_json(small / "runs" / "digits_fc_s1_0a" / "seed0" / "record.json", 7)
    assert book.build(small) == 0
    assert "scores [7]" in text_of(small, "nbs/index") and executions(small) == before
    shutil.rmtree(small / "runs")
    assert book.build(small) == 0
    assert "scores []" in text_of(small, "nbs/index") and executions(small) == before


def test_a_failed_experiment_is_shown_as_failed_and_its_page_goes_with_it(small, capfd):
    error = new_output("error", ename="ValueError", evalue="no images", traceback=["\x1b[0;31mValueError\x1b[0m: no images"])
    notebook = new_notebook(cells=[new_markdown_cell("# Run"), new_code_cell("raise ValueError('no images')", outputs=[error])], metadata=KERNEL)
    atomic_write(small / "runs" / "digits_fc_s1_0a" / "run.ipynb", nbformat.writes(notebook))
    assert book.build(small) == 0, capfd.readouterr().err
    page = text_of(small, "appendix/digits_fc_s1_0a")
    assert "fc on digits, setting 1 (0a): failed" in page and "no images" in page
    menu = (small / "_build" / "html" / "nbs" / "other.html").read_text(encoding="utf-8")
    assert "fc on digits, setting 1 (0a): failed" in menu, "the menu of an unchanged page lacks the new one"
    shutil.rmtree(small / "runs")
    assert book.build(small) == 0
    assert not (small / "appendix" / "digits_fc_s1_0a.ipynb").exists()


def test_pictures_that_may_not_be_shown_fail_the_build(small, capfd):
    "In an experiment's notebook, and on a page that uses a set of which no picture may be shown."
    folder = small / "runs" / "mine_fc_s1_0a"
    shows = new_output("display_data", {"text/html": "<img src='data:image/png;base64,AAAA'>"})
    atomic_write(folder / "run.ipynb", nbformat.writes(new_notebook(cells=[new_code_cell("show()", outputs=[shows])], metadata=KERNEL | {"papermill": {"end_time": "2022"}})))
    write_json(folder / "seed0" / "record.json", {"data": {"publishable": False}})
    assert book.build(small) == 1 and "no record says that pictures of its images may be shown" in capfd.readouterr().err
    html = (small / "_build" / "html" / "appendix" / "mine_fc_s1_0a.html").read_text(encoding="utf-8")
    assert "AAAA" not in html and "Pictures were taken out" in html
    write_json(folder / "seed0" / "record.json", {"data": {"publishable": True}})
    assert book.build(small) == 0 and "AAAA" in (small / "_build" / "html" / "appendix" / "mine_fc_s1_0a.html").read_text(encoding="utf-8")
    shutil.rmtree(small / "runs")

    page = small / "nbs" / "other.ipynb"
    whole = page.read_text(encoding="utf-8")
    draws = "import matplotlib.pyplot as plt\nfrom thesis_ltc.data import load\nplt.imshow(load('digits').images[0, 0])\nplt.show()"
    for source, status in ((draws, 1), (f"#| pictures: mine\n{draws}", 1), (f"#| pictures: digits, CC BY 4.0\n{draws}", 0)):
        changed = json.loads(whole)
        changed["cells"].append(new_code_cell(source, id="draws"))
        atomic_write(page, json.dumps(changed))
        assert book.build(small) == status
        assert ("nbs/other.ipynb: the cell that begins `import matplotlib" in capfd.readouterr().err) == bool(status)
    atomic_write(page, whole)
    assert book.build(small) == 0


def test_a_page_that_raises_fails_the_build_until_it_is_mended(small, capfd):
    page = small / "nbs" / "other.ipynb"
    whole = page.read_text(encoding="utf-8")
    broken = json.loads(whole)
    broken["cells"].append(new_code_cell("1 / 0", id="broken"))
    atomic_write(page, json.dumps(broken))
    for attempt in ("first", "again"):
        assert book.build(small) == 1, f"a page that raises passed the {attempt} time"
        shown = capfd.readouterr()
        assert "ZeroDivisionError" in shown.err and "has faults" in shown.out
    atomic_write(page, whole)
    assert book.build(small) == 0
