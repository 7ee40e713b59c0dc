"""Sophia optimizers, the curvature estimators that feed them, groups of parameters and settings for them."""

from growkit.optim.groups import Preset, param_groups, presets
from growkit.optim.sophia import SophiaG, SophiaH

__all__ = ["Preset", "SophiaG", "SophiaH", "param_groups", "presets"]
