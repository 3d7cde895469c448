"""Machines as people have them: no home, no name, odd paths and encodings, a compiler that doesn't work.

The single places: `ltc.self_test.failure` for compiled backends, `ltc.lanes.CircuitCache` for stored code,
`core.files.cache_folder` and `user_path` for folders, `cli.EscapingGroup` for a terminal's encoding,
`data.file_kinds.other_kind` for files that are no image set, and the Snakefile's relative patterns for paths.
`THESIS_LTC_SOAK=1` adds what takes minutes: stored code of whole circuits, damaged in every way.
"""

import io
import json
import os
import pwd
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from papermill.parameterize import parameterize_path
from PIL import Image
from typer.testing import CliRunner

from thesis_ltc.cli import app, literal
from thesis_ltc.core.files import user_path
from thesis_ltc.study.runner import gpu_lock, snakemake_command

soak = pytest.mark.skipif(os.environ.get("THESIS_LTC_SOAK") != "1", reason="minutes: THESIS_LTC_SOAK=1")


@pytest.fixture
def nobody(monkeypatch):
    "A user without a home folder and without a name, as a container has under --user 12345."
    def unknown(user):
        raise KeyError(f"uid not found: {user}")

    for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "THESIS_LTC_CACHE", "THESIS_LTC_DATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


def show(*words):
    "Exit status and text of `thesis-ltc data show`."
    done = CliRunner().invoke(app, ["data", "show", *words])
    return done.exit_code, done.output


def test_without_home_and_name_the_cache_is_where_the_variable_says(nobody, tmp_path, monkeypatch):
    monkeypatch.setenv("THESIS_LTC_CACHE", str(tmp_path / "it's a {cache}"))
    status, text = show("digits")
    assert status == 0 and "1,797 images" in text and (tmp_path / "it's a {cache}" / "imagesets").is_dir()
    assert str(os.getuid()) in gpu_lock("0").lock_file


@pytest.mark.parametrize("variables", [
    {}, {"HOME": "/dev/null"}, {"HOME": "/proc"}, {"THESIS_LTC_CACHE": "~/cache"},
    {"THESIS_LTC_CACHE": "/dev/null/cache"}, {"THESIS_LTC_CACHE": "/proc/cache"},
])
def test_without_a_place_for_the_cache_one_line_names_the_variable(nobody, monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    status, text = show("digits")
    assert status == 1 and "set THESIS_LTC_CACHE to a folder that can be written" in text
    assert len(text.strip().splitlines()) == 1 and text.startswith("thesis-ltc: ")


def test_a_path_below_no_home_is_refused_in_a_line(nobody, monkeypatch, tmp_path):
    monkeypatch.setenv("THESIS_LTC_CACHE", str(tmp_path))
    for words in (("mine", "folder=~/scans"), ("covid-ct", "folder=~")):
        status, text = show(*words)
        assert status == 1 and "begins with ~, but no home folder is known" in text
    monkeypatch.setenv("THESIS_LTC_DATA", "~/data")
    assert "~/data begins with ~" in show("mine")[1]
    assert user_path("scans/~") == Path("scans/~")


def test_what_is_written_under_a_narrow_umask_is_read_again(tmp_path, monkeypatch):
    monkeypatch.setenv("THESIS_LTC_CACHE", str(tmp_path / "cache"))
    before = os.umask(0o077)
    try:
        assert show("digits") == show("digits") and show("digits")[0] == 0
    finally:
        os.umask(before)
    assert (tmp_path / "cache" / "imagesets").stat().st_mode & 0o777 == 0o700


def pictures(folder):
    "Two classes whose names few encodings have, and a file whose name is no text at all."
    for label in ("Übersicht", "肺-ill"):
        (folder / label).mkdir(parents=True)
        for number in range(3):
            pixels = np.full((40, 40), 40 * number, np.uint8)
            Image.fromarray(pixels).save(folder / label / f"–{number}.png")
    Path(os.fsdecode(os.fsencode(folder / "Übersicht") + b"/\xe9.txt")).touch()
    return folder


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "cp437"])
def test_what_a_terminal_cant_encode_is_escaped(tmp_path, monkeypatch, encoding):
    output = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", output)
    monkeypatch.setenv("THESIS_LTC_DATA", str(tmp_path))
    with pytest.raises(SystemExit) as ended:
        app(["data", "import", str(pictures(tmp_path / "set")), "--name", "mine", "--independent"])
    output.flush()
    text = output.buffer.getvalue().decode(encoding)
    assert ended.value.code == 1 and "nothing was written" in text and r"\u80ba-ill (3)" in text


def test_a_command_goes_through_under_a_bare_locale(tmp_path):
    "The help and a message, without UTF-8 anywhere."
    bare = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    words = ["data", "import", pictures(tmp_path / "é"), "--name", "é"]
    command = [sys.executable, "-m", "thesis_ltc.cli", *words]
    done = subprocess.run(command, env=os.environ | bare, capture_output=True)
    assert done.returncode == 2 and b"is no name of an image set" in done.stderr and done.stderr.isascii()
    assert b"Traceback" not in done.stderr


def test_a_file_that_is_no_set_is_called_what_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("THESIS_LTC_CACHE", str(tmp_path / "cache"))
    np.savez(tmp_path / "x.npz", images=np.zeros((2, 4, 4)))
    np.save(tmp_path / "x.npy", np.zeros(3))
    (tmp_path / "x.mat").write_bytes(b"MATLAB 5.0")
    (tmp_path / "x.zip").write_bytes((tmp_path / "x.npz").read_bytes())
    kinds = {"x.npz": "NumPy arrays", "x.zip": "NumPy arrays", "x.npy": "a NumPy array", "x.mat": "MATLAB"}
    for name, kind in kinds.items():
        for words in (["show", "mine", f"folder={tmp_path / name}"],
                      ["import", str(tmp_path / name), "--name", "mine", "--to", str(tmp_path / "new.zip")]):
            done = CliRunner().invoke(app, ["data", *words])
            assert done.exit_code == 1 and kind in done.output and "PNG file in a folder" in done.output
            assert "damaged" not in done.output and not (tmp_path / "new.zip").exists()


ODD = "it's {a} {experiment} {{ [v2] (new) #1: a=b & 50% é \"q\" $HOME"
STUB = """#!/bin/sh
touch "$PWD/digits_fc/$(basename "$0")"
printf '%s\\n' "$@" > digits_fc/words
"""


def job_in(place):
    "What a job of the Snakefile is called with, its runs and its Python in a folder."
    runs, python = place / "runs", place / "{python}"
    (runs / "digits_fc").mkdir(parents=True)
    python.write_text(STUB)
    python.chmod(0o755)
    job = {"name": "digits_fc", "needs": [], "files": [], "threads": 1, "device": "cpu",
           "is_published": False}
    plan = {"file": str(place / "plan.json"), "runs": str(runs), "python": str(python), "jobs": [job]}
    Path(plan["file"]).write_text(json.dumps(plan))
    done = subprocess.run(snakemake_command(plan), capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stdout + done.stderr
    there = {path.name for path in (runs / "digits_fc").iterdir()}
    assert there >= {"complete", "run.log", "words", "{python}"} and not list(runs.glob("*{*"))
    return (runs / "digits_fc" / "words").read_text().splitlines()


WORDS = ["-m", "thesis_ltc.cli", "run", "--file", "digits_fc/job.json",
         "--notebook", "digits_fc/run.ipynb"]


def test_a_study_runs_whatever_the_checkout_is_called(tmp_path):
    assert job_in(tmp_path / ODD) == WORDS


@soak
@pytest.mark.parametrize(
    "name", ["{backup}", "}{", "a #b", "it's", '"', "[0-9]*?", "a;b|c", "-n", "\\", "a\tb"])
def test_a_study_runs_in_each_of_these_folders(tmp_path, name):
    assert job_in(tmp_path / name) == WORDS


def test_papermill_takes_paths_literally():
    for path in (ODD, "{head}/run.ipynb", "}{", "plain"):
        assert parameterize_path(literal(Path(path)), {"head": "fc"}) == path


READ = """
import os, warnings
import torch
from thesis_ltc.ltc import LTC, ncp
torch.manual_seed(0)
wiring, sequence = ncp(4, 3, 2, 1, 2, 2, 1, 2), torch.rand(20, 3, 4)
circuit, other = LTC(wiring), LTC(wiring, backend="reference")
other.load_state_dict(circuit.state_dict())
{prepare}
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for _ in range(2):
        found, right = circuit(sequence)[0], other(sequence)[0]
    found.sum().backward(), right.sum().backward()
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(circuit.rest.grad, other.rest.grad, rtol=1e-4, atol=1e-5)
said = [str(one.message) for one in said if "circuits" in str(one.message)]
try:
    refused = ""
    LTC(wiring, backend="numba")(sequence)
except ValueError as error:
    refused = str(error)
import json
print(json.dumps([said, refused, torch.equal(found, right), os.listdir(".")]))
"""


def read_circuit(place, prepare="", **variables):
    "Warnings, the refusal of an explicit wish, whether the reference computed, and the files of the folder."
    place.mkdir(exist_ok=True)
    environment = os.environ | variables
    command = [sys.executable, "-c", READ.replace("{prepare}", prepare)]
    done = subprocess.run(command, env=environment, cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


WITHOUT_FORK = "del os.register_at_fork"
NO_LLVM = """
import llvmlite.binding
def broken(*arguments, **options): raise RuntimeError("LLVM ERROR: no target")
llvmlite.binding.parse_assembly = llvmlite.binding.ExecutionEngine.add_object_file = broken
"""
NO_GRADIENT = """
import thesis_ltc.ltc.cpu_backward
def broken(*arguments): raise RuntimeError("LLVM ERROR: no gradient")
thesis_ltc.ltc.cpu_backward.backward = broken
"""
CASES = {  # what is prepared, variables, and the cause that is named; none if the compiled circuit computes
    "no fork": (WITHOUT_FORK, {}, None),
    "no JIT": ("", {"NUMBA_DISABLE_JIT": "1"}, "NUMBA_DISABLE_JIT is set; unset it"),
    "no LLVM": (NO_LLVM, {}, "no target; pip install --force-reinstall numba llvmlite"),
    "no gradient": (NO_GRADIENT, {}, "no gradient; pip install --force-reinstall numba llvmlite"),
}


@pytest.mark.parametrize("case", CASES)
def test_where_compiled_code_fails_the_reference_computes_with_one_warning(tmp_path, case):
    prepare, variables, cause = CASES[case]
    said, refused, is_reference, files = read_circuit(tmp_path, prepare, **variables)
    assert not files
    if cause is None:
        assert not said and not refused and not is_reference
    else:
        assert is_reference and len(said) == 1 and cause in said[0] and cause in refused
        assert said[0].startswith("numba can't be used, so circuits are computed by the readable reference")
        assert refused.startswith("backend numba can't be used: ")


@soak
def test_whatever_happens_to_stored_code_the_compiled_circuit_computes(tmp_path):
    "Cut short, emptied, half of it zeros, and a folder in the place of an index."
    stored = {"NUMBA_CACHE_DIR": str(tmp_path / "numba")}
    sound = ([], "", False, [])
    assert tuple(read_circuit(tmp_path / "work", **stored)) == sound
    files = [path for path in (tmp_path / "numba").rglob("*.nb?") if "_units" in path.name]
    assert len(files) == 4   # index and code of forward and backward
    for kind in ("empty", "half", "zeros"):
        for path in files:
            content = path.read_bytes()
            half = len(content) // 2
            kinds = {"empty": b"", "half": content[:half], "zeros": content[:half] + bytes(half)}
            path.write_bytes(kinds[kind])
        assert tuple(read_circuit(tmp_path / "work", **stored)) == sound, kind
    for path in files:
        path.unlink()
        if path.suffix == ".nbi":
            path.mkdir()
    said, refused, is_reference, _ = read_circuit(tmp_path / "work", **stored)
    assert len(said) == 1 and "set NUMBA_CACHE_DIR to a writable folder" in said[0]
    assert not refused and not is_reference


@soak
def test_stored_code_that_is_sound_and_wrong_is_replaced(tmp_path):
    "The self-test sees wrong numbers, as softplus with logistic's stored code gives, and compiles all anew."
    stored = {"NUMBA_CACHE_DIR": str(tmp_path / "numba")}
    read_circuit(tmp_path / "work", **stored)
    files = {path.name.partition("-")[0]: path for path in (tmp_path / "numba").rglob("*.nbc")}
    wrong = files["packed.logistic"].read_bytes()
    for name, path in files.items():
        if name != "packed.softplus":   # what it is compiled into is not stored
            path.unlink()
    files["packed.softplus"].write_bytes(wrong)
    assert tuple(read_circuit(tmp_path / "work", **stored)) == ([], "", False, [])
    assert files["packed.softplus"].read_bytes() != wrong
