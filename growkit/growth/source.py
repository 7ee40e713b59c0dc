"""What growth reads of a small model: its class, the rows of its family's table with checked shapes, its buffers."""

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from growkit.growth.families.table import match
from growkit.growth.layout import pieces, shape_of
from growkit.optim.distributed import is_sharded


class Row(NamedTuple):
    """One line of the family's table in one growth: parameters of one module type, small and large.

    pattern: with "*" for the layer, without the backbone's prefix. entries: of the table, one per dimension.
    keys: of `LiGO.depth`, one per joined piece; the layers of both sides are in order.
    offset: what the model adds to the stored value.
    """

    pattern: str
    entries: tuple
    small_names: list[str]
    names: list[str]
    small_shape: list[int]
    shape: list[int]
    keys: list[str]
    offset: float

    @property
    def layered(self) -> bool:
        return "*" in self.pattern


def unwrapped(model):
    """The model inside torch.compile's and DDP's wrappers; ValueError for what has no plain weights."""
    while isinstance(model, nn.Module):
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            break
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"small_model: got {type(model).__name__} with PEFT adapters, expected merge_and_unload() of it"
        )
    if isinstance(model, nn.Module):
        for name, p in model.named_parameters():
            if not p.is_floating_point() or not (type(p) in (nn.Parameter, torch.Tensor) or is_sharded(p)):
                raise ValueError(
                    f"small_model: {name} is {type(p).__name__} of {p.dtype}, expected plain floating point, whole or "
                    f"a DTensor: a quantized model has to be dequantized first"
                )
            if p.is_meta:
                raise ValueError(f"small_model: {name} is on the meta device, expected weights")
    return model


def class_of(config: Any) -> type:
    """The class of transformers that config.architectures names first."""
    import transformers

    name = next(iter(getattr(config, "architectures", None) or []), None)
    found = getattr(transformers, str(name), None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise ValueError(f"config.architectures: names {name!r}, expected a model class of transformers")
    return found


def layer_counts(family, config, wanted):
    """Layers of the small and of the large model."""
    large = family.layers.of(config)
    if isinstance(wanted, Mapping):
        return large, wanted.get(family.layers.field, large)
    return large, getattr(wanted, family.layers.field, large)


def meta(model_class, config):
    """The model with shapes and ties, without data."""
    with torch.random.fork_rng([]), torch.device("meta"):
        return model_class(copy.deepcopy(config))


def check_names(weights, expected):
    for name in sorted(weights.keys() | expected.keys()):
        got, wanted = (list(group[name].shape) if name in group else None for group in (weights, expected))
        if got != wanted:
            raise ValueError(f"small_model: {name} is {got}, expected {wanted} by the model's own config")


def is_tied(family, skeleton):
    """Whether the output layer is another name of a parameter."""
    every = {name for name, _ in skeleton.named_parameters(remove_duplicate=False)}
    shared = every - {name for name, _ in skeleton.named_parameters()}
    rows, _ = match(family, sorted(shared), getattr(skeleton, "base_model_prefix", ""))
    return any("head_read" in entries for entries, _ in rows.values())


def table_rows(family, skeletons, small, big, model_class):
    """The table's rows that this model has, checked against the shapes of both models."""
    shapes = [{name: list(p.shape) for name, p in skeleton.named_parameters()} for skeleton in skeletons]
    prefix = getattr(model_class, "base_model_prefix", "")
    (rows, unknown), (grown, _) = (match(family, names, prefix) for names in shapes)
    if unknown:
        raise ValueError(
            f"small_model: {model_class.__name__} has parameters that the family's table does not know: "
            + ", ".join(unknown)
        )
    found = []
    for pattern, (entries, names) in rows.items():
        for sizes, shape, layers in ((small, shapes[0], names), (big, shapes[1], grown[pattern][1])):
            if "*" in pattern and sorted(layers) != list(range(sizes["layers"])):
                raise ValueError(
                    f"small_model: {pattern} is in layers {sorted(layers)} of {sizes['layers']}, expected in all"
                )
            for name in layers.values():
                if len(entries) != len(shape[name]) or shape_of(entries, sizes, shape[name]) != shape[name]:
                    says = shape_of(entries, sizes, shape[name]) if len(entries) == len(shape[name]) else entries
                    raise ValueError(f"family: {name} is {shape[name]}, the table says {says}")
        local = pattern.rpartition("*.")[2]
        keys = [f"{local}.{piece.name}".rstrip(".").replace(".", "_") for piece in pieces(entries)]
        small_names, big_names = ([layers[t] for t in sorted(layers)] for layers in (names, grown[pattern][1]))
        offset = family.residual.gain_offset if any(str(entry).endswith("_gain") for entry in entries) else 0.0
        found.append(
            Row(
                pattern,
                entries,
                small_names,
                big_names,
                shapes[0][small_names[0]],
                shapes[1][big_names[0]],
                keys,
                offset,
            )
        )
    return found


def read_row(row: Row, weights: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """The small weights of one row, as they are stored: a stack [L1, *small_shape], checked."""
    found = []
    for name in row.small_names:
        if name not in weights:
            raise ValueError(f"weights: has no {name}")
        tensor = weights[name].detach()
        if list(tensor.shape) != row.small_shape or tensor.dtype != dtype:
            raise ValueError(
                f"small_model: {name} is {tensor.dtype} {list(tensor.shape)}, expected {dtype} "
                f"{row.small_shape} as the others and the config"
            )
        if not tensor.isfinite().all():
            raise ValueError(f"small_model: {name} has {int((~tensor.isfinite()).sum())} elements NaN or infinite")
        found.append(tensor)
    return torch.stack(found)


def buffers(model, weights, skeletons, source):
    """Saved buffers by name: the small model's, and those of them that the large one takes over."""
    saved = [saved_buffers(skeleton) for skeleton in skeletons]
    found = saved_buffers(model) if model is not None else {name: weights[name] for name in saved[0] if name in weights}
    small = {name: value.clone() for name, value in found.items()}
    grown = grown_buffers(small, source)
    kept = {name: v for name, v in grown.items() if name in saved[1] and v.shape == saved[1][name].shape}
    lost = sorted(saved[1].keys() - kept.keys())
    if model is None and lost:  # with a model in memory, its constructor makes them
        raise ValueError(
            f"small_model: {type(skeletons[0]).__name__} saves buffers that are absent, or of another shape in the "
            f"large model, and cannot be grown from weights alone: {', '.join(lost)}"
        )
    return small, kept


def saved_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers by name, of those that are saved: the others follow from the config."""
    saved = model.state_dict().keys()
    return {name: value.detach() for name, value in model.named_buffers() if name in saved}


def grown_buffers(buffers, source):
    """name -> value in the large model of the small one's buffers: a layer has those of the layer it resembles."""
    grown = {}
    for name, value in buffers.items():
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if at is None:
            grown[name] = value
            continue
        for layer, small in enumerate(source):
            if small == int(parts[at]):
                grown[".".join([*parts[:at], str(layer), *parts[at + 1 :]])] = value
    return grown
