"""Compare two checkouts bit by bit: untrained heads, and the first epochs of each published experiment.

    python benchmarks/golden.py --checkout ../before --out before.json --trunks runs/golden-trunks
    python benchmarks/golden.py --checkout .         --out after.json  --trunks runs/golden-trunks
    python benchmarks/golden.py --compare before.json after.json

Run both checkouts on one machine: bits differ between instruction sets. Both use the same trunks. A missing
trunk is trained by the checkout that is run first.
"""

import argparse
import hashlib
import importlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

EPOCHS = 2
TRUNK_EPOCHS = 8   # enough to make maps that differ from those of an untrained backbone
SLOW = {"fashion-mnist": 1}   # epochs of data sets on which an epoch takes long
NAMES = {   # names that this script uses, and the modules that may define them, newest first
    "Experiment": ("thesis_ltc.study", "thesis_ltc.experiment"),
    "run_seeds": ("thesis_ltc.study", "thesis_ltc.experiment"),
    "load_images": (
        "thesis_ltc.study.runs", "thesis_ltc.study.run", "thesis_ltc.study.experiment",
        "thesis_ltc.experiment",
    ),
    "classifier": ("thesis_ltc.heads", "thesis_ltc.heads.models"),
    "HEADS": ("thesis_ltc.heads", "thesis_ltc.heads.models"),
}
OF_IMAGES = ("data", "split", "repeat", "folds", "fold", "accept_leakage", "drop_listed")
OF_RECORD = (
    "id", "experiment", "epochs", "stopped", "metrics", "parameters", "macs", "memory", "durations",
    "travelled", "trunk")


def find(name: str):
    "An object of the checkout's package, from the first module that defines it."
    for module in NAMES[name]:
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            continue
    raise SystemExit(f"{name} is in none of {NAMES[name]}")


def identify(experiment, data) -> str:
    "The id that the checkout gives to an experiment."
    try:
        return importlib.import_module("thesis_ltc.study.experiment").resolve(experiment, data).id
    except (ImportError, AttributeError):
        return importlib.import_module("thesis_ltc.experiment").experiment_id(experiment, data.digest)


def sha(*parts: bytes | str) -> str:
    "The first 16 digits of the SHA-256 of all parts together."
    content = hashlib.sha256()
    for part in parts:
        content.update(part.encode() if isinstance(part, str) else part)
    return content.hexdigest()[:16]


def tensors_sha(tensors) -> str:
    "Hash of named tensors: names, shapes, types and bits."
    import torch

    parts = []
    for name, tensor in sorted(tensors.items()):
        tensor = tensor.detach().cpu().contiguous()
        parts.append(f"{name} {tuple(tensor.shape)} {tensor.dtype}")
        parts.append(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return sha(*parts)


def hashes_of_heads() -> dict:
    "Hashes of the parameters, logits and gradients of each named head, untrained."
    return {f"head {name}": hashes_of_head(name) for name in find("HEADS")}


def hashes_of_head(name: str) -> dict:
    "Hashes of one head; those that read rows of pixels get a small image and no backbone."
    import torch

    options = {"image_size": 136, "width": 0.25}
    if name.startswith("rows-"):
        options = {"image_size": 8, "backbone": "none"}
    model = find("classifier")(name, 3, seed=1, **options)
    shape = (4, 1, options["image_size"], options["image_size"])
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(5)   # for dropout
    logits = model(images)
    logits.square().sum().backward()
    gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    return {
        "state": tensors_sha(model.state_dict()),
        "logits": tensors_sha({"logits": logits}),
        "gradients": tensors_sha(gradients),
    }


def published(results: Path, only: list[str]) -> Iterator[tuple[str, dict, dict]]:
    "Study, cell (id, seeds, run of its trunk) and values of each published experiment; trunks come first."
    for path in sorted(results.glob("*/*.plan.json")):
        plan = json.loads(path.read_text())
        if only and plan["study"] not in only:
            continue
        trunk = plan.get("trunk")
        cells = [{"id": cell["id"], "seeds": cell["seeds"], "trunk": trunk} for cell in plan["cells"]]
        if trunk:
            identifier, _, seed = trunk.rpartition("/seed")
            cells.insert(0, {"id": identifier, "seeds": [int(seed)], "trunk": None})
        for cell in cells:
            run = path.parent / cell["id"] / f"seed{cell['seeds'][0]}"
            yield plan["study"], cell, json.loads((run / "record.json").read_text())["experiment"]


def hashes_of_run(folder: Path, record: dict) -> dict:
    "Hashes of the files of a run, and its last training loss."
    import pandas as pd
    from safetensors.torch import load_file

    history = pd.read_csv(folder / "history.csv").drop(columns=["train_seconds", "seconds"])
    predictions = pd.read_parquet(folder / "predictions.parquet")
    columns = [f"{name}{list(predictions[name])}" for name in predictions if name != "patient"]
    entries = [f"{name}{json.dumps(record[name], sort_keys=True)}" for name in OF_RECORD]
    return {
        "history": sha(history.to_csv(index=False)),
        "weights": tensors_sha(load_file(folder / "model.safetensors")),
        "predictions": sha(*columns),
        "record": sha(*entries),
        "loss": float(history.train_loss.iloc[-1]),
    }


class ShortRuns:
    "Trains published experiments for a few epochs; loads each image set and trains each trunk once."

    def __init__(self, trunks: Path) -> None:
        self.trunks = trunks         # the folder of the trunks' runs
        self.image_sets: dict = {}   # image sets, or texts of errors, by the values that choose the set
        self.trunk_runs: dict = {}   # folder of a trunk's run, by its published name <id>/seed<k>
        self.values: dict = {}       # values of an experiment, by the published name of its first run

    def images(self, values: dict):
        "The images of an experiment, or the text of the error."
        key = tuple(values.get(name) for name in OF_IMAGES)
        if key not in self.image_sets:
            try:
                self.image_sets[key] = find("load_images")(find("Experiment")(**values))
            except (ValueError, OSError) as error:
                self.image_sets[key] = f"{type(error).__name__}: {str(error)[:100]}"
        return self.image_sets[key]

    def trunk_run(self, published_name: str, data) -> str:
        "The folder of a trunk's run, which is trained if it is missing."
        if published_name not in self.trunk_runs:
            epochs = {"epochs": TRUNK_EPOCHS, "patience": TRUNK_EPOCHS}
            trunk = find("Experiment")(**self.values[published_name] | epochs)
            find("run_seeds")(trunk, [0], self.trunks, data=data)
            folder = self.trunks / identify(trunk, data) / "seed0"
            self.trunk_runs[published_name] = str(folder.resolve())
        return self.trunk_runs[published_name]

    def hashes(self, key: str, cell: dict, published_values: dict) -> dict:
        "Hashes of an experiment's runs; several seeds are trained together on a trunk, else only the first."
        values = {name: value for name, value in published_values.items() if name not in ("folder", "trunk")}
        data = self.images(values)
        if isinstance(data, str):
            return {key: {"missing": data}}
        if cell["trunk"]:
            values["trunk"] = self.trunk_run(cell["trunk"], data)
        self.values[f"{cell['id']}/seed{cell['seeds'][0]}"] = values
        identifier = identify(find("Experiment")(**values), data)
        seeds = cell["seeds"][:4] if cell["trunk"] else cell["seeds"][:1]
        found = self.train(values, seeds, data)
        for hashes in found.values():
            if "failed" not in hashes:
                hashes["id"] = identifier
        return {f"{key} seed{seed}": hashes for seed, hashes in found.items()}

    def train(self, values: dict, seeds: list[int], data) -> dict[int, dict]:
        "Hashes of the run of each seed, or its error as `failed`."
        epochs = SLOW.get(values["data"], EPOCHS)
        experiment = find("Experiment")(**values | {"epochs": epochs, "patience": epochs})
        found = {}
        with self.temporary_runs() as runs:
            records = find("run_seeds")(experiment, seeds, runs, data=data, echo=lambda history: None)
            for seed, record in records.items():
                if isinstance(record, Exception):
                    found[seed] = {"failed": repr(record)[:200]}
                else:
                    found[seed] = hashes_of_run(Path(runs) / record["id"] / f"seed{seed}", record)
        return found

    @contextmanager
    def temporary_runs(self) -> Iterator[str]:
        "A temporary folder of runs; the maps of trunks are kept outside of it, for all heads of a trunk."
        features = self.trunks / "features"
        features.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.trunks) as runs:
            (Path(runs) / "features").symlink_to(features.resolve())
            yield runs


def hashes_of_experiments(results: Path, trunks: Path, only: list[str]) -> dict:
    "Hashes of the first epochs of each published experiment."
    runs, found = ShortRuns(trunks), {}
    for study, cell, values in published(results, only):
        began = time.perf_counter()
        key = f"{study} {cell['id']}"
        found |= runs.hashes(key, cell, values)
        print(f"{time.perf_counter() - began:6.1f} s  {key}", file=sys.stderr, flush=True)
    return found


def compare(first: Path, second: Path) -> int:
    "Print a line for each key; returns 1 if any differs or failed, else 0."
    before, after = (json.loads(path.read_text()) for path in (first, second))
    print(f"before: {before.pop('about')}\nafter:  {after.pop('about')}")
    both = [key for key in before if key in after]
    different = 0
    for key in both:
        old, new = before[key], after[key]
        differs = [name for name in old | new if old.get(name) != new.get(name)]
        different += bool(differs) or "failed" in old
        print(f"{key:100} {comparison(old, differs)}")
    alone = len(before.keys() ^ after.keys())
    print(f"{len(both)} compared, {different} differ; {alone} only in one of them")
    return int(different > 0)


def comparison(old: dict, differs: list[str]) -> str:
    "What is printed about one key: which of its values differ, or what is missing."
    if "missing" in old:
        return "missing"
    state = "differs: " + ", ".join(differs) if differs else "same bits"
    return f"{state}  {old['failed']}" if "failed" in old else state


def import_checkout(checkout: Path) -> str:
    "Import the package of a checkout; returns a line about the checkout and the machine."
    sys.path.insert(0, str(checkout.resolve()))
    import torch

    import thesis_ltc

    assert Path(thesis_ltc.__file__).is_relative_to(checkout.resolve()), thesis_ltc.__file__
    return f"{checkout}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


def write_hashes(given: argparse.Namespace) -> None:
    "Write the hashes of a checkout: first those of the heads, later those of the experiments, too."
    found: dict = {"about": import_checkout(given.checkout)}
    given.trunks.mkdir(parents=True, exist_ok=True)
    if not given.only or "heads" in given.only:
        found |= hashes_of_heads()
    given.out.write_text(json.dumps(found, indent=1))
    found |= hashes_of_experiments(given.results or given.checkout / "results", given.trunks, given.only)
    given.out.write_text(json.dumps(found, indent=1))


def parse_arguments() -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--checkout", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--results", type=Path, help="results/ of older commits, a folder for each run")
    parser.add_argument("--trunks", type=Path)
    parser.add_argument("--only", nargs="*", default=[], help="names of studies; `heads` for the heads")
    parser.add_argument("--compare", type=Path, nargs=2)
    return parser.parse_args()


def main() -> None:
    given = parse_arguments()
    if given.compare:
        raise SystemExit(compare(*given.compare))
    write_hashes(given)


if __name__ == "__main__":
    main()
