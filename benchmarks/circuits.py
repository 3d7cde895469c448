"""Measure LTC circuits against LTC and CfC of ncps, and against PyTorch's LSTM and GRU with as many units.

    python benchmarks/circuits.py [--device cpu] [--seconds 1] [--threads 1 2] [--quick]

A step is one forward and one backward pass. All candidates take turns in one process, and a turn is a burst
of a few steps. The first step of a turn is reported by itself, as `cold`: the other candidates have just
emptied the caches. Needs a quiet machine.

Medians, quartiles, the bytes saved for the backward pass and the limit of the machine are written to
results/benchmarks/circuits.json (on a GPU: circuits-gpu.json). The book shows them.
"""
import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version

import ncps.torch
import numpy as np
import torch
from timing import call_seconds, environment, result_path
from torch import Tensor, nn

from thesis_ltc.core.files import write_json
from thesis_ltc.ltc import LTC, ncp

CIRCUITS = {   # arguments of `ncp`, and the steps that the report's head reads
    "original": ((32, 12, 6, 1, 6, 4, 6, 6), 16),
    "doubled": ((128, 24, 12, 2, 12, 8, 12, 12), 16),
    "half of 3 FC": ((512, 48, 24, 4, 24, 16, 24, 24), 16),
    "1,024 sensory": ((1024, 48, 24, 4, 24, 16, 24, 24), 16),
}
NCPS_LIMIT = 3e9   # bytes saved by ncps; it needs several times as much, and is left out where it saves more
BURST_SECONDS = 0.01   # of a turn
FEWEST, MOST = 5, 400   # steps of a candidate
GPU_GRAPH = "ncps LTC, CUDA graph"

Candidate = Callable[[Tensor], tuple[Tensor, Tensor]]   # sequence -> outputs, final state

FIRST_CALL = """
import time, torch
from thesis_ltc.ltc import LTC, ncp
circuit = LTC(ncp(32, 12, 6, 1, 6, 4, 6, 6))
began = time.perf_counter()
circuit(torch.randn(64, 8, 32))[0].sum().backward()
print(time.perf_counter() - began)
"""
IMPORT = """
import time, torch
began = time.perf_counter()
import thesis_ltc.ltc, thesis_ltc.ltc.drop_in
print(time.perf_counter() - began)
"""
COMPILE_NCPS = """
import time, torch, numpy
from thesis_ltc.ltc import LTC, ncp

def seconds_of_step(rnn):
    began = time.perf_counter()
    rnn(sequence)[0].sum().backward()
    return time.perf_counter() - began

torch.set_num_threads(1)
eager = LTC(ncp(32, 12, 6, 1, 6, 4, 6, 6)).to_ncps()
sequence = torch.randn(64, 8, 32)
began = time.perf_counter()
compiled = torch.compile(eager)
compiled(sequence)[0].sum().backward()
print(time.perf_counter() - began)
for rnn in (eager, compiled):
    print(1e3 * numpy.median([seconds_of_step(rnn) for _ in range(20)]))
"""


@dataclass(frozen=True)
class Size:
    "A circuit and the shape of the sequences that it reads."

    circuit: str   # a name of CIRCUITS
    steps: int
    batch: int


@dataclass
class Times:
    "Seconds of the steps of one candidate."

    warm: list[float] = field(default_factory=list)
    cold: list[float] = field(default_factory=list)   # the first step of each turn

    def is_complete(self, seconds: float) -> bool:
        "Whether the candidate has taken enough steps in enough time."
        enough = sum(self.warm) > seconds or len(self.warm) >= MOST
        return enough and len(self.warm) >= FEWEST


def sizes(quick: bool) -> Iterator[Size]:
    "The sizes to measure: those of the report, then other numbers of steps, then other batches."
    yield Size("original", 8, 64)
    for name, (_, steps) in CIRCUITS.items():
        yield Size(name, steps, 64)
    for name in ("original",) if quick else ("original", "doubled", "half of 3 FC"):
        for steps in (4, 64, 256):
            yield Size(name, steps, 64)
        for batch in (1, 16, 256, 1024):
            yield Size(name, 16, batch)


def compiled_gates() -> Callable[[np.ndarray, np.ndarray, int], None]:
    "A compiled loop that computes gates and nothing else, with the exponential of the circuit's kernel."
    from numba import njit

    from thesis_ltc.ltc.lanes import exp2, load, store

    @njit(error_model="numpy", fastmath={"contract", "nsz"})
    def gates(numbers: np.ndarray, sums: np.ndarray, rounds: int) -> None:
        one = numbers.dtype.type(1)
        for _ in range(rounds):
            for row in range(len(numbers)):
                store(sums, (row,), load(sums, (row,)) + one / (one + exp2(load(numbers, (row,)))))

    return gates


def cpu_limit() -> float:
    "Gates per second of one thread in a loop over numbers in the first-level cache, the best of 100 trials."
    from thesis_ltc.ltc.layout import WIDTH

    numbers = np.random.default_rng(0).normal(size=(128, WIDTH)).astype(np.float32)
    sums = np.zeros_like(numbers)
    rounds = 500
    gates = compiled_gates()
    gates(numbers, sums, 1)   # compiles
    trials = [call_seconds(partial(gates, numbers, sums, rounds), "cpu") for _ in range(100)]
    return numbers.size * rounds / min(trials)


def gpu_floor(substeps: int) -> float:
    """Seconds of a kernel that takes this many dependent sub-steps and does nothing else.

    A sub-step is a sum, an exponential and a division. Each needs the result of the one before, so that no
    kernel of a circuit can be faster.
    """
    import triton
    import triton.language as tl

    @triton.jit
    def chain(found, substeps, ROWS: tl.constexpr):
        x = tl.load(found + tl.arange(0, ROWS))
        for _ in range(substeps):
            x = 1 / (1 + tl.exp(x - tl.sum(x, 0) * 1e-3))
        tl.store(found + tl.arange(0, ROWS), x)

    found = torch.zeros(32, device="cuda")
    return gpu_median(lambda: chain[(1,)](found, substeps, ROWS=32, num_warps=1), 0.2)


def gpu_median(call: Callable[[], object], seconds: float) -> float:
    "Median duration of a call on the GPU, after five calls that are not measured; repeated for `seconds`."
    for _ in range(5):
        call()
    times: list[float] = []
    while sum(times) < seconds:
        times.append(call_seconds(call, "cuda"))
    return float(np.median(times))


def saved_bytes(forward: Callable[[], Tensor]) -> int:
    "Bytes of the tensors that a forward pass saves for its backward pass; shared memory counts once."
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(seen.values())


def ncps_bytes(circuit: LTC, size: Size) -> int:
    "An estimate of the bytes that ncps saves for the backward pass: six dense tensors for each sub-step."
    neurons, sensory = circuit.wiring.neurons, circuit.wiring.sensory
    entries = size.steps * size.batch * neurons * (sensory + circuit.unfolds * neurons)
    return 6 * 4 * entries


def candidates_of(size: Size, device: str) -> dict[str, Candidate]:
    "What is compared: the circuit, the same circuit computed by ncps where it fits, and other networks."
    circuit = LTC(ncp(*CIRCUITS[size.circuit][0])).to(device)
    sensory, neurons = circuit.wiring.sensory, circuit.wiring.neurons
    peers = {
        "ncps CfC": ncps.torch.CfC(sensory, circuit.wiring.to_ncps()),
        "torch LSTM": nn.LSTM(sensory, neurons, batch_first=True),
        "torch GRU": nn.GRU(sensory, neurons, batch_first=True),
    }
    candidates: dict[str, Candidate] = {"compiled": circuit}
    if ncps_bytes(circuit, size) < NCPS_LIMIT:
        candidates["ncps LTC"] = circuit.to_ncps().to(device)
        if device == "cuda":
            candidates[GPU_GRAPH] = cuda_graph(circuit, size)
    return candidates | {name: peer.to(device) for name, peer in peers.items()}


def cuda_graph(circuit: LTC, size: Size) -> Candidate:
    "The circuit computed by ncps, as one CUDA graph for each pass."
    example = torch.randn(size.batch, size.steps, circuit.wiring.sensory, device="cuda", requires_grad=True)
    return torch.cuda.make_graphed_callables(circuit.to_ncps().to("cuda"), (example,))


def step_seconds(candidate: Candidate, sequence: Tensor) -> float:
    "Seconds of one step; clearing the gradients is not counted."
    if isinstance(candidate, nn.Module):
        candidate.zero_grad()
    sequence.grad = None
    return call_seconds(lambda: candidate(sequence)[0].sum().backward(), sequence.device.type)


def take_turn(candidate: Candidate, sequence: Tensor, times: Times) -> None:
    "Measure one cold step, then steps until the burst is over."
    times.cold.append(step_seconds(candidate, sequence))
    burst = [step_seconds(candidate, sequence)]
    while sum(burst) < BURST_SECONDS:
        burst.append(step_seconds(candidate, sequence))
    times.warm += burst


def measure_candidates(
    candidates: Mapping[str, Candidate],
    sequence: Tensor,                        # (batch, steps, sensory)
    seconds: float,                          # for each candidate
) -> tuple[dict[str, Times], list[float]]:   # and seconds of the compiled circuit's forward pass
    "Measure all candidates in turns."
    circuit, device = candidates["compiled"], sequence.device.type
    times = {name: Times() for name in candidates}
    forward: list[float] = []
    for candidate in candidates.values():
        candidate(sequence)[0].sum().backward()   # compiles, and fills the caches
    while unfinished := [name for name in candidates if not times[name].is_complete(seconds)]:
        for name in unfinished:
            take_turn(candidates[name], sequence, times[name])
        with torch.no_grad():
            while len(forward) < 20 * len(times["compiled"].cold):
                forward.append(call_seconds(lambda: circuit(sequence), device))
    return times, forward


def gate_count(circuit: LTC, size: Size) -> int:
    "Gates of a forward pass: sensory synapses once a step, the others once a sub-step."
    sensory, recurrent = len(circuit.wiring.sensory_source), len(circuit.wiring.source)
    return size.batch * size.steps * (sensory + circuit.unfolds * recurrent)


def milliseconds(times: Times) -> dict[str, float]:
    "Quartiles of a candidate's warm steps, and the median of its cold ones."
    quartiles = 1e3 * np.quantile(times.warm, (0.25, 0.5, 0.75))
    low, median, high = quartiles.round(4).tolist()
    cold = round(1e3 * float(np.median(times.cold)), 4)
    return {"low": low, "median": median, "high": high, "cold": cold, "rounds": len(times.warm)}


def measure(size: Size, seconds: float, threads: int, device: str) -> list[dict]:
    "One row for each candidate."
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    candidates = candidates_of(size, device)
    circuit = candidates["compiled"]
    shape = (size.batch, size.steps, circuit.wiring.sensory)
    sequence = torch.randn(shape, requires_grad=True, device=device)
    times, forward = measure_candidates(candidates, sequence, seconds)
    medians = {name: float(np.median(found.warm)) for name, found in times.items()}
    gates_per_second = round(gate_count(circuit, size) / float(np.median(forward)))
    rows = []
    for name, candidate in candidates.items():
        outputs = lambda candidate=candidate: candidate(sequence)[0]
        rows.append({
            **vars(size), "threads": threads, "way": name, **milliseconds(times[name]),
            "kept_bytes": None if name == GPU_GRAPH else saved_bytes(outputs),
            "gates_per_second": gates_per_second if name == "compiled" else None,
            "times_of_ncps": round(medians["ncps LTC"] / medians[name], 2) if "ncps LTC" in medians else None,
        })
    return rows


def numbers_printed_by(program: str, cache: str, limit: float = 300) -> list[float] | None:
    "The numbers that a program prints in a process of its own; None if it fails or exceeds `limit` seconds."
    command = [sys.executable, "-c", program]
    variables = os.environ | {"NUMBA_CACHE_DIR": cache}
    try:
        done = subprocess.run(
            command, env=variables, capture_output=True, text=True, timeout=limit, check=True)
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError):
        return None
    return [round(float(number), 3) for number in done.stdout.split()]


def measure_cpu() -> dict:
    "The processor's limit, the first calls, the import, and ncps through torch.compile."
    with tempfile.TemporaryDirectory() as cache:
        programs = (FIRST_CALL, FIRST_CALL, IMPORT)
        (first,), (again,), (load,) = (numbers_printed_by(program, cache) for program in programs)
        compiled = numbers_printed_by(COMPILE_NCPS, cache)
    print(f"first call {first} s, from the cache {again} s, import beyond torch {load} s", flush=True)
    print(f"ncps: seconds to compile, then eager and compiled, ms: {compiled}", flush=True)
    columns = ("seconds_to_compile", "eager", "compiled")
    return {
        "gates_per_second_at_most": round(cpu_limit()),
        "first_call_seconds": first,
        "first_call_from_cache_seconds": again,
        "import_seconds": load,
        "ncps_compiled": dict(zip(columns, compiled, strict=True)) if compiled else None,
    }


def measure_gpu() -> dict:
    "The shortest possible time of 48 and of 96 sub-steps."
    return {"floor_milliseconds": {substeps: round(1e3 * gpu_floor(substeps), 4) for substeps in (48, 96)}}


def show(rows: list[dict]) -> None:
    "Print the rows of one size in one line."
    medians = [f"{row['way']} {row['median']:.2f} ms" for row in rows]
    size = "-> {times_of_ncps} times: {circuit}, {steps} steps, batch {batch}, {threads} threads"
    print(*medians, size.format(**rows[0]), sep="  ", flush=True)


def parse_arguments() -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each candidate and size")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--quick", action="store_true", help="vary only the original circuit")
    return parser.parse_args()


def main() -> None:
    given = parse_arguments()
    on_cpu = given.device == "cpu"
    torch.set_num_threads(1)
    machine = measure_cpu() if on_cpu else measure_gpu()
    rows: list[dict] = []
    for threads in given.threads if on_cpu else given.threads[:1]:
        for size in sizes(given.quick):
            found = measure(size, given.seconds, threads, given.device)
            rows += found
            show(found)
    versions = {package: version(package) for package in ("ncps", "numba" if on_cpu else "triton")}
    path = result_path("circuits", given.device)
    write_json(path, {"rows": rows, **machine, **environment(given.device), **versions})
    print(f"written: {path}")


if __name__ == "__main__":
    main()
