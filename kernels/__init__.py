"""Triton kernels; in `cpu`, compiled ones. Each has the name and the signature of its oracle in `growkit.reference`.

Importing this package imports no kernel, so that growkit works where triton is missing.
"""

import importlib.util

available = importlib.util.find_spec("triton") is not None


class TensorList(list):
    """A list of tensors that its owner never changes, on which a kernel notes what it found the tensors to be."""

    known = None
