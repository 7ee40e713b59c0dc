"""Kernels broken on purpose: each is caught, and by what it does."""

import re

import pytest

pytest.importorskip("triton")

from ptx.cases import mutations


@pytest.mark.parametrize("name", mutations.MUTATIONS)
def test_a_broken_kernel_is_caught(name, compiled):
    found = compiled(mutations.noticed, name)
    assert re.search(mutations.MUTATIONS[name].caught, found), found


def test_a_lie_told_to_multiple_of_is_caught(compiled):
    assert "misaligned 16-byte access" in compiled(mutations.lie)


def test_fusion_in_sampled_nll_would_store_ambiguously(compiled):
    """Lanes that share a sum would differ in its last bit: the setting that the launcher gives is needed."""
    assert "store different values to one address: which stays is undefined" in compiled(mutations.fused)
