"""How an operator is defined, who implements it on which device, and checks that several operators share."""

import functools
import importlib

import torch

from growkit import kernels
from growkit.kernels import cpu

library = torch.library.Library("growkit", "DEF")


def define(schema, implementation, fake):
    """Register one op: its schema, the implementation that serves every device, and its shape rules."""
    name = schema.partition("(")[0]
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    # Disabled, or a compiled program that calls the op would have the implementation traced in its turn.
    served = torch._disable_dynamo(implementation)
    library.impl(name, served, "CompositeExplicitAutograd")
    if cpu.implementation(name.partition(".")[0]):
        library.impl(name, served, "CPU")  # the same, for those who ask the dispatcher what serves a CPU tensor
    torch.library.register_fake(f"growkit::{name}", fake, lib=library)


# Which module of growkit.kernels serves an op on CUDA.
kernel_of: dict = {}


def with_kernel(module, oracle):
    """`oracle`, or the function of the same name that serves the device of the first tensor.

    For CUDA tensors that is the one of growkit.kernels.`module`, for CPU tensors that of growkit.kernels.cpu, if any.
    """
    kernel_of[oracle.__name__] = module
    compiled = cpu.implementation(oracle.__name__)

    @functools.wraps(oracle)
    def fastest(tensors, *args, **kwargs):
        first = tensors if isinstance(tensors, torch.Tensor) else tensors[0] if tensors else None
        if first is not None and compiled and first.is_cpu:
            return compiled(tensors, *args, **kwargs)
        if first is None or not first.is_cuda or first.dtype == torch.float64 or not kernels.available:
            return oracle(tensors, *args, **kwargs)
        kernel = getattr(importlib.import_module(f"growkit.kernels.{module}"), oracle.__name__)
        return kernel(tensors, *args, **kwargs)

    return fastest


def on_lists(schema, implementation, fake):
    """`define` for an op on lists of tensors, which autograd does not see. Returns the function to call."""
    define(schema, implementation, fake)
    op = getattr(torch.ops.growkit, schema.partition("(")[0].partition(".")[0])

    @functools.wraps(implementation)
    def call(*args, **kwargs):
        # Dispatch of a few hundred tensors costs more than one launch: only a tracer pays for it.
        return (op if torch.compiler.is_compiling() else implementation)(*args, **kwargs)

    return call


def check_alike(op, like, **lists):
    """Raise unless each list has the length of `like`, and each tensor the shape and device of its partner there."""
    for name, tensors in lists.items():
        if len(tensors) != len(like):
            raise ValueError(f"{op}: {name} has {len(tensors)} tensors, expected {len(like)}")
        for i, (t, p) in enumerate(zip(tensors, like, strict=True)):
            if t.shape != p.shape or t.device != p.device:
                raise ValueError(
                    f"{op}: {name}[{i}] has shape {tuple(t.shape)} on {t.device}, "
                    f"expected {tuple(p.shape)} on {p.device}"
                )
