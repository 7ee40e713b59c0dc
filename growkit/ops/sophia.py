"""Sophia's update, its refreshes and the probe: see `growkit.reference.sophia`."""

import torch

from growkit import reference
from growkit.ops.registry import check_alike, define, on_lists, with_kernel


def _sophia_step_fake(p, g, m, h, master=None, unclipped=None, *, denominator="add", **scalars):
    check_alike("sophia_step_", p, g=g, m=m, h=h, **({"master": master} if master else {}))
    torch._check_value(
        denominator in ("add", "max"), lambda: f"sophia_step_: denominator is {denominator!r}, expected 'add' or 'max'"
    )


_SOPHIA_STEP = (
    "(Tensor(a!)[] p, Tensor[] g, Tensor(b!)[] m, Tensor[] h, Tensor(c!)[]? master=None, Tensor(d!)? unclipped=None, *,"
    " {scalar} lr, float beta1, {scalar} rho_bs, float eps, float weight_decay, str denominator='add',"
    " bool maximize=False, bool nesterov=False, Tensor? scale=None, Tensor? skip=None, Tensor? step=None,"
    " int? seed=None, int[] parameter=[], int[] offset=[]) -> ()"
)
_sophia_step = with_kernel("sophia", reference.sophia_step_)
define("sophia_step_.tensor" + _SOPHIA_STEP.format(scalar="Tensor"), _sophia_step, _sophia_step_fake)
sophia_step_ = on_lists("sophia_step_" + _SOPHIA_STEP.format(scalar="float"), _sophia_step, _sophia_step_fake)

squared_norm = on_lists(
    "squared_norm(Tensor[] g) -> Tensor",
    with_kernel("sophia", reference.squared_norm),
    lambda g: torch.empty((), dtype=torch.float64, device=g[0].device if g else None),
)
gnb_ema_ = on_lists(
    "gnb_ema_(Tensor(a!)[] h, Tensor[] g, Tensor? scale=None, Tensor? skip=None, *, float beta2, int? seed=None,"
    " int refresh=0, int[] parameter=[], int[] offset=[]) -> ()",
    with_kernel("sophia", reference.gnb_ema_),
    lambda h, g, scale=None, skip=None, **options: check_alike("gnb_ema_", h, g=g),
)


def _hutchinson_ema_fake(h, hu, u=None, scale=None, skip=None, *, parameter=(), **key):
    check_alike("hutchinson_ema_", h, hu=hu, **({} if u is None else {"u": u}))
    torch._check_value(
        u is not None or len(parameter) == len(h),
        lambda: f"hutchinson_ema_: without u, parameter needs {len(h)} indices, got {len(parameter)}",
    )


hutchinson_ema_ = on_lists(
    "hutchinson_ema_(Tensor(a!)[] h, Tensor[] hu, Tensor[]? u=None, Tensor? scale=None, Tensor? skip=None, *,"
    " float beta2, int seed=0, int refresh=0, int[] parameter=[], int[] offset=[]) -> ()",
    with_kernel("sophia", reference.hutchinson_ema_),
    _hutchinson_ema_fake,
)


def _rademacher_fake(u, *, seed, refresh, parameter, offset=()):
    torch._check_value(
        len(parameter) == len(u),
        lambda: f"rademacher_: parameter has {len(parameter)} indices, expected {len(u)}",
    )


rademacher_ = on_lists(
    "rademacher_(Tensor(a!)[] u, *, int seed, int refresh, int[] parameter, int[] offset=[]) -> ()",
    with_kernel("probe", reference.rademacher_),
    _rademacher_fake,
)
