"""Time the heads of a study in use: milliseconds from the backbone's map to the logits, without gradients.

    python benchmarks/inference.py [--study ct-folds] [--batches 1 64] [--threads 1] [--rounds 15]

The study's file says which heads, which image size and which width. The heads take turns, and a turn is a
burst of calls that lasts a hundredth of a second. The first round is not counted. The backbone is timed, too.
The load of the machine before the first round is kept: the mean number of processes that wanted a core in the
last minute.

Times are those of the clock: quartiles over rounds. Beside them stands the median of the process's CPU time,
which depends less on what else the machine did. They are written to results/benchmarks/inference.json (on a
GPU: inference-gpu.json). The book shows them.
"""
import argparse
import os
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from timing import call_seconds, environment, result_path

from thesis_ltc.core.files import repository, write_json
from thesis_ltc.core.provenance import capability
from thesis_ltc.heads.models import Classifier, classifier
from thesis_ltc.study.definition import read_study

BACKBONE = "the backbone"   # beside the heads
BURST_SECONDS = 0.01        # of a turn
MOST = 200                  # calls of a turn

Call = Callable[[], object]


def models_of(fixed: Mapping[str, Any], heads: list[str], device: str) -> dict[str, Classifier]:
    "The classifiers of a study, two classes, in evaluation; always the same parameters."
    options = {name: fixed[name] for name in ("image_size", "width", "normaliser") if name in fixed}
    return {head: classifier(head, 2, seed=0, **options).to(device).eval() for head in heads}


@torch.no_grad()
def calls_of(models: Mapping[str, Classifier], batch: int, device: str) -> dict[str, Call]:
    "A call for the backbone, and one for each head on a map of the backbone."
    first = next(iter(models.values()))
    images = torch.rand(batch, 1, first.image_size, first.image_size, device=device)
    maps = first.backbone(images).contiguous()
    heads = {head: partial(model.head, maps) for head, model in models.items()}
    return {BACKBONE: partial(first.backbone, images)} | heads


def burst(call: Call, count: int) -> None:
    "Make a call some times."
    for _ in range(count):
        call()


@torch.inference_mode()
def milliseconds(calls: Mapping[str, Call], rounds: int, device: str) -> dict[str, dict[str, float]]:
    "Duration of each call: quartiles by the clock, and the median of CPU time; the calls take turns."
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for call in calls.values():
        call()   # compiles
    counts = {name: int(np.clip(BURST_SECONDS / call_seconds(call, device), 1, MOST))
              for name, call in calls.items()}
    for number in range(rounds + 1):
        for name, call in calls.items():
            began = time.process_time()
            seconds = call_seconds(partial(burst, call, counts[name]), device)
            if number > 0:
                times[name].append((seconds / counts[name], (time.process_time() - began) / counts[name]))
    return {name: summary(*zip(*found, strict=True)) for name, found in times.items()}


def summary(clock: tuple[float, ...], cpu: tuple[float, ...]) -> dict[str, float]:
    "Quartiles of seconds by the clock, and the median of those of the CPU, in milliseconds."
    low, median, high = (1e3 * np.quantile(clock, (0.25, 0.5, 0.75))).round(4).tolist()
    return {"low": low, "median": median, "high": high, "cpu": round(1e3 * float(np.median(cpu)), 4)}


def measure(given: argparse.Namespace) -> dict[str, Any]:
    "The measurement as it is written."
    load = os.getloadavg()[0]
    torch.set_num_threads(given.threads)
    study = read_study(repository() / "studies" / f"{given.study}.yaml")
    models = models_of(study.fixed, list(study.vary["head"]), given.device)
    rows = []
    for batch in given.batches:
        found = milliseconds(calls_of(models, batch, given.device), given.rounds, given.device)
        rows += [{"head": head, "batch": batch, **times} for head, times in found.items()]
        print(*rows[-len(found):], sep="\n", flush=True)
    sizes = {name: study.fixed[name] for name in ("image_size", "width")}
    return {
        "rows": rows, "study": given.study, **sizes, "precision": "float32", "rounds": given.rounds,
        "threads": given.threads, "load": round(load, 2),
        "capability": capability(given.device), **environment(given.device)}


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--study", default="ct-folds")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    given = parser.parse_args()
    path = result_path("inference", given.device)
    write_json(path, measure(given))
    print(f"written: {path}")


if __name__ == "__main__":
    main()
