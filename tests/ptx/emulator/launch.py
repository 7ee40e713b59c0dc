"""Kernels, Triton's compiled for a GPU that need not be there, executed on memory of this process."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from .batch import Batch
from .counts import Counts
from .errors import EmulationError
from .memory import Memory
from .parse import Parameter
from .program import program
from .values import UNSIGNED, dtype_of

TOGETHER = 64  # programs that are executed in step: a bound on memory


class Compiled(NamedTuple):
    name: str
    ptx: str
    shared: int  # bytes
    entry: str | None = None  # the kernel's name in a PTX module of several
    threads: int | None = None  # per program, where the PTX does not say


class Specialised(NamedTuple):
    """What a launch makes Triton compile. options: of the compiler, num_warps among them."""

    kernel: Any
    signature: dict  # name of an argument -> Triton's name of its type
    constants: dict
    attributes: dict
    options: dict
    values: list  # of the arguments that the compiled kernel takes


_compiled: dict[str, Compiled] = {}


def specialise(kernel, args: Sequence, kwargs: dict, arch: int) -> Specialised:
    """A call kernel[grid](*args, **kwargs) specialised as Triton's launcher would: divisibility by 16, ones, None."""
    backend = make_backend(GPUTarget("cuda", arch, 32))
    bound, found, options = create_function_from_signature(kernel.signature, kernel.params, backend)(*args, **kwargs)
    options, signature, constants, attributes = kernel._pack_args(backend, kwargs, bound, found, options)
    values = [bound[name] for name in kernel.arg_names if signature[name] != "constexpr"]
    named = {kernel.arg_names[path[0]]: value for path, value in constants.items()}
    return Specialised(kernel, signature, named, attributes, options.__dict__, values)


def compile(call: Specialised, arch: int) -> Compiled:
    """Triton's compiler for sm_`arch`; needs no GPU."""
    kernel = call.kernel
    key = str((kernel.fn.__module__, kernel.__name__, arch, call.signature, call.constants, call.attributes))
    key += str(sorted(call.options.items(), key=lambda item: item[0]))
    if key not in _compiled:
        source = ASTSource(kernel, call.signature, call.constants, call.attributes)
        result = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=call.options)
        _compiled[key] = Compiled(kernel.__name__, result.asm["ptx"], result.metadata.shared)
    return _compiled[key]


def run(compiled: Compiled, grid: Sequence[int], values: Sequence, memory: Memory, noise: int | None = None) -> Counts:
    """Execute a compiled kernel on registered memory.

    values: numbers, tensors or addresses, bytes of structures: the arguments that the PTX takes, in their order. noise:
    a number by which the results of approximate instructions are moved within their allowed error; None: they are
    correctly rounded.
    """
    code = program(compiled.ptx, compiled.entry, compiled.threads)
    values = [a.data_ptr() if hasattr(a, "data_ptr") else a for a in values]
    spare = len(code.parameters) - len(values)  # Triton's scratch memory, which none of these kernels uses
    if not 0 <= spare <= 2:
        raise EmulationError(f"{compiled.name} takes {len(code.parameters)} arguments, got {len(values)}")
    arguments = b""
    for value, parameter in zip(values + [0] * spare, code.parameters, strict=True):
        arguments += bytes(parameter.offset - len(arguments)) + _bytes(value, parameter)
    grid = (*grid, 1, 1, 1)[:3]
    counts, total = Counts(), grid[0] * grid[1] * grid[2]
    with np.errstate(all="ignore"):
        for first in range(0, total, TOGETHER):
            together = min(TOGETHER, total - first)
            counts.add(Batch(code, memory, compiled.shared, arguments, grid, first, together, noise).run())
    return counts


def _bytes(value, parameter: Parameter) -> bytes:
    if isinstance(value, bytes):
        if len(value) != parameter.size:
            raise EmulationError(f"{parameter.name} takes {parameter.size} bytes, got {len(value)}")
        return value
    if parameter.kind[0] == "f":
        return np.array([value], dtype_of(parameter.kind)).tobytes()
    bits = 8 * parameter.size
    if not -(1 << bits - 1) <= int(value) < 1 << bits:
        raise EmulationError(f"{value} does not fit .{parameter.kind}")
    return np.array([int(value) & (1 << bits) - 1], UNSIGNED[bits]).tobytes()
