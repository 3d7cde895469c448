"""The drawings in figures/ are those that the code draws."""
from conftest import ROOT

from thesis_ltc.book.drawings import save_figures


def test_the_drawings_are_in_step(tmp_path):
    for path in save_figures(tmp_path):
        kept = ROOT / "figures" / path.name
        assert kept.read_bytes() == path.read_bytes(), f"{path.name} is out of step; run `make figures`"


def test_nothing_else_is_drawn(tmp_path):
    kept = {path.name for path in (ROOT / "figures").glob("*.svg")}
    assert kept == {path.name for path in save_figures(tmp_path)}
