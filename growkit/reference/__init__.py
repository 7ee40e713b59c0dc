"""The oracle: every operator of growkit in plain PyTorch. It is also the CPU implementation; it imports only torch.

A file for each family of operators, on `random` and `blocks`, which all share.
"""

from growkit.reference.kron import kron_gather_, kron_mix_, kron_mix_backward_
from growkit.reference.random import (
    CURVATURE_ROUNDING,
    LABELS,
    MOMENTUM_ROUNDING,
    PROBE,
    ROUNDING,
    philox,
    random_bits,
)
from growkit.reference.sampled_nll import sampled_nll, sampled_nll_backward
from growkit.reference.sophia import gnb_ema_, hutchinson_ema_, rademacher_, sophia_step_, squared_norm
from growkit.reference.sophia8bit import (
    CODE_SPAN,
    CODES_PER_SCALE,
    dequantise,
    gnb_ema_8bit_,
    hutchinson_ema_8bit_,
    quantise_,
    sophia_step_8bit_,
)

__all__ = [
    "CODES_PER_SCALE",
    "CODE_SPAN",
    "CURVATURE_ROUNDING",
    "LABELS",
    "MOMENTUM_ROUNDING",
    "PROBE",
    "ROUNDING",
    "dequantise",
    "gnb_ema_",
    "gnb_ema_8bit_",
    "hutchinson_ema_",
    "hutchinson_ema_8bit_",
    "kron_gather_",
    "kron_mix_",
    "kron_mix_backward_",
    "philox",
    "quantise_",
    "rademacher_",
    "random_bits",
    "sampled_nll",
    "sampled_nll_backward",
    "sophia_step_",
    "sophia_step_8bit_",
    "squared_norm",
]
