"""Decoded sets are kept as long as the readers do the same, and made anew when they do something else."""
import types

import numpy as np
import pytest
from PIL import Image

from thesis_ltc.data import decode, imageset, load, sources, splits


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
    for name in ("resize", "to_grey", "scaled", "white_of", "decode_stream", "refuse_header"):
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
