"""Random bits per element, as `growkit.reference.random_bits` numbers them, and the kernel that writes a probe.

Bits belong to an element's global index (its tensor's offset plus its row-major index), so that writer and reader,
and every shard of a parameter, see the same ones.
"""

import triton
import triton.language as tl

from growkit import reference
from growkit.kernels import multi_tensor
from growkit.kernels.multi_tensor import address, aligned, chunk_of, fact
from growkit.kernels.philox import key, philox

# A kernel takes the key of stream 0, and the second word xor one of these is that of the stream.
PROBE, ROUNDING = tl.constexpr(reference.PROBE), tl.constexpr(reference.ROUNDING)
CURVATURE_ROUNDING = tl.constexpr(reference.CURVATURE_ROUNDING)
MOMENTUM_ROUNDING = tl.constexpr(reference.MOMENTUM_ROUNDING)

BLOCK = 2048
WARPS = 8


@triton.jit
def _one_of_four(w0, w1, w2, w3, i):
    return tl.where(i & 2 == 0, tl.where(i & 1 == 0, w0, w1), tl.where(i & 1 == 0, w2, w3))


@triton.jit
def signs(e0, parameter, time, k0, k1, SHARED: tl.constexpr, BLOCK: tl.constexpr):
    """float32 [BLOCK]: +1 where bit e of the stream is set, else -1, for the elements e0 .. e0+BLOCK-1 (int64).

    SHARED: e0 is a multiple of 32, so that one word serves 32 elements; otherwise each element computes its own.
    """
    if SHARED:
        word = (e0 >> 5) + tl.arange(0, BLOCK // 32)
        w0, w1, w2, w3 = philox(word >> 2, word >> 34, parameter, time, k0, k1)
        words = _one_of_four(w0, w1, w2, w3, word)
        bits = tl.reshape((words[:, None] >> tl.arange(0, 32).to(tl.uint32)[None, :]) & 1, [BLOCK])
    else:
        e = e0 + tl.arange(0, BLOCK)
        w0, w1, w2, w3 = philox(e >> 7, e >> 39, parameter, time, k0, k1)
        bits = (_one_of_four(w0, w1, w2, w3, e >> 5) >> (e & 31).to(tl.uint32)) & 1
    return tl.where(bits != 0, 1.0, -1.0)


@triton.jit
def halves(e0, parameter, time, k0, k1, SHARED: tl.constexpr, BLOCK: tl.constexpr):
    """int32 [BLOCK]: 16 bits for each of the elements e0 .. e0+BLOCK-1 (int64).

    SHARED: e0 is a multiple of 8, so that one block of 128 bits serves 8 elements.
    """
    if SHARED:
        block = (e0 >> 3) + tl.arange(0, BLOCK // 8)
        w0, w1, w2, w3 = philox(block, block >> 32, parameter, time, k0, k1)
        words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [BLOCK // 2])
        bits = tl.reshape(tl.join(words & 0xFFFF, words >> 16), [BLOCK])
    else:
        e = e0 + tl.arange(0, BLOCK)
        w0, w1, w2, w3 = philox(e >> 3, e >> 35, parameter, time, k0, k1)
        bits = (_one_of_four(w0, w1, w2, w3, e >> 1) >> ((e & 1) << 4).to(tl.uint32)) & 0xFFFF
    return bits.to(tl.int32)


@triton.jit
def to_bfloat16(x, bits):
    """float32 x moved to one of its two bfloat16 neighbours by 16 random bits; still float32, low bits zero."""
    i = x.to(tl.int32, bitcast=True)
    finite = (i & 0x7F800000) != 0x7F800000
    return tl.where(finite, (i + bits) & -0x10000, i).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["tensors", "count", "time", "k0", "k1"])
def _rademacher(
    addresses, facts, chunks, tensors, count, time: tl.uint32, k0: tl.uint32, k1: tl.uint32,
    U: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    t, number = chunk_of(chunks, count, tl.program_id(0))
    start = number * CHUNK
    left = fact(facts, tensors, t, 0) - start
    parameter, e0 = fact(facts, tensors, t, 1), fact(facts, tensors, t, 2) + start
    where = address(addresses, tensors, t, 0)
    off = tl.arange(0, BLOCK)
    if (left >= CHUNK) & (where & 15 == 0) & (e0 & 31 == 0):
        u = aligned(where, U) + start
        for i in tl.range(0, CHUNK, BLOCK, num_stages=1):
            tl.store(u + i + off, signs(e0 + i, parameter, time, k0, k1 ^ PROBE, True, BLOCK).to(U))
    else:
        u = where.to(tl.pointer_type(U)) + start
        for i in range(0, tl.minimum(left, CHUNK).to(tl.int32), BLOCK):
            u_ = signs(e0 + i, parameter, time, k0, k1 ^ PROBE, False, BLOCK)
            tl.store(u + i + off, u_.to(U), mask=off < left - i)


def rademacher_(u, *, seed, refresh, parameter, offset=()):
    """`growkit.reference.rademacher_` for a list of CUDA tensors of one dtype."""
    if not u:
        return
    lists = multi_tensor.Lists("rademacher_", {"u": u}, written=("u",), parameter=parameter, offset=offset)
    lists.launch(_rademacher, refresh, *key(seed, 0), *lists.dtypes, block=BLOCK, warps=WARPS)


def _variant(name, dtype, size, executed):
    return {
        "name": name,
        "kernel": _rademacher,
        "types": {
            **{"addresses": "*i64", "facts": "*i64", "chunks": "*i32", "tensors": "i32", "count": "i32"},
            **{"time": "u32", "k0": "u32", "k1": "u32"},
        },
        "constants": {"U": dtype, "CHUNK": multi_tensor.CHUNK, "BLOCK": BLOCK},
        "registers": 64,
        "writes": size,
        "executed": executed,
        "aligned": ("addresses", "facts", "chunks"),
        "options": {"num_warps": WARPS, "enable_fp_fusion": False},
    }


VARIANTS = [
    _variant("float32", tl.float32, 4, (41, 0, 0, 1.1)),
    _variant("bfloat16", tl.bfloat16, 2, (24, 0, 0, 1.2)),
]
