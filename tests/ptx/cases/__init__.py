"""What is run on the emulator: every op of Triton kernels, through its launcher, beside the reference.

`examine` runs a case twice: on tensors of awkward sizes, some of them at addresses that are no multiple of 16, some of
them shards with offsets, with approximate instructions that err within their limits; and on full chunks at aligned
addresses, whose instructions and memory traffic are counted.
"""

from typing import NamedTuple

import torch

from . import sampled_nll, sophia, sophia8bit
from .case import Cases
from .compare import Comparison, worst
from .launchers import Emulation, Record
from .tensors import ALIGNED, AWKWARD
from .traffic import VARIANTS, Traffic, traffic, variant_of

CASES: Cases = {**sophia.CASES, **sophia8bit.CASES, **sampled_nll.CASES}


class Found(NamedTuple):
    comparisons: list[Comparison]
    traffic: list[Traffic]  # of each launch on full chunks


def prepare() -> None:
    """Of a process that examines cases: uninitialised memory holds NaN, and one thread is enough."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)


def examine(op: str, variant: str, arch: int) -> Found:
    """Run a case on sm_`arch`. Raises EmulationError for what a kernel must not do."""
    case = CASES[op, variant]
    with Emulation(arch, noise=1):
        comparisons = list(case.check(AWKWARD))
    if case.elements is None:
        return Found(worst(comparisons), [])
    with Emulation(arch) as emulation:
        comparisons += case.check(ALIGNED)
    return Found(worst(comparisons), [traffic(launch, case.elements) for launch in emulation.launches])


def never_launched() -> list[str]:
    """Entries of growkit.kernels.report's VARIANTS that no case makes a launcher launch."""
    with Record() as record:
        for case in CASES.values():
            if case.elements is not None:
                list(case.check(ALIGNED))
    launched = [variant_of(launch.call) for launch in record.launches]
    return [f"{v.kernel.__name__} {v.name}" for v in VARIANTS if not any(v is other for other in launched)]
