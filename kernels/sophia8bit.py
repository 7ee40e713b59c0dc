"""Sophia's update and curvature refreshes with m and h in 8-bit codes: one launch for a list of any number of tensors.

Each function computes the op of the same name in `growkit.reference`, where the codes are explained (`quantise_`), and
whose bits it draws. A program takes a chunk of one tensor, 8 blocks of 256 elements at a time, one block per warp: each
thread holds 8 neighbouring elements, which are 16 or 32 bytes of p and g (accesses of 128 bits) and 8 bytes of codes
(one access of 64 bits, 256 neighbouring bytes per warp). Largest and smallest magnitude of a block are found by
shuffles within its warp. A wider access to the codes would spread a block over half a warp and the accesses to p and g
over every second or fourth 16 bytes. Codes take 50 to 100 instructions per element (`growkit.kernels.report`), several
times as many as float32 state: whether memory or instructions bound these kernels has not been measured. Deterministic.
"""

import torch
import triton
import triton.language as tl

from growkit import reference
from growkit.kernels import multi_tensor
from growkit.kernels.multi_tensor import address, aligned, chunk_of, fact
from growkit.kernels.philox import key
from growkit.kernels.probe import (
    CURVATURE_ROUNDING,
    MOMENTUM_ROUNDING,
    PROBE,
    ROUNDING,
    halves,
    signs,
    to_bfloat16,
)
from growkit.kernels.sophia import clipped_update, host_or_device, is_set, present, there

# Blocks that a program handles at a time; as many warps, so that each has one.
ROWS = 8
# Where accesses are masked, one: that path computes random bits per element, and eight of them are too many registers.
MASKED_ROWS = tl.constexpr(1)

ROW = tl.constexpr(multi_tensor.ROW)
SPAN = tl.constexpr(reference.CODE_SPAN << 23)  # of bit patterns
NAN, INFINITY, SIGN = map(tl.constexpr, (0x7FC00000, 0x7F800000, -0x80000000))


@triton.jit
def _load(x, mask):
    if mask is None:
        return tl.load(x)
    else:
        return tl.load(x, mask, other=0)


@triton.jit
def _step(span, LEVELS: tl.constexpr):
    return tl.maximum((span + (LEVELS - 2)) // (LEVELS - 1), 1)


@triton.jit
def _decode(codes, off, scale, rows, mask, here, LEVELS: tl.constexpr):
    """float32 [ROWS, ROW]; scale: pointer to the first block's scales; here: which of the blocks `rows` exist."""
    code = _load(codes + off, mask).to(tl.int32)
    lo = _load(scale + 2 * rows, here).to(tl.int32, bitcast=True)
    hi = _load(scale + 2 * rows + 1, here).to(tl.int32, bitcast=True)
    step = _step(hi - lo, LEVELS)
    b = (lo - step)[:, None] + tl.abs(code) * step[:, None]
    if LEVELS == 127:
        b |= code & SIGN
    return tl.where(code == 0, 0, b).to(tl.float32, bitcast=True)


@triton.jit
def _encode(x, random, codes, off, scale, rows, mask, here, LEVELS: tl.constexpr):
    """Write float32 [ROWS, ROW], 0 where masked, rounded by 16 random bits each."""
    if LEVELS == 255:
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    magnitude = tl.abs(x)
    b = magnitude.to(tl.int32, bitcast=True)
    hi = tl.minimum(tl.max(b, 1), NAN)
    # The smallest above 0, by unsigned numbers, of which 0 - 1 is the largest.
    lo = tl.min((b - 1).to(tl.uint32, bitcast=True), 1).to(tl.int32, bitcast=True) + 1
    lo = tl.minimum(tl.maximum(lo, hi - SPAN), hi)
    scales = tl.join(lo, hi).to(tl.float32, bitcast=True)
    pair = scale + 2 * rows[:, None] + tl.arange(0, 2)[None, :]
    tl.store(pair, scales, None if here is None else here[:, None])
    step = _step(hi - lo, LEVELS)
    inverse = 1.0 / step.to(tl.float32)
    first, step = tl.maximum(lo, 1)[:, None], step[:, None]
    above_lo = b - first
    # The nearest integer to a product that is off by less than 1e-4: the quotient, or one more, as the rest tells.
    k = tl.fma(above_lo.to(tl.float32), inverse[:, None], 8388608.0).to(tl.int32, bitcast=True) - 0x4B000000
    k += 1 + (above_lo - k * step >> 31)
    # Code k, or 1 less: the neighbours above and below; under the first code, that one and 0.
    under = above_lo < 0
    k = tl.where(under, 0, k)
    above = first + k * step
    below = tl.where(under, 0, above - step).to(tl.float32, bitcast=True)
    above = above.to(tl.float32, bitcast=True)
    k = tl.where(b < INFINITY, k, LEVELS)
    k += ((random.to(tl.float32) + 0.5) * (above - below) < (magnitude - below) * 65536.0).to(tl.int32)
    if LEVELS == 127:
        k = tl.where(x < 0, -k, k)
    tl.store(codes + off, k.to(codes.dtype.element_ty), mask)


@triton.jit
def _update(
    p, g, m, h, w, m_scale, h_scale, left, lr, decay, beta1, gain, rho_bs, eps, scale, e0, parameter, time, k0, k1,
    MAX: tl.constexpr, NESTEROV: tl.constexpr, SCALED: tl.constexpr, STOCHASTIC: tl.constexpr, MASTER: tl.constexpr,
    LEVELS: tl.constexpr, FULL: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Update ROWS blocks; p, g, m, h, w, m_scale, h_scale: pointers to their first element. Returns |mbar| < d."""
    rows = tl.arange(0, ROWS)
    off = rows[:, None] * ROW + tl.arange(0, ROW)[None, :]
    mask = None if FULL else off < left
    here = None if FULL else rows * ROW < left
    w_ = _load(w + off, mask).to(tl.float32)
    g_ = _load(g + off, mask).to(tl.float32)
    m_ = _decode(m, off, m_scale, rows, mask, here, 127)
    h_ = _decode(h, off, h_scale, rows, mask, here, LEVELS)
    if SCALED:
        g_ *= scale
    w_, m_, clear = clipped_update(w_, g_, m_, h_, lr, decay, beta1, gain, rho_bs, eps, MAX, NESTEROV)
    if MASTER:
        tl.store(w + off, w_, mask)
    if STOCHASTIC:
        bits = halves(e0, parameter, time, k0, k1 ^ ROUNDING, FULL, ROWS * ROW)
        w_ = to_bfloat16(w_, tl.reshape(bits, [ROWS, ROW]))
    tl.store(p + off, w_.to(p.dtype.element_ty), mask)
    bits = halves(e0, parameter, time, k0, k1 ^ MOMENTUM_ROUNDING, FULL, ROWS * ROW)
    _encode(m_, tl.reshape(bits, [ROWS, ROW]), m, off, m_scale, rows, mask, here, 127)
    return clear if FULL else clear & mask


@triton.jit(do_not_specialize=["tensors", "count", "lr", "decay", "rho_bs", "time", "k0", "k1"])
def _sophia_step_8bit(
    addresses, facts, chunks, tensors, count, lr, decay, weight_decay, beta1, gain, rho_bs, eps,
    lr_at, rho_bs_at, scale, skip, unclipped, step, time: tl.uint32, k0: tl.uint32, k1: tl.uint32,
    P: tl.constexpr, G: tl.constexpr, H: tl.constexpr, MASTER: tl.constexpr,
    MAX: tl.constexpr, NESTEROV: tl.constexpr, STOCHASTIC: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    if is_set(skip):
        return
    lr, decay, rho_bs, s, time = present(lr, decay, weight_decay, rho_bs, lr_at, rho_bs_at, scale, step, time)
    W: tl.constexpr = P if MASTER is None else MASTER
    LEVELS: tl.constexpr = 255 if H == tl.uint8 else 127
    t, number = chunk_of(chunks, count, tl.program_id(0))
    start = number * CHUNK
    left = fact(facts, tensors, t, 0) - start
    p_at, g_at = address(addresses, tensors, t, 0), address(addresses, tensors, t, 1)
    m_at, h_at = address(addresses, tensors, t, 2), address(addresses, tensors, t, 3)
    w_at = p_at if MASTER is None else address(addresses, tensors, t, 6)
    m_scale = address(addresses, tensors, t, 4).to(tl.pointer_type(tl.float32)) + start // ROW * 2
    h_scale = address(addresses, tensors, t, 5).to(tl.pointer_type(tl.float32)) + start // ROW * 2
    parameter, e0 = fact(facts, tensors, t, 1), fact(facts, tensors, t, 2) + start
    below = 0
    if (left >= CHUNK) & ((p_at | g_at | m_at | h_at | w_at) & 15 == 0) & (e0 & 7 == 0):
        p, g, m = aligned(p_at, P) + start, aligned(g_at, G) + start, aligned(m_at, tl.int8) + start
        h, w = aligned(h_at, H) + start, aligned(w_at, W) + start
        for i in tl.range(0, CHUNK, ROWS * ROW, num_stages=1):
            clear = _update(
                p + i, g + i, m + i, h + i, w + i, m_scale + i // ROW * 2, h_scale + i // ROW * 2, left, lr, decay,
                beta1, gain, rho_bs, eps, s, e0 + i, parameter, time, k0, k1,
                MAX, NESTEROV, scale is not None, STOCHASTIC, MASTER is not None, LEVELS, True, ROWS,
            )  # fmt: skip
            if unclipped is not None:
                below += tl.sum(clear.to(tl.int32))
    else:
        p, g = p_at.to(tl.pointer_type(P)) + start, g_at.to(tl.pointer_type(G)) + start
        m, h = m_at.to(tl.pointer_type(tl.int8)) + start, h_at.to(tl.pointer_type(H)) + start
        w = w_at.to(tl.pointer_type(W)) + start
        for i in range(0, tl.minimum(left, CHUNK).to(tl.int32), MASKED_ROWS * ROW):
            clear = _update(
                p + i, g + i, m + i, h + i, w + i, m_scale + i // ROW * 2, h_scale + i // ROW * 2, left - i, lr, decay,
                beta1, gain, rho_bs, eps, s, e0 + i, parameter, time, k0, k1,
                MAX, NESTEROV, scale is not None, STOCHASTIC, MASTER is not None, LEVELS, False, MASKED_ROWS,
            )  # fmt: skip
            if unclipped is not None:
                below += tl.sum(clear.to(tl.int32))
    if unclipped is not None:
        tl.atomic_add(unclipped, below.to(tl.int64), sem="relaxed")


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
    """`growkit.reference.sophia_step_8bit_` for CUDA tensors, one dtype per list; host and device as `sophia_step_`."""
    if not p:
        return
    lists = {"p": p, "g": g, "m": m, "h": h, "m_scale": m_scale, "h_scale": h_scale}
    if master and p[0].dtype != torch.float32:
        lists["master"] = master
    lists = multi_tensor.Lists(
        "sophia_step_8bit_",
        lists,
        written=("p", "master", "m", "m_scale"),
        parameter=parameter,
        offset=offset,
        codes={"m": "m_scale", "h": "h_scale"},
    )
    (lr, lr_at), (rho_bs, rho_bs_at) = host_or_device(lr), host_or_device(rho_bs)
    P, G, _, H, _, _, *master_dtype = lists.dtypes
    _launch(
        _sophia_step_8bit,
        lists,
        lr,
        1 - lr * weight_decay,
        weight_decay,
        beta1,
        beta1 - 1 if maximize else 1 - beta1,
        rho_bs,
        eps,
        lr_at,
        rho_bs_at,
        there(scale, p[0].device),
        there(skip, p[0].device),
        unclipped,
        step if step.is_cuda else None,
        0 if step.is_cuda else int(step),
        *key(seed, 0),
        P,
        G,
        H,
        master_dtype[0] if master_dtype else None,
        denominator == "max",
        nesterov,
        stochastic and not master and P == tl.bfloat16,
    )


@triton.jit
def _fold(
    h, h_scale, x, u, left, beta2, gain, e0, parameter, time, k0, k1,
    KIND: tl.constexpr, LEVELS: tl.constexpr, FULL: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """h <- beta2*h + gain*x*y in ROWS blocks, y = x ("gnb"), *u ("given") or the probe's signs ("drawn")."""
    rows = tl.arange(0, ROWS)
    off = rows[:, None] * ROW + tl.arange(0, ROW)[None, :]
    mask = None if FULL else off < left
    here = None if FULL else rows * ROW < left
    x_ = _load(x + off, mask).to(tl.float32)
    if KIND == "gnb":
        y = x_
    elif KIND == "given":
        y = _load(u + off, mask).to(tl.float32)
    else:
        y = tl.reshape(signs(e0, parameter, time, k0, k1 ^ PROBE, FULL, ROWS * ROW), [ROWS, ROW])
    h_ = tl.fma(x_ * y, gain, _decode(h, off, h_scale, rows, mask, here, LEVELS) * beta2)
    bits = halves(e0, parameter, time, k0, k1 ^ CURVATURE_ROUNDING, FULL, ROWS * ROW)
    _encode(h_, tl.reshape(bits, [ROWS, ROW]), h, off, h_scale, rows, mask, here, LEVELS)


@triton.jit(do_not_specialize=["tensors", "count", "time", "k0", "k1"])
def _refresh_8bit(
    addresses, facts, chunks, tensors, count, beta2, gain, scale, skip, time: tl.uint32, k0: tl.uint32, k1: tl.uint32,
    H: tl.constexpr, X: tl.constexpr, U: tl.constexpr, KIND: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    if is_set(skip):
        return
    if scale is not None:
        gain *= tl.load(scale).to(tl.float32)
    UX: tl.constexpr = X if U is None else U
    LEVELS: tl.constexpr = 255 if H == tl.uint8 else 127
    t, number = chunk_of(chunks, count, tl.program_id(0))
    start = number * CHUNK
    left = fact(facts, tensors, t, 0) - start
    h_at, x_at = address(addresses, tensors, t, 0), address(addresses, tensors, t, 2)
    u_at = x_at if U is None else address(addresses, tensors, t, 3)
    h_scale = address(addresses, tensors, t, 1).to(tl.pointer_type(tl.float32)) + start // ROW * 2
    parameter, e0 = fact(facts, tensors, t, 1), fact(facts, tensors, t, 2) + start
    if (left >= CHUNK) & ((h_at | x_at | u_at) & 15 == 0) & (e0 & 31 == 0):
        h, x, u = aligned(h_at, H) + start, aligned(x_at, X) + start, aligned(u_at, UX) + start
        for i in tl.range(0, CHUNK, ROWS * ROW, num_stages=1):
            _fold(
                h + i, h_scale + i // ROW * 2, x + i, u + i, left, beta2, gain, e0 + i, parameter, time, k0, k1,
                KIND, LEVELS, True, ROWS,
            )  # fmt: skip
    else:
        h, x = h_at.to(tl.pointer_type(H)) + start, x_at.to(tl.pointer_type(X)) + start
        u = u_at.to(tl.pointer_type(UX)) + start
        for i in range(0, tl.minimum(left, CHUNK).to(tl.int32), MASKED_ROWS * ROW):
            _fold(
                h + i, h_scale + i // ROW * 2, x + i, u + i, left - i, beta2, gain, e0 + i, parameter, time, k0, k1,
                KIND, LEVELS, False, MASKED_ROWS,
            )  # fmt: skip


def gnb_ema_8bit_(h, h_scale, g, scale=None, skip=None, *, beta2, seed, refresh, parameter, offset=()):
    """`growkit.reference.gnb_ema_8bit_` for CUDA tensors, one dtype per list."""
    lists = {"h": h, "h_scale": h_scale, "g": g}
    _fold_lists("gnb", lists, scale, skip, beta2, seed, refresh, parameter, offset)


def hutchinson_ema_8bit_(h, h_scale, hu, u=None, scale=None, skip=None, *, beta2, seed, refresh, parameter, offset=()):
    """`growkit.reference.hutchinson_ema_8bit_` for CUDA tensors, one dtype per list."""
    kind, lists = "drawn", {"h": h, "h_scale": h_scale, "hu": hu}
    if u is not None:
        kind, lists = "given", {**lists, "u": u}
    _fold_lists(kind, lists, scale, skip, beta2, seed, refresh, parameter, offset)


def _fold_lists(kind, lists, scale, skip, beta2, seed, refresh, parameter, offset):
    if not lists["h"]:
        return
    device = lists["h"][0].device
    op = "gnb_ema_8bit_" if kind == "gnb" else "hutchinson_ema_8bit_"
    keys = {"parameter": parameter, "offset": offset, "codes": {"h": "h_scale"}}
    lists = multi_tensor.Lists(op, lists, written=("h", "h_scale"), **keys)
    H, _, X, *U = lists.dtypes
    arguments = beta2, 1 - beta2, there(scale, device), there(skip, device), refresh, *key(seed, 0)
    _launch(_refresh_8bit, lists, *arguments, H, X, U[0] if U else None, kind)


def _launch(kernel, lists, *arguments):
    lists.launch(kernel, *arguments, block=ROWS, warps=ROWS)


_TABLE = {"addresses": "*i64", "facts": "*i64", "chunks": "*i32", "tensors": "i32", "count": "i32"}
_RANDOM = {"time": "u32", "k0": "u32", "k1": "u32"}
_NUMBERS = ("lr", "decay", "weight_decay", "beta1", "gain", "rho_bs", "eps")
_SCALARS = {**dict.fromkeys(("lr_at", "rho_bs_at", "scale", "skip", "step"), "*fp32"), "unclipped": "*i64"}


def _variant(kernel, name, types, constants, registers, reads, writes, narrow, executed, wide):
    """Of `growkit.kernels.report`; reads, writes: bytes per element as the threads ask for them.

    A thread asks for 4 bytes of each scale for its 8 elements; the memory moves them once for a warp's 256.
    """
    types = {**_TABLE, **types, **_RANDOM}
    absent = {k: None for k in kernel.arg_names if k in _SCALARS and k not in types}
    return {
        "name": name,
        "kernel": kernel,
        "types": types,
        "constants": {**absent, **constants, "CHUNK": multi_tensor.CHUNK, "ROWS": ROWS},
        "registers": registers,
        "reads": reads,
        "writes": writes,
        "narrow": narrow,
        "executed": executed,
        "wide": wide,
        "aligned": tuple(k for k, t in types.items() if t.startswith("*")),
        "options": {"num_warps": ROWS, "enable_fp_fusion": False},
    }


def _step_variant(
    name, P, H, MASTER, registers, executed, maximum=False, nesterov=False, stochastic=False, **given
):  # fmt: skip
    constants = {"P": P, "G": P, "H": H, "MASTER": MASTER}
    constants |= {"MAX": maximum, "NESTEROV": nesterov, "STOCHASTIC": stochastic}
    types = dict.fromkeys(_NUMBERS, "fp32") | given
    size, master = P.primitive_bitwidth // 8, 4 if MASTER else 0
    wide = (master or size) + size, size + master
    reads, writes = wide[0] + 2 + 2, wide[1] + 1 + 1
    return _variant(_sophia_step_8bit, name, types, constants, registers, reads, writes, (6, 2), executed, wide)


def _refresh_variant(kind, H, X, U, registers, executed):
    constants = {"H": H, "X": X, "U": U, "KIND": kind}
    types = {"beta2": "fp32", "gain": "fp32"}
    wide = (X.primitive_bitwidth + (U.primitive_bitwidth if U else 0)) // 8, 0
    name = f"{kind}, {X.name}"
    return _variant(_refresh_8bit, name, types, constants, registers, wide[0] + 2, 2, (3, 2), executed, wide)


_F, _B, _U, _S = tl.float32, tl.bfloat16, tl.uint8, tl.int8
VARIANTS = [
    _step_variant("float32", _F, _U, None, 96, (97, 9.5, 2, 1.35)),
    _step_variant("float32, max", _F, _S, None, 96, (103, 9.5, 2, 1.35), maximum=True),
    _step_variant("float32, nesterov", _F, _U, None, 96, (99, 9.5, 2, 1.35), nesterov=True),
    _step_variant("float32, device scalars", _F, _U, None, 112, (106, 10.5, 3, 1.37), **_SCALARS),
    _step_variant("bfloat16, stochastic", _B, _U, None, 120, (116, 1.5, 1), stochastic=True),
    _step_variant("bfloat16, master", _B, _U, _F, 112, (99, 9.5, 2, 1.13)),
    _refresh_variant("gnb", _U, _F, None, 72, (72, 1.5, 1, 1.35)),
    _refresh_variant("gnb", _U, _B, None, 72, (73, 1.5, 1)),
    _refresh_variant("given", _S, _F, _F, 72, (81, 1.5, 1, 1.58)),
    _refresh_variant("drawn", _S, _F, None, 96, (101, 1.5, 1, 1.35)),
]
