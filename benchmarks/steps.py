"""Measure the parts of a training step: augmentation, convolution, circuit, and the rest.

    python benchmarks/steps.py [--device cpu] [--rounds 7]

For each head of the report, the parts of a step of 64 images at 136 pixels: end to end, and on a frozen trunk
for one seed and for several at once. Then the end-to-end step through torch.compile. Then a step of 16 images
at 224 pixels and full width, in float32 and bfloat16 and in two memory layouts, against a matrix product of
the same precision.

Medians are written to results/benchmarks/steps.json (on a GPU: steps-gpu.json). The book shows them.
"""
import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import count
from pathlib import Path

import numpy as np
import torch
from timing import call_seconds, environment, result_path
from torch import Tensor, nn

from thesis_ltc.core.files import write_json
from thesis_ltc.core.streams import generator
from thesis_ltc.data.augment import Augmentation
from thesis_ltc.heads.models import Classifier, circuits, classifier, macs
from thesis_ltc.ltc import LTC
from thesis_ltc.training import Recipe, Training, resolve_precision
from thesis_ltc.training.objective import OBJECTIVES
from thesis_ltc.training.stacked import StackedLearner, learner_of

REPORT = ("fc", "fc3", "ncp-y", "ncp-z", "ncp-patch", "ncp-y-double", "ncp-y-half")
BATCH, PIXELS = 64, 136
FEWEST_SEEDS = 4   # of a step of several seeds, also where the seeds of a head are trained one after another
LAYOUTS = {        # steps at full width: precision and memory layout
    "float32": ("float32", torch.contiguous_format),
    "float32, channels_last": ("float32", torch.channels_last),
    "bfloat16, channels_last": ("bfloat16", torch.channels_last),
}

Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    "A head, the width of its backbone and the device; makes what a training step needs."

    head: str
    width: float
    device: str

    @property
    def precision(self) -> str:
        return resolve_precision("auto", self.device)

    def model(self) -> Classifier:
        "A new classifier with two classes; always the same parameters."
        model = classifier(self.head, 2, PIXELS, width=self.width, seed=0)
        return model.to(self.device, memory_format=torch.channels_last)

    def frozen_head(self) -> nn.Module:
        "The part that is trained on pooled maps of a frozen trunk."
        return self.model().head.without_pooling()

    def images(self) -> Tensor:
        images = torch.rand(BATCH, 1, PIXELS, PIXELS, device=self.device)
        return images.to(memory_format=torch.channels_last)

    def labels(self) -> Tensor:
        return torch.randint(0, 2, (BATCH,), device=self.device)

    @torch.no_grad()
    def pooled_maps(self, images: Tensor) -> Tensor:
        "Feature maps as a head on a frozen trunk receives them."
        model = self.model()
        with torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bfloat16"):
            maps = model.backbone(images)
            return model.head.shrink.pool(maps.float()).contiguous()


class NcpsCircuit(nn.Module):
    "A circuit computed by ncps, with the signature of `LTC`."

    def __init__(self, circuit: LTC) -> None:
        super().__init__()
        self.rnn = circuit.to_ncps().to(circuit.rest.device)

    def forward(self, sequence: Tensor, elapsed: float = 1.0, state: None = None) -> tuple[Tensor, Tensor]:
        return self.rnn(sequence)


def with_ncps(model: nn.Module) -> nn.Module:
    "Replace the circuits of a model by the same circuits computed by ncps; changes the model."
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LTC):
                setattr(parent, name, NcpsCircuit(child))
    return model


def milliseconds(calls: Mapping[str, Call], rounds: int, device: str) -> dict[str, float]:
    """Median duration of each call; the calls take turns, and the first round is not counted.

    `spread` is the largest distance between quartiles, as a fraction of the median.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            seconds = call_seconds(call, device)
            if number > 0:
                times[name].append(1e3 * seconds)
    low, middle, high = np.quantile(list(times.values()), (0.25, 0.5, 0.75), axis=1)
    spread = round(float(((high - low) / middle).max()), 3)
    return dict(zip(times, middle.round(3).tolist(), strict=True)) | {"spread": spread}


def training_step(model: nn.Module, inputs: Tensor, labels: Tensor, precision: str) -> Call:
    "A function that takes one step: forward pass, loss, backward pass, Adam's update."
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.Adam(trainable, 1e-4)
    objective = OBJECTIVES["bce-dice"]

    def step() -> None:
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            logits = model(inputs)
        optimiser.zero_grad()
        objective(logits.float(), labels).backward()
        optimiser.step()

    return step


def augmentation_call(device: str) -> Call:
    "A function that augments one batch, differently in each call."
    stored = torch.randint(0, 256, (BATCH, 1, 150, 150), dtype=torch.uint8, device=device)
    augmentation, numbers = Augmentation(PIXELS), count()
    return lambda: augmentation(stored, generator(0, "augment", next(numbers), 0))


def backbone_with_mean(case: Case) -> nn.Module:
    "The backbone, with a linear layer on the mean of its feature map."
    backbone = case.model().backbone
    readout = nn.Linear(backbone.features, 2).to(case.device)
    return nn.Sequential(backbone, nn.AdaptiveAvgPool2d(1), nn.Flatten(), readout)


def several_seeds_step(case: Case, pooled: Tensor, labels: Tensor, seeds: int) -> Call:
    "A function that takes one step of each seed on the maps of a frozen trunk."
    recipe = Recipe(
        objective="bce-dice", batch_size=BATCH, learning_rate=1e-4, epochs=1, patience=1, image_size=PIXELS,
        seed=0, device=case.device, precision=case.precision, threads=torch.get_num_threads())
    trainings = [Training(case.frozen_head(), replace(recipe, seed=seed), Path()) for seed in range(seeds)]
    learner_type, _ = learner_of(case.model().head, case.device)
    learner = learner_type(trainings)
    learner.start(1e-4)
    return partial(learner.step, [pooled] * seeds, labels.expand(seeds, -1), list(range(seeds)))


def circuit_call(case: Case) -> Call:
    "A function that runs the forward and the backward pass of the head's circuit alone."
    model = case.model()
    circuit = circuits(model)[0]
    steps, _ = model.head.scan[0].sequence_shape(*model.head.shrink.shape)
    shape = (BATCH, steps, circuit.wiring.sensory)
    sequence = torch.rand(shape, device=case.device, requires_grad=True)
    return lambda: circuit(sequence)[0].sum().backward()


def parts(case: Case, seeds: int) -> dict[str, Call]:
    "The parts of a head's training step; those of the circuit only if the head has one."
    images, labels = case.images(), case.labels()
    pooled = case.pooled_maps(images)
    whole = lambda model: training_step(model, images, labels, case.precision)
    frozen = lambda head: training_step(head, pooled, labels, case.precision)
    calls = {
        "augmentation": augmentation_call(case.device),
        "backbone alone": whole(backbone_with_mean(case)),
        "end to end": whole(case.model()),
        "frozen": frozen(case.frozen_head()),
        f"frozen, {seeds} seeds": several_seeds_step(case, pooled, labels, seeds),
    }
    if not circuits(case.model()):
        return calls
    return calls | {
        "circuit": circuit_call(case),
        "end to end, ncps": whole(with_ncps(case.model())),
        "frozen, ncps": frozen(with_ncps(case.frozen_head())),
    }


def measure_parts(case: Case, rounds: int) -> dict:
    "One row: milliseconds of the parts of a head's training step."
    learner_type, most = learner_of(case.model().head, case.device)
    seeds = max(most, FEWEST_SEEDS)
    return {
        "head": case.head, "width": case.width, "precision": case.precision, "seeds": seeds,
        "shared": learner_type is StackedLearner,
        **milliseconds(parts(case, seeds), rounds, case.device),
    }


def measure_compiled(case: Case, rounds: int) -> dict:
    "One row: an end-to-end step through torch.compile, and the seconds until its first step is done."
    images, labels = case.images(), case.labels()
    calls = {
        "plain": training_step(case.model(), images, labels, case.precision),
        "compiled": training_step(torch.compile(case.model()), images, labels, case.precision),
    }
    began = time.perf_counter()
    calls["compiled"]()
    seconds = round(time.perf_counter() - began, 1)
    medians = milliseconds(calls, rounds, case.device)
    return {"head": case.head, "width": case.width, "seconds until it runs": seconds, **medians}


def layout_step(precision: str, layout: torch.memory_format, device: str) -> Call:
    "A function that takes one end-to-end step of 16 images at 224 pixels and full width."
    labels = torch.randint(0, 2, (16,), device=device)
    images = torch.rand(16, 1, 224, 224, device=device).to(memory_format=layout)
    model = classifier("fc", 2, 224, seed=0).to(device, memory_format=layout)
    return training_step(model, images, labels, precision)


def measure_precision(rounds: int, device: str) -> dict:
    "Milliseconds and GFLOP/s of a step in each precision and layout, and of matrix products."
    calls = {name: layout_step(*options, device) for name, options in LAYOUTS.items()}
    single = torch.rand(2048, 2048, device=device)
    half = single.bfloat16()
    products = {
        "matrix product, float32": lambda: single @ single,
        "matrix product, bfloat16": lambda: half @ half,
    }
    medians = milliseconds(calls | products, rounds, device)
    spread = medians.pop("spread")
    # The backward pass computes twice as much as the forward pass, except for the gradient of the image.
    operations = dict.fromkeys(calls, 3 * 2 * macs(classifier("fc", 2, 224)) * 16)
    operations |= dict.fromkeys(products, 2 * 2048**3)
    rates = {name: round(operations[name] / median / 1e6, 1) for name, median in medians.items()}
    return {"milliseconds": medians, "spread": spread, "gflops_per_second": rates}


def parse_arguments() -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    return parser.parse_args()


def main() -> None:
    given = parse_arguments()
    rows = []
    for width in (0.25, 1.0):
        for head in REPORT:
            rows.append(measure_parts(Case(head, width, given.device), given.rounds))
            print(rows[-1], flush=True)
    step = measure_precision(given.rounds, given.device)
    print(step, flush=True)
    cases = [Case(head, width, given.device) for head in ("fc", "ncp-z") for width in (0.25, 1.0)]
    compiled = [measure_compiled(case, given.rounds) for case in cases]
    print(*compiled, sep="\n")
    path = result_path("steps", given.device)
    write_json(path, {
        "rows": rows,
        "step": step,
        "compiled": compiled,
        "rounds": given.rounds,
        "ncps": version("ncps"),
        "numba": version("numba") if given.device == "cpu" else None,
        "threads": torch.get_num_threads(),
        **environment(given.device),
    })
    print(f"written: {path}")


if __name__ == "__main__":
    main()
