"""Random wirings, and a circuit's errors: for the tests of every backend."""

import ncps.wirings
import numpy as np
import torch
from hypothesis import strategies as some
from torch import Tensor

from thesis_ltc.ltc import LTC
from thesis_ltc.ltc.wiring import Wiring, from_ncps, ncp

KINDS = ("ncp", "full", "random", "sensory only", "recurrent only")


@some.composite
def policies(draw) -> Wiring:
    "A neural circuit policy of random size."
    inter, command, motor = draw(some.integers(1, 16)), draw(some.integers(1, 8)), draw(some.integers(1, 4))
    sensory_out, inter_out = draw(some.integers(1, inter)), draw(some.integers(1, command))
    recurrent, motor_in = draw(some.integers(0, min(10, command**2))), draw(some.integers(1, command))
    sensory, seed = draw(some.integers(1, 40)), draw(some.integers(0, 999))
    return ncp(sensory, inter, command, motor, sensory_out, inter_out, recurrent, motor_in, seed)


@some.composite
def wirings(draw) -> Wiring:
    "A policy, a fully connected or a random wiring, or one without recurrent or without sensory synapses."
    kind = draw(some.sampled_from(KINDS))
    if kind == "ncp":
        return draw(policies())
    sensory, neurons = draw(some.integers(1, 40)), draw(some.integers(1, 20))
    seed = draw(some.integers(0, 999))
    motor = draw(some.integers(1, neurons))
    if kind == "full":
        return from_ncps(ncps.wirings.FullyConnected(neurons, motor, erev_init_seed=seed), sensory)
    theirs = ncps.wirings.Random(neurons, motor, sparsity_level=0.5, random_seed=seed)
    wiring = from_ncps(theirs, sensory)
    if kind == "random":
        return wiring
    prefix = "" if kind == "sensory only" else "sensory_"
    empty = {prefix + name: np.zeros(0, np.int64) for name in ("source", "target", "polarity")}
    return Wiring(**vars(wiring) | empty)


def copies(circuit: LTC) -> tuple[LTC, LTC]:
    "The same circuit computed by the reference, in its own and in double precision."
    plain, exact = (LTC(circuit.wiring, circuit.unfolds, "reference") for _ in range(2))
    plain, exact = plain.to(circuit.rest), exact.to(circuit.rest.device).double()
    for other in (plain, exact):
        other.load_state_dict(circuit.state_dict())
    return plain, exact


def outputs_and_gradients(
    circuit: LTC, inputs: tuple[Tensor, ...], pulls: tuple[Tensor, ...]
) -> tuple[list[Tensor], list[Tensor]]:
    "Outputs, and the gradients of a weighted sum of them, in the circuit's precision."
    leaves = [tensor.detach().to(circuit.rest.dtype).requires_grad_() for tensor in inputs]
    outputs = circuit(*leaves)
    leaves += circuit.parameters()
    loss = sum((output * pull).sum() for output, pull in zip(outputs, pulls, strict=True))
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    filled = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients, strict=True)]
    return list(outputs), filled


def relative_error(found: Tensor, exact: Tensor) -> float:
    "Largest error, relative to the largest number."
    if not exact.numel():
        return 0.0
    return ((found.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-12)).item()


def relative_errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    "Relative error of each tensor."
    return [relative_error(one, other) for one, other in zip(found, exact, strict=True)]
