"""Triton kernels; in `cpu`, compiled ones. Each has the name and the signature of its oracle in `growkit.reference`.

Importing this package imports no kernel, so that growkit works where triton is missing.
"""

import importlib.util

available = importlib.util.find_spec("triton") is not None
