"""Compiled kernels broken on purpose, in ways that a compiler, a wrong promise to it or an edit might break them."""

import re
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from ptx.emulator import Compiled, EmulationError, Memory, compile, run, specialise

from growkit.kernels import multi_tensor

from . import CASES
from .launchers import Emulation
from .tensors import AWKWARD

EVERY = 0


def substitute(pattern: str, new: str, count: int = 1, skip: int = 0) -> Callable[[str], str]:
    """A change of PTX, at `count` places (EVERY: all) after the first `skip`; there must be one."""

    def change(ptx):
        places = list(re.finditer(pattern, ptx, re.MULTILINE))[skip:]
        if not places:
            raise LookupError(f"{pattern!r} occurs nowhere")
        for place in reversed(places[:count] if count else places):
            ptx = ptx[: place.start()] + place.expand(new) + ptx[place.end() :]
        return ptx

    return change


def store_to_g(ptx: str) -> str:
    """The first 128-bit store goes where the second 128-bit load, of g, came from."""
    g = re.findall(r"ld\.global\.v4\.b32 [^\[]*\[ (%rd\d+)", ptx)[1]
    return re.sub(r"(st\.global\.v4\.b32 \[ )%rd\d+", rf"\g<1>{g}", ptx, count=1)


class Mutation(NamedTuple):
    case: tuple[str, str]
    change: Callable[[str], str]
    caught: str  # words of the error; "differ": the result is wrong


BARRIER = r"^\s*bar\.sync\s+0;"
FMA = r"fma\.rn\.f32\s+(%r\d+), (\S+), (\S+), (\S+);"
HALF_OF_THE_THREADS = "mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 128; @%p1 bar.sync 0;"
FLOAT32, COUNT, LIKELIHOOD = (
    ("sophia_step_", "float32"),
    ("sophia_step_", "float32, count"),
    ("sampled_nll", "bfloat16"),
)
NEAREST, NORM = ("sophia_step_", "bfloat16, nearest"), ("squared_norm", "float32")
OUT, RACE = "out of bounds", "race in shared memory"
MUTATIONS = {
    "unaligned tensors on the aligned path": Mutation(
        FLOAT32, substitute(r"(and\.b64\s+%rd\d+, %rd\d+), 15;", r"\1, 0;"), "misaligned 16-byte access"
    ),
    "a load's mask dropped": Mutation(FLOAT32, substitute(r"@%p\d+ (ld\.global\.b32)", r"\1"), OUT),
    "a store's mask dropped": Mutation(FLOAT32, substitute(r"@%p\d+ (st\.global\.b32)", r"\1"), OUT),
    "one barrier dropped": Mutation(COUNT, substitute(BARRIER, ""), f"{RACE}|read before it is written"),
    "all barriers dropped": Mutation(LIKELIHOOD, substitute(BARRIER, "", EVERY), f"{RACE}|read before it is written"),
    "a barrier that half of the threads skip": Mutation(NORM, substitute(BARRIER, HALF_OF_THE_THREADS), "skip"),
    "truncated, not rounded to nearest": Mutation(
        NEAREST, substitute(r"cvt\.rn\.bf16", "cvt.rz.bf16", EVERY), "differ"
    ),
    "approximate division": Mutation(FLOAT32, substitute(r"div\.rn\.f32", "div.full.f32", EVERY), "differ"),
    "fma in two roundings": Mutation(
        FLOAT32, substitute(FMA, r"mul.rn.f32 \1, \2, \3; add.rn.f32 \1, \1, \4;", EVERY), "differ"
    ),
    "a shuffle over the wrong distance": Mutation(
        NORM, substitute(r"(shfl\.sync\.bfly\.b32\s+%r\d+, %r\d+), 8,", r"\1, 4,"), "differ"
    ),
    "a vector in the wrong order": Mutation(
        ("gnb_ema_", "float32"),
        substitute(r"(ld\.global\.v4\.b32 \{ %r\d+), (%r\d+), (%r\d+)", r"\1, \3, \2"),
        "differ",
    ),
    "a store to g": Mutation(FLOAT32, store_to_g, "read-only"),
    "a 64-bit offset cut to 32 bits": Mutation(
        ("rademacher_", "float32"),
        substitute(r"shr\.s64\s+(%rd\d+), (%rd\d+), 39;", r"mov.b64 \1, 0;", EVERY),
        "differ",
    ),
    "one result of all programs": Mutation(
        NORM, substitute(r"mov\.u32\s+(%r\d+), %ctaid\.x;", r"mov.u32 \1, 1;"), "race in partial"
    ),
}


def noticed(name: str) -> str:
    """How a mutation shows."""
    mutation = MUTATIONS[name]

    def mutate(compiled: Compiled) -> Compiled:
        return compiled._replace(ptx=mutation.change(compiled.ptx))

    try:
        with Emulation(90, noise=1, mutate=mutate):
            wrong = [str(c) for c in CASES[mutation.case].check(AWKWARD) if not c.ok]
    except EmulationError as error:
        return str(error)
    return f"differ: {wrong}" if wrong else "not at all"


@triton.jit(do_not_specialize=["x"])
def _copy(x: tl.int64, y, BLOCK: tl.constexpr):
    off = tl.arange(0, BLOCK)
    tl.store(y + off, tl.load(multi_tensor.aligned(x, tl.float32) + off))


def lie() -> str:
    """`aligned`, so `multiple_of`, of an address that is no multiple of 16."""
    x, y, memory = torch.zeros(1028), torch.zeros(1024), Memory()
    memory.add(x, "x")
    memory.add(y, "y", writable=True)
    for first, faults in ((-x.data_ptr() // 4 % 4, False), (1 - x.data_ptr() // 4 % 4, True)):
        call = specialise(_copy, (x[first % 4 :].data_ptr(), y, 1024), {"num_warps": 4}, 90)
        try:
            run(compile(call, 90), (1,), call.values, memory)
        except EmulationError as error:
            return str(error) if faults else f"too early: {error}"
    return "not at all"


def fused() -> str:
    """`sampled_nll` compiled with the fusion that it forbids."""
    try:
        with Emulation(90, enable_fp_fusion=True):
            list(CASES["sampled_nll", "float32"].check(AWKWARD))
    except EmulationError as error:
        return str(error)
    return "not at all"
