"""Files of metadata: valid for the tools that read them, complete, and what the code writes now."""
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import mlcroissant
import numpy as np
import pytest
import rocrate
from conftest import ROOT, change_lines
from filelock import FileLock
from mlcroissant._src.operation_graph.operations import extract
from rocrate.rocrate import ROCrate

import thesis_ltc
from thesis_ltc.core.files import cache_folder, file_sha256, read_json, read_lines, write_json
from thesis_ltc.core.software import CODEMETA, codemeta
from thesis_ltc.data import croissant, load
from thesis_ltc.data.croissant import Facts, image_sets
from thesis_ltc.data.packs import write_pack
from thesis_ltc.study import metadata
from thesis_ltc.study.crate import CRATE, FILE_MEANINGS, RECORDS, make_crate
from thesis_ltc.study.shelf import find_shelves

SHELVES = {shelf.folder.name: shelf.folder for shelf in find_shelves(ROOT / "results")}
SETS = list(image_sets())
CROISSANTS = ROOT / "results" / "croissant"
STALE = "run `thesis-ltc metadata`"


@pytest.fixture(scope="module")
def wanted() -> dict[str, dict]:
    return metadata.metadata(ROOT)


# In step with the code


def test_every_file_is_what_the_code_writes_now(wanted, tmp_path):
    stale = []
    for path, value in wanted.items():
        write_json(tmp_path / path, value)
        if not (ROOT / path).exists() or (ROOT / path).read_bytes() != (tmp_path / path).read_bytes():
            stale.append(path)
    assert stale == [], STALE


def test_nothing_is_described_that_is_gone(wanted):
    files = [*CROISSANTS.iterdir(), *ROOT.glob(f"results/*/{CRATE}")]
    assert {str(path.relative_to(ROOT)) for path in files} == set(wanted) - {CODEMETA}


def test_no_place_on_a_disk_is_named(wanted):
    assert not re.search(r'"(/|~|file:)|/home/|/tmp/', json.dumps(wanted))


# CodeMeta

REQUIRED = {"@context", "@type", "name", "description", "version", "license", "author",
            "programmingLanguage", "softwareRequirements"}


def faults(described: dict) -> list[str]:
    "What a file of CodeMeta lacks."
    found = sorted(name for name in REQUIRED if not described.get(name))
    found += [f"{author} has no name" for author in described.get("author", []) if not author.get("name")]
    if not str(described.get("license")).startswith("https://spdx.org/licenses/"):
        found.append("license is no address at SPDX")
    return found


def test_codemeta_has_the_required_terms_and_agrees_with_the_package():
    described = read_json(ROOT / CODEMETA)
    assert faults(described) == []
    assert described["@context"] == "https://w3id.org/codemeta/3.0"
    assert described["version"] == thesis_ltc.__version__
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {needed["name"] for needed in described["softwareRequirements"]}
    assert names == {re.match(r"[\w.-]+", text)[0] for text in project["dependencies"]}
    assert [author["name"] for author in described["author"]] == [name["name"] for name in project["authors"]]


@pytest.mark.parametrize(("change", "fault"), [
    ({"version": ""}, "version"),
    ({"author": [{"@type": "Person"}]}, "{'@type': 'Person'} has no name"),
    ({"license": "Apache-2.0"}, "license is no address at SPDX"),
])
def test_a_fault_in_codemeta_is_noticed(change, fault):
    assert faults(codemeta(ROOT) | change) == [fault]


# Croissant

MAY_LACK = {"version", "license", "datePublished"}   # recommended by Croissant, and not known of every set


def issues(path: Path) -> tuple[list[str], set[str]]:
    "Errors that mlcroissant finds in a file, and the properties that it misses."
    try:
        found = mlcroissant.Dataset(path).metadata.ctx.issues
    except mlcroissant.ValidationError as error:
        return [str(error)], set()
    missing = [re.search(r'"\S+/(\w+)" is recommended', warning) for warning in found.warnings]
    return sorted(found.errors), {match[1] if match else "?" for match in missing}


@pytest.mark.parametrize("name", SETS)
def test_mlcroissant_reads_each_file_without_an_error(name):
    errors, missing = issues(CROISSANTS / f"{name}.json")
    assert errors == [] and missing <= MAY_LACK


def test_errors_in_a_file_are_noticed(tmp_path):
    "A field of files that don't exist; files without a checksum in a set that isn't live."
    for key, words in (("recordSet", 'UUID "pictures"'), ("isLiveDataset", "['md5', 'sha256']")):
        described = read_json(CROISSANTS / "covid-ct.json")
        if key == "recordSet":
            described[key][1]["field"][0]["source"]["fileSet"]["@id"] = "pictures"
        else:
            del described[key]
        write_json(tmp_path / "broken.json", described)
        (error,), _ = issues(tmp_path / "broken.json")
        assert words in error


@pytest.mark.parametrize("name", SETS)
def test_what_may_not_be_shared_says_so_and_has_no_invented_licence(name):
    facts, described = image_sets()[name], read_json(CROISSANTS / f"{name}.json")
    assert facts.licence in described["conditionsOfAccess"]
    assert ("may not be redistributed" in described["conditionsOfAccess"]) == (not facts.may_be_shared)
    stated = facts.licence.startswith(("CC BY", "MIT"))
    assert ("license" in described) == stated


def test_the_facts_agree_with_real_images(real_data):
    if not (real_data / "covid-ct").is_dir():
        pytest.skip("covid-ct is not among the real images")
    facts, data = image_sets()["covid-ct"], load("covid-ct")
    assert (facts.classes, facts.licence) == (data.classes, data.licence)
    assert facts.may_be_shared == data.publishable
    assert facts.meaning.startswith(f"{len(data)} ") and set(facts.notes) <= set(data.notes)
    assert facts.split == (data.split_name == "official") and facts.patients == data.patients_known


def test_a_set_without_a_licence_is_valid(tmp_path, monkeypatch):
    unknown = Facts('Scans "with quotes" and \\ and Æ', "https://example.org/x", "yang2020covidct",
                    ("a/b", "c d"), "not stated")
    monkeypatch.setattr(croissant, "image_sets", lambda: {"my-scans": unknown})
    described = croissant.croissant("my-scans", ROOT)
    write_json(tmp_path / "my-scans.json", described)
    assert "license" not in described
    assert issues(tmp_path / "my-scans.json") == ([], {"license", "version"})
    read = mlcroissant.Dataset(tmp_path / "my-scans.json").metadata
    assert read.description == unknown.meaning + ". No split was published."


@pytest.mark.parametrize("name", ["digits", "row-order"])
def test_mlcroissant_reads_a_pack_as_the_set_that_was_packed(name, tmp_path, monkeypatch):
    # Otherwise an older pack of the same name is read.
    monkeypatch.setattr(extract, "EXTRACT_PATH", extract.epath.Path(tmp_path / "cache"))
    data = load(name)
    data = data.subset(np.arange(len(data)) % 20 == 0)
    write_pack(data, tmp_path / f"{name}.zip")
    shutil.copy(CROISSANTS / f"{name}.json", tmp_path)
    rows = {}
    for record in mlcroissant.Dataset(tmp_path / f"{name}.json").records("records"):
        row = {key.removeprefix("records/"): value for key, value in record.items()}
        rows[row["name"].decode()] = row
    assert list(rows) == data.names.tolist()
    for number, row in enumerate(rows.values()):
        assert row["label"].decode() == data.classes[data.labels[number]]
        assert row["source"].decode() == data.sources[number]
        assert np.array_equal(np.asarray(row["image"]), data.images[number, 0])
        if "patient" in row:
            assert row["patient"].decode() == data.patients[number]
    assert all("patient" in row for row in rows.values()) == (name == "row-order")


# RO-Crate


def described_files(folder: Path) -> dict[str, dict]:
    "The files that a crate names, as the rocrate library reads them."
    return {entity.id: entity.properties() for entity in ROCrate(folder).data_entities
            if entity.type == "File"}


@pytest.mark.parametrize("name", SHELVES)
def test_a_crate_names_every_file_of_its_folder_and_no_other(name):
    folder, files = SHELVES[name], described_files(SHELVES[name])
    assert set(files) == {path.name for path in folder.iterdir()} - {CRATE}
    for file, properties in files.items():
        assert properties["sha256"] == file_sha256(folder / file)
        assert properties["contentSize"] == str((folder / file).stat().st_size)


@pytest.mark.parametrize("name", SHELVES)
def test_a_crate_says_what_plan_and_records_say(name):
    folder, crate = SHELVES[name], ROCrate(SHELVES[name])
    records = [json.loads(line) for line in read_lines(folder / RECORDS)]
    assert crate.description == read_json(folder / "plan.json")["question"]
    assert crate.root_dataset["datePublished"][:19] == max(record["finished"] for record in records)[:19]
    software = crate.get_by_type("SoftwareApplication")
    commits = {entity["version"] for entity in software if entity["name"] == "thesis_ltc"}
    assert commits == {record["commit"] for record in records}
    for entity in crate.get_entities():
        if entity.id.startswith("#croissant-"):
            assert (folder / entity["url"]).is_file()
    images = {entity["name"] for entity in crate.get_entities() if entity.id.startswith("#images-")}
    assert images == {record["data"]["name"] for record in records}


def test_files_of_a_study_are_all_described():
    "A file that publishing adds must have a meaning in FILE_MEANINGS."
    names = {path.name for folder in SHELVES.values() for path in folder.iterdir()}
    assert names - {CRATE} <= set(FILE_MEANINGS) and len(SHELVES) >= 9


# The validator of RO-Crate needs rich<14, and so an environment of its own. Here it needs no network: for the
# context at w3id.org it gets the one that the rocrate library carries, of a later version with more terms.

VALIDATOR = "roc-validator==0.13.0"
VALIDATE = """
import json, sys
from pathlib import Path
from rocrate_validator import models, services
from rocrate_validator.utils import document_loader
from rocrate_validator.utils.http import HttpRequester

text = Path(sys.argv[1]).read_text()

class Answer:
    status_code, headers, text, content = 200, {"Content-Type": "application/ld+json"}, text, text.encode()
    json = lambda self: json.loads(text)

def get(self, url, *arguments, **options):
    assert url.startswith("https://w3id.org/ro/crate/"), url
    return Answer()

HttpRequester.get = get
document_loader._fetch_json_ld = lambda url: json.loads(text)
faults = {}
for folder in sys.argv[2:]:
    settings = services.ValidationSettings(
        rocrate_uri=folder, profile_identifier="ro-crate-1.2", requirement_severity=models.Severity.REQUIRED)
    result = services.validate(settings)
    faults[folder] = [f"{issue.check.identifier}: {issue.message}" for issue in result.get_issues()]
    assert result.passed() == (not faults[folder])
print(json.dumps(faults))
"""


@pytest.fixture(scope="session")
def validator() -> Path:
    "The Python of the validator's environment, made once; skips if it can't be installed."
    place = cache_folder() / f"{VALIDATOR.replace('==', '-')}-{sys.version_info[0]}.{sys.version_info[1]}"
    python, made = place / "bin" / "python", place / "made"
    with FileLock(f"{place}.lock"):
        if not made.exists():
            shutil.rmtree(place, ignore_errors=True)
            quiet = ["--quiet", "--disable-pip-version-check"]
            for command in ([sys.executable, "-m", "venv", str(place)],
                            [str(python), "-m", "pip", "install", *quiet, VALIDATOR]):
                try:
                    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
                except (OSError, subprocess.TimeoutExpired) as error:
                    pytest.skip(f"{VALIDATOR} can't be installed: {error}")
                if done.returncode:
                    last = (done.stderr or done.stdout).strip().splitlines()[-1:]
                    pytest.skip(f"{VALIDATOR} can't be installed: {last}")
            made.touch()
    return python


def validate(python: Path, *folders: Path) -> dict[str, list[str]]:
    "What RO-Crate requires and a folder lacks, by its name."
    context = Path(rocrate.__file__).parent / "data" / "ro-crate.jsonld"
    command = [str(python), "-c", VALIDATE, str(context), *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return {Path(folder).name: found for folder, found in json.loads(done.stdout).items()}


def one_of_each_image_set() -> dict[str, Path]:
    "A published study of each image set; two seconds each is too long to validate all."
    return {read_json(folder / "plan.json")["data"]: folder for folder in SHELVES.values()}


@pytest.mark.timeout(600)
def test_the_validator_finds_no_fault_in_published_studies(validator):
    folders = one_of_each_image_set().values()
    assert len(folders) >= 4
    assert validate(validator, *folders) == {folder.name: [] for folder in folders}


@pytest.mark.timeout(600)
def test_the_validator_finds_no_fault_in_a_study_of_ones_own_images(validator, tmp_path):
    "Without replays, with a question that needs escapes, and with images that have no Croissant file."
    shutil.copytree(SHELVES["covid-ct"], tmp_path / "own")
    (tmp_path / "own" / "replays.json").unlink()
    write_json(tmp_path / "own" / "plan.json", {"question": 'Is "a\\b" < c & d?\nÆ \u2028 </script>'})
    renamed = lambda line: line.replace('"name":"covid-ct"', '"name":"my scans/1"')
    change_lines(tmp_path / "own" / RECORDS, lambda lines: [*map(renamed, lines)])
    described = make_crate(tmp_path / "own", "own", ROOT)
    write_json(tmp_path / "own" / CRATE, described)
    names = {entity["@id"] for entity in described["@graph"]}
    assert "replays.json" not in names and not [name for name in names if name.startswith("#croissant")]
    assert validate(validator, tmp_path / "own") == {"own": []}
    assert ROCrate(tmp_path / "own").description == read_json(tmp_path / "own" / "plan.json")["question"]


@pytest.mark.timeout(600)
def test_the_validator_finds_faults(validator, tmp_path):
    "A missing file, software without a version."
    for name in ("file", "software"):
        shutil.copytree(SHELVES["covid-ct"], tmp_path / name)
    (tmp_path / "file" / "replays.json").unlink()
    described = read_json(tmp_path / "software" / CRATE)
    for entity in described["@graph"]:
        entity.pop("version", None)
    write_json(tmp_path / "software" / CRATE, described)
    found = validate(validator, *sorted(tmp_path.iterdir()))
    assert "replays.json" in "".join(found["file"]) and "`version`" in "".join(found["software"])
