"""Sophia's update and Gauss-Newton-Bartlett refresh of CPU tensors, by the compiled code of `growkit._C`.

Each function has the name, the signature and the bits of its oracle in `growkit.reference`, whose equations it shares:
one pass over memory for the whole list, on torch's threads, whose number changes nothing. Tensors that the compiled
code does not take go to the oracle: those of other dtypes than float32 and bfloat16, of subclasses, and those of a
position whose memory is not laid out alike without gaps.
"""

from collections import defaultdict

import torch

from growkit import reference
from growkit.reference import blocks

try:
    from growkit import _C
except ImportError:
    _C = None
else:
    # Rounding once or twice in a*b + c is a matter of the instruction set, so it must be the one of torch's kernels.
    _C.use_instructions(torch.backends.cpu.get_cpu_capability())

_DTYPES = (torch.float32, torch.bfloat16)
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_64_BITS = (1 << 64) - 1


def implementation(name):
    """The function of this module that serves an op, or None where that is left to the reference."""
    return globals().get(name) if _C is not None and name in ("sophia_step_", "gnb_ema_") else None


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
    """`growkit.reference.sophia_step_` for CPU tensors."""
    if blocks.is_set(skip):
        return
    lr, rho_bs, random = float(lr), float(rho_bs), not master and seed is not None
    taken, left = _sort([p, g, m, h, *([master] if master else [])], random)
    for dtypes, positions in taken.items():
        narrow = dtypes[0] == torch.bfloat16
        rounds, wide = random and narrow, master if narrow else None
        if wide and dtypes[4] != torch.float32:
            left += positions
            continue
        rows = [
            (*(x[i].data_ptr() for x in (p, g, m, h)), wide[i].data_ptr() if wide else 0, p[i].numel())
            + _key(i, rounds, parameter, offset)
            for i in positions
        ]
        count = _C.sophia_step(
            rows,
            [dtype == torch.bfloat16 for dtype in dtypes[:4]],
            lr=lr,
            decay=1 - lr * weight_decay,
            beta1=beta1,
            gain=beta1 - 1 if maximize else 1 - beta1,
            rho_bs=rho_bs,
            eps=eps,
            scale=1 if scale is None else float(scale),
            max=denominator == "max",
            nesterov=nesterov,
            random=rounds,
            seed=seed & _64_BITS if rounds else 0,
            stream=reference.ROUNDING,
            time=int(step) if rounds else 0,
        )
        if unclipped is not None:
            unclipped += count
        written = [x[i] for x in (p, m, *([wide] if wide else [])) for i in positions]
        torch.autograd.graph.increment_version(written)
    if left:
        lists = [_pick(x, left) for x in (p, g, m, h, master)]
        keys = {"step": step, "seed": seed, "parameter": _pick(parameter, left), "offset": _pick(offset, left)}
        scalars = {"lr": lr, "beta1": beta1, "rho_bs": rho_bs, "eps": eps, "weight_decay": weight_decay}
        options = {"denominator": denominator, "maximize": maximize, "nesterov": nesterov, "scale": scale}
        reference.sophia_step_(*lists, unclipped, **scalars, **options, **keys)


def gnb_ema_(h, g, scale=None, skip=None, *, beta2, seed=None, refresh=0, parameter=(), offset=()):
    """`growkit.reference.gnb_ema_` for CPU tensors."""
    if blocks.is_set(skip):
        return
    random = seed is not None and len(parameter) > 0
    taken, left = _sort([h, g], random)
    for dtypes, positions in taken.items():
        rounds = random and dtypes[0] == torch.bfloat16
        _C.gnb_ema(
            [(h[i].data_ptr(), g[i].data_ptr(), h[i].numel(), *_key(i, rounds, parameter, offset)) for i in positions],
            [dtype == torch.bfloat16 for dtype in dtypes],
            beta2=beta2,
            gain=(1 - beta2) * (1 if scale is None else float(scale)),
            random=rounds,
            seed=seed & _64_BITS if rounds else 0,
            stream=reference.CURVATURE_ROUNDING,
            time=refresh if rounds else 0,
        )
        torch.autograd.graph.increment_version([h[i] for i in positions])
    if left:
        keys = {"seed": seed, "refresh": refresh, "parameter": _pick(parameter, left), "offset": _pick(offset, left)}
        reference.gnb_ema_(_pick(h, left), _pick(g, left), scale, beta2=beta2, **keys)


def _sort(lists, random):
    """{dtypes: positions that one call takes}, and the positions that are left to the oracle.

    random: a bfloat16 tensor of the first list is rounded by bits that belong to the row-major index of an element.
    """
    taken, left = defaultdict(list), []
    for i, tensors in enumerate(zip(*lists, strict=True)):
        first = tensors[0]
        fits = all(
            type(t) in _PLAIN and t.is_cpu and t.dtype in _DTYPES and t.shape == first.shape and not t.is_neg()
            for t in tensors
        )
        views = blocks.in_memory_order(*tensors) if fits else None
        if views is None or random and first.dtype == torch.bfloat16 and views[0] is not first:
            left.append(i)
        else:
            taken[tuple(t.dtype for t in tensors)].append(i)
    return taken, left


def _key(i, rounds, parameter, offset):
    """What the random bits of tensor i are keyed by: the index of its parameter, and of its first element therein."""
    return (parameter[i], offset[i] if offset else 0) if rounds else (0, 0)


def _pick(x, positions):
    return [x[i] for i in positions] if x else x
