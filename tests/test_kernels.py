"""Forked kernels, each test in a process of its own: one that runs pytest is none to fork kernels from."""
import subprocess
import sys
import textwrap

import psutil
import pytest

from thesis_ltc.book.kernels import POSSIBLE

ON_LINUX = pytest.mark.skipif(not POSSIBLE, reason="kernels are forked on Linux alone")
pytestmark = [pytest.mark.timeout(120), ON_LINUX]
BEGINNING = """
import os
import sys

from nbclient import NotebookClient
from nbclient.exceptions import DeadKernelError
from nbformat.v4 import new_code_cell, new_notebook

from thesis_ltc.book import kernels


def execute(*cells, **options):
    notebook = new_notebook(cells=[new_code_cell(cell) for cell in cells])
    where = {"metadata": {"path": "/"}}
    NotebookClient(notebook, resources=where, shutdown_kernel="immediate", **options).execute()
    return "".join(output.text for cell in notebook.cells for output in cell.outputs)


kernels.HEAVY = ("colorsys", "no_such_module")
kernels.warm_up()
kernels.fork_kernels()
"""


def said_by(program):
    "Lines that a program prints after `BEGINNING`, without what kernels print at their start."
    command = [sys.executable, "-c", BEGINNING + textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    lines = [line.removeprefix("> ") for line in done.stdout.splitlines() if line.startswith("> ")]
    assert lines, done.stderr
    return lines


def test_a_forked_kernel_has_its_parents_modules_and_nothing_of_another_page():
    lines = said_by("""
        tell = "print('colorsys' in sys.modules, os.getcwd(), os.getppid(), os.environ['JPY_PARENT_PID'])"
        first = execute("import os, sys; mine = 1", tell)
        print(">", first == f"True / {os.getpid()} {os.getpid()}\\n" or first)
        print(">", execute("print('mine' in globals(), 'first' in globals())"), end="")
    """)
    assert lines == ["True", "False False"]


def test_it_listens_at_files_which_go_with_it():
    "Of ports, two kernels that start at one moment may be given the same, and one of them ends."
    lines = said_by("""
        ask = "from ipykernel.connect import get_connection_info\\ninfo = get_connection_info(unpack=True)"
        where = execute(ask, "print(info['transport'], info['ip'])").split()
        print(">", where[0], os.path.exists(os.path.dirname(where[1])), len(where[1]) < 60)
    """)
    assert lines == ["ipc False True"]


def test_its_cells_may_start_processes():
    lines = said_by("""
        pool = "with multiprocessing.get_context('fork').Pool(1) as pool:\\n    print(pool.map(abs, [-3]))"
        print(">", execute("import multiprocessing", pool), end="")
    """)
    assert lines == ["[3]"]


def test_a_cell_that_takes_too_long_is_interrupted_and_the_next_goes_on():
    lines = said_by("""
        late = "try:\\n    import time; time.sleep(60)\\nexcept KeyboardInterrupt:\\n    print('interrupted')"
        printed = execute(late, "print('and goes on')", timeout=1, interrupt_on_timeout=True)
        print(">", printed.replace("\\n", " "))
    """)
    assert lines == ["interrupted and goes on "]


def test_a_kernel_that_dies_is_noticed():
    lines = said_by("""
        try:
            execute("import os; os._exit(3)")
        except DeadKernelError as error:
            print(">", error)
    """)
    assert lines == ["Kernel died"]


def test_what_a_cell_has_started_ends_with_the_kernel():
    lines = said_by("""
        start = "sleeper = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(100)'])"
        print(">", execute("import subprocess, sys", start, "print(sleeper.pid)"), end="")
    """)
    try:
        child = psutil.Process(int(lines[0]))
        assert not psutil.wait_procs([child], timeout=20)[1] or child.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        pass


def test_a_kernel_ends_with_its_parent():
    said = said_by("""
        tell = "import os, sys; print('>', os.getpid(), file=sys.__stdout__, flush=True)"
        execute(tell, "os.kill(os.getppid(), 9)")
    """)
    try:
        kernel = psutil.Process(int(said[0]))
        assert not psutil.wait_procs([kernel], timeout=20)[1] or kernel.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        pass
