"""Sophia optimizers and the curvature estimators that feed them."""

from growkit.optim.sophia import SophiaG, SophiaH

__all__ = ["SophiaG", "SophiaH"]
