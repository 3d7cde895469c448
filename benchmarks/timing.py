"""Shared by the benchmarks: time a call, describe the machine, name the file of the results."""
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

from thesis_ltc.core.files import repository
from thesis_ltc.core.provenance import device_name


def call_seconds(call: Callable[[], object], device: str) -> float:
    "Seconds of one call; on a GPU, until its kernels have finished."
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - began


def environment(device: str) -> dict[str, str | int | None]:
    "The hardware and the versions of Python and torch."
    return {
        "device": device_name(device),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }


def result_path(name: str, device: str) -> Path:
    "The file of a benchmark's results: results/benchmarks/NAME.json, or NAME-gpu.json."
    suffix = "" if device == "cpu" else "-gpu"
    return repository() / "results" / "benchmarks" / f"{name}{suffix}.json"
