"""README and the other hand-written documents agree with the code; `python tests/test_documents.py` renews README's table."""
import configparser
import json
import re
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import thesis_ltc
from thesis_ltc.core.files import atomic_write

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
START, END = "<!-- heads: written by `python tests/test_documents.py` -->\n", "<!-- end of heads -->"
TITLES = {
    "fc": "one fully connected layer, the original", "fc3": "three fully connected layers", "ncp-y": "a circuit scans rows",
    "ncp-z": "a circuit scans channels", "ncp-patch": "a circuit scans patches", "ncp-y-double": "rows, a doubled circuit",
    "ncp-y-half": "rows, half the neurons of three layers",
}


def heads_table() -> str:
    "README's table of the report's heads, computed from the models."
    from thesis_ltc.heads.classifier import classifier, parameter_counts, stage_shapes

    rows = ["| head | what classifies | last tensor | steps x features | parameters | of them in the head |", "|---|---|---|---|---|---|"]
    for name, title in TITLES.items():
        model = classifier(name)
        shapes, counts = stage_shapes(model), parameter_counts(model)
        (steps, features), = shapes["scan"]
        rows.append(f"| `{name}` | {title} | {shapes['shrink'][0]} | {steps} x {features:,} | {counts['live']:,} | {counts['head']:,} |")
    return "\n".join([*rows, "", "At 224 px, one channel, two classes; parameters are those of synapses that exist. Backbone: CRNet.", ""])


def between(text: str) -> str:
    return text.split(START)[1].split(END)[0]


def test_the_table_of_heads_in_the_readme_is_what_the_models_say():
    assert between(README.read_text(encoding="utf-8")) == heads_table(), "run `python tests/test_documents.py`"


def test_readme_names_make_targets_that_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    text = README.read_text(encoding="utf-8") + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\bmake ([a-z]+)", text)) <= targets
    assert {"report", "test", "check"} <= targets


def test_the_lines_of_python_in_the_readme_run():
    code = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)[1]
    names: dict = {}
    exec(code, names)
    assert names["logits"].shape == (8, 2)


def test_experiment_and_study_lines_of_the_readme_are_accepted():
    from thesis_ltc.cli import parse_values
    from thesis_ltc.study.notebook import split_values

    text = README.read_text(encoding="utf-8")
    line = re.search(r"thesis-ltc run (head=\S+ .*)", text)[1]
    experiment, seeds, _ = split_values(parse_values(line.split()))
    assert (experiment.head, experiment.data, len(seeds)) == ("ncp-z", "fashion-mnist", 3)


def test_study_lines_of_the_readme_can_be_planned(tmp_path):
    import shlex

    from PIL import Image

    from thesis_ltc.cli import parse_values
    from thesis_ltc.study.definition import read_study
    from thesis_ltc.study.plan import make_plan

    for number in range(24):
        (tmp_path / "own" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        Image.effect_noise((40, 40), 50 + number).save(tmp_path / "own" / "ab"[number % 2] / f"{number}.png")
    lines = re.findall(r"thesis-ltc study (\w+)(.*)", README.read_text(encoding="utf-8"))
    assert len(lines) >= 4
    planned = 0
    for name, words in lines:
        said = shlex.split(words.replace("=DIR", f"={tmp_path / 'own'}"), comments=True)
        values = parse_values([value for word, value in zip(said, said[1:]) if word == "--set"], lists=True)
        study = read_study(ROOT / "studies" / f"{name}.yaml", values)
        if "folder" in values:
            planned += len(make_plan(study, tmp_path / "runs")["cells"])
    assert planned == 14  # seven heads, two settings, on the reader's own pictures


def pages(entries: list) -> list[str]:
    "All files below an entry of the table of contents."
    found = []
    for entry in entries:
        found += [entry["file"]] if "file" in entry else []
        for below in [entry, *entry.get("subtrees", [])]:
            found += pages(below.get("sections", []) + below.get("chapters", []))
    return found


def test_every_notebook_is_a_page_and_every_page_exists():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    named = [toc["root"], *pages(toc["parts"])]
    there = [path.relative_to(ROOT).with_suffix("").as_posix() for path in (ROOT / "nbs").rglob("*.*") if path.suffix in (".ipynb", ".md")]
    there = [name for name in there if "experiments/" not in name and ".ipynb_checkpoints" not in name]
    assert sorted(named) == sorted(there)


def test_displayed_formulas_stand_in_paragraphs_of_their_own():
    "Else MyST takes their dollars for those of formulas in the line."
    texts = {path: path.read_text(encoding="utf-8") for path in (ROOT / "nbs").rglob("*.md")}
    for path in (ROOT / "nbs").rglob("*.ipynb"):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "markdown":
                texts[path, cell["id"]] = "".join(cell["source"])
    displayed = {place: text for place, text in texts.items() if "$$" in text}
    assert displayed
    for place, text in displayed.items():
        for paragraph in re.split(r"\n\s*\n", text):
            assert "$$" not in paragraph or re.fullmatch(r"\s*\$\$[^$]*\$\$\s*", paragraph), f"{place}: {paragraph[:80]}"


def test_the_api_page_shows_every_module():
    shown = re.findall(r"automodule:: thesis_ltc\.([\w.]+)", (ROOT / "nbs" / "report" / "90_api.md").read_text(encoding="utf-8"))
    package = ROOT / "thesis_ltc"
    modules = [".".join(path.relative_to(package).with_suffix("").parts) for path in package.rglob("[!_]*.py")]
    assert sorted(shown) == sorted(modules)


def test_version_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    settings = configparser.ConfigParser()
    settings.read(ROOT / "settings.ini")
    assert citation["version"] == settings["DEFAULT"]["version"] == thesis_ltc.__version__
    assert f"## {thesis_ltc.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_lock_file_satisfies_every_range():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [Requirement(line) for group in [project["dependencies"], *project["optional-dependencies"].values()] for line in group]
    lines = [line for line in (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    locked = {Requirement(line).name.lower().replace("_", "-"): Requirement(line) for line in lines}
    for requirement in wanted:
        if requirement.name == "thesis_ltc":
            continue
        pinned = locked[requirement.name.lower().replace("_", "-")]
        (pin,) = pinned.specifier
        assert pin.operator == "==" and requirement.specifier.contains(pin.version, prereleases=True), f"{pinned} is outside {requirement}"
    linux_only = [requirement for requirement in locked.values() if re.match("nvidia-|cuda-|triton", requirement.name)]
    assert linux_only and all("linux" in str(requirement.marker) for requirement in linux_only)


if __name__ == "__main__":
    before = README.read_text(encoding="utf-8")
    atomic_write(README, before.replace(between(before), heads_table()) if between(before) else before.replace(START, START + heads_table()))
