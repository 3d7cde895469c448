"""Augmentation of a whole batch beside torchvision v2 sample by sample, and beside a training step.

    python benchmarks/augmentation.py [--rounds 15] [--batch 64]

All are measured in turn in one process, on a quiet machine; the medians and quartiles, with device and versions, go to
results/benchmarks/augmentation.json; the book shows them.
"""
import argparse
import os
import platform
import time

import numpy as np
import torch
import torchvision
from torchvision.transforms import v2

from thesis_ltc.data.augment import Augmentation, prepare
from thesis_ltc.core.files import repository, write_json
from thesis_ltc.heads import classifier
from thesis_ltc.training.objective import OBJECTIVES
from thesis_ltc.core.streams import generator
from thesis_ltc.training import resolve_precision


def torchvision_v2(image_size: int) -> v2.Compose:
    "The report's list in torchvision's terms, for a single image (1, H, W) uint8."
    return v2.Compose([
        v2.Resize(round(image_size * 256 / 224)), v2.RandomResizedCrop(image_size, scale=(0.8, 1.0), ratio=(3 / 4, 4 / 3)), v2.RandomHorizontalFlip(0.5),
        v2.RandomApply([v2.RandomRotation(15, interpolation=v2.InterpolationMode.BILINEAR)]), v2.ToDtype(torch.float32, scale=True),
        v2.RandomApply([v2.GaussianNoise(sigma=0.02)]), v2.RandomApply([v2.RandomChoice([v2.GaussianBlur(side) for side in (3, 5, 7)])]),
        v2.RandomApply([v2.ColorJitter(brightness=0.2, contrast=0.2)]),
    ])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--image-size", type=int, default=224)
    given = parser.parse_args()
    torch.manual_seed(0)
    images = torch.randint(0, 256, (given.batch, 1, 256, 256), dtype=torch.uint8)
    ours, theirs, stream = Augmentation(given.image_size), torchvision_v2(given.image_size), generator(0, "benchmark")
    model = classifier("fc", image_size=given.image_size, seed=0).to(memory_format=torch.channels_last)
    optimiser, labels, precision = torch.optim.Adam(model.parameters()), torch.arange(given.batch) % 2, resolve_precision("auto", "cpu")
    pictures = prepare(images, given.image_size).to(memory_format=torch.channels_last)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            outputs = model(pictures)
        optimiser.zero_grad()
        OBJECTIVES["bce-dice"](outputs.float(), labels).backward()
        optimiser.step()

    jobs = {
        "augmentation, the whole batch at once": lambda: ours(images, stream), "torchvision v2, sample by sample": lambda: [theirs(image) for image in images],
        f"training step of fc at full width, {precision}": step,
    }
    seconds = {name: [] for name in jobs}
    for number in range(given.rounds + 2):  # two to warm up
        for name, job in jobs.items():
            began = time.perf_counter()
            job()
            if number > 1:
                seconds[name].append(time.perf_counter() - began)
    rows = [{"what": name, **dict(zip(("low", "median", "high"), np.quantile(values, (0.25, 0.5, 0.75)).round(5).tolist()))} for name, values in seconds.items()]
    mine, peer, training = (row["median"] for row in rows)
    found = {
        "batch": given.batch, "image_size": given.image_size, "rounds": given.rounds, "threads": torch.get_num_threads(), "cores": os.cpu_count(),
        "device": torch.cpu.get_capabilities()["cpu_name"], "python": platform.python_version(), "torch": str(torch.__version__), "torchvision": str(torchvision.__version__),
        "rows": rows, "times_faster_than_torchvision": round(peer / mine, 2), "share_of_a_training_step": round(mine / training, 4),
    }
    path = repository() / "results" / "benchmarks" / "augmentation.json"
    write_json(path, found)
    for row in rows:
        print(f"{row['what']:45} {1e3 * row['median']:8.1f} ms  ({1e3 * row['low']:.1f} to {1e3 * row['high']:.1f})")
    print(f"{peer / mine:.1f} times as fast as torchvision; {mine / training:.1%} of a training step\nwritten: {path}")


if __name__ == "__main__":
    main()
