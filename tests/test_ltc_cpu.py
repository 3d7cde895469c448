"""The compiled circuit against the readable one in double precision, over random wirings, sizes and durations."""
import subprocess
import sys

import pytest
import torch
import torch.nn.utils.prune
from hypothesis import given, settings
from hypothesis import strategies as some
from random_circuits import off, results, wirings

from thesis_ltc.ltc import LTC
from thesis_ltc.ltc.wiring import Wiring, ncp

pytest.importorskip("numba")
pytestmark = pytest.mark.timeout(600)
FORWARD, BACKWARD = 1e-6, 1e-5   # of the tensor's largest number


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(wiring=wirings(), batch=some.integers(1, 257), steps=some.integers(1, 64), unfolds=some.integers(1, 12), pace=some.sampled_from(["one", "each step", "each sample"]),
       duration=some.floats(-2, 1), seed=some.integers(0, 999))
def test_as_exact_as_single_precision_allows(wiring, batch, steps, unfolds, pace, duration, seed):
    torch.manual_seed(seed)
    batch = max(1, min(batch, 40_000 // (steps * unfolds)))   # what the reference can do in a second
    fast, plain, exact = LTC(wiring, unfolds), LTC(wiring, unfolds, "reference"), LTC(wiring, unfolds, "reference").double()
    with torch.no_grad():
        for parameter in (fast.input_scale, fast.output_scale):
            parameter.uniform_(0.5, 1.5)
        for parameter in (fast.input_shift, fast.output_shift):
            parameter.uniform_(-0.5, 0.5)
    for other in (plain, exact):
        other.load_state_dict(fast.state_dict())
    shape = {"one": (), "each step": (steps,), "each sample": (batch, steps)}[pace]
    inputs = (torch.randn(batch, steps, wiring.sensory), 10.0**duration * (0.5 + torch.rand(shape)), torch.randn(batch, wiring.neurons))
    pulls = (torch.rand(batch, steps, wiring.motor), torch.rand(batch, wiring.neurons))   # positive: where they cancel, single precision as such is further off
    (right, right_gradients), (ours, our_gradients), (theirs, their_gradients) = (results(circuit, inputs, pulls) for circuit in (exact, fast, plain))
    assert max(off(ours, right)) <= FORWARD
    for name, mine, his in zip(["sequence", "elapsed", "state", *(name for name, _ in fast.named_parameters())], off(our_gradients, right_gradients), off(their_gradients, right_gradients)):
        assert mine <= max(BACKWARD, 4 * his), name
    bounds = [fast.rest, fast.sensory.reversal, fast.recurrent.reversal, inputs[2].flatten(), torch.zeros(1)]
    low, high = min(bound.min().item() for bound in bounds if bound.numel()), max(bound.max().item() for bound in bounds if bound.numel())
    assert low - 1e-5 <= ours[1].min() and ours[1].max() <= high + 1e-5   # the theorem of the LTC paper
    again = results(fast, inputs, pulls)
    assert all(torch.equal(a, b) for one, other in zip((ours, our_gradients), again) for a, b in zip(one, other))


@pytest.mark.parametrize("batch, steps, unfolds, duration", [(257, 64, 12, 0.01), (257, 64, 12, 10.0), (1, 64, 12, 0.01), (257, 1, 1, 10.0), (16, 64, 1, 1.0)])
def test_as_exact_at_the_corners(batch, steps, unfolds, duration):
    "The longest, largest and shortest of what is promised, which random sizes seldom reach; pulls of either sign."
    torch.manual_seed(batch + steps)
    wiring = ncp(5, 6, 4, 2, 2, 2, 3, 2)
    fast, plain, exact = LTC(wiring, unfolds), LTC(wiring, unfolds, "reference"), LTC(wiring, unfolds, "reference").double()
    for other in (plain, exact):
        other.load_state_dict(fast.state_dict())
    inputs = (torch.randn(batch, steps, 5), duration * (0.5 + torch.rand(batch, steps)), torch.randn(batch, wiring.neurons))
    pulls = (torch.randn(batch, steps, 2), torch.randn(batch, wiring.neurons))
    (right, right_gradients), (ours, our_gradients), (theirs, their_gradients) = (results(circuit, inputs, pulls) for circuit in (exact, fast, plain))
    assert max(off(ours, right)) <= FORWARD
    assert all(mine <= max(BACKWARD, 4 * his) for mine, his in zip(off(our_gradients, right_gradients), off(their_gradients, right_gradients)))


@pytest.mark.parametrize("duration", [0.01, 0.1, 1.0, 3.0, 10.0])
def test_a_potential_that_falls_to_nearly_nothing_keeps_its_digits(duration):
    "A single neuron without synapses, of many starts: what is left after an unfold is compared by itself, and not beside larger numbers."
    empty = {name: [] for name in ("sensory_source", "sensory_target", "sensory_polarity", "source", "target", "polarity")}
    wiring = Wiring(1, 0, 0, 1, **empty)
    for seed in range(20):
        torch.manual_seed(seed)
        fast, plain, exact = LTC(wiring, 1), LTC(wiring, 1, "reference"), LTC(wiring, 1, "reference").double()
        for other in (plain, exact):
            other.load_state_dict(fast.state_dict())
        sequence, state = torch.zeros(1, 2, 1), torch.randn(1, 1)
        right, ours, theirs = (circuit(sequence.to(circuit.rest.dtype), duration, state.to(circuit.rest.dtype))[1] for circuit in (exact, fast, plain))
        assert off([ours], [right])[0] <= max(FORWARD, 4 * off([theirs], [right])[0]), seed   # where it crosses zero, no single precision is exact


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(wiring=wirings(), batch=some.integers(1, 40), steps=some.integers(1, 8), unfolds=some.integers(1, 6), seed=some.integers(0, 999))
def test_double_precision_is_the_reference(wiring, batch, steps, unfolds, seed):
    torch.manual_seed(seed)
    fast, exact = LTC(wiring, unfolds).double(), LTC(wiring, unfolds, "reference").double()
    exact.load_state_dict(fast.state_dict())
    inputs = (torch.randn(batch, steps, wiring.sensory), 0.01 + torch.rand(batch, steps), torch.randn(batch, wiring.neurons))
    pulls = (torch.rand(batch, steps, wiring.motor), torch.rand(batch, wiring.neurons))
    (ours, our_gradients), (right, right_gradients) = results(fast, inputs, pulls), results(exact, inputs, pulls)
    assert max(off(ours, right)) <= 1e-12 and max(off(our_gradients, right_gradients)) <= 1e-10


def test_gates_that_are_wide_open_or_shut_stay_bounded():
    "Slopes, weights and inputs of thousands: the exponential is cut off, and potentials keep the theorem's bounds; what isn't a number stays so."
    torch.manual_seed(0)
    fast, exact = LTC(ncp(6, 8, 5, 2, 3, 3, 4, 3)), LTC(ncp(6, 8, 5, 2, 3, 3, 4, 3), backend="reference").double()
    with torch.no_grad():
        for synapses in (fast.sensory, fast.recurrent):
            synapses.slope.mul_(1e4)
            synapses.weight.add_(1e3)
    exact.load_state_dict(fast.state_dict())
    for size in (1.0, 1e4, 1e30):
        read = size * torch.randn(33, 5, 6)
        with torch.no_grad():
            ours, right = fast(read), exact(read.double())
        assert max(off(ours, right)) <= 1e-5 and ours[1].abs().max() <= 1 + 1e-5   # reversals are -1 and 1, rest is within
        gradients = torch.autograd.grad(fast(read)[0].sum(), list(fast.parameters()))
        assert all(gradient.isfinite().all() for gradient in gradients)
    spoiled = torch.randn(17, 5, 6)
    spoiled[3, 2, 1] = float("nan")
    spoiled.view(torch.int32)[9, 2, 1] = 0x7FC00001   # another NaN, with a payload
    with torch.no_grad():
        motor = fast(spoiled)[0]
    for which in (3, 9):
        assert motor[which, 2:].isnan().any() and not motor[which, :2].isnan().any()
    assert not motor[[which for which in range(17) if which not in (3, 9)]].isnan().any()


@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("shared", [True, False])
def test_circuits_in_one_call_equal_those_apart(count, shared):
    "Outputs and gradients, with durations of their own or common ones, to the bit."
    torch.manual_seed(count)
    circuits = [LTC(ncp(5, 6, 4, 2, 2, 2, 3, 2), 3) for _ in range(count)]
    stacked = {name: torch.stack([circuit.get_parameter(name) for circuit in circuits]).detach().requires_grad_() for name, _ in circuits[0].named_parameters()}
    read, spans = torch.randn(count, 21, 7, 5, requires_grad=True), (0.1 + torch.rand(21, 7) if shared else 0.1 + torch.rand(count, 21, 7)).requires_grad_()
    pull = torch.randn(count, 21, 7, 2)
    together = torch.vmap(lambda own, one, span: torch.func.functional_call(circuits[0], own, (one, span))[0], in_dims=(0, 0, None if shared else 0))(stacked, read, spans)
    found = torch.autograd.grad((together * pull).sum(), [read, spans, *stacked.values()])
    apart = [circuit(read[which], spans if shared else spans[which])[0] for which, circuit in enumerate(circuits)]
    theirs = [torch.autograd.grad((one * pull[which]).sum(), [read, spans, *circuits[which].parameters()], retain_graph=True) for which, one in enumerate(apart)]
    assert all(torch.equal(one, together[which]) for which, one in enumerate(apart))
    assert torch.equal(found[0], sum(their[0] for their in theirs))
    torch.testing.assert_close(found[1], sum(their[1] for their in theirs), rtol=1e-5, atol=1e-6)
    for place in range(len(stacked)):
        assert all(torch.equal(found[2 + place][which], theirs[which][2 + place]) for which in range(count))


def test_parameters_are_found_by_name():
    "However a module came to hold them: put back in another order, computed from others, pruned."
    circuit = LTC(ncp(4, 3, 2, 1, 2, 2, 1, 2))
    read = torch.randn(3, 5, 4)
    before = circuit(read)[0]
    leak = circuit.leak
    del circuit.leak
    circuit.leak = torch.nn.Parameter(leak.detach().clone())
    assert torch.equal(circuit(read)[0], before)
    torch.nn.utils.parametrize.register_parametrization(circuit, "rest", torch.nn.Identity())
    torch.nn.utils.prune.identity(circuit.sensory, "weight")
    circuit.register_buffer("own", torch.zeros(3))
    assert torch.equal(circuit(read)[0], before)


def test_where_nothing_can_be_kept_on_disk_it_says_so_once(tmp_path):
    code = ("import warnings\nfrom numba.core import caching\ncaching.CacheImpl._locator_classes = []\nimport torch\nfrom thesis_ltc.ltc import LTC\nfrom thesis_ltc.ltc import ncp\n"
            "with warnings.catch_warnings(record=True) as said:\n    warnings.simplefilter('always')\n    from thesis_ltc.ltc import cpu as ltc_cpu\n"
            "print(ltc_cpu.COMPILED['cache'], len([w for w in said if 'NUMBA_CACHE_DIR' in str(w.message)]))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "1"], done.stderr


def test_importing_the_package_leaves_numba_alone():
    "It is imported when a circuit first reads something: not by those who never do."
    code = "import sys, thesis_ltc.heads; assert not [name for name in ('numba', 'llvmlite', 'torch._dynamo') if name in sys.modules]"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_without_numba_the_reference_does_the_work_and_says_so_once():
    code = ("import sys, warnings; sys.modules['numba'] = None\nimport importlib.util\nfind = importlib.util.find_spec\nimportlib.util.find_spec = lambda name, *rest: None if name == 'numba' else find(name, *rest)\n"
            "import torch\nfrom thesis_ltc.ltc import LTC\nfrom thesis_ltc.ltc import ncp\ncircuit = LTC(ncp(4, 3, 2, 1, 2, 2, 1, 2))\n"
            "with warnings.catch_warnings(record=True) as said:\n    warnings.simplefilter('always')\n    for _ in range(3):\n        circuit(torch.randn(2, 3, 4))\n"
            "print(len([warning for warning in said if 'numba can' in str(warning.message)]))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "1", done.stderr
