"""What is done to a disk that may crash or fail: runs, publications, cached sets, saved ones, packs, maps."""
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from disk import SOAK, Operation, Tree, outcome, read_tree, seed_folder

from thesis_ltc.core import files
from thesis_ltc.data import load
from thesis_ltc.data.imageset import DamagedError, ImageSet
from thesis_ltc.data.packs import Packer, read_pack, set_entries
from thesis_ltc.data.sources import cached
from thesis_ltc.study import Experiment, run
from thesis_ltc.study.plan import load_plans
from thesis_ltc.study.shelf import Shelf, find_shelves, publish
from thesis_ltc.training import loop
from thesis_ltc.training.trunk import cached_folder, write_maps

EPOCHS = 5 if SOAK else 3
TINY = Experiment(data="digits", backbone="none", head="fc", image_size=28, limit=10, batch_size=10,
                  epochs=EPOCHS, threads=1, precision="float32")


@dataclass(frozen=True)
class Scenario:
    "An action in a folder, and what must hold whatever became of it."

    before: Tree                                            # the folder
    act: Callable[[Path], object]
    go_on: Callable[[Path, str, list[Operation]], None]     # raises an error if something is lost


def without_echo(place: Path, seed: int = 0, every: int = 1) -> None:
    "A run with a checkpoint after every so many epochs, and after the last."
    with patch.object(loop, "is_due", lambda trainings: (len(trainings[0].history) + 1) % every == 0):
        run(TINY, seed, place, echo=lambda history: None)


def named(done: list[Operation], target: str) -> int:
    "How often a file got its name."
    return sum(found.name == "rename" and found.target.endswith(target) for found in done)


def training(home: Path, every: int = 1) -> Scenario:
    "The same bits; no epoch is trained again but those whose checkpoint was lost, and none after the record."
    without_echo(home / "undisturbed")
    expected = outcome(home / "undisturbed")

    def go_on(place: Path, lost: str, kept: list[Operation]) -> None:
        trained = []
        run(TINY, 0, place, echo=trained.append)
        assert outcome(place) == expected
        checkpoints = named(kept, "/checkpoint.safetensors") - ("checkpoint" in lost)
        left = EPOCHS - min(EPOCHS, every * checkpoints)
        left = 0 if named(kept, "/record.json") else left
        assert len(trained) <= left, f"{len(trained)} epochs were trained, where {left} were left"

    return Scenario({}, lambda place: without_echo(place, every=every), go_on)


def training_with_few_checkpoints(home: Path) -> Scenario:
    "As `training`, with a checkpoint every second epoch."
    return training(home, every=2)


def plan_of(runs: Path, seeds: list[int]) -> dict:
    "The plan of a study of the tiny experiment, as `thesis-ltc study` leaves it."
    cell = {"id": seed_folder(runs).parent.name, "seeds": seeds, "threads": 1, "device": "cpu", "head": "fc",
            "data": "digits", "varied": {}, "adjusted": {}}
    place = f"{cell['id']}/seed"
    job = {"name": cell["id"], "experiments": [cell["id"]], "needs": [], "threads": 1, "device": "cpu",
           "files": [f"{place}{seed}/record.json" for seed in seeds], "is_published": False}
    files.write_json(runs / "small.plan.json", {
        "study": "small", "question": "?", "hypothesis": "?", "margin": 0.01, "primary": ["fc", "fc"],
        "secondary": [], "budget": "", "data": "digits", "fixed": {}, "vary": {}, "trunks": [],
        "overrides": {}, "data_hashes": [], "runs": str(runs), "python": "python", "cells": [cell],
        "jobs": [job]})
    (plan,) = load_plans(runs)
    return plan


def publishing(home: Path) -> Scenario:
    "A reader finds the old shelf, the new one, or is told; publishing again gives the new one, answers kept."
    runs, results = home / "runs", home / "results"
    for seed in (0, 1):
        without_echo(runs, seed)
    plan = plan_of(runs, [0])
    publish(plan, results)
    files.write_json(results / "small" / "replays.json", {"experiments": {}})
    before, plan = read_tree(results), plan_of(runs, [0, 1])
    publish(plan, results)
    after = read_tree(results)
    assert before != after

    def go_on(place: Path, lost: str, kept: list[Operation]) -> None:
        try:
            (shelf,) = find_shelves(place)
            found = {f"small/{name}": content for name, content in read_tree(shelf.folder).items()}
            assert found | {"small": None} in (before, after)
        except ValueError as error:
            assert ".small.old" in str(error) and "publish small" in str(error), error
        publish(plan, place)
        assert read_tree(place) == after

    return Scenario(before, lambda place: publish(plan, place), go_on)


def publishing_again(home: Path) -> Scenario:
    "The answers of `thesis-ltc confirm` stay."
    runs, results = home / "runs", home / "results"
    without_echo(runs)
    plan = plan_of(runs, [0])
    publish(plan, results)
    answers = {plan["cells"][0]["id"]: {"state": "same", "explanation": ""}}
    files.write_json(results / "small" / "replays.json", {"experiments": answers})

    def go_on(place: Path, lost: str, kept: list[Operation]) -> None:
        publish(plan, place)
        assert Shelf(place / "small").replays == answers

    return Scenario(read_tree(results), lambda place: publish(plan, place), go_on)


def digits(rows: int) -> ImageSet:
    return load("digits").limited(rows)


def caching(home: Path) -> Scenario:
    "A cached set is whole, or made again; nothing else stays in the cache."
    few = digits(5)

    def make(place: Path) -> ImageSet:
        with patch.dict(os.environ, THESIS_LTC_CACHE=str(place)):
            return cached("few", ["few"], lambda: few)

    def go_on(place: Path, lost: str, kept: list[Operation]) -> None:
        assert make(place).digest == few.digest == make(place).digest
        assert not list(place.glob("imagesets/.*.tmp")) and len(list(place.glob("imagesets/few-*/*"))) == 4

    make(home / "warm")
    return Scenario({}, make, go_on)


def saving(home: Path) -> Scenario:
    "The old set or the new one is there whole; loading gives one of them, or names the folder."
    old, new = digits(3), digits(4)
    old.save(home / "mine")
    before = read_tree(home)

    def go_on(place: Path, lost: str, kept: list[Operation]) -> None:
        try:
            assert ImageSet.load(place / "mine").digest in (old.digest, new.digest)
        except DamagedError as error:
            assert str(place / "mine") in str(error)
            assert ImageSet.load(place / ".mine.old").digest == old.digest
        new.save(place / "mine")
        assert ImageSet.load(place / "mine").digest == new.digest

    return Scenario(before, lambda place: new.save(place / "mine"), go_on)


def packing(home: Path, choose: bool = False) -> Scenario:
    "The old pack or the new one is there whole."
    few = digits(4 if SOAK else 2)
    entries = list(set_entries(few, published=False))

    def pack(place: Path, licence: str = "new") -> None:
        with Packer(place / "few.zip", sorted({entry.label for entry in entries}), licence, True) as packer:
            packer.add(entries)
            if choose:
                packer.choose([True] * len(entries))

    def go_on(place: Path, lost: str, kept: list[Operation]) -> None:
        found = read_pack(place / "few.zip", "few")
        assert found.licence in ("old", "new")
        np.testing.assert_array_equal(found.images, few.images)
        pack(place)
        assert read_pack(place / "few.zip", "few").licence == "new"

    pack(home, "old")
    return Scenario(read_tree(home), pack, go_on)


def choosing(home: Path) -> Scenario:
    "As `packing`, where images are left out of the archive that is being written."
    return packing(home, choose=True)


def keeping_maps(home: Path) -> Scenario:
    "Maps of a trunk are whole, or made again."
    maps_of = lambda index, rows: torch.from_numpy(rows + (index or 0)).float()[:, None, None, None]

    def make(place: Path) -> dict[str, bytes | None]:
        folder = cached_folder(place, {"trunk": "a"}, lambda part: write_maps(part, 70, 2, 30, maps_of))
        return {name: (folder / name).read_bytes() for name in ("plain.npy", "passes.npy")}

    expected = make(home)

    def go_on(place: Path, lost: str, kept: list[Operation]) -> None:
        assert make(place) == expected

    return Scenario({}, make, go_on)


SCENARIOS = (training, training_with_few_checkpoints, publishing, publishing_again, caching, saving, packing,
             choosing, keeping_maps)
