"""An optimizer for the grown model that goes on where the small one's stood."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping

import torch
from torch import nn

from growkit import reference
from growkit.growth.duals import duals
from growkit.growth.layout import assemble, matrices, pieces
from growkit.growth.source import unwrapped
from growkit.optim import SophiaG, SophiaH
from growkit.optim.distributed import is_sharded, shard_of
from growkit.optim.state import held

_CLASSES = (torch.optim.Adam, torch.optim.AdamW, SophiaG, SophiaH)
_MEANS = ("exp_avg",)
_SQUARES = ("exp_avg_sq", "max_exp_avg_sq", "hessian")


@torch.no_grad()
def grow_optimizer(operator, optimizer: torch.optim.Optimizer, big_model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer of the same class for the grown model, with the state that the small model's past tells of.

        m_big = S m R^T,   v_big = (S*S) v (R*R)^T,   h as v

    S and R are the duals of the maps of a weight's rows and columns: what dy and x of the large model are of the small
    one's (`growkit.growth.duals`); S*S is elementwise. By what the small moments tell of an element of a large weight:
        all      in layers that do what a small layer does, where maps copy and scale: exact, m, v and h
                 (Hutchinson's h, the curvature of more than the outputs, where they copy, or scale a linear path)
        nearly   of weights that write to a norm whose input is widened by copies or by the mean: what comes back
                 through the norm also holds its own two projections, which no small moment tells
        nothing  in layers that add nothing yet, and in new coordinates: m is 0. v and h are those of the layer that a
                 new one resembles, and the mean over old coordinates: with 0 there, and a count of steps that says that
                 it is settled, the first gradients would make the longest steps. Some of these elements have no
                 gradient yet; others have one, as a new layer's output weights
    A tied embedding has one dual: where both of its uses tell, they say the same.

    optimizer: torch.optim.Adam or AdamW, SophiaG or SophiaH, of parameters of the model that this operator was made of,
        all or some: found by identity, or by name if it was made of `named_parameters()`. It is not changed.
    big_model: `grow()`'s, or one of the same class and config.
    Groups keep their options and counts (`steps`, `refreshes`, `every`), each for the large parameters of its small
    ones. bf16 and 8-bit state is converted as `load_state_dict` does it; master copies are made anew of the large
    parameters. What belongs to a process is not carried over: attach the new optimizer, and make new LR schedulers.
    Of sharded state each tensor is gathered in turn, and each rank keeps its shard of the grown one.
    TypeError for another class, ValueError where parameters are not the small or the large model's or 8-bit state is
    sharded; nothing has been made then.
    """
    check_optimizer(optimizer)
    names = _small_names(operator, optimizer)
    parameters = _large_parameters(operator, big_model)
    sources = {
        name: (row, t, row.small_names[operator._source[t] if row.layered else 0])
        for row in operator.rows
        for t, name in enumerate(row.names)
    }
    groups, numbered = [], []
    for group in optimizer.param_groups:
        own = {names[p] for p in group["params"]}
        large = [name for name in parameters if sources[name][2] in own]
        options = {key: copy.deepcopy(value) for key, value in group.items() if key not in ("params", "param_names")}
        members = [(name, parameters[name]) if "param_names" in group else parameters[name] for name in large]
        groups.append({**options, "params": members})
        numbered += large
    known = inspect.signature(type(optimizer)).parameters
    grown = type(optimizer)(groups, **{key: value for key, value in optimizer.defaults.items() if key in known})

    of_name = {name: optimizer.state.get(p) for p, name in names.items()}
    state = {}
    for layer in range(operator._small["layers"]):
        found = duals(operator, layer)  # of one layer at a time: dense matrices
        for number, name in enumerate(numbered):
            row, t, small = sources[name]
            past = of_name[small]
            if past and layer == (operator._source[t] if row.layered else 0):
                whole = _grown(operator, row, t, found, _floats(past))
                state[number] = {key: shard_of(x, parameters[name]) if x.ndim else x for key, x in whole.items()}
    grown.load_state_dict({"state": state, "param_groups": grown.state_dict()["param_groups"]})
    return grown


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    if type(optimizer) not in _CLASSES:
        expected = ", ".join(kind.__name__ for kind in _CLASSES)
        raise TypeError(f"optimizer: got {type(optimizer).__name__}, expected one of {expected}")


def _small_names(operator, optimizer):
    """Parameter of the optimizer -> its name in the small model."""
    if not operator._parameters_of_small:
        raise ValueError(
            "optimizer: this operator was made of a config and weights, expected one made of the model that is trained"
        )
    shapes = {name: row.small_shape for row in operator.rows for name in row.small_names}
    by_identity = {ref(): name for name, ref in operator._parameters_of_small.items() if ref() is not None}
    names = {}
    for i, group in enumerate(optimizer.param_groups):
        given = group.get("param_names", [None] * len(group["params"]))
        for j, (p, called) in enumerate(zip(group["params"], given, strict=True)):
            name = by_identity.get(p)
            if name is None and called is not None:
                name = called.removeprefix("_orig_mod.").removeprefix("module.").removeprefix("_orig_mod.")
            if name not in shapes or list(p.shape) != shapes[name]:
                what = f"{list(p.shape)}" if called is None else f"{called} {list(p.shape)}"
                raise ValueError(
                    f"optimizer: parameter {j} of group {i}, {what}, is none of the small model that this operator was "
                    "made of, expected that model's own parameters, or named_parameters() of one alike"
                )
            names[p] = name
            for key, value in optimizer.state.get(p, {}).items():
                if key.endswith("_scale") and is_sharded(value):
                    raise ValueError(f"optimizer: {key} of {name}, 8-bit state, is sharded, expected it whole")
    if len(set(names.values())) < len(names):
        raise ValueError("optimizer: has parameters of two models by the same names, expected one model's")
    return names


def _large_parameters(operator, big_model):
    parameters = dict(unwrapped(big_model).named_parameters())
    shapes = {name: row.shape for row in operator.rows for name in row.names}
    for name in sorted(shapes.keys() | parameters.keys()):
        got = list(parameters[name].shape) if name in parameters else None
        if got != shapes.get(name):
            raise ValueError(f"big_model: {name} is {got}, expected {shapes.get(name)} as grow() makes it")
    return parameters


def _floats(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of a small parameter's state what is grown, 8-bit codes read."""
    own = held({key: x.full_tensor() if is_sharded(x) else x for key, x in state.items()})
    floats = {"step": state["step"]}
    for key in (*_MEANS, *_SQUARES):
        if key in own:
            scale = own.get(key + "_scale")
            floats[key] = own[key] if scale is None else reference.dequantise(own[key], scale).view(own[key].shape)
    return floats


def acts(operator, row, t: int) -> bool:
    """Whether this large layer's parameters do what those of the small layer do, and do not add nothing yet."""
    source = operator._source
    if not row.layered or operator._growth.start.depth != "skip":
        return True
    ends = operator._growth.family.residual.post_norm
    if ends and row.pattern.rpartition("*.")[2].rpartition(".")[0] == ends:  # the last copy holds that norm
        return t == len(source) - 1 or source[t + 1] != source[t]
    return t == 0 or source[t - 1] != source[t]


def _grown(operator, row, t, found, state):
    grown = {"step": state["step"].clone()}
    for key, small in state.items():
        if key == "step":
            continue
        squares = key in _SQUARES
        wide = small.to(torch.promote_types(small.dtype, torch.float32))
        parts = []
        if not squares and not acts(operator, row, t):
            grown[key] = wide.new_zeros(row.shape)
            continue
        for name, piece, W in zip(
            row.keys, pieces(row.entries), matrices(wide[None], row.entries, operator._small), strict=True
        ):
            for side, dim in ((piece.B, -2), (piece.A, -1)):
                if side in found:
                    W = found[side].of(W, dim, squares)
            factor = _depth(operator, row, name, t)
            parts.append(W * (factor**2 if squares else factor))
        grown[key] = assemble(parts, row.entries, operator._big, row.shape)[0]
    return grown


def _depth(operator, row, key, t):
    """dL/dW of one small layer is w times that of a large one that holds w W alone."""
    if not row.layered or not acts(operator, row, t):
        return 1.0
    w = operator.depth[key][..., t, :].flatten()
    return 1 / float(w[operator._source[t]]) if int((w != 0).sum()) == 1 and w[operator._source[t]] else 1.0
