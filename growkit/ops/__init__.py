"""The contract: every operator of growkit with its schema, its fake, its autograd formula and who implements it.

Schemas live in Python so that the package is whole without any binary. `reference` serves every device; CUDA tensors
of at most 32 bits go to the kernel of the same name where triton is installed, CPU tensors to that of
`growkit.kernels.cpu`, if any, where `growkit._C` is built. Equations, shapes and dtypes stand in the docstrings of
`reference`. Eager code calls the Python functions of this package, which skip the dispatcher for ops
on long lists; `torch.ops.growkit.*` serves `torch.compile`, export and `opcheck`.
"""

from growkit.ops.kron import kron_axes, kron_expand, kron_expand_into, kron_expand_many
from growkit.ops.registry import check_alike, kernel_of
from growkit.ops.sampled_nll import sampled_nll
from growkit.ops.sophia import gnb_ema_, hutchinson_ema_, rademacher_, sophia_step_, squared_norm
from growkit.ops.sophia8bit import check_coded, gnb_ema_8bit_, hutchinson_ema_8bit_, sophia_step_8bit_

__all__ = [
    "check_alike",
    "check_coded",
    "gnb_ema_",
    "gnb_ema_8bit_",
    "hutchinson_ema_",
    "hutchinson_ema_8bit_",
    "kernel_of",
    "kron_axes",
    "kron_expand",
    "kron_expand_into",
    "kron_expand_many",
    "rademacher_",
    "sampled_nll",
    "sophia_step_",
    "sophia_step_8bit_",
    "squared_norm",
]
