"""Finished runs under corruptions and dropped steps: equal pictures for all, and only models as trained."""
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TINY

from thesis_ltc.core.files import read_json, write_json
from thesis_ltc.data import load
from thesis_ltc.data.augment import preprocess
from thesis_ltc.data.corrupt import CORRUPTIONS, SEVERITIES, corrupt
from thesis_ltc.data.imageset import ImageSet
from thesis_ltc.heads.dropped_steps import after_shrink, draw_steps, drop_steps, dropping_scan, step_cells
from thesis_ltc.heads.models import HEADS, classifier, find_head
from thesis_ltc.study import stress as room
from thesis_ltc.study.experiment import Experiment
from thesis_ltc.study.runs import load_images, run
from thesis_ltc.study.stress import SCORES, STRESS, StressError, stress
from thesis_ltc.training.checkpoint import load_tensors, save_tensors
from thesis_ltc.training.trunk import TrunkError, TrunkHasChanged

pytestmark = pytest.mark.timeout(300)
SMALL = TINY | {"image_size": 48, "epochs": 2, "learning_rate": 1e-3, "device": "cpu"}


@pytest.fixture(scope="module")
def unit(tmp_path_factory) -> tuple[ImageSet, list[Path]]:
    "Images, and the folders of a trunk, its heads and a network of another backbone."
    place = tmp_path_factory.mktemp("runs")
    data = load_images(Experiment(**SMALL))

    def trained(**values) -> Path:
        record = run(Experiment(**SMALL | values), 0, place, data=data, echo=lambda history: None)
        return place / record["id"] / "seed0"

    trunk = trained(head="fc")
    heads = [trained(head=head, trunk=str(trunk), passes=1) for head in ("fc", "z-fc", "ncp-z", "z-lstm")]
    return data, [trunk, *heads, trained(head="ncp-z")]


@pytest.fixture(autouse=True)
def untested(request) -> None:
    "No table is there before a test."
    if "unit" in request.fixturenames:
        for folder in request.getfixturevalue("unit")[1]:
            (folder / STRESS).unlink(missing_ok=True)


def table_of(folder: Path) -> pd.DataFrame:
    return pd.read_parquet(folder / STRESS).set_index(["condition", "level"])


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_severity_is_further_from_the_clean_picture(name: str) -> None:
    data = load("digits").limited(20)
    images, keys = preprocess(torch.tensor(data.images), 64), data.image_hashes
    distances = [float((corrupt(images, name, severity, keys) - images).square().mean())
                 for severity in SEVERITIES]
    assert distances[0] > 0 and np.all(np.diff(distances) > 0)


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("severity", [1, 5])
def test_a_picture_is_corrupted_alike_in_any_batch(name: str, severity: int) -> None:
    images, keys = torch.rand(9, 1, 40, 40), [f"key {number}" for number in range(9)]
    together = corrupt(images, name, severity, keys)
    for rows in ([4], [8, 4, 0], [5, 4, 3, 2, 1]):
        apart = corrupt(images[rows], name, severity, [keys[row] for row in rows])
        torch.testing.assert_close(apart, together[rows], rtol=0, atol=1e-6)


@pytest.mark.parametrize("head", [head for head in HEADS if dropping_scan(find_head(head))])
def test_no_step_changes_nothing_and_all_steps_leave_one_answer(head: str) -> None:
    model = classifier(head, 3, 136, width=0.125, seed=0).eval().head
    maps, keys = torch.rand(4, *model.shrink.given), [f"key {number}" for number in range(4)]
    with torch.no_grad():
        shrunk, rest = model.shrink(maps), after_shrink(model)
        cells = step_cells(dropping_scan(model.sentence), model.shrink.shape)
        steps = [draw_steps(keys, len(cells), share) for share in (0, 1)]
        none, every = (rest(drop_steps(shrunk, shrunk.mean(0), dropped, cells)) for dropped in steps)
        torch.testing.assert_close(none, rest(shrunk), rtol=0, atol=0)
        assert (none - none[0]).abs().max() > 1e-5
        torch.testing.assert_close(every, every[:1].expand(4, -1), rtol=0, atol=1e-5)


def test_heads_of_a_tensor_lose_the_same_numbers() -> None:
    for heads in (("ncp-z", "z-fc", "z-lstm", "z-frozen"), ("ncp-y", "y-fc"), ("ncp-patch", "patch-fc")):
        shapes = {find_head(head).shrink for head in heads}
        names = {dropping_scan(find_head(head)).name for head in heads}
        assert len(shapes) == len(names) == 1, heads


def test_tables_are_whole_and_begin_with_the_record(unit) -> None:
    data, folders = unit
    assert stress(folders, data) == [folder / STRESS for folder in folders]
    for folder, steps in zip(folders, (0, 0, 3, 3, 3, 3), strict=True):
        table = pd.read_parquet(folder / STRESS)
        assert table.columns.tolist() == ["condition", "level", "set", "images", *SCORES]
        assert table.groupby("condition", sort=False).size().to_dict() == {
            "clean": 1, **dict.fromkeys(CORRUPTIONS, 5), **({"steps": steps} if steps else {})}
        assert (table["images"] == SMALL["limit"]).all() and table[list(SCORES)].notna().all().all()
    before = [(folder / STRESS).stat().st_mtime_ns for folder in folders]
    assert stress(folders, data) == []
    assert [(folder / STRESS).stat().st_mtime_ns for folder in folders] == before


def test_a_table_does_not_depend_on_the_other_runs(unit) -> None:
    data, folders = unit
    stress(folders, data)
    together = [table_of(folder) for folder in folders]
    for folder, whole in zip(folders, together, strict=True):
        (folder / STRESS).unlink()
        stress([folder], data)
        pd.testing.assert_frame_equal(table_of(folder), whole, atol=1e-6)


def test_a_backbone_computes_each_condition_once(unit, monkeypatch) -> None:
    data, folders = unit
    calls = []
    make_maps = room.make_maps
    monkeypatch.setattr(room, "make_maps", lambda *given: calls.append(1) or make_maps(*given))
    stress(folders[:-1], data)
    assert len(calls) == 26 + 1   # clean, 25 corruptions, and training images for the mean


def test_shares_nought_and_one(unit, monkeypatch) -> None:
    data, folders = unit
    monkeypatch.setattr(room, "SHARES", (0.0, 1.0))
    stress(folders[2:5], data)
    for folder in folders[2:5]:
        table = table_of(folder)
        keys = ("clean", 0), ("steps", 0), ("steps", 1)
        clean, none, every = (table.loc[key, list(SCORES)] for key in keys)
        assert np.allclose(none.astype(float), clean.astype(float), atol=1e-6)
        assert every["auc"] == 0.5 and every["accuracy"] <= 0.2   # one answer to all images
        assert clean["auc"] != 0.5


def test_a_doctored_model_is_refused(unit) -> None:
    data, folders = unit
    path = folders[3] / "model.safetensors"
    weights, state = load_tensors(path)
    of_head = next(name for name in weights if name.startswith("head.readout"))
    for name in (of_head, "backbone.blocks.0.0.bias"):
        save_tensors(path, weights | {name: 0.5 * weights[name] + 0.3}, state)
        try:
            said = "but the record says|answers are not those of its predictions"
            with pytest.raises(StressError, match=said):
                stress(folders[3:4], data)
        finally:
            save_tensors(path, weights, state)
        assert not (folders[3] / STRESS).exists()
    assert stress(folders[3:4], data) == [folders[3] / STRESS]


def test_a_table_of_former_weights_is_made_anew(unit) -> None:
    data, folders = unit
    stress(folders[3:4], data)
    table = pd.read_parquet(folders[3] / STRESS)
    table.assign(log_loss=table.log_loss + 0.1).to_parquet(folders[3] / STRESS, index=False)
    assert stress(folders[3:4], data) == [folders[3] / STRESS]
    pd.testing.assert_frame_equal(pd.read_parquet(folders[3] / STRESS), table, atol=1e-6)


def test_a_stop_leaves_what_is_whole(unit) -> None:
    data, folders = unit

    class Stop(Exception):
        pass

    def stop_later() -> None:
        if (folders[0] / STRESS).exists():   # the first backbone is done
            raise Stop

    with pytest.raises(Stop):
        stress(folders, data, check=stop_later)
    there = [(folder / STRESS).exists() for folder in folders]
    assert there[0] and not there[-1]
    left = [folder / STRESS for folder, done in zip(folders, there, strict=True) if not done]
    assert stress(folders, data) == left and not list(folders[-1].glob(".*.tmp"))


def test_images_that_the_trunk_has_seen_are_not_scored(unit, tmp_path) -> None:
    data, _ = unit
    of_trunk = Experiment(**SMALL | {"data": "row-order", "head": "fc"})
    orders = load_images(of_trunk)
    silent = {"echo": lambda history: None}
    trained = run(of_trunk, 0, tmp_path, data=orders, **silent)
    trunk = tmp_path / trained["id"] / "seed0"
    record = run(Experiment(**SMALL | {"trunk": str(trunk), "passes": 1}), 0, tmp_path, data=data, **silent)
    folder = tmp_path / record["id"] / "seed0"

    limited = orders.limited(SMALL["limit"])
    seen = set(limited.image_hashes[limited.split != "test"])
    other = replace(orders, labels=orders.labels % 10, classes=data.classes)
    stress([folder], data, [other])
    row = table_of(folder).loc[("set", 0)]
    unseen = [picture not in seen for picture in other.image_hashes]
    assert row["set"] == "row-order" and row["images"] == sum(unseen) < len(other)

    (folder / STRESS).unlink()
    weights, state = load_tensors(trunk / "model.safetensors")
    other_weights = {name: 2 * tensor for name, tensor in weights.items()}
    save_tensors(trunk / "model.safetensors", other_weights, state)
    with pytest.raises(TrunkHasChanged, match=f"but the run was trained on {record['trunk']['trunk']}"):
        stress([folder], data, [other])
    assert not (folder / STRESS).exists()
    trunk.rename(trunk.with_name("elsewhere"))
    with pytest.raises(TrunkError, match="no finished run"):
        stress([folder], data, [other])
    assert stress([folder], data) == [folder / STRESS]   # the own set needs no trunk


def test_contrast_is_lost_on_a_network_that_normalises_images(unit, tmp_path) -> None:
    "Corrupted first, normalised afterwards; a trunk and its heads must agree on it."
    data, folders = unit
    normalising = Experiment(**SMALL | {"head": "fc", "normalise_image": True})
    silent = {"data": data, "echo": lambda history: None}
    record = run(normalising, 0, tmp_path, **silent)
    trunk = tmp_path / record["id"] / "seed0"
    of_head = run(replace(normalising, head="z-fc", trunk=str(trunk), passes=1), 0, tmp_path, **silent)
    head = tmp_path / of_head["id"] / "seed0"
    with pytest.raises(StressError, match="normalise_image=False, but the first run has True"):
        stress([trunk, folders[0]], data)
    assert stress([trunk, head], data) == [trunk / STRESS, head / STRESS]
    stress(folders[:1], data)
    for folder, is_kept in ((trunk, True), (head, True), (folders[0], False)):
        table = table_of(folder)
        losses = table.loc[["contrast"]].log_loss
        assert np.allclose(losses, table.loc[("clean", 0)].log_loss, atol=1e-4) == is_kept, folder
        assert not np.allclose(table.loc[["noise"]].log_loss, table.loc[("clean", 0)].log_loss, atol=1e-3)


def test_records_from_before_images_could_be_normalised_are_alike(unit) -> None:
    data, folders = unit
    path = folders[1] / "record.json"
    before = path.read_text()
    record = read_json(path)
    del record["experiment"]["normalise_image"]
    try:
        write_json(path, record)
        assert stress(folders[:2], data) == [folder / STRESS for folder in folders[:2]]
    finally:
        path.write_text(before)
