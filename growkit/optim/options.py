"""What the options of a group may be: at construction, in a file, and whenever somebody has set them anew."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from itertools import chain
from operator import itemgetter
from typing import Any, Literal, get_args

import torch

from growkit import kernels
from growkit.kernels.lists import identities

Rounding = Literal["stochastic", "master", "nearest"]  # of a float32 result to a bfloat16 parameter
Phase = Literal["paper", "official"]  # refreshes at steps 1, 1+every, ...; at every, 2*every, ...
StateDtype = torch.dtype | Literal["8bit"]

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128)
_NUMBERS = ("lr", "rho", "weight_decay", "eps")
_FLAGS = ("maximize", "nesterov", "capturable", "differentiable")
_OTHERS = ("bs", "betas", "target_unclipped", "clip_grad_norm", "seed", "state_dtype", "bf16_update")
_TARGET = "None or a fraction between 0 and 1"
_values = itemgetter(*_NUMBERS, *_FLAGS, *_OTHERS)


def check_number(key: str, value: Any, expected: str = "a finite number >= 0") -> None:
    """A tensor is left unread, for it may be on a device."""
    if isinstance(value, torch.Tensor):
        if value.numel() != 1:
            raise ValueError(f"Tensor {key} must be 1-element, got shape {tuple(value.shape)}")
        return
    name = "learning rate" if key == "lr" else key  # torch's words
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"Invalid {name}: {value!r}, expected {expected}")
    if not 0 <= value < (1 if expected.endswith("< 1") else float("inf")) or expected.endswith("> 0") and value == 0:
        raise ValueError(f"Invalid {name}: {value}, expected {expected}")


def check_bs(bs: Any) -> None:
    check_number("bs", bs, "a finite number of labels > 0")


def check_callable(**options: Any) -> None:
    for name, value in options.items():
        if value is not None and not callable(value):
            raise TypeError(f"{name} is {type(value).__name__}, expected a callable")


def check_values(name: str, group: Mapping[str, Any]) -> None:
    """Raise, naming it, for an option that the optimizer called `name` cannot use."""
    for key in _FLAGS:
        if not isinstance(group[key], bool):
            raise TypeError(f"Invalid {key}: {group[key]!r}, expected True or False")
    if group["differentiable"]:
        raise RuntimeError(f"differentiable=True is not supported by {name} in this version")
    for key in _NUMBERS:
        check_number(key, group[key])
    check_bs(group["bs"])
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"Invalid betas: {betas}, expected two numbers")
    for i, beta in enumerate(betas):
        check_number(f"beta parameter at index {i}", beta, "0 <= beta < 1")
    target = group["target_unclipped"]
    if target is not None:
        check_number("target_unclipped", target, _TARGET)
        if not 0 < target < 1:
            raise ValueError(f"Invalid target_unclipped: {target}, expected {_TARGET}")
    if group["clip_grad_norm"] is not None:
        check_number("clip_grad_norm", group["clip_grad_norm"], "None or a finite number > 0")
    if not isinstance(group["seed"], int):
        raise TypeError(f"Invalid seed: {group['seed']!r}, expected an integer")
    if group["state_dtype"] not in (None, torch.float32, torch.bfloat16, "8bit"):
        raise ValueError(
            f"Invalid state_dtype: {group['state_dtype']}, expected None, torch.float32, torch.bfloat16 or '8bit'"
        )
    if group["bf16_update"] not in get_args(Rounding):
        raise ValueError(f"Invalid bf16_update: {group['bf16_update']!r}, expected 'stochastic', 'master' or 'nearest'")


def check_new(name: str, group: Mapping[str, Any], first: Mapping[str, Any]) -> None:
    """Raise for a new group: `check_values`, its parameters, what all groups share, what is asked of first values only.

    Later values of a tensor lr, and of a rho that moves towards target_unclipped, may be on a device.
    """
    check_values(name, group)
    if isinstance(group["lr"], torch.Tensor):
        check_number("lr", float(group["lr"]))
    target, limit = group["target_unclipped"], group["clip_grad_norm"]
    if target is not None and not group["rho"] > 0:
        raise ValueError(f"Invalid target_unclipped: {target} with rho={group['rho']}, expected {_TARGET} with rho > 0")
    if target != first["target_unclipped"]:
        raise ValueError(
            f"Invalid target_unclipped: {target}, expected {first['target_unclipped']} as in the first group: the "
            "fraction is that of all parameters together"
        )
    if limit != first["clip_grad_norm"]:
        raise ValueError(
            f"Invalid clip_grad_norm: {limit}, expected {first['clip_grad_norm']} as in the first group: the norm is "
            "that of all gradients together"
        )
    for i, p in enumerate(group["params"]):
        if group["fused"] and not (p.is_cuda and kernels.available):
            raise RuntimeError(
                f"fused=True needs triton and CUDA parameters, parameter {i} is on {p.device} "
                f"and triton is {'installed' if kernels.available else 'missing'}"
            )
        if p.requires_grad and p.dtype not in _FLOATS:  # quantized base weights beside what is trained
            raise TypeError(f"parameter {i} has dtype {p.dtype}, expected one of {', '.join(map(str, _FLOATS))}")


class Checked:
    """The groups' options as they were when they were last checked: a step asks what has changed since."""

    def __init__(self):
        self._seen, self._kept = None, []

    def check(self, name: str, groups: Sequence[Mapping[str, Any]]) -> None:
        values = list(chain.from_iterable(map(_values, groups)))
        # Identity, for a tensor's value is not asked; a list of betas may have been written to.
        if identities(values) != self._seen or any(type(group["betas"]) is not tuple for group in groups):
            self._seen = None
            for group in groups:
                check_values(name, group)
            self._seen, self._kept = identities(values), values
