"""The compiled circuit against the readable one in double precision, over random wirings, sizes and durations."""
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from random_circuits import off, results, wirings

from thesis_ltc.ltc import LTC

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


def test_importing_the_package_leaves_numba_alone():
    "It is imported when a circuit first reads something: not by those who never do."
    code = "import sys, thesis_ltc.heads; assert not [name for name in ('numba', 'llvmlite', 'torch._dynamo') if name in sys.modules]"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_without_numba_the_reference_does_the_work_and_says_so_once():
    code = ("import sys, warnings; sys.modules['numba'] = None\nimport importlib.util\nfind = importlib.util.find_spec\nimportlib.util.find_spec = lambda name, *rest: None if name == 'numba' else find(name, *rest)\n"
            "import torch\nfrom thesis_ltc.ltc import LTC\nfrom thesis_ltc.wiring import ncp\ncircuit = LTC(ncp(4, 3, 2, 1, 2, 2, 1, 2))\n"
            "with warnings.catch_warnings(record=True) as said:\n    warnings.simplefilter('always')\n    for _ in range(3):\n        circuit(torch.randn(2, 3, 4))\n"
            "print(len([warning for warning in said if 'numba is' in str(warning.message)]))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "1", done.stderr
