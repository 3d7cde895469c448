"""Time the training of CRNet in processes whose C library was told to keep its memory, and in others.

    python benchmarks/allocator.py [--image-size 136] [--width 0.25] [--images 1500] [--epochs 2] [--pairs 3]

Each run has a process of its own, and told and untold ones take turns. Noise is trained on, and augmented as
the report does. Images a second, user and system time, page faults, peak memory and a digest of the trained
weights are written to results/benchmarks/allocator.json.
"""
import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timing import environment, result_path

from thesis_ltc.core.files import write_json
from thesis_ltc.core.processes import keep_memory, usable_cores
from thesis_ltc.core.provenance import capability, digest
from thesis_ltc.core.streams import generator
from thesis_ltc.data.imageset import ImageSet
from thesis_ltc.heads import classifier
from thesis_ltc.training import Recipe, Training, fit_all, reproducible

VALIDATION = 64   # images, as many for the test
STORED = 150      # pixels of a stored side


def noise(images: int) -> ImageSet:
    "So many training images of two classes, and some for validation and test."
    rows = images + 2 * VALIDATION
    size, stream = (rows, 1, STORED, STORED), generator(0, "noise")
    pixels = torch.randint(0, 256, size, dtype=torch.uint8, generator=stream)
    names = np.array([f"{row}" for row in range(rows)])
    split = np.repeat(["train", "val", "test"], [images, VALIDATION, VALIDATION])
    return ImageSet(
        name="noise", images=pixels.numpy(), labels=np.arange(rows) % 2, patients=names, names=names,
        sources=np.full(rows, "noise"), split=split, classes=["even", "odd"], licence="made up",
        publishable=True)


def train(given: argparse.Namespace) -> dict[str, Any]:
    "Train in this process; what it took."
    told = keep_memory() if given.run == "told" else False
    threads, data = usable_cores(), noise(given.images)
    recipe = Recipe(
        "bce-dice", 64, 1e-4, given.epochs, given.epochs, given.image_size, 0, "cpu", "float32", threads)
    before = resource.getrusage(resource.RUSAGE_SELF)
    with tempfile.TemporaryDirectory() as folder, reproducible(threads):
        model = classifier("fc", 2, given.image_size, width=given.width, seed=0)
        training = Training(model.to(memory_format=torch.channels_last), recipe, Path(folder))
        fit_all([training], data)
    after = resource.getrusage(resource.RUSAGE_SELF)
    seconds = sum(row["train_seconds"] for row in training.history)
    return {
        "told": told, "images_per_second": given.images * given.epochs / seconds,
        "user_seconds": after.ru_utime - before.ru_utime, "system_seconds": after.ru_stime - before.ru_stime,
        "page_faults": after.ru_minflt - before.ru_minflt, "peak_memory_bytes": 1024 * after.ru_maxrss,
        "load": os.getloadavg()[0], "weights": digest(model.state_dict())}


def in_process(run: str, arguments: list[str]) -> dict[str, Any]:
    "What `train` says in a process of its own."
    command = [sys.executable, __file__, *arguments, "--run", run]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"{run}: {found['images_per_second']:.0f} images/s, {found['system_seconds']:.1f} s system time, "
          f"{found['user_seconds']:.1f} s user time, {found['page_faults']:,} page faults", flush=True)
    return found


def compare(given: argparse.Namespace, arguments: list[str]) -> dict[str, Any]:
    "The runs in turns, and the median ratio of each pair; the trained weights must have the same bits."
    pairs = [[in_process(run, arguments) for run in ("untold", "told")] for _ in range(given.pairs)]
    runs = [run for pair in pairs for run in pair]
    if len({run["weights"] for run in runs}) > 1:
        raise SystemExit("the weights differ: the allocator changed what is computed")
    ratios = [told["images_per_second"] / untold["images_per_second"] for untold, told in pairs]
    of_cpu = [cpu_seconds(untold) / cpu_seconds(told) for untold, told in pairs]
    print(f"{statistics.median(ratios):.2f} times the images a second, {statistics.median(of_cpu):.2f} times "
          f"the images a second of CPU time (medians of {len(ratios)} pairs)")
    return {"ratios": ratios, "cpu_ratios": of_cpu, "runs": runs}


def cpu_seconds(run: dict[str, Any]) -> float:
    "User and system time: what a run costs, also where other processes wait for the same cores."
    return run["user_seconds"] + run["system_seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image-size", type=int, default=136)
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--images", type=int, default=1500)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--run", choices=("told", "untold"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run:
        print(json.dumps(train(given)))
        return
    settings = {name: value for name, value in vars(given).items() if name != "run"}
    found = compare(given, sys.argv[1:])
    machine = environment("cpu") | {"threads": usable_cores(), "capability": capability("cpu")}
    write_json(result_path("allocator", "cpu"), machine | settings | found)


if __name__ == "__main__":
    main()
