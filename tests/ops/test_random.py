"""Philox: known answers of the oracle and, bit for bit, of the kernels: compiled on a GPU, else interpreted."""

import pytest
import torch

from growkit import reference


@pytest.mark.parametrize(
    ("counter", "seed", "expected"),
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_known_answers(counter, seed, expected):
    assert reference.philox(counter, seed, 0) == expected
    tensors = [torch.tensor([c, c]) for c in counter]
    assert [t.tolist() for t in reference.philox(tensors, seed, 0)] == [[e, e] for e in expected]


@pytest.mark.parametrize("width", [1, 16, 32])
def test_random_bits_of_a_range_are_a_slice_of_the_stream(width):
    key = {"seed": 2**63 + 5, "stream": 2, "parameter": 3, "time": 4}
    stream = reference.random_bits(width, 0, 1000, **key)
    assert 0 <= stream.min() and stream.max() < 2**width
    for first, count in [(0, 1), (1, 0), (7, 300), (127, 2), (128, 128), (999, 1)]:
        assert torch.equal(reference.random_bits(width, first, count, **key), stream[first : first + count])
    far = 2**41 + 77
    whole, tail = (reference.random_bits(width, far + i, 200 - i, **key) for i in (0, 50))
    assert torch.equal(whole[50:], tail)


# --- in Triton kernels ---

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
