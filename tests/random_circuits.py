"""Random wirings, and how far a circuit's results are off: for the tests of every way to compute it."""
import ncps.wirings
import numpy as np
import torch
from hypothesis import strategies as some

from thesis_ltc.ltc import LTC
from thesis_ltc.ltc.wiring import Wiring, from_ncps, ncp


@some.composite
def wirings(draw) -> Wiring:
    "An NCP, a fully connected or a random wiring, or one without any recurrent synapse, or without any sensory one."
    kind, seed, sensory = draw(some.sampled_from(["ncp", "full", "random", "sensory only", "recurrent only"])), draw(some.integers(0, 999)), draw(some.integers(1, 40))
    if kind == "ncp":
        inter, command, motor = draw(some.integers(1, 16)), draw(some.integers(1, 8)), draw(some.integers(1, 4))
        return ncp(sensory, inter, command, motor, draw(some.integers(1, inter)), draw(some.integers(1, command)), draw(some.integers(0, min(10, command**2))), draw(some.integers(1, command)), seed)
    neurons = draw(some.integers(1, 20))
    motor = draw(some.integers(1, neurons))
    if kind == "full":
        return from_ncps(ncps.wirings.FullyConnected(neurons, motor, erev_init_seed=seed), sensory)
    wiring = from_ncps(ncps.wirings.Random(neurons, motor, sparsity_level=0.5, random_seed=seed), sensory)
    empty = {name: np.zeros(0, np.int64) for name in ("source", "target", "polarity")}
    if kind == "random":
        return wiring
    return Wiring(**vars(wiring) | (empty if kind == "sensory only" else {f"sensory_{name}": value for name, value in empty.items()}))


def results(circuit: LTC, inputs: tuple[torch.Tensor, ...], pulls: tuple[torch.Tensor, ...]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    "Outputs, and the gradients of a pull on them, in the circuit's precision."
    leaves = [tensor.detach().to(circuit.rest.dtype).requires_grad_() for tensor in inputs]
    outputs = circuit(*leaves)
    given_ = [*leaves, *circuit.parameters()]
    found = torch.autograd.grad(sum((output * pull).sum() for output, pull in zip(outputs, pulls)), given_, allow_unused=True)
    return list(outputs), [torch.zeros_like(leaf) if gradient is None else gradient for leaf, gradient in zip(given_, found)]


def off(found: list[torch.Tensor], exact: list[torch.Tensor]) -> list[float]:
    "How far each tensor is off, relative to its largest number."
    return [((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-12)).item() if b.numel() else 0.0 for a, b in zip(found, exact, strict=True)]
