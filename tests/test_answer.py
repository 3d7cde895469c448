"""The first page and the annotated report, from published shelves with every combination of verdicts."""

import itertools
import shutil
from dataclasses import replace

import matplotlib.pyplot as plt
import pytest
from conftest import change_lines

from thesis_ltc.book import answer
from thesis_ltc.core.files import atomic_write, read_json, repository, write_json
from thesis_ltc.study.plan import load_plans
from thesis_ltc.study.record import record_line
from thesis_ltc.study.shelf import Shelf, publish

ROOT = repository()
STUDIES = {"controls": "auc", "end-to-end": "auc", "fashion-mnist-3573b5e3": "accuracy"}   # their metrics
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
    shelf, metric, first = Shelf(ROOT / "results" / name), STUDIES[name], {}
    plan = read_json(shelf.folder / "plan.json")
    trunks = {f"{trunk['id']}/seed{seed}" for trunk in plan["trunks"] for seed in trunk["seeds"]}
    for record in shelf.records():
        if f"{record.id}/seed{record.seed}" in trunks:
            write_run(record, folder)
        else:
            first.setdefault(record.experiment["head"], record)
    for head, seed in itertools.product(("ncp-z", "z-fc"), SEEDS):
        shifts = [mean + spread * (seed % 2 - 0.5) for mean, spread in KINDS[kind]]
        best, last = (0.7 + shift * (head == "ncp-z") for shift in shifts)
        write_run(with_scores(first[head], metric, best, last, seed), folder)
    cells = [{"id": first[head].id, "seeds": list(SEEDS), "head": head, "varied": {"head": head}}
             for head in ("ncp-z", "z-fc")]
    write_json(folder / f"{name}.plan.json", plan | {"cells": cells, "overrides": {}})
    publish(load_plans(folder)[0], results)


def write_run(record, folder):
    "Write a run as training leaves it."
    place = folder / record.id / f"seed{record.seed}"
    atomic_write(place / "record.json", record_line(record))
    atomic_write(place / "history.csv", HISTORY)


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


def repository_of(folder, shelves, *kinds):
    "A repository with the claims, and the published studies of some kinds, in the order of STUDIES."
    (folder / "results").mkdir(parents=True)
    (folder / "studies").mkdir()
    shutil.copy(ROOT / "studies" / "claims.yaml", folder / "studies" / "claims.yaml")
    for name, kind in zip(STUDIES, kinds, strict=False):
        if KINDS[kind] is not None:
            shutil.copytree(shelves[name, kind], folder / "results" / name)
    return folder


PLACES = ("COVID-CT (frozen backbone", "COVID-CT (whole network trained",
          "Fashion-MNIST (whole network trained")
WORDS = {"lower": "No.", "higher": "Yes, and better.", "equal": "Yes."}


def first_words(kinds):
    "What the answer must begin with."
    directions = {kind for kind in kinds if kind in WORDS}
    if not directions:
        return "No answer yet." if set(kinds) == {"missing"} else "Not decided."
    if len(directions) > 1:
        frozen, whole, clothes = (kind if kind in WORDS else None for kind in kinds)
        if frozen == whole or None in (frozen, whole):
            return "It depends on the images."
        return "It depends on " + ("what is trained." if whole == clothes or not clothes else
                                   "the images and on what is trained.")
    word = WORDS[directions.pop()]
    return word if word == "No." or {*kinds} <= {*WORDS} else f"So far, {word.lower()}"


@pytest.mark.parametrize("kinds", [*itertools.product(KINDS, ("missing", "lower", "equal"), KINDS)])
def test_every_combination_of_verdicts_is_answered(kinds, shelves, tmp_path):
    judgements, studies = answer.judge_published(repository_of(tmp_path / "r", shelves, *kinds))
    sentences = answer.answer(judgements, studies)
    assert sentences[0].startswith(f"**{first_words(kinds)}**") and len(sentences) <= 5
    said = " ".join(sentences[:2])
    for place, kind in zip(PLACES, kinds, strict=True):
        assert (place in said) == (kind != "missing")
    for name, kind in zip(STUDIES, kinds, strict=True):
        is_said = f"the study named {name} was not run" in said.lower()
        assert is_said == (kind == "missing" and {*kinds} != {"missing"})
    answers = {"lower": "contradicts", "higher": "contradicts", "equal": "supports", "open": "undecided",
               "one epoch": "undecided", "missing": "not run"}
    earlier = next(one for one in judgements if one.claim.name == "earlier")
    found = {one.comparison.study: one.answer for one in earlier.evidence}
    assert found == {name: answers[kind] for name, kind in zip(STUDIES, kinds, strict=True)}


@pytest.mark.parametrize("kinds", [
    ("lower", "equal", "equal"), ("open", "missing", "missing"), ("missing", "missing", "missing")])
def test_pages_are_rendered_from_any_shelf(kinds, shelves, tmp_path):
    judgements, studies = answer.judge_published(repository_of(tmp_path / "r", shelves, *kinds))
    page = answer.annotated(judgements, studies).data
    assert page.count('class="thesis-claim"') == len(judgements) and "not run" in page
    count = 3 - kinds.count("missing")
    if not count:
        return
    box = answer.scope_box(answer.primary_of(judgements), judgements, studies).data
    assert "203 test images of 136 px" in box and ("2,000 test images" in box) == (kinds[2] != "missing")
    figure = answer.draw_primary(answer.primary_of(judgements))
    dots = [float(line.get_xdata()[0]) for line in figure.axes[0].lines if line.get_marker() == "o"]
    means = [mean for kind in kinds if KINDS[kind] for mean, _ in KINDS[kind]]
    assert len(figure.axes[0].texts) == count and dots == pytest.approx(means, abs=1e-9)
    plt.close(figure)


def test_another_version_of_a_study_is_no_evidence(shelves, tmp_path):
    root = repository_of(tmp_path / "r", shelves, "lower", "equal", "equal")
    before = answer.answer(*answer.judge_published(root))
    shutil.copytree(shelves["controls", "higher"], root / "results" / "controls-00000000")
    assert answer.answer(*answer.judge_published(root)) == before


def test_without_a_published_study_the_page_says_how_to_get_one(shelves, tmp_path):
    root = repository_of(tmp_path / "r", shelves)
    (sentence,) = answer.answer(*answer.judge_published(root))
    assert sentence.startswith("**No answer yet.**") and "`thesis-ltc study ct-folds` runs one" in sentence


def test_a_run_of_a_reader_is_no_evidence(shelves, tmp_path):
    root = repository_of(tmp_path / "r", shelves)
    shutil.copytree(shelves["controls", "higher"].parent.parent / "runs", root / "runs")
    assert answer.answer(*answer.judge_published(root))[0].startswith("**No answer yet.**")


def test_a_study_with_a_missing_run_is_no_evidence(shelves, tmp_path):
    root = repository_of(tmp_path / "r", shelves, "lower")
    lines = root / "results" / "controls" / "records.jsonl.gz"
    change_lines(lines, lambda found: found[:-1])
    judgements, _ = answer.judge_published(root)
    earlier = next(one for one in judgements if one.claim.name == "earlier")
    assert earlier.verdict == "not run"
    assert earlier.evidence[0].reason == "1 planned run of controls has no record"
