"""growkit: the Sophia optimizer and LiGO model growth for PyTorch."""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0.dev0"  # the only place; setup.py reads it from here
__all__ = ["LiGO", "SophiaG", "SophiaH", "param_groups", "presets"]

if TYPE_CHECKING:
    from growkit.growth import LiGO
    from growkit.optim import SophiaG, SophiaH, param_groups, presets
else:

    def __getattr__(name):
        """Public names are imported when first used: `growkit --help` need not wait for torch."""
        if name in __all__:
            for package in ("growkit.optim", "growkit.growth"):
                module = importlib.import_module(package)
                if name in module.__all__:
                    return globals().setdefault(name, getattr(module, name))
        if name == "integrations":
            return importlib.import_module("growkit.integrations")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), *__all__})
