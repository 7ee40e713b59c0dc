"""Sophia's update, its refreshes and the probe of one of them (arXiv:2305.14342)."""

import torch

from growkit.reference import blocks
from growkit.reference.random import CURVATURE_ROUNDING, PROBE, ROUNDING, random_bits, stochastic_bfloat16


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
    """Clipped update of a list of tensors, in place (Sophia, arXiv:2305.14342, Algorithm 3).

        m <- beta1*m + (1-beta1)*g
        p <- p*(1 - lr*weight_decay) - lr*clip(mbar/d, -1, 1)
        d = rho_bs*h + eps ("add", SophiaG)  or  max(rho_bs*h, eps) ("max", SophiaH)
        mbar = m  or, with `nesterov`,  beta1*m + (1-beta1)*g, which looks a step ahead (Dozat 2016, m-bar of NAdam)

    p, g, m, h: lists of tensors, equal in shape within each position, each of any floating dtype; the update computes
    in float32 (float64 for float64 p). Where p is narrower, the result goes to `master` (in the dtype of computation)
    and is rounded to nearest into p; without a master a bfloat16 p is rounded stochastically if `seed` is given, with
    16 bits keyed by (seed, step, parameter[i], offset[i] + element), else to nearest. A bfloat16 m is rounded to
    nearest: its EMA moves by more than the format's step.
    lr, rho_bs: numbers or 1-element tensors. lr bounds |dp| per step apart from decay; every product of scalars is
    formed in double on the host. maximize: follow -g.
    scale: 0-d tensor that multiplies g. skip: 0-d tensor; nonzero leaves everything as it is.
    unclipped: int64 0-d tensor that grows by the number of elements with |mbar| < d. step: 0-d tensor.
    Cost: reads p, g, m, h and writes p, m once per block. Deterministic. An element's result does not depend on its
    neighbours, so blocks, shards and devices agree.
    """
    if blocks.is_set(skip):
        return
    lr, decay, rho_bs = float(lr), 1 - float(lr) * weight_decay, float(rho_bs)
    gain = beta1 - 1 if maximize else 1 - beta1
    factor = None if scale is None else float(scale)
    for i, (p_i, g_i, m_i, h_i) in enumerate(zip(p, g, m, h, strict=True)):
        dtype = blocks.wide(p_i)
        master_i = p_i if p_i.dtype == dtype else master[i] if master else None
        rounds = p_i.dtype == torch.bfloat16 and master_i is None and seed is not None
        wide = p_i if master_i is None else master_i
        d = None
        for first, (p_b, g_b, m_b, h_b, w) in blocks.walk(p_i, g_i, m_i, h_i, wide, numbered=rounds):
            w, m_w, h_w = w.to(dtype), m_b.to(dtype), h_b.to(dtype)  # the blocks themselves, or wide copies of them
            g_b = g_b.to(dtype) if factor is None else g_b.to(dtype) * factor
            if decay != 1:
                w.mul_(decay)
            m_w.mul_(beta1).add_(g_b, alpha=gain)
            mbar = (m_w * beta1).add_(g_b, alpha=gain) if nesterov else m_w
            d = torch.empty_like(h_w) if d is None or d.shape != h_w.shape else d
            torch.mul(h_w, rho_bs, out=d)
            d = d.add_(eps) if denominator == "add" else d.clamp_(min=eps)
            u = torch.div(mbar, d, out=d)
            if unclipped is not None:
                unclipped += (u.abs() < 1).sum()
            w.add_(u.clamp_(-1, 1), alpha=-lr)
            if m_w is not m_b:
                m_b.copy_(m_w)
            if p_b.dtype == dtype:
                continue
            if rounds:
                key = {"seed": seed, "stream": ROUNDING, "parameter": parameter[i], "time": int(step)}
                w = stochastic_bfloat16(w, first + (offset[i] if offset else 0), key)
            p_b.copy_(w)


def squared_norm(g):
    """Sum of the squares of all elements of a list of tensors, a 0-d float64 tensor on the device of the first.

    The squares are summed in float32 or wider. Deterministic. For an empty list 0.
    """
    if not g:
        return torch.zeros((), dtype=torch.float64)
    norms = [torch.linalg.vector_norm(t, dtype=blocks.wide(t)) for t in g]
    return torch.stack([n.to(g[0].device, torch.float64) for n in norms]).square_().sum()


def gnb_ema_(h, g, scale=None, skip=None, *, beta2, seed=None, refresh=0, parameter=(), offset=()):
    """Gauss-Newton-Bartlett refresh of a list of tensors, in place (Sophia, arXiv:2305.14342, Algorithm 2).

        h <- beta2*h + (1-beta2)*s*g^2

    g is the gradient of the mean NLL of labels sampled from the model; h, g: lists of equal shapes, any floating dtype,
    computed in float32 or wider. scale: 0-d tensor s (default 1); s = N/bs for N labels keeps rho*bs*h equal to
    rho*EMA(N*g^2). skip: 0-d tensor; nonzero leaves h as it is. A bfloat16 h, whose step is too coarse for an EMA that
    moves by 1 %, is rounded stochastically if `seed` is given, with 16 bits keyed by (seed, refresh, parameter[i],
    offset[i] + element), else to nearest. Reads h, g and writes h once. Deterministic.
    """
    _fold(h, g, g, scale, skip, beta2, seed, refresh, parameter, offset)


def hutchinson_ema_(h, hu, u=None, scale=None, skip=None, *, beta2, seed=0, refresh=0, parameter=(), offset=()):
    """Hutchinson refresh of a list of tensors, in place (Sophia, arXiv:2305.14342, Algorithm 1).

        h <- beta2*h + (1-beta2)*s*u*(Hu)

    hu: Hessian-vector products with u; u is given, or regenerated as `rademacher_` wrote it for the same key.
    scale: 0-d tensor s (default 1). skip: 0-d tensor; nonzero leaves h as it is. h may turn negative; a bfloat16 h is
    rounded as in `gnb_ema_`, if `parameter` is given. Deterministic.
    """

    def probe(i, first, hu_b):
        return _rademacher(first + (offset[i] if offset else 0), hu_b, seed, refresh, parameter[i])

    _fold(h, hu, probe if u is None else u, scale, skip, beta2, seed, refresh, parameter, offset)


def _fold(h, x, y, scale, skip, beta2, seed, refresh, parameter, offset):
    """h <- beta2*h + (1-beta2)*scale*x*y; y: list of tensors, or made by y(i, first element, block of x[i])."""
    if blocks.is_set(skip):
        return
    gain = (1 - beta2) * (1 if scale is None else float(scale))
    for i, (h_i, x_i) in enumerate(zip(h, x, strict=True)):
        rounds = h_i.dtype == torch.bfloat16 and seed is not None and len(parameter) > 0
        made = callable(y)
        for first, (h_b, x_b, y_b) in blocks.walk(h_i, x_i, x_i if made else y[i], numbered=made or rounds):
            h_w, x_b = h_b.to(blocks.wide(h_b)), x_b.to(blocks.wide(h_b))
            y_b = y(i, first, x_b) if made else y_b
            h_w.mul_(beta2).addcmul_(x_b, y_b.to(h_w.dtype), value=gain)
            if rounds:
                key = {"seed": seed, "stream": CURVATURE_ROUNDING, "parameter": parameter[i], "time": refresh}
                h_w = stochastic_bfloat16(h_w, first + (offset[i] if offset else 0), key)
            if h_w is not h_b:
                h_b.copy_(h_w)


def rademacher_(u, *, seed, refresh, parameter, offset=()):
    """Fill a list of tensors with a probe of independent signs, +1 or -1 with probability 1/2 each.

    Element e of tensor i is +1 where bit offset[i] + e of the Philox stream keyed by (seed, refresh, parameter[i]) is
    set. offset: global index of each tensor's first element (default 0), so that shards of a parameter see its bits.
    """
    for i, u_i in enumerate(u):
        for first, (u_b,) in blocks.walk(u_i, numbered=True):
            u_b.copy_(_rademacher(first + (offset[i] if offset else 0), u_b, seed, refresh, parameter[i]))


def _rademacher(first, like, seed, refresh, parameter):
    key = {"seed": seed, "stream": PROBE, "parameter": parameter, "time": refresh}
    bits = random_bits(1, first, like.numel(), device=like.device, **key)
    return (2 * bits - 1).view(like.shape)
