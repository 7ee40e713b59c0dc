"""Warnings that point at the user's line."""

import sys
import warnings
from collections.abc import Iterator
from types import FrameType

# Whose calls are not the user's: growkit, torch, and the frameworks that call step() themselves.
_LIBRARIES = {"growkit", "torch", "contextlib", "transformers", "accelerate", "trl"}
_LIBRARIES |= {"lightning", "lightning_fabric", "pytorch_lightning", "litgpt", "torchtitan"}


def _callers() -> Iterator[FrameType]:
    """The frames outside of this file, the nearest first."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename != __file__:
            yield frame
        frame = frame.f_back


def _module(frame: FrameType) -> str:
    return frame.f_globals.get("__name__", "")


def called_by(module: str) -> bool:
    """Whether a function of the module of that name is calling, through whatever others."""
    return any(_module(frame) == module for frame in _callers())


def warn(message: str) -> None:
    """A UserWarning at the nearest caller that is in no library named here."""
    levels = enumerate(map(_module, _callers()), start=2)
    level = 2
    for level, module in levels:  # noqa: B007  the last one, if every caller is in a library
        if module.partition(".")[0] not in _LIBRARIES:
            break
    warnings.warn(message, stacklevel=level)
