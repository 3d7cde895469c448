"""Hostile names, values and files: shown letter by letter, or refused; nothing is run, nothing is fetched.

Names reach a page through `plain`, `code_span`, `as_cell` (book/markup) and `escape_dollars` (book/style);
values of an experiment, through `refuse_program` (study/notebook). `THESIS_LTC_SOAK=1` tries 10,000 of each.
"""
import base64
import csv
import gzip
import hashlib
import http.server
import io
import json
import os
import random
import resource
import shutil
import struct
import subprocess
import sys
import threading
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, change_lines
from disk import report
from nbformat.v4 import new_code_cell, new_notebook, new_output
from page_checks import browser
from papermill.translators import PythonTranslator
from PIL import Image

from thesis_ltc.book import figures, markup, tables
from thesis_ltc.book.appendix import as_appendix
from thesis_ltc.book.record_pages import record_page
from thesis_ltc.core.files import write_json
from thesis_ltc.data import load
from thesis_ltc.data.packs import FILE_COLUMN, MANIFEST_COLUMNS, PackError, as_csv, member, read_pack
from thesis_ltc.data.volumes import VolumeError, read_nifti
from thesis_ltc.study.crate import HISTORIES, PLAN, RECORDS
from thesis_ltc.study.experiment import ExperimentError
from thesis_ltc.study.notebook import INJECTED, PARAMETERS, refuse_program
from thesis_ltc.study.shelf import Shelf
from thesis_ltc.training.checkpoint import CheckpointError, load_model, load_tensors, save_tensors

COUNT = 10_000 if os.environ.get("THESIS_LTC_SOAK") else 200
pytestmark = pytest.mark.timeout(1800 if COUNT > 200 else 240)

PARTS = (
    "<img src=x onerror='pwned=1'>", "<script>window.pwned=1</script>", "<svg/onload=pwned=1>",
    "'\"><b onclick=pwned=1>",
    "[a](javascript:pwned=1)", "![a](http://HOST/a.png)", "<img src=http://HOST/b>",
    "</title></textarea></style>",
    "\n```{eval-rst}\n.. raw:: html\n\n   <script>pwned=1</script>\n```\n", "\n<script>pwned=1</script>\n",
    "\n:::{raw} html\n<img src=x onerror=pwned=1>\n:::\n", "{raw-html}`<script>pwned=1</script>`",
    "{{ pwned }}", "{% x %}",
    "$x^2$", "$\\frac{", "\\href{javascript:pwned=1}{x}", "`", "```", "|", "*", "_", "~", "^", "#",
    "\n---\n", "\n- ",
    "=cmd|' /C calc'!A0", "+1", "-1", "@SUM(A1)", "\t", "\r", "\0", "\x1b[31m", "\u202e", "\u2066", "\ufeff",
    "\u00e9", "e\u0301", "../", "..\\", "/etc/passwd", "~root", "%00", "&lt;", "&#x3c;", "&", "\\", "'", '"',
    "COVID", "patient 7",
    "\U0001f9a0", "\ud7ff", "%s", "{0}", "{name}", "x" * 4000)


def fuzzed(seed: int, count: int) -> list[str]:
    "Texts put together from hostile parts; each part stands in one of them by itself."
    chance = random.Random(seed)
    made = ["".join(chance.choices(PARTS, k=chance.randint(1, 4))) for _ in range(max(0, count - len(PARTS)))]
    return [*PARTS, *made][:count]


# Parameters of papermill


def test_no_parameter_is_run_and_what_passes_is_what_was_given(tmp_path):
    "Names and values as papermill writes them into the cell that the guard reads before it runs."
    trap = tmp_path / "trap"
    program = f"__import__('os').mkdir({str(trap)!r})"
    names = [*fuzzed(1, COUNT), program, f"x = {program}\ny", f"{program}; x", f"x[{program}]", "a.b",
             "x: int", "(a, b)", "epochs = 1 #"]
    values = [*fuzzed(2, COUNT), [program], {"a": program}, float("nan"), float("inf"), 10**4000, [[[]]] * 9,
              b"x", None]
    for number, name in enumerate(names):
        source = f"{INJECTED}\n{name} = {PythonTranslator.translate(values[number % len(values)])}\n"
        with pytest.raises(ExperimentError):
            refuse_program(source)   # nothing of it is known, or it is a program
    for value in values:
        for name in ("data", "head", "folder", "epochs", "trunk", "runs"):
            source = f"{INJECTED}\n{name} = {PythonTranslator.translate(value)}\n"
            try:
                refuse_program(source)
            except ExperimentError as error:
                assert len(str(error)) < 20_000
            except ValueError as error:   # of a head that can't be read
                assert name == "head", error
    for source in ("(" * 5000, "x = " + "[" * 5000 + "]" * 5000, "x = " + "-" * 100_000 + "1", "x = f'{1}'",
                   "x = 1 if 1 else 2", "x = y = 1", "x += 1", "del x", "lambda: 0", "x = __file__",
                   "x = 'a' * 10 ** 10", "@a\ndef f(): 0"):
        with pytest.raises(ExperimentError, match="nothing was run"):
            refuse_program(f"{INJECTED}\n{source}")
    assert not trap.exists() and set(PARAMETERS) >= {"data", "seeds"}
    report("hostile_parameters_of_a_notebook", values=len(names) + 6 * len(values), lost=0)


# Pages


SCRIPTS = """
const marked = [...document.querySelectorAll("*")].filter(one =>
  [...one.attributes].some(a => /^on/i.test(a.name) || /^\\s*javascript:/i.test(a.value)));
return {pwned: typeof window.pwned, marked: marked.map(one => one.outerHTML.slice(0, 200)),
        active: [...document.querySelectorAll("script, iframe, object, embed, form")].map(
          one => one.outerHTML.slice(0, 200)),
        loaded: performance.getEntriesByType("resource").map(one => one.name).filter(
          name => !name.startsWith("data:")),
        text: document.body.innerText.length};
"""


def myst(text: str) -> str:
    "A page of the book as its parser reads it, without Sphinx."
    from docutils.core import publish_parts
    from myst_parser.parsers.docutils_ import Parser

    extensions = ["amsmath", "colon_fence", "dollarmath", "substitution", "html_image"]
    settings = {"myst_enable_extensions": extensions, "report_level": 5, "halt_level": 6,
                "embed_stylesheet": False, "math_output": "MathML"}
    return publish_parts(text, parser=Parser(), writer_name="html5", settings_overrides=settings)["html_body"]


def doctored_shelf(folder: Path, text: str) -> Shelf:
    "A published study whose plan has hostile sentences, and one of whose lines is a hostile error."
    published = Shelf(ROOT / "results" / "covid-ct")
    plan = published.plan | {"question": text, "hypothesis": text, "study": text}
    plan["fixed"] = plan["fixed"] | {"width": text}
    write_json(folder / PLAN, plan)
    shutil.copy(published.folder / RECORDS, folder / RECORDS)
    change_lines(folder / RECORDS, lambda lines: [*lines, json.dumps({"schema": text, "id": text})])
    (folder / HISTORIES).write_bytes((published.folder / HISTORIES).read_bytes())
    return Shelf(folder)


FEW = {"classes": 6, "tabs": 20, "titles": 40, "studies": 6, "errors": 60}   # where fewer names are tried


def hostile_page(folder: Path, texts: list[str]) -> str:
    "Every way that a name has to a page: all names in tables and sentences, few elsewhere."
    scores = np.linspace(0, 1, len(texts))
    parts, rows = [], pd.DataFrame({"name": texts, "patient": texts[::-1], "score": scores})
    parts.append(markup.show_table(rows.rename(columns={"patient": texts[0]}), texts[1], rows=texts).data)
    counts = pd.DataFrame({text: [1] for text in texts[:FEW["titles"]]}, index=[texts[5]])
    parts.append(counts.to_html())
    parts += [markup.rendered(f"{markup.plain(text)}\n\nleft out: {markup.code_span(text)}")
              for text in texts]
    parts.append(markup.flow(markup.fold(texts[0], markup.plain(texts[1])), markup.tabs(
        {text: markup.plain(text) for text in texts[:FEW["tabs"]]}, "tabs")).data)
    classes = list(dict.fromkeys(texts[:FEW["classes"]]))
    figure = figures.draw_confusion(np.eye(len(classes)), classes)
    parts.append(figures.embed(figure, texts[0], texts[1]).data)
    broken = pd.DataFrame()
    broken.attrs["broken"] = dict(zip(texts, texts[::-1], strict=True))
    parts.append(markup.rendered(tables.legend(broken)))
    for number, text in enumerate(texts[:FEW["studies"]]):
        shelf = doctored_shelf(folder / f"shelf-{number}", text)
        parts.append(myst(record_page(shelf)))
    for text in texts[:FEW["errors"]]:
        error = new_output("error", ename=text, evalue=text, traceback=[text])
        page = as_appendix(new_notebook(cells=[new_code_cell("1", outputs=[error])]), text)
        parts += [myst(cell.source) for cell in page.cells if cell.cell_type == "markdown"]
    return "<!doctype html><meta charset=utf-8><title>Hostile</title><body>" + "\n".join(parts)


class Counter(http.server.BaseHTTPRequestHandler):
    "Counts the requests of a page that fetches something."

    seen: list[str] = []

    def do_GET(self) -> None:
        self.seen.append(self.path)
        self.send_error(404)

    def log_message(self, *words: str) -> None:
        pass


@pytest.fixture
def host():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Counter)
    Counter.seen.clear()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()


def test_no_page_runs_or_fetches_what_a_name_says(tmp_path, host):
    texts = [text.replace("HOST", host) for text in fuzzed(3, min(COUNT, 1000))]
    page = tmp_path / "page.html"
    page.write_text(hostile_page(tmp_path, texts), encoding="utf-8", errors="backslashreplace")
    with browser() as chrome:
        planted = tmp_path / "planted.html"
        planted.write_text(f"<img src=http://{host}/seen onerror='pwned=1'><script>1</script>")
        chrome.get(planted.as_uri())
        chrome.execute_async_script("setTimeout(arguments[0], 300)")
        found = chrome.execute_script(SCRIPTS)
        assert found["pwned"] == "number" and found["marked"] and found["active"]
        assert Counter.seen == ["/seen"]
        Counter.seen.clear()
        chrome.get(page.as_uri())
        chrome.execute_async_script("setTimeout(arguments[0], 300)")
        found = chrome.execute_script(SCRIPTS)
    assert found["pwned"] == "undefined" and found["marked"] == [] == found["active"] == found["loaded"]
    assert Counter.seen == [] and found["text"] > 10_000
    report("hostile_names_on_pages_in_a_browser", values=len(texts), lost=0, **FEW)


def test_no_entry_of_a_csv_file_is_a_formula():
    texts = fuzzed(4, COUNT)
    page = markup.show_table(pd.DataFrame({"name": texts, "=title": texts}), "names").data
    content = base64.b64decode(page.rpartition("base64,")[2].partition('"')[0]).decode()
    csv.field_size_limit(1 << 20)
    rows = list(csv.reader(io.StringIO(content)))
    assert len(rows) == len(texts) + 1
    entries = [entry for row in rows for entry in row if entry.strip("+-")]
    assert not [entry for entry in entries if entry.lstrip().startswith(("=", "+", "-", "@"))]
    report("hostile_names_in_a_CSV_file", values=2 * len(texts), lost=0)


def legal_names(texts: list[str]) -> list[str]:
    "Names that a Linux file may have, of hostile texts."
    short = [text.replace("/", "∕").replace("\0", "")[:60] for text in texts]
    return [text for text in dict.fromkeys(short) if text.strip(" .") and not text.startswith((".", "~"))]


def test_a_folder_of_hostile_names_becomes_a_set_and_touches_nothing_else(tmp_path):
    place, outside = tmp_path / "images", tmp_path / "outside"
    outside.mkdir()
    legal = legal_names(fuzzed(5, COUNT))
    classes = [legal[0], legal[1]]
    chance = np.random.default_rng(0)
    for number, name in enumerate(legal[:40]):
        path = place / classes[number % 2] / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(chance.integers(0, 256, (16, 16), dtype=np.uint8)).save(path)
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    data = load("mine", folder=place)
    assert len(data) == min(40, len(legal))
    assert all(name.isprintable() for name in (*data.names, *data.classes))
    figures.embed(figures.draw_confusion(np.eye(2), data.classes), "x")
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


# From a folder to a book

TOC = """\
format: jb-book
root: nbs/index
parts:
  - caption: Pages
    chapters:
      - file: nbs/report/50_results
      - file: nbs/report/85_experiments
        sections:
          - glob: appendix/*
"""
PAGES = ("nbs/index.ipynb", "nbs/report/50_results.ipynb", "nbs/report/85_experiments.ipynb")
CLASSES = ("<img src=x onerror='pwned=1'>", "healthy <script>pwned=1<∕script>")
FOUND = """
return {pwned: typeof window.pwned,
        marked: [...document.querySelectorAll("*")].filter(one => [...one.attributes].some(
          a => /^(on.*|href|src)$/i.test(a.name) && /pwned|^\\s*javascript:/i.test(a.value))
        ).map(one => one.outerHTML.slice(0, 200)),
        scripts: [...document.scripts].filter(one => /pwned=1/.test(one.text)).length,
        text: document.body.innerText};
"""


def small_checkout(root: Path) -> None:
    "A repository with a few pages of the report, and no results."
    for name in ("_config.yml", "references.bib", "settings.ini", "Snakefile"):
        shutil.copy(ROOT / name, root / name)
    for name in ("figures", "studies", "nbs/experiments"):
        shutil.copytree(ROOT / name, root / name)
    (root / "nbs" / "report").mkdir()
    for name in PAGES:
        shutil.copy(ROOT / name, root / name)
    (root / "_toc.yml").write_text(TOC)


def hostile_folder(place: Path, host: str) -> None:
    "Pictures whose names, and whose classes' and patients', are hostile."
    chance = np.random.default_rng(0)
    texts = [text.replace("HOST", host) for text in fuzzed(7, 200) if "eval" not in text]   # a part, test
    for number, name in enumerate(legal_names(texts)):
        path = place / CLASSES[number % 2] / f"{name} patient" / f"{name}.png"
        path.parent.mkdir(parents=True)
        Image.fromarray(chance.integers(0, 256, (48, 48), dtype=np.uint8)).save(path)


def test_hostile_names_go_from_a_folder_to_the_built_book(tmp_path, host):
    "Import, a run in a notebook, and the book, by the commands that a user types."
    root, data = tmp_path / "checkout", tmp_path / "data"
    root.mkdir()
    small_checkout(root)
    hostile_folder(data / "mine", host)
    environment = os.environ | {"THESIS_LTC_DATA": str(data)}

    def thesis_ltc(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["thesis-ltc", *words], cwd=root, env=environment, capture_output=True, text=True, timeout=200)

    licence = "CC <script>pwned=1</script> '\"><b onclick=pwned=1> http://HOST/c".replace("HOST", host)
    shown = thesis_ltc("data", "import", str(data / "mine"), "--name", "hostile", "--yes", "--publishable",
                       "--licence", licence)
    assert shown.returncode == 0, shown.stderr
    assert "\x1b" not in shown.stdout + shown.stderr and "\u202e" not in shown.stdout + shown.stderr
    run = thesis_ltc("run", "data=hostile", "head=ncp-z", "image_size=48", "width=0.0625", "epochs=1",
                     "seeds=1", "batch_size=32", "precision=float32", "--notebook", "runs/x/run.ipynb")
    assert run.returncode == 0, run.stderr
    built = thesis_ltc("book")   # links to pages that this book hasn't are faults of it, and the only ones
    known = ("unknown document", "could not find bibtex key", "cross-reference target not found")
    warnings_ = [line for line in built.stderr.splitlines() if "WARNING" in line]
    assert [line for line in warnings_ if not any(words in line for words in known)] == []
    book = root / "_build" / "html"
    pages = [page for page in sorted(book.rglob("*.html")) if "_static" not in page.parts]
    assert book / "appendix" / "x.html" in pages
    texts = {}
    with browser() as chrome:
        for page in pages:
            chrome.get(page.as_uri())
            chrome.execute_async_script("setTimeout(arguments[0], 300)")
            found = chrome.execute_script(FOUND)
            assert (found["pwned"], found["marked"], found["scripts"]) == ("undefined", [], 0), page
            texts[page.relative_to(book).as_posix()] = found["text"]
    assert Counter.seen == []
    shown = [page for page, text in texts.items() if any(name in text for name in CLASSES)]
    assert {"appendix/x.html", "nbs/report/50_results.html"} <= {*shown}, shown
    assert not list(tmp_path.rglob("*pwned*.js")) and sorted(os.listdir(tmp_path)) == ["checkout", "data"]
    report("hostile_names_from_a_folder_to_the_built_book", values=len(list((data / "mine").rglob("*.png"))),
           pages=len(pages), lost=0)


# Files that lie


def tensors(header: dict | bytes, data: bytes = b"") -> bytes:
    whole = header if isinstance(header, bytes) else {"__metadata__": {"state": "{}"}} | header
    text = whole if isinstance(whole, bytes) else json.dumps(whole).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(shape: list[int], start: int, end: int, kind: str = "F32") -> dict:
    return {"dtype": kind, "shape": shape, "data_offsets": [start, end]}


LYING_TENSORS = {
    "length": struct.pack("<Q", 1 << 62) + b"{}", "long header": struct.pack("<Q", 90_000_000) + b"{}",
    "shape": tensors({"w": tensor([1 << 40], 0, 4 << 40)}, bytes(16)),
    "overflow": tensors({"w": tensor([1 << 62, 1 << 62], 0, 16)}, bytes(16)),
    "overlap": tensors({"v": tensor([4], 0, 16), "w": tensor([4], 0, 16)}, bytes(16)),
    "hole": tensors({"w": tensor([1], 8, 12)}, bytes(16)),
    "backwards": tensors({"w": tensor([1], 12, 8)}, bytes(16)),
    "type": tensors({"w": tensor([4], 0, 16, "F99")}, bytes(16)),
    "size": tensors({"w": tensor([4], 0, 16, "F64")}, bytes(16)),
    "deep": tensors(b"[" * 100_000), "deep state": tensors({"__metadata__": {"state": "[" * 100_000}}),
    "list": tensors({"__metadata__": {"state": "[1]"}}),
    "digits": tensors({"__metadata__": {"state": "9" * 5000}}),
    "empty": b"", "nul": bytes(99), "no text": tensors(b"\xff\xfe"),
}


def png(width: int, height: int, lines: bytes) -> bytes:
    def part(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = part(b"IHDR", head), part(b"IDAT", zlib.compress(lines, 1)), part(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


SOUND = png(8, 8, bytes(72))


def lying_pack(
    path: Path, picture: bytes = SOUND, manifest: bytes | None = None, more: tuple = (), names=member,
    page: bytes | None = None, **about: object,
) -> None:
    "A pack of four pictures, of which one part lies."
    sha256 = hashlib.sha256(bytes(64)).hexdigest()
    rows = [(f"n{i}", f"p{i}", "s", "ab"[i % 2], "train", "", "8x8 L", sha256, member(i)) for i in range(4)]
    manifest = manifest or as_csv([(*MANIFEST_COLUMNS, FILE_COLUMN), *rows]).encode()
    values = {"schema": 1, "classes": ["a", "b"], "licence": "", "publishable": False, "split_name": "none",
              "size": 8, "images": 4, "quarantine": [], "listed": [], "notes": [],
              "manifest_sha256": hashlib.sha256(manifest).hexdigest()} | about
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        warnings.simplefilter("ignore")   # of names that stand twice
        for number in range(4):
            archive.writestr(names(number), SOUND if number else picture)
        archive.writestr("manifest.csv", manifest)
        archive.writestr("about.json", json.dumps(values) if page is None else page)
        for name, content in more:
            archive.writestr(name, content)


LYING_PACKS = {
    "large picture": {"picture": png(30_000, 30_000, bytes(99))},
    "short picture": {"picture": png(8, 8, b"\0" + b"\1" * 8)},
    "picture bomb": {"picture": png(8, 8, bytes(30_000_000))}, "member bomb": {"picture": bytes(30_000_000)},
    "manifest bomb": {"manifest": bytes(30_000_000)}, "rows bomb": {"manifest": b",\n" * 9_000_000},
    "columns bomb": {"manifest": b"," * 18_000_000}, "deep page": {"page": b"[" * 1_000_000},
    "page bomb": {"page": b"{" + b" " * 30_000_000}, "list": {"page": b"[]"}, "size": {"size": 4096},
    "many": {"images": 10**9}, "true": {"size": True}, "negative": {"images": -1},
    "manifest twice": {"more": [("manifest.csv", "a")]}, "page twice": {"more": [("about.json", "{}")]},
    "picture twice": {"more": [(member(0), SOUND)]},
    "leads out": {"names": lambda number: f"../{member(number)}"},
    "absolute": {"names": lambda number: f"/tmp/{member(number)}"}, "classes": {"classes": []},
}


def nifti(shape: tuple[int, ...], voxels: bytes, kind: str = "int16") -> bytes:
    import nibabel

    header = nibabel.Nifti1Header()
    header.set_data_dtype(kind)
    header["dim"] = [len(shape), *shape, *[1] * (7 - len(shape))]
    header["magic"], header["vox_offset"], header["sform_code"] = b"n+1", 352, 1
    header["srow_x"][0] = header["srow_y"][1] = header["srow_z"][2] = 1
    return header.binaryblock + bytes(4) + voxels


LYING_VOLUMES = {
    "bomb.nii.gz": gzip.compress(nifti((4, 4, 4), bytes(30_000_000)), 1),
    "nothing.nii.gz": gzip.compress(nifti((2000, 512, 512), bytes(99))),
    "nothing.nii": nifti((2000, 512, 512), bytes(99)),
    "huge.nii.gz": gzip.compress(nifti((30_000, 30_000, 30_000), bytes(99), "float64")),
    "negative.nii": nifti((-4, 4, 4), bytes(128)), "seven.nii": nifti((4, 4, 4, 2, 2, 2, 2), bytes(9999)),
    "complex.nii": nifti((4, 4, 4), bytes(512), "complex64"),
    "cut.nii.gz": gzip.compress(nifti((4, 4, 4), bytes(128)))[:-20],
}
ROOM = 400   # megabytes beyond what the imports take


def read_lying(folder: Path) -> None:
    "Read every lying file; each must be refused in our words. Called in a process with little memory."
    resource.setrlimit(resource.RLIMIT_AS, (address_space() + ROOM * 1_000_000,) * 2)
    for paths, read, error in (
            ("*.safetensors", load_tensors, CheckpointError),
            ("*.zip", lambda path: read_pack(path, "x"), PackError),
            ("*.nii*", read_nifti, VolumeError)):
        for path in sorted(folder.glob(paths)):
            try:
                read(path)
            except error as found:
                assert str(path) in str(found) and len(str(found)) < 2000, path
                assert "MemoryError" not in str(found), found
            else:
                raise AssertionError(f"{path} was read")
    print("all refused")


def address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is bounded as Linux does it")
def test_files_that_lie_are_refused_within_bounded_memory(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    for name, content in LYING_TENSORS.items():
        (inside / f"{name}.safetensors").write_bytes(content)
    for name, lie in LYING_PACKS.items():
        lying_pack(inside / f"{name}.zip", **lie)
    lying_pack(inside / "cut.zip")
    for share in (0, 0.5, 0.99):
        content = (inside / "cut.zip").read_bytes()
        (inside / f"cut {share}.zip").write_bytes(content[:int(len(content) * share)])
    (inside / "cut.zip").unlink()
    for name, content in LYING_VOLUMES.items():
        (inside / name).write_bytes(content)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    code = "import sys, nibabel, test_hostile; test_hostile.read_lying(test_hostile.Path(sys.argv[1]))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run([sys.executable, "-c", code, str(inside)], capture_output=True, text=True,
                          cwd=tmp_path, env=environment, timeout=120)
    assert done.returncode == 0 and "all refused" in done.stdout, done.stderr[-3000:]
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    report("hostile_files_whose_headers_lie", values=len(before) - 1, lost=0)


def test_sound_files_are_read(tmp_path):
    "Else the test above would show nothing."
    lying_pack(tmp_path / "sound.zip", more=[("../out.txt", "x")])
    assert len(read_pack(tmp_path / "sound.zip", "x")) == 4 and not (tmp_path.parent / "out.txt").exists()
    (tmp_path / "v.nii.gz").write_bytes(gzip.compress(nifti((4, 4, 4), bytes(128))))
    assert read_nifti(tmp_path / "v.nii.gz").voxels.shape == (4, 4, 4)


def test_weights_of_another_type_are_refused(tmp_path):
    import torch

    model = torch.nn.Linear(2, 2)
    for kind in (torch.float64, torch.int64, torch.float16):
        saved = {name: one.to(kind) for name, one in model.state_dict().items()}
        save_tensors(tmp_path / "w.safetensors", saved, {})
        with pytest.raises(CheckpointError, match="this model has torch.float32"):
            load_model(load_tensors(tmp_path / "w.safetensors")[0], model)
