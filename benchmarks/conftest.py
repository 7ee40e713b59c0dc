"""Regression runs: kept by hardware, compared with the baseline of the same hardware, shown as one table.

Timing is on with --benchmark-enable, which `make bench` passes; otherwise every workload runs once, tiny, untimed.
"""

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined

from growkit.bench import measure, table  # noqa: E402

RESULTS = Path(__file__).parent / "results"
ROWS = pytest.StashKey[list]()

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--rounds", type=int, help="rounds of each measurement (default: 30 on a GPU, 9 on a CPU)")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    """Storage is the folder of this hardware; its lowest number is the baseline that later runs are compared with."""
    config.stash[ROWS] = []
    option = config.option
    if not option.benchmark_enable:
        return
    if option.benchmark_storage == "file://./.benchmarks":
        option.benchmark_storage = f"file://{RESULTS / measure.slug()}"
    saved = sorted(Path(option.benchmark_storage.removeprefix("file://")).glob("*/[0-9][0-9][0-9][0-9]_*.json"))
    option.benchmark_save = option.benchmark_save or ("run" if saved else "baseline")
    if saved and not option.benchmark_compare:
        option.benchmark_compare = saved[0].name.partition("_")[0]
    if not saved:
        option.benchmark_compare_fail = None


@pytest.fixture
def collected(request):
    """The rows of the whole session, for the table at its end."""
    return request.config.stash[ROWS]


def pytest_benchmark_generate_machine_info():
    return measure.hardware()


def pytest_benchmark_update_commit_info(commit_info):
    """Nothing that tells where the checkout lies."""
    for key in ("project", "branch"):
        commit_info.pop(key, None)


@pytest.hookimpl(tryfirst=True)
def pytest_benchmark_compare_machine_info(machine_info, compared_benchmark):
    """Another machine's times are no baseline; other versions are what a regression run may be about."""
    saved = compared_benchmark["machine_info"]
    for part in ("cpu", "gpu"):
        if machine_info[part] != saved.get(part):
            raise pytest.UsageError(
                f"the saved run is of {part} {saved.get(part)}, this machine has {machine_info[part]}: not comparable"
            )


@pytest.hookimpl(tryfirst=True)
def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash[ROWS]
    if not config.option.benchmark_enable or not rows:
        return
    write = terminalreporter.write_line
    write("")
    write(", ".join(f"{key} {value}" for key, value in measure.hardware().items() if value is not None))
    write("")
    for line in table.render(rows).splitlines():
        write(line)
    session = config._benchmarksession
    baseline = next(iter(session.compared_mapping.items()), None)
    write("")
    if baseline is None:
        write("no saved run of this hardware, so nothing was compared: this run is the baseline of the next ones")
        return
    regressed = list(session.performance_regressions)
    write(f"compared with {baseline[0]}: {len(regressed)} slower than is allowed")
    for bench in session.benchmarks:
        saved = baseline[1].get(bench.fullname)
        if saved is None:
            write(f"new, nothing to compare: {bench.name}")
        else:
            write(f"{bench.stats.median / saved['stats']['median']:5.2f} x the saved time: {bench.name}")
    if regressed:  # said here, where the plugin would end in a traceback
        session.performance_regressions.clear()
        terminalreporter._session.exitstatus = pytest.ExitCode.TESTS_FAILED
        write("Performance has regressed:", red=True)
        for name, check in regressed:
            write(f"  {name}: {check}", red=True)
