"""Warnings that point at the user's line."""

import os
import pathlib
import sys
import warnings

import torch

_OURS = tuple(str(pathlib.Path(file).parent) + os.sep for file in (__file__, torch.__file__))


def warn(message: str) -> None:
    """A UserWarning at the nearest caller that is in neither growkit nor torch."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OURS):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
