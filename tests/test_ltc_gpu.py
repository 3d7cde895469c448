"""The kernels of the GPU against the readable circuit in double precision: compiled where there is a GPU, else by Triton's interpreter in a process of its own."""
import os
import re
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from random_circuits import off, results, wirings

from thesis_ltc.ltc import LTC
from thesis_ltc.ltc import ncp

pytest.importorskip("triton")
pytestmark = pytest.mark.timeout(900)
GPU, INTERPRETED = torch.cuda.is_available(), os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if GPU else "cpu"
can_run = pytest.mark.skipif(not GPU and not INTERPRETED, reason="runs where there is a GPU, and by the interpreter in test_interpreted")
needs_gpu = pytest.mark.skipif(not GPU, reason="no GPU")
REPORT = {"original": (32, 12, 6, 1, 6, 4, 6, 6), "doubled": (128, 24, 12, 2, 12, 8, 12, 12), "half": (512, 48, 24, 4, 24, 16, 24, 24), "1,024 sensory": (1024, 48, 24, 4, 24, 16, 24, 24)}


class Kernels(torch.autograd.Function):
    "A circuit's numbers through the kernels, whatever device they are on."

    @staticmethod
    def forward(ctx, sequence, durations, state, numbers, wiring, unfolds):
        from thesis_ltc.ltc import gpu as ltc_gpu

        motor, ended, kept = ltc_gpu.forward(sequence, durations, state, numbers, wiring, unfolds, True)
        ctx.save_for_backward(sequence, durations, state, numbers, kept)
        ctx.rest = wiring, unfolds
        return motor, ended

    @staticmethod
    def backward(ctx, motor_gradient, ended_gradient):
        from thesis_ltc.ltc import gpu as ltc_gpu

        *given_, kept = ctx.saved_tensors
        return (*ltc_gpu.backward(motor_gradient, ended_gradient, *given_, *ctx.rest, kept), None, None)


def through_kernels(circuits, sequences, elapsed, states, pulls):
    "Outputs of circuits of one wiring computed together, and the gradients of a pull on them: of sequences, elapsed, states, and a dictionary of each circuit's parameters."
    leaves = [tensor.to(DEVICE).requires_grad_() for tensor in (sequences, elapsed, states)]
    wiring = [buffer.to(DEVICE) for buffer in circuits[0].neighbours()]
    parameters = [[number.detach().to(DEVICE).requires_grad_() for number in circuit.numbers()] for circuit in circuits]
    numbers = torch.stack([torch.cat(own) for own in parameters])
    outputs = Kernels.apply(leaves[0], leaves[1] / circuits[0].unfolds, leaves[2], numbers, wiring, circuits[0].unfolds)
    flat = [number for own in parameters for number in own]
    found = torch.autograd.grad(sum((output * pull.to(DEVICE)).sum() for output, pull in zip(outputs, pulls)), [*leaves, *flat])
    return [output.cpu() for output in outputs], [gradient.cpu() for gradient in found]


@can_run
@settings(max_examples=200 if GPU else 25, deadline=None, derandomize=True, database=None)
@given(wiring=wirings(), batch=some.integers(1, 300 if GPU else 6), steps=some.integers(1, 64 if GPU else 4), unfolds=some.integers(1, 12 if GPU else 4), count=some.integers(1, 3),
       pace=some.sampled_from(["shared", "each circuit", "each sample"]), duration=some.floats(-2, 1), seed=some.integers(0, 999))
def test_kernels_are_as_exact_as_single_precision_allows(wiring, batch, steps, unfolds, count, pace, duration, seed):
    torch.manual_seed(seed)
    batch = max(1, min(batch, 40_000 // (steps * unfolds)))
    circuits = [LTC(wiring, unfolds, "reference") for _ in range(count)]
    shape = {"shared": (1, steps, 1), "each circuit": (count, steps, 1), "each sample": (1, steps, batch)}[pace]
    elapsed = 10.0**duration * (0.5 + torch.rand(shape))
    sequences, states = torch.randn(count, batch, steps, wiring.sensory), torch.randn(count, batch, wiring.neurons)
    pulls = torch.rand(count, batch, steps, wiring.motor), torch.rand(count, batch, wiring.neurons)
    outputs, gradients = through_kernels(circuits, sequences, elapsed, states, pulls)
    again = through_kernels(circuits, sequences, elapsed, states, pulls)
    assert all(torch.equal(a, b) for a, b in zip((*outputs, *gradients), (*again[0], *again[1])))   # the same bits
    of_elapsed = torch.zeros_like(elapsed, dtype=torch.float64)
    per = len(circuits[0].numbers())
    for which, circuit in enumerate(circuits):
        mine = elapsed[which if len(elapsed) > 1 else 0].T.expand(batch, steps)
        pull = [tensor[which] for tensor in pulls]
        names = {id(parameter): name for name, parameter in circuit.named_parameters()}
        order = [names[id(number)] for number in circuit.numbers()]
        exact = LTC(wiring, unfolds, "reference").double()
        exact.load_state_dict(circuit.state_dict())
        right, right_gradients = results(exact, (sequences[which], mine, states[which]), pull)
        _, plain_gradients = results(circuit, (sequences[which], mine, states[which]), pull)
        assert max(off([output[which] for output in outputs], right)) <= 1e-6
        found = dict(zip(order, gradients[3 + which * per:]))
        ours = [gradients[0][which], gradients[2][which], *(found[name] for name, _ in circuit.named_parameters())]
        for mine_off, his in zip(off(ours, [right_gradients[0], *right_gradients[2:]]), off([plain_gradients[0], *plain_gradients[2:]], [right_gradients[0], *right_gradients[2:]])):
            assert mine_off <= max(1e-5, 4 * his)
        late = right_gradients[1].T   # (steps, batch)
        of_elapsed[which if len(elapsed) > 1 else 0] += late if pace == "each sample" else late.sum(1, keepdim=True)
    assert off([gradients[1]], [of_elapsed])[0] <= 1e-4


@can_run
def test_more_samples_than_programs_and_no_kept_numbers(monkeypatch):
    from thesis_ltc.ltc import gpu as ltc_gpu

    monkeypatch.setattr(ltc_gpu, "PROGRAMS", 2)
    torch.manual_seed(0)
    circuit = LTC(ncp(9, 5, 3, 2, 3, 2, 3, 2), 2, "reference")
    sequence, elapsed, state = torch.randn(1, 7, 3, 9), torch.tensor([[[1.0], [0.3], [2.0]]]), torch.zeros(1, 7, 10)
    pulls = torch.rand(1, 7, 3, 2), torch.rand(1, 7, 10)
    outputs, gradients = through_kernels([circuit], sequence, elapsed, state, pulls)
    right, right_gradients = results(circuit, (sequence[0], elapsed[0, :, 0], state[0]), [pull[0] for pull in pulls])
    assert max(off([output[0] for output in outputs], [tensor.double() for tensor in right])) < 1e-6
    assert off([gradients[0][0]], [right_gradients[0].double()])[0] < 1e-5
    given_ = [tensor.to(DEVICE) for tensor in (sequence, elapsed / 2, state, torch.cat([number.detach() for number in circuit.numbers()])[None])]
    motor, _, kept = ltc_gpu.forward(*given_, [buffer.to(DEVICE) for buffer in circuit.neighbours()], 2, False)
    assert torch.equal(motor.cpu(), outputs[0]) and not kept.numel()


@can_run
def test_weights_far_from_zero_and_tables():
    from thesis_ltc.ltc import gpu as ltc_gpu

    circuit = LTC(ncp(4, 3, 2, 1, 2, 2, 1, 2), 2, "reference")
    with torch.no_grad():
        for name, value in (("sensory.weight", -30.0), ("recurrent.weight", 40.0), ("leak", -12.0), ("recurrent.slope", 300.0)):
            circuit.get_parameter(name).fill_(value)
    sequence, elapsed, state = torch.randn(1, 3, 2, 4), torch.ones(1, 2, 1), torch.randn(1, 3, 6)
    pulls = torch.rand(1, 3, 2, 1), torch.rand(1, 3, 6)
    outputs, gradients = through_kernels([circuit], sequence, elapsed, state, pulls)
    exact = LTC(circuit.wiring, 2, "reference").double()
    exact.load_state_dict(circuit.state_dict())
    right, _ = results(exact, (sequence[0], elapsed[0, :, 0], state[0]), [pull[0] for pull in pulls])
    assert max(off([output[0] for output in outputs], right)) <= 1e-6 and all(gradient.isfinite().all() for gradient in gradients)
    neurons = torch.tensor([2, 0, 2, 2, 5])
    assert ltc_gpu.table_of(neurons, 6).tolist() == [[1, -1, -1, -1], [-1] * 4, [0, 2, 3, -1], [-1] * 4, [-1] * 4, [4, -1, -1, -1], [-1] * 4, [-1] * 4]
    neurons[1] = 1   # a wiring is never changed; if one were, its table would follow
    assert ltc_gpu.table_of(neurons, 6)[1].tolist() == [1, -1, -1, -1]


@needs_gpu
@pytest.mark.parametrize("name", REPORT)
def test_circuits_of_the_report_on_the_gpu(name):
    torch.manual_seed(0)
    circuit = LTC(ncp(*REPORT[name])).cuda()
    plain, exact = LTC(circuit.wiring, backend="reference").cuda(), LTC(circuit.wiring, backend="reference").cuda().double()
    for other in (plain, exact):
        other.load_state_dict(circuit.state_dict())
    inputs = torch.randn(64, 16, circuit.wiring.sensory).cuda(), torch.tensor(0.7).cuda(), torch.randn(64, circuit.wiring.neurons).cuda()
    pulls = torch.rand(64, 16, circuit.wiring.motor).cuda(), torch.rand(64, circuit.wiring.neurons).cuda()
    (right, right_gradients), (ours, our_gradients), (_, his) = (results(one, inputs, pulls) for one in (exact, circuit, plain))
    assert max(off(ours, right)) <= 1e-6
    for mine, other in zip(off(our_gradients, right_gradients), off(his, right_gradients)):
        assert mine <= max(1e-5, 4 * other)
    with torch.autocast("cuda", torch.bfloat16):
        assert torch.equal(circuit(inputs[0])[0], circuit(inputs[0])[0]) and circuit(inputs[0])[0].dtype == torch.float32
    stacked, _ = torch.func.stack_module_state([circuit, plain])
    both = torch.vmap(lambda own: torch.func.functional_call(circuit, own, (inputs[0],))[0])(stacked)
    assert torch.equal(both[0], both[1]) and torch.equal(both[0], circuit(inputs[0])[0])


@pytest.mark.skipif(INTERPRETED or sys.platform != "linux", reason="compiles")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", REPORT)
def test_kernels_compile_for_gpus_that_are_not_here(name, capability):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from thesis_ltc.ltc import gpu as ltc_gpu

    wiring = ncp(*REPORT[name])
    neuron = {part: torch.tensor(getattr(wiring, part)) for part in ("sensory_source", "sensory_target", "source", "target")}
    reading = ltc_gpu.read_shape(neuron["sensory_target"], neuron["target"], wiring.neurons)
    back = ltc_gpu.reverse_shape(neuron["sensory_source"], neuron["source"], wiring.neurons, wiring.sensory)
    for kernel, (_, sizes, warps), more in ((ltc_gpu.read_kernel, reading, {"KEEP": True}), (ltc_gpu.reverse_kernel, back, {})):
        constants = sizes | more
        kinds = {"sensory_table": "*i32", "table": "*i32", **dict.fromkeys(neuron, "*i64"), "epsilon": "fp32", **dict.fromkeys(constants, "constexpr")}
        counts = ("batch", "steps", "unfolds", "features", "neurons", "motors", "sensory_synapses", "synapses", "size", "programs", "own_durations", "sample_durations")
        signature = {parameter: kinds.get(parameter, "i32" if parameter in counts else "*fp32") for parameter in kernel.arg_names}
        compiled = triton.compile(ASTSource(kernel, signature, constexprs=constants), target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
        assert compiled.asm["cubin"] and compiled.metadata.shared < 48 * 1024


@pytest.mark.skipif(GPU or INTERPRETED, reason="the tests above run here themselves")
def test_interpreted():
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0 and re.search(r"\b3 passed", done.stdout), done.stdout[-3000:] + done.stderr[-2000:]
