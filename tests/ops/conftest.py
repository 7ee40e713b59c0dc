import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map_only

from growkit.reference import blocks


@pytest.fixture
def small_block(monkeypatch):
    """Blocks of 64 elements, so that a small tensor is walked in several; returns their size."""
    monkeypatch.setattr(blocks, "BLOCK", 64)
    return 64


@pytest.fixture
def fake_call():
    """Call an op with fake tensors that do not fit: it raises, and the error has its name and every one of `words`."""

    def call(name, args, kwargs, words):
        with FakeTensorMode() as mode, pytest.raises((ValueError, RuntimeError)) as caught:
            args, kwargs = tree_map_only(torch.Tensor, mode.from_tensor, (args, kwargs))
            getattr(torch.ops.growkit, name)(*args, **kwargs)
        for word in [name, *words]:
            caught.match(word)

    return call
