"""Compare augmentation of a whole batch with torchvision v2 sample by sample, and with a training step.

    python benchmarks/augmentation.py [--rounds 15] [--batch 64] [--image-size 224]

All calls take turns in one process; the machine must be quiet. Medians and quartiles, with the device and the
versions, are written to results/benchmarks/augmentation.json. The book shows them.
"""
import argparse
from collections.abc import Callable, Mapping

import numpy as np
import torch
import torchvision
from timing import call_seconds, environment, result_path
from torchvision.transforms import v2

from thesis_ltc.core.files import write_json
from thesis_ltc.core.streams import generator
from thesis_ltc.data.augment import Augmentation, preprocess
from thesis_ltc.heads import classifier
from thesis_ltc.training.objective import OBJECTIVES
from thesis_ltc.training.recipe import resolve_precision

WARM_UP = 2   # rounds that are not measured


def torchvision_v2(image_size: int) -> v2.Compose:
    "The report's augmentation as transforms of torchvision, for one image (1, H, W) of uint8."
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
    "A function that takes one step of the whole network `fc` on one batch."
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


def measure(calls: Mapping[str, Callable[[], object]], rounds: int) -> list[dict[str, float | str]]:
    "Quartiles of the seconds of each call; the calls take turns."
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + WARM_UP):
        for name, call in calls.items():
            duration = call_seconds(call, "cpu")
            if number >= WARM_UP:
                seconds[name].append(duration)
    rows = []
    for name, values in seconds.items():
        low, median, high = np.quantile(values, (0.25, 0.5, 0.75)).round(5).tolist()
        rows.append({"what": name, "low": low, "median": median, "high": high})
    return rows


def measure_batch(size: int, image_size: int, rounds: int) -> list[dict[str, float | str]]:
    "One row each for our augmentation, torchvision's, and a training step, on one batch."
    torch.manual_seed(0)
    images = torch.randint(0, 256, (size, 1, 256, 256), dtype=torch.uint8)
    precision = resolve_precision("auto", "cpu")
    stream = generator(0, "benchmark")
    ours = Augmentation(image_size)
    theirs = torchvision_v2(image_size)
    return measure({
        "augmentation, the whole batch at once": lambda: ours(images, stream),
        "torchvision v2, sample by sample": lambda: [theirs(image) for image in images],
        f"training step of fc at full width, {precision}": training_step(images, image_size, precision),
    }, rounds)


def show(rows: list[dict[str, float | str]]) -> None:
    "Print a line for each row, in milliseconds."
    for row in rows:
        low, median, high = (f"{1e3 * row[name]:.1f}" for name in ("low", "median", "high"))
        print(f"{row['what']:45} {median:>8} ms  ({low} to {high})")


def parse_arguments() -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--image-size", type=int, default=224)
    return parser.parse_args()


def main() -> None:
    given = parse_arguments()
    rows = measure_batch(given.batch, given.image_size, given.rounds)
    augmentation, peer, training = (row["median"] for row in rows)
    times, share = peer / augmentation, augmentation / training
    path = result_path("augmentation", "cpu")
    write_json(path, {
        "batch": given.batch,
        "image_size": given.image_size,
        "rounds": given.rounds,
        "threads": torch.get_num_threads(),
        **environment("cpu"),
        "torchvision": str(torchvision.__version__),
        "rows": rows,
        "times_faster_than_torchvision": round(times, 2),
        "share_of_a_training_step": round(share, 4),
    })
    show(rows)
    print(f"{times:.1f} times as fast as torchvision; {share:.1%} of a training step\nwritten: {path}")


if __name__ == "__main__":
    main()
