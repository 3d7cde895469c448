"""Wherever a crash ends, and whichever operation it loses: the same command goes on, to the same bits.

Every operation on the disk is logged. From the log follow all states that a crash may leave: each beginning
of the operations, and each beginning without one that no `fsync` has ordered before the others. Each state is
written to a folder of its own, and gone on with. A state that is equal to an earlier one is not tried again.
"""
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from disk import (
    SOAK,
    Operation,
    Tree,
    crashes,
    logged,
    outcome,
    read_tree,
    report,
    seed_folder,
    signature,
    write_tree,
)

from thesis_ltc.core import files
from thesis_ltc.data import load
from thesis_ltc.data.imageset import DamagedError, ImageSet
from thesis_ltc.data.packs import Packer, read_pack, set_entries
from thesis_ltc.data.sources import cached
from thesis_ltc.study import Experiment, run
from thesis_ltc.study.plan import load_plans
from thesis_ltc.study.shelf import Shelf, find_shelves, publish
from thesis_ltc.training.trunk import cached_folder, write_maps

EPOCHS = 5 if SOAK else 3
TINY = Experiment(data="digits", backbone="none", head="fc", image_size=28, limit=10, batch_size=10,
                  epochs=EPOCHS, threads=1, precision="float32")


def survive(
    name: str,
    before: Tree,
    done: list[Operation],
    go_on: Callable[[Path, str, list[Operation]], None],   # raises AssertionError if something is lost
    tmp_path: Path,
) -> int:
    "Go on from every state that a crash of these operations may leave; how many there were."
    tried: set[str] = set()
    total = 0
    for text, kept, tree in crashes(before, done):
        total += 1
        key = signature(tree)
        if key in tried:
            continue
        tried.add(key)
        place = write_tree(tmp_path / f"state{len(tried)}", tree)
        try:
            go_on(place, text, kept)
        except Exception as error:
            raise AssertionError(f"{name}: lost after {text}: {type(error).__name__}: {error}") from error
        shutil.rmtree(place)
    report(f"crash_orders_{name}", operations=len(done), crashes=total, states=len(tried), lost=0)
    return len(tried)


def names(done: list[Operation], operation: str, target: str) -> list[int]:
    "Positions of the operations that give a file its name."
    return [n for n, found in enumerate(done) if found.name == operation and found.target.endswith(target)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, list[Operation]]:
    "The folder of a run that nothing disturbed, and its operations."
    folder = tmp_path_factory.mktemp("undisturbed")
    with logged(folder) as done:
        run(TINY, 0, folder, echo=lambda history: None)
    return folder, done


def test_a_run_survives_every_crash(trained, tmp_path):
    expected, done = outcome(trained[0]), trained[1]
    assert len(names(done, "rename", "/checkpoint.safetensors")) == EPOCHS

    def go_on(place: Path, text: str, kept: list[Operation]) -> None:
        epochs = []
        run(TINY, 0, place, echo=epochs.append)
        assert outcome(place) == expected
        safe = len(names(kept, "rename", "/checkpoint.safetensors"))
        late = "without" in text and "checkpoint" in text.partition("without")[2]
        finished = bool(names(kept, "rename", "/record.json"))
        assert len(epochs) <= (0 if finished else EPOCHS - safe + late), f"trained {len(epochs)} epochs again"

    assert survive("run", {}, done, go_on, tmp_path) >= 20 * EPOCHS


@pytest.mark.parametrize("forgotten", ["contents", "names"])
def test_the_crashes_would_find_a_missing_fsync(trained, tmp_path, forgotten):
    "Without the fsync of contents files are empty; without that of names a checkpoint has no best weights."
    expected, done = outcome(trained[0]), trained[1]
    careless = [found for found in done
                if found.name != "fsync" or (found.content is None) == (forgotten == "contents")]

    def go_on(place: Path, text: str, kept: list[Operation]) -> None:
        run(TINY, 0, place, echo=lambda history: None)
        assert outcome(place) == expected

    with pytest.raises(AssertionError, match="lost after") as found:
        survive("careless", {}, careless, go_on, tmp_path)
    assert " without " in str(found.value)


def small_plan(runs: Path, seeds: list[int]) -> dict:
    "The plan of a study of the tiny experiment, as `thesis-ltc study` leaves it."
    identifier = seed_folder(runs).parent.name
    cell = {"id": identifier, "seeds": seeds, "threads": 1, "device": "cpu", "head": "fc", "varied": {}}
    files.write_json(runs / "small.plan.json", {
        "study": "small", "question": "?", "hypothesis": "?", "margin": 0.01, "primary": ["fc", "fc"],
        "secondary": [], "budget": "", "data": "digits", "fixed": {}, "vary": {}, "trunk": None,
        "overrides": {}, "data_hashes": [], "runs": str(runs), "python": "python", "cells": [cell]})
    (plan,) = load_plans(runs)
    return plan


def test_publishing_survives_every_crash(tmp_path):
    "A reader finds the old shelf, the new one, or is told; publishing again gives the new one, answers kept."
    runs, results = tmp_path / "runs", tmp_path / "results"
    runs.mkdir()
    for seed in (0, 1):
        run(TINY, seed, runs, echo=lambda history: None)
    publish(small_plan(runs, [0]), results)
    files.write_json(results / "other" / "note.json", {})
    old = read_tree(results)
    plan = small_plan(runs, [0, 1])
    with logged(results) as done:
        publish(plan, results)
    new = read_tree(results)
    assert old != new

    def go_on(place: Path, text: str, kept: list[Operation]) -> None:
        try:
            (shelf,) = find_shelves(place)
            seen = {f"small/{path.name}": path.read_bytes() for path in shelf.folder.iterdir()}
            assert any(seen.items() <= tree.items() and len(seen) == len(list((results / "small").iterdir()))
                       for tree in (old, new))
        except ValueError as error:
            assert ".small.old" in str(error) and "publish small" in str(error), error
        publish(plan, place)
        assert read_tree(place) == new

    assert survive("shelf", old, done, go_on, tmp_path) >= 20


def test_answers_of_confirm_survive_every_crash_of_publishing(tmp_path):
    runs, results = tmp_path / "runs", tmp_path / "results"
    runs.mkdir()
    run(TINY, 0, runs, echo=lambda history: None)
    plan = small_plan(runs, [0])
    publish(plan, results)
    answers = {plan["cells"][0]["id"]: {"state": "same", "explanation": ""}}
    files.write_json(results / "small" / "replays.json", {"experiments": answers})
    old = read_tree(results)
    with logged(results) as done:
        publish(plan, results)

    def go_on(place: Path, text: str, kept: list[Operation]) -> None:
        publish(plan, place)
        assert Shelf(place / "small").replays == answers

    survive("answers", old, done, go_on, tmp_path)


def digits(rows: int) -> ImageSet:
    return load("digits").limited(rows)


def test_a_cached_set_survives_every_crash(tmp_path, monkeypatch):
    few = digits(5)
    monkeypatch.setenv("THESIS_LTC_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    make = lambda: cached("few", ["few"], lambda: few)
    with logged(tmp_path / "cache") as done:
        expected = make().digest

    def go_on(place: Path, text: str, kept: list[Operation]) -> None:
        monkeypatch.setenv("THESIS_LTC_CACHE", str(place))
        assert make().digest == expected == make().digest
        assert not list(place.glob("imagesets/.*.tmp")) and len(list(place.glob("imagesets/few-*/*"))) == 4

    assert survive("cached_set", {}, done, go_on, tmp_path) >= 5


def test_a_saved_set_is_replaced_or_kept(tmp_path):
    "Whatever the crash, the old set or the new one is there whole; loading gives one or names the folder."
    sets = {"old": digits(3), "new": digits(4)}
    digests = {data.digest for data in sets.values()}
    home = tmp_path / "home"
    sets["old"].save(home / "mine")
    before = read_tree(home)
    with logged(home) as done:
        sets["new"].save(home / "mine")

    def go_on(place: Path, text: str, kept: list[Operation]) -> None:
        try:
            assert ImageSet.load(place / "mine").digest in digests
        except DamagedError as error:
            assert str(place / "mine") in str(error)
            assert ImageSet.load(place / ".mine.old").digest == sets["old"].digest
        sets["new"].save(place / "mine")
        assert ImageSet.load(place / "mine").digest == sets["new"].digest

    assert survive("saved_set", before, done, go_on, tmp_path) >= 10


@pytest.mark.parametrize("choose", [False, True])
def test_a_pack_is_replaced_or_kept(tmp_path, choose):
    few = digits(4 if SOAK else 2)
    home = tmp_path / "home"

    def pack(place: Path, licence: str) -> None:
        entries = list(set_entries(few, published=False))
        with Packer(place / "few.zip", sorted({entry.label for entry in entries}), licence, True) as packer:
            packer.add(entries)
            if choose:
                packer.choose([True] * len(entries))

    pack(home, "old")
    before = read_tree(home)
    with logged(home) as done:
        pack(home, "new")

    def go_on(place: Path, text: str, kept: list[Operation]) -> None:
        found = read_pack(place / "few.zip", "few")
        assert found.licence in ("old", "new")
        np.testing.assert_array_equal(found.images, few.images)
        pack(place, "new")
        assert (place / "few.zip").read_bytes() == (home / "few.zip").read_bytes()

    survive(f"pack{'_of_chosen' * choose}", before, done, go_on, tmp_path)


def test_maps_of_a_trunk_survive_every_crash(tmp_path):
    import torch

    home = tmp_path / "home"
    home.mkdir()
    maps_of = lambda index, rows: torch.from_numpy(rows + (index or 0)).float()[:, None, None, None]
    make = lambda part: write_maps(part, 70, 2, 30, maps_of)
    with logged(home) as done:
        folder = cached_folder(home / "features", {"trunk": "a"}, make)
    arrays = {name: (folder / name).read_bytes() for name in ("plain.npy", "passes.npy")}

    def go_on(place: Path, text: str, kept: list[Operation]) -> None:
        again = cached_folder(place / "features", {"trunk": "a"}, make)
        assert {name: (again / name).read_bytes() for name in arrays} == arrays
        assert files.read_json(again / "features.json")["hash"]

    assert survive("maps", {}, done, go_on, tmp_path) >= 10
