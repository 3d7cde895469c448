"""README, CONTRIBUTING and the pages for users agree with the code.

`python tests/test_documents.py` renews README's table.
"""
import configparser
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

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
    found = re.findall(r"^```(\w+)\n(.*?)^```", text, re.S | re.M)
    return [code for language, code in found if language in languages]


def shell_lines() -> list[str]:
    "Every line of shell that a user is told to type; lines that end in a backslash are joined."
    codes = [code for text in SHOWN.values() for code in blocks(text, "sh", "bash")]
    lines = [line.strip() for code in codes for line in code.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


LINES = shell_lines()
KNOWN = ("thesis-ltc", "papermill", "make", "cd", "python3", "nbdev_export", "nbdev_test", "pytest")
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


def test_the_shown_commands_are_known():
    assert len(LINES) > 25 and len(commands("thesis-ltc")) > 20
    assert not [line for line in LINES if words_of(line)[0] not in KNOWN]


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("thesis-ltc")])
def test_every_shown_command_is_parsed(line: str):
    assert parameters_of(words_of(line)[1:]) is not None


def test_a_wrong_command_would_not_be_parsed():
    import typer

    UsageError = typer.BadParameter.__base__
    for words in (["stuy", "quick"], ["study", "quick", "--wach"], ["data", "import", "DIR"], ["publish"]):
        with pytest.raises(UsageError):
            parameters_of(words)


def test_shown_experiments_are_accepted():
    from thesis_ltc.cli import parse_values
    from thesis_ltc.heads.models import find_head
    from thesis_ltc.study.notebook import split_values

    shown = [parse_values(parameters_of(words[1:])["values"]) for words in commands("thesis-ltc", "run")]
    for words in commands("papermill"):
        assert (ROOT / words[1]).exists() and set(words[3::3]) == {"-p"}
        pairs = zip(words[4::3], words[5::3], strict=True)
        shown.append(parse_values([f"{name}={value}" for name, value in pairs]))
    assert len(shown) >= 8
    heads = set()
    for values in shown:
        experiment, seeds, _ = split_values(values)
        assert find_head(experiment.head) and seeds
        heads.add(experiment.head)
    assert {"ncp-z", "fc"} < heads


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
    from thesis_ltc.study.definition import read_study
    from thesis_ltc.study.plan import make_plan

    (text,) = blocks(SHOWN["20_study.md"], "yaml")
    (tmp_path / "my-question.yaml").write_text(text, encoding="utf-8")
    plan = make_plan(read_study(tmp_path / "my-question.yaml", {}), tmp_path / "runs")
    assert [(cell["head"], len(cell["seeds"])) for cell in plan["cells"]] == [("ncp-z-bi", 6), ("ncp-z", 6)]


def test_the_page_on_studies_lists_all_of_them():
    from thesis_ltc.study.definition import study_files

    listed = re.findall(r"^\| `([\w-]+)` \|", SHOWN["20_study.md"], re.M)
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


def test_the_api_page_lists_every_module_in_the_order_of_the_notebooks():
    text = read(ROOT / "nbs" / "report" / "90_api.md")
    package = ROOT / "thesis_ltc"
    paths = [path.relative_to(package) for path in package.rglob("[!_]*.py")]
    modules = [".".join(path.with_suffix("").parts) for path in paths]
    ordered = [module for page in listed_pages() if (module := default_module(page))]
    assert sorted(ordered) == sorted(modules)
    assert re.findall(r"automodule:: thesis_ltc\.([\w.]+)", text) == ordered
    assert re.findall(r"^### ([\w.]+)", text, re.M) == ordered


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
    tomllib = pytest.importorskip("tomllib")
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


if __name__ == "__main__":
    old = read(README)
    head, rest = old.split(START)
    atomic_write(README, f"{head}{START}{heads_table()}{END}{rest.split(END)[1]}")
