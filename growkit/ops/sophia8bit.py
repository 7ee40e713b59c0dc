"""Sophia's update and refreshes on 8-bit state: see `growkit.reference.sophia8bit`."""

import torch

from growkit import reference
from growkit.ops.registry import check_alike, define, on_lists, with_kernel


def check_coded(op, like, dtypes, **lists):
    """Raise unless codes and scales fit the tensors of `like`, as `reference.quantise_` writes them.

    lists: {name: (codes, scales)}; dtypes: {name: dtypes that the codes may have}.
    """
    for name, (codes, scales) in lists.items():
        check_alike(op, like, **{name: codes})
        if len(scales) != len(like):
            raise ValueError(f"{op}: {name}_scale has {len(scales)} tensors, expected {len(like)}")
        for i, (c, s) in enumerate(zip(codes, scales, strict=True)):
            if c.dtype not in dtypes[name] or not c.is_contiguous():
                raise TypeError(
                    f"{op}: {name}[{i}] is {c.dtype} with strides {c.stride()}, expected contiguous "
                    + " or ".join(map(str, dtypes[name]))
                )
            expected = (-(-c.numel() // reference.CODES_PER_SCALE), 2)
            if s.shape != expected or s.dtype != torch.float32 or s.device != c.device or not s.is_contiguous():
                raise ValueError(
                    f"{op}: {name}_scale[{i}] is {s.dtype} {tuple(s.shape)} on {s.device}, "
                    f"expected contiguous {torch.float32} {expected} on {c.device}"
                )


def _check_parameter(op, like, parameter):
    torch._check_value(
        len(parameter) == len(like), lambda: f"{op}: parameter has {len(parameter)} indices, expected {len(like)}"
    )


_CODES = {"m": (torch.int8,), "h": (torch.uint8, torch.int8)}


def _sophia_step_8bit_fake(
    p, g, m, h, m_scale, h_scale, master=None, unclipped=None, *, denominator="add", parameter, **others
):
    check_alike("sophia_step_8bit_", p, g=g, **({"master": master} if master else {}))
    check_coded("sophia_step_8bit_", p, _CODES, m=(m, m_scale), h=(h, h_scale))
    _check_parameter("sophia_step_8bit_", p, parameter)
    torch._check_value(
        denominator in ("add", "max"),
        lambda: f"sophia_step_8bit_: denominator is {denominator!r}, expected 'add' or 'max'",
    )


_SOPHIA_STEP_8BIT = (
    "(Tensor(a!)[] p, Tensor[] g, Tensor(b!)[] m, Tensor[] h, Tensor(c!)[] m_scale, Tensor[] h_scale,"
    " Tensor(d!)[]? master=None, Tensor(e!)? unclipped=None, *, {scalar} lr, float beta1, {scalar} rho_bs, float eps,"
    " float weight_decay, str denominator='add', bool maximize=False, bool nesterov=False, Tensor? scale=None,"
    " Tensor? skip=None, Tensor step, int seed, int[] parameter, int[] offset=[], bool stochastic=False) -> ()"
)
_sophia_step_8bit = with_kernel("sophia8bit", reference.sophia_step_8bit_)
define(
    "sophia_step_8bit_.tensor" + _SOPHIA_STEP_8BIT.format(scalar="Tensor"), _sophia_step_8bit, _sophia_step_8bit_fake
)
sophia_step_8bit_ = on_lists(
    "sophia_step_8bit_" + _SOPHIA_STEP_8BIT.format(scalar="float"), _sophia_step_8bit, _sophia_step_8bit_fake
)


def _gnb_8bit_fake(h, h_scale, g, scale=None, skip=None, *, parameter, **options):
    check_alike("gnb_ema_8bit_", h, g=g)
    check_coded("gnb_ema_8bit_", g, _CODES, h=(h, h_scale))
    _check_parameter("gnb_ema_8bit_", h, parameter)


gnb_ema_8bit_ = on_lists(
    "gnb_ema_8bit_(Tensor(a!)[] h, Tensor(b!)[] h_scale, Tensor[] g, Tensor? scale=None, Tensor? skip=None, *,"
    " float beta2, int seed, int refresh, int[] parameter, int[] offset=[]) -> ()",
    with_kernel("sophia8bit", reference.gnb_ema_8bit_),
    _gnb_8bit_fake,
)


def _hutchinson_8bit_fake(h, h_scale, hu, u=None, scale=None, skip=None, *, parameter, **options):
    check_alike("hutchinson_ema_8bit_", h, hu=hu, **({} if u is None else {"u": u}))
    check_coded("hutchinson_ema_8bit_", hu, {"h": (torch.int8,)}, h=(h, h_scale))
    _check_parameter("hutchinson_ema_8bit_", h, parameter)


hutchinson_ema_8bit_ = on_lists(
    "hutchinson_ema_8bit_(Tensor(a!)[] h, Tensor(b!)[] h_scale, Tensor[] hu, Tensor[]? u=None, Tensor? scale=None,"
    " Tensor? skip=None, *, float beta2, int seed, int refresh, int[] parameter, int[] offset=[]) -> ()",
    with_kernel("sophia8bit", reference.hutchinson_ema_8bit_),
    _hutchinson_8bit_fake,
)
