"""Sophia's update and curvature refreshes: one launch for a list of any number of tensors.

Each function computes the op of the same name in `growkit.reference`, whose equations and arguments it shares, in
float32 for CUDA tensors of dtype float32, bfloat16 or float16. Operations are rounded one by one, in the order of the
official code's PyTorch kernels, with `fma` where those have it. Full chunks of aligned tensors take 128-bit accesses;
tails and unaligned tensors take masked ones. Registers per thread: at most what VARIANTS states for each kernel, 64 for
a float32 update and 128 with 16-bit lists. Deterministic.
"""

import torch
import triton
import triton.language as tl

from growkit.kernels import multi_tensor
from growkit.kernels.multi_tensor import address, aligned, chunk_of, fact
from growkit.kernels.philox import key
from growkit.kernels.probe import CURVATURE_ROUNDING, PROBE, ROUNDING, halves, signs, to_bfloat16

# Elements that a program handles at a time: 16 bytes per thread of the narrowest list, by the choice of `_warps`.
BLOCK = 1024
# At most so many programs, each taking every so-manyth chunk; None: a program per chunk.
PROGRAMS = None


@triton.jit
def is_set(skip):
    if skip is None:
        return False
    else:
        return tl.load(skip) != 0


@triton.jit
def clipped_update(w, g, m, h, lr, decay, beta1, gain, rho_bs, eps, MAX: tl.constexpr, NESTEROV: tl.constexpr):
    """New w and m of blocks of float32, and |mbar| < d."""
    m = tl.fma(g, gain, m * beta1)
    mbar = tl.fma(g, gain, m * beta1) if NESTEROV else m
    if MAX:
        d = tl.maximum(h * rho_bs, eps, propagate_nan=tl.PropagateNan.ALL)
    else:
        d = h * rho_bs + eps
    u = tl.div_rn(mbar, d)
    w = tl.fma(tl.clamp(u, -1.0, 1.0, propagate_nan=tl.PropagateNan.ALL), -lr, w * decay)
    return w, m, tl.abs(u) < 1


@triton.jit
def tallied(flags, AT_ONCE: tl.constexpr):
    """What a count adds up block by block: flags, each thread its own, to be summed in the end; or their sum."""
    if AT_ONCE:
        return tl.sum(flags)
    else:
        return flags


@triton.jit
def present(lr, decay, weight_decay, rho_bs, lr_at, rho_bs_at, scale, step, time):
    """lr, 1 - lr*weight_decay, rho*bs, the gradients' scale and the step, read from the device where it has them."""
    if lr_at is not None:
        lr = tl.load(lr_at).to(tl.float32)
        decay = tl.fma(-lr, weight_decay, 1.0)
    if rho_bs_at is not None:
        rho_bs = tl.load(rho_bs_at).to(tl.float32)
    s = 1.0
    if scale is not None:
        s = tl.load(scale).to(tl.float32)
    if step is not None:
        time = tl.load(step).to(tl.uint32)
    return lr, decay, rho_bs, s, time


@triton.jit
def _update(
    p, g, m, h, w, mask, lr, decay, beta1, gain, rho_bs, eps, scale, e0, parameter, time, k0, k1,
    MAX: tl.constexpr, NESTEROV: tl.constexpr, SCALED: tl.constexpr, STOCHASTIC: tl.constexpr, MASTER: tl.constexpr,
    FULL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update one block; p, g, m, h, w: pointers to its first element. Returns |mbar| < d, int1 [BLOCK]."""
    off = tl.arange(0, BLOCK)
    w_ = tl.load(w + off, mask).to(tl.float32)
    g_ = tl.load(g + off, mask).to(tl.float32)
    m_ = tl.load(m + off, mask).to(tl.float32)
    h_ = tl.load(h + off, mask).to(tl.float32)
    if SCALED:
        g_ *= scale
    w_, m_, clear = clipped_update(w_, g_, m_, h_, lr, decay, beta1, gain, rho_bs, eps, MAX, NESTEROV)
    tl.store(m + off, m_.to(m.dtype.element_ty), mask)
    if MASTER:
        tl.store(w + off, w_, mask)
    if STOCHASTIC:
        w_ = to_bfloat16(w_, halves(e0, parameter, time, k0, k1 ^ ROUNDING, FULL, BLOCK))
    tl.store(p + off, w_.to(p.dtype.element_ty), mask)
    return clear


@triton.jit(do_not_specialize=["tensors", "count", "lr", "decay", "rho_bs", "time", "k0", "k1"])
def _sophia_step(
    addresses, facts, chunks, tensors, count, lr, decay, weight_decay, beta1, gain, rho_bs, eps,
    lr_at, rho_bs_at, scale, skip, unclipped, step, time: tl.uint32, k0: tl.uint32, k1: tl.uint32,
    P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, H: tl.constexpr, MASTER: tl.constexpr,
    MAX: tl.constexpr, NESTEROV: tl.constexpr, STOCHASTIC: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if is_set(skip):
        return
    lr, decay, rho_bs, s, time = present(lr, decay, weight_decay, rho_bs, lr_at, rho_bs_at, scale, step, time)
    W: tl.constexpr = P if MASTER is None else MASTER
    off = tl.arange(0, BLOCK)
    # With 16-bit lists a thread has 8 elements, and no registers for as many counts.
    AT_ONCE: tl.constexpr = P != tl.float32 or G != tl.float32 or M != tl.float32
    below = 0 if AT_ONCE else tl.zeros([BLOCK], tl.int32)
    for c in range(tl.program_id(0), count, tl.num_programs(0)):
        t, number = chunk_of(chunks, count, c)
        start = number * CHUNK
        left = fact(facts, tensors, t, 0) - start
        p_at, g_at = address(addresses, tensors, t, 0), address(addresses, tensors, t, 1)
        m_at, h_at = address(addresses, tensors, t, 2), address(addresses, tensors, t, 3)
        w_at = p_at if MASTER is None else address(addresses, tensors, t, 4)
        parameter, e0 = 0, start
        if STOCHASTIC:
            parameter, e0 = fact(facts, tensors, t, 1), fact(facts, tensors, t, 2) + start
        bits = e0 & 7 if STOCHASTIC else 0
        if (left >= CHUNK) & ((p_at | g_at | m_at | h_at | w_at) & 15 == 0) & (bits == 0):
            p, g, m = aligned(p_at, P) + start, aligned(g_at, G) + start, aligned(m_at, M) + start
            h, w = aligned(h_at, H) + start, aligned(w_at, W) + start
            for i in tl.range(0, CHUNK, BLOCK, num_stages=1):
                clear = _update(
                    p + i, g + i, m + i, h + i, w + i, None, lr, decay, beta1, gain, rho_bs, eps, s, e0 + i,
                    parameter, time, k0, k1,
                    MAX, NESTEROV, scale is not None, STOCHASTIC, MASTER is not None, True, BLOCK,
                )  # fmt: skip
                if unclipped is not None:
                    below += tallied(clear.to(tl.int32), AT_ONCE)
        else:
            p, g = p_at.to(tl.pointer_type(P)) + start, g_at.to(tl.pointer_type(G)) + start
            m, h = m_at.to(tl.pointer_type(M)) + start, h_at.to(tl.pointer_type(H)) + start
            w = w_at.to(tl.pointer_type(W)) + start
            for i in range(0, tl.minimum(left, CHUNK).to(tl.int32), BLOCK):
                mask = off < left - i
                clear = _update(
                    p + i, g + i, m + i, h + i, w + i, mask, lr, decay, beta1, gain, rho_bs, eps, s, e0 + i,
                    parameter, time, k0, k1,
                    MAX, NESTEROV, scale is not None, STOCHASTIC, MASTER is not None, False, BLOCK,
                )  # fmt: skip
                if unclipped is not None:
                    below += tallied((clear & mask).to(tl.int32), AT_ONCE)
    if unclipped is not None:
        total = below if AT_ONCE else tl.sum(below)
        tl.atomic_add(unclipped, total.to(tl.int64), sem="relaxed")


def sophia_step_(
    p,
    g,
    m,
    h,
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
    step=None,
    seed=None,
    parameter=(),
    offset=(),
):
    """`growkit.reference.sophia_step_` for CUDA tensors, one dtype per list.

    lr, rho_bs: floats, or tensors that the kernel reads (so a CUDA graph replays with their present values). step: on
    the device it is read by the kernel, too. The host waits for nothing.
    """
    if not p:
        return
    lists = {"p": p, "g": g, "m": m, "h": h}
    if master and p[0].dtype != torch.float32:
        lists["master"] = master
    stochastic = p[0].dtype == torch.bfloat16 and not master and seed is not None
    keys = {"parameter": parameter, "offset": offset} if stochastic else {}
    lists = multi_tensor.Lists("sophia_step_", lists, written=("p", "m", "master"), **keys)
    (lr, lr_at), (rho_bs, rho_bs_at) = host_or_device(lr), host_or_device(rho_bs)
    _launch(
        _sophia_step,
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
        step if stochastic and step.is_cuda else None,
        int(step) if stochastic and not step.is_cuda else 0,
        *key(seed or 0, 0),
        *lists.dtypes,
        *[None] * (5 - len(lists.dtypes)),
        denominator == "max",
        nesterov,
        stochastic,
    )


@triton.jit
def _fold(
    h, x, u, mask, beta2, gain, e0, parameter, time, k0, k1,
    KIND: tl.constexpr, STOCHASTIC: tl.constexpr, FULL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """h <- beta2*h + gain*x*y in one block, y = x ("gnb"), *u ("given") or the probe's signs ("drawn")."""
    off = tl.arange(0, BLOCK)
    x_ = tl.load(x + off, mask).to(tl.float32)
    h_ = tl.load(h + off, mask).to(tl.float32)
    if KIND == "gnb":
        y = x_
    elif KIND == "given":
        y = tl.load(u + off, mask).to(tl.float32)
    else:
        y = signs(e0, parameter, time, k0, k1 ^ PROBE, FULL, BLOCK)
    h_ = tl.fma(x_ * y, gain, h_ * beta2)
    if STOCHASTIC:
        h_ = to_bfloat16(h_, halves(e0, parameter, time, k0, k1 ^ CURVATURE_ROUNDING, FULL, BLOCK))
    tl.store(h + off, h_.to(h.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["tensors", "count", "time", "k0", "k1"])
def _refresh(
    addresses, facts, chunks, tensors, count, beta2, gain, scale, skip, time: tl.uint32, k0: tl.uint32, k1: tl.uint32,
    H: tl.constexpr, X: tl.constexpr, U: tl.constexpr,
    KIND: tl.constexpr, STOCHASTIC: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if is_set(skip):
        return
    if scale is not None:
        gain *= tl.load(scale).to(tl.float32)
    off = tl.arange(0, BLOCK)
    for c in range(tl.program_id(0), count, tl.num_programs(0)):
        t, number = chunk_of(chunks, count, c)
        start = number * CHUNK
        left = fact(facts, tensors, t, 0) - start
        h_at, x_at = address(addresses, tensors, t, 0), address(addresses, tensors, t, 1)
        u_at = x_at if U is None else address(addresses, tensors, t, 2)
        parameter, e0 = 0, start
        if STOCHASTIC or KIND == "drawn":
            parameter, e0 = fact(facts, tensors, t, 1), fact(facts, tensors, t, 2) + start
        UX: tl.constexpr = X if U is None else U
        bits = e0 & 31 if STOCHASTIC or KIND == "drawn" else 0
        if (left >= CHUNK) & ((h_at | x_at | u_at) & 15 == 0) & (bits == 0):
            h, x, u = aligned(h_at, H) + start, aligned(x_at, X) + start, aligned(u_at, UX) + start
            for i in tl.range(0, CHUNK, BLOCK, num_stages=1):
                _fold(
                    h + i, x + i, u + i, None, beta2, gain, e0 + i,
                    parameter, time, k0, k1, KIND, STOCHASTIC, True, BLOCK,
                )  # fmt: skip
        else:
            h, x = h_at.to(tl.pointer_type(H)) + start, x_at.to(tl.pointer_type(X)) + start
            u = u_at.to(tl.pointer_type(UX)) + start
            for i in range(0, tl.minimum(left, CHUNK).to(tl.int32), BLOCK):
                mask = off < left - i
                _fold(
                    h + i, x + i, u + i, mask, beta2, gain, e0 + i,
                    parameter, time, k0, k1, KIND, STOCHASTIC, False, BLOCK,
                )  # fmt: skip


def gnb_ema_(h, g, scale=None, skip=None, *, beta2, seed=None, refresh=0, parameter=(), offset=()):
    """`growkit.reference.gnb_ema_` for CUDA tensors, one dtype per list."""
    _fold_lists("gnb", {"h": h, "g": g}, scale, skip, beta2, seed, refresh, parameter, offset)


def hutchinson_ema_(h, hu, u=None, scale=None, skip=None, *, beta2, seed=0, refresh=0, parameter=(), offset=()):
    """`growkit.reference.hutchinson_ema_` for CUDA tensors, one dtype per list."""
    kind, lists = ("drawn", {"h": h, "hu": hu}) if u is None else ("given", {"h": h, "hu": hu, "u": u})
    _fold_lists(kind, lists, scale, skip, beta2, seed, refresh, parameter, offset)


def _fold_lists(kind, lists, scale, skip, beta2, seed, refresh, parameter, offset):
    h = lists["h"]
    if not h:
        return
    stochastic = h[0].dtype == torch.bfloat16 and seed is not None and len(parameter) > 0
    keys = {"parameter": parameter, "offset": offset} if stochastic or kind == "drawn" else {}
    op = "gnb_ema_" if kind == "gnb" else "hutchinson_ema_"
    lists = multi_tensor.Lists(op, lists, written=("h",), **keys)
    _launch(
        _refresh,
        lists,
        beta2,
        1 - beta2,
        there(scale, h[0].device),
        there(skip, h[0].device),
        refresh,
        *key(seed or 0, 0),
        *lists.dtypes,
        *[None] * (3 - len(lists.dtypes)),
        kind,
        stochastic,
        drawn=kind == "drawn",
    )


@triton.jit(do_not_specialize=["tensors", "count"])
def _squares(
    addresses, facts, chunks, tensors, count, partial, G: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    off = tl.arange(0, BLOCK)
    for c in range(tl.program_id(0), count, tl.num_programs(0)):
        t, number = chunk_of(chunks, count, c)
        start = number * CHUNK
        left = fact(facts, tensors, t, 0) - start
        where = address(addresses, tensors, t, 0)
        total = tl.zeros([BLOCK], tl.float32)
        if (left >= CHUNK) & (where & 15 == 0):
            g = aligned(where, G) + start
            for i in tl.static_range(0, CHUNK, BLOCK):
                x = tl.load(g + i + off).to(tl.float32)
                total += x * x
        else:
            g = where.to(tl.pointer_type(G)) + start
            for j in range(0, tl.minimum(left, CHUNK).to(tl.int32), BLOCK):
                y = tl.load(g + j + off, mask=off < left - j, other=0).to(tl.float32)
                total += y * y
        tl.store(partial + c, tl.sum(total))


def squared_norm(g):
    """`growkit.reference.squared_norm` for CUDA tensors of one dtype: a float32 sum per chunk, then one of those."""
    lists = multi_tensor.Lists("squared_norm", {"g": g})
    partial = torch.empty(lists.chunks, dtype=torch.float32, device=g[0].device)
    _launch(_squares, lists, partial, *lists.dtypes)
    return partial.sum(dtype=torch.float64)


def host_or_device(x):
    """(number, None), or (0, tensor) for a number that lies on the device."""
    return (0.0, x) if isinstance(x, torch.Tensor) and x.is_cuda else (float(x), None)


def there(x, device):
    return x if x is None or x.device == device else x.to(device, non_blocking=True)


def _warps(dtypes, drawn=False):
    """8 warps where a thread's 16 bytes are 4 elements; 4 where they are 8, or where 8 share one call of Philox."""
    return 4 if drawn or any(dtype != tl.float32 for dtype in dtypes) else 8


def _launch(kernel, lists, *arguments, drawn=False):
    lists.launch(kernel, *arguments, block=BLOCK, warps=_warps(lists.dtypes, drawn), programs=PROGRAMS)


_TABLE = {"addresses": "*i64", "facts": "*i64", "chunks": "*i32", "tensors": "i32", "count": "i32"}
_RANDOM = {"time": "u32", "k0": "u32", "k1": "u32"}
_NUMBERS = ("lr", "decay", "weight_decay", "beta1", "gain", "rho_bs", "eps")
_STEP = {**_TABLE, **dict.fromkeys(_NUMBERS, "fp32"), **_RANDOM}
_FOLD = {**_TABLE, "beta2": "fp32", "gain": "fp32", **_RANDOM}


def _variant(kernel, name, types, constants, dtypes, registers, reads, writes, executed, drawn=False, **most):
    """Of `growkit.kernels.report`; dtypes: of the lists as the kernel names them; types: of all else that is given."""
    optional = ("lr_at", "rho_bs_at", "scale", "skip", "unclipped", "step")
    absent = {k: None for k in kernel.arg_names if k in optional and k not in types}
    return {
        "name": name,
        "kernel": kernel,
        "types": types,
        "constants": {**absent, **dtypes, **constants, "CHUNK": multi_tensor.CHUNK, "BLOCK": BLOCK},
        "registers": registers,
        "reads": reads,
        "writes": writes,
        "executed": executed,
        "aligned": tuple(k for k, t in types.items() if t.startswith("*")),
        "options": {"num_warps": _warps([t for t in dtypes.values() if t], drawn), "enable_fp_fusion": False},
        **most,
    }


def _step_variant(
    name, P, G, M, MASTER, registers, reads, writes, executed, stochastic=False, maximum=False, nesterov=False, **given
):  # fmt: skip
    dtypes = {"P": P, "G": G, "M": M, "H": M, "MASTER": MASTER}
    constants = {"MAX": maximum, "NESTEROV": nesterov, "STOCHASTIC": stochastic}
    return _variant(_sophia_step, name, _STEP | given, constants, dtypes, registers, reads, writes, executed)


def _refresh_variant(name, H, X, U, registers, reads, writes, executed, stochastic=False, **most):
    kind = name.partition(",")[0]
    constants = {"KIND": kind, "STOCHASTIC": stochastic}
    dtypes = {"H": H, "X": X, "U": U}
    drawn = kind == "drawn"
    return _variant(_refresh, name, _FOLD, constants, dtypes, registers, reads, writes, executed, drawn, **most)


_F, _B = tl.float32, tl.bfloat16
_ALL = {"lr_at": "*fp32", "rho_bs_at": "*fp32", "scale": "*fp32", "skip": "*fp32", "unclipped": "*i64"}
VARIANTS = [
    _step_variant("float32", _F, _F, _F, None, 64, 16, 8, (23,)),
    _step_variant("float32, max", _F, _F, _F, None, 64, 16, 8, (24,), maximum=True),
    _step_variant("float32, nesterov", _F, _F, _F, None, 64, 16, 8, (25,), nesterov=True),
    _step_variant("float32, device scalars", _F, _F, _F, None, 64, 16, 8, (31, 0.5, 0.5, 1.04), **_ALL),
    _step_variant("bfloat16, stochastic", _B, _B, _F, None, 128, 12, 6, (47, 8, 2, 1.47), stochastic=True),
    _step_variant(
        "bfloat16, step on device", _B, _B, _F, None, 168, 12, 6, (56, 9, 4, 1.47), True, step="*fp32", **_ALL
    ),  # fmt: skip
    _step_variant("bfloat16, master", _B, _B, _F, _F, 128, 14, 10, (25, 16, 4, 1.52)),
    _step_variant("bfloat16, nearest", _B, _B, _F, None, 128, 12, 6, (25, 8, 2, 1.47)),
    _step_variant("bfloat16 state", _F, _F, _B, None, 128, 12, 6, (25, 8, 2, 1.47)),
    _refresh_variant("gnb", _F, _F, None, 40, 8, 4, (12,)),
    _refresh_variant("gnb, bfloat16 g", _F, _B, None, 64, 6, 4, (12, 8, 2, 1.43)),
    _refresh_variant("gnb, bfloat16 h", _B, _F, None, 96, 6, 2, (34, 0, 0, 1.54), stochastic=True),
    _refresh_variant("given", _F, _F, _F, 48, 12, 4, (13,)),
    _refresh_variant("drawn", _F, _F, None, 80, 8, 4, (46,), instructions=30),
    _variant(_squares, "float32", {**_TABLE, "partial": "*fp32"}, {}, {"G": _F}, 40, 4, 0, (9, 0.5, 0.5, 1.07)),
    _variant(_squares, "bfloat16", {**_TABLE, "partial": "*fp32"}, {}, {"G": _B}, 40, 2, 0, (7, 0.25, 0.5, 1.07)),
]
