"""Sophia optimizers, the curvature estimators that feed them, groups of parameters and settings for them."""

from growkit.optim.groups import Preset, param_groups, presets
from growkit.optim.likelihood import gaussian
from growkit.optim.sophia import SophiaG, SophiaH

__all__ = ["Preset", "SophiaG", "SophiaH", "gaussian", "param_groups", "presets"]
