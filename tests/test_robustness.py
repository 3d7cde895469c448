"""The page on robustness, from any number of published units, and its numbers, computed again."""
import json
from dataclasses import replace
from unittest.mock import patch

import IPython.display
import numpy as np
import pandas as pd
import pytest

from thesis_ltc.book import robustness, transfer
from thesis_ltc.book.records import find_study, load_results
from thesis_ltc.core import files
from thesis_ltc.data.corrupt import CORRUPTIONS
from thesis_ltc.study.crate import PLAN, RECORDS
from thesis_ltc.study.record import record_line
from thesis_ltc.study.shelf import Shelf
from thesis_ltc.study.stress import SHARES, STRESS

ROOT = files.repository()
STUDY, PAGE = "ct-folds", ROOT / "nbs" / "report" / "58_robustness.ipynb"
SETS = ("covid-ct", "mosmed-ct0-ct2")
IMAGES = {"covid-ct": (147, 740), "mosmed-ct0-ct2": (76, 379)}   # of a fold, of the whole set


def write_study(folder, plan, records, stress):
    "Write a published study that has these records, and no others."
    place = folder / "results" / STUDY
    there = {(record.id, record.seed) for record in records}
    planned = [(cell["id"], seed) for part in ("trunks", "cells") for cell in plan[part]
               for seed in cell["seeds"]]
    waiting = [f"{name}/seed{seed}" for name, seed in planned if (name, seed) not in there]
    files.write_json(place / PLAN, plan | {"waiting": waiting})
    files.write_lines(place / RECORDS, [record_line(record) for record in records])
    stress.to_parquet(place / STRESS, index=False)
    return folder


def scores_of(cell, drop, rng, cross):
    "A row for each condition of a made run; the drop grows with the level."
    other = next(name for name in SETS if name != cell["data"])
    clean = 0.75 + rng.normal(0, 0.02)
    rows = [("clean", 0.0, cell["data"], IMAGES[cell["data"]][0], clean)]
    rows += [(name, float(level), cell["data"], IMAGES[cell["data"]][0], clean - drop * level / 3)
             for name in CORRUPTIONS for level in range(1, 6)]
    if cell["head"] != "fc":
        rows += [("steps", share, cell["data"], IMAGES[cell["data"]][0],
                  clean - drop * share / np.mean(SHARES)) for share in SHARES]
    seen = cell["varied"]["trunk.data"] == other
    rows.append(("set", 0.0, other, IMAGES[other][0 if seen else 1], cross + rng.normal(0, 0.01)))
    return pd.DataFrame(rows, columns=["condition", "level", "set", "images", "auc"])


def made_study(folder, drops, splits, cross=0.5):
    "A published study of some splits; `drops` has the mean drop of each head, which varies by .002."
    shelf, rng = Shelf(ROOT / "results" / STUDY), np.random.default_rng(0)
    first = {record.experiment["data"]: record for record in shelf.records()}
    records, tables = [], []
    for cell in shelf.plan["cells"]:
        varied = cell["varied"]
        if cell["head"] not in drops or varied["fold"] + 5 * varied["repeat"] >= splits:
            continue
        base = first[cell["data"]]
        own = {name: varied[name] for name in ("data", "head", "repeat", "fold")} | {"trunk": cell["trunk"]}
        trunk = replace(base.trunk, data=varied["trunk.data"], head=varied["trunk.head"], trunk=cell["trunk"])
        for seed in cell["seeds"]:
            records.append(replace(
                base, id=cell["id"], seed=seed, experiment=base.experiment | own, trunk=trunk))
            drop = drops[cell["head"]] + rng.normal(0, 0.002)
            tables.append(scores_of(cell, drop, rng, cross).assign(id=cell["id"], seed=seed))
    heads = {cell["id"] for cell in shelf.plan["cells"] if cell["head"] in drops}
    cells = [cell for cell in shelf.plan["cells"] if cell["id"] in heads]
    return write_study(folder, shelf.plan | {"cells": cells}, records, pd.concat(tables, ignore_index=True))


FINDING, ACROSS = ("robust-import", "robust-finding"), ("robust-import", "robust-across-finding")


def page_of(folder, only=()):
    "The page, or some of its cells, as a reader of this repository sees it: text, figures, tables."
    cells = json.loads(PAGE.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells
               if cell["cell_type"] == "code" and (not only or cell["id"] in only)]
    shown = []
    keep = lambda *parts: shown.extend(part.data for part in parts)
    with (patch.object(files, "repository", lambda: folder), patch.object(IPython.display, "display", keep)):
        space = {}
        for source in sources:
            exec(source, space)
    return "\n".join(shown)


def published():
    "The real study and its records; skips before anything of it is published."
    study = find_study(STUDY, *load_results(ROOT / "results" / STUDY))
    if study is None:
        pytest.skip(f"results/{STUDY} is not published yet")
    return study


# Numbers


def test_drops_are_what_the_table_of_the_study_says():
    _, part = published()
    stress = part.shelf.iloc[0].stress
    runs = robustness.drops(part).set_index(["id", "seed"])
    assert len(runs) == len(part)
    for key, rows in list(stress.groupby(["id", "seed"], observed=True))[::7]:
        scores = rows[rows.condition != "set"].set_index(["condition", "level"]).auc
        clean = scores["clean", 0.0]
        for name in CORRUPTIONS:
            levels = [scores[name, float(level)] for level in range(1, 6)]
            assert np.isclose(runs.loc[key, f"{name} 4"], clean - levels[3])
            assert np.isclose(runs.loc[key, name], clean - np.mean(levels))
        corrupted = [score for (name, _), score in scores.items() if name in CORRUPTIONS]
        assert len(corrupted) == 25 and np.isclose(runs.loc[key, "corruptions"], clean - np.mean(corrupted))
        steps = [score for (name, _), score in scores.items() if name == "steps"]
        assert np.isclose(runs.loc[key, "steps"], clean - np.mean(steps) if steps else np.nan, equal_nan=True)


def test_the_difference_is_the_mean_over_splits_of_means_over_trunks_of_means_over_seeds(tmp_path):
    folder = made_study(tmp_path, {"ncp-z": 0.03, "z-fc": 0.05}, 6)
    plan, part = find_study(STUDY, *load_results(folder / "results"))
    runs = robustness.drops(part)
    runs = runs[runs.data == "covid-ct"]
    of_split = []
    for _, split in runs.groupby(["repeat", "fold"]):
        of_trunk = []
        for _, unit in split.groupby("trunk.hash"):
            means = [unit[unit["head"] == head].corruptions.mean() for head in ("ncp-z", "z-fc")]
            of_trunk.append(means[0] - means[1])
        of_split.append(np.mean(of_trunk))
    units = robustness.unit_means(runs)
    found = robustness.compare(units, "ncp-z", "z-fc", "corruptions", plan["margin"])
    assert len(of_split) == 6 and found.units == 18 and found.contrast.n == 6
    assert np.isclose(found.contrast.difference, np.mean(of_split))
    ratio = (runs.test_images / runs.train_images).mean()
    half = 2.570582 * np.std(of_split, ddof=1) * np.sqrt(1 / 6 + ratio)   # Student's t, 5 degrees of freedom
    assert np.allclose(found.ends, (np.mean(of_split) - half, np.mean(of_split) + half))


# The page


def test_without_a_published_study_the_page_says_how_to_get_one(tmp_path):
    page = page_of(tmp_path)
    assert page.count(f"`thesis-ltc study {STUDY}` runs it") == 2 and "<figure" not in page


def test_the_published_units_make_a_page():
    published()
    page = page_of(ROOT)
    assert "The study is" in page and page.count('<figure class="thesis">') >= 3
    assert page.count("- *") >= 2 and "Trained on" in page


@pytest.mark.parametrize("drops, splits, said", [
    ({"ncp-z": 0.03, "z-fc": 0.06, "z-lstm": 0.06}, 6, "**The circuit loses less.**"),
    ({"ncp-z": 0.06, "z-fc": 0.03, "z-lstm": 0.03}, 6, "**The circuit loses more.**"),
    ({"ncp-z": 0.03, "z-fc": 0.06, "z-lstm": 0.01}, 6, "**The comparisons differ.**"),
    ({"ncp-z": 0.03, "z-fc": 0.06, "z-lstm": 0.06}, 4, "**Too few splits for a verdict.**"),
    ({"ncp-z": 0.03, "z-fc": 0.06}, 1, "**Too few splits for a verdict.**"),
    ({"fc": 0.05}, 2, "**Not run.**"),
])
def test_the_page_says_what_the_records_say(tmp_path, drops, splits, said):
    page = page_of(made_study(tmp_path, drops, splits), FINDING)
    assert page.count(said) == 2   # on corrupted images, and with steps dropped
    assert f"{6 * splits} of 120 units are published: {3 * splits} of 60 on COVID-CT, in {splits} of" in page
    assert (f"n = {splits} split{'s' * (splits > 1)}, {3 * splits} units" in page) == ("ncp-z" in drops)


@pytest.mark.parametrize("splits", [2, 6])
def test_bands_and_intervals_need_five_splits(tmp_path, splits):
    page = page_of(made_study(tmp_path, {"ncp-z": 0.03, "z-fc": 0.06, "fc": 0.05}, splits))
    assert page.count('<figure class="thesis">') == 4 and page.count('class="sortable"') == 7
    assert page.count("Bands: 95 % intervals over splits.") == 2 * (splits == 6)
    assert page.count("No bands: fewer than 5 splits.") == 2 * (splits == 2)
    assert ("± " in page.split('class="sortable"')[1]) == (splits == 6)   # below means in the first table


def test_a_unit_that_lacks_a_run_is_not_counted(tmp_path):
    folder = made_study(tmp_path, {"ncp-z": 0.03, "z-fc": 0.06}, 2)
    shelf = Shelf(folder / "results" / STUDY)
    records, stress = list(shelf.records()), shelf.stress
    lost = records[0]
    left = stress[~((stress.id == lost.id) & (stress.seed == lost.seed))]
    write_study(folder, shelf.plan, records[1:], left)
    assert "11 of 120 units are published: 5 of 60 on COVID-CT" in page_of(folder, FINDING)


@pytest.mark.parametrize("cross, word", [
    (0.52, transfer.CHANCE), (0.7, transfer.ABOVE), (0.3, transfer.BELOW)])
def test_scores_on_the_other_set_are_told_from_chance(tmp_path, cross, word):
    page = page_of(made_study(tmp_path, {"ncp-z": 0.03, "z-fc": 0.05}, 6, cross), ACROSS)
    assert transfer.TRANSFER_LEADS[word] in page and transfer.CONCLUSIONS[word] in page
    assert page.count(f"{word[0].upper()}{word[1:]}, which is") == 4   # two directions, two kinds of trunks
