"""Decoded sets are kept as long as the readers do the same, and made anew when they do something else."""
import types

import numpy as np
import pytest
from PIL import Image

from thesis_ltc.data import decode, folders, imageset, load, preview, sources, splits


@pytest.fixture
def scans(tmp_path, monkeypatch):
    "A folder of two classes with four pictures each, and an empty cache."
    monkeypatch.setenv("THESIS_LTC_CACHE", str(tmp_path / "cache"))
    for number in range(8):
        path = tmp_path / "scans" / ("well", "ill")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.arange(300, dtype=np.uint8).reshape(15, 20) + number).save(path)
    yield tmp_path / "scans"
    sources.reader_digest.cache_clear()


def stored(tmp_path):
    "Names of the stored sets."
    return {path.name for path in (tmp_path / "cache" / "imagesets").iterdir() if path.is_dir()}


def forget():
    "As if a new process began."
    sources.reader_digest.cache_clear()


def reworded(function):
    "The same function under another name, with another docstring, from other lines."
    code = function.__code__.replace(co_firstlineno=1, co_name="other", co_filename="moved.py")
    other = types.FunctionType(code, function.__globals__, "other", function.__defaults__)
    other.__doc__ = "Something else."
    return other


def test_rewording_keeps_a_stored_set(scans, tmp_path, monkeypatch):
    first = load("scans", scans)
    for module in (decode, imageset, splits, sources):
        monkeypatch.setattr(module, "__doc__", "other words")
        monkeypatch.setattr(module, "__file__", str(tmp_path / "moved.py"))
    for name in ("resize", "to_grey", "scaled", "white_of", "range_of", "decode_stream", "refuse_header"):
        monkeypatch.setattr(decode, name, reworded(getattr(decode, name)))
    monkeypatch.setattr(sources, "decode_files", lambda *arguments: pytest.fail("decoded again"))
    forget()
    assert load("scans", scans).digest == first.digest
    assert len(stored(tmp_path)) == 1


@pytest.mark.parametrize("name, other", [
    ("resize", lambda image, size: np.full((size, size), 7, np.uint8)),
    ("to_grey", lambda image, whites=None: np.asarray(image.convert("L"))),
    ("white_of", lambda *arguments: 65_535.0),
])
def test_another_decoder_makes_the_set_anew(scans, tmp_path, monkeypatch, name, other):
    load("scans", scans)
    monkeypatch.setattr(decode, name, other)
    forget()
    again = load("scans", scans)
    assert len(stored(tmp_path)) == 2
    if name == "resize":
        assert (again.images == 7).all()


def test_another_order_of_rows_or_another_validation_part_makes_sets_anew(monkeypatch):
    before = sources.reader_digest.__wrapped__()
    with monkeypatch.context() as changed:
        changed.setattr(sources, "stratified_order", lambda labels, stream: np.arange(len(labels)))
        held = sources.reader_digest.__wrapped__()
    with monkeypatch.context() as changed:
        changed.setattr(sources, "key", lambda seed, name: seed)
        order = sources.reader_digest.__wrapped__()
    assert len({before, held, order}) == 3 and sources.reader_digest.__wrapped__() == before


def test_another_format_makes_the_set_anew(scans, tmp_path, monkeypatch):
    load("scans", scans)
    monkeypatch.setattr(sources, "FORMAT", sources.FORMAT + 1)
    load("scans", scans)
    assert len(stored(tmp_path)) == 2


def test_changed_files_make_the_set_anew(scans, tmp_path):
    first = load("scans", scans)
    Image.new("L", (20, 15), 200).save(scans / "ill" / "1.png")
    assert load("scans", scans).digest != first.digest
    (scans / "ill" / "notes.txt").write_text("coughs")
    assert load("scans", scans).quarantine[0][0] == "ill/notes.txt"
    assert len(stored(tmp_path)) == 3


def test_the_readers_are_probed_once_a_process(scans, monkeypatch):
    load("scans", scans)
    monkeypatch.setattr(sources, "decode_probes", lambda: pytest.fail("probed again"))
    load("scans", scans)


def deep_scans(place, *highest, dtype=np.uint16, letters=None):
    "A folder of two classes with four pictures of more than 8 bits each, one highest value for each class."
    for label, level in zip(("well", "ill"), highest, strict=True):
        (place / label).mkdir(parents=True)
        for number in range(4):
            pixels = (np.random.default_rng(number).random((30, 30)) * level).astype(dtype)
            pixels[-1] = level
            if letters and (label, number) == ("ill", 1):
                pixels[0, :3] = letters
            Image.fromarray(pixels).save(place / label / f"{number}.tif")
    return folders.understand(place)


@pytest.mark.parametrize("highest, dtype, letters, words", [
    ((60_000, 4095), np.uint16, None, ("4 of 12 bits (highest value 4,095, as in ill/0.tif)", "4 of 15")),
    ((255, 1), np.float32, None, ("4 from 0 to 1 (highest value 1, as in ill/0.tif)", "4 from 0 to 255")),
    ((60_000, 6000), np.uint16, None, ("4 of 13 or 14 bits", "as in ill/0.tif)", "4 of 15 or 16 bits")),
    ((4095, 4095), np.uint16, 65_535, ("8 of 12 bits", "few pixels of 1, up to 65,535 in ill/1.tif")),
])
def test_no_class_is_darkened_without_a_word(tmp_path, highest, dtype, letters, words):
    found = deep_scans(tmp_path, *highest, dtype=dtype, letters=letters)
    remark = next(line for line in preview.preview(found) if "bits are left out" in line)
    assert all(word in remark for word in words) and "say which is white, with --white VALUE" in remark
    with pytest.raises(sources.DataError, match="say which is white, with --white VALUE"):
        sources.read_image_folder("scans", found, 32)
    data = sources.read_image_folder("scans", found, 32, white=max(highest))
    assert len(data) == 8
    dark = any("4 of 8" in note and "fewer than 32 of 256 grey levels" in note for note in data.notes)
    assert dark == (max(highest) > 8 * min(highest))


def test_a_picture_without_numbers_is_left_out_alone_in_any_order(tmp_path):
    found = deep_scans(tmp_path, 1, 1, dtype=np.float32)
    whole = sources.read_image_folder("scans", found, 32)
    for number, wrong in enumerate((np.nan, np.inf, -np.inf)):
        pixels = np.full((30, 30), 0.5, np.float32)
        pixels[number, 4] = wrong
        Image.fromarray(pixels).save(tmp_path / "well" / f"{'09b'[number]}{number}.tif")
    data = sources.read_image_folder("scans", folders.understand(tmp_path), 32)
    assert len(data.quarantine) == 3 and all("no numbers" in reason for _, reason in data.quarantine)
    assert (data.images == whole.images).all() and "is 1, for all of them" in data.notes[-1]
