"""Where the time of a training step goes: images, convolution, circuit, the rest; end to end, and on a frozen trunk alone and with other seeds.

    python benchmarks/steps.py [--device cpu] [--rounds 7]

For every head of the report, at 136 pixels: the parts of a step of 64 images. Then the same step through torch.compile, and a
step at 224 pixels and full width in bfloat16 and channels_last beside PyTorch's default, and beside a matrix product of the
same precision. Medians go to results/benchmarks/steps.json (on a GPU: steps-gpu.json), and the book shows them.
"""
import argparse
import os
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from thesis_ltc.data.augment import Augmentation
from thesis_ltc.core.files import repository, write_json
from thesis_ltc.heads.classifier import circuits, classifier, macs
from thesis_ltc.ltc import LTC
from thesis_ltc.training.objective import OBJECTIVES
from thesis_ltc.core.streams import generator
from thesis_ltc.training.stacked import StackedLearner, learner_of
from thesis_ltc.training import Recipe, Training, resolve_precision

REPORT = ("fc", "fc3", "ncp-y", "ncp-z", "ncp-patch", "ncp-y-double", "ncp-y-half")


def milliseconds(calls: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, float]:
    "Medians of calls that are made in turns; `spread` is the widest distance between quartiles, as a share of its median."
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            wait()
            began = time.perf_counter()
            call()
            wait()
            if turn:   # the first warms up
                times[name].append(1e3 * (time.perf_counter() - began))
    low, middle, high = np.quantile(list(times.values()), (0.25, 0.5, 0.75), axis=1)
    return dict(zip(times, middle.round(3).tolist())) | {"spread": round(float(((high - low) / middle).max()), 3)}


class Slow(nn.Module):
    "A circuit as ncps computes it, in place of one of ours."

    def __init__(self, circuit: LTC) -> None:
        super().__init__()
        self.rnn = circuit.to_ncps().to(circuit.rest.device)

    def forward(self, sequence: Tensor, elapsed: float = 1.0, state: None = None) -> tuple[Tensor, Tensor]:
        return self.rnn(sequence)


def with_ncps(model: nn.Module) -> nn.Module:
    "The model, its circuits replaced."
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LTC):
                setattr(parent, name, Slow(child))
    return model


def trained(model: nn.Module, inputs: Tensor, labels: Tensor, precision: str, device: str) -> Callable[[], None]:
    "A step: forward, loss, backward, Adam."
    optimiser, objective = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-4), OBJECTIVES["bce-dice"]

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
            logits = model(inputs)
        optimiser.zero_grad()
        objective(logits.float(), labels).backward()
        optimiser.step()
    return step


def parts_of(head: str, width: float, rounds: int, device: str) -> dict:
    "What a step of a head is made of: 64 images of 136 pixels."
    precision = resolve_precision("auto", device)
    make = lambda: classifier(head, 2, 136, width=width, seed=0).to(device, memory_format=torch.channels_last)
    model, slow = make(), with_ncps(make())
    stored = torch.randint(0, 256, (64, 1, 150, 150), dtype=torch.uint8, device=device)
    images = torch.rand(64, 1, 136, 136, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 2, (64,), device=device)
    with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
        maps = model.backbone(images)
        pooled = model.head.shrink.pool(maps.float()).contiguous()
    recipe = Recipe("bce-dice", 64, 1e-4, 1, 1, 136, 0, device, precision, torch.get_num_threads())
    kind, seats = learner_of(model.head, device)
    seats = max(seats, 4)   # of a head whose seeds take turns, four all the same
    together = kind([Training(make().head.without_pooling(), replace(recipe, seed=seed), Path()) for seed in range(seats)])
    together.start(1e-4)
    backbone = nn.Sequential(make().backbone, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(model.backbone.features, 2).to(device))
    augmentation, turn = Augmentation(136), iter(range(10**6))
    calls = {
        "augmentation": lambda: augmentation(stored, generator(0, "augment", next(turn), 0)),
        "backbone alone": trained(backbone, images, labels, precision, device),
        "end to end": trained(model, images, labels, precision, device),
        "frozen": trained(make().head.without_pooling(), pooled, labels, precision, device),
        f"frozen, {seats} seeds": lambda: together.step([pooled] * seats, labels.expand(seats, -1), list(range(seats))),
    }
    if circuits(model):
        circuit, read = circuits(make())[0], torch.rand(64, model.head.scan[0].sequence_shape(*model.head.shrink.shape)[0], circuits(model)[0].wiring.sensory, device=device, requires_grad=True)
        calls |= {
            "circuit": lambda: circuit(read)[0].sum().backward(),
            "end to end, ncps": trained(slow, images, labels, precision, device), "frozen, ncps": trained(with_ncps(make()).head.without_pooling(), pooled, labels, precision, device),
        }
    return {"head": head, "width": width, "precision": precision, "seeds": seats, "shared": kind is StackedLearner, **milliseconds(calls, rounds, device)}


def compiled_step(head: str, width: float, rounds: int, device: str) -> dict:
    "A step of a whole network through torch.compile: how long until it runs, and what it gains."
    precision, labels = resolve_precision("auto", device), torch.randint(0, 2, (64,), device=device)
    images = torch.rand(64, 1, 136, 136, device=device).to(memory_format=torch.channels_last)
    make = lambda: classifier(head, 2, 136, width=width, seed=0).to(device, memory_format=torch.channels_last)
    plain, compiled = trained(make(), images, labels, precision, device), trained(torch.compile(make()), images, labels, precision, device)
    began = time.perf_counter()
    compiled()
    return {"head": head, "width": width, "seconds until it runs": round(time.perf_counter() - began, 1), **milliseconds({"plain": plain, "compiled": compiled}, rounds, device)}


def precision_of_step(rounds: int, device: str) -> dict:
    "A step of 16 images at 224 pixels, full width, in three ways; and what a matrix product reaches."
    labels = torch.randint(0, 2, (16,), device=device)
    calls = {}
    for name, precision, layout in (("float32", "float32", torch.contiguous_format), ("float32, channels_last", "float32", torch.channels_last), ("bfloat16, channels_last", "bfloat16", torch.channels_last)):
        model = classifier("fc", 2, 224, seed=0).to(device, memory_format=layout)
        calls[name] = trained(model, torch.rand(16, 1, 224, 224, device=device).to(memory_format=layout), labels, precision, device)
    one = torch.rand(2048, 2048, device=device)
    half = one.bfloat16()
    calls |= {"matrix product, float32": lambda: one @ one, "matrix product, bfloat16": lambda: half @ half}
    found = milliseconds(calls, rounds, device)
    work = 3 * 2 * macs(classifier("fc", 2, 224)) * 16   # forward, and twice as much backward, but for the first layer's gradient of the image
    spread = found.pop("spread")
    rate = lambda name, flops: round(flops / found[name] / 1e6, 1)
    return {"milliseconds": found, "spread": spread, "gflops_per_second": {name: rate(name, 2 * 2048**3 if "matrix" in name else work) for name in found}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    rows = []
    for width in (0.25, 1.0):
        for head in REPORT:
            rows.append(parts_of(head, width, given.rounds, given.device))
            print(rows[-1], flush=True)
    step = precision_of_step(given.rounds, given.device)
    print(step, flush=True)
    compiled = [compiled_step(head, width, given.rounds, given.device) for head in ("fc", "ncp-z") for width in (0.25, 1.0)]
    print(*compiled, sep="\n")
    path = repository() / "results" / "benchmarks" / ("steps.json" if given.device == "cpu" else "steps-gpu.json")
    name = torch.cuda.get_device_name() if given.device == "cuda" else torch.cpu.get_capabilities()["cpu_name"]
    write_json(path, {"rows": rows, "step": step, "compiled": compiled, "rounds": given.rounds, "ncps": version("ncps"), "numba": version("numba") if given.device == "cpu" else None, "threads": torch.get_num_threads(), "cores": os.cpu_count(), "device": name, "python": platform.python_version(), "torch": str(torch.__version__)})
    print(f"written: {path}")


if __name__ == "__main__":
    main()
