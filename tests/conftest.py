import collections
import contextlib
import hashlib
import os
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined, so before growkit is imported

torch.set_num_threads(1)  # operations this small only lose time to threads that wait for each other


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(config, items):
    for item in items:
        # What a whole module shares is made by one worker, once; every other test goes to whichever worker is free.
        shared = [d for found in item._fixtureinfo.name2fixturedefs.values() for d in found if d.scope == "module"]
        if shared:
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if "slow" in item.keywords and "slow" not in config.option.markexpr:
            item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))


TRACED = 1.5  # seconds of this process
_spent = collections.Counter()  # by the cases of a test so far, while they were traced


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Coverage counts the cases of a test until they have taken 1.5 s: its tracer makes Python two to three times
    slower, and the many cases of a slow test go the same ways. Processes that a test starts are all counted, and so are
    benchmarks, of which every case goes its own way."""
    test, tracer = item.nodeid.partition("[")[0], sys.gettrace()
    if not type(tracer).__module__.startswith("coverage"):  # none, or a debugger's
        return (yield)
    if item.path.is_relative_to(TESTS) and _spent[test] >= TRACED:
        sys.settrace(None)
        try:
            return (yield)
        finally:
            sys.settrace(tracer)
    start = time.process_time()
    try:
        return (yield)
    finally:
        _spent[test] += time.process_time() - start


@pytest.fixture(scope="session")
def compiled_once(request, tmp_path_factory):
    """compiled_once(make, *inputs): a folder that make(folder) filled, now or in an earlier run with the same inputs.

    inputs: everything that the result depends on; of files and folders (Path) the content counts, of all else the repr.
    Kept in pytest's cache, which git ignores and `pytest --cache-clear` and `make clean` remove.
    """
    cache = getattr(request.config, "cache", None)
    kept = Path(cache.mkdir("compiled")) if cache else tmp_path_factory.mktemp("compiled")

    def get(make, *inputs, home=kept):
        key = hashlib.sha256()
        for part in inputs:
            is_folder = isinstance(part, Path) and part.is_dir()
            files = (path for path in part.rglob("*") if path.is_file() and path.suffix != ".pyc") if is_folder else ()
            for piece in sorted(files) if is_folder else [part]:
                told = f"{piece.name} {piece.read_bytes()}" if isinstance(piece, Path) else repr(piece)
                key.update(f"{len(told)} {told} ".encode())
        folder = home / key.hexdigest()
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=home, ignore_cleanup_errors=True) as new:
                make(Path(new))
                with contextlib.suppress(OSError):  # another run was faster
                    os.rename(new, folder)
        return folder

    return get


@pytest.fixture
def untraced(monkeypatch):
    """Processes that this test starts run without coverage, which counts as their instructions and is not safe against
    signals."""
    monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nan_filled_empty():
    """Uninitialised memory holds NaN (integers: their maximum): an output left unwritten cannot pass for a result.

    torch does this itself in deterministic mode, also for tensors made in C++ and under torch.compile, which wrapping
    torch.empty in Python would break. warn_only: nothing else is meant to fail here for not being deterministic.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
