"""Do two checkouts compute the same? Each trains the first epochs of every published experiment, and their bits are compared.

    python benchmarks/golden.py --checkout ../before --out before.json --trunks runs/golden-trunks
    python benchmarks/golden.py --checkout .         --out after.json  --trunks runs/golden-trunks
    python benchmarks/golden.py --compare before.json after.json

Run both on one machine: bits differ between instruction sets. A trunk is trained once, by whichever comes first.
"""

import argparse
import hashlib
import importlib
import json
import sys
import tempfile
import time
from pathlib import Path

EPOCHS = 2
TRUNK_EPOCHS = 8     # enough to make maps that differ from those of an untrained backbone
SLOW = {"fashion-mnist": 1}   # epochs, where one takes long
NAMES = {            # what is needed, and the modules that may define it, newest first
    "Experiment": ("thesis_ltc.study", "thesis_ltc.experiment"),
    "run_seeds": ("thesis_ltc.study", "thesis_ltc.experiment"),
    "load_images": ("thesis_ltc.study.run", "thesis_ltc.study.experiment", "thesis_ltc.experiment"),
    "classifier": ("thesis_ltc.heads", "thesis_ltc.heads.classifier"),
    "HEADS": ("thesis_ltc.heads", "thesis_ltc.heads.classifier"),
}


def find(name: str):
    "An object of the checkout's package, in whichever module it lives."
    for module in NAMES[name]:
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            continue
    raise SystemExit(f"{name} is in none of {NAMES[name]}")


def identify(experiment, data) -> str:
    "The id of an experiment, as the checkout names it."
    try:
        return importlib.import_module("thesis_ltc.study.experiment").resolve(experiment, data).id
    except (ImportError, AttributeError):
        return importlib.import_module("thesis_ltc.experiment").experiment_id(experiment, data.digest)


def sha(*parts: bytes | str) -> str:
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
        parts += [f"{name} {tuple(tensor.shape)} {tensor.dtype}", tensor.flatten().view(torch.uint8).numpy().tobytes()]
    return sha(*parts)


def heads() -> dict:
    "State, logits and gradients of each named head, untrained."
    import torch

    found = {}
    for name in find("HEADS"):
        rows = name.startswith("rows-")
        given = {"image_size": 8, "backbone": "none"} if rows else {"image_size": 136, "width": 0.25}
        model = find("classifier")(name, 3, seed=1, **given)
        images = torch.rand(4, 1, given["image_size"], given["image_size"], generator=torch.Generator().manual_seed(0))
        torch.manual_seed(5)
        logits = model(images)
        logits.square().sum().backward()
        gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        found[f"head {name}"] = {
            "state": tensors_sha(model.state_dict()), "logits": tensors_sha({"logits": logits}), "gradients": tensors_sha(gradients)}
    return found


def published(results: Path, only: list[str]):
    "(study, id, the experiment's values, seeds, trunk's run) of each published experiment."
    for path in sorted(results.glob("*/*.plan.json")):
        plan = json.loads(path.read_text())
        if only and plan["study"] not in only:
            continue
        cells = [{"id": cell["id"], "seeds": cell["seeds"], "trunk": plan.get("trunk")} for cell in plan["cells"]]
        if plan.get("trunk"):
            trunk, _, seed = plan["trunk"].rpartition("/seed")
            cells.insert(0, {"id": trunk, "seeds": [int(seed)], "trunk": None})
        for cell in cells:
            record = json.loads((path.parent / cell["id"] / f"seed{cell['seeds'][0]}" / "record.json").read_text())
            yield plan["study"], cell, record["experiment"]


def outcome(folder: Path, record: dict) -> dict:
    "What a run left, as hashes, and its last losses to read."
    import pandas as pd
    from safetensors.torch import load_file

    history = pd.read_csv(folder / "history.csv").drop(columns=["train_seconds", "seconds"])
    predictions = pd.read_parquet(folder / "predictions.parquet")
    kept = ("id", "experiment", "epochs", "stopped", "metrics", "parameters", "macs", "memory", "durations", "travelled", "trunk")
    return {
        "history": sha(history.to_csv(index=False)), "weights": tensors_sha(load_file(folder / "model.safetensors")),
        "predictions": sha(*(f"{name}{list(predictions[name])}" for name in predictions if name != "patient")),
        "record": sha(*(f"{name}{json.dumps(record[name], sort_keys=True)}" for name in kept)), "loss": float(history.train_loss.iloc[-1]),
    }


def experiments(results: Path, trunks: Path, only: list[str]) -> dict:
    "The first epochs of each published experiment, a stack of seeds at once where the study trained a stack."
    Experiment, run_seeds, load_images = map(find, ("Experiment", "run_seeds", "load_images"))
    sets, found, trunk_runs = {}, {}, {}
    originals = {}
    for study, cell, values in published(results, only):
        values = {k: v for k, v in values.items() if k not in ("folder", "trunk")}
        began = time.perf_counter()
        key = f"{study} {cell['id']}"
        images = tuple(values.get(name) for name in ("data", "split", "repeat", "folds", "fold", "accept_leakage", "drop_listed"))
        if images not in sets:
            try:
                sets[images] = load_images(Experiment(**values))
            except (ValueError, OSError) as error:
                sets[images] = f"{type(error).__name__}: {str(error)[:100]}"
        data = sets[images]
        if isinstance(data, str):
            found[key] = {"missing": data}
            continue
        if cell["trunk"]:
            if cell["trunk"] not in trunk_runs:
                whole = Experiment(**originals[cell["trunk"]] | {"epochs": TRUNK_EPOCHS, "patience": TRUNK_EPOCHS})
                run_seeds(whole, [0], trunks, data=data)
                trunk_runs[cell["trunk"]] = str((trunks / identify(whole, data) / "seed0").resolve())
            values["trunk"] = trunk_runs[cell["trunk"]]
        originals[f"{cell['id']}/seed{cell['seeds'][0]}"] = values
        named = identify(Experiment(**values), data)
        epochs = SLOW.get(values["data"], EPOCHS)
        short = Experiment(**values | {"epochs": epochs, "patience": epochs})
        seeds = cell["seeds"][:4] if cell["trunk"] else cell["seeds"][:1]
        with tempfile.TemporaryDirectory(dir=trunks) as runs:
            # maps of a trunk are computed once for all of its heads; they lie beside the runs
            features = trunks / "features"
            features.mkdir(exist_ok=True)
            (Path(runs) / "features").symlink_to(features.resolve())
            records = run_seeds(short, seeds, runs, data=data, echo=lambda history: None)
            for seed, record in records.items():
                if isinstance(record, Exception):
                    found[f"{key} seed{seed}"] = {"failed": repr(record)[:200]}
                    continue
                folder = Path(runs) / record["id"] / f"seed{seed}"
                found[f"{key} seed{seed}"] = outcome(folder, record) | {"id": named}
        print(f"{time.perf_counter() - began:6.1f} s  {key}", file=sys.stderr, flush=True)
    return found


def compare(first: Path, second: Path) -> int:
    "Print a row an experiment; the exit status says whether all are the same."
    before, after = (json.loads(path.read_text()) for path in (first, second))
    print(f"before: {before.pop('about')}\nafter:  {after.pop('about')}")
    other = 0
    for key in [key for key in before if key in after]:
        a, b = before[key], after[key]
        differs = [name for name in a | b if a.get(name) != b.get(name)]
        state = "missing" if "missing" in a else "differs: " + ", ".join(differs) if differs else "same bits"
        other += bool(differs) or "failed" in a
        print(f"{key:100} {state}{'  ' + a['failed'] if 'failed' in a else ''}")
    both = before.keys() & after.keys()
    print(f"{len(both)} compared, {other} differ; {len(before.keys() ^ after.keys())} stand in one of them alone")
    return int(other > 0)


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--checkout", type=Path)
    words.add_argument("--out", type=Path)
    words.add_argument("--results", type=Path, help="results/ in the form of one folder a run")
    words.add_argument("--trunks", type=Path)
    words.add_argument("--only", nargs="*", default=[], help="studies, or heads")
    words.add_argument("--compare", type=Path, nargs=2)
    given = words.parse_args()
    if given.compare:
        raise SystemExit(compare(*given.compare))
    sys.path.insert(0, str(given.checkout.resolve()))
    import torch

    import thesis_ltc

    assert Path(thesis_ltc.__file__).is_relative_to(given.checkout.resolve()), thesis_ltc.__file__
    given.trunks.mkdir(parents=True, exist_ok=True)
    found = {"about": f"{given.checkout}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"}
    found |= heads() if not given.only or "heads" in given.only else {}
    given.out.write_text(json.dumps(found, indent=1))
    found |= experiments(given.results or given.checkout / "results", given.trunks, given.only)
    given.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
