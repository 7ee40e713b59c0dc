"""growkit: the Sophia optimizer and LiGO model growth for PyTorch."""

from growkit.growth import LiGO
from growkit.optim import SophiaG, SophiaH, param_groups, presets

__version__ = "0.1.0.dev0"  # the only place; setup.py reads it from here
__all__ = ["LiGO", "SophiaG", "SophiaH", "param_groups", "presets"]
