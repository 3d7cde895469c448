"""The first page and the annotated report, from published shelves with every combination of verdicts."""

import itertools
import shutil
from dataclasses import replace

import matplotlib.pyplot as plt
import pytest

from thesis_ltc.book import answer
from thesis_ltc.core.files import atomic_write, read_json, repository, write_json
from thesis_ltc.study.plan import load_plans
from thesis_ltc.study.record import record_line
from thesis_ltc.study.shelf import Shelf, publish

ROOT = repository()
STUDIES = {"controls": ("controls", "auc"), "fashion-mnist": ("fashion-mnist-3573b5e3", "accuracy")}
SEEDS = range(8)
HISTORY = "epoch,train_loss,val_loss,train_accuracy,val_accuracy\n1,1.0,1.0,0.5,0.5\n"
# Circuit minus layer at the best and at the last epoch: the mean, and how much it varies over seeds.
# The margins are .02 and .005.
KINDS = {
    "lower": ((-0.06, 0.0005), (-0.06, 0.0005)), "higher": ((0.06, 0.0005), (0.06, 0.0005)),
    "equal": ((0.001, 0.0005), (-0.001, 0.0005)), "open": ((0.015, 0.05), (0.015, 0.05)),
    "one epoch": ((0.0, 0.05), (-0.06, 0.0005)), "missing": None}


def with_scores(record, metric, best, last, seed):
    "A record with other test scores at both epochs."
    def scored(epoch, value):
        return replace(epoch, test=replace(epoch.test, **{metric: value}))

    metrics = replace(record.metrics, best=scored(record.metrics.best, best),
                      last=scored(record.metrics.last, last))
    return replace(record, seed=seed, metrics=metrics)


def publish_study(name, kind, results, folder):
    "Publish a study in which the circuit differs from the layer as a kind says, as a reader would."
    shelf, metric = Shelf(ROOT / "results" / STUDIES[name][0]), STUDIES[name][1]
    first = {}
    for record in shelf.records():
        first.setdefault(record.experiment["head"], record)
    for head in ("ncp-z", "z-fc"):
        for seed in SEEDS:
            shifts = [mean + spread * (seed % 2 - 0.5) for mean, spread in KINDS[kind]]
            best, last = (0.7 + shift * (head == "ncp-z") for shift in shifts)
            made = with_scores(first[head], metric, best, last, seed)
            place = folder / made.id / f"seed{seed}"
            atomic_write(place / "record.json", record_line(made))
            atomic_write(place / "history.csv", HISTORY)
    cells = [{"id": first[head].id, "seeds": list(SEEDS), "head": head, "varied": {"head": head}}
             for head in ("ncp-z", "z-fc")]
    plan = read_json(shelf.folder / "plan.json") | {"cells": cells, "trunk": None, "overrides": {}}
    write_json(folder / f"{name}.plan.json", plan)
    publish(load_plans(folder)[0], results)


@pytest.fixture(scope="module")
def shelves(tmp_path_factory):
    "A published study for each kind of difference and each image set."
    root, made = tmp_path_factory.mktemp("shelves"), {}
    for name, kind in itertools.product(STUDIES, KINDS):
        if KINDS[kind] is not None:
            place = root / f"{name}-{kind}"
            publish_study(name, kind, place / "results", place / "runs")
            made[name, kind] = place / "results" / name
    return made


def repository_of(folder, shelves, **kinds):
    "A repository with the claims and some published studies."
    (folder / "results").mkdir(parents=True)
    (folder / "studies").mkdir()
    shutil.copy(ROOT / "studies" / "claims.yaml", folder / "studies" / "claims.yaml")
    for name, kind in kinds.items():
        name = name.replace("_", "-")
        if KINDS[kind] is not None:
            shutil.copytree(shelves[name, kind], folder / "results" / name)
    return folder


def decided(kind):
    return kind in ("lower", "higher", "equal")


@pytest.mark.parametrize("first, second", [*itertools.product(KINDS, KINDS)])
def test_every_combination_of_verdicts_is_answered(first, second, shelves, tmp_path):
    root = repository_of(tmp_path / "r", shelves, controls=first, fashion_mnist=second)
    judgements, studies = answer.judge_published(root)
    sentences = answer.answer(judgements)
    text = " ".join(sentences)
    kinds = {first, second}
    starts = {"lower": "**No.**", "higher": "**Yes, and better.**", "equal": "**Yes.**"}
    found = {kind for kind in kinds if decided(kind)}
    if len(found) > 1:
        assert text.startswith("**It depends on the images.**")
    elif found:
        assert text.startswith(starts[found.pop()])
    else:
        assert text.startswith("**No answer yet.**" if kinds == {"missing"} else "**Not decided.**")
    assert len(sentences) <= 5
    assert ("COVID-CT" in text) == (first != "missing")
    assert ("Fashion-MNIST" in text) == (second != "missing")
    primary = judgements[0]
    answers = {"lower": "contradicts", "higher": "contradicts", "equal": "supports", "open": "undecided",
               "one epoch": "undecided", "missing": "not run"}
    found = {one.comparison.study: one.answer for one in primary.evidence}
    assert found == {"controls": answers[first], "fashion-mnist": answers[second], "end-to-end": "not run"}


@pytest.mark.parametrize("first, second", [("lower", "equal"), ("open", "missing"), ("missing", "missing")])
def test_pages_are_rendered_from_any_shelf(first, second, shelves, tmp_path):
    root = repository_of(tmp_path / "r", shelves, controls=first, fashion_mnist=second)
    judgements, studies = answer.judge_published(root)
    page = answer.annotated(judgements, studies).data
    assert page.count('class="thesis-claim"') == len(judgements) and "not run" in page
    primary = judgements[0]
    if first != "missing":
        box = answer.scope_box(primary, judgements, studies).data
        assert "203 test images of 136 px" in box and ("2,000 test images" in box) == (second != "missing")
        figure = answer.draw_primary(primary)
        assert len(figure.axes[0].texts) == 1 + (second != "missing")
        plt.close(figure)


def test_without_a_published_study_the_page_says_how_to_get_one(shelves, tmp_path):
    root = repository_of(tmp_path / "r", shelves)
    (sentence,) = answer.answer(answer.judge_published(root)[0])
    assert sentence.startswith("**No answer yet.**") and "`thesis-ltc study controls` runs one" in sentence


def test_a_run_of_a_reader_is_no_evidence(shelves, tmp_path):
    root = repository_of(tmp_path / "r", shelves)
    shutil.copytree(shelves["controls", "higher"].parent.parent / "runs", root / "runs")
    assert answer.answer(answer.judge_published(root)[0])[0].startswith("**No answer yet.**")


def test_a_study_with_a_missing_run_is_no_evidence(shelves, tmp_path):
    root = repository_of(tmp_path / "r", shelves, controls="lower")
    lines = root / "results" / "controls" / "records.jsonl"
    atomic_write(lines, "".join(lines.read_text().splitlines(keepends=True)[1:]))
    judgements, _ = answer.judge_published(root)
    assert judgements[0].verdict == "not run"
    assert judgements[0].evidence[0].reason == "1 planned run of controls has no record"
