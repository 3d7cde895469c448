"""Operations on a disk: logged, made to fail, and put together to what a crash may leave.

All that the package writes passes `thesis_ltc.core.files.perform`. A log of it lists the operations below a
folder. A crash keeps the first of them, and may lose one that no `fsync` has ordered before the others.
"""
import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from thesis_ltc.core import files
from thesis_ltc.core.provenance import commit

SOAK = os.environ.get("THESIS_LTC_SOAK") == "1"   # the long form of these tests, see `make soak`
IRRELEVANT = {"seconds", "images_per_second", "peak_memory_bytes", "finished", "commit"}


def report(name: str, **counts: int) -> None:
    "Print what was tried and what was lost; `make soak` also collects it in a folder, a JSON file each."
    print(f"\n{name}: " + ", ".join(f"{count:,} {what}" for what, count in counts.items()))
    folder = os.environ.get("THESIS_LTC_SOAK_REPORT")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / f"{name}.json").write_text(json.dumps(counts | {"commit": commit()}) + "\n")


def seed_folder(directory: Path) -> Path | None:
    return next(directory.glob("digits_*/seed0"), None)


def outcome(directory: Path) -> dict:
    "Everything of a run that must not depend on how often it was stopped."
    folder = seed_folder(directory)
    record = json.loads((folder / "record.json").read_text())
    rows = [line.split(",") for line in (folder / "history.csv").read_text().splitlines()]
    kept = [i for i, name in enumerate(rows[0]) if "seconds" not in name]
    assert not list(folder.glob(".*.tmp")) and not list(folder.glob("best-*"))
    assert not (folder / "checkpoint.safetensors").exists()
    return {
        "record": {key: value for key, value in record.items() if key not in IRRELEVANT},
        "history": [[row[i] for i in kept] for row in rows],
        "weights": (folder / "model.safetensors").read_bytes(),
        "predictions": (folder / "predictions.parquet").read_bytes(),
    }


Tree = dict[str, bytes | None]   # content of each file, None for a folder; by its path


def read_tree(folder: Path) -> Tree:
    return {path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
            for path in sorted(folder.rglob("*"))}


def write_tree(folder: Path, tree: Tree) -> Path:
    folder.mkdir()
    for name, content in sorted(tree.items()):
        if content is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(content)
    return folder


@dataclass(frozen=True)
class Operation:
    name: str                      # create, write, fsync, rename, remove, rmdir, mkdir
    path: str                      # below the folder
    target: str = ""               # of a rename
    content: bytes | None = None   # of the file, after a write or an fsync

    @property
    def folders(self) -> set[str]:
        "The folders whose names it changes."
        return {os.path.dirname(path) for path in (self.path, self.target) if path}


Perform = Callable[..., object]
UNDISTURBED: Perform = files.perform


@contextmanager
def performing(instead: Callable[[Perform], Perform]) -> Iterator[None]:
    "Inside, `instead` of the package's `perform`, which it is given."
    before = files.perform
    files.perform = instead(before)
    try:
        yield
    finally:
        files.perform = before


@contextmanager
def logged(folder: Path) -> Iterator[list[Operation]]:
    "The operations below a folder, as they are done."
    done: list[Operation] = []

    def instead(perform: Perform) -> Perform:
        def log(operation, action, *paths, **options):
            found = [Operation(operation, path.relative_to(folder).as_posix())
                     for path in paths[:1] if path.is_relative_to(folder)]
            if found and operation == "rename":
                found = [replace(found[0], target=paths[1].relative_to(folder).as_posix())]
            if found and operation == "remove tree":
                inside = [*sorted(paths[0].rglob("*"), reverse=True), paths[0]]
                kinds = ["rmdir" if path.is_dir() else "remove" for path in inside]
                names = [path.relative_to(folder).as_posix() for path in inside]
                found = list(map(Operation, kinds, names))
            result = perform(operation, action, *paths, **options)
            if found and operation in ("write", "fsync") and paths[0].is_file():
                found = [replace(found[0], content=paths[0].read_bytes())]
            done.extend(found)
            return result

        return log

    with performing(instead):
        yield done


@contextmanager
def harmed(
    folder: Path,
    at: int,                              # number of the operation below the folder
    harm: Callable[[Callable], object],   # is given what the operation does
    forever: bool = False,                # whether all that follow are harmed, too
) -> Iterator[list[Operation]]:
    "Inside, harm comes to an operation; yields those that were done without."
    with logged(folder) as done:
        def instead(perform: Perform) -> Perform:
            count = itertools.count()

            def fail(operation, action, *paths, **options):
                number = next(count) if paths[0].is_relative_to(folder) else -1
                if number == at or forever and number > at:
                    return UNDISTURBED(operation, partial(harm, action), *paths, **options)
                return perform(operation, action, *paths, **options)

            return fail

        with performing(instead):
            yield done


def apply(tree: Tree, operation: Operation) -> bool:
    "Do an operation on a tree, in place; whether a disk can do it without those that were left out."
    path, target = operation.path, operation.target
    parents = {parent for parent in operation.folders if parent not in ("", ".")}
    if any(tree.get(parent, b"") is not None for parent in parents):
        return False
    below = [name for name in tree if name.startswith(f"{path}/")]
    if operation.name == "mkdir":
        tree[path] = None
    elif operation.name == "create":
        tree[path] = b""
    elif operation.name in ("write", "fsync"):
        if path not in tree:
            return path in ("", ".")
        if operation.content is not None:
            tree[path] = operation.content
    elif operation.name == "rename":
        if path not in tree or any(name.startswith(f"{target}/") for name in tree):
            return False
        for name in (path, *below):
            tree[target + name[len(path):]] = tree.pop(name)
    elif below or tree.pop(path, "absent") == "absent":   # remove, rmdir
        return False
    return True


def is_ordered(done: list[Operation], late: int, stop: int) -> bool:
    "Whether an fsync before `stop` keeps an operation from coming late."
    operation = done[late]
    if operation.name == "fsync":
        return True
    synced = {later.path for later in done[late + 1 : stop] if later.name == "fsync"}
    if operation.name == "write":
        return operation.path in synced
    return operation.folders <= {"" if path == "." else path for path in synced}


def reachable(done: list[Operation], folder: str) -> list[Operation]:
    "Operations that do not lie in a folder whose name the disk lost, under whatever name it has later."
    lost, found = [folder], []
    for operation in done:
        if not any(f"{operation.path}/".startswith(f"{name}/") for name in lost):
            found.append(operation)
        elif operation.name == "rename":
            lost.append(operation.target)
    return found


def crashes(before: Tree, done: list[Operation]) -> Iterator[tuple[str, str, list[Operation], Tree]]:
    "What a crash may leave: a description, the operation it lost, those that the disk has, and the tree."
    for stop in range(len(done) + 1):
        for late in (None, *range(stop)):
            if late is not None and is_ordered(done, late, stop):
                continue
            kept = [operation for number, operation in enumerate(done[:stop]) if number != late]
            halves = [[]]
            if late is not None and done[late].name == "write":
                half = done[late].content[: len(done[late].content) // 2]
                halves.append([replace(done[late], content=half)])
            for half in halves:
                here = late or 0
                having = [*kept[:here], *half, *kept[here:]]
                is_folder = late is not None and done[late].name == "mkdir"
                found = reachable(having, done[late].path) if is_folder else having
                tree = dict(before)
                if all(apply(tree, operation) for operation in found):
                    lost = "" if late is None else f"{done[late].name} {done[late].path}"
                    without = f" without {lost}{', but its half' if half else ''}" if lost else ""
                    yield f"{stop} operations{without}", lost, having, tree


TEMPORARY = re.compile(r"\.\d+\.\d+\.tmp")   # the end of a temporary name: of which process, and its number


def signature(tree: Tree) -> str:
    "A hash of all that decides how a tree is gone on with: neither times nor what temporary files hold."
    def telling(name: str, content: bytes | None) -> bytes:
        if name.endswith("status.json"):
            return b"whole" if content.endswith(b"}\n") else b"half"
        return b"folder" if content is None else content

    content = hashlib.sha256()
    for name, found in sorted(tree.items()):
        name = TEMPORARY.sub(".tmp", name)
        is_file = name.endswith(".tmp") and found is not None
        content.update(name.encode() + b"\0" + (b"" if is_file else telling(name, found)) + b"\0")
    return content.hexdigest()
