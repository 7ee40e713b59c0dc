"""Philox inside Triton kernels equals the reference bit for bit: compiled where there is a GPU, else interpreted."""

import pytest
import torch

from growkit import reference

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
philox = pytest.importorskip("growkit.kernels.philox")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK = 256


@triton.jit(do_not_specialize=["first", "parameter", "time", "k0", "k1"])
def words_kernel(
    out,
    first: tl.int64,
    parameter: tl.uint32,
    time: tl.uint32,
    k0: tl.uint32,
    k1: tl.uint32,
    BLOCK: tl.constexpr,
    philox: tl.constexpr,
):
    lane = tl.arange(0, BLOCK)
    block = tl.cast(first, tl.int64) + lane  # the interpreter types an int by its value
    w0, w1, w2, w3 = philox(block, block >> 32, parameter, time, k0, k1)
    tl.store(out + 4 * lane, w0.to(tl.int64))
    tl.store(out + 4 * lane + 1, w1.to(tl.int64))
    tl.store(out + 4 * lane + 2, w2.to(tl.int64))
    tl.store(out + 4 * lane + 3, w3.to(tl.int64))


KEYS = [
    {"seed": 0, "stream": 0, "parameter": 0, "time": 0},
    {"seed": 3, "stream": reference.LABELS, "parameter": 0, "time": 5},
    {"seed": 2**63 + 2**31 + 1, "stream": reference.PROBE, "parameter": 2**31, "time": 2**32 - 1},
    {"seed": -1, "stream": reference.ROUNDING, "parameter": 2**32 - 1, "time": 2**31},
]


@pytest.mark.parametrize("first", [0, 2**31 - 100, 2**32 - 100, 2**40 + 5])
@pytest.mark.parametrize("key", KEYS, ids=str)
def test_words_are_those_of_the_reference(key, first):
    """The counter carries from its low to its high word inside one block; words above 2^31 stay unsigned."""
    out = torch.empty(4 * BLOCK, dtype=torch.int64, device=DEVICE)
    words = philox.key(key["seed"], key["stream"])
    assert all(0 <= word < 2**32 for word in words)
    words_kernel[(1,)](
        out, first, key["parameter"], key["time"], *words, BLOCK, philox.philox, num_warps=4, enable_fp_fusion=False
    )
    assert torch.equal(out.cpu(), reference.random_bits(32, 4 * first, 4 * BLOCK, **key))


def test_known_answers():
    """Test vectors of the authors' Random123 distribution (kat_vectors, philox4x32 10)."""
    top = 2**32 - 1
    cases = [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((top, top, top, top), (top, top), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ]
    for (c0, c1, c2, c3), key, expected in cases:
        out = torch.empty(4 * BLOCK, dtype=torch.int64, device=DEVICE)
        first = c1 << 32 | c0
        words_kernel[(1,)](
            out, first - 2**64 * (first >> 63), c2, c3, *key, BLOCK, philox.philox, enable_fp_fusion=False
        )
        assert tuple(out[:4].tolist()) == expected
