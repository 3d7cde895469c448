"""The compiled circuit against the reference in double precision: random wirings, sizes and durations."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.utils.prune
from hypothesis import given, settings
from hypothesis import strategies as some
from random_circuits import copies, outputs_and_gradients, relative_error, relative_errors, wirings

from thesis_ltc.ltc import LTC, ncp
from thesis_ltc.ltc.wiring import Wiring

pytest.importorskip("numba")
pytestmark = pytest.mark.timeout(600)
FORWARD, BACKWARD = 1e-6, 1e-5   # of the tensor's largest number
SIZES = (5, 6, 4, 2, 2, 2, 3, 2)
random_cases = settings(max_examples=60, deadline=None, derandomize=True, database=None)
fewer_cases = settings(max_examples=20, deadline=None, derandomize=True, database=None)


def assert_as_exact_as_the_reference(circuit, inputs, pulls):
    "Errors of single precision: within the bounds, or four times the error of the reference."
    plain, exact = copies(circuit)
    right, right_gradients = outputs_and_gradients(exact, inputs, pulls)
    ours, our_gradients = outputs_and_gradients(circuit, inputs, pulls)
    _, their_gradients = outputs_and_gradients(plain, inputs, pulls)
    assert max(relative_errors(ours, right)) <= FORWARD
    names = ["sequence", "elapsed", "state", *(name for name, _ in circuit.named_parameters())]
    our_errors = relative_errors(our_gradients, right_gradients)
    their_errors = relative_errors(their_gradients, right_gradients)
    for name, our, their in zip(names, our_errors, their_errors, strict=True):
        assert our <= max(BACKWARD, 4 * their), name
    return ours, our_gradients


def assert_within_the_theorems_bounds(circuit, state, final):
    "Potentials stay between the lowest and the highest of start, rest and reversals (Hasani et al. 2021)."
    bounds = [circuit.rest, circuit.sensory.reversal, circuit.recurrent.reversal, state.flatten()]
    bounds.append(torch.zeros(1))
    everything = torch.cat([bound.detach() for bound in bounds])
    assert everything.min() - 1e-5 <= final.min() and final.max() <= everything.max() + 1e-5


@random_cases
@given(
    wiring=wirings(), batch=some.integers(1, 257), steps=some.integers(1, 64), unfolds=some.integers(1, 12),
    form=some.sampled_from(["one", "each step", "each sample"]), duration=some.floats(-2, 1),
    seed=some.integers(0, 999),
)
def test_as_exact_as_single_precision_allows(wiring, batch, steps, unfolds, form, duration, seed):
    torch.manual_seed(seed)
    batch = max(1, min(batch, 40_000 // (steps * unfolds)))   # as much as the reference reads in a second
    circuit = LTC(wiring, unfolds)
    with torch.no_grad():
        for name in ("input", "output"):
            circuit.get_parameter(f"{name}_scale").uniform_(0.5, 1.5)
            circuit.get_parameter(f"{name}_shift").uniform_(-0.5, 0.5)
    shape = {"one": (), "each step": (steps,), "each sample": (batch, steps)}[form]
    elapsed = 10.0**duration * (0.5 + torch.rand(shape))
    inputs = (torch.randn(batch, steps, wiring.sensory), elapsed, torch.randn(batch, wiring.neurons))
    # positive: where pulls cancel, single precision as such is further off
    pulls = (torch.rand(batch, steps, wiring.motor), torch.rand(batch, wiring.neurons))
    outputs, gradients = assert_as_exact_as_the_reference(circuit, inputs, pulls)
    assert_within_the_theorems_bounds(circuit, inputs[2], outputs[1])
    again = outputs_and_gradients(circuit, inputs, pulls)
    for one, other in zip((*outputs, *gradients), (*again[0], *again[1]), strict=True):
        assert torch.equal(one, other)


CORNERS = [(257, 64, 12, 0.01), (257, 64, 12, 10.0), (1, 64, 12, 0.01), (257, 1, 1, 10.0), (16, 64, 1, 1.0)]


@pytest.mark.parametrize("batch, steps, unfolds, duration", CORNERS)
def test_as_exact_at_the_corners(batch, steps, unfolds, duration):
    "The longest, largest and shortest sizes, which random ones seldom reach; pulls of either sign."
    torch.manual_seed(batch + steps)
    circuit = LTC(ncp(*SIZES), unfolds)
    elapsed, state = duration * (0.5 + torch.rand(batch, steps)), torch.randn(batch, circuit.wiring.neurons)
    pulls = (torch.randn(batch, steps, 2), torch.randn(batch, circuit.wiring.neurons))
    assert_as_exact_as_the_reference(circuit, (torch.randn(batch, steps, 5), elapsed, state), pulls)


@pytest.mark.parametrize("duration", [0.01, 0.1, 1.0, 3.0, 10.0])
def test_a_potential_that_falls_to_nearly_nothing_keeps_its_digits(duration):
    "A single neuron without synapses, from many starts: the small rest is compared by itself."
    wiring = Wiring(1, 0, 0, 1, [], [], [], [], [], [])
    for seed in range(20):
        torch.manual_seed(seed)
        circuit = LTC(wiring, 1)
        plain, exact = copies(circuit)
        state = torch.randn(1, 1)
        right, ours, theirs = (
            one(torch.zeros(1, 2, 1), duration, state.to(one.rest))[1] for one in (exact, circuit, plain)
        )
        allowed = max(FORWARD, 4 * relative_error(theirs, right))   # where it crosses zero, none is exact
        assert relative_error(ours, right) <= allowed, seed


@fewer_cases
@given(
    wiring=wirings(), batch=some.integers(1, 40), steps=some.integers(1, 8), unfolds=some.integers(1, 6),
    seed=some.integers(0, 999),
)
def test_double_precision_is_the_reference(wiring, batch, steps, unfolds, seed):
    torch.manual_seed(seed)
    circuit = LTC(wiring, unfolds).double()
    _, exact = copies(circuit)
    elapsed, state = 0.01 + torch.rand(batch, steps), torch.randn(batch, wiring.neurons)
    inputs = (torch.randn(batch, steps, wiring.sensory), elapsed, state)
    pulls = (torch.rand(batch, steps, wiring.motor), torch.rand(batch, wiring.neurons))
    ours, our_gradients = outputs_and_gradients(circuit, inputs, pulls)
    right, right_gradients = outputs_and_gradients(exact, inputs, pulls)
    assert max(relative_errors(ours, right)) <= 1e-12
    assert max(relative_errors(our_gradients, right_gradients)) <= 1e-10


def test_gates_that_are_wide_open_or_shut_stay_bounded():
    "Slopes, weights and inputs of thousands: the exponential is clipped, and potentials keep their bounds."
    torch.manual_seed(0)
    circuit = LTC(ncp(6, 8, 5, 2, 3, 3, 4, 3))
    with torch.no_grad():
        for synapses in (circuit.sensory, circuit.recurrent):
            synapses.slope.mul_(1e4)
            synapses.weight.add_(1e3)
    _, exact = copies(circuit)
    for size in (1.0, 1e4, 1e30):
        sequence = size * torch.randn(33, 5, 6)
        with torch.no_grad():
            ours, right = circuit(sequence), exact(sequence.double())
        assert max(relative_errors(ours, right)) <= 1e-5
        assert ours[1].abs().max() <= 1 + 1e-5   # reversals are -1 and 1, rest is between them
        gradients = torch.autograd.grad(circuit(sequence)[0].sum(), list(circuit.parameters()))
        assert all(gradient.isfinite().all() for gradient in gradients)


def test_nan_stays_nan_in_its_own_sample():
    torch.manual_seed(0)
    circuit = LTC(ncp(6, 8, 5, 2, 3, 3, 4, 3))
    sequence = torch.randn(17, 5, 6)
    sequence[3, 2, 1] = float("nan")
    sequence.view(torch.int32)[9, 2, 1] = 0x7FC00001   # another NaN, with a payload
    with torch.no_grad():
        motor = circuit(sequence)[0]
    for sample in (3, 9):
        assert motor[sample, 2:].isnan().any() and not motor[sample, :2].isnan().any()
    assert not motor[[sample for sample in range(17) if sample not in (3, 9)]].isnan().any()


@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("shared", [True, False])
def test_circuits_in_one_call_equal_those_apart(count, shared):
    "Outputs and gradients, with individual or common durations, to the bit."
    torch.manual_seed(count)
    circuits = [LTC(ncp(*SIZES), 3) for _ in range(count)]
    names = [name for name, _ in circuits[0].named_parameters()]
    rows = {name: torch.stack([c.get_parameter(name) for c in circuits]) for name in names}
    stacked = {name: row.detach().requires_grad_() for name, row in rows.items()}
    sequence = torch.randn(count, 21, 7, 5, requires_grad=True)
    spans = (0.1 + torch.rand(21, 7) if shared else 0.1 + torch.rand(count, 21, 7)).requires_grad_()
    pull = torch.randn(count, 21, 7, 2)

    def call(own, one, span):
        return torch.func.functional_call(circuits[0], own, (one, span))[0]

    together = torch.vmap(call, in_dims=(0, 0, None if shared else 0))(stacked, sequence, spans)
    found = torch.autograd.grad((together * pull).sum(), [sequence, spans, *stacked.values()])
    theirs = []
    for which, circuit in enumerate(circuits):
        one = circuit(sequence[which], spans if shared else spans[which])[0]
        assert torch.equal(one, together[which])
        leaves = [sequence, spans, *circuit.parameters()]
        theirs.append(torch.autograd.grad((one * pull[which]).sum(), leaves))
    assert torch.equal(found[0], sum(their[0] for their in theirs))
    torch.testing.assert_close(found[1], sum(their[1] for their in theirs), rtol=1e-5, atol=1e-6)
    for place in range(2, len(found)):
        assert all(torch.equal(found[place][which], their[place]) for which, their in enumerate(theirs))


def test_parameters_are_found_by_name():
    "Put back in another order, computed from others, or pruned: the circuit computes the same."
    circuit = LTC(ncp(4, 3, 2, 1, 2, 2, 1, 2))
    sequence = torch.randn(3, 5, 4)
    before = circuit(sequence)[0]
    leak = circuit.leak
    del circuit.leak
    circuit.leak = torch.nn.Parameter(leak.detach().clone())
    assert torch.equal(circuit(sequence)[0], before)
    torch.nn.utils.parametrize.register_parametrization(circuit, "rest", torch.nn.Identity())
    torch.nn.utils.prune.identity(circuit.sensory, "weight")
    circuit.register_buffer("own", torch.zeros(3))
    assert torch.equal(circuit(sequence)[0], before)


def run_python(code, folder=None, **variables):
    "What a program prints, in a process of its own."
    command, environment = [sys.executable, "-c", code], os.environ | variables
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


WITHOUT_CACHE = """
import warnings
from numba.core import caching
caching.CacheImpl._locator_classes = []
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    from thesis_ltc.ltc import lanes
print(lanes.STORED, len([w for w in said if "NUMBA_CACHE_DIR" in str(w.message)]))
"""
WITHOUT_NUMBA = """
import sys, warnings
sys.modules["numba"] = None
import torch
from thesis_ltc.ltc import LTC, ncp
circuit = LTC(ncp(4, 3, 2, 1, 2, 2, 1, 2))
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for _ in range(3):
        circuit(torch.randn(2, 3, 4))
print(len([w for w in said if "numba can" in str(w.message)]))
"""
READ = """
import torch
from thesis_ltc.ltc import LTC, ncp
torch.manual_seed(0)
circuit = LTC(ncp(4, 3, 2, 1, 2, 2, 1, 2))
with torch.no_grad():
    print(circuit(torch.ones(1, 3, 4))[0].flatten().tolist())
"""


def test_where_nothing_can_be_cached_a_warning_says_so_once():
    assert run_python(WITHOUT_CACHE) == "False 1"


def test_importing_the_package_leaves_numba_alone():
    "Numba is imported when a circuit first reads a sequence."
    names = ("numba", "llvmlite", "torch._dynamo")
    code = f"import sys, thesis_ltc.heads; print([name for name in {names} if name in sys.modules])"
    assert run_python(code) == "[]"


def test_without_numba_the_reference_is_used_with_one_warning():
    assert run_python(WITHOUT_NUMBA) == "1"


def test_a_change_in_one_kernel_file_invalidates_all_compiled_code(tmp_path):
    "Numba looks at a function's own file alone; the exponential stands in another file than the loops."
    original, package = Path(__file__).parents[1] / "thesis_ltc", tmp_path / "thesis_ltc"
    shutil.copytree(original, package, ignore=shutil.ignore_patterns("__pycache__"))
    variables = {"NUMBA_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(tmp_path)}
    before = run_python(READ, tmp_path, **variables)
    assert run_python(READ, tmp_path, **variables) == before
    lanes = package / "ltc" / "lanes.py"
    text = lanes.read_text(encoding="utf-8")
    assert text.count("LIMIT, UNIT") == 1
    lanes.write_text(text.replace("np.float32(126)", "np.float32(0)"), encoding="utf-8")   # 2**y is 1
    assert run_python(READ, tmp_path, **variables) != before
