"""Philox4x32-10 (Salmon et al., SC 2011) in Triton kernels: the numbers of `growkit.reference.philox`, bit for bit."""

import triton
import triton.language as tl


def key(seed, stream):
    """The two 32-bit key words of (seed, stream), as `growkit.reference.philox` forms them.

    A kernel takes them annotated `tl.uint32` and named in `do_not_specialize`: else a seed would choose their type
    and compile the kernel anew.
    """
    return seed & 0xFFFFFFFF, (seed >> 32 & 0xFFFFFFFF) ^ stream


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Four uint32 words for the counter (c0, c1, c2, c3) under the key (k0, k1), each a scalar or a block.

    Counters and keys are integers of any type, taken modulo 2^32; shapes broadcast. Element e of `random_bits(width,
    ...)` lies in block b = e // (128 // width), whose counter is (b low, b high, parameter, time).
    Cost: 10 rounds of two 32 x 32 -> 64 bit products and four xors, plus the key schedule where the key is a block.
    """
    c0, c1, c2, c3 = tl.cast(c0, tl.uint32), tl.cast(c1, tl.uint32), tl.cast(c2, tl.uint32), tl.cast(c3, tl.uint32)
    k0, k1 = tl.cast(k0, tl.uint32), tl.cast(k1, tl.uint32)
    for _ in tl.static_range(10):
        x = c0.to(tl.uint64) * 0xD2511F53
        y = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (y >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (x >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = y.to(tl.uint32)
        c3 = x.to(tl.uint32)
        k0 += tl.cast(0x9E3779B9, tl.uint32)
        k1 += tl.cast(0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3
