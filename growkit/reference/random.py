"""Random bits: Philox4x32-10 (Salmon et al., SC 2011), keyed by what they are for, never drawn from a stream.

So any device, block size or shard of a tensor sees the same bits.
"""

import torch

# What the random bits are for; keeps the uses independent under one seed.
LABELS, PROBE, ROUNDING, CURVATURE_ROUNDING, MOMENTUM_ROUNDING = 1, 2, 3, 4, 5


def philox(counter, seed, stream):
    """Philox4x32-10 of four 32-bit counter words (ints or int64 tensors that broadcast) under one 64-bit key.

    The key is (low half of seed, high half of seed xor stream). Returns four int64 tensors with values in [0, 2^32).
    """
    low = 0xFFFFFFFF
    c0, c1, c2, c3 = counter
    k0, k1 = seed & low, (seed >> 32 & low) ^ stream
    for _ in range(10):
        # int64 products wrap, but shift and mask still return the two true 32-bit halves.
        x, y = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (y >> 32 & low) ^ c1 ^ k0, y & low, (x >> 32 & low) ^ c3 ^ k1, x & low
        k0, k1 = k0 + 0x9E3779B9 & low, k1 + 0xBB67AE85 & low
    return c0, c1, c2, c3


def random_bits(width, first, count, *, seed, stream, parameter, time, device=None):
    """`width` (a divisor of 32) random bits for each of the elements first .. first+count-1, as int64 [count].

    Element e, in row-major order, owns bits [width*e, width*(e+1)) of the stream of 128-bit blocks with counters
    (block low, block high, parameter, time); bit 0 is the lowest bit of a block's first word.
    """
    per_block = 128 // width
    start, stop = first // per_block, (first + count - 1) // per_block + 1
    block = torch.arange(start, stop, device=device)
    words = torch.stack(philox((block & 0xFFFFFFFF, block >> 32, parameter, time), seed, stream), dim=-1)
    fields = words[..., None] >> torch.arange(0, 32, width, device=device)
    skip = first - start * per_block
    return (fields & (1 << width) - 1).flatten()[skip : skip + count]


def stochastic_bfloat16(w, first, key):
    """float32 w moved to one of its two bfloat16 neighbours, up with the probability that keeps the mean at w."""
    bits = random_bits(16, first, w.numel(), device=w.device, **key).view(w.shape)
    rounded = ((w.view(torch.int32) + bits.to(torch.int32)) & -0x10000).view(torch.float32)
    return torch.where(w.isfinite(), rounded, w)
