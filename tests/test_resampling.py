"Intervals of contrasts over splits, against other implementations and against theory."
import math
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from statsmodels.regression.mixed_linear_model import MixedLM
from statsmodels.tools.sm_exceptions import ConvergenceWarning
from torchmetrics.functional.classification import binary_auroc

from thesis_ltc.core.files import read_json
from thesis_ltc.study import power
from thesis_ltc.study.intervals import EQUAL
from thesis_ltc.study.power import (
    PLAUSIBLE,
    ct_shape,
    made_clusters,
    made_scores,
    main,
    shape_of,
    simulate_auc,
)
from thesis_ltc.study.ranking import from_accuracies
from thesis_ltc.study.reliability import fit_mixed
from thesis_ltc.study.resampling import (
    Cluster,
    clusters_of,
    crossed_bootstrap,
    estimate,
    patient_weights,
    primary_interval,
    resampled,
    variance_parts,
)


def one_split(patients=60, pictures=2, trunks=2, shift=0.0, ties=False, noise=0.6, seed=0):
    "Paired scores of trunks that share a split; each trunk's scores are the same but for its own noise."
    draw, patient = np.random.default_rng(seed), np.repeat(np.arange(patients), pictures)
    label, shared = patient % 2, draw.standard_normal(len(patient))
    tables = []
    for trunk in range(trunks):
        own = noise * draw.standard_normal((2, len(patient)))
        scores = shared + label + own + np.array([[shift], [0]]) * label
        scores = np.round(scores, 1) if ties else scores
        tables.append(pd.DataFrame({
            "unit": f"t{trunk}", "repeat": 0, "fold": 0, "seed": 0, "picture": np.arange(len(patient)),
            "patient": patient, "label": label, "first": scores[0], "second": scores[1]}))
    return pd.concat(tables, ignore_index=True)


@pytest.mark.parametrize("ties", [False, True])
def test_a_weighted_auc_is_that_of_repeated_pictures(ties):
    pairs = one_split(ties=ties)
    clusters, names = clusters_of(pairs)
    weights = patient_weights(len(names), 10)[:, names.get_indexer([str(k) for k in range(60)])]
    of_cluster = weights[:, [int(name) for name in names]]
    for cluster, (_, rows) in zip(clusters, pairs.groupby("unit"), strict=True):
        for weight, found in zip(weights, resampled(cluster, of_cluster), strict=True):
            again = rows.loc[rows.index.repeat(weight[rows.patient].astype(int))]
            target = torch.tensor(again.label.to_numpy())
            areas = [binary_auroc(torch.sigmoid(torch.tensor(again[head].to_numpy())), target).item()
                     for head in ("first", "second")]
            assert found == pytest.approx(areas[0] - areas[1], abs=1e-5)


def test_a_head_against_itself_has_an_interval_of_width_zero():
    pairs = one_split()
    same = primary_interval(pairs.assign(second=pairs["first"]))
    assert same.interval() == same.interval(0.90) == same.crossed == (0.0, 0.0)
    assert same.verdict(1e-6) == EQUAL and not same.is_different()


def test_a_shift_is_found_and_a_monotone_map_of_the_scores_changes_nothing():
    pairs = one_split(shift=1.2, trunks=6)
    found = primary_interval(pairs)
    assert found.verdict(0.02) == "better" and found.interval()[0] > 0.02
    mapped = primary_interval(pairs.assign(first=np.exp(pairs["first"]), second=3 * pairs.second - 7))
    assert mapped.mean == pytest.approx(found.mean) and mapped.error == pytest.approx(found.error)


def delong_variance(first, second, positive):
    "Variance of the difference of two AUCs on the same independent pictures (DeLong et al. 1988)."
    parts = []
    for scores in (first, second):
        above = (scores[positive][:, None] > scores[~positive]).astype(float)
        parts.append((above.mean(1), above.mean(0)))
    by_positive, by_negative = (parts[0][side] - parts[1][side] for side in (0, 1))
    return by_positive.var(ddof=1) / positive.sum() + by_negative.var(ddof=1) / (~positive).sum()


def test_the_part_of_the_patients_is_the_variance_of_delong_where_that_applies():
    pairs = one_split(patients=300, pictures=1, trunks=1)
    pairs = pd.concat([pairs, pairs.assign(unit="twin")])   # a twin: nothing varies between trunks
    found = primary_interval(pairs, draws=4000)
    run = pairs[pairs.unit == "twin"]
    expected = delong_variance(run["first"].to_numpy(), run.second.to_numpy(), run.label.to_numpy() == 1)
    assert found.parts["patients"] == pytest.approx(expected, rel=0.1)   # 4000 draws: 2.2 %
    assert found.parts["trunks"] == pytest.approx(0, abs=1e-12)


def test_pictures_of_a_patient_count_as_one_observation():
    single = one_split(patients=200, pictures=1, noise=0.5)
    copied = pd.concat([single, single.assign(picture=single.picture + 1000)])
    alone, doubled = primary_interval(single), primary_interval(copied)
    assert doubled.mean == pytest.approx(alone.mean) and doubled.error == pytest.approx(alone.error, rel=1e-4)


def test_the_crossed_bootstrap_is_conservative_for_noise_by_patient_and_trunk():
    draw = np.random.default_rng(5)
    patients, trunks = 100, 40
    noise = draw.standard_normal((trunks, patients)).astype(np.float32)
    clusters = [Cluster(row, np.arange(patients), None, 1, 1) for row in noise]
    _, parts, drawn = variance_parts(clusters, patient_weights(patients, 3000), 0.0)
    crossed = crossed_bootstrap(drawn, np.full(trunks, 1 / trunks)).var()
    true = 1 / (patients * trunks)
    assert crossed == pytest.approx(3 * true, rel=0.3)     # Owen and Eckles 2012: three times
    assert parts["patients"] == pytest.approx(true, rel=0.4)
    assert parts["trunks"] == pytest.approx(true, rel=0.4)


def test_equal_within_the_margin_is_two_one_sided_tests_at_five_percent():
    found = primary_interval(one_split(trunks=8, patients=200))
    p_values = [stats.t.sf((0.05 + sign * found.mean) / found.error, found.freedom) for sign in (1, -1)]
    assert (found.verdict(0.05) == EQUAL) == (max(p_values) < 0.05)
    limit = abs(found.mean) + stats.t.ppf(0.95, found.freedom) * found.error
    assert found.verdict(limit * 1.001) == EQUAL != found.verdict(limit * 0.999)


def test_overlapping_training_sets_widen_the_interval_and_one_split_does_not():
    draw = np.random.default_rng(0)
    clusters = [Cluster(np.full(50, value, np.float32), np.arange(50), None, 1, 1)
                for value in draw.standard_normal(20)]
    weights = patient_weights(50, 50)
    plain, corrected = (estimate(clusters, weights, ratio) for ratio in (0.0, 0.25))
    assert corrected.error / plain.error == pytest.approx(math.sqrt(1 + 20 * 0.25), rel=1e-4)


def test_published_accuracies_give_the_published_probabilities_of_a_false_claim():
    low, high = (from_accuracies(0.9607, 0.9576, congruence, 930) for congruence in (0.95, 0.92))
    assert round(low, 2) == 0.25 and round(high, 2) == 0.37


def dense_deviance(relative, cells):
    "Minus twice the restricted log likelihood from the whole covariance matrix, up to the same constant."
    patient, unit, gain = (cells[name].to_numpy() for name in ("patient", "unit", "gain"))
    covariance = np.eye(len(gain))
    for share, code in zip(relative, (patient, unit), strict=True):
        covariance += share**2 * (code[:, None] == code)
    inverse = np.linalg.inv(covariance)
    mean = inverse.sum(0) @ gain / inverse.sum()
    scale = (gain - mean) @ inverse @ (gain - mean) / (len(gain) - 1)
    determinants = np.linalg.slogdet(covariance)[1] + math.log(inverse.sum())
    return (len(gain) - 1) * math.log(scale) + determinants, mean


def test_the_mixed_model_is_the_best_by_the_dense_likelihood_of_an_unbalanced_table():
    draw = np.random.default_rng(2)
    places = [(patient, trunk) for patient in range(40) for trunk in range(9) if (patient + trunk) % 3]
    cells = pd.DataFrame(places, columns=["patient", "unit"])
    cells["gain"] = (0.2 + 0.6 * draw.standard_normal(40)[cells.patient]
                     + 0.4 * draw.standard_normal(9)[cells.unit] + draw.standard_normal(len(cells)))
    found = fit_mixed(cells)
    best = np.sqrt([found.patient / found.rest, found.trunk / found.rest])
    lowest, mean = dense_deviance(best, cells)
    assert found.mean == pytest.approx(mean)
    for step in ((0.03, 0), (-0.03, 0), (0, 0.03), (0, -0.03)):
        assert dense_deviance(best + step, cells)[0] > lowest


def crossed_cells(patients, folds, repeats, kinds, deviations, seed=0):
    "Cells of a repeated cross-validation with given standard deviations of patient, trunk and rest."
    draw, tables = np.random.default_rng(seed), []
    of_patient = deviations[0] * draw.standard_normal(patients)
    for repeat in range(repeats):
        fold = draw.permutation(patients) % folds
        for kind in range(kinds):
            gain = 0.2 + of_patient + deviations[1] * draw.standard_normal(folds)[fold]
            tables.append(pd.DataFrame({
                "patient": np.arange(patients), "unit": [f"{repeat}-{kind}-{one}" for one in fold],
                "gain": gain + deviations[2] * draw.standard_normal(patients)}))
    return pd.concat(tables, ignore_index=True)


@pytest.mark.parametrize("deviations", [(1.0, 0.5, 1.0), (0.3, 0.2, 1.0), (0.5, 0.0, 1.0), (0.0, 0.5, 1.0)])
@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_the_mixed_model_is_that_of_statsmodels(deviations, missing):
    "Also if a variance is zero, and with missing cells."
    cells = crossed_cells(60, 5, 4, 2, deviations).sample(frac=1 - missing, random_state=0)
    design = {"patient": "0 + C(patient)", "unit": "0 + C(unit)"}
    model = MixedLM.from_formula("gain ~ 1", cells.assign(all=1), groups="all", re_formula="0",
                                 vc_formula=design)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)    # the MLE may be on the boundary
        theirs = model.fit(method="powell")    # bfgs, lbfgs and cg stop early in two of these tables
    parts = dict(zip(model.exog_vc.names, theirs.vcomp, strict=True))
    found = fit_mixed(cells)
    assert theirs.converged
    assert found.mean == pytest.approx(theirs.fe_params.iloc[0], abs=1e-4)
    assert found.error == pytest.approx(theirs.bse_fe.iloc[0], rel=2e-3)
    assert (found.patient, found.trunk, found.rest) == pytest.approx(
        (parts["patient"], parts["unit"], theirs.scale), rel=2e-3, abs=2e-4)


def test_the_mixed_model_of_ten_thousand_images_finds_what_was_made():
    "Six trunks on one test set: a matrix of cells by images would take 4.8 GB."
    found = fit_mixed(crossed_cells(10_000, 1, 6, 1, (0.8, 0.1, 0.5)))
    assert (found.patients, found.trunks, found.cells) == (10_000, 6, 60_000)
    assert found.patient == pytest.approx(0.64, rel=0.05) and found.rest == pytest.approx(0.25, rel=0.03)
    assert 0.001 < found.trunk < 0.06 and found.interval()[0] < 0.2 < found.interval()[1]


def test_pictures_that_a_seed_lacks_or_replaces_are_refused():
    pairs = pd.concat([one_split(), one_split().assign(seed=1)])
    other = pairs.copy()
    other.iloc[0, other.columns.get_loc("picture")] = 1000
    for table in (pairs[1:], other):
        with pytest.raises(ValueError, match="unit t0 lacks test pictures; expected the"):
            clusters_of(table)


def test_a_made_study_is_the_same_for_the_same_seed():
    labels, patients = np.arange(160) // 2 % 2, np.arange(160) // 2
    shape = shape_of(labels, patients, folds=4, repeats=2)
    assert shape.test_per_training == pytest.approx(1 / 3)
    one, same, other = (simulate_auc(shape, "made up", 0.78, 0.0, 5, seed=seed) for seed in (0, 0, 1))
    assert one == same != other


def test_trunks_of_one_split_agree_more_than_trunks_of_two():
    shape = shape_of(np.arange(200) // 2 % 2, np.arange(200) // 2, folds=2, repeats=1)
    components = PLAUSIBLE._replace(trunk_effect=0.2, same_split=1.0, same_set=0.0, noise=(0.01, 0.01),
                                    prefer_patient=0.001, prefer_image=0.001, seed_effect=0.0)
    draw, values = np.random.default_rng(0), []
    for _ in range(60):
        scores = made_scores(draw, shape, components, 0.75, 0.0, kinds=2, seeds=1)
        kinds = [made_clusters(scores[:, :, [kind]], shape, (1,)) for kind in (0, 1)]
        values.append([cluster.gain.mean() for kind in kinds for cluster in kind])
    related = np.corrcoef(np.array(values).T)
    assert related[0, 2] > 0.9 and abs(related[0, 1]) < 0.45


def test_the_command_needs_the_sets_and_says_so(monkeypatch, capsys):
    monkeypatch.delenv("THESIS_LTC_DATA", raising=False)
    with pytest.raises(SystemExit):
        main([])
    assert "THESIS_LTC_DATA" in capsys.readouterr().err


def test_the_shape_of_a_set_comes_from_its_manifest(tmp_path):
    folder = tmp_path / "mosmed-midslice"
    folder.mkdir()
    sizes = {"CT-0": 30, "CT-1": 5, "CT-2": 20}
    rows = [(name, number) for name, size in sizes.items() for number in range(size)]
    pd.DataFrame([{"file": f"{name}/{number}.jpg", "category": name} for name, number in rows]).to_csv(
        folder / "manifest.csv", index=False)
    shape = ct_shape("mosmed", tmp_path)
    assert (len(shape.labels), shape.labels.sum(), len(set(shape.patients))) == (50, 20, 50)
    assert shape.folds.shape == (4, 50) and set(shape.folds.ravel()) == set(range(5))


def test_a_stopped_simulation_goes_on_from_its_last_row(tmp_path, monkeypatch):
    asked = [question for question in power.questions() if question.set == "fashion-mnist"][:3]
    small = [question._replace(components=question.components._replace(images=300)) for question in asked]
    made = []

    def answer(question, *given):
        if len(made) == 2 and not any(one == "again" for one in made):
            raise KeyboardInterrupt
        made.append(question)
        return power.answer_question(question, *given)

    monkeypatch.setattr(power, "answer_question", power.answer, raising=False)
    monkeypatch.setattr(power, "answer", answer)
    monkeypatch.setattr(power, "questions", lambda: iter(small))
    place = tmp_path / "new" / "power.json"
    with pytest.raises(KeyboardInterrupt):
        power.write_power(place, tmp_path, studies=3)
    kept = read_json(place)["rows"]
    assert len(kept) == 2
    made.append("again")
    power.write_power(place, tmp_path, studies=3)
    assert read_json(place)["rows"][:2] == kept and len(read_json(place)["rows"]) == 3
    assert len(made) == 4    # two, the mark, and the one that was missing
    power.write_power(place, tmp_path, studies=2)   # another number of studies: all anew
    assert {row["studies"] for row in read_json(place)["rows"]} == {2}


def test_the_published_simulation_covers_and_errs_as_it_should(root):
    found = read_json(root / "results" / "power" / "power.json")
    assert len(found["rows"]) == len(list(power.questions()))
    for row in found["rows"]:
        bound = 3 * math.sqrt(0.05 * 0.95 / row["studies"])
        if row["setting"] == "plausible" and row["trunks_per_split"] == 2:
            assert row["coverage"] >= 0.95 - bound, row
            if row["contrast"] == "mean" and row["difference"] == 0:
                assert row["different"] <= 0.05 + bound
            assert row["equal"].get(str(row["difference"]), 0) <= 0.05 + bound, row
