"""Circuits in compiled loops beside ncps's LTC and CfC, and beside torch's LSTM and GRU of as many units.

    python benchmarks/circuits.py [--seconds 2] [--threads 1 2]

A step is forward and backward. All are measured in turn in one process, on a quiet machine; medians and quartiles, the bytes
that are kept for the backward pass, and the machine's own limit go to results/benchmarks/circuits.json, which the book shows.
"""
import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version

import ncps.torch
import numba
import numpy as np
import torch
from numba import njit
from torch import Tensor, nn

from thesis_ltc.files import repository, write_json
from thesis_ltc.ltc import LTC
from thesis_ltc.ltc_cpu import WIDTH, exp, load, store
from thesis_ltc.wiring import ncp

CIRCUITS = {  # sizes and steps as in the report's heads
    "original, 8 steps": ((32, 12, 6, 1, 6, 4, 6, 6), 8), "original, 16 steps": ((32, 12, 6, 1, 6, 4, 6, 6), 16),
    "doubled, 16 steps": ((128, 24, 12, 2, 12, 8, 12, 12), 16), "half of 3 FC, 16 steps": ((512, 48, 24, 4, 24, 16, 24, 24), 16),
}
SWEEPS = [("original, 16 steps", 16, batch) for batch in (1, 16, 256, 1024)] + [("original, 16 steps", steps, 64) for steps in (4, 64, 256)] + [("half of 3 FC, 16 steps", 16, 1)]
FIRST = """
import time, torch
from thesis_ltc.ltc import LTC
from thesis_ltc.wiring import ncp
circuit = LTC(ncp(32, 12, 6, 1, 6, 4, 6, 6))
began = time.perf_counter()
circuit(torch.randn(64, 8, 32))[0].sum().backward()
print(time.perf_counter() - began)
"""


@njit(error_model="numpy", fastmath={"contract", "nsz"})
def bare_gates(numbers: np.ndarray, found: np.ndarray, rounds: int) -> None:
    "Nothing but gates, from the first cache: what this machine can do at most."
    one = numbers.dtype.type(1)
    for _ in range(rounds):
        for row in range(len(numbers)):
            store(found, (row,), load(found, (row,)) + one / (one + exp(load(numbers, (row,)))))


def limit() -> float:
    "Gates a second of the bare loop, the best of many; one thread."
    numbers, found, rounds, best = np.random.default_rng(0).normal(size=(128, WIDTH)).astype(np.float32), np.zeros((128, WIDTH), np.float32), 500, np.inf
    bare_gates(numbers, found, 1)
    for _ in range(100):
        began = time.perf_counter()
        bare_gates(numbers, found, rounds)
        best = min(best, time.perf_counter() - began)
    return numbers.size * rounds / best


def kept_bytes(step: Callable[[], Tensor]) -> int:
    "Bytes of the tensors that a forward pass keeps for its backward pass, each once."
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(seen.values())


def measure(name: str, steps: int, batch: int, seconds: float, threads: int) -> list[dict]:
    "A row for each way to read the sequence, taken in turns until their time is over."
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    sizes = CIRCUITS[name][0]
    circuit = LTC(ncp(*sizes))
    units = circuit.wiring.neurons
    ways = {
        "compiled": circuit, "ncps LTC": circuit.to_ncps(), "ncps CfC": ncps.torch.CfC(sizes[0], circuit.wiring.to_ncps()),
        "torch LSTM": nn.LSTM(sizes[0], units, batch_first=True), "torch GRU": nn.GRU(sizes[0], units, batch_first=True),
    }
    sequence = torch.randn(batch, steps, sizes[0], requires_grad=True)
    times: dict[str, list[float]] = {way: [] for way in ways}
    forward: list[float] = []
    for way in ways.values():
        way(sequence)[0].sum().backward()
    while min(map(sum, times.values())) < seconds and min(map(len, times.values())) < 200 or min(map(len, times.values())) < 5:
        for way, module in ways.items():
            if sum(times[way]) > seconds and len(times[way]) >= 5:
                continue
            module.zero_grad()
            sequence.grad = None
            began = time.perf_counter()
            module(sequence)[0].sum().backward()
            times[way].append(time.perf_counter() - began)
        with torch.no_grad():
            began = time.perf_counter()
            circuit(sequence)
            forward.append(time.perf_counter() - began)
    quarters = {way: np.quantile(values, (0.25, 0.5, 0.75)) for way, values in times.items()}
    gates = batch * steps * (len(circuit.wiring.sensory_source) + circuit.unfolds * len(circuit.wiring.source))
    return [{"circuit": name, "steps": steps, "batch": batch, "threads": threads, "way": way, **dict(zip(("low", "median", "high"), (1e3 * quarters[way]).round(4).tolist())), "rounds": len(times[way]),
             "kept_bytes": kept_bytes(lambda module=module: module(sequence)[0]), "gates_per_second": round(gates / float(np.median(forward))) if way == "compiled" else None,
             "times_of_ncps": round(float(quarters["ncps LTC"][1] / quarters[way][1]), 2)} for way, module in ways.items()]


def first_calls() -> list[float]:
    "Seconds of a first forward and backward pass: compiled, and then from the cache on disk."
    with tempfile.TemporaryDirectory() as cache:
        calls = [subprocess.run([sys.executable, "-c", FIRST], env=os.environ | {"NUMBA_CACHE_DIR": cache}, capture_output=True, text=True, check=True) for _ in range(2)]
    return [round(float(call.stdout), 2) for call in calls]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each way and size")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows, most = [], limit()
    for threads in given.threads:
        for name, steps, batch in [*((name, steps, 64) for name, (_, steps) in CIRCUITS.items()), *(SWEEPS if threads == given.threads[-1] else [])]:
            rows += measure(name, steps, batch, given.seconds, threads)
            print(*(f"{row['way']} {row['median']:.2f} ms" for row in rows[-5:]), f"-> {rows[-5]['times_of_ncps']} times: {name}, {steps} steps, batch {batch}, {threads} threads", sep="  ", flush=True)
    cold, warm = first_calls()
    path = repository() / "results" / "benchmarks" / "circuits.json"
    write_json(path, {
        "rows": rows, "gates_per_second_at_most": round(most), "first_call_seconds": cold, "first_call_from_cache_seconds": warm, "cores": os.cpu_count(), "device": torch.cpu.get_capabilities()["cpu_name"],
        "python": platform.python_version(), "torch": str(torch.__version__), "numba": numba.__version__, "ncps": version("ncps"),
    })
    print(f"at most {most / 1e9:.2f} G gates/s; first call {cold} s, from the cache {warm} s\nwritten: {path}")


if __name__ == "__main__":
    main()
