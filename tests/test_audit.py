"""Duplicates, their cache, and audits: with changed limits, on real sets, and as files saved before."""
import importlib
import inspect
import json
import os
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from thesis_ltc.core.files import read_yaml
from thesis_ltc.data import audit, blind, duplicates, shortcuts
from thesis_ltc.data.imageset import ImageSet
from thesis_ltc.data.sources import COVID_CT_PAIRS, load

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("THESIS_LTC_DATA") or "/nowhere")
LIMITS = {
    "MAX_HASH_DISTANCE": 9, "MIN_CORRELATION": 0.81, "MAX_CANDIDATES": 299_999, "MAX_SHIFT": 3, "BLUR": 2.5,
    "ZOOMS": np.linspace(0.9, 1.1, 9)}


@pytest.fixture
def textures():
    "Six images of six patients; the last is the first, shifted."
    images = np.random.default_rng(2).integers(0, 256, (6, 1, 24, 24), np.uint8)
    images = images.repeat(4, axis=2).repeat(4, axis=3)
    images[5] = np.roll(images[0], 3, 1)
    return ImageSet(
        name="textures", images=images, labels=np.arange(6) % 2, patients=np.arange(6).astype(str),
        sources=["one"] * 6, names=np.arange(6).astype(str), split=["train"] * 6, classes=["well", "ill"],
        licence="made up", publishable=True)


@pytest.fixture(autouse=True)
def fresh_probe():
    "No digest of the probe remains from another test."
    duplicates.probe_digest.cache_clear()
    yield
    duplicates.probe_digest.cache_clear()


def test_the_cache_key_is_the_same_in_reworded_code(textures):
    key = duplicates.cache_key(textures)
    source = inspect.getsource(duplicates)
    reworded = re.sub(r'^( +)"([A-Z])', r'\1"Reworded. \2', source, flags=re.MULTILINE) + "\n# a comment\n"
    module = {"__name__": "thesis_ltc.data.reworded", "__package__": "thesis_ltc.data"}
    exec(compile(reworded, "reworded.py", "exec"), module)
    assert reworded != source and module["find_pairs"].__doc__.startswith("Reworded")
    assert module["cache_key"](textures) == key


@pytest.mark.parametrize("name", LIMITS)
def test_another_limit_has_another_cache_key(textures, monkeypatch, name):
    key = duplicates.cache_key(textures)
    monkeypatch.setattr(duplicates, name, LIMITS[name])
    assert duplicates.cache_key(textures) != key


CHANGES = {
    "perceptual_hashes": lambda thumbnails: np.zeros(len(thumbnails), np.uint64),
    "fine_structure": lambda images: images,
    "magnify": lambda images, factor: images,
    "exact_pairs": lambda images: [],
    "fine_correlations": lambda images, others, pairs: np.ones(len(pairs), np.float32),
    "candidate_pairs": lambda thumbnails, patients, mirrored: np.zeros((0, 2), int),
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_behaviour_has_another_cache_key(textures, monkeypatch, name):
    key = duplicates.cache_key(textures)
    monkeypatch.setattr(duplicates, name, CHANGES[name])
    duplicates.probe_digest.cache_clear()   # as in a new process
    assert duplicates.cache_key(textures) != key


def reached(function) -> set[str]:
    "Names of the functions of this package that a function calls, directly or not."
    found, waiting = {}, [function]
    while waiting:
        one = inspect.unwrap(waiting.pop())
        if inspect.isfunction(one) and one.__module__.startswith("thesis_ltc.") and one not in found.values():
            found[f"{one.__module__}.{one.__name__}"] = one
            names = re.findall(r"(?<![.\w])\w+", inspect.getsource(one))
            waiting += [one.__globals__.get(name) for name in names]
    return set(found)


REACHED = sorted(reached(duplicates.find_pairs) | reached(duplicates.probe_images))


@pytest.mark.parametrize("place", REACHED)
def test_any_other_function_has_another_cache_key(textures, monkeypatch, place):
    "Although no result of the search may differ: here one more instruction is all."
    key = duplicates.cache_key(textures)
    name = place.rpartition(".")[2]
    original = getattr(importlib.import_module(place.rpartition(".")[0]), name)

    def other(*arguments):
        return original(*arguments)

    for module in {sys.modules[one.rpartition(".")[0]] for one in REACHED}:
        if getattr(module, name, None) is original:
            monkeypatch.setattr(module, name, other)
    assert duplicates.cache_key(textures) != key


def test_the_cache_key_depends_on_images_and_patients_but_not_on_the_split(textures):
    key = duplicates.cache_key(textures)
    split = np.array(["train", "val", "test"] * 2)
    assert duplicates.cache_key(textures.with_split(split, "patient")) == key
    assert duplicates.cache_key(textures.subset(np.arange(5))) != key
    pixels = textures.images.copy()
    pixels[0, 0, 0, 0] ^= 1
    assert duplicates.cache_key(replace(textures, images=pixels)) != key
    assert duplicates.cache_key(replace(textures, patients=["a", *textures.patients[1:]])) != key


def test_the_probe_is_computed_once_and_quickly(textures, monkeypatch):
    duplicates.cache_key(textures)   # imports SciPy
    duplicates.probe_digest.cache_clear()
    started = time.perf_counter()
    duplicates.cache_key(textures)
    assert time.perf_counter() - started < 1
    monkeypatch.setattr(duplicates, "compared_pairs", None)   # would raise if it was called
    duplicates.cache_key(textures)


def test_the_most_distant_candidates_are_left_out_with_a_warning(textures, monkeypatch):
    thumbnails = duplicates.downscale(textures.images, duplicates.HASH_SIDE)
    patients = np.arange(6)
    monkeypatch.setattr(duplicates, "MAX_HASH_DISTANCE", 64)
    everything = duplicates.candidate_pairs(thumbnails, patients, False)
    assert everything.tolist() == [[i, j] for i in range(6) for j in range(i + 1, 6)]
    hashes = duplicates.perceptual_hashes(thumbnails)
    distances = np.bitwise_count(hashes[everything[:, 0]] ^ hashes[everything[:, 1]])
    monkeypatch.setattr(duplicates, "MAX_CANDIDATES", 4)
    with pytest.warns(UserWarning, match=f"more than 4 candidate pairs.* up to {np.sort(distances)[3]} bits"):
        nearest = duplicates.candidate_pairs(thumbnails, patients, False)
    assert nearest.tolist() == everything[np.argsort(distances, kind="stable")[:4]].tolist()
    monkeypatch.setattr(duplicates, "MAX_CANDIDATES", len(everything))
    assert len(duplicates.candidate_pairs(thumbnails, patients, False)) == 15   # without a warning


def test_hashes_may_differ_in_ten_bits_and_no_more():
    distances = range(8, 13)
    ours = np.zeros(6, np.uint64)
    ours[1:] = [(1 << bits) - 1 for bits in distances]
    first, *_ = duplicates.hash_distances(ours, ours, np.arange(6))
    assert first.tolist() == [[8, 0, 1], [9, 0, 2], [10, 0, 3]]


def test_correlations_do_not_depend_on_the_batch(textures, monkeypatch):
    small = duplicates.downscale(textures.images, duplicates.FINE_SIDE)
    pairs = np.array([[0, 5], [1, 2], [3, 4], [0, 1], [2, 4]])
    whole = duplicates.fine_correlations(small, small, pairs)
    monkeypatch.setattr(duplicates, "BATCH", 2)
    np.testing.assert_allclose(duplicates.fine_correlations(small, small, pairs), whole, rtol=1e-5)
    assert whole.argmax() == 0 and whole[0] > duplicates.MIN_CORRELATION > whole[1:].max()


def test_a_shift_of_more_than_four_pixels_is_not_recognised():
    texture = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    shifted = np.stack([np.roll(texture, shift, 0) for shift in (0, 4, 5)])
    near, far = duplicates.fine_correlations(shifted, shifted, np.array([[0, 1], [0, 2]]))
    assert near > 0.99 and far < 0.5


@pytest.mark.parametrize("factor", [0.9, 0.95, 1.05, 1.1])
def test_magnified_pictures_are_recognised(factor):
    from scipy.ndimage import gaussian_filter

    noise = np.random.default_rng(0).normal(size=(2, 64, 64)).astype(np.float32)
    texture = gaussian_filter(noise, (0, 1.5, 1.5))
    other = duplicates.magnify(texture, 1 / factor)
    same, different = duplicates.fine_correlations(texture, other, np.array([[0, 0], [0, 1]]))
    assert same > 0.9 and different < 0.5


def test_blind_classifiers_are_trained_on_a_limited_number_of_images(textures, monkeypatch):
    seen = []
    monkeypatch.setattr(audit, "MAX_TRAINING_IMAGES", 4)
    monkeypatch.setattr(audit, "BLIND", {"number": lambda data, train, test: seen.append(train) or None})
    assert audit.blind_scores(textures, np.arange(6), np.arange(2)) == {"number": None}
    assert len(seen[0]) == 4 == len(set(seen[0].tolist())) and (np.diff(seen[0]) > 0).all()
    audit.blind_scores(textures, np.arange(4), np.arange(2))
    assert seen[1].tolist() == [0, 1, 2, 3]


def test_the_audits_that_the_book_shows_are_read_and_hold_no_pictures(tmp_path):
    paths = sorted((ROOT / "results" / "audits").glob("*.json"))
    audits = audit.load_audits(ROOT / "results" / "audits")
    assert len(audits) == len(paths) >= 1
    for path, found in zip(paths, audits, strict=True):
        assert path.stat().st_size < 20_000
        assert set(found.blind) == set(blind.BLIND) and found.lines()[0].startswith(f"{found.name}, split ")
        saved = audit.save_audit(found, tmp_path)
        assert saved.name == path.name and json.loads(saved.read_text()) == json.loads(path.read_text())


@pytest.mark.skipif(not (DATA / "covid-ct").is_dir(), reason="THESIS_LTC_DATA has no covid-ct")
def test_the_duplicates_of_covid_ct_are_those_that_are_listed():
    data = load("covid-ct")
    pairs = [[pair.first, pair.second] for pair in duplicates.duplicate_pairs(data)]
    assert {frozenset(data.names[rows].tolist()) for rows in pairs} == set(map(frozenset, COVID_CT_PAIRS))


@pytest.mark.skipif(not (DATA / "mosmed-midslice").is_dir(), reason="THESIS_LTC_DATA has no mosmed-midslice")
@pytest.mark.timeout(600)
def test_no_two_patients_of_mosmed_have_the_same_picture():
    data = load("mosmed-midslice")
    assert len(data) == 1063
    thumbnails = duplicates.downscale(data.images, duplicates.HASH_SIDE)
    assert len(duplicates.candidate_pairs(thumbnails, data.patients, False)) == 24_169
    assert duplicates.duplicate_pairs(data) == []


@pytest.mark.skipif(not (DATA / "zenodo20-crops").is_dir(), reason="THESIS_LTC_DATA has no zenodo20-crops")
@pytest.mark.timeout(600)
def test_the_reports_own_images_are_read_by_their_table_and_shortcuts_reach_the_known_scores():
    data = load("zenodo20-crops")
    assert data.classes == ("no lesion", "lesion") and np.bincount(data.labels).tolist() == [353, 1247]
    assert set(data.sources) == {"coronacases", "radiopaedia"} and not data.publishable
    assert len(set(data.patients)) == 18 and data.patients_known
    both = [patient for patient in set(data.patients) if len(set(data.labels[data.patients == patient])) == 2]
    assert sorted(patient.partition("_")[0] for patient in both) == ["coronacases"] * 5 + ["radiopaedia"] * 4
    sure = shortcuts.manifest_column(DATA / "zenodo20-crops", data, "label_sure") == "1"
    assert np.bincount(data.labels[sure]).tolist() == [309, 1204]
    rows = data.rows("test")
    found = {name: shortcuts.describe_scores(scores, data, rows)
             for name, scores in shortcuts.shortcut_scores(data, DATA / "zenodo20-crops").items()}
    assert round(found[shortcuts.MAJORITY].accuracy, 3) == 0.834
    crop, thumbnail = found["size and mode of the file"], found["thumbnail of 32 x 32 pixels"]
    assert abs(crop.accuracy - 0.875) < 0.005 and abs(crop.auc - 0.766) < 0.005
    assert abs(thumbnail.auc - 0.885) < 0.005 and len(thumbnail.by_patient) == 3


@pytest.mark.skipif(not (DATA / "zenodo20-crops").is_dir(), reason="THESIS_LTC_DATA has no zenodo20-crops")
@pytest.mark.timeout(600)
def test_both_kinds_of_split_train_on_as_many_of_the_reports_own_images():
    study = read_yaml(ROOT / "studies" / "report-images.yaml")
    fixed, vary = study["fixed"], study["vary"]
    draws = [{"split": split, "repeat": repeat, "fold": fold}
             for split in vary["split"] for repeat in vary["repeat"] for fold in vary["fold"]]
    for draw in draws:
        data = load("zenodo20-crops", **draw, folds=fixed["folds"], accept_leakage=True)
        used = data.limited(fixed["limit"])
        assert len(used.rows("train")) == fixed["limit"], draw
        assert len(used.rows("test")) == len(data.rows("test")), draw   # every image is tested
        assert bool(data.shared_patients()) == (draw["split"] == "slice")
