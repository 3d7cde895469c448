"""Splits to the image: published experiments are named by them, so no draw may ever change."""
import itertools
import math

import numpy as np
import pytest
import torch

from thesis_ltc.core.streams import generator
from thesis_ltc.data.imageset import SPLITS
from thesis_ltc.data.splits import (
    MOST_DIVISIONS,
    SHARES,
    SplitError,
    best_division,
    by_fold,
    by_patient,
    by_slice,
    check_lengths,
    check_shares,
    count_images,
    deal,
    deal_complete,
    dealings,
    has_all_classes,
    need,
    order_of_patients,
    strata,
)

CLASSES = np.array([0, 1, 1, 0, 1, 0, 0, 1, 0, 1, 0, 0, 1, 0, 1, 1, 0, 1, 0, 0, 1, 1, 0, 1])
PATIENTS = np.array(list("aaaabbbccddeefgghhhhijkl"))
PLACES = np.array(["xy"["aceg".find(patient) < 0] for patient in PATIENTS])
FEW_COUNTS = [(68, 80), (65, 68), (138, 30), (116, 15), (154, 0), (167, 0)]   # images of either class
FEW = np.repeat(np.arange(6), np.sum(FEW_COUNTS, axis=1))
FEW_CLASSES = np.repeat([0, 1] * 6, np.ravel(FEW_COUNTS))


def letters(split):
    "A split as a word: t, v and e for train, val and test."
    return "".join({"train": "t", "val": "v", "test": "e"}[part] for part in split)


def test_drawn_splits_never_change():
    "An experiment is named by the digest of its split: one other letter, and its records belong to nothing."
    assert letters(by_patient(CLASSES, PATIENTS)) == "vvvvttttteeeettttttttvvt"
    assert letters(by_patient(CLASSES, PATIENTS, 1)) == "ttttttttttteeevvvvvvttte"
    assert letters(by_patient(CLASSES, PATIENTS, sources=PLACES)) == "ttttvvveeeevvttttttttttt"
    assert letters(by_slice(CLASSES)) == "tvtvvtttttvveevtttttteet"
    assert letters(by_slice(CLASSES, 2, (0.5, 0.25, 0.25))) == "tteettvtttttveeveevtvtvt"
    assert letters(by_fold(CLASSES, PATIENTS, 3, 0)) == "eeeeeeevvvvtttttttttettt"
    assert letters(by_fold(CLASSES, PATIENTS, 3, 2, 1)) == "tttteeeeetteetttvvvvettv"
    assert letters(by_fold(CLASSES, PATIENTS, 3, 1, 4, PLACES)) == "ttttvvvvveeeeeeettttttee"


@pytest.mark.parametrize("sum_of_shares, accepted", [
    (1 + 0.9e-9, True), (1 - 0.9e-9, True), (1 + 1.1e-9, False), (1 - 1.1e-9, False)])
def test_shares_add_up_to_one_within_1e_9(sum_of_shares, accepted):
    shares = (0.5, 0.25, sum_of_shares - 0.75)
    if accepted:
        check_shares(shares)
    else:
        with pytest.raises(SplitError, match="expected three positive numbers"):
            check_shares(shares)


@pytest.mark.parametrize("shares", [
    (0.5, 0.5), (0.5, 0.25, 0.125, 0.125), (0.5, 0.5, 0.0), (1.0, 0.5, -0.5), ()])
def test_shares_are_three_positive_numbers(shares):
    with pytest.raises(SplitError, match="expected three positive numbers"):
        check_shares(shares)


def test_the_report_s_shares():
    assert SHARES == (2014 / 3100, 620 / 3100, 466 / 3100)
    check_shares(SHARES)


@pytest.mark.parametrize("sizes, message", [
    ((0, 0, None), "got 0 labels and 0 patients;"), ((2, 3, None), "got 2 labels and 3 patients;"),
    ((2, 2, 3), "got 2 labels and 2 patients and 3 sources;"),
    ((2, 3, 2), "got 2 labels and 3 patients and 2 sources;")])
def test_arrays_describe_the_same_images(sizes, message):
    with pytest.raises(SplitError, match=message):
        check_lengths(*(None if size is None else np.zeros(size) for size in sizes))


def test_one_image_is_enough_to_check():
    check_lengths(np.zeros(1), np.zeros(1), None)
    check_lengths(np.zeros(1), np.zeros(1), np.zeros(1))


def test_images_are_counted_by_patient_and_class():
    table, patient_of = count_images(CLASSES, PATIENTS)
    for row, patient in enumerate(sorted(set(PATIENTS))):
        assert (patient_of[PATIENTS == patient] == row).all()
        assert table[row].tolist() == [np.sum((PATIENTS == patient) & (CLASSES == label)) for label in (0, 1)]


@pytest.mark.parametrize("counts, received, target, expected", [
    ([3], [0], [5.0], 3.0), ([3], [5], [5.0], 0.0), ([3], [10], [5.0], -3.0),
    ([1, 2], [1, 1], [2.0, 4.0], 0.5 + 1.5)])
def test_need_is_what_is_missing_of_each_class(counts, received, target, expected):
    assert need(counts, received, target) == expected


def test_patients_come_by_size_and_at_random_among_equals():
    sizes = np.random.default_rng(0).integers(1, 40, 200)
    order = order_of_patients(sizes, generator(7, "order"))
    drawn = torch.randperm(200, generator=generator(7, "order")).tolist()
    expected = sorted(drawn, key=lambda row: -math.floor(math.log2(sizes[row])))   # sorting is stable
    assert order.tolist() == expected


def test_a_patient_goes_where_the_need_is_largest():
    "The rule, written once more in other words, for patients of all sizes."
    rng = np.random.default_rng(1)
    patients = np.repeat(np.arange(40), rng.integers(1, 20, 40))
    labels = rng.integers(0, 3, len(patients))
    totals = np.bincount(labels)
    sizes = np.bincount(patients)
    has = np.zeros((3, 3))
    expected = {}
    for patient in order_of_patients(sizes, generator(2, "deal")):
        images = np.bincount(labels[patients == patient], minlength=3)
        missing = 1 - has / np.outer(SHARES, totals)
        needs = missing @ images
        expected[patient] = int(np.argmax(needs))
        has[expected[patient]] += images
    found = deal(labels, patients, SHARES, generator(2, "deal"))
    assert found.tolist() == [expected[patient] for patient in patients]


def test_of_equal_needs_the_first_part_wins():
    assert deal(np.zeros(1), np.zeros(1), (0.2, 0.5, 0.3), generator(0, "deal")).tolist() == [0]
    assert sorted(deal(np.arange(4), np.arange(4), (0.5, 0.5), generator(0, "deal"))) == [0, 0, 0, 0]


def test_strata_tell_every_pair_of_class_and_source_apart():
    labels, sources = np.array([1, 0, 1, 1, 0, 2]), np.array(list("babbab"))
    found = strata(labels, sources)
    pairs = list(zip(labels.tolist(), sources.tolist(), strict=True))
    assert found.tolist() == [sorted(set(pairs)).index(pair) for pair in pairs]


@pytest.mark.parametrize("part_of, complete", [
    ([0, 0, 1, 1], True), ([0, 1, 1, 0], True), ([0, 0, 0, 1], False), ([0, 0, 2, 2], True)])
def test_complete_means_every_class_in_every_part(part_of, complete):
    labels = np.array([0, 1, 0, 1])
    assert has_all_classes(np.array(part_of), labels, 2) is (complete and len(set(part_of)) == 2)
    assert not has_all_classes(np.array(part_of), labels, 3)


def test_a_hundred_dealings_of_each_kind_from_different_streams():
    with_sources = list(dealings(CLASSES, PATIENTS, SHARES, PLACES, (4, "s")))
    without = list(dealings(CLASSES, PATIENTS, SHARES, None, (4, "s")))
    streams = [(4, "s"), *((4, "s", attempt) for attempt in range(1, 100))]
    both = strata(CLASSES, PLACES)
    for kind, found in ((both, with_sources[:100]), (CLASSES, with_sources[100:]), (CLASSES, without)):
        expected = [deal(kind, PATIENTS, SHARES, generator(*stream)).tolist() for stream in streams]
        assert [part_of.tolist() for part_of in found] == expected


@pytest.mark.parametrize("seed", range(5))
def test_the_best_division_is_the_nearest_of_all(seed):
    rng = np.random.default_rng(seed)
    patients = np.repeat(np.arange(5), rng.integers(2, 9, 5))
    labels = rng.integers(0, 2, len(patients))

    def distance(part_of):
        fractions = np.array([[np.mean(part_of[labels == k] == part) for k in (0, 1)] for part in range(3)])
        return np.sum((fractions.T - SHARES) ** 2) if (fractions > 0).all() else math.inf

    every = [distance(np.array(division)[patients]) for division in itertools.product(range(3), repeat=5)]
    found = best_division(labels, patients, SHARES)
    assert distance(found) == pytest.approx(min(every), abs=1e-12) and min(every) < math.inf


def test_nine_patients_are_searched_and_ten_are_not():
    assert MOST_DIVISIONS == 3**9
    for patients, searched in ((9, True), (10, False)):
        part_of = best_division(np.zeros(patients, int), np.arange(patients), SHARES)
        assert (part_of is not None) is searched


def test_what_cannot_be_complete_has_no_best_division():
    assert best_division(np.array([0, 0, 1]), np.arange(3), (0.5, 0.5)) is None


def test_the_first_complete_dealing_is_taken():
    later = 0
    for seed in range(20):
        every = list(dealings(FEW_CLASSES, FEW, SHARES, None, (seed, "x")))
        complete = [has_all_classes(part_of, FEW_CLASSES, 3) for part_of in every]
        found = deal_complete(FEW_CLASSES, FEW, SHARES, None, seed, "x")
        assert found.tolist() == every[complete.index(True)].tolist()
        later += not complete[0]
    assert later > 5


def test_a_division_is_searched_where_no_dealing_is_complete():
    counts = np.array([(2, 4), (1, 1), (4, 4), (0, 4)])   # of class 0 and 1, of four patients
    labels, patients = np.repeat([0, 1] * 4, counts.ravel()), np.repeat(np.arange(4), counts.sum(1))
    every = dealings(labels, patients, SHARES, None, (0, "x"))
    assert not any(has_all_classes(part_of, labels, 3) for part_of in every)
    found = deal_complete(labels, patients, SHARES, None, 0, "x")
    assert found.tolist() == np.repeat([1, 2, 0, 0], counts.sum(1)).tolist()


def test_the_first_dealing_stands_where_nothing_is_complete():
    labels, patients = np.repeat([0, 1], [9, 4]), np.arange(13)
    patients[9:] = 9   # one patient has all images of class 1
    found = deal_complete(labels, patients, SHARES, None, 5, "x")
    assert found.tolist() == deal(labels, patients, SHARES, generator(5, "x")).tolist()


def test_folds_are_equal_and_the_rest_is_divided_in_the_report_s_ratio():
    labels, patients = np.repeat([0, 1], 2634), np.arange(2 * 2634)
    for fold in range(2):
        split = by_fold(labels, patients, 2, fold)
        for label in (0, 1):
            among = split[labels == label]
            assert [int(np.sum(among == part)) for part in SPLITS] == [1007, 310, 1317]


def test_folds_draw_from_streams_named_by_repeat_number_and_fold():
    tested = deal(CLASSES, PATIENTS, [1 / 3] * 3, generator(2, "folds", 3)) == 1
    split = by_fold(CLASSES, PATIENTS, 3, 1, 2)
    assert ((split == "test") == tested).all()
    ratio = SHARES[0] / (SHARES[0] + SHARES[1])
    rest = deal(CLASSES[~tested], PATIENTS[~tested], (ratio, 1 - ratio), generator(2, "folds", 3, 1))
    assert (split[~tested] == np.array(["train", "val"])[rest]).all()


@pytest.mark.parametrize("folds, fold", [
    (1, 0), (0, 0), (3, 3), (3, -1), (3.0, 0), (3, 0.0), (True, 0), (2, True)])
def test_a_fold_is_one_of_two_or_more(folds, fold):
    with pytest.raises(SplitError, match="expected two or more folds"):
        by_fold(CLASSES, PATIENTS, folds, fold)


def test_there_are_as_many_patients_as_folds():
    patients = np.array([0, 0, 1, 1, 2, 2])
    labels = np.array([0, 1] * 3)
    assert letters(by_fold(labels, patients, 3, 2)).count("e") == 2
    with pytest.raises(SplitError, match="4 folds of 3 patients; expected as many"):
        by_fold(labels, patients, 4, 0)


@pytest.mark.parametrize("split, arguments, message", [
    (by_patient, ([0, 0, 1, 1], [0, 1, 2, 3]), "test gets no image of class 0: these 4 patients"),
    (by_fold, ([0, 1], [0, 1], 2, 0), "train gets no image of class 0: these 2 patients"),
    (by_fold, ([0, 1], [0, 1], 2, 1), "val gets no image of class 0"),
    (by_patient, ([0, 0, 0, 1, 1], [0, 1, 2, 0, 1]), "test gets no image of class 1"),
    (by_patient, ([0, 0], [0, 1], 0, (0.9, 0.2, 0.1)), "expected three positive numbers"),
    (by_patient, ([0, 0], [0, 1, 2]), "got 2 labels and 3 patients"),
    (by_fold, ([0, 0], [0, 1, 2], 2, 0), "got 2 labels and 3 patients")])
def test_what_cannot_be_split_is_refused(split, arguments, message):
    labels, patients, *others = arguments
    with pytest.raises(SplitError, match=message):
        split(np.array(labels), np.array(patients), *others)
