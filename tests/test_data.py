"""Image sets from end to end: what building needs of memory, what stops a run, what the commands write."""
import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

from thesis_ltc.study.experiment import Experiment, ExperimentError
from thesis_ltc.study.run import load_images, run
from thesis_ltc.data.imageset import LeakageError
from thesis_ltc.data.packs import Entry, Packer
from thesis_ltc.data import load

pytestmark = pytest.mark.timeout(300)
BUILD = """
import sys, threading
from pathlib import Path
from thesis_ltc.data import recipes

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))

recipe = recipes.Recipe("many", "phantoms", ("without lesion", "with lesion"), "made up", True,
                        (recipes.Source("phantoms", ".", "here", "made up", "*_ct.nii.gz", lesion="{stem}_lesion.nii.gz"),), {"for each positive": 0})
peak, ended = [anonymous()], threading.Event()
def watch():
    while not ended.wait(0.002):
        peak[0] = max(peak[0], anonymous())
thread = threading.Thread(target=watch)
thread.start()
recipes.build(recipe, sys.argv[1], sys.argv[2], size=128)
ended.set()
thread.join()
print(peak[0])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is read from /proc")
def test_memory_does_not_grow_with_the_number_of_volumes(tmp_path):
    z, y, x = np.mgrid[0:24, 0:96, 0:96]
    lung = (abs(x - 48) > 6) & (abs(x - 48) < 30) & (abs(y - 48) < 24)
    units = np.where(lung, -850, np.where((x - 48) ** 2 + (y - 48) ** 2 < 2000, 40, -1000)).astype(np.int16)
    peaks = {}
    for count in (10, 100):
        folder = tmp_path / str(count)
        folder.mkdir()
        nibabel.save(nibabel.Nifti1Image(units.transpose(2, 1, 0), np.diag([-1.0, -1, 5, 1])), folder / "0000_ct.nii.gz")
        lesion = (lung & (z == 12) & (x > 48)).astype(np.uint8)
        nibabel.save(nibabel.Nifti1Image(lesion.transpose(2, 1, 0), np.diag([-1.0, -1, 5, 1])), folder / "0000_ct_lesion.nii.gz")
        for number in range(1, count):
            for part in ("ct", "ct_lesion"):
                os.link(folder / f"0000_{part}.nii.gz", folder / f"{number:04d}_{part}.nii.gz")
        done = subprocess.run([sys.executable, "-c", BUILD, str(folder), str(tmp_path / f"{count}.zip")], capture_output=True, text=True, check=True)
        peaks[count] = int(done.stdout) * 1024
    pictures = 90 * 24 * 128 * 128  # bytes that the other 90 volumes become
    assert peaks[100] - peaks[10] < pictures / 3, peaks


def pack(path, picture_of, patient="p{}".format):
    "A packed set of forty images, two classes."
    rng = np.random.default_rng(0)
    noise = [np.kron(rng.integers(0, 255, (32, 32), np.uint8), np.ones((4, 4), np.uint8)) for _ in range(40)]
    with Packer(path, ["well", "ill"], "made up", publishable=False) as packer:
        packer.add(Entry(f"{row}", patient(row), "here", ("well", "ill")[row % 2], picture_of(row, noise), kind="128x128 L") for row in range(40))
    return path


SMALL = dict(data="mine", head="fc", image_size=136, width=0.125, epochs=1, batch_size=16, threads=1, precision="float32", device="cpu")


def test_the_same_picture_in_two_parts_stops_a_run_unless_that_is_accepted(tmp_path, monkeypatch):
    monkeypatch.setenv("THESIS_LTC_CACHE", str(tmp_path / "cache"))
    clean = pack(tmp_path / "clean.zip", lambda row, noise: noise[row])
    data = load_images(Experiment(folder=str(clean), **SMALL))
    train, test = data.names[data.rows("train")][0], data.names[data.rows("test")][0]
    twins = pack(tmp_path / "twins.zip", lambda row, noise: noise[int(train) if str(row) == test else row])
    with pytest.raises(LeakageError, match=f"{min(int(train), int(test))} .* and {max(int(train), int(test))} .*accept_leakage"):
        run(Experiment(folder=str(twins), **SMALL), 0, tmp_path / "runs")
    with pytest.raises(LeakageError, match="pairs of pictures are the same"):
        run(Experiment(folder=str(twins), **SMALL), 0, tmp_path / "runs", data=load("mine", twins))   # a set that was loaded before
    leaky = load("mine", pack(tmp_path / "leaky.zip", lambda row, noise: noise[row], patient=lambda row: f"p{row // 2}"), "slice", True)
    with pytest.raises(ExperimentError, match="data is split 'slice', but the experiment says split=patient"):
        run(Experiment(**SMALL), 0, tmp_path / "runs", data=leaky)
    with pytest.raises(LeakageError, match="stands in"):
        run(Experiment(split="slice", **SMALL), 0, tmp_path / "runs", data=leaky)   # the set accepts leakage, the experiment doesn't
    assert not (tmp_path / "runs").exists()
    record = run(Experiment(folder=str(twins), accept_leakage=True, **SMALL), 0, tmp_path / "runs", echo=lambda history: None)
    assert record["data"]["leakage_accepted"] and record["data"]["same_pictures"] == 1 and record["data"]["shared_patients"] == 0
    record = run(Experiment(folder=str(clean), **SMALL), 0, tmp_path / "runs", echo=lambda history: None)
    assert record["data"]["same_pictures"] == 0 and not record["data"]["publishable"]


def test_folds_test_every_patient_once_and_their_records_say_which(tmp_path, monkeypatch):
    monkeypatch.setenv("THESIS_LTC_CACHE", str(tmp_path / "cache"))
    clean = pack(tmp_path / "clean.zip", lambda row, noise: noise[row])
    tested = []
    for fold in range(2):
        experiment = Experiment(folder=str(clean), folds=2, fold=fold, repeat=3, **SMALL)
        record = run(experiment, 0, tmp_path / "runs", echo=lambda history: None)
        assert record["data"]["split"] == f"patient, fold {fold} of 0 to 1, repeat 3" and record["experiment"]["fold"] == fold
        data = load_images(experiment)
        tested += data.names[data.rows("test")].tolist()
    assert sorted(tested, key=int) == [str(row) for row in range(40)] and len(list((tmp_path / "runs").glob("mine_fc_s1_*"))) == 2


def test_a_stranger_s_folder_becomes_a_set_that_carries_its_own_name(tmp_path):
    "import, show, audit and pack, as one types them."
    for label in ("cap", "covid"):
        for patient in range(4):
            for number in range(3):
                path = tmp_path / "stranger" / label / f"{label}{patient}" / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.random.default_rng(hash((label, patient)) % 1000).integers(0, 255, (70, 80), np.uint8) // (number + 1)).save(path)
    (tmp_path / "stranger" / "covid" / "covid0" / "2.png").write_bytes(b"\x89PNG")
    home = os.environ | {"THESIS_LTC_DATA": str(tmp_path / "data"), "THESIS_LTC_CACHE": str(tmp_path / "cache")}

    def call(*words):
        return subprocess.run([sys.executable, "-m", "thesis_ltc.cli", "data", *words], env=home, capture_output=True, text=True)

    asked = call("import", str(tmp_path / "stranger"), "--name", "theirs")
    assert asked.returncode == 1 and "class/patient/image, 24 pictures" in asked.stdout and "patients: 8" in asked.stdout and "left out: covid/covid0/2.png: not an image" in asked.stdout
    assert not (tmp_path / "data").exists(), "something was written before it was approved"
    assert call("import", str(tmp_path / "stranger"), "--name", "theirs", "--licence", "CC BY 4.0", "--yes").returncode == 0
    shown = call("show", "theirs")
    assert "theirs: 23 images of 8 patients" in shown.stdout and "licence: CC BY 4.0" in shown.stdout and "left out: covid/covid0/2.png" in shown.stdout
    assert "8 patients, 0 of them in more than one part" in call("audit", "theirs").stdout
    moved = call("pack", "theirs", "--to", str(tmp_path / "carried.zip"))
    assert moved.returncode == 0 and "23 images of 8 patients" in call("show", "carried", f"folder={tmp_path / 'carried.zip'}").stdout


@pytest.mark.skipif(not (Path(os.environ.get("THESIS_LTC_DATA") or "/nowhere") / "covid-ct").is_dir(), reason="THESIS_LTC_DATA has no covid-ct")
def test_covid_ct_as_it_was_published(tmp_path):
    data = load_images(Experiment(data="covid-ct", split="official"))
    assert data.counts() == {"train": {"NonCOVID": 234, "COVID": 191}, "val": {"NonCOVID": 58, "COVID": 60}, "test": {"NonCOVID": 105, "COVID": 98}} and not data.shared_patients()
    without = load_images(Experiment(data="covid-ct", split="official", drop_listed=True))
    assert without.counts()["train"] == {"NonCOVID": 232, "COVID": 191} and without.counts()["test"] == data.counts()["test"]
    done = subprocess.run([sys.executable, "-m", "thesis_ltc.cli", "data", "pack", "covid-ct", "--to", str(tmp_path / "ct.zip")], capture_output=True, text=True, check=True)
    assert (tmp_path / "ct.zip").stat().st_size <= 30e6, done.stdout


def test_the_audits_that_the_book_shows_hold_no_pictures():
    root = Path(__file__).resolve().parents[1]
    for path in (root / "results" / "audits").glob("*.json"):
        assert path.stat().st_size < 20_000 and isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
