"""Executes on a CPU, with numpy, the PTX that Triton's compiler or nvcc makes of a kernel, on memory of CPU tensors.

Triton's interpreter executes the Python source; this executes what the compiler made of it: vector accesses and the
alignment they were promised, masks as predicates, layout conversions through shared memory, barriers, shuffles, integer
widths, and the rounding of each instruction: fma rounds once, conversions round as they say, .ftz flushes, NaN results
have the one pattern that the hardware writes.

What it cannot see: what ptxas makes of the PTX (it may contract a `mul` and an `add` without `.rn` where a kernel
allows fusion); the bits of approximate instructions, whose error is made up within the manual's bound; time, caches,
bank conflicts; memory order beyond barriers; a race within one warp between different instructions.
"""

from .counts import Counts
from .errors import EmulationError, Unsupported
from .launch import Compiled, compile, run, specialise
from .memory import Memory

__all__ = ["Compiled", "Counts", "EmulationError", "Memory", "Unsupported", "compile", "run", "specialise"]
