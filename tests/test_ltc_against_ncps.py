"""The reference against ncps.torch.LTC: random wirings, sizes, durations and starts."""

import ncps.torch
import ncps.wirings
import numpy as np
import pytest
import torch

from thesis_ltc.ltc.network import LTC, NCPS_NAMES, ncps_index

REPORT = [(32, 12, 6, 1, 6, 4, 6, 6), (128, 24, 12, 2, 12, 8, 12, 12), (512, 48, 24, 4, 24, 16, 24, 24)]
# outputs; gradients, relative to the largest
BOUNDS = {torch.float32: (1e-6, 3e-5), torch.float64: (1e-12, 1e-12)}


def random_wiring(kind: str, draw: np.random.Generator) -> ncps.wirings.Wiring:
    "A fresh wiring of one kind, of random size."
    seed = int(draw.integers(10_000))
    if kind == "NCP":
        inter, command, motor = (int(n) for n in draw.integers([2, 2, 1], [14, 9, 5]))
        outs = [int(draw.integers(1, n + 1)) for n in (inter, command)]
        recurrent, motor_in = int(draw.integers(0, 10)), int(draw.integers(1, command + 1))
        return ncps.wirings.NCP(inter, command, motor, *outs, recurrent, motor_in, seed=seed)
    neurons = int(draw.integers(2, 13))
    motor = int(draw.integers(1, neurons + 1))
    if kind == "FullyConnected":
        itself = bool(draw.integers(2))
        return ncps.wirings.FullyConnected(neurons, motor, erev_init_seed=seed, self_connections=itself)
    if kind == "Random":
        level = float(draw.uniform(0, 0.95))
        return ncps.wirings.Random(neurons, motor, sparsity_level=level, random_seed=seed)
    # sensory synapses only
    wiring = ncps.wirings.Random(neurons, motor, sparsity_level=0.5, random_seed=seed)
    wiring.adjacency_matrix[:] = 0
    return wiring


def random_network(kind: str, draw: np.random.Generator, dtype: torch.dtype) -> ncps.torch.LTC:
    "A network with random unfolds, weights, and affine maps that differ from the identity."
    inputs, unfolds = int(draw.integers(1, 20)), int(draw.integers(1, 9))
    rnn = ncps.torch.LTC(inputs, random_wiring(kind, draw), ode_unfolds=unfolds)
    for side in ("input", "output"):
        getattr(rnn.rnn_cell, f"{side}_w").data.uniform_(0.5, 1.5)
        getattr(rnn.rnn_cell, f"{side}_b").data.uniform_(-0.5, 0.5)
    return rnn.to(dtype)


def read_with_ncps(
    rnn: ncps.torch.LTC, sequence: torch.Tensor, durations: torch.Tensor, state: torch.Tensor
) -> tuple:
    "Outputs and state of ncps; its cell gets `durations` (steps,) as numbers, which it handles correctly."
    motor = []
    for step, elapsed in enumerate(durations.tolist()):
        output, state = rnn.rnn_cell(sequence[:, step], state, elapsed)
        motor.append(output)
    return torch.stack(motor, 1), state


def assert_same(rnn: ncps.torch.LTC, circuit: LTC, ours: tuple, theirs: tuple, leaves: dict) -> None:
    """Outputs, states, and the gradient of a pull on both with respect to every weight, input and start.

    Pulls are positive: where they cancel, ncps's single precision is further off than the bound.
    """
    forward, backward = BOUNDS[ours[0].dtype]
    pulls = [torch.rand_like(tensor) for tensor in ours]
    for our, their in zip(ours, theirs, strict=True):
        assert (our - their).abs().max() <= forward
    names = [name for name, _ in circuit.named_parameters()]
    weights = [getattr(rnn.rnn_cell, NCPS_NAMES[name]) for name in names]
    our_gradients = torch.autograd.grad(ours, [*circuit.parameters(), *leaves.values()], pulls)
    their_gradients = torch.autograd.grad(theirs, [*weights, *leaves.values()], pulls)
    for name, our, their in zip([*names, *leaves], our_gradients, their_gradients, strict=True):
        if "." in name:
            their = their[ncps_index(circuit, name)]
        if their.numel():
            assert (our - their).abs().max() <= backward * their.abs().max(), name


@pytest.mark.parametrize("dtype", BOUNDS, ids=["float32", "float64"])
@pytest.mark.parametrize("kind", ["NCP", "FullyConnected", "Random", "no recurrent synapses"])
@pytest.mark.parametrize("case", range(12))
def test_the_circuit_is_ncps(kind: str, case: int, dtype: torch.dtype) -> None:
    "Forward and every gradient, from a start state, each step with a duration of its own between 0.01 and 5."
    draw = np.random.default_rng([case, len(kind)])
    torch.manual_seed(case)
    rnn = random_network(kind, draw, dtype)
    circuit = LTC.from_ncps(rnn, "reference")
    batch, steps = int(draw.choice([1, 2, 5, circuit.wiring.neurons])), int(draw.integers(1, 17))
    sequence = float(draw.uniform(0.1, 3)) * torch.randn(batch, steps, circuit.wiring.sensory, dtype=dtype)
    sequence.requires_grad_()
    state = (0.5 * torch.randn(batch, circuit.wiring.neurons, dtype=dtype)).requires_grad_()
    durations = torch.tensor(np.exp(draw.uniform(np.log(0.01), np.log(5), steps)), dtype=dtype)
    ours, theirs = circuit(sequence, durations, state), read_with_ncps(rnn, sequence, durations, state)
    assert_same(rnn, circuit, ours, theirs, {"sequence": sequence, "state": state})


@pytest.mark.parametrize("case", range(4))
def test_durations_of_each_sample(case: int) -> None:
    "As ncps reads one sample at a time; if batch = neurons, a whole batch is silently wrong there."
    torch.manual_seed(case)
    rnn = random_network("NCP", np.random.default_rng(case), torch.float64)
    circuit = LTC.from_ncps(rnn, "reference")
    batch = circuit.wiring.neurons
    sequence = torch.randn(batch, 6, circuit.wiring.sensory, dtype=torch.float64)
    durations = 0.05 + 2 * torch.rand(batch, 6, dtype=torch.float64)
    ours = circuit(sequence, durations)[0]
    for i in range(batch):
        alone = rnn(sequence[i : i + 1], timespans=durations[i : i + 1])[0]
        torch.testing.assert_close(ours[i : i + 1], alone, rtol=0, atol=1e-12)
    assert (rnn(sequence, timespans=durations)[0] - ours).abs().max() > 1e-3  # neurons mistaken for samples


def test_long_sequences_of_short_steps() -> None:
    "64 steps of 0.01: rounding in both adds up, and stays within the bounds."
    torch.manual_seed(0)
    rnn = ncps.torch.LTC(32, ncps.wirings.NCP(12, 6, 1, 6, 4, 6, 6))
    circuit = LTC.from_ncps(rnn, "reference")
    sequence = torch.randn(16, 64, 32, requires_grad=True)
    durations, state = torch.full((64,), 0.01), torch.zeros(16, 19, requires_grad=True)
    ours, theirs = circuit(sequence, durations, state), read_with_ncps(rnn, sequence, durations, state)
    assert_same(rnn, circuit, ours, theirs, {"sequence": sequence, "state": state})


@pytest.mark.parametrize("sizes", REPORT)
def test_the_reports_circuits(sizes: tuple[int, ...]) -> None:
    "The three circuits of the report at their full size, read at elapsed 1 through ncps's own network."
    torch.manual_seed(0)
    rnn = ncps.torch.LTC(sizes[0], ncps.wirings.NCP(*sizes[1:]))
    circuit = LTC.from_ncps(rnn, "reference")
    sequence = torch.randn(4, 16, sizes[0], requires_grad=True)
    assert_same(rnn, circuit, circuit(sequence), rnn(sequence), {"sequence": sequence})
