"""The built book can be read: in light and in dark, on a screen and on a phone, from files.

`make book` builds it; without a book its tests skip. Planted faults show that each check can fail.
"""
from pathlib import Path

import pytest
from page_checks import browser, dead_links, faults, megabytes, report

ROOT = Path(__file__).resolve().parents[1]
BOOK = ROOT / "_build" / "html"
REPORT = sorted(f"nbs/report/{path.stem}" for path in (ROOT / "nbs" / "report").glob("[0-9]*.*"))
PAGES = ("nbs/index", *REPORT, "nbs/use/10_experiment", "nbs/ltc/30_cell", "appendix/records-controls")
LARGEST_PAGE, LARGEST_BOOK, LARGEST_RUN = 3, 40, 1   # megabytes
pytestmark = pytest.mark.timeout(120)

HEAD = '<!doctype html><meta name="viewport" content="width=device-width"><title>A page</title>'
STYLE = """
<style>
  body { margin: 0; font: 16px sans-serif; color: #222; background: #fff; }
  [data-theme=dark] body { color: #ddd; background: #121212; }
  .box { overflow-x: auto; }
</style>"""
DESCRIBED = "data:image/gif;base64,R0lGODlhAQABAAAAACw=' alt='A curve that rises with the epochs"
SOUND = f"""
<p>A text, and <a href="#below" style="color: inherit">a link</a>.
<p id="below" style="color: #999; opacity: 0">Unseen.
<div class="box"><table style="width: 900px"><tr><td>A table that a phone scrolls in its box</table></div>
<p style="font-size: 24px; color: #8a8a8a">Large and grey.
<img src='{DESCRIBED}'><button><svg role="img"></svg></button>"""
PLANTED = {
    "faint in light": ('<p style="color: #aaa">Grey on white.', "contrast, light", "Grey on white."),
    "faint in dark": ('<p style="color: #333">Black on black.', "contrast, dark", "Black on black."),
    "faint by opacity": ('<p style="opacity: 0.4">Washed out.', "contrast, light", "Washed out."),
    "faint on a box": ('<p style="background: #24e; color: #222">Blue box.', "contrast, light", "Blue box."),
    "faint hint": ('<style>::placeholder { color: #bbb }</style><input placeholder="Search">',
                   "contrast, light", "Search"),
    "folded": ('<article><details><summary>More</summary><p style="color: #bbb">Folded.</details></article>',
               "contrast, light", "Folded."),
    "wide table": ('<table style="width: 2000px"><tr><td>Wide</table>', "width, light, screen", "2000 px"),
    "wide in a box": ('<div class="box"><table style="width: 2000px"><tr><td>Wide</table></div>',
                      "width, light, screen", "2000 px"),
    "wide on a phone": ('<table style="width: 600px"><tr><td>Wide</table>', "width, light, phone", "600 px"),
    "wide code": (f"<pre>{'x' * 999}</pre>", "width, light, screen", "px wide in"),
    "wide page": ('<div style="width: 700px">A block</div>', "width, dark, phone", "700 px wide"),
    "no words": ('<img src="a.gif">', "pictures, light", "described"),
    "few words": ('<img src="a.gif" alt="A curve">', "pictures, light", "A curve"),
    "words are a path": ('<img src="_images/0c64ddd576536.svg" alt="_images/0c64ddd576536.svg">',
                         "pictures, light", "described"),
    "raw formula": (r'<span class="math">\(x^2\)</span>', "formulas, light", "not set"),
    "missing font": ("<style>@font-face {font-family: F; src: url(no)} i {font-family: F}</style><i>F</i>",
                     "formulas, light", "font F"),
    "drawn without words": ('<svg role="img" width="9" height="9"></svg>', "pictures, light", "svg"),
}


@pytest.fixture(scope="module")
def chrome():
    with browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def book() -> Path:
    if not (BOOK / "index.html").exists():
        pytest.skip("no book is built: make book")
    sources = [*ROOT.glob("nbs/**/*.ipynb"), *ROOT.glob("nbs/**/*.md"), *ROOT.glob("figures/*")]
    if max(path.stat().st_mtime for path in sources) > max(path.stat().st_mtime for path in BOOK.rglob("*")):
        pytest.skip("the book is older than its pages: make book")
    return BOOK


def write(folder: Path, *parts: str) -> Path:
    page = folder / "page.html"
    page.write_text("".join((HEAD, STYLE, *parts)), encoding="utf-8")
    return page


def test_a_sound_page_has_no_faults(chrome, tmp_path):
    page = write(tmp_path, SOUND)
    assert faults(chrome, page) == {} and dead_links(page, {}) == []


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_found(chrome, tmp_path, name):
    fault, where, what = PLANTED[name]
    found = report(faults(chrome, write(tmp_path, SOUND, fault)))
    assert any(line.startswith(where) and what in line for line in found.splitlines()), found
    others = {line.split(",")[0] for line in found.splitlines()} - {where.split(",")[0]}
    assert not others, f"the fault is reported as another one, too: {found}"


def test_a_dead_link_is_found(tmp_path):
    (tmp_path / "other.html").write_text('<p id="there">')
    living = '<a href="other.html#there"><a href="other.html#:~:text=def"><a href="#here"><p id="here"><a href="https://example.org/none">'
    dead = '<a href="other.html#nowhere"><a href="none.html"><a href="#gone">'
    page = write(tmp_path, living, dead)
    assert dead_links(page, {}) == ["#gone", "none.html", "other.html#nowhere"]


@pytest.mark.parametrize("name", PAGES)
def test_a_page_can_be_read(chrome, book, name):
    found = report(faults(chrome, book / f"{name}.html"))
    assert not found, f"{name}\n{found}"


def test_what_failed_is_still_in_the_records(book):
    "The page says so where its text and the published records part."
    text = (book / "nbs/report/72_what_did_not_work.html").read_text(encoding="utf-8")
    assert "<em>The text above says that" not in text   # as `check` of that page says it


def test_links_within_the_book_lead_somewhere(book):
    known: dict[Path, set[str]] = {}
    dead = {name: dead_links(book / f"{name}.html", known) for name in PAGES}
    assert not any(dead.values()), dead


def test_the_book_is_light(book):
    "A page is opened on a phone, and the book is sent by mail. Each experiment of a reader adds a page."
    files = [path.relative_to(book) for path in book.rglob("*") if path.is_file()]
    of_runs = [path for path in files if "appendix" in path.parts and not path.name.startswith("records-")]
    size = {path: megabytes(book / path) for path in files}
    assert {path for path in files if path.suffix == ".html" and size[path] > LARGEST_PAGE} == set()
    assert sum(size[path] for path in set(files) - set(of_runs)) <= LARGEST_BOOK
    assert not [path for path in of_runs if size[path] > LARGEST_RUN]
