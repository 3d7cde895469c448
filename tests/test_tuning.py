"Learning rates and durations of ct-folds follow by its rule from the published study ct-tuning."
import pandas as pd
import pytest

from thesis_ltc.book.records import load_records
from thesis_ltc.core.files import repository
from thesis_ltc.study.definition import read_study

OTHER = {"covid-ct": "mosmed-ct0-ct2", "mosmed-ct0-ct2": "covid-ct"}


@pytest.fixture(scope="module")
def validation() -> pd.Series:
    "Mean validation AUC by image set, head, learning rate and duration of a step."
    records = load_records(repository() / "results" / "ct-tuning")
    heads = records[records["trunk.hash"] != ""]
    assert len(heads) == 272
    return heads.groupby(["data", "head", "learning_rate", "elapsed"]).best_val_auc.mean()


@pytest.fixture(scope="module")
def cells() -> list:
    "The experiments of ct-folds."
    return read_study(repository() / "studies" / "ct-folds.yaml").cells()


def test_rates_follow_from_the_other_set(validation, cells):
    checked = set()
    for cell in cells:
        data, head = cell.values["data"], cell.values["head"]
        if (OTHER[data], head) not in validation.index.droplevel([2, 3]) or (data, head) in checked:
            continue
        checked.add((data, head))
        chosen = cell.values["learning_rate"], cell.values.get("elapsed", 1.0)
        assert chosen == validation[OTHER[data], head].idxmax()
    assert len(checked) == 2 * 11


@pytest.mark.parametrize(("head", "like"), [
    ("fc3", "fc"), ("ncp-y-double", "ncp-y"), ("ncp-y-half", "ncp-y"), ("y-shuffled-each", "ncp-y"),
    ("ncp-z-bi", "ncp-z"), ("ncp-yz", "ncp-z"), ("ncp-all-in-turn", "ncp-z"), ("z-shuffled-each", "ncp-z"),
    ("ncp-patch-overlap", "ncp-patch"), ("patch-shuffled", "ncp-patch")])
def test_a_next_move_takes_what_its_scan_has(cells, head, like):
    found = {}
    for cell in cells:
        values = cell.values["learning_rate"], cell.values.get("elapsed", 1.0)
        found.setdefault((cell.values["data"], cell.values["head"]), set()).add(values)
    for data in OTHER:
        assert found[data, head] == found[data, like] and len(found[data, like]) == 1
