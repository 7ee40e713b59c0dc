"""Tests of compiled kernels. `pytest tests/ptx` ends with a table: per case and architecture what differs from the
reference and what a launch on full chunks does per element. `--ptx-all` runs every case on every architecture.
"""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import pytest

TABLE = "ptx table"


def pytest_addoption(parser):
    parser.addoption("--ptx-all", action="store_true", help="every case on every architecture, not a selection")


@pytest.fixture(scope="session")
def compiled():
    """Function(f, *arguments): calls f in a process where Triton compiles; in this one it may interpret."""
    from ptx import cases

    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), cases.prepare)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        patch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)  # the emulator is slow enough without
        pool.submit(os.getpid).result()  # the process starts, and keeps the environment of now
    yield lambda function, *arguments: pool.submit(function, *arguments).result()
    pool.shutdown()


@pytest.fixture
def tabulate(request):
    """Function(line) that puts a line into the table."""
    return lambda line: request.node.user_properties.append((TABLE, line))


def pytest_terminal_summary(terminalreporter, config):
    if not any("ptx" in argument for argument in config.args):  # of the whole suite it would be too long
        return
    reports = [r for rs in terminalreporter.stats.values() for r in rs if getattr(r, "when", None) == "call"]
    lines = sorted(line for report in reports for name, line in report.user_properties if name == TABLE)
    if lines:
        terminalreporter.section("compiled kernels, per element")
        terminalreporter.write_line("\n".join(lines))
