"""DICOM files of real patients against NIfTI files that somebody else made of them."""
import csv
import os
from pathlib import Path

import numpy as np
import pytest

from thesis_ltc.data.decode import resize
from thesis_ltc.data.dicom import read_dicom
from thesis_ltc.data.slices import marked_slices
from thesis_ltc.data.volumes import grey_levels, read_nifti

DATA = Path(os.environ.get("THESIS_LTC_DATA") or "/nowhere")
SAMPLE = DATA / "covid-ct-md-sample"
PATIENTS = sorted(path.name for path in (SAMPLE / "dicom").glob("*")) if SAMPLE.is_dir() else []


def correlation(first, second):
    return np.corrcoef(first.ravel(), second.ravel())[0, 1]


@pytest.mark.skipif(not PATIENTS, reason="THESIS_LTC_DATA has no covid-ct-md-sample")
@pytest.mark.parametrize("patient", PATIENTS)
def test_a_dicom_slice_equals_the_nifti_slice_at_its_height_and_none_beside_it(patient):
    rows = [row for row in csv.DictReader((SAMPLE / "slices.csv").open()) if row["patient"] == patient][::-1]
    heights = np.array([float(row["slice_location_mm"]) for row in rows])   # from the feet to the head
    nifti = read_nifti(SAMPLE / "nii" / f"{patient}_128.nii.gz")
    labels = (SAMPLE / "nii" / f"{patient}_slice_labels_zascending.txt").read_text().split()
    assert [int(label) for label in labels] == [int(float(row["slice_label_infection"])) for row in rows]
    pictures = grey_levels(nifti)
    assert len(pictures) == len(rows)
    series = read_dicom(SAMPLE / "dicom" / patient)
    assert len(series.positions) > 10
    for position, picture in zip(series.positions, grey_levels(series), strict=True):
        picture = resize(picture, 128)
        at = int(np.flatnonzero(heights == position)[0])
        beside = at + 1 if at + 1 < len(rows) else at - 1
        assert correlation(picture, pictures[at]) > 0.9995 > correlation(picture, pictures[beside])


@pytest.mark.skipif(not (DATA / "mosmed-masks").is_dir(), reason="THESIS_LTC_DATA has no mosmed-masks")
def test_the_masks_of_mosmed_mark_as_many_slices_as_the_report_has():
    masks = sorted((DATA / "mosmed-masks").glob("*_mask.nii.gz"))
    assert len(masks) == 50
    assert sum(int(marked_slices(read_nifti(path)).sum()) for path in masks) == 785
