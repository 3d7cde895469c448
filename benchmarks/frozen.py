"""Time a study of one head on a frozen trunk, from images to records, and its training with ncps.

    python benchmarks/frozen.py [--data NAME] [--head ncp-z] [--image-size 136] [--seeds 20] [--epochs 100]
                                [--width 1.0] [--trunk DIR]

The data are covid-ct where THESIS_LTC_DATA has them, else digits. Without a trunk, a whole network is first
trained for 12 epochs, which is not timed. Timed are the trunk's maps, the training of all seeds, their tests
and records. Seconds are written to results/benchmarks/frozen.json (on a GPU: frozen-gpu.json). The book shows
them.
"""
import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from steps import with_ncps
from timing import environment, result_path

from thesis_ltc.core.files import write_json
from thesis_ltc.data.imageset import ImageSet
from thesis_ltc.study import Experiment, run, run_seeds
from thesis_ltc.study.experiment import build_model, recipe_of, resolved
from thesis_ltc.study.runs import load_images
from thesis_ltc.training import (
    Images,
    Training,
    features_of,
    fit_all,
    read_trunk,
    reproducible,
)


def silent(history: list) -> None:
    "Show no progress."


@contextmanager
def stopwatch(seconds: dict[str, float], name: str) -> Iterator[None]:
    "Store the seconds that the block takes under a name, and print them."
    began = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - began
    print(f"{name} {seconds[name]:.1f} s", flush=True)


def frozen_experiment(given: argparse.Namespace, data: ImageSet, folder: str) -> Experiment:
    "The experiment on its trunk; without --trunk the trunk is trained first."
    whole = Experiment(data=given.data, head="fc", image_size=given.image_size, width=given.width, epochs=12)
    trunk = given.trunk
    if trunk is None:
        trunk = str(Path(folder) / run(whole, 0, folder, data=data, echo=silent)["id"] / "seed0")
    experiment = replace(whole, head=given.head, trunk=trunk, epochs=given.epochs, patience=given.epochs)
    return resolved(experiment)


def maps_of(experiment: Experiment, data: ImageSet, folder: str) -> Images:
    "The trunk's maps, pooled for the head and saved where `run_seeds` looks for them."
    head = build_model(experiment, len(data.classes), 0).head
    recipe, place = recipe_of(experiment, 0), Path(folder) / "features"
    with reproducible(experiment.threads):
        return features_of(read_trunk(experiment.trunk), data, recipe, experiment.passes, place, head=head)


def train_with_ncps(experiment: Experiment, data: ImageSet, inputs: Images, seeds: int, folder: str) -> None:
    "Train the seeds one after another, with circuits computed by ncps."
    for seed in range(seeds):
        place = Path(folder) / "ncps" / str(seed)
        place.mkdir(parents=True)
        network = with_ncps(build_model(experiment, len(data.classes), seed)).head.without_pooling()
        fit_all([Training(network, recipe_of(experiment, seed), place)], data, inputs=inputs)


def time_study(given: argparse.Namespace, data: ImageSet) -> tuple[Experiment, dict[str, float]]:
    "Run the study; returns its experiment and the seconds of its parts."
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        experiment = frozen_experiment(given, data, folder)
        with stopwatch(seconds, "all"):
            with stopwatch(seconds, "maps"):
                inputs = maps_of(experiment, data, folder)
            records = run_seeds(experiment, list(range(given.seeds)), folder, data=data, echo=silent)
        with stopwatch(seconds, "training with ncps"), reproducible(experiment.threads):
            train_with_ncps(experiment, data, inputs, given.seeds, folder)
    seconds["training"] = sum(record["seconds"] for record in records.values())
    return experiment, seconds


def measure(given: argparse.Namespace) -> tuple[dict[str, Any], str]:
    "The measurement as it is written, and the device."
    data = load_images(Experiment(data=given.data, image_size=given.image_size))
    experiment, seconds = time_study(given, data)
    return {
        "data": given.data,
        "images": len(data),
        "head": given.head,
        "image_size": given.image_size,
        "width": given.width,
        "seeds": given.seeds,
        "epochs": given.epochs,
        "passes": experiment.passes,
        "seconds_of_maps": round(seconds["maps"], 1),
        "seconds_of_training": round(seconds["training"], 1),
        "seconds": round(seconds["all"], 1),
        "seconds_of_training_with_ncps": round(seconds["training with ncps"], 1),
        **environment(experiment.device),
        "threads": experiment.threads,
        "ncps": version("ncps"),
    }, experiment.device


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    has_covid = (Path(os.environ.get("THESIS_LTC_DATA", "")) / "covid-ct").is_dir()
    defaults = {"data": "covid-ct" if has_covid else "digits", "head": "ncp-z"}
    defaults |= {"image-size": 136, "width": 1.0, "seeds": 20, "epochs": 100}
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--trunk", help="directory of a finished run")
    measured, device = measure(parser.parse_args())
    path = result_path("frozen", device)
    write_json(path, measured)
    print(measured, f"written: {path}", sep="\n")


if __name__ == "__main__":
    main()
