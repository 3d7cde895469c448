"""What the tests share: the repository's root, a tiny experiment, and where real data lies."""
import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from thesis_ltc.core.files import read_lines, write_json, write_lines
from thesis_ltc.study.crate import RECORDS
from thesis_ltc.study.shelf import Shelf

ROOT = Path(__file__).resolve().parents[1]
TINY = {
    "data": "digits", "head": "ncp-z", "image_size": 136, "width": 0.125, "limit": 40, "batch_size": 20,
    "threads": 1, "precision": "float32",
}


@pytest.fixture(autouse=True)
def seeded() -> None:
    "Torch seeds its generator anew in each process; a test draws the same numbers each time."
    torch.manual_seed(0)


@pytest.fixture
def root() -> Path:
    return ROOT


@pytest.fixture
def real_data() -> Path:
    "The folder of real image sets; skips where there is none."
    folder = os.environ.get("THESIS_LTC_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("THESIS_LTC_DATA names no folder of real images")
    return Path(folder)


@pytest.fixture(scope="module")
def processes():
    "Processes forked from one that has imported the package: torch is loaded once, not at every start."
    context = multiprocessing.get_context("forkserver")
    studies = ["thesis_ltc.study.runs", "thesis_ltc.study.shelf"]
    context.set_forkserver_preload([*studies, "sklearn.datasets", "pandas"])
    return context


def change_lines(path: Path, change: Callable[[list[str]], list[str]]) -> None:
    "Rewrite the lines of a compressed file, such as the records of a published study."
    write_lines(path, change([line.decode() for line in read_lines(path)]))


def unpack_run(study: str, line: int, runs: Path) -> Path:
    "The folder of a run as it was before its study was published, but for weights and predictions."
    shelf = Shelf(ROOT / "results" / study)
    record = json.loads(read_lines(shelf.folder / RECORDS)[line])
    folder = runs / record["id"] / f"seed{record['seed']}"
    write_json(folder / "record.json", record)
    shelf.history(record["id"], record["seed"]).to_csv(folder / "history.csv", index=False)
    return folder
