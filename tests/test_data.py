"""Image sets from end to end: what building needs of memory, what stops a run, what the commands write."""
import os
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

from thesis_ltc.data import load
from thesis_ltc.data.imageset import LeakageError
from thesis_ltc.data.packs import Entry, Packer
from thesis_ltc.study.experiment import Experiment, ExperimentError
from thesis_ltc.study.runs import load_images, run

pytestmark = pytest.mark.timeout(300)
DATA = Path(os.environ.get("THESIS_LTC_DATA") or "/nowhere")
BUILD = """
import sys, threading
from thesis_ltc.data import recipes

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon"))

source = recipes.PublicSource(
    "phantoms", ".", "here", "made up", "*_ct.nii.gz", lesion="{stem}_lesion.nii.gz")
classes = ("without lesion", "with lesion")
recipe = recipes.SetRecipe("many", "phantoms", classes, "made up", True, (source,), {"for each positive": 0})
peak, ended = [anonymous()], threading.Event()

def watch():
    while not ended.wait(0.002):
        peak[0] = max(peak[0], anonymous())

thread = threading.Thread(target=watch)
thread.start()
recipes.build_set(recipe, sys.argv[1], sys.argv[2], size=128)
ended.set()
thread.join()
print(peak[0])
"""


def save_nifti(path, voxels):
    "An array (slices, rows, columns) as a NIfTI file."
    nibabel.save(nibabel.Nifti1Image(voxels.transpose(2, 1, 0), np.diag([-1.0, -1, 5, 1])), path)


def phantoms(folder, count):
    "A folder with so many volumes and lesion masks, links to one phantom."
    z, y, x = np.mgrid[0:24, 0:96, 0:96]
    lung = (abs(x - 48) > 6) & (abs(x - 48) < 30) & (abs(y - 48) < 24)
    body = (x - 48) ** 2 + (y - 48) ** 2 < 2000
    folder.mkdir()
    save_nifti(folder / "0000_ct.nii.gz", np.where(lung, -850, np.where(body, 40, -1000)).astype(np.int16))
    save_nifti(folder / "0000_ct_lesion.nii.gz", (lung & (z == 12) & (x > 48)).astype(np.uint8))
    for number in range(1, count):
        for part in ("ct", "ct_lesion"):
            os.link(folder / f"0000_{part}.nii.gz", folder / f"{number:04d}_{part}.nii.gz")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is read from /proc")
def test_memory_does_not_grow_with_the_number_of_volumes(tmp_path):
    peaks = {}
    for count in (10, 100):
        phantoms(tmp_path / str(count), count)
        command = [sys.executable, "-c", BUILD, str(tmp_path / str(count)), str(tmp_path / f"{count}.zip")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[count] = int(done.stdout) * 1024
    pictures = 90 * 24 * 128 * 128  # bytes that the other 90 volumes become
    assert peaks[100] - peaks[10] < pictures / 3, peaks


def pack(path, picture_of, patient="p{}".format):
    "A packed set of forty images, two classes."
    rng = np.random.default_rng(0)
    blocks = [rng.integers(0, 255, (32, 32), np.uint8) for _ in range(40)]
    noise = [np.kron(block, np.ones((4, 4), np.uint8)) for block in blocks]
    with Packer(path, ["well", "ill"], "made up", publishable=False) as packer:
        for row in range(40):
            label = ("well", "ill")[row % 2]
            picture = picture_of(row, noise)
            packer.add([Entry(f"{row}", patient(row), "here", label, picture, kind="128x128 L")])
    return path


SMALL = dict(
    data="mine", head="fc", image_size=136, width=0.125, epochs=1, batch_size=16, threads=1,
    precision="float32", device="cpu")


@pytest.fixture
def clean(tmp_path, monkeypatch):
    "A pack in which no two images are the same, and a cache of its own."
    monkeypatch.setenv("THESIS_LTC_CACHE", str(tmp_path / "cache"))
    return pack(tmp_path / "clean.zip", lambda row, noise: noise[row])


@pytest.fixture
def twins(clean, tmp_path):
    "The same with a test image that equals a training image; the pack, and both names, the smaller first."
    data = load_images(Experiment(folder=str(clean), **SMALL))
    train, test = data.names[data.rows("train")][0], data.names[data.rows("test")][0]
    path = pack(tmp_path / "twins.zip", lambda row, noise: noise[int(train) if str(row) == test else row])
    return path, *sorted((train, test), key=int)


def quietly(experiment, runs):
    return run(experiment, 0, runs, echo=lambda history: None)


def test_the_same_picture_in_two_parts_stops_a_run(twins, tmp_path):
    path, first, second = twins
    with pytest.raises(LeakageError, match=f"{first} .* and {second} .*accept_leakage"):
        run(Experiment(folder=str(path), **SMALL), 0, tmp_path / "runs")
    with pytest.raises(LeakageError, match="pairs of pictures are the same"):   # also in a set loaded before
        run(Experiment(folder=str(path), **SMALL), 0, tmp_path / "runs", data=load("mine", path))
    assert not (tmp_path / "runs").exists()


def test_a_run_starts_on_the_same_picture_in_two_parts_if_that_is_accepted(clean, twins, tmp_path):
    accepted = Experiment(folder=str(twins[0]), accept_leakage=True, **SMALL)
    data = quietly(accepted, tmp_path / "runs")["data"]
    assert (data["leakage_accepted"], data["same_pictures"], data["shared_patients"]) == (True, 1, 0)
    data = quietly(Experiment(folder=str(clean), **SMALL), tmp_path / "runs")["data"]
    assert (data["leakage_accepted"], data["same_pictures"], data["publishable"]) == (False, 0, False)


def test_a_set_in_another_split_or_with_leaking_patients_stops_a_run(clean, tmp_path):
    def of_two(row):
        return f"p{row // 2}"

    path = pack(tmp_path / "leaky.zip", lambda row, noise: noise[row], patient=of_two)
    leaky = load("mine", path, "slice", True)
    with pytest.raises(ExperimentError, match="data is mine, split 'slice', but"):
        run(Experiment(**SMALL), 0, tmp_path / "runs", data=leaky)
    with pytest.raises(LeakageError, match="stands in"):   # the set accepts leakage, the experiment doesn't
        run(Experiment(split="slice", **SMALL), 0, tmp_path / "runs", data=leaky)
    assert not (tmp_path / "runs").exists()


def test_folds_test_every_patient_once_and_their_records_say_which(clean, tmp_path):
    tested = []
    for fold in range(2):
        experiment = Experiment(folder=str(clean), folds=2, fold=fold, repeat=3, **SMALL)
        record = quietly(experiment, tmp_path / "runs")
        assert record["data"]["split"] == f"patient, fold {fold} of 0 to 1, repeat 3"
        assert record["experiment"]["fold"] == fold
        data = load_images(experiment)
        tested += data.names[data.rows("test")].tolist()
    assert sorted(tested, key=int) == [str(row) for row in range(40)]
    assert len(list((tmp_path / "runs").glob("mine_fc_s1_*"))) == 2


@pytest.fixture
def stranger(tmp_path):
    "A folder of somebody's pictures: two classes of four patients, three pictures each, one damaged."
    for number, label in enumerate(("cap", "covid")):
        for patient in range(4):
            pixels = np.random.default_rng(10 * number + patient).integers(0, 255, (70, 80), np.uint8)
            folder = tmp_path / "stranger" / label / f"{label}{patient}"
            folder.mkdir(parents=True)
            for picture in range(3):
                Image.fromarray(pixels // (picture + 1)).save(folder / f"{picture}.png")
    (tmp_path / "stranger" / "covid" / "covid0" / "2.png").write_bytes(b"\x89PNG")
    return tmp_path / "stranger"


@pytest.fixture
def command(tmp_path):
    "Calls `thesis-ltc data` with data and cache of its own."
    home = {"THESIS_LTC_DATA": str(tmp_path / "data"), "THESIS_LTC_CACHE": str(tmp_path / "cache")}

    def call(*words):
        line = [sys.executable, "-m", "thesis_ltc.cli", "data", *map(str, words)]
        return subprocess.run(line, env=os.environ | home, capture_output=True, text=True)

    return call


def test_a_stranger_s_folder_becomes_a_set_that_carries_its_own_name(stranger, command, tmp_path):
    "import, show, audit and pack, as one types them."
    asked = command("import", stranger, "--name", "theirs")
    assert asked.returncode == 1 and "class/patient/image, 24 pictures" in asked.stdout
    assert "patients: 8" in asked.stdout and "left out: covid/covid0/2.png: not an image" in asked.stdout
    assert not (tmp_path / "data").exists(), "something was written before it was approved"
    done = command("import", stranger, "--name", "theirs", "--licence", "CC BY 4.0", "--yes")
    assert done.returncode == 0, done.stderr
    shown = command("show", "theirs").stdout
    assert "theirs: 23 images of 8 patients" in shown and "licence: CC BY 4.0" in shown
    assert "left out: covid/covid0/2.png" in shown
    assert "8 patients, 0 of them in more than one part" in command("audit", "theirs").stdout
    moved = command("pack", "theirs", "--to", tmp_path / "carried.zip")
    assert moved.returncode == 0, moved.stderr
    shown = command("show", "carried", f"folder={tmp_path / 'carried.zip'}").stdout
    assert "23 images of 8 patients" in shown


@pytest.mark.skipif(not (DATA / "covid-ct").is_dir(), reason="THESIS_LTC_DATA has no covid-ct")
def test_covid_ct_as_it_was_published(tmp_path):
    data = load_images(Experiment(data="covid-ct", split="official"))
    assert data.counts() == {
        "train": {"NonCOVID": 234, "COVID": 191}, "val": {"NonCOVID": 58, "COVID": 60},
        "test": {"NonCOVID": 105, "COVID": 98}}
    assert not data.shared_patients()
    without = load_images(Experiment(data="covid-ct", split="official", drop_listed=True))
    assert without.counts()["train"] == {"NonCOVID": 232, "COVID": 191}
    assert without.counts()["test"] == data.counts()["test"]
    words = ["data", "pack", "covid-ct", "--to", str(tmp_path / "ct.zip")]
    line = [sys.executable, "-m", "thesis_ltc.cli", *words]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    assert (tmp_path / "ct.zip").stat().st_size <= 30e6, done.stdout
