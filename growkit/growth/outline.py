"""What a growth will be, from configs alone: before any weight is read, and without memory for one."""

from typing import Any, NamedTuple

import torch
from torch import nn

from growkit.growth.check import TOLERANCE
from growkit.growth.families import FAMILIES
from growkit.growth.families.table import Family
from growkit.growth.obstacles import obstacles, refuse, refuse_layers
from growkit.growth.source import is_tied, layer_counts, meta
from growkit.growth.starts import Growth, Start, source_layers
from growkit.growth.target import grown_config


class Outline(NamedTuple):
    """config: of the grown model. source: small layer that every large one resembles. skeletons: the small and the
    large model on the meta device."""

    growth: Growth
    config: Any
    source: list[int]
    skeletons: tuple[nn.Module, nn.Module]

    def reason(self, dtype: torch.dtype) -> str:
        """Why it cannot be lossless in this dtype; empty where it can. ValueError where the start is to be lossless."""
        found = "; ".join(obstacles(self.growth, TOLERANCE[torch.promote_types(dtype, torch.float32)]))
        if found and self.growth.start.lossless:
            raise ValueError(f'big_config.{found}; start="closest" comes near')
        return found


def family_of(config: Any, given: Family | None, what: Any) -> Family:
    """The table for a config, unless one is given; ValueError, which names the class of `what`, where there is none."""
    model_type = getattr(config, "model_type", None)
    family = given or FAMILIES.get(model_type)
    if family is None:
        raise ValueError(
            f"small_model: got {type(what).__name__} of model_type {model_type!r}, expected a Hugging Face "
            f"model of {', '.join(FAMILIES)}, or family= with a table of your own"
        )
    for name, value in family.expects.items():
        if getattr(config, name, value) != value:
            got = getattr(config, name)
            raise ValueError(f"small_model: config.{name} is {got!r}, the family's table is for {value!r}")
    return family


def outline(family: Family, model_class: type, config: Any, wanted: Any, start: Start, noise: float = 0.0) -> Outline:
    """ValueError for a size that shrinks, a field that differs, a start that cannot reach it."""
    layers = layer_counts(family, config, wanted)
    refuse_layers(family, *layers, start)
    source = source_layers(start.depth, *layers)
    small, big, grown = grown_config(family, config, wanted, source)
    refuse(family, small, big, config)
    grown.architectures = [model_class.__name__]
    skeletons = meta(model_class, config), meta(model_class, grown)
    growth = Growth(family, small, big, start, config, is_tied(family, skeletons[0]), noise)
    return Outline(growth, grown, source, skeletons)
