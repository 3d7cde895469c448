"""README, CONTRIBUTING and the pages for users agree with the code.

`python tests/test_documents.py` renews README's table.
"""
import ast
import configparser
import importlib.util
import json
import re
import shlex
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Callable
from functools import cache
from importlib.metadata import distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import thesis_ltc
from thesis_ltc.core.files import atomic_write

ROOT = Path(__file__).resolve().parents[1]
README, CONTRIBUTING = ROOT / "README.md", ROOT / "CONTRIBUTING.md"
START, END = "<!-- heads: written by `python tests/test_documents.py` -->\n", "<!-- end of heads -->"
COLUMNS = ("head", "what classifies", "last tensor", "steps x features", "parameters", "of them in the head")
TITLES = {
    "fc": "one fully connected layer, the original",
    "fc3": "three fully connected layers",
    "ncp-y": "a circuit scans rows",
    "ncp-z": "a circuit scans channels",
    "ncp-patch": "a circuit scans patches",
    "ncp-y-double": "rows, a doubled circuit",
    "ncp-y-half": "rows, half the neurons of three layers",
}
NOTE = "At 224 px, one channel, two classes; parameters are those of synapses that exist. Backbone: CRNet."
WINGS = ("core", "ltc", "heads", "data", "training", "study", "book", "cli")
PARTS = {"use": "Using it", "report": "The report"}


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


# The table of heads in the README


def heads_row(name: str) -> tuple[str, ...]:
    "A line of README's table, computed from the model."
    from thesis_ltc.heads.models import classifier, parameter_counts, stage_shapes

    model = classifier(name)
    shapes, counts = stage_shapes(model), parameter_counts(model)
    steps, features = shapes["scan"][0]
    tensor, scan = str(shapes["shrink"][0]), f"{steps} x {features:,}"
    return f"`{name}`", TITLES[name], tensor, scan, f"{counts['live']:,}", f"{counts['head']:,}"


def heads_table() -> str:
    "README's table of the report's heads."
    rows = [COLUMNS, ("---",) * len(COLUMNS), *map(heads_row, TITLES)]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines[1] = lines[1].replace(" ", "")
    return "\n".join([*lines, "", NOTE, ""])


def between(text: str) -> str:
    return text.split(START)[1].split(END)[0]


def test_the_table_of_heads_in_the_readme_is_what_the_models_say():
    assert between(read(README)) == heads_table(), "run `python tests/test_documents.py`"


# Commands and Python that users copy


def page_text(path: Path) -> str:
    "A page as Markdown, without the code cells of a notebook."
    if path.suffix != ".ipynb":
        return read(path)
    cells = json.loads(read(path))["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


USER_PAGES = sorted((ROOT / "nbs" / "use").glob("*.*"))
PAGES = (README, *USER_PAGES, ROOT / "nbs" / "report" / "30_dataset.ipynb")
SHOWN = {path.name: page_text(path) for path in PAGES}


def blocks(text: str, *languages: str) -> list[str]:
    "Code blocks of some languages in a Markdown text."
    found = re.findall(r"^( *)```(\w+)\n(.*?)^\1```", text, re.S | re.M)   # indented in numbered steps
    return [textwrap.dedent(code) for _, language, code in found if language in languages]


def shell_lines() -> list[str]:
    "Every line of shell that a user is told to type; lines that end in a backslash are joined."
    codes = [code for text in SHOWN.values() for code in blocks(text, "sh", "bash")]
    lines = [line.strip() for code in codes for line in code.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


LINES = shell_lines()
ENVIRONMENT = ["source", ".venv/bin/activate"]
NEW_HEAD = "z-leaky"   # a page tells how to add it


def words_of(line: str, folder: Path | None = None) -> list[str]:
    "A command in words, with its comment left out and its placeholders filled."
    line = line.replace("<id>", "some-run").replace(NEW_HEAD, "z-lstm")
    words = shlex.split(line, comments=True)
    return [re.sub(r"\bDIR\b", str(folder or "/tmp"), word) for word in words]


def commands(first: str, second: str | None = None) -> list[list[str]]:
    "The commands shown that begin so."
    lines = [words_of(line) for line in LINES]
    return [words for words in lines if words[0] == first and second in (None, words[1])]


def parameters_of(words: list[str]) -> dict:
    "Arguments and options of a `thesis-ltc` command as the command line itself parses them."
    import typer

    from thesis_ltc.cli import app

    command = typer.main.get_command(app)
    context = command.make_context("thesis-ltc", list(words), resilient_parsing=False)
    while hasattr(command, "commands"):
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(name, rest, parent=context)
    return context.params


OWN_STUDIES = ("my-question",)   # pages tell how to write them


def run_faults(words: list[str]) -> None:
    "Raise ValueError for fields or values that `thesis-ltc run` and papermill would refuse."
    from thesis_ltc.cli import parse_values
    from thesis_ltc.heads.models import find_head
    from thesis_ltc.study.notebook import split_values

    experiment, seeds, _ = split_values(parse_values(words))
    assert find_head(experiment.head) and seeds


def study_named(name: str) -> Path:
    "The file of a study, one that a page shows included; raises ValueError for others."
    from thesis_ltc.cli import find_study_file

    return ROOT / "studies" / "quick.yaml" if name in OWN_STUDIES else find_study_file(name)


def check_thesis_ltc(words: list[str]) -> None:
    "Raise an error for a command, option, field, study, recipe or profile that doesn't exist."
    from thesis_ltc.cli import pack_path, parse_values
    from thesis_ltc.study.definition import read_study
    from thesis_ltc.study.experiment import OF_IMAGES

    given, command = parameters_of(words), " ".join(words[:2] if words[0] == "data" else words[:1])
    if command == "run":
        run_faults(given["values"])
    if command in ("study", "publish", "confirm"):
        file = study_named(given["name"])
        read_study(file, parse_values(given.get("set_") or [], lists=True))
        profile = given.get("profile")
        assert profile is None or (ROOT / profile / "config.yaml").exists(), profile
    if command == "data build":
        assert (ROOT / "recipes" / f"{given['recipe']}.yaml").exists(), given["recipe"]
    if command in ("data show", "data audit", "data pack"):
        assert set(parse_values(given["words"] or [])) <= set(OF_IMAGES), given["words"]
    if command == "data import":
        pack_path(given["name"], Path("/tmp/a.zip"))   # raises UsageError for a name that can't be


@cache
def help_of(command: str) -> str:
    "What a command of the environment says of its options."
    program = Path(sys.executable).with_name(command)
    return subprocess.run([program, "--help"], capture_output=True, text=True).stdout


def check_tool(words: list[str]) -> None:
    "Raise an error for an option that another program doesn't have, or a file that isn't there."
    from thesis_ltc.heads.models import NAMED

    for before, word in zip(words, words[1:], strict=False):
        if word.startswith("-"):
            assert re.search(rf"(?<![\w-]){word}\b", help_of(words[0])), f"{words[0]} has no option {word}"
        elif before == "-k":
            assert word in NAMED, f"no head is called {word}"
        else:
            assert (ROOT / word).exists(), f"there is no file {word}"


def check_make(words: list[str]) -> None:
    "Raise an error for a target or a variable that the Makefile doesn't have."
    makefile = read(ROOT / "Makefile")
    for word in words[1:]:
        name, equals, _ = word.partition("=")
        pattern = rf"\$\({name}\)" if equals else rf"^{name}:"
        assert re.search(pattern, makefile, re.M), f"the Makefile has no {name}"


def check_papermill(words: list[str]) -> None:
    "Raise an error for a notebook or a parameter that isn't there."
    assert (ROOT / words[1]).exists() and set(words[3::3]) == {"-p"}, words
    pairs = zip(words[4::3], words[5::3], strict=True)
    run_faults([f"{name}={value}" for name, value in pairs])


def check_line(line: str) -> None:
    "Raise an error for a line of shell in which something doesn't exist."
    words = words_of(line)
    if words[0] == "thesis-ltc":
        check_thesis_ltc(words[1:])
    elif words[0] == "papermill":
        check_papermill(words)
    elif words[0] == "make":
        check_make(words)
    elif words[0] in ("nbdev_export", "nbdev_test", "pytest"):
        check_tool(words)
    elif words[0] == "python3":
        assert words[1] == "-m" and importlib.util.find_spec(words[2]), line
        assert words[3].endswith("/_build/html/index.html"), line
    elif words[0] in ("cd", "export"):
        assert "THESIS_LTC_DATA" in words[1], line
    else:
        assert words == ENVIRONMENT, f"{words[0]} is not known"


@pytest.mark.parametrize("line", LINES)
def test_everything_in_a_shown_command_exists(line: str):
    check_line(line)


def test_the_lines_of_numbered_steps_are_found():
    assert len(LINES) > 35 and len(commands("thesis-ltc")) > 25
    assert len(commands("thesis-ltc", "run")) >= 7 and "thesis-ltc publish my-question" in LINES
    for name in ("10_experiment.md", "20_study.ipynb", "30_images.md", "40_own_head.ipynb"):
        codes = "".join(blocks(SHOWN[name], "sh"))
        for command in ("make install", "source .venv/bin/activate", "thesis-ltc book"):
            assert command in codes, f"{name} doesn't lead to the book: {command}"


MISTAKES = """
thesis-ltc (study -> stuy) quick
thesis-ltc study quick (--watch -> --wach)
thesis-ltc study (quick -> quik)
thesis-ltc study quick --set (epochs -> epoch)=3
thesis-ltc study quick --set (head -> hed)=fc
thesis-ltc study report --profile profiles/(slurm -> slrm)
thesis-ltc run (head -> hed)=fc
thesis-ltc run head=(ncp-z -> ncp-zz)
thesis-ltc run epochs=(10 -> many)
thesis-ltc run (head=fc -> fc)
thesis-ltc run 'head=pool:2 mix:16 | z | - | - | (lstm -> lstn):19 | fc'
thesis-ltc publish (quick -> quik)
thesis-ltc confirm (quick -> )
thesis-ltc data show my-set (folder -> foldr)=DIR
thesis-ltc data build (covid-3100 -> covid-310) --from DIR
thesis-ltc data import DIR (--name my-set -> )
thesis-ltc data import DIR --name (my-set -> digits)
thesis-ltc data pack my-set (--to -> --too) FILE.zip
thesis-ltc (book -> boook)
papermill nbs/experiments/(run -> runs).ipynb out.ipynb -p head fc
papermill nbs/experiments/run.ipynb out.ipynb -p (head -> hed) fc
make (install -> instal)
make report (DATASET -> DATASETS)=digits
nbdev_test (--path -> --pth) nbs/heads
nbdev_test --path nbs/(heads -> head)
pytest -q tests/(test_heads -> test_head).py
pytest -q tests/test_heads.py -k (z-leaky -> z-leeky)
python3 -m (webbrowser -> webbrowsr) "file://$PWD/_build/html/index.html"
python3 -m webbrowser "file://$PWD/_build/(html/ -> )index.html"
source .venv/(bin/ -> )activate
(thesis-ltc -> sudo thesis-ltc) book
cd ($THESIS_LTC_DATA -> nowhere)
""".strip().splitlines()   # (right -> wrong)


def spelled(line: str, wrong: bool) -> str:
    "A line of `MISTAKES` as it should be, or with its mistake."
    return re.sub(r"\((.*?) -> (.*?)\)", lambda found: found[1 + wrong], line)


@pytest.mark.parametrize("line", MISTAKES)
def test_a_wrong_command_is_caught(line: str):
    import typer

    UsageError = typer.BadParameter.__base__
    check_line(spelled(line, wrong=False))
    with pytest.raises((UsageError, ValueError, AssertionError)):
        check_line(spelled(line, wrong=True))


# Messages, files and places that pages for users name


STEPS = ("10_experiment.md", "20_study.ipynb", "30_images.md", "40_own_head.ipynb")   # lead to the book
TROUBLE = "## What goes wrong most often"
OTHERS = ("mat1 and mat2 shapes cannot be multiplied",)   # messages of torch
PLACEHOLDER = r"\{[^{}]*\}"


def template_of(node: ast.AST) -> str | None:
    "The text of a string or an f-string, with {} for what is filled in; None for other nodes."
    if isinstance(node, ast.JoinedStr):
        parts = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
        return "".join(parts)
    is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
    return re.sub(PLACEHOLDER, "{}", node.value) if is_text else None


def letters(text: str) -> int:
    "How many letters and digits are in a text; those of a placeholder are none."
    return len(re.sub(r"\W", "", text))


@cache
def clauses() -> list[tuple[re.Pattern, int]]:
    "Every clause of every text of the package, as a pattern, and its letters."
    found = set()
    for path in (ROOT / "thesis_ltc").rglob("*.py"):
        for text in filter(None, map(template_of, ast.walk(ast.parse(read(path))))):
            found |= {text, *re.split("; |\n", text), *re.split("[;(:] ?", text), *text.split(", ")}
    patterns = {text.strip(): re.escape(text.strip()).replace(r"\{\}", ".*") for text in found}
    return [(re.compile(pattern), letters(text)) for text, pattern in patterns.items() if letters(text) >= 5]


def is_said(message: str) -> bool:
    "Whether the package says a message, in which paths, ... and <...> stand for anything."
    filled = re.sub(r"\.\.\.|\S*<\w+>\S*|\S*/\S*|\S+\.(zip|ipynb)", "x", message)
    said = [clause for clause, size in clauses() if size >= letters(filled) / 2]
    return message in OTHERS or any(clause.fullmatch(filled) for clause in said)


def messages(name: str) -> list[str]:
    "Messages that a page quotes: what a command prints, and what goes wrong."
    text, trouble = SHOWN[name], SHOWN[name].split(TROUBLE)[1]
    told = re.findall(r"(?:prints|ends with|then) `([^`]+)`", text)
    return told + re.findall(r"\*\*`([^`]+)`", trouble)


def assert_quoted(texts: list[str], is_right: Callable[[str], bool], fewest: int) -> None:
    "Assert that a page quotes at least some texts, and that each of them is right."
    assert len(texts) >= fewest
    assert not [text for text in texts if not is_right(text)]


@pytest.mark.parametrize("name", STEPS)
def test_quoted_messages_are_those_of_the_package(name: str):
    assert_quoted(messages(name), is_said, fewest=5)


def test_messages_of_others_are_theirs():
    import torch

    for message in OTHERS:
        with pytest.raises(RuntimeError, match=message):
            torch.ones(2, 3) @ torch.ones(2, 3)


def test_an_invented_message_would_be_caught():
    said = ("study quick is not complete", "executed: page.ipynb", "12 runs published in results/my-question")
    invented = (
        "study quick is incomplete", "done: page.ipynb", "12 runs were published in results", "it failed",
        "no network is called fc", "THESIS_LTC_DATA is missing", "... is no part of a study")
    assert all(map(is_said, said)) and not any(map(is_said, invented))


def files_named(name: str) -> list[str]:
    "Files that the text of a page names: in backticks, with an ending or a folder of the repository."
    text = re.sub(r"^( *)```.*?^\1```", "", SHOWN[name], flags=re.S | re.M)
    folders = "nbs|tests|recipes|studies|profiles|thesis_ltc|results|runs"
    endings = "json|jsonl|yaml|csv|parquet|safetensors|log|ipynb|md|zip|py"
    named = rf"`((?:{folders})/[\w./<>-]*|[\w./<>~-]+\.(?:{endings}))`"
    return re.findall(named, text)


@cache
def sources() -> str:
    "The package and the Snakefile, which write what a user finds in folders."
    paths = [ROOT / "Snakefile", *(ROOT / "thesis_ltc").rglob("*.py")]
    return "\n".join(map(read, paths))


def exists_or_is_written(file: str) -> bool:
    "Whether a file is in the repository, is written by the package, or stands in a command or a study shown."
    if (ROOT / file).exists():
        return True
    if re.fullmatch(r"runs/<experiment>/(seed<k>/)?", file):
        return True
    last = Path(file).name.removeprefix("my-question")
    own = {f"studies/{name}.yaml" for name in OWN_STUDIES} | {"my-set.zip", "results/my-question/"}
    is_shown = any(f" {file}" in line for line in LINES)
    is_written = re.search(rf"[\"/}}]{re.escape(last)}\b", sources())
    return file in own or is_shown or bool(is_written)


@pytest.mark.parametrize("name", STEPS)
def test_named_files_exist_or_are_written(name: str):
    assert_quoted(files_named(name), exists_or_is_written, fewest=3)


def test_an_invented_file_would_be_caught():
    invented = ("nbs/heads/41_circuit.ipynb", "runs/<experiment>/run.txt", "records.json", "history.parquet",
                "studies/quik.yaml", "profiles/slrm/config.yaml")
    assert not [file for file in invented if exists_or_is_written(file)]


PLACE = re.compile(r"\{doc\}`(?:[^`<]*<)?\.\./report/(\w+)>?`, (tab|section|row|under) \*([^*]+)\*")


def is_a_place(page: str, kind: str, name: str) -> bool:
    "Whether a page of the report has a tab or a section of this name, or a row of such an experiment."
    from thesis_ltc.book.appendix import experiment_title
    from thesis_ltc.study.definition import study_files

    cells = json.loads(read(ROOT / "nbs" / "report" / f"{page}.ipynb"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells)
    if kind == "section":
        return re.search(rf"^#+ {re.escape(name)}$", text, re.M) is not None
    if kind == "row":
        head, _, data = re.fullmatch(r"(\S+) (on) (\S+), setting 1", name).groups()
        return experiment_title(f"{data}_{head}_s1_0abc").startswith(name) and "experiment_title" in text
    return name in study_files(ROOT / "studies") or name in OWN_STUDIES or f'parts["{name}"]' in text


def test_results_are_where_pages_say():
    found = [place for name in STEPS for place in PLACE.findall(SHOWN[name])]
    assert {kind for _, kind, _ in found} == {"tab", "section", "row"} and len(found) > 10
    assert not [place for place in found if not is_a_place(*place)]
    assert not is_a_place("50_results", "tab", "no studies")
    assert not is_a_place("22_heads", "section", "The control")


def make_pictures(place: Path) -> Path:
    "A folder of pictures as a user may have it: two classes, no patients."
    from PIL import Image

    for number in range(24):
        (place / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        Image.effect_noise((40, 40), 50 + number).save(place / "ab"[number % 2] / f"{number}.png")
    return place


def test_shown_studies_can_be_planned(tmp_path):
    from thesis_ltc.cli import parse_values
    from thesis_ltc.study.definition import read_study
    from thesis_ltc.study.plan import make_plan

    pictures, planned = make_pictures(tmp_path / "own"), []
    for words in commands("thesis-ltc", "study"):
        given = parameters_of(words[1:])
        if given["name"] == "my-question":
            continue   # the study below
        said = [word.replace("=/tmp", f"={pictures}") for word in given["set_"]]
        values = parse_values(said, lists=True)
        study = read_study(ROOT / "studies" / f"{given['name']}.yaml", values)
        assert given["profile"] is None or (ROOT / given["profile"] / "config.yaml").exists()
        if "folder" in values:
            planned.append(len(make_plan(study, tmp_path / "runs")["cells"]))
    assert planned == [14, 14]   # on two pages: seven heads, two settings, on the reader's own pictures


def test_the_shown_study_can_be_planned(tmp_path):
    from thesis_ltc.study.claims import make_claim
    from thesis_ltc.study.definition import read_study
    from thesis_ltc.study.plan import make_plan

    text, statement = blocks(SHOWN["20_study.ipynb"], "yaml")
    (tmp_path / "my-question.yaml").write_text(text, encoding="utf-8")
    plan = make_plan(read_study(tmp_path / "my-question.yaml", {}), tmp_path / "runs")
    assert [(cell["head"], len(cell["seeds"])) for cell in plan["cells"]] == [("ncp-z-bi", 6), ("ncp-z", 6)]
    ((name, values),) = yaml.safe_load(statement).items()
    (comparison,) = make_claim(name, values).comparisons
    assert (comparison.study, comparison.pair) == (plan["study"], plan["primary"])


def cells_of(name: str) -> list[str]:
    "The cells of code of a page for users."
    cells = json.loads(read(ROOT / "nbs" / "use" / name))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("change", ["a field more", "a field less"])
def test_the_table_of_a_studys_fields_can_not_go_stale(monkeypatch, change):
    from thesis_ltc.study import definition

    codes, names = cells_of("20_study.ipynb"), {}
    for code in codes:
        exec(code, names)
    if change == "a field more":
        monkeypatch.setitem(definition.KEYS, "colour", "of the page")
    else:
        monkeypatch.delitem(definition.KEYS, "budget")
    with pytest.raises(AssertionError):
        for code in codes:
            exec(code, names)


def test_the_page_on_studies_lists_all_of_them():
    from thesis_ltc.study.definition import study_files

    listed = re.findall(r"^\| `([\w-]+)` \|", SHOWN["20_study.ipynb"], re.M)
    assert sorted(listed) == sorted(study_files(ROOT / "studies"))


def test_shown_image_sets_can_be_loaded(tmp_path):
    from thesis_ltc.cli import load_named

    pictures = make_pictures(tmp_path / "own")
    for words in commands("thesis-ltc", "data"):
        if words[2] == "show":
            given = parameters_of(words[1:])
            values = [word.replace("=/tmp", f"={pictures}") for word in given["words"]]
            assert load_named(given["name"], values).counts()["train"]
        if words[2] == "build":
            assert (ROOT / "recipes" / f"{words[3]}.yaml").exists()


def test_shown_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for code in blocks(SHOWN["50_python.md"], "python"):
        exec(code, names)
    assert names["logits"].shape == (8, 2) and names["motor"].shape == (64, 8, 1)
    assert isinstance(names["model"]["policy"], thesis_ltc.DropIn)
    assert names["table"].id.tolist() == [names["record"]["id"]]


def test_make_targets_that_are_named_exist():
    targets = set(re.findall(r"^([a-z]+):", read(ROOT / "Makefile"), re.M))
    text = "\n".join([*SHOWN.values(), read(CONTRIBUTING)])
    named = set(re.findall(r"(?:`|^)make ([a-z]+)", text, re.M))
    assert {"report", "test", "check", "install"} <= named <= targets


# Where things are


def test_contributing_names_files_that_exist_and_what_is_in_them():
    "`NAME` in `nbs/...` is defined there."
    text = read(CONTRIBUTING)
    folders = "nbs|tests|recipes|benchmarks|results|figures"
    paths = set(re.findall(rf"`((?:{folders})/[\w./-]*)`", text)) - {"nbs/report/NAME.ipynb"}
    assert len(paths) > 15
    assert not [path for path in paths if not (ROOT / path).exists()]
    named = r"`(\w+)`(?: or `(\w+)`| and others)? in `(nbs/[\w/]+\.ipynb)`"
    definitions = re.findall(named, text)
    assert len(definitions) >= 11
    for first, second, path in definitions:
        cells = json.loads(read(ROOT / path))["cells"]
        source = "\n".join("".join(cell["source"]) for cell in cells)
        for name in filter(None, (first, second)):
            defined = rf"^(def |class ){name}\b|^{name}\b.* = "
            assert re.search(defined, source, re.M), f"{name} is not in {path}"


def test_contributing_draws_the_wings_in_their_order():
    (picture,) = blocks(read(CONTRIBUTING), "text")
    assert tuple(picture.splitlines()[0].replace("──▶", " ").split()) == WINGS


def pages(entries: list) -> list[str]:
    "All files below an entry of the table of contents."
    found = []
    for entry in entries:
        found += [entry["file"]] if "file" in entry else []
        for below in [entry, *entry.get("subtrees", [])]:
            found += pages(below.get("sections", []) + below.get("chapters", []))
    return found


def listed_pages() -> list[str]:
    return pages(yaml.safe_load(read(ROOT / "_toc.yml"))["parts"])


def appendix_pages() -> list[str]:
    "The pages of the book's last part."
    parts = yaml.safe_load(read(ROOT / "_toc.yml"))["parts"]
    return pages([part for part in parts if part["caption"] == "Appendix"])


def written_pages() -> list[str]:
    "Every notebook and Markdown page below nbs, but for the experiment's own."
    paths = [path for path in (ROOT / "nbs").rglob("*.*") if path.suffix in (".ipynb", ".md")]
    names = [path.relative_to(ROOT).with_suffix("").as_posix() for path in paths]
    return [name for name in names if "experiments/" not in name and ".ipynb_checkpoints" not in name]


def test_every_notebook_is_a_page_and_every_page_exists():
    root = yaml.safe_load(read(ROOT / "_toc.yml"))["root"]
    assert sorted([root, *listed_pages()]) == sorted(written_pages())


def test_pages_are_listed_in_the_order_of_wings_and_numbers():
    listed = listed_pages()
    order = [name.split("/")[1] for name in listed if name.split("/")[1] in WINGS]
    assert tuple(dict.fromkeys(order)) == WINGS and order == sorted(order, key=WINGS.index)
    appendix = appendix_pages()   # begins with what most readers look for
    for folder in (*WINGS, *PARTS):
        names = [name for name in listed if name.startswith(f"nbs/{folder}/")]
        ordered = [name for name in names if name not in appendix]
        assert ordered == sorted(ordered), f"nbs/{folder} is not listed by number"
        numbers = [Path(name).name.split("_")[0] for name in names]
        assert len(set(numbers)) == len(numbers), f"a number of nbs/{folder} occurs twice"


def default_module(page: str) -> str | None:
    "The module that a page exports, if it does."
    path = ROOT / f"{page}.ipynb"
    if not path.exists():
        return None
    sources = ["".join(cell["source"]) for cell in json.loads(read(path))["cells"]]
    matches = [re.match(r"#\| default_exp ([\w.]+)", source) for source in sources]
    return next((match[1] for match in matches if match), None)


def test_the_api_lists_every_module_in_the_order_of_the_notebooks():
    package = ROOT / "thesis_ltc"
    paths = [path.relative_to(package) for path in package.rglob("[!_]*.py")]
    modules = [".".join(path.with_suffix("").parts) for path in paths]
    ordered = [module for page in listed_pages() if (module := default_module(page))]
    assert sorted(ordered) == sorted(modules)
    pages = sorted((ROOT / "nbs" / "api").glob("[1-9]*.md"))
    assert tuple(page.stem.split("_")[1] for page in pages) == WINGS
    listed = {page: re.findall(r"automodule:: thesis_ltc\.([\w.]+)", read(page)) for page in pages}
    assert [module for found in listed.values() for module in found] == ordered
    for page, found in listed.items():
        assert re.findall(r"^## ([\w.]+)", read(page), re.M) == found
        assert {module.split(".")[0] for module in found} == {page.stem.split("_")[1]}


def markdown_cells() -> dict:
    "The text of every page, by its path and, for notebooks, its cell."
    texts = {path: read(path) for path in (ROOT / "nbs").rglob("*.md")}
    for path in (ROOT / "nbs").rglob("*.ipynb"):
        for cell in json.loads(read(path))["cells"]:
            if cell["cell_type"] == "markdown":
                texts[path, cell["id"]] = "".join(cell["source"])
    return texts


def test_links_between_pages_lead_to_pages():
    for place, text in markdown_cells().items():
        path = place if isinstance(place, Path) else place[0]
        for target in re.findall(r"\{doc\}`(?:[^`<]*<)?([\w./-]+)>?`", text):
            page = path.parent / target
            files = [page.with_name(f"{page.name}{suffix}") for suffix in (".ipynb", ".md")]
            assert any(file.exists() for file in files), f"{place}: {target}"


def test_the_readme_links_to_files():
    for target in re.findall(r"\]\(([\w./-]+)\)", read(README)):
        assert (ROOT / target).exists(), target


def test_displayed_formulas_stand_in_paragraphs_of_their_own():
    "Else MyST takes their dollars for those of formulas in the line."
    displayed = {place: text for place, text in markdown_cells().items() if "$$" in text}
    assert displayed
    for place, text in displayed.items():
        for paragraph in re.split(r"\n\s*\n", text):
            formula = re.fullmatch(r"\s*\$\$[^$]*\$\$\s*", paragraph)
            assert "$$" not in paragraph or formula, f"{place}: {paragraph[:80]}"


# The package


def test_version_is_the_same_everywhere():
    citation = yaml.safe_load(read(ROOT / "CITATION.cff"))
    settings = configparser.ConfigParser()
    settings.read(ROOT / "settings.ini")
    assert citation["version"] == settings["DEFAULT"]["version"] == thesis_ltc.__version__
    assert f"## {thesis_ltc.__version__}" in read(ROOT / "CHANGELOG.md")


def canonical(name: str) -> str:
    return name.lower().replace("_", "-")


def test_the_lock_file_satisfies_every_range():
    project = tomllib.loads(read(ROOT / "pyproject.toml"))["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    wanted = [Requirement(line) for group in groups for line in group]
    lines = read(ROOT / "requirements.lock").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    locked = {canonical(pin.name): pin for pin in pins}
    for requirement in wanted:
        if requirement.name == "thesis_ltc":
            continue
        pinned = locked[canonical(requirement.name)]
        (pin,) = pinned.specifier
        fits = requirement.specifier.contains(pin.version, prereleases=True)
        assert pin.operator == "==" and fits, f"{pinned} is outside {requirement}"
    of_gpu = [pin for pin in pins if re.match("nvidia-|cuda-|triton", pin.name)]
    assert of_gpu and all("linux" in str(pin.marker) for pin in of_gpu)


def test_the_oldest_python_can_install_every_package():
    project = tomllib.loads(read(ROOT / "pyproject.toml"))["project"]
    oldest = project["requires-python"].removeprefix(">=") + ".2"   # of Debian 12
    wanted = {one.name: one.metadata.get("Requires-Python") or "" for one in distributions()}
    assert len(wanted) > 100
    assert not {name: text for name, text in wanted.items() if oldest not in SpecifierSet(text)}


if __name__ == "__main__":
    old = read(README)
    head, rest = old.split(START)
    atomic_write(README, f"{head}{START}{heads_table()}{END}{rest.split(END)[1]}")
