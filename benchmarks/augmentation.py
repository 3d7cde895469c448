"""Augmentation of a whole batch beside torchvision v2 sample by sample, and beside a training step.

    python benchmarks/augmentation.py [--rounds 15] [--batch 64]

All are measured in turn in one process, on a quiet machine. Medians and quartiles, with device and versions,
go to results/benchmarks/augmentation.json, which the book shows.
"""
import argparse
import os
import platform
import time
from collections.abc import Callable, Mapping

import numpy as np
import torch
import torchvision
from torchvision.transforms import v2

from thesis_ltc.core.files import repository, write_json
from thesis_ltc.core.streams import generator
from thesis_ltc.data.augment import Augmentation, preprocess
from thesis_ltc.heads import classifier
from thesis_ltc.training.recipe import resolve_precision
from thesis_ltc.training.objective import OBJECTIVES

WARM_UP = 2   # rounds that are not measured


def torchvision_v2(image_size: int) -> v2.Compose:
    "The report's list in torchvision's terms, for a single image (1, H, W) uint8."
    bilinear = v2.InterpolationMode.BILINEAR
    blurs = [v2.GaussianBlur(side) for side in (3, 5, 7)]
    return v2.Compose([
        v2.Resize(round(image_size * 256 / 224)),
        v2.RandomResizedCrop(image_size, scale=(0.8, 1.0), ratio=(3 / 4, 4 / 3)),
        v2.RandomHorizontalFlip(0.5),
        v2.RandomApply([v2.RandomRotation(15, interpolation=bilinear)]),
        v2.ToDtype(torch.float32, scale=True),
        v2.RandomApply([v2.GaussianNoise(sigma=0.02)]),
        v2.RandomApply([v2.RandomChoice(blurs)]),
        v2.RandomApply([v2.ColorJitter(brightness=0.2, contrast=0.2)]),
    ])


def training_step(images: torch.Tensor, image_size: int, precision: str) -> Callable[[], None]:
    "A function that trains the full network with fully connected layers on one batch."
    model = classifier("fc", image_size=image_size, seed=0).to(memory_format=torch.channels_last)
    optimiser = torch.optim.Adam(model.parameters())
    labels = torch.arange(len(images)) % 2
    pixels = preprocess(images, image_size).to(memory_format=torch.channels_last)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            outputs = model(pixels)
        optimiser.zero_grad()
        OBJECTIVES["bce-dice"](outputs.float(), labels).backward()
        optimiser.step()

    return step


def measure(jobs: Mapping[str, Callable[[], object]], rounds: int) -> list[dict[str, float | str]]:
    "Quartiles of each job's seconds; the jobs take turns."
    seconds = {name: [] for name in jobs}
    for number in range(rounds + WARM_UP):
        for name, job in jobs.items():
            began = time.perf_counter()
            job()
            if number >= WARM_UP:
                seconds[name].append(time.perf_counter() - began)
    rows = []
    for name, values in seconds.items():
        low, median, high = np.quantile(values, (0.25, 0.5, 0.75)).round(5).tolist()
        rows.append({"what": name, "low": low, "median": median, "high": high})
    return rows


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--rounds", type=int, default=15)
    words.add_argument("--batch", type=int, default=64)
    words.add_argument("--image-size", type=int, default=224)
    options = words.parse_args()
    torch.manual_seed(0)
    images = torch.randint(0, 256, (options.batch, 1, 256, 256), dtype=torch.uint8)
    precision = resolve_precision("auto", "cpu")
    stream = generator(0, "benchmark")
    ours = Augmentation(options.image_size)
    theirs = torchvision_v2(options.image_size)
    step = training_step(images, options.image_size, precision)
    rows = measure({
        "augmentation, the whole batch at once": lambda: ours(images, stream),
        "torchvision v2, sample by sample": lambda: [theirs(image) for image in images],
        f"training step of fc at full width, {precision}": step,
    }, options.rounds)
    augmentation, peer, training = (row["median"] for row in rows)
    path = repository() / "results" / "benchmarks" / "augmentation.json"
    write_json(path, {
        "batch": options.batch,
        "image_size": options.image_size,
        "rounds": options.rounds,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "device": torch.cpu.get_capabilities()["cpu_name"],
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        "rows": rows,
        "times_faster_than_torchvision": round(peer / augmentation, 2),
        "share_of_a_training_step": round(augmentation / training, 4),
    })
    for row in rows:
        low, median, high = (f"{1e3 * row[name]:.1f}" for name in ("low", "median", "high"))
        print(f"{row['what']:45} {median:>8} ms  ({low} to {high})")
    times, share = peer / augmentation, augmentation / training
    print(f"{times:.1f} times as fast as torchvision; {share:.1%} of a training step\nwritten: {path}")


if __name__ == "__main__":
    main()
