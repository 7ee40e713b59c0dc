import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined, so before growkit is imported

torch.set_num_threads(1)  # operations this small only lose time to threads that wait for each other


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


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
