"""The GPU kernels against the reference in double precision: compiled on a GPU, else interpreted."""

import os
import re
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from random_circuits import copies, outputs_and_gradients, relative_error, relative_errors, wirings

from thesis_ltc.ltc import LTC, ncp, self_test

pytest.importorskip("triton")
pytestmark = pytest.mark.timeout(900)
GPU, INTERPRETED = torch.cuda.is_available(), os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if GPU else "cpu"
needs_gpu = pytest.mark.skipif(not GPU, reason="no GPU")
can_run = pytest.mark.skipif(
    not GPU and not INTERPRETED, reason="runs on a GPU, and by the interpreter in test_interpreted"
)
REPORT = {
    "original": (32, 12, 6, 1, 6, 4, 6, 6), "doubled": (128, 24, 12, 2, 12, 8, 12, 12),
    "half": (512, 48, 24, 4, 24, 16, 24, 24), "1,024 sensory": (1024, 48, 24, 4, 24, 16, 24, 24),
}
random_cases = settings(max_examples=200 if GPU else 25, deadline=None, derandomize=True, database=None)


class Kernels(torch.autograd.Function):
    "The kernels as one differentiable operation, on any device."

    @staticmethod
    def forward(ctx, sequence, durations, state, parameters, wiring, unfolds):
        from thesis_ltc.ltc import gpu

        motor, final, saved = gpu.forward(sequence, durations, state, parameters, wiring, unfolds, True)
        ctx.save_for_backward(sequence, durations, state, parameters, saved)
        ctx.rest = wiring, unfolds
        return motor, final

    @staticmethod
    def backward(ctx, motor_gradient, final_gradient):
        from thesis_ltc.ltc import gpu

        *inputs, saved = ctx.saved_tensors
        return (*gpu.backward(motor_gradient, final_gradient, *inputs, *ctx.rest, saved), None, None)


def through_kernels(circuits, sequences, elapsed, states, pulls):
    """Circuits of one wiring computed together: outputs, and gradients of a weighted sum of them.

    Gradients are those of sequences, elapsed and states, then of each circuit's parameters in their order.
    """
    unfolds = circuits[0].unfolds
    leaves = [tensor.to(DEVICE).requires_grad_() for tensor in (sequences, elapsed, states)]
    wiring = [buffer.to(DEVICE) for buffer in circuits[0].wiring_list()]
    own = [[p.detach().to(DEVICE).requires_grad_() for p in circuit.parameter_list()] for circuit in circuits]
    parameters = torch.stack([torch.cat(row) for row in own])
    outputs = Kernels.apply(leaves[0], leaves[1] / unfolds, leaves[2], parameters, wiring, unfolds)
    loss = sum((output * pull.to(DEVICE)).sum() for output, pull in zip(outputs, pulls, strict=True))
    gradients = torch.autograd.grad(loss, [*leaves, *(p for row in own for p in row)])
    return [output.cpu() for output in outputs], [gradient.cpu() for gradient in gradients]


def in_order(circuit, by_module):
    "Tensors in the order of the circuit's named parameters, in the order of PARAMETERS."
    names = {id(parameter): place for place, parameter in enumerate(circuit.parameters())}
    return [by_module[names[id(parameter)]] for parameter in circuit.parameter_list()]


@can_run
@random_cases
@given(
    wiring=wirings(), batch=some.integers(1, 300 if GPU else 6), steps=some.integers(1, 64 if GPU else 4),
    unfolds=some.integers(1, 12 if GPU else 4), count=some.integers(1, 3),
    form=some.sampled_from(["shared", "each circuit", "each sample"]), duration=some.floats(-2, 1),
    seed=some.integers(0, 999),
)
def test_kernels_are_as_exact_as_single_precision_allows(
    wiring, batch, steps, unfolds, count, form, duration, seed
):
    torch.manual_seed(seed)
    batch = max(1, min(batch, 40_000 // (steps * unfolds)))
    circuits = [LTC(wiring, unfolds, "reference") for _ in range(count)]
    shapes = {"shared": (1, steps, 1), "each circuit": (count, steps, 1), "each sample": (1, steps, batch)}
    elapsed = 10.0**duration * (0.5 + torch.rand(shapes[form]))
    sequences = torch.randn(count, batch, steps, wiring.sensory)
    states = torch.randn(count, batch, wiring.neurons)
    pulls = torch.rand(count, batch, steps, wiring.motor), torch.rand(count, batch, wiring.neurons)
    outputs, gradients = through_kernels(circuits, sequences, elapsed, states, pulls)
    again = through_kernels(circuits, sequences, elapsed, states, pulls)
    for one, other in zip((*outputs, *gradients), (*again[0], *again[1]), strict=True):
        assert torch.equal(one, other)   # the same bits
    of_elapsed, each = torch.zeros_like(elapsed, dtype=torch.float64), len(circuits[0].parameter_list())
    for which, circuit in enumerate(circuits):
        row = which if len(elapsed) > 1 else 0
        inputs = sequences[which], elapsed[row].T.expand(batch, steps), states[which]
        own_pulls = [pull[which] for pull in pulls]
        right, exact = outputs_and_gradients(copies(circuit)[1], inputs, own_pulls)
        _, plain = outputs_and_gradients(circuit, inputs, own_pulls)
        assert max(relative_errors([output[which] for output in outputs], right)) <= 1e-6
        exact, plain = ([*g[:3], *in_order(circuit, g[3:])] for g in (exact, plain))
        start = 3 + which * each
        found = [gradients[0][which], gradients[2][which], *gradients[start : start + each]]
        ours = relative_errors(found, [exact[0], *exact[2:]])
        theirs = relative_errors([plain[0], *plain[2:]], [exact[0], *exact[2:]])
        assert all(our <= max(1e-5, 4 * their) for our, their in zip(ours, theirs, strict=True))
        by_step = exact[1].T   # (steps, batch)
        of_elapsed[row] += by_step if form == "each sample" else by_step.sum(1, keepdim=True)
    assert relative_error(gradients[1], of_elapsed) <= 1e-4


@can_run
def test_more_samples_than_programs_and_nothing_saved(monkeypatch):
    from thesis_ltc.ltc import gpu

    monkeypatch.setattr(gpu, "PROGRAMS", 2)
    torch.manual_seed(0)
    circuit = LTC(ncp(9, 5, 3, 2, 3, 2, 3, 2), 2, "reference")
    sequence, elapsed = torch.randn(1, 7, 3, 9), torch.tensor([[[1.0], [0.3], [2.0]]])
    state = torch.zeros(1, 7, 10)
    pulls = torch.rand(1, 7, 3, 2), torch.rand(1, 7, 10)
    outputs, gradients = through_kernels([circuit], sequence, elapsed, state, pulls)
    inputs = (sequence[0], elapsed[0, :, 0], state[0])
    right, exact = outputs_and_gradients(copies(circuit)[1], inputs, [pull[0] for pull in pulls])
    assert max(relative_errors([output[0] for output in outputs], right)) < 1e-6
    assert relative_error(gradients[0][0], exact[0]) < 1e-5
    row = torch.cat([parameter.detach() for parameter in circuit.parameter_list()])[None]
    tensors = [tensor.to(DEVICE) for tensor in (sequence, elapsed / 2, state, row)]
    wiring = [buffer.to(DEVICE) for buffer in circuit.wiring_list()]
    motor, _, saved = gpu.forward(*tensors, wiring, 2, False)
    assert torch.equal(motor.cpu(), outputs[0]) and not saved.numel()


@can_run
def test_weights_far_from_zero():
    circuit = LTC(ncp(4, 3, 2, 1, 2, 2, 1, 2), 2, "reference")
    extremes = {"sensory.weight": -30.0, "recurrent.weight": 40.0, "leak": -12.0, "recurrent.slope": 300.0}
    with torch.no_grad():
        for name, value in extremes.items():
            circuit.get_parameter(name).fill_(value)
    sequence, elapsed, state = torch.randn(1, 3, 2, 4), torch.ones(1, 2, 1), torch.randn(1, 3, 6)
    pulls = torch.rand(1, 3, 2, 1), torch.rand(1, 3, 6)
    outputs, gradients = through_kernels([circuit], sequence, elapsed, state, pulls)
    inputs = (sequence[0], elapsed[0, :, 0], state[0])
    right, _ = outputs_and_gradients(copies(circuit)[1], inputs, [pull[0] for pull in pulls])
    assert max(relative_errors([output[0] for output in outputs], right)) <= 1e-6
    assert all(gradient.isfinite().all() for gradient in gradients)


@can_run
def test_chunks_of_sensory_synapses_are_added(monkeypatch):
    "A table in 1, 2, 4 and 16 chunks gives what the reference gives."
    from thesis_ltc.ltc import gpu

    torch.manual_seed(0)
    circuit = LTC(ncp(13, 5, 3, 2, 4, 2, 3, 2), 2, "reference")
    sequence, elapsed, state = torch.randn(1, 3, 4, 13), torch.rand(1, 4, 1) + 0.2, torch.randn(1, 3, 10)
    pulls = torch.rand(1, 3, 4, 2), torch.rand(1, 3, 10)
    inputs = (sequence[0], elapsed[0, :, 0], state[0])
    right, exact = outputs_and_gradients(copies(circuit)[1], inputs, [pull[0] for pull in pulls])
    for numbers, chunks in ((4096, 1), (128, 2), (64, 4), (16, 16)):
        monkeypatch.setattr(gpu, "RECTANGLE", numbers)
        wiring = circuit.wiring_list()
        constants = gpu.read_shape(wiring[1], wiring[3], 10)[1]
        assert constants["SENSORY_DEGREE"] // constants["CHUNK"] == chunks
        outputs, gradients = through_kernels([circuit], sequence, elapsed, state, pulls)
        assert max(relative_errors([output[0] for output in outputs], right)) < 1e-6
        assert relative_error(gradients[0][0], exact[0]) < 1e-5


@needs_gpu
@pytest.mark.parametrize("name", REPORT)
def test_circuits_of_the_report_on_the_gpu(name):
    torch.manual_seed(0)
    circuit = LTC(ncp(*REPORT[name])).cuda()
    plain, exact = copies(circuit)
    sequence, state = torch.randn(64, 16, circuit.wiring.sensory), torch.randn(64, circuit.wiring.neurons)
    inputs = sequence.cuda(), torch.tensor(0.7).cuda(), state.cuda()
    pulls = torch.rand(64, 16, circuit.wiring.motor).cuda(), torch.rand(64, circuit.wiring.neurons).cuda()
    results = [outputs_and_gradients(one, inputs, pulls) for one in (exact, circuit, plain)]
    (right, right_gradients), (ours, our_gradients), (_, their_gradients) = results
    assert max(relative_errors(ours, right)) <= 1e-6
    our_errors = relative_errors(our_gradients, right_gradients)
    their_errors = relative_errors(their_gradients, right_gradients)
    assert all(our <= max(1e-5, 4 * their) for our, their in zip(our_errors, their_errors, strict=True))
    with torch.autocast("cuda", torch.bfloat16):
        first, again = circuit(inputs[0])[0], circuit(inputs[0])[0]
    assert torch.equal(first, again) and first.dtype == torch.float32
    stacked, _ = torch.func.stack_module_state([circuit, plain])
    both = torch.vmap(lambda own: torch.func.functional_call(circuit, own, (inputs[0],))[0])(stacked)
    assert torch.equal(both[0], both[1]) and torch.equal(both[0], circuit(inputs[0])[0])


COUNTS = (
    "batch", "steps", "unfolds", "features", "neurons", "motors", "sensory_synapses", "synapses", "size",
    "programs", "own_durations", "sample_durations", "at_recurrent", "at_membrane", "at_input", "at_output",
)


def signature_of(kernel, indices, constants):
    "Triton's type of each argument of a kernel."
    kinds = dict.fromkeys(COUNTS, "i32") | dict.fromkeys(indices, "*i64")
    kinds |= dict.fromkeys(constants, "constexpr")
    kinds |= {"sensory_table": "*i32", "table": "*i32", "epsilon": "fp32"}
    return {name: kinds.get(name, "*fp32") for name in kernel.arg_names}


@pytest.mark.skipif(INTERPRETED or sys.platform != "linux", reason="compiles")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", REPORT)
def test_kernels_compile_for_gpus_that_are_not_here(name, capability):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from thesis_ltc.ltc import gpu

    wiring = ncp(*REPORT[name])
    names = ("sensory_source", "sensory_target", "source", "target")
    index = {name: torch.tensor(getattr(wiring, name)) for name in names}
    reading = gpu.read_shape(index["sensory_target"], index["target"], wiring.neurons)
    reverse = gpu.reverse_shape(index["sensory_source"], index["source"], wiring.neurons, wiring.sensory)
    kernels = ((gpu.read_kernel, reading, {"SAVE": True}), (gpu.reverse_kernel, reverse, {}))
    for kernel, (_, constants, warps), more in kernels:
        constants = constants | more
        source = ASTSource(kernel, signature_of(kernel, names, constants), constexprs=constants)
        compiled = triton.compile(source, GPUTarget("cuda", capability, 32), {"num_warps": warps})
        assert compiled.asm["cubin"] and compiled.metadata.shared < 48 * 1024


@can_run
@pytest.mark.parametrize("gradient", [False, True])
def test_the_circuit_of_one_neuron_that_is_tried_first(gradient):
    "Also where a mode of PyTorch makes tensors without numbers."
    from torch._subclasses import FakeTensorMode

    right = self_test.slopes(self_test.VALUES) if gradient else self_test.one_neuron(self_test.VALUES)
    assert self_test.results_on_gpu(DEVICE, gradient) == pytest.approx(right, rel=1e-4, abs=1e-6)
    with pytest.MonkeyPatch.context() as machine, FakeTensorMode(), torch.inference_mode():
        if not GPU:
            machine.setattr(torch.cuda, "current_device", lambda: 0)
            kernels = self_test.results_on_gpu
            machine.setattr(self_test, "results_on_gpu", lambda _, gradient: kernels("cpu", gradient))
        assert self_test.difference("triton", torch.float32, gradient) == ""


@can_run
@pytest.mark.parametrize("place", [0, 1, 2])
def test_synapses_of_neurons_that_are_not_there_are_refused(place):
    circuit, sequence = LTC(ncp(4, 3, 2, 1, 2, 2, 1, 2)), torch.rand(1, 2, 3, 4, device=DEVICE)
    wiring = [index.clone().to(DEVICE) for index in circuit.wiring_list()]
    wiring[place][0] = 10**9
    row = torch.cat(circuit.parameter_list()).detach().to(DEVICE)[None]
    durations, state = torch.ones(1, 3, 1, device=DEVICE), torch.zeros(1, 2, 6, device=DEVICE)
    from thesis_ltc.ltc import gpu

    with pytest.raises(ValueError, match=r"a synapse has an end at 1000000000; neurons are 0 to [35]"):
        gpu.forward(sequence, durations, state, row, wiring, 2, False)


@pytest.mark.skipif(GPU or INTERPRETED, reason="the tests above run here themselves")
def test_interpreted():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=800)
    report = done.stdout[-3000:] + done.stderr[-2000:]
    assert done.returncode == 0 and re.search(r"\b9 passed", done.stdout), report
