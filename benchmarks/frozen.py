"""A study of one head on a frozen trunk, from images to records, and its training once more with circuits computed by ncps.

    python benchmarks/frozen.py [--data NAME] [--head ncp-z] [--image-size 136] [--seeds 20] [--epochs 100] [--trunk DIR]

The data are covid-ct where THESIS_LTC_DATA has them, else digits. Without a trunk, a whole network is trained for 12 epochs
first, which isn't counted. All of the rest is: the trunk's maps, the training of all seeds, tests and records. Seconds go to
results/benchmarks/frozen.json (on a GPU: frozen-gpu.json), and the book shows them.
"""
import argparse
import os
import platform
import tempfile
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
from steps import with_ncps

from thesis_ltc.study.experiment import Experiment, build_model, recipe_of, resolved
from thesis_ltc.study.run import load_images, run, run_seeds
from thesis_ltc.training.trunk import features_of, read_trunk
from thesis_ltc.core.files import repository, write_json
from thesis_ltc.training.loop import Training, fit_all
from thesis_ltc.training.recipe import reproducible


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    there = Path(os.environ.get("THESIS_LTC_DATA", "")) / "covid-ct"
    for name, value in (("data", "covid-ct" if there.is_dir() else "digits"), ("head", "ncp-z"), ("image-size", 136), ("width", 1.0), ("seeds", 20), ("epochs", 100)):
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--trunk", help="directory of a finished run")
    given = parser.parse_args()
    whole = Experiment(data=given.data, head="fc", image_size=given.image_size, width=given.width, epochs=12)
    data, quiet = load_images(whole), lambda history: None
    with tempfile.TemporaryDirectory() as folder:
        trunk = given.trunk or str(Path(folder) / run(whole, 0, folder, data=data, echo=quiet)["id"] / "seed0")
        experiment = resolved(replace(whole, head=given.head, trunk=trunk, epochs=given.epochs, patience=given.epochs))
        began = time.perf_counter()
        with reproducible(experiment.threads):
            inputs = features_of(read_trunk(trunk), data, recipe_of(experiment, 0), experiment.passes, Path(folder) / "features", head=build_model(experiment, len(data.classes), 0).head)
        maps = time.perf_counter() - began
        found = run_seeds(experiment, list(range(given.seeds)), folder, data=data, echo=quiet)
        ours = time.perf_counter() - began
        print(f"maps {maps:.1f} s, all {ours:.1f} s", flush=True)
        with reproducible(experiment.threads):
            began = time.perf_counter()
            for seed in range(given.seeds):
                place = Path(folder) / "ncps" / str(seed)
                place.mkdir(parents=True)
                fit_all([Training(with_ncps(build_model(experiment, len(data.classes), seed)).head.without_pooling(), recipe_of(experiment, seed), place)], data, inputs=inputs)
            theirs = time.perf_counter() - began
    measured = {
        "data": given.data, "images": len(data), "head": given.head, "image_size": given.image_size, "width": given.width, "seeds": given.seeds, "epochs": given.epochs, "passes": experiment.passes,
        "seconds_of_maps": round(maps, 1), "seconds_of_training": round(sum(record["seconds"] for record in found.values()), 1), "seconds": round(ours, 1), "seconds_of_training_with_ncps": round(theirs, 1),
        "device": torch.cuda.get_device_name() if experiment.device == "cuda" else torch.cpu.get_capabilities()["cpu_name"], "cores": os.cpu_count(), "threads": experiment.threads,
        "python": platform.python_version(), "torch": str(torch.__version__), "ncps": version("ncps"),
    }
    path = repository() / "results" / "benchmarks" / ("frozen.json" if experiment.device == "cpu" else "frozen-gpu.json")
    write_json(path, measured)
    print(measured, f"written: {path}", sep="\n")


if __name__ == "__main__":
    main()
