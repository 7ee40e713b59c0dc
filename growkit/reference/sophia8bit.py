"""Sophia's state in 8 bits: the codes, and the update and the refreshes on them."""

import torch

from growkit.reference import blocks
from growkit.reference.random import CURVATURE_ROUNDING, MOMENTUM_ROUNDING, random_bits
from growkit.reference.sophia import gnb_ema_, hutchinson_ema_, sophia_step_

# Elements per scale, and how many powers of two below the largest magnitude of its block codes reach.
CODES_PER_SCALE, CODE_SPAN = 256, 40


def quantise_(codes, scale, x, bits=None):
    """Write float32 x as 8-bit codes, in blocks of 256 elements (row-major; the last block may be shorter).

    The bit pattern of a positive float, read as an integer, is its logarithm, piecewise linear. The codes of a block
    divide the patterns b between its smallest and its largest nonzero magnitude evenly:

        hi = max b(|x|),  lo = max(min over x != 0 of b(|x|), hi - 40 * 2^23),  step = max(1, ceil((hi - lo)/(L-1)))
        code 0: 0;  code k = 1 .. L: the float with bit pattern lo + (k-1)*step, and the sign of k

    codes: contiguous, uint8 for x >= 0 (L = 255, negative x becomes 0) or int8 (L = 127). scale: float32
    [ceil(n/256), 2], the floats with bit patterns lo and hi. 0 and lo are exact. Two neighbouring codes of a block
    that spans D decades differ by a factor of at most 1 + 3.4*D/(L-1): 1.3 % per decade for uint8, 2.7 % for int8.
    Magnitudes over 12 decades (2^40) below the block's largest go to 0 or lo.
    bits: int64 [n], 16 random bits each: x goes to one of its two neighbours, up with the probability that keeps the
    mean at x to within 2^-17 of their distance. Without bits it goes to the nearer one.
    All of it is integers and single float32 operations, so that every device finds the same codes. What is not finite
    stays so, and everything 2^40 times smaller in its block is lost.
    """
    unsigned = codes.dtype == torch.uint8
    levels = 255 if unsigned else 127
    x = _rows(x.clamp(min=0) if unsigned else x)
    magnitude = x.abs()
    b = magnitude.view(torch.int32)
    hi = b.amax(1, keepdim=True).clamp_(max=0x7FC00000)  # a NaN; other patterns of it could overflow
    least = torch.where(b > 0, b, 0x7FFFFFFF).amin(1, keepdim=True)
    lo = torch.minimum(torch.maximum(least, hi - (CODE_SPAN << 23)), hi)
    step = _code_step(lo, hi, levels)
    k = torch.where((b >= lo) & (b > 0), (b - lo) // step + 1, 0)
    k = torch.where(b < 0x7F800000, k, levels)
    below, above = _code_values(k, lo, step), _code_values(k + 1, lo, step)
    threshold = 32768 if bits is None else _rows(bits).float() + 0.5
    k += threshold * (above - below) < (magnitude - below) * 65536
    codes.view(-1).copy_(torch.where(x < 0, -k, k).view(-1)[: codes.numel()])
    scale.copy_(torch.cat((lo, hi), 1).view(torch.float32))


def dequantise(codes, scale):
    """The float32 values, of the shape of `codes`, that `quantise_` wrote."""
    lo, hi = scale.view(torch.int32).split(1, 1)
    k = _rows(codes.to(torch.int32))
    x = _code_values(k.abs(), lo, _code_step(lo, hi, 255 if codes.dtype == torch.uint8 else 127))
    return torch.where(k < 0, -x, x).view(-1)[: codes.numel()].view(codes.shape)


def _rows(x):
    """x as [blocks, 256], the last block filled up with zeros."""
    x = x.reshape(-1)
    return torch.nn.functional.pad(x, (0, -x.numel() % CODES_PER_SCALE)).view(-1, CODES_PER_SCALE)


def _code_step(lo, hi, levels):
    return ((hi - lo + levels - 2) // (levels - 1)).clamp_(min=1)


def _code_values(k, lo, step):
    return torch.where(k > 0, lo + (k - 1) * step, 0).view(torch.float32)


def sophia_step_8bit_(
    p,
    g,
    m,
    h,
    m_scale,
    h_scale,
    master=None,
    unclipped=None,
    *,
    lr,
    beta1,
    rho_bs,
    eps,
    weight_decay,
    denominator="add",
    maximize=False,
    nesterov=False,
    scale=None,
    skip=None,
    step,
    seed,
    parameter,
    offset=(),
    stochastic=False,
):
    """`sophia_step_` with m and h in the 8-bit codes of `quantise_`, computed in float32.

    p, g, master: as in `sophia_step_`, none wider than float32. m: int8; h: uint8 or int8, both contiguous and of p's
    shape; m_scale, h_scale: float32 [ceil(n/256), 2]. h is read, m is read and rewritten. m is rounded stochastically
    with 16 bits keyed by (seed, step, parameter[i], offset[i] + element): to nearest, an m that moves by less than half
    a code's spacing would stand still. stochastic: round a bfloat16 p without a master in this way as well, by bits of
    its own. The blocks start at each tensor's first element. Reads and writes 15.09 B per element with float32 p and g,
    9.09 B with bfloat16 ones. Deterministic.
    """
    if blocks.is_set(skip):
        return
    options = {"lr": lr, "beta1": beta1, "rho_bs": rho_bs, "eps": eps, "weight_decay": weight_decay}
    options |= {"denominator": denominator, "maximize": maximize, "nesterov": nesterov}
    options |= {"scale": scale, "step": step, "seed": seed if stochastic else None}
    for i, (p_i, g_i) in enumerate(zip(p, g, strict=True)):
        wide = [p_i, master[i]] if master else [p_i]
        flat = [t.contiguous().view(-1) for t in wide]
        for first, (m_b, m_s, h_b, h_s, g_b, *w) in _coded_blocks(m[i], m_scale[i], h[i], h_scale[i], g_i, *flat):
            at = first + (offset[i] if offset else 0)
            m_w, h_w = dequantise(m_b, m_s), dequantise(h_b, h_s)
            sophia_step_(w[:1], [g_b], [m_w], [h_w], w[1:], unclipped, **options, parameter=[parameter[i]], offset=[at])
            key = {"seed": seed, "stream": MOMENTUM_ROUNDING, "parameter": parameter[i], "time": int(step)}
            quantise_(m_b, m_s, m_w, random_bits(16, at, m_w.numel(), device=m_w.device, **key))
        for t, f in zip(wide, flat, strict=True):
            if not t.is_contiguous():
                t.copy_(f.view(t.shape))


def gnb_ema_8bit_(h, h_scale, g, scale=None, skip=None, *, beta2, seed, refresh, parameter, offset=()):
    """`gnb_ema_` with h in the 8-bit codes of `quantise_`, computed in float32.

    h: uint8 or int8, contiguous; h_scale: float32 [ceil(n/256), 2]. h is rounded stochastically with 16 bits keyed by
    (seed, refresh, parameter[i], offset[i] + element), for an EMA that moves by 1 % would stand still if rounded to
    nearest. Deterministic.
    """
    _fold_8bit(gnb_ema_, h, h_scale, [g], scale, skip, beta2, seed, refresh, parameter, offset)


def hutchinson_ema_8bit_(h, h_scale, hu, u=None, scale=None, skip=None, *, beta2, seed, refresh, parameter, offset=()):
    """`hutchinson_ema_` with h in the 8-bit codes of `quantise_`; everything else as in `gnb_ema_8bit_`.

    h: int8. A negative h is kept, not cut off at 0: the average of u*(Hu) is unbiased only over both signs.
    """
    lists = [hu] if u is None else [hu, u]
    _fold_8bit(hutchinson_ema_, h, h_scale, lists, scale, skip, beta2, seed, refresh, parameter, offset)


def _fold_8bit(fold, h, h_scale, lists, scale, skip, beta2, seed, refresh, parameter, offset):
    if blocks.is_set(skip):
        return
    for i, operands in enumerate(zip(*lists, strict=True)):
        for first, (h_b, h_s, *x) in _coded_blocks(h[i], h_scale[i], *operands):
            at = first + (offset[i] if offset else 0)
            key = {"seed": seed, "parameter": [parameter[i]], "offset": [at]}
            h_w = dequantise(h_b, h_s)
            fold([h_w], *[[t] for t in x], scale=scale, beta2=beta2, refresh=refresh, **key)
            key = {"seed": seed, "stream": CURVATURE_ROUNDING, "parameter": parameter[i], "time": refresh}
            quantise_(h_b, h_s, h_w, random_bits(16, at, h_w.numel(), device=h_w.device, **key))


def _coded_blocks(*tensors):
    """`blocks.walk` in row-major order, where a float32 [n, 2] after a tensor of codes holds its scales."""
    codes = [t.dtype in (torch.uint8, torch.int8) for t in tensors]
    slices = [
        t.split(blocks.BLOCK // CODES_PER_SCALE) if after else t.reshape(-1).split(blocks.BLOCK)
        for t, after in zip(tensors, [False, *codes], strict=False)
    ]
    for i, block in enumerate(zip(*slices, strict=True)):
        yield i * blocks.BLOCK, block
