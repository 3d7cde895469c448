"""Circuits beside ncps's LTC and CfC, and beside torch's LSTM and GRU of as many units.

    python benchmarks/circuits.py [--device cpu] [--seconds 1] [--threads 1 2] [--quick]

A step is forward and backward. All ways are measured in turn in one process, on a quiet machine: a turn is a burst of a few
calls, of which the first, after the others have emptied the caches, is told apart as `cold`. Medians and quartiles, the
bytes that are kept for the backward pass, and the machine's own limit go to results/benchmarks/circuits.json (on a GPU:
circuits-gpu.json); the book shows them.
"""
import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version

import ncps.torch
import numpy as np
import torch
from torch import Tensor, nn

from thesis_ltc.core.files import repository, write_json
from thesis_ltc.ltc import LTC
from thesis_ltc.ltc import ncp

CIRCUITS = {  # sizes, and steps in the report's heads
    "original": ((32, 12, 6, 1, 6, 4, 6, 6), 16), "doubled": ((128, 24, 12, 2, 12, 8, 12, 12), 16),
    "half of 3 FC": ((512, 48, 24, 4, 24, 16, 24, 24), 16), "1,024 sensory": ((1024, 48, 24, 4, 24, 16, 24, 24), 16),
}
LARGEST = 3e9   # bytes that ncps may keep, about, and needs several times over; what is larger is measured without it
BURST = 0.01   # seconds of a turn
FIRST = """
import time, torch
from thesis_ltc.ltc import LTC
from thesis_ltc.ltc import ncp
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
COMPILED = """
import time, torch, numpy
from thesis_ltc.ltc import LTC
from thesis_ltc.ltc import ncp
torch.set_num_threads(1)
rnn, sequence, found = LTC(ncp(32, 12, 6, 1, 6, 4, 6, 6)).to_ncps(), torch.randn(64, 8, 32), []
began = time.perf_counter()
compiled = torch.compile(rnn)
compiled(sequence)[0].sum().backward()
took = time.perf_counter() - began
for way in (rnn, compiled):
    times = []
    for _ in range(20):
        began = time.perf_counter()
        way(sequence)[0].sum().backward()
        times.append(time.perf_counter() - began)
    found.append(1e3 * float(numpy.median(times)))
print(took, *found)
"""


def sizes(quick: bool) -> Iterator[tuple[str, int, int]]:
    "Circuit, steps and batch of each measurement: the report's own, then along the steps, then along the batch."
    yield "original", 8, 64
    for name, (_, steps) in CIRCUITS.items():
        yield name, steps, 64
    for name in ("original",) if quick else ("original", "doubled", "half of 3 FC"):
        for steps in (4, 64, 256):
            yield name, steps, 64
        for batch in (1, 16, 256, 1024):
            yield name, 16, batch


def cpu_limit() -> float:
    "Gates a second of a bare loop over the same power of two, from the first cache, the best of many; one thread."
    from numba import njit

    from thesis_ltc.ltc.layout import WIDTH
    from thesis_ltc.ltc.lanes import exp2, load, store

    @njit(error_model="numpy", fastmath={"contract", "nsz"})
    def bare_gates(numbers: np.ndarray, found: np.ndarray, rounds: int) -> None:
        one = numbers.dtype.type(1)
        for _ in range(rounds):
            for row in range(len(numbers)):
                store(found, (row,), load(found, (row,)) + one / (one + exp2(load(numbers, (row,)))))

    numbers, found, rounds, best = np.random.default_rng(0).normal(size=(128, WIDTH)).astype(np.float32), np.zeros((128, WIDTH), np.float32), 500, np.inf
    bare_gates(numbers, found, 1)
    for _ in range(100):
        began = time.perf_counter()
        bare_gates(numbers, found, rounds)
        best = min(best, time.perf_counter() - began)
    return numbers.size * rounds / best


def gpu_floor(moments: int) -> float:
    "Seconds of a chain of so many sub-steps, each a sum, an exponential and a division after the other, in one launch: what depends can't be faster."
    import triton
    import triton.language as tl

    @triton.jit
    def chain(found, moments, ROWS: tl.constexpr):
        x = tl.load(found + tl.arange(0, ROWS))
        for _ in range(moments):
            x = 1 / (1 + tl.exp(x - tl.sum(x, 0) * 1e-3))
        tl.store(found + tl.arange(0, ROWS), x)

    found = torch.zeros(32, device="cuda")
    return median_of(lambda: chain[(1,)](found, moments, ROWS=32, num_warps=1), 0.2)


def median_of(call: Callable[[], object], seconds: float) -> float:
    "Median seconds of a call on the GPU."
    for _ in range(5):
        call()
    times: list[float] = []
    while sum(times) < seconds:
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return float(np.median(times))


def kept_bytes(step: Callable[[], Tensor]) -> int:
    "Bytes of the tensors that a forward pass keeps for its backward pass, each once."
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(seen.values())


def ways_of(name: str, steps: int, batch: int, device: str) -> tuple[LTC, dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]]]:
    "The circuit, and everything that reads a sequence as it does, or as its peers do."
    inputs = CIRCUITS[name][0][0]
    circuit = LTC(ncp(*CIRCUITS[name][0])).to(device)
    units = circuit.wiring.neurons
    peers = {"ncps CfC": ncps.torch.CfC(inputs, circuit.wiring.to_ncps()), "torch LSTM": nn.LSTM(inputs, units, batch_first=True), "torch GRU": nn.GRU(inputs, units, batch_first=True)}
    ways: dict[str, Callable] = {"compiled": circuit}
    if 4.0 * steps * circuit.unfolds * batch * units * (inputs / circuit.unfolds + units) * 6 < LARGEST:
        ways["ncps LTC"] = circuit.to_ncps().to(device)
        if device == "cuda":
            ways["ncps LTC, CUDA graph"] = torch.cuda.make_graphed_callables(circuit.to_ncps().to(device), (torch.randn(batch, steps, inputs, device=device, requires_grad=True),))
    return circuit, ways | {peer: module.to(device) for peer, module in peers.items()}


def measure(name: str, steps: int, batch: int, seconds: float, threads: int, device: str) -> list[dict]:
    "A row for each way to read the sequence, taken in turns until their time is over."
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    circuit, ways = ways_of(name, steps, batch, device)
    sequence = torch.randn(batch, steps, CIRCUITS[name][0][0], requires_grad=True, device=device)
    times: dict[str, list[float]] = {way: [] for way in ways}
    cold: dict[str, list[float]] = {way: [] for way in ways}
    forward: list[float] = []

    def step(module: Callable) -> float:
        if isinstance(module, nn.Module):
            module.zero_grad()
        sequence.grad = None
        wait()
        began = time.perf_counter()
        module(sequence)[0].sum().backward()
        wait()
        return time.perf_counter() - began

    for way in ways.values():
        way(sequence)[0].sum().backward()
    over = lambda way: len(times[way]) >= 5 and (sum(times[way]) > seconds or len(times[way]) >= 400)
    while not all(map(over, ways)):
        for way, module in ways.items():
            if over(way):
                continue
            cold[way].append(step(module))
            burst = [step(module)]
            while sum(burst) < BURST:
                burst.append(step(module))
            times[way] += burst
        with torch.no_grad():
            while len(forward) < 20 * len(cold["compiled"]):
                wait()
                began = time.perf_counter()
                circuit(sequence)
                wait()
                forward.append(time.perf_counter() - began)
    quarters = {way: np.quantile(values, (0.25, 0.5, 0.75)) for way, values in times.items()}
    gates = batch * steps * (len(circuit.wiring.sensory_source) + circuit.unfolds * len(circuit.wiring.source))
    return [{
        "circuit": name, "steps": steps, "batch": batch, "threads": threads, "way": way, **dict(zip(("low", "median", "high"), (1e3 * quarters[way]).round(4).tolist())), "cold": round(1e3 * float(np.median(cold[way])), 4), "rounds": len(times[way]),
        "kept_bytes": None if "graph" in way else kept_bytes(lambda module=module: module(sequence)[0]), "gates_per_second": round(gates / float(np.median(forward))) if way == "compiled" else None,
        "times_of_ncps": round(float(quarters["ncps LTC"][1] / quarters[way][1]), 2) if "ncps LTC" in quarters else None,
    } for way, module in ways.items()]


def in_another_process(code: str, cache: str, limit: float = 300) -> list[float] | None:
    "What a program prints, as numbers; None if it takes longer than the limit, or fails."
    try:
        done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"NUMBA_CACHE_DIR": cache}, capture_output=True, text=True, timeout=limit, check=True)
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError):
        return None
    return [round(float(number), 3) for number in done.stdout.split()]


def once(device: str) -> dict:
    "What is measured once: the machine's limit, the first calls, the import, and ncps compiled."
    if device == "cuda":
        return {"floor_milliseconds": {moments: round(1e3 * gpu_floor(moments), 4) for moments in (48, 96)}, "device": torch.cuda.get_device_name()}
    with tempfile.TemporaryDirectory() as cache:
        (cold,), (warm,), (load,) = (in_another_process(code, cache) for code in (FIRST, FIRST, IMPORT))
        compiled = in_another_process(COMPILED, cache)
    print(f"first call {cold} s, from the cache {warm} s, import beyond torch {load} s; ncps compiled (seconds to compile, then eager and compiled, ms): {compiled}", flush=True)
    return {"gates_per_second_at_most": round(cpu_limit()), "first_call_seconds": cold, "first_call_from_cache_seconds": warm, "import_seconds": load,
            "ncps_compiled": dict(zip(("seconds_to_compile", "eager", "compiled"), compiled)) if compiled else None, "device": torch.cpu.get_capabilities()["cpu_name"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each way and size")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--quick", action="store_true", help="sweeps of the original circuit alone")
    given = parser.parse_args()
    torch.set_num_threads(1)
    alone, rows = once(given.device), []
    for threads in given.threads if given.device == "cpu" else given.threads[:1]:
        for name, steps, batch in sizes(given.quick):
            found = measure(name, steps, batch, given.seconds, threads, given.device)
            rows += found
            print(*(f"{row['way']} {row['median']:.2f} ms" for row in found), f"-> {found[0]['times_of_ncps']} times: {name}, {steps} steps, batch {batch}, {threads} threads", sep="  ", flush=True)
    packages = {package: version(package) for package in ("ncps", "numba" if given.device == "cpu" else "triton")}
    path = repository() / "results" / "benchmarks" / ("circuits.json" if given.device == "cpu" else "circuits-gpu.json")
    write_json(path, {"rows": rows, **alone, "cores": os.cpu_count(), "python": platform.python_version(), "torch": str(torch.__version__), **packages})
    print(f"written: {path}")


if __name__ == "__main__":
    main()
