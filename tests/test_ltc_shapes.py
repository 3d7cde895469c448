"""`read_sequence` under vmap, for every shape of its durations, against a loop over circuits."""

import itertools

import pytest
import torch

from thesis_ltc.ltc import LTC, ncp
from thesis_ltc.ltc.cell import initial_parameters, read_reference, wiring_tensors
from thesis_ltc.ltc.operator import read_sequence

WIRING = ncp(4, 3, 2, 1, 2, 2, 1, 2)
INDICES = wiring_tensors(WIRING)
OUTER, CIRCUITS, BATCH, STEPS = 3, 2, 5, 7   # all different, so that no axis passes for another


def inputs_of(*axes: int) -> list[torch.Tensor]:
    "Sequence, state and the parameters of circuits."
    torch.manual_seed(0)
    tensors = [torch.randn(*axes, BATCH, STEPS, 4), torch.randn(*axes, BATCH, 6)]
    count = torch.Size(axes).numel()
    starts = [list(initial_parameters(WIRING).values()) for _ in range(count)]
    rows = zip(*starts, strict=True)
    tensors += [torch.stack(row).unflatten(0, axes) if axes else row[0] for row in rows]
    return [tensor.double() for tensor in tensors]


def each_circuit(tensors: list[torch.Tensor], durations: torch.Tensor, axes: tuple[int, ...]) -> torch.Tensor:
    "Outputs of the circuits, by the reference, one by one; durations are (*axes, steps, batch)."
    found = []
    for place in itertools.product(*map(range, axes)):
        sequence, state, *own = (tensor[place] for tensor in tensors)
        found.append(read_reference(sequence, durations[place], state, own, INDICES, 2)[0])
    return torch.stack(found).unflatten(0, axes)


def compare(found: torch.Tensor, right: torch.Tensor, leaves: list[torch.Tensor]) -> None:
    "Assert that outputs are equal, and their gradients."
    torch.testing.assert_close(found, right, rtol=0, atol=1e-12)
    pull = torch.linspace(-1, 1, right.numel()).double().reshape(right.shape)
    ours, theirs = (torch.autograd.grad((outputs * pull).sum(), leaves) for outputs in (found, right))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def read(sequence, durations, state, *parameters):
    return read_sequence(sequence, durations, state, parameters, INDICES, 2)[0]


@pytest.mark.parametrize("samples", [1, BATCH])
@pytest.mark.parametrize("axes", [(), (1,)])
@pytest.mark.parametrize("own", [False, True])
def test_circuits_mapped(samples, axes, own):
    "vmap over circuits; durations (steps, 1 or batch) or (1, steps, 1 or batch), common or of each circuit."
    tensors = inputs_of(OUTER)
    durations = 0.1 + torch.rand(*([OUTER] if own else []), *axes, STEPS, samples).double()
    for tensor in (durations, tensors[0]):
        tensor.requires_grad_()
    found = torch.vmap(read, (0, 0 if own else None, *[0] * 16))(tensors[0], durations, *tensors[1:])
    full = durations.reshape(OUTER if own else 1, STEPS, samples).expand(OUTER, STEPS, BATCH)
    compare(found, each_circuit(tensors, full, (OUTER,)), [durations, tensors[0]])


@pytest.mark.parametrize("samples", [1, BATCH])
@pytest.mark.parametrize("circuits", [None, 1, CIRCUITS])
@pytest.mark.parametrize("own", [False, True])
def test_stacks_of_circuits_mapped(samples, circuits, own):
    "vmap over stacks of circuits; durations without an axis of circuits, with one of 1, and one for each."
    tensors = inputs_of(OUTER, CIRCUITS)
    axes = [circuits] if circuits else []
    durations = 0.1 + torch.rand(*([OUTER] if own else []), *axes, STEPS, samples).double()
    for tensor in (durations, tensors[0]):
        tensor.requires_grad_()
    found = torch.vmap(read, (0, 0 if own else None, *[0] * 16))(tensors[0], durations, *tensors[1:])
    full = durations.reshape(OUTER if own else 1, circuits or 1, STEPS, samples)
    full = full.expand(OUTER, CIRCUITS, STEPS, BATCH)
    compare(found, each_circuit(tensors, full, (OUTER, CIRCUITS)), [durations, tensors[0]])


@pytest.mark.parametrize("samples", [1, BATCH])
@pytest.mark.parametrize("circuits", [1, CIRCUITS])
@pytest.mark.parametrize("mapped", [0, 1, 2])
def test_mapped_along_any_axis_and_gradients_inside(samples, circuits, mapped):
    "Durations are mapped along another axis than the sequence, and gradients are taken within vmap."
    tensors = inputs_of(OUTER, CIRCUITS)
    durations = 0.1 + torch.rand(OUTER, circuits, STEPS, samples).double()
    loss = lambda durations, *others: read(others[0], durations, *others[1:]).square().sum()
    inside = torch.vmap(torch.func.grad(loss), (mapped, *[0] * 17))(durations.movedim(0, mapped), *tensors)
    leaf = durations.clone().requires_grad_()
    full = leaf.expand(OUTER, CIRCUITS, STEPS, BATCH)
    right = torch.autograd.grad(each_circuit(tensors, full, (OUTER, CIRCUITS)).square().sum(), leaf)[0]
    torch.testing.assert_close(inside, right, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(STEPS,), (1, 1), (BATCH, STEPS), (2, STEPS, 1), (1, 1, STEPS, 1), ()])
def test_durations_of_another_shape_are_refused(shape):
    sequence, *others = inputs_of()
    with pytest.raises(ValueError, match=r"durations are .*, but must be \(7, 1\) or \(7, 5\)"):
        read(sequence, torch.ones(shape).double(), *others)


@pytest.mark.parametrize("shape", [(3, STEPS, 1), (CIRCUITS, BATCH, STEPS), (CIRCUITS, 1), (2, STEPS, 2)])
def test_durations_of_other_circuits_are_refused(shape):
    sequence, *others = inputs_of(CIRCUITS)
    with pytest.raises(ValueError, match=r"durations are .*, but must be \(1, 7, 1\)"):
        read(sequence, torch.ones(shape).double(), *others)


@pytest.mark.parametrize("place", [1, 2])
def test_states_and_parameters_of_other_circuits_are_refused(place):
    tensors = inputs_of(CIRCUITS)
    wrong = [tensor[:1] if min(number, 2) == place else tensor for number, tensor in enumerate(tensors)]
    expected = r"needs state \(2, 5, 'neurons'\) and parameters \(2, 'all'\), but got"
    with pytest.raises(ValueError, match=expected):
        read(wrong[0], torch.ones(1, STEPS, 1).double(), *wrong[1:])


def resized(place: int, count: int) -> list[torch.Tensor]:
    "Parameters of a circuit, one of them with other numbers in number."
    parameters = inputs_of()[2:]
    parameters[place] = torch.ones(len(parameters[place]) + count).double()
    return parameters


@pytest.mark.parametrize("place, count", [(0, 1), (4, -1), (8, 3), (11, -3), (14, 1), (14, -1)])
def test_impossible_counts_of_parameters_are_refused(place, count):
    sequence, state = inputs_of()[:2]
    with pytest.raises(ValueError, match=r"got \d+ parameters, but has \d+, and two for each of 1 to 6"):
        read(sequence, torch.ones(STEPS, 1).double(), state, *resized(place, count))


@pytest.mark.parametrize("place, count", [(0, 2), (4, 4), (10, 2), (12, 2)])
def test_parameters_that_shift_the_others_are_refused(place, count):
    sequence, state = inputs_of()[:2]
    with pytest.raises(ValueError, match=r"output_shift is for 1 motor neurons, but the others leave room"):
        read(sequence, torch.ones(STEPS, 1).double(), state, *resized(place, count))


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("neuron", [-1, 6, 10**9])
def test_synapses_of_neurons_that_are_not_there_are_refused(place, neuron):
    "Compiled code would read and write elsewhere in memory."
    sequence, state, *own = inputs_of()
    wiring = [index.clone() for index in INDICES]
    wiring[place][0] = neuron
    alone = lambda one: read_sequence(one, torch.ones(STEPS, 1).double(), state, own, wiring, 2)
    for act in (lambda: alone(sequence), lambda: torch.vmap(alone)(torch.stack([sequence, sequence]))):
        with pytest.raises(ValueError, match=f"synapse has (source|target) {neuron}; neurons are 0 to [35]"):
            act()


@pytest.mark.parametrize("place", [0, 1, 2, -1])
def test_other_precisions_are_refused(place):
    inputs = [inputs_of()[0], torch.ones(STEPS, 1).double(), *inputs_of()[1:]]
    if place >= 0:
        inputs[place] = inputs[place].float()
    else:
        inputs[3:] = [parameter.float() for parameter in inputs[3:]]
    with pytest.raises(ValueError, match=r"in one precision, but got sequence torch.float"):
        read(*inputs)


@pytest.mark.parametrize("name", ["sensory.weight", "recurrent.slope", "rest", "input_scale", "output_shift"])
@pytest.mark.parametrize("backend", ["numba", "reference"])
@pytest.mark.parametrize("count", [-1, 1, 2])
def test_parameters_of_another_circuit_are_refused(name, backend, count):
    "Given by `functional_call`, in place of the circuit's own."
    circuit, sequence = LTC(WIRING, backend=backend).double(), inputs_of()[0]
    others = dict(circuit.named_parameters())
    size = len(others[name])
    others[name] = torch.ones(size + count).double()
    with pytest.raises(ValueError, match=rf"{name} is \({size + count},\), but the wiring needs \({size},\)"):
        torch.func.functional_call(circuit, others, (sequence,))


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("circuits", [1, CIRCUITS])
@pytest.mark.parametrize("samples", [1, BATCH])
def test_gradients_of_the_mapped_operator_have_the_shapes_of_its_arguments(mapped, circuits, samples):
    "Also where circuits share their durations, whose gradients are sums over the circuits."
    sequence, state, *own = inputs_of(OUTER, CIRCUITS)
    durations = 0.1 + torch.rand(*([OUTER] if mapped else []), circuits, STEPS, samples).double()
    row, dims = torch.cat(own, -1), (0, 0 if mapped else None, 0, 0)
    one = lambda *inputs: torch.ops.thesis_ltc.ltc(*inputs, *INDICES, 2, True)
    each = [[tensor if dim is None else tensor[place] for tensor, dim in
             zip((sequence, durations, state, row), dims, strict=True)] for place in range(OUTER)]
    results = [one(*inputs) for inputs in each]
    pulls = [torch.stack([torch.randn_like(result[which]) for result in results]) for which in (0, 1)]
    saved = torch.stack([result[2] for result in results])
    backward = lambda *given: torch.ops.thesis_ltc.ltc_backward(*given[:6], *INDICES, 2, given[6])
    found = torch.vmap(backward, (0, 0, *dims, 0))(*pulls, sequence, durations, state, row, saved)
    for place, inputs in enumerate(each):
        right = backward(pulls[0][place], pulls[1][place], *inputs, saved[place])
        for ours, theirs in zip(found, right, strict=True):
            torch.testing.assert_close(ours[place], theirs, rtol=1e-9, atol=1e-9)
