"""What a launch on full chunks does per element, against the limits that growkit.kernels states beside its report."""

from typing import NamedTuple

from ptx.emulator.counts import SECTOR
from ptx.emulator.launch import Specialised

from growkit.kernels import report

from .launchers import Launch


class Traffic(NamedTuple):
    """Per element. wide: bytes of 128-bit accesses, loaded and stored. sectors: bytes that warps ask memory for."""

    kernel: str
    variant: str | None  # of growkit.kernels.report
    instructions: float
    wide: tuple[float, float]
    sectors: tuple[float, float]
    shared: float  # bytes to and from shared memory
    barriers: float  # per 1,024 elements
    problems: list[str]

    def __str__(self):
        loads, stores = (f"{s:4.1f} B in {w:4.1f}" for s, w in zip(self.sectors, self.wide, strict=True))
        return (
            f"{self.instructions:5.1f} instr, ld {loads}, st {stores}, shared {self.shared:4.1f} B, "
            f"{self.barriers:3.1f} bar"
        )


VARIANTS = [variant for _, variant in report.variants()]


def variant_of(call: Specialised) -> report.Variant | None:
    """The entry of VARIANTS that compiles what a launch compiles, whatever it knows of the alignment of pointers."""
    for variant in VARIANTS:
        types = {name: kind for name, kind in call.signature.items() if kind != "constexpr"}
        options = {name: call.options[name] for name in variant.options}
        found = call.kernel, types, call.constants, options
        if found == (variant.kernel, variant.types, variant.constants, variant.options):
            return variant
    return None


def traffic(launch: Launch, elements: int) -> Traffic:
    counts, variant = launch.counts, variant_of(launch.call)
    wide = counts.wide("load") / elements, counts.wide("store") / elements
    sectors = SECTOR * counts.sectors["load"] / elements, SECTOR * counts.sectors["store"] / elements
    found = Traffic(
        launch.call.kernel.__name__,
        variant and variant.name,
        counts.total / elements,
        wide,
        sectors,
        counts.shared / elements,
        1024 * counts.barriers / elements,
        [],
    )
    return found._replace(problems=_problems(found, variant) if variant and (variant.reads or variant.writes) else [])


def _problems(found: Traffic, variant: report.Variant) -> list[str]:
    limits, moved = report.Executed(*variant.executed), variant.reads + variant.writes
    problems = [
        f"{value:.3g} {words}, {allowed:.3g} allowed"
        for value, allowed, words in (
            (found.instructions, limits.instructions, "instructions executed per element"),
            (found.shared, limits.shared, "bytes per element through shared memory"),
            (found.barriers, limits.barriers, "barriers per 1,024 elements"),
            (sum(found.sectors) / moved, limits.sectors, "bytes of sectors asked for, per byte needed"),
        )
        if allowed is not None and value > allowed
    ]
    wide = variant.wide or (variant.reads, variant.writes)
    for value, expected, kind in zip(found.wide, wide, ("load", "store"), strict=True):
        if value < expected:
            problems.append(f"128-bit {kind}s move {value:.3g} bytes per element of {expected}")
    return problems
