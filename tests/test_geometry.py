"""Where the slices of a volume lie, from files to the preview, the slices and the notes of a set.

Each kind of fault passes one place: the affine of a series `series_affine`, the steps of its slices
`check_stack`, lungs at the edge `segment_lungs`, values of masks `whole_numbers`, the files of a series
`series_files` and `read_slice_headers`.
"""
import os
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileMetaDataset

from thesis_ltc.data.dicom import read_dicom, series_files, write_enhanced, write_series, write_slice
from thesis_ltc.data.imports import import_images, understand_import
from thesis_ltc.data.lungs import segment_lungs
from thesis_ltc.data.packs import read_pack
from thesis_ltc.data.slices import read_slices, volume_remarks
from thesis_ltc.data.volumes import VolumeError, read_nifti

SAMPLE = Path(os.environ.get("THESIS_LTC_DATA") or "/nowhere") / "covid-ct-md-sample" / "nii"
SIDE, SLICES = 48, 14


def chest(noise=8.0):
    "Hounsfield units (slices, rows, columns) of a body in air with two lungs, which end within the volume."
    z, y, x = np.mgrid[0:SLICES, 0:SIDE, 0:SIDE].astype(float)
    body = ((x - 23.5) / 21) ** 2 + ((y - 23.5) / 17) ** 2 < 1
    lungs = np.zeros(z.shape, bool)
    for centre, width in ((14, 7), (33, 6)):
        lungs |= ((x - centre) / width) ** 2 + ((y - 23.5) / 11) ** 2 + ((z - 6.5) / 6) ** 2 < 1
    units = np.where(lungs, -850.0, np.where(body, 40.0, -1000.0))
    noisy = units + np.random.default_rng(3).normal(0, noise, units.shape)
    return np.clip(np.rint(noisy), -1023, None).astype(np.int16)   # stored numbers are positive


CHEST = chest()
WITH_LUNG = 12   # slices


def save(path, voxels, affine=None):
    "An array (slices, rows, columns) as a NIfTI file with rows to the back and columns to the left."
    array = np.ascontiguousarray(np.asarray(voxels).transpose(2, 1, 0))
    affine = np.diag([-0.8, -0.7, 2.0, 1]) if affine is None else affine
    nibabel.save(nibabel.Nifti1Image(array, affine), path)
    return path


def scale(path, slope, intercept):
    "Set the scale slope and intercept in the header of an uncompressed NIfTI file."
    content = bytearray(path.read_bytes())
    content[112:120] = np.array([slope, intercept], np.float32).tobytes()
    path.write_bytes(content)
    return path


def change(folder, edit):
    "Edit the headers of a series; `edit` gets the header and the number of the slice from the feet."
    files = series_files(folder)[::-1]   # names of phantoms run against the slices
    for number, path in enumerate(files):
        dataset = pydicom.dcmread(path)
        edit(dataset, number)
        dataset.save_as(path)
    return folder


def numbers(volume):
    "How many slices are kept, and how many of them are positive."
    slices = list(volume.slices)
    return len(slices), sum(one.positive for one in slices)


def refused(attempt):
    with pytest.raises(VolumeError) as caught:
        attempt()
    return str(caught.value)


def imported(root, *rows):
    "Lines of the preview, and the set that is made of volumes with labels."
    (root / "volumes.csv").write_text("\n".join(["volume,label,patient", *rows]) + "\n")
    what = understand_import(root, positive="ill")
    preview = what.preview()
    import_images(what, root / "set.zip", size=32)
    return preview, read_pack(root / "set.zip", "set")


# 1. A leaning gantry

@pytest.mark.parametrize("degrees, step, to_the_right", [
    (8, 1.5, False), (-17, 3, False), (28, 5, False), (20, 2, True)])
def test_masks_with_the_affine_of_the_files_fit_a_leaning_gantry(tmp_path, degrees, step, to_the_right):
    cosine, sine = (round(float(f(np.radians(degrees))), 7) for f in (np.cos, np.sin))
    row = -1 if to_the_right else 1
    folder = write_and_lean(tmp_path / "ct", [row, 0, 0, 0, cosine, sine], step)
    files = np.eye(4)   # from column, row and slice to left, back and head
    files[:3, :3] = [[0.8 * row, 0, 0], [0, 0.7 * cosine, 0], [0, 0.7 * sine, step]]
    files[:3, 3] = -10, -20, 0
    affine = np.diag([-1.0, -1, 1, 1]) @ files
    drawn = np.zeros(CHEST.shape, np.uint8)
    drawn[5:8, 20:26, 12:16] = 1
    mask = save(tmp_path / "mask.nii.gz", drawn, affine)
    volume = read_slices(folder, mask)
    positive = [one.position for one in volume.slices if one.positive]
    assert np.allclose(positive, [5 * step, 6 * step, 7 * step])
    assert volume.remarks[0].startswith(f"the gantry leaned by {abs(degrees)}.0 degrees")
    copy = read_nifti(save(tmp_path / "copy.nii.gz", CHEST, affine))   # what a converter makes of the series
    assert np.allclose(copy.affine, read_dicom(folder).affine, atol=1e-5)
    assert copy.remarks == volume_remarks(tmp_path / "copy.nii.gz") == volume_remarks(folder)
    square = affine.copy()
    normal = np.cross(square[:3, 0], square[:3, 1])
    square[:3, 2] = normal / np.linalg.norm(normal) * step * np.sign(normal[2])
    save(tmp_path / "mask.nii.gz", drawn, square)
    message = refused(lambda: read_slices(folder, mask))
    assert "lies elsewhere than" in message and "the gantry leaned by" in message


def write_and_lean(folder, orientation, step):
    write_series(folder, CHEST, "p1", spacing=step)
    return change(folder, lambda dataset, _: setattr(dataset, "ImageOrientationPatient", orientation))


def test_a_lean_is_said_before_and_after_an_import(tmp_path):
    write_and_lean(tmp_path / "one", [1, 0, 0, 0, float(np.cos(0.2)), float(np.sin(0.2))], 2.0)
    write_series(tmp_path / "two", CHEST, "p2")
    preview, data = imported(tmp_path, "one,ill,p1", "two,well,p2")
    said = ("one: the gantry leaned by 11.5 degrees; slices are used as they were taken, "
            "and masks must lean with them")
    assert said in preview and data.notes == (said,)


# 2. Uneven and missing slices

HEIGHTS = {
    "one missing": ([0, 2, 4, 6, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28],
                    "missing, 1 of 15: 1 between 6 and 10 mm"),
    "two gaps": ([0, 3, 6, 15, 18, 21, 24, 27, 33, 36, 39, 42, 45, 48],
                 "missing, 3 of 17: 2 between 6 and 15 mm, 1 between 27 and 33 mm"),
    "below zero": (np.array([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 99.0]) - 400,
                   "missing, 86 of 100: 86 between -388 and -301 mm"),
    "jitter": (np.arange(14) * 5 + 0.2 * (-1.0) ** np.arange(14), None),
    "rounded": (np.round(np.arange(14) * 0.625, 2), None),
}


@pytest.mark.parametrize("name", HEIGHTS)
def test_missing_slices_are_said_and_jitter_is_not(tmp_path, name):
    heights, said = HEIGHTS[name]
    write_series(tmp_path / "one", CHEST, "p1")
    write_series(tmp_path / "two", CHEST, "p2")
    change(tmp_path / "one", lambda dataset, number: setattr(
        dataset, "ImagePositionPatient", [-10, -20, float(heights[number])]))
    volume = read_dicom(tmp_path / "one")
    assert np.array_equal(volume.voxels, CHEST) and np.allclose(volume.positions, heights)
    preview, data = imported(tmp_path, "one,ill,p1", "two,well,p2")
    expected = [f"one: slices are {said}"] if said else []
    assert [line for line in preview if "slices are missing" in line] == expected == list(data.notes)


@pytest.mark.parametrize("name, heights, words", [
    ("uneven", [0, 2, 4, 7, 9, 11, 13], "2 mm apart, but 997.dcm, at 4 mm, and 996.dcm, at 7 mm, 3"),
    ("two spacings", [0, 5, 10, 15, 20, 21], "5 mm apart, but 995.dcm, at 20 mm, and 994.dcm, at 21 mm, 1"),
    ("much jitter", [0, 5, 10, 15.7, 20, 25], "5 mm apart, but 997.dcm, at 10 mm, and 996.dcm, at 15.7 mm,"),
])
def test_uneven_steps_are_refused_with_the_slices_and_left_out(tmp_path, name, heights, words):
    write_series(tmp_path / "one", CHEST[: len(heights)], "p1")
    write_series(tmp_path / "two", CHEST, "p2")
    write_series(tmp_path / "three", CHEST, "p3")
    change(tmp_path / "one", lambda dataset, number: setattr(
        dataset, "ImagePositionPatient", [-10, -20, heights[number]]))
    message = refused(lambda: read_dicom(tmp_path / "one"))
    assert words in message and "expected even steps, within 10%" in message
    preview, data = imported(tmp_path, "one,ill,p1", "two,well,p2", "three,ill,p3")
    assert any(line.startswith("left out: one: ") and words in line for line in preview)
    assert data.quarantine[0][0] == "one" and words in data.quarantine[0][1]


def test_a_slice_aside_is_refused(tmp_path):
    write_series(tmp_path / "one", CHEST, "p1")
    change(tmp_path / "one", lambda dataset, number: setattr(
        dataset, "ImagePositionPatient", [-10, -20 - 9 * (number == 4), 2.0 * number]))
    assert "995.dcm, at 8 mm, lies 9 mm aside" in refused(lambda: read_dicom(tmp_path / "one"))


# 3. Lungs that touch the edge

def test_lungs_cut_by_the_edge_are_kept_and_said_where_no_open_air_is(tmp_path):
    assert numbers(read_slices(save(tmp_path / "whole.nii.gz", CHEST)))[0] == WITH_LUNG
    crops = {"both sides": (slice(16, 32), slice(11, 36)), "front": (slice(20, 34), slice(8, 40)),
             "one lung": (slice(15, 32), slice(10, 22))}
    for name, (rows, columns) in crops.items():
        volume = read_slices(save(tmp_path / "crop.nii.gz", CHEST[:, rows, columns]))
        assert numbers(volume)[0] == WITH_LUNG, name
        assert "the edge of the field of view cuts the lungs in" in volume.remarks[0]
    y, x = np.mgrid[0:SIDE, 0:SIDE]
    for frame in (-2000, -3024):   # what scanners write around a round field of view
        units = np.where((x - 23.5) ** 2 + (y - 23.5) ** 2 < 14**2, CHEST, frame)
        volume = read_slices(save(tmp_path / "round.nii.gz", units.astype(np.int16)))
        assert numbers(volume)[0] == WITH_LUNG and len(volume.remarks) == 1
    save(tmp_path / "whole2.nii.gz", CHEST[:, ::-1])
    preview, data = imported(tmp_path, "round.nii.gz,ill,p1", "whole2.nii.gz,well,p2")
    (note,) = data.notes
    assert note.startswith("round.nii.gz: the edge of the field of view cuts")


def test_lungs_cut_beside_open_air_are_refused_and_no_slice_vanishes(tmp_path):
    crops = {"sides": (slice(0, 48), slice(11, 36)), "sides and back": (slice(0, 30), slice(11, 36)),
             "corners": (slice(6, 41), slice(11, 36))}
    for name, (rows, columns) in crops.items():
        path = save(tmp_path / "crop.nii.gz", CHEST[:, rows, columns])
        message = refused(lambda path=path: read_slices(path))
        assert "crop.nii.gz: lungs touch the edge of the field of view" in message, name
        assert "slices (" in message and "a lung mask: give one" in message
        lung = save(tmp_path / "lung.nii.gz", (CHEST[:, rows, columns] < -700).astype(np.uint8))
        assert numbers(read_slices(path, lung=lung))[0] >= WITH_LUNG
    save(tmp_path / "whole.nii.gz", CHEST)
    save(tmp_path / "other.nii.gz", CHEST[:, ::-1])
    _, data = imported(tmp_path, "crop.nii.gz,ill,p1", "whole.nii.gz,well,p2", "other.nii.gz,ill,p3")
    assert data.quarantine[0][0] == "crop.nii.gz" and "lungs touch the edge" in data.quarantine[0][1]


def test_furniture_at_the_edge_does_not_refuse_a_whole_volume(tmp_path):
    z, y, x = np.mgrid[0:SLICES, 0:SIDE, 0:SIDE]
    outside = ((x - 23.5) / 21) ** 2 + ((y - 23.5) / 17) ** 2 >= 1
    things = {
        "mattress": outside & (y > 28) & (y < 44), "table": (y > 42) & (y < 47),
        "blanket": outside & (y < 15)}
    for name, where in things.items():
        units = np.where(where, -870, CHEST).astype(np.int16)
        volume = read_slices(save(tmp_path / f"{name}.nii.gz", units))
        assert (numbers(volume)[0], volume.remarks) == (WITH_LUNG, ()), name


CROPS = {   # shares of the box around the lungs, cut off at the front, back, right and left; below 0 wider
    "box": (0, 0, 0, 0), "tight": (.05, .05, .05, .05), "tighter": (.15, .15, .15, .15),
    "back": (.3, 0, 0, 0), "front": (0, .3, -.3, -.3), "middle": (-9, -9, .2, .2),
    "one lung": (.1, .1, .02, .55), "within": (.3, .3, .25, .25)}


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="THESIS_LTC_DATA has no covid-ct-md-sample")
@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize("patient", ["P001", "normal001"])
def test_no_slice_of_a_cropped_patient_vanishes_without_a_word(patient, crop):
    volume = read_nifti(SAMPLE / f"{patient}_128.nii.gz")
    lungs = segment_lungs(volume).voxels
    box = []
    for axis, (low, high) in ((1, CROPS[crop][:2]), (2, CROPS[crop][2:])):
        shown = np.flatnonzero(lungs.any(axis=(0, 3 - axis)))
        first, side = shown[0], shown[-1] - shown[0]
        box.append(slice(max(0, int(first + low * side)), int(first + side - high * side) + 1))
    cropped = replace(volume, voxels=volume.voxels[:, *box])
    expected = lungs[:, *box].mean(axis=(1, 2)) >= 1e-3
    try:
        found = segment_lungs(cropped)
    except VolumeError as error:
        assert "lungs touch the edge" in str(error)
        return
    lost = expected & ~found.voxels.any(axis=(1, 2))
    assert lost.mean() < 0.1 and (found.remarks or not lost.any())   # tips of a lung that was cut in pieces


# 4. Masks with a scale slope

@pytest.mark.parametrize("slope, intercept, dtype, one", [
    (1 / 255, 0, np.uint8, 255), (0.00392, 0, np.uint8, 255), (0.003922, 0, np.int16, 255),
    (1 / 3, 0, np.uint8, 3), (1 / 65535, 0, np.uint16, 65535), (1 / 128, -1 / 128, np.uint8, 129)])
def test_masks_with_a_scale_slope_are_read(tmp_path, slope, intercept, dtype, one):
    volume = save(tmp_path / "ct.nii.gz", CHEST)
    drawn = np.zeros(CHEST.shape)
    drawn[5:8, 20:26, 12:16] = 1
    stored = np.where(drawn, one, round(-intercept / slope))
    mask = scale(save(tmp_path / "mask.nii", stored.astype(dtype)), slope, intercept)
    raw = np.asanyarray(nibabel.load(mask).dataobj.get_unscaled())
    assert raw.dtype == dtype and set(np.unique(raw)) == set(np.unique(stored))
    assert numbers(read_slices(volume, mask)) == (WITH_LUNG, 3)
    assert numbers(read_slices(volume, None, mask))[0] == 3


@pytest.mark.parametrize("values, words", [
    ([0, 0.00392], "(0.00392)"), ([0, 0.5], "(0.5)"), ([0, 0.25, 0.75, 1], "(0.25, 0.75)"), ([-1, 0], "(-1)"),
    ([0, 1.02], "(1.02)")])
def test_values_that_are_no_mask_are_refused_with_them(tmp_path, values, words):
    volume = save(tmp_path / "ct.nii.gz", CHEST)
    drawn = np.resize(np.array(values), CHEST.shape)
    mask = save(tmp_path / "mask.nii.gz", drawn.astype(np.float64))
    message = refused(lambda: read_slices(volume, mask))
    assert words in message and "correct the scale slope of its header" in message


# 5. Enhanced files, files without preamble, and other objects

def frames_reversed(dataset):
    "The frames of an enhanced file run from the head to the feet."
    groups = dataset.PerFrameFunctionalGroupsSequence
    dataset.PerFrameFunctionalGroupsSequence = list(groups)[::-1]
    stored = np.frombuffer(dataset.PixelData, np.uint16).reshape(SLICES, SIDE, SIDE)
    dataset.PixelData = stored[::-1].tobytes()


def all_in_frames(dataset):
    "Nothing is shared: each frame says all, and has a slope of its own."
    stored = np.frombuffer(dataset.PixelData, np.uint16).reshape(SLICES, SIDE, SIDE).copy()
    for number, group in enumerate(dataset.PerFrameFunctionalGroupsSequence):
        group.update(pydicom.dcmread(dataset.filename).SharedFunctionalGroupsSequence[0])
        if number % 2:
            group.PixelValueTransformationSequence[0].RescaleIntercept = -1024 - 50
            stored[number] += 50
    del dataset.SharedFunctionalGroupsSequence
    dataset.PixelData = stored.tobytes()


@pytest.mark.parametrize("edit", [lambda dataset: None, frames_reversed, all_in_frames])
def test_enhanced_files_are_read_as_their_single_slices_are(tmp_path, edit):
    write_series(tmp_path / "single", CHEST, "p1")
    expected = read_dicom(tmp_path / "single")
    path = tmp_path / "enhanced.dcm"
    write_enhanced(path, CHEST, "p1")
    dataset = pydicom.dcmread(path)
    edit(dataset)
    dataset.save_as(path)
    got = read_dicom(path)
    assert np.array_equal(got.voxels, expected.voxels) and np.array_equal(got.affine, expected.affine)
    assert np.array_equal(got.positions, expected.positions) and got.patient == "p1"
    assert numbers(read_slices(path)) == (WITH_LUNG, 0)


def test_frames_without_places_and_two_frames_at_one_place_are_named(tmp_path):
    path = tmp_path / "enhanced.dcm"
    write_enhanced(path, CHEST, "p1")
    dataset = pydicom.dcmread(path)
    dataset.PerFrameFunctionalGroupsSequence[3].PlanePositionSequence[0].ImagePositionPatient = [-10, -20, 4]
    dataset.save_as(path)
    assert "enhanced.dcm, frame 3, at 4 mm, and enhanced.dcm, frame 4, at 4 mm, lie at the same place" in (
        refused(lambda: read_dicom(path)))
    del dataset.PerFrameFunctionalGroupsSequence[0]
    dataset.save_as(path)
    assert "holds 14 frames and says of 13 where they lie" in refused(lambda: read_dicom(path))
    del dataset.PerFrameFunctionalGroupsSequence
    dataset.save_as(path)
    assert "else write a file for each slice" in refused(lambda: read_dicom(path))


def without_preamble(path):
    path.write_bytes(path.read_bytes()[132:])


def without_meta(path, implicit=True):
    dataset = pydicom.dcmread(path)
    if implicit:
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
    dataset.preamble, dataset.file_meta = None, FileMetaDataset()
    dataset.save_as(path, implicit_vr=implicit, little_endian=True)


@pytest.mark.parametrize("strip", [without_preamble, without_meta, lambda path: without_meta(path, False)])
def test_files_without_preamble_are_read(tmp_path, strip):
    write_series(tmp_path / "one", CHEST, "p1")
    expected = read_dicom(tmp_path / "one")
    for path in series_files(tmp_path / "one"):
        strip(path)
        assert path.read_bytes()[128:132] != b"DICM"
    got = read_dicom(tmp_path / "one")
    assert np.array_equal(got.voxels, expected.voxels) and got.patient == expected.patient
    preview, data = imported_pair(tmp_path)
    assert data.quarantine == () and not any(line.startswith("left out:") for line in preview)


def imported_pair(root):
    write_series(root / "two", CHEST, "p2")
    return imported(root, "one,ill,p1", "two,well,p2")


@pytest.mark.parametrize("content", [
    b"", b"a text that is no DICOM file\n" * 9, bytes(4000), bytes(range(256)) * 20])
def test_what_is_no_dicom_is_no_slice(tmp_path, content):
    write_series(tmp_path / "one", CHEST, "p1")
    (tmp_path / "one" / "odd").write_bytes(content)
    message = refused(lambda: read_dicom(tmp_path / "one"))
    assert "odd is damaged or no DICOM file" in message


@pytest.mark.parametrize("uid, modality, words", [
    ("1.2.840.10008.5.1.4.1.1.481.3", "RTSTRUCT", "RT Structure Set Storage, modality RTSTRUCT"),
    ("1.2.840.10008.5.1.4.1.1.88.33", "SR", "Comprehensive SR Storage, modality SR"),
    ("1.2.840.10008.5.1.4.1.1.104.1", "DOC", "Encapsulated PDF Storage, modality DOC")])
def test_other_objects_are_named_as_what_they_are(tmp_path, uid, modality, words):
    write_series(tmp_path / "one", CHEST, "p1")
    write_slice(
        tmp_path / "one" / "other.dcm", np.zeros((4, 4)), 0.0, SOPClassUID=uid, Modality=modality,
        PhotometricInterpretation=None)
    assert f"other.dcm is no picture but of the kind {words}; move it out" in (
        refused(lambda: read_dicom(tmp_path / "one")))


# 6. Series below sub-folders

@pytest.mark.parametrize("where", [
    lambda number: "DICOM/S0001", lambda number: f"part{number % 3}",
    lambda number: "" if number % 2 else "a/b/c"])
def test_a_series_below_sub_folders_is_followed(tmp_path, where):
    write_series(tmp_path / "one", CHEST, "p1")
    expected = read_dicom(tmp_path / "one")
    for number, path in enumerate(series_files(tmp_path / "one")):
        (tmp_path / "one" / where(number)).mkdir(parents=True, exist_ok=True)
        path.rename(tmp_path / "one" / where(number) / path.name)
    for name in ("__MACOSX", ".thumbs", "@eaDir"):
        (tmp_path / "one" / name).mkdir()
        (tmp_path / "one" / name / "1.dcm").write_bytes(b"no slice")
    assert np.array_equal(read_dicom(tmp_path / "one").voxels, expected.voxels)
    preview, data = imported_pair(tmp_path)
    assert "slices: 14 to 14 in a volume; 2 of 48x48 DICOM" in preview and len(data) == 2 * WITH_LUNG


@pytest.mark.parametrize("places", [("a", "b"), ("a", "a"), ("", "deep/er")])
def test_several_series_are_named_and_asked_for(tmp_path, places):
    for number, place in enumerate(places):
        folder = tmp_path / "one" / place
        folder.mkdir(parents=True, exist_ok=True)
        for index in range(3 + number):
            write_slice(
                folder / f"{number}-{index}.dcm", CHEST[index] + 1024, 2.0 * index, PatientID="p1",
                SeriesInstanceUID=f"1.2.{number}", SeriesDescription=f"Thorax {number}")
    message = refused(lambda: read_dicom(tmp_path / "one"))
    for number, place in enumerate(places):
        assert f"Thorax {number} ({3 + number} slices in {tmp_path / 'one' / place})" in message
    assert "keep each in a folder of its own, and name one of these folders as the volume" in message
    write_series(tmp_path / "three", CHEST, "p3")
    write_series(tmp_path / "two", CHEST, "p2")
    preview, data = imported(tmp_path, "one,ill,p1", "two,well,p2", "three,ill,p3")
    assert any(line.startswith("left out: one: ") and "2 different series" in line for line in preview)
    assert data.quarantine[0][0] == "one" and str(tmp_path) not in data.quarantine[0][1]


# 7. Files that are links to nothing, of another kind, or no part of the series

@pytest.mark.parametrize("absent, content", [
    ((0, 1, 2, 11, 12, 13), "annex/objects/x"), ((5,), "annex/objects/x"), ((3, 4), None)])
def test_links_to_nothing_refuse_the_volume_with_their_number(tmp_path, absent, content):
    write_series(tmp_path / "one", CHEST, "p1")
    for number, path in enumerate(series_files(tmp_path / "one")):
        if number in absent:
            path.unlink()
            path.symlink_to(content or path)   # to itself
    message = refused(lambda: read_dicom(tmp_path / "one"))
    assert f"{len(absent)} of 14 files of {tmp_path / 'one'} are links to nothing" in message
    assert "fetch them first" in message and message == refused(lambda: volume_remarks(tmp_path / "one"))
    write_series(tmp_path / "three", CHEST[::-1], "p3")
    write_series(tmp_path / "two", CHEST, "p2")
    preview, data = imported(tmp_path, "one,ill,p1", "two,well,p2", "three,ill,p3")
    assert f"left out: one: {message}" in preview and data.quarantine[0][0] == "one"


@pytest.mark.parametrize("name", [
    "VERSION", "autorun.exe", "AUTORUN.INF", "viewer.dll", "start.bat", "INDEX.HTM"])
def test_the_viewer_of_a_disc_is_passed_over(tmp_path, name):
    write_series(tmp_path / "one", CHEST, "p1")
    (tmp_path / "one" / name).write_bytes(b"MZ no slice")
    assert np.array_equal(read_dicom(tmp_path / "one").voxels, CHEST)


def test_folders_without_dicom_are_not_the_same_volume(tmp_path):
    write_series(tmp_path / "one", CHEST, "p1")
    for name, file in (("empty", None), ("pictures", "a.png"), ("packed", "scan.nii.gz")):
        (tmp_path / name).mkdir()
        if file:
            (tmp_path / name / file).write_bytes(b"\x89PNG" if name == "pictures" else b"\x1f\x8b")
    (tmp_path / "volumes.csv").write_text("volume,label\none,ill\nempty,well\npictures,well\npacked,ill\n")
    preview = understand_import(tmp_path, positive="ill").preview()
    assert not any(line.startswith("the same volume") for line in preview)
    assert sum(line.startswith("left out: ") and "has 0 DICOM slices" in line for line in preview) == 3
    assert any(line.endswith("it holds scan.nii.gz, a NIfTI volume") for line in preview)


# 8. Headers that tell of other slices than the files

def edited(root, edit):
    "Remarks on a series of which each header is changed."
    write_series(root / "one", CHEST, "p1")
    change(root / "one", edit)
    remarks = volume_remarks(root / "one")
    assert read_dicom(root / "one").remarks == remarks
    return remarks


def header(**values):
    "An edit that sets fields to functions of the slice's number."
    return lambda dataset, number: [setattr(dataset, name, value(number)) for name, value in values.items()]


DOUBTS = {
    "sparse": (header(SpacingBetweenSlices=lambda n: 1), ["2 mm apart, but their SpacingBetweenSlices is 1"]),
    "numbers": (header(InstanceNumber=lambda n: 2 * n + 1), ["numbers 1 to 27 belong to 14 slices"]),
    "descending": (header(InstanceNumber=lambda n: 99 - 3 * n), ["numbers 60 to 99 belong to 14 slices"]),
    "one gap": (header(InstanceNumber=lambda n: n + (n > 5)), ["numbers 0 to 14 belong to 14 slices"]),
    "both": (header(InstanceNumber=lambda n: 2 * n, SpacingBetweenSlices=lambda n: 1), ["apart", "belong"]),
    "alternating": (header(AcquisitionNumber=lambda n: n % 2 + 1), ["of the acquisitions 1, 2 alternate"]),
    "three scans": (header(AcquisitionNumber=lambda n: n % 3), ["of the acquisitions 0, 1, 2 alternate"]),
    "right": (header(InstanceNumber=lambda n: n, SpacingBetweenSlices=lambda n: 2), []),
    "downwards": (header(InstanceNumber=lambda n: 20 - n), []),
    "shuffled": (header(InstanceNumber=lambda n: n * 5 % 14), []),
    "zero": (header(SpacingBetweenSlices=lambda n: 0), []),
    "thick": (header(SpacingBetweenSlices=lambda n: 5), []),
    "odd": (header(SpacingBetweenSlices=lambda n: n % 2 + 0.5, AcquisitionNumber=lambda n: None), []),
    "each its own": (header(AcquisitionNumber=lambda n: n), []),
    "in turn": (header(AcquisitionNumber=lambda n: n // 7), []),
}


@pytest.mark.parametrize("name", DOUBTS)
def test_headers_that_tell_of_missing_or_of_other_slices_are_remarked(tmp_path, name):
    edit, expected = DOUBTS[name]
    remarks = edited(tmp_path, edit)
    assert len(remarks) == len(expected)
    assert all(words in remark for words, remark in zip(expected, remarks, strict=True))


def test_instance_numbers_count_a_gap_that_is_said_once(tmp_path):
    write_series(tmp_path / "one", CHEST, "p1")
    change(tmp_path / "one", header(InstanceNumber=lambda n: n + 1, SpacingBetweenSlices=lambda n: 2))
    (tmp_path / "one" / "995.dcm").unlink()
    (remark,) = volume_remarks(tmp_path / "one")
    assert remark == "slices are missing, 1 of 14: 1 between 6 and 10 mm"


@pytest.mark.parametrize("intercept", [
    lambda n: -1024 * (n % 2), lambda n: -1024 * (n > 6), lambda n: -1024 + 512 * (n % 2)])
def test_intercepts_by_which_neighbours_differ_are_refused(tmp_path, intercept):
    write_series(tmp_path / "one", CHEST, "p1")
    change(tmp_path / "one", header(RescaleIntercept=intercept))
    message = refused(lambda: read_dicom(tmp_path / "one"))
    assert "have the rescale intercepts" in message and "keep the slices of one intercept" in message


@pytest.mark.parametrize("ids, count", [
    (["AB1", "ab1"], 1), (["AB1", "AB1 ", " ab1"], 1), (["José", "Jose\u0301"], 1), (["AB1", "AB2"], 2),
    (["AB1", ""], 1), (["AB1", "unknown"], 1),
    ([str(number) for number in range(14)], 14)])
def test_spellings_of_one_patient_are_one_and_placeholders_can_be_ignored(tmp_path, ids, count):
    for name in ("one", "two"):
        write_series(tmp_path / name, CHEST[::1 if name == "one" else -1], "p2")
    change(tmp_path / "one", header(
        SpecificCharacterSet=lambda n: "ISO_IR 192", PatientID=lambda n: ids[n % len(ids)]))
    read_dicom(tmp_path / "one", ignore_patient_id=True)
    assert len(volume_remarks(tmp_path / "one")) == (count > 1)
    if count > 1:
        message = refused(lambda: read_dicom(tmp_path / "one"))
        assert f"has {count} different PatientID: " in message and "say --ignore-patient-id" in message
    else:
        assert read_dicom(tmp_path / "one").patient in ids
    (tmp_path / "volumes.csv").write_text("volume,label\none,ill\ntwo,well\n")
    what = understand_import(tmp_path, positive="ill", ignore_patient_id=True)
    assert not any(line.startswith("left out:") for line in what.preview())
    import_images(what, tmp_path / "set.zip", size=32)
    assert read_pack(tmp_path / "set.zip", "set").quarantine == ()


def test_pixels_that_are_not_square_are_said_in_the_preview(tmp_path):
    write_series(tmp_path / "one", CHEST, "p1")
    change(tmp_path / "one", header(PixelSpacing=lambda n: [0.7, 1.9]))
    message = refused(lambda: volume_remarks(tmp_path / "one"))
    assert "with nearly square pixels" in message and message == refused(lambda: read_dicom(tmp_path / "one"))
