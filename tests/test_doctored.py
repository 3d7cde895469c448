"""Results that were changed by hand: every field of records, curves, predictions and plans, one at a time.

All pass through `thesis_ltc.study.consistency`, which the book's build calls before it reads a page. Once,
what was changed is left to the checksums. Once, whoever changed it has made the checksums again: then it is
found by what contradicts it, or it is among the fields in `UNCHECKED`, with the reason why it can't be found.
"""
import json
import shutil
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, TINY, change_lines
from disk import report

from thesis_ltc.core.files import read_json, read_lines, write_json
from thesis_ltc.study import Experiment
from thesis_ltc.study.checksums import CHECKSUMS, value_cells
from thesis_ltc.study.consistency import (
    SHARED,
    UNCHECKED,
    check_checksums,
    check_shelf_records,
    remembered,
    results_faults,
    run_faults,
    runs_faults,
    shelf_faults,
)
from thesis_ltc.study.crate import CRATE, HISTORIES, PLAN, PREDICTIONS, RECORDS, REPLAYS, write_crate
from thesis_ltc.study.runs import load_images, run_all
from thesis_ltc.study.shelf import (
    Shelf,
    checksums_of,
    find_shelves,
    parts_on,
    run_places,
    shelf_predictions,
    write_shelf,
)
from thesis_ltc.study.stress import STRESS, stress

pytestmark = pytest.mark.timeout(300)


# The study, the run, and how they are changed


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Path:
    "The trunk and two seeds of one head of the study `controls`, as a study of their own."
    published = Shelf(ROOT / "results" / "controls")
    first = published.plan["cells"][0]
    plan = published.plan | {"cells": [first | {"seeds": first["seeds"][:2]}]}
    kept = set(run_places(plan))
    folder = tmp_path_factory.mktemp("results") / "controls"
    write_json(folder / PLAN, plan)
    shutil.copy(published.folder / RECORDS, folder / RECORDS)
    change_lines(folder / RECORDS, lambda lines: [line for line in lines if place_of(line) in kept])
    for file, table in ((HISTORIES, published.histories), (PREDICTIONS, published.predictions)):
        places = table.id.astype(str) + "/seed" + table.seed.astype(str)
        table[places.isin(kept)].to_parquet(folder / file, index=False)
    write_json(folder / REPLAYS, {"experiments": {}})
    protect(folder)
    assert shelf_faults(folder) == []
    return folder


@pytest.fixture(scope="module")
def stressed(tmp_path_factory) -> Path:
    "A trunk of the study `ct-folds` and two of its heads, one of which reads in steps, as a study."
    published = Shelf(ROOT / "results" / "ct-folds")
    there = set(run_places(published.plan))
    cells = [cell for cell in published.plan["cells"] if f"{cell['id']}/seed{cell['seeds'][0]}" in there]
    one = next(cell for cell in cells if cell["head"] == "ncp-z")
    other = next(cell for cell in cells if cell["head"] == "fc" and cell["trunk"] == one["trunk"])
    trunk = next(trunk for trunk in published.plan["trunks"] if one["trunk"].startswith(trunk["id"]))
    parts = parts_on(published)
    plan = {key: value for key, value in published.plan.items() if key != "waiting"}
    cells = [cell | {"seeds": cell["seeds"][:1]} for cell in (other, one)]
    plan |= {"cells": cells, "trunks": [trunk | {"seeds": [int(one["trunk"].rpartition("/seed")[2])]}]}
    folder = tmp_path_factory.mktemp("results") / "ct-folds"
    folder.mkdir()
    write_shelf(folder, plan, {place: parts[place] for place in run_places(plan)})
    write_crate(folder, folder.name)
    assert shelf_faults(folder) == [] and Shelf(folder).stress.id.nunique() == 2
    return folder


def place_of(line: str) -> str:
    "The directory of a run, from its record."
    record = json.loads(line)
    return f"{record['id']}/seed{record['seed']}"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    "A run that is not published; its predictions have all splits."
    runs = tmp_path_factory.mktemp("runs")
    values = TINY | {"image_size": 48, "head": "fc", "epochs": 2, "device": "cpu"}
    (record,) = run_all(Experiment(**values), [0], runs, echo=lambda history: None)
    return runs / record["id"] / "seed0"


def protect(folder: Path) -> None:
    "Make checksums and metadata again, as somebody does who wants a change to pass."
    write_json(folder / CHECKSUMS, checksums_of(Shelf(folder)))
    write_crate(folder, folder.name)


@pytest.fixture
def copy(shelf, tmp_path) -> Path:
    return shutil.copytree(shelf, tmp_path / shelf.name)


def changed(value: Any) -> Any:
    "Another value of the same type; 7 instead of null."
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1 if isinstance(value, int) else value * 0.9 + 0.0571
    if isinstance(value, str):
        return f"{value}x"
    if isinstance(value, list):
        return [changed(value[0]), *value[1:]] if value else ["x"]
    return {**value, "x": 1} if isinstance(value, dict) else 7


def leaves(values: dict, place: tuple = ()) -> Iterator[tuple]:
    "The places of all values in nested mappings, as `value_cells` has them."
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, (*place, name))
        else:
            yield (*place, name)


def fields(record: dict) -> list[tuple]:
    "The places of all values of a record; of its trained tensors, which are many, those of the first."
    first = next(iter(record["travelled"]))
    return [place for place in leaves(record) if place[0] != "travelled" or place[1] == first]


def with_change(values: dict, place: tuple) -> dict:
    "Nested mappings in which one value is another."
    first, *rest = place
    return values | {first: with_change(values[first], tuple(rest)) if rest else changed(values[first])}


def write_line(folder: Path, number: int, values: dict) -> None:
    line = json.dumps(values, ensure_ascii=False, separators=(",", ":"))
    change_lines(folder / RECORDS, lambda lines: [*lines[:number], line, *lines[number + 1:]])


def faults_of(check, folder: Path) -> list[str]:
    lines: list[str] = []
    try:
        check(Shelf(folder), lines)
    except Exception as error:  # noqa: BLE001, as `shelf_faults` has it
        lines.append(f"{folder}: {type(error).__name__}: {error}")
    return lines


# Every field


LINE = 2   # of the second seed


def test_every_field_of_a_record_has_a_checksum(copy):
    record = json.loads(read_lines(copy / RECORDS)[LINE])
    assert {".".join(place) for place in leaves(record)} == set(value_cells(record))
    assert len(fields(record)) > 150
    for place in fields(record):
        write_line(copy, LINE, with_change(record, place))
        (said,) = faults_of(check_checksums, copy)
        run = f"{record['id']}/seed{record['seed']}"
        assert said.startswith(f"{copy / RECORDS}, {run}, {'.'.join(place)}: not as it was published")
    report("doctored_record_of_a_published_study", changes=len(fields(record)), lost=0)


def test_a_record_contradicts_itself_wherever_it_can(copy):
    record = json.loads(read_lines(copy / RECORDS)[LINE])
    silent = set()
    for place in fields(record):
        write_line(copy, LINE, with_change(record, place))
        said = faults_of(check_shelf_records, copy)
        assert all(str(copy) in line for line in said)
        if not any(RECORDS in line for line in said):
            silent.add(".".join(place))
    assert_known(silent)
    compared = ("resumed", "code", *SHARED)   # two that this record lacks; and with the other seed
    listed = [pattern for pattern in UNCHECKED if ": " not in pattern and not pattern.startswith(compared)]
    assert [pattern for pattern in listed if not any(fnmatchcase(name, pattern) for name in silent)] == []


def assert_known(silent: set[str]) -> None:
    "What isn't found is listed with its reason."
    assert {name for name in silent if not any(fnmatchcase(name, pattern) for pattern in UNCHECKED)} == set()


@pytest.mark.parametrize("file", [HISTORIES, PREDICTIONS])
def test_every_column_of_a_table(copy, file):
    "At the last row of a run, which is that of the last epoch; and at one between."
    table = pd.read_parquet(copy / file)
    run = table.id.astype(str).iloc[-1], table.seed.iloc[-1]
    rows = np.flatnonzero((table.id == run[0]) & (table.seed == run[1]))
    silent = set()
    for column in table:
        for row, when in ((rows[-1], "last"), (rows[len(rows) // 2], "between")):
            doctored = table.astype({name: object for name in ("id", "picture", "patient") if name in table})
            value = doctored[column].iloc[row]
            doctored.loc[row, column] = changed(value if isinstance(value, str) else value.item())
            doctored.to_parquet(copy / file, index=False)
            said = faults_of(check_checksums, copy)
            assert said and all(line.startswith(str(copy / file)) for line in said)
            assert column in ("id", "seed") or column in said[0]
            if not faults_of(check_shelf_records, copy):
                silent.add(f"{file}: {column}, {when}")
    assert_known(silent)
    report(f"doctored_table_of_{Path(file).stem}", changes=2 * table.shape[1], lost=0)


def stress_lines(folder: Path, table: pd.DataFrame) -> list[str]:
    "What is said of a study whose scores under stress are others, and whose checksums were made again."
    table.to_parquet(folder / STRESS, index=False)
    protect(folder)
    return shelf_faults(folder)


def test_every_column_of_scores_under_stress(stressed, tmp_path):
    "Of clean images, and of corrupted ones, whose scores nothing contradicts as long as they can be."
    copy, silent = shutil.copytree(stressed, tmp_path / stressed.name), set()
    table = pd.read_parquet(copy / STRESS).astype(dict.fromkeys(("id", "condition", "set"), object))
    for column in table:
        for row, when in ((0, "clean"), (1, "corrupted")):
            doctored = table.copy()
            value = doctored[column].iloc[row]
            doctored.loc[row, column] = changed(value if isinstance(value, str) else value.item())
            doctored.to_parquet(copy / STRESS, index=False)
            said = faults_of(check_checksums, copy)
            assert said and all(line.startswith(str(copy / STRESS)) for line in said)
            found = faults_of(check_shelf_records, copy)
            assert all(STRESS in line for line in found)
            if not found:
                silent.add(f"{STRESS}: {column}, {when}")
    assert_known(silent)
    assert {name for name in silent if "accuracy" in name or "clean" in name or "images" in name} == set()


def test_scores_under_stress_are_those_of_the_plan(stressed, tmp_path):
    copy = shutil.copytree(stressed, tmp_path / stressed.name)
    table, plan = pd.read_parquet(copy / STRESS), read_json(copy / PLAN)
    first, second = (f"{cell['id']}/seed{cell['seeds'][0]}" for cell in plan["cells"])
    trunk = plan["trunks"][0]
    rows = {place: table[table.id == place.partition("/")[0]] for place in (first, second)}
    of_trunk = rows[first].assign(id=trunk["id"], seed=trunk["seeds"][0])
    others = rows[second][rows[second].condition == "set"].index
    moved = table.copy()
    moved.loc[others, "images"] -= 1
    found = {
        f"{STRESS}, runs: its rows lack 1 of 2, first {first}": rows[second],
        f"{STRESS}, runs: its rows have, beyond the plan, 1 of 2, first {trunk['id']}": (
            pd.concat([table.astype({"id": str}), of_trunk])),
        f"{STRESS}, runs: its rows are in another order": pd.concat([rows[second], rows[first]]),
        f"{STRESS}, {second}, condition: the rows lack 3 of 30 conditions, first steps 0.125": (
            table[table.condition != "steps"]),
        f"{STRESS}, {first}, condition: the rows lack 1 of 27 conditions, first set on": (
            table[table.condition != "set"]),
        f"{STRESS}, {second}, condition: the rows are in another order than expected, or name": (
            pd.concat([table, rows[second][-1:]])),
        f"{STRESS}, {second}, images: is {table.images[others[0]] - 1}, but of ": moved,
        f"{STRESS}, {first}, columns: are condition, level": table.drop(columns="ece"),
    }
    for expected, doctored in found.items():
        said = stress_lines(copy, doctored)
        assert any(expected in line for line in said), (expected, said)
    assert stress_lines(copy, table) == []


def test_a_study_that_asks_for_stress_has_its_table_and_no_other_has(stressed, tmp_path):
    copy = shutil.copytree(stressed, tmp_path / stressed.name)
    plan = read_json(copy / PLAN)
    for asked, expected in (({"across": []}, "have, beyond the expected, 1 of 29 conditions, first set on"),
                            (None, "runs: its rows have, beyond the plan, 2 of 0, first ")):
        write_json(copy / PLAN, plan | {"stress": asked})
        protect(copy)
        assert any(STRESS in line and expected in line for line in shelf_faults(copy)), expected
    write_json(copy / PLAN, plan)
    (copy / STRESS).unlink()
    protect(copy)
    (said,) = shelf_faults(copy)
    assert f"{STRESS}, runs: its rows lack 2 of 2, first {plan['cells'][0]['id']}" in said


def test_scores_under_stress_of_a_run_that_is_not_published(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / run.parent.name / run.name)
    stress([folder], load_images(Experiment(**read_json(folder / "record.json")["experiment"])))
    table = pd.read_parquet(folder / STRESS)
    assert run_faults(folder) == []
    table.assign(auc=table.auc - 0.01).to_parquet(folder / STRESS, index=False)
    (said,) = run_faults(folder)
    assert said.startswith(f"{folder / STRESS}, auc: of clean images is ") and "but the record says" in said
    table[1:].to_parquet(folder / STRESS, index=False)
    (said,) = run_faults(folder)
    assert f"{folder / STRESS}, condition: the rows lack 1 of 26 conditions, first clean" in said


def test_a_table_of_three_bytes_an_image(copy):
    "As `publish` keeps many test images: the predicted class, its chance, and that of the true one."
    table = pd.read_parquet(copy / PREDICTIONS)
    with patch("thesis_ltc.study.shelf.MANY_IMAGES", 0):
        brief = shelf_predictions(table.assign(split="test"))
    brief = brief.assign(id=table.id.to_numpy(), seed=table.seed.to_numpy())

    def said_of(**columns) -> list[str]:
        brief.assign(**columns).to_parquet(copy / PREDICTIONS, index=False)
        return faults_of(check_shelf_records, copy)

    assert said_of() == []
    other, above, unknown = (brief[name].copy() for name in ("predicted", "true_chance", "predicted"))
    other.iloc[-1] = 1 - other.iloc[-1]
    above.iloc[-1] = 255
    unknown.iloc[-1] = 2
    assert any("metrics.best.test.confusion" in line for line in said_of(predicted=other))
    assert any("true_chance" in line for line in said_of(true_chance=above))
    assert any("predicted: must be 0 to 1" in line for line in said_of(predicted=unknown))


def test_every_field_of_a_plan(copy):
    plan, silent = read_json(copy / PLAN), set()
    cells = [(("cells", number), cell) for number, cell in enumerate(plan["cells"])]
    for place in [*leaves(plan), *[(*where, *inner) for where, cell in cells for inner in leaves(cell)]]:
        if len(place) > 2 and place[0] == "cells":
            _, number, *rest = place
            inner = {number: with_change(plan["cells"][number], tuple(rest))}
            doctored = plan | {"cells": [inner.get(n, cell) for n, cell in enumerate(plan["cells"])]}
        elif place == ("cells",):
            doctored = plan | {"cells": plan["cells"][1:]}
        else:
            doctored = with_change(plan, place)
        write_json(copy / PLAN, doctored)
        assert faults_of(check_checksums, copy), place
        if not faults_of(check_shelf_records, copy):
            silent.add(f"{PLAN}: {'.'.join(str(part) for part in place)}")
    assert_known(silent)


def test_every_field_of_a_run_that_is_not_published(run, tmp_path):
    runs = tmp_path / "runs"
    shutil.copytree(run.parent, runs / run.parent.name)
    folder = runs / run.parent.name / run.name
    assert run_faults(folder) == [] == runs_faults(runs)
    record, silent = read_json(folder / "record.json"), set()
    for place in fields(record):
        write_json(folder / "record.json", with_change(record, place))
        said = run_faults(folder)
        assert all(str(folder) in line for line in said)
        if not said:
            silent.add(".".join(place))
    assert_known(silent)
    of_predictions = ("auc", "log_loss", "brier", "ece")   # of all splits
    assert not any(name.endswith(of_predictions) for name in silent)
    write_json(folder / "record.json", record)
    curves = (folder / "history.csv").read_text()
    (folder / "history.csv").write_text(curves.replace("\n2,", "\n3,"))
    assert f"{folder / 'history.csv'}, epoch: " in run_faults(folder)[0]


# Other kinds of change


def cut(share: float):
    return lambda data: data[:int(len(data) * share)]


@pytest.mark.parametrize("file", [RECORDS, HISTORIES, PREDICTIONS, PLAN, CHECKSUMS, CRATE])
@pytest.mark.parametrize("share", [0, 0.5, 0.999])
def test_a_file_that_was_cut_is_named(copy, file, share):
    (copy / file).write_bytes(cut(share)((copy / file).read_bytes()))
    assert file in "\n".join(shelf_faults(copy))


@pytest.mark.parametrize("file", [RECORDS, HISTORIES, PREDICTIONS, PLAN, CHECKSUMS, CRATE, REPLAYS])
def test_a_file_that_is_gone_is_named(copy, file):
    (copy / file).unlink()
    assert file in "\n".join(shelf_faults(copy))


@pytest.mark.parametrize("order", [[0, 1], [0, 2, 1], [0, 1, 2, 2], [1, 2]])
def test_lines_are_those_of_the_plan_even_with_new_checksums(copy, order):
    change_lines(copy / RECORDS, lambda lines: [lines[number] for number in order])
    protect(copy)
    assert f"{copy / RECORDS}, runs: its lines " in "\n".join(shelf_faults(copy))


def test_replays_are_protected_by_the_metadata(copy):
    write_json(copy / REPLAYS, {"experiments": {"x": {"state": "same"}}})
    assert f"{copy / REPLAYS}: {CRATE} names it, but it was changed since" in "\n".join(shelf_faults(copy))


def test_a_shelf_is_missing_its_records(tmp_path, copy):
    "What is left of it is enough to notice."
    shutil.copytree(copy, tmp_path / "results" / "controls", dirs_exist_ok=True)
    (tmp_path / "results" / "controls" / RECORDS).unlink()
    assert RECORDS in "\n".join(results_faults(tmp_path))


def test_only_what_had_no_fault_is_remembered(copy, monkeypatch, tmp_path):
    monkeypatch.setenv("THESIS_LTC_CACHE", str(tmp_path / "cache"))
    calls = []

    def check(folder: Path) -> list[str]:
        calls.append(folder)
        return shelf_faults(folder)

    assert remembered(copy, check) == remembered(copy, check) == [] and len(calls) == 1
    before = (copy / RECORDS).read_bytes()
    change_lines(copy / RECORDS, lambda lines: [line.replace('"cores":', '"cores":1') for line in lines])
    assert remembered(copy, check) and remembered(copy, check) and len(calls) == 3
    (copy / RECORDS).write_bytes(before)
    assert remembered(copy, check) == [] and len(calls) == 3


def test_all_published_studies_are_as_they_were_published():
    shelves = find_shelves(ROOT / "results")
    assert len(shelves) >= 9
    assert [line for shelf in shelves for line in remembered(shelf.folder, shelf_faults)] == []
