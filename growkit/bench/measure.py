"""How things are timed and counted: four clocks, pairs with their noise, launches, memory, and on what hardware.

A claim is a ratio of two things timed in turn in one process, and beside it the ratio of one of them to itself, which
is the noise. Numbers of different runs or machines are never divided.
"""

import contextlib
import os
import platform
import re
import statistics
import time
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import growkit

CLOCKS = ("gpu", "wall", "host", "cpu")
FULL_QUEUE = 0.05  # seconds that the GPU is held back at most, so that the host runs ahead of it
ENOUGH = 8.0  # seconds of timing after which `paired` stops, once it has FEWEST rounds
FEWEST = 9


class Value(NamedTuple):
    """One measured figure. noise: relative spread of the same figure of a thing against itself; None for a count."""

    value: float
    noise: float | None = None
    detail: dict = {}


class Case(NamedTuple):
    """A workload with its inputs.

    run: growkit's call, the one that is timed for regressions. check: raises AssertionError unless the next call on
    fresh inputs agrees with float64. rows: rounds -> {id: Value, or in words why it was not measured}.
    bytes, flops: counted for one `run`.
    """

    run: Callable
    check: Callable
    rows: Callable
    bytes: int = 0
    flops: int = 0


# --- clocks ----------------------------------------------------------------------------------------------------------


def seconds(f, clock, calls=1):
    """Seconds of one of `calls` calls of f, one after another.

    "gpu": between CUDA events, with the GPU held back until the host has launched all calls: no launch gap is timed.
    "wall": from an idle device to an idle device. "host": until the last call has returned, the device working on.
    "cpu": CPU time of this process. Without CUDA, "gpu" is "cpu".
    """
    if clock not in CLOCKS:
        raise ValueError(f"clock: got {clock!r}, expected one of {', '.join(CLOCKS)}")
    cuda = torch.cuda.is_available()
    if clock == "gpu" and cuda:
        return _gpu_seconds(f, calls, 1.5 * calls * seconds(f, "host"))
    now = time.process_time if clock in ("gpu", "cpu") else time.perf_counter
    _synchronize()
    start = now()
    for _ in range(calls):
        f()
    if clock == "wall":
        _synchronize()
    return (now() - start) / calls


def _synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _gpu_seconds(f, calls, lead):
    """lead: seconds that the host needs to launch all calls."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(int(min(FULL_QUEUE, lead) * 2e9))  # cycles, at about 2 GHz
    start.record()
    for _ in range(calls):
        f()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def timer():
    """Seconds, with the device idle: what pytest-benchmark is given as its clock."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


# --- pairs -----------------------------------------------------------------------------------------------------------


class Pairs:
    """Samples of several functions, taken in turn: samples[name][round], seconds; and the first one's again."""

    def __init__(self, samples, again, missing):
        self.samples, self.missing = samples, missing
        first = next(iter(samples.values()))
        spread = [a / b for a, b in zip(first, again, strict=True)]
        low, high = _deciles(spread)
        self.noise = (high - low) / statistics.median(spread)

    def medians(self):
        return {name: statistics.median(times) for name, times in self.samples.items()}

    def ratio(self, a, b, factor=1.0):
        """`factor` times the median over the rounds of a/b, as a Value; or why it was not measured."""
        for name in (a, b):
            if name in self.missing:
                return f"{name}: {self.missing[name]}"
        ratios = [factor * x / y for x, y in zip(self.samples[a], self.samples[b], strict=True)]
        low, high = _deciles(ratios)
        detail = {"p10": low, "p90": high, "rounds": len(ratios), "seconds": self.medians(), "missing": self.missing}
        return Value(statistics.median(ratios), self.noise, detail)

    def seconds(self, name, unit=1.0):
        """Median seconds of `name` in multiples of `unit`, as a Value; or why it was not measured."""
        if name in self.missing:
            return f"{name}: {self.missing[name]}"
        low, high = _deciles(self.samples[name])
        return Value(statistics.median(self.samples[name]) / unit, self.noise, {"p10": low, "p90": high})


def _deciles(values):
    if len(values) == 1:
        return values[0], values[0]
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return cuts[0], cuts[-1]


def paired(functions, clock, rounds, before=None, sample=None):
    """Time functions in turn, in an order that is rotated every round: `Pairs`.

    functions: name -> callable, or the words why there is none; the first is also timed against itself, which is the
    noise. rounds: fewer, but at least FEWEST, where they take long. before: called ahead of each round with its number,
    untimed, to renew inputs. sample: seconds that one sample lasts at least (default 2 ms on a GPU, 20 ms on a CPU), by
    calling often enough; a single round, which is no measurement, calls once.
    """
    missing = {name: f for name, f in functions.items() if isinstance(f, str)}
    functions = {name: f for name, f in functions.items() if name not in missing}
    first = next(iter(functions))
    if rounds == 1:
        sample = 0
    elif sample is None:
        sample = 2e-3 if torch.cuda.is_available() else 20e-3
    held_back = clock == "gpu" and torch.cuda.is_available()
    calls, leads = {}, {}
    for name, f in functions.items():
        f()
        leads[name] = 1.5 * seconds(f, "host")
        calls[name] = max(1, min(200, round(sample / max(seconds(f, clock), 1e-7))))
        if held_back:
            calls[name] = max(1, min(calls[name], int(FULL_QUEUE / leads[name])))
    order = [*functions, None]  # None: the first one again
    samples = {name: [] for name in order}
    start = time.perf_counter()
    for i in range(rounds):
        if i >= FEWEST and time.perf_counter() - start > ENOUGH:
            break
        if before is not None:
            before(i)
        for name in order[i % len(order) :] + order[: i % len(order)]:
            timed = first if name is None else name
            f, n = functions[timed], calls[timed]
            samples[name].append(_gpu_seconds(f, n, n * leads[timed]) if held_back else seconds(f, clock, n))
    return Pairs({name: samples[name] for name in functions}, samples[None], missing)


def with_detail(value, detail):
    """A Value with more detail; words pass through."""
    return value._replace(detail=value.detail | detail) if isinstance(value, Value) else value


def attempt(build):
    """What `build()` returns, called once so that it is compiled and known to run; or in words why it cannot."""
    try:
        f = build()
        f()
        _synchronize()
    except Exception as error:
        return reason(error)
    return f


def reason(error):
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"


def graphed(f):
    """f captured in a CUDA graph: a call replays it. Without CUDA, f itself."""
    if not torch.cuda.is_available():
        return f
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            f()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        f()
    return graph.replay


# --- counts ----------------------------------------------------------------------------------------------------------


class _Calls(TorchDispatchMode):
    VIEWS = ("view", "expand", "transpose", "t", "slice", "select", "permute", "unsqueeze", "squeeze", "alias", "split")

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += function.overloadpacket.__name__.strip("_") not in self.VIEWS
        return function(*args, **(kwargs or {}))


def launches(f):
    """Kernels that one call of f starts on the GPU, by torch's profiler; on a CPU, torch operators but views."""
    if not torch.cuda.is_available():
        with _Calls() as count:
            f()
        return count.calls
    from torch.profiler import ProfilerActivity, profile

    f()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        f()
        torch.cuda.synchronize()
    kernels = [event for event in trace.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not event.name.startswith(("Memcpy", "Memset")) for event in kernels)


def temporaries(f):
    """Bytes by which one call of f raises the peak of allocated GPU memory, its result included."""
    f()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    f()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@contextlib.contextmanager
def poisoned():
    """Inside, memory that torch allocates holds NaN until it is written: nothing left out can pass for a result."""
    was, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(was, warn_only=warned)


@contextlib.contextmanager
def matmul_precision(name):
    """torch's precision of float32 products, as it names them; the former one afterwards."""
    was = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(was)


# --- hardware --------------------------------------------------------------------------------------------------------


def hardware():
    """What a run ran on: names of CPU and GPU, number of cores, versions. Nothing that names the machine itself."""
    cpu = _cpu()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    packages = {"growkit": growkit.__version__, "torch": torch.__version__, "python": platform.python_version()}
    with contextlib.suppress(PackageNotFoundError):
        packages["triton"] = version("triton")
    if gpu:
        packages["cuda"] = torch.version.cuda
    return {"cpu": cpu, "gpu": gpu, "threads": torch.get_num_threads(), **packages}


def _cpu():
    info = Path("/proc/cpuinfo")
    fields = dict(re.findall(r"^([^\t:]+?)\s*:\s*(.*)$", info.read_text(), re.MULTILINE)) if info.exists() else {}
    name = fields.get("model name") or platform.processor() or platform.machine()
    model = " ".join(
        f"{key} {fields[field]}" for key, field in (("family", "cpu family"), ("model", "model")) if field in fields
    )
    return " ".join(filter(None, (name, model, f"{os.cpu_count()} cores")))


def slug():
    """Name of the folder for results of this hardware: that of its GPU, or else of its CPU."""
    described = hardware()
    return re.sub(r"[^a-z0-9]+", "-", (described["gpu"] or described["cpu"]).lower()).strip("-")


if __name__ == "__main__":
    print(slug())
