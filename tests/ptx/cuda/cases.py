"""What is run of csrc: every op, its kernels' instances and paths, dtypes, odd sizes, strides and alignments."""

import functools
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from ptx.cases.compare import Comparison, compare, within, worst
from ptx.emulator import EmulationError
from ptx.emulator.values import fma32

from growkit import reference

from . import Device

Case = Callable[[Device], Iterator[Comparison]]
CASES: dict[str, Case] = {}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EMPTY = torch.empty(0)
INSTANCES = (8, 12, 16, 24, 32)  # small layers in registers that the mix is compiled for


def device(folder: Path) -> Device:
    return _loaded(str(folder))


@functools.cache
def _loaded(folder):
    return Device(Path(folder))


def examine(folder: Path, name: str, arch: int) -> list[Comparison]:
    """Run a case on sm_`arch`. Raises EmulationError for what a kernel must not do."""
    there = device(folder)
    there.arch, there.mutate = arch, str
    torch.manual_seed(0)
    return worst(list(CASES[name](there)))


def case(name: str):
    def register(function: Case) -> Case:
        CASES[name] = function
        return function

    return register


def randn(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape).to(dtype)


# --- mix ---

# Targets of a stack: how they lie, and whether they are given as one tensor or as matrices.
LAYOUTS = {
    "whole": lambda L, r, c, dtype: [torch.empty(L, r, c, dtype=dtype)],
    "rows": lambda L, r, c, dtype: list(torch.empty(L, r, c, dtype=dtype)),
    "padded": lambda L, r, c, dtype: list(torch.empty(L, r, c + 5, dtype=dtype)[..., :c]),
    "transposed": lambda L, r, c, dtype: list(torch.empty(L, c, r, dtype=dtype).mT),
    "unaligned": lambda L, r, c, dtype: list(torch.empty(L * r * c + 1, dtype=dtype)[1:].view(L, r, c)),
}
SHAPES = ((33, 64), (9, 37), (5, 132), (1, 1030), (65, 1), (34, 36), (1, 1))
EVERY = list(itertools.product(LAYOUTS, DTYPES, DTYPES))


def mixed(w: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
    """sum_l w[:, l] X[l] by fused multiply-adds of float32 in the order of the layers, from 0."""
    w, X = w.numpy(), X.float().numpy()
    total = np.zeros((len(w), *X.shape[1:]), np.float32)
    for l in range(len(X)):  # noqa: E741
        total = fma32(w[:, l, None, None], X[l], total)
    return torch.from_numpy(total)


class Jobs:
    """Stacks for one call of kron_mix_, and the results to expect."""

    def __init__(self):
        self.arguments, self.expected = ([], [], [], []), []

    def add(self, layout, x_type, y_type, L1, L2, rows, columns, *, depth=True, scaled=False, x_strides=False):
        X = randn(L1, columns, rows, dtype=x_type).mT if x_strides else randn(L1, rows, columns, dtype=x_type)
        w = randn(L2, L1) if depth else EMPTY
        scale = [randn(rows), randn(columns)] if scaled else [EMPTY] * 2
        out = LAYOUTS[layout](L2 if depth else L1, rows, columns, y_type)
        for into, more in zip(self.arguments, (out, [X], [w], scale), strict=True):
            into += more
        exact = mixed(w, X) if depth else X.float()
        factor = scale[0][:, None] * scale[1] if scaled else torch.ones(())
        self.expected.append((f"{layout}", list(out[0]) if out[0].dim() == 3 else out, (exact * factor).to(y_type)))

    def run(self, there: Device) -> Iterator[Comparison]:
        there("kron_mix_", *self.arguments)
        for name, found, expected in self.expected:
            yield compare(name, found, expected)


def _mix_instance(there, instance):
    """A fifth of all combinations in one launch, most of them with `instance` layers, all of them with a depth map."""
    jobs = Jobs()
    for i, combination in enumerate(EVERY[INSTANCES.index(instance) :: len(INSTANCES)]):
        L1 = instance - (0, 3, instance - 1)[i % 3]
        jobs.add(*combination, L1, (5, 7, 2)[i % 3], *SHAPES[i % len(SHAPES)], scaled=i % 2 == 1, x_strides=i % 5 == 4)
    yield from jobs.run(there)


for each in INSTANCES:
    CASES[f"mix, {each} layers"] = functools.partial(_mix_instance, instance=each)


@case("mix, layers as they are")
def _assemble(there):
    jobs = Jobs()
    for i, combination in enumerate(EVERY):
        shape = SHAPES[i % len(SHAPES)]
        jobs.add(*combination, 1 + i % 3, 0, *shape, depth=False, scaled=i % 2 == 1, x_strides=i % 5 == 4)
    yield from jobs.run(there)


@case("mix, more layers than registers or shared memory hold")
def _deep(there):
    jobs = Jobs()
    for i, combination in enumerate(EVERY[::4]):
        L1, L2, *shape = ((33, 10, 6, 12), (5, 260, 2, 8), (40, 3, 9, 37))[i % 3]
        jobs.add(*combination, L1, L2, *shape, scaled=i % 2 == 1)
    yield from jobs.run(there)


@case("mix, more jobs and targets than a launch holds, and empty ones")
def _many(there):
    jobs = Jobs()
    for j in range(70):
        jobs.add("rows", *DTYPES[:2], 2, 50, 3, j % 9)
    jobs.add("whole", *DTYPES[:2], 0, 4, 5, 3)  # a sum over no layers
    before = len(there.launches)
    yield from jobs.run(there)
    launches = torch.tensor([len(there.launches) - before])
    yield compare("launches", [launches], [torch.tensor([2])])
    there("kron_mix_", [], [], [], [])


# --- backward ---


def _backward(there, dtype):
    shapes = (6, 12, 7, 43), (16, 1, 1, 1), (22, 24, 3, 128), (40, 5, 9, 20), (3, 48, 2, 66), (64, 64, 4, 33)
    for L1, L2, rows, columns in shapes:
        G, U, w = randn(L2, rows, columns, dtype=dtype), randn(L1, rows, columns, dtype=dtype), randn(L2, L1)
        mix, dw = torch.empty_like(U), torch.empty_like(w)
        there("kron_mix_backward_", mix, dw, G, U, w)
        yield compare("mixed", [mix], [mixed(w.mT.contiguous(), G).to(dtype)])
        yield _weights(dw, G, U)
        alone = torch.empty_like(U), torch.empty_like(w)
        there("kron_mix_backward_", alone[0], None, G, U, w)
        there("kron_mix_backward_", None, alone[1], G, U, w)
        yield compare("each alone", alone, (mix, dw))


def _weights(dw, G, U):
    """Within the rounding of sums of so many products: of 32 in a row, and their sums."""
    exact = torch.einsum("aij,bij->ab", G.double(), U.double())
    size = torch.einsum("aij,bij->ab", G.double().abs(), U.double().abs())
    allowed = (40 * 2**-24 * size).reshape(-1)
    return compare("dw", [dw], [exact.float()], "40 roundings of the sum", within([exact], [allowed]))


for each in DTYPES:
    CASES[f"backward, {str(each)[6:]}"] = functools.partial(_backward, dtype=each)


@case("backward, more tiles than blocks")
def _tiles(there):
    for L2, more in ((3, 5), (26, 132)):  # odd; two chunks of G's layers, which take turns from tile to tile
        G, U, w = randn(L2, 1, 1056 * 128 + more), randn(2, 1, 1056 * 128 + more), randn(L2, 2)
        mix, dw = torch.empty_like(U), torch.empty_like(w)
        there("kron_mix_backward_", mix, dw, G, U, w)
        yield compare("mixed", [mix], [mixed(w.mT.contiguous(), G)])
        yield _weights(dw, G, U)


# --- gather and split ---


def _sources(X):
    """X in three layouts: contiguous, columns first, and with gaps between the rows."""
    return X, X.mT.contiguous().mT, torch.cat((X, X), 2)[..., : X.shape[2]]


def _gather(there, dtype):
    for shape in ((2, 3, 64), (3, 17, 33), (2, 18, 132), (1, 150, 1)):
        X = randn(*shape).mul(50).to(dtype)
        for indexed in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)):
            index = [torch.randint(n, (n + 5,)) if on else None for n, on in zip(shape, indexed, strict=True)]
            for source in _sources(X):
                made = [n if i is None else n + 5 for n, i in zip(shape, index, strict=True)]
                found, expected = (torch.empty(made, dtype=dtype) for _ in range(2))
                there("kron_gather_", found, source, *index)
                reference.kron_gather_(expected, source, *index)
                yield compare("copied", [found], [expected])


for each in (torch.int8, torch.bfloat16, torch.float32, torch.float64):
    CASES[f"gather, {str(each)[6:]}"] = functools.partial(_gather, dtype=each)


# --- what must not pass ---

MUTATIONS = {  # the case, the change, and what is said
    "mix, a barrier dropped": ("mix, 12 layers", r"bar\.sync\s+0;", "", "race in shared memory|before it is written"),
    "backward, a barrier dropped": ("backward, float32", r"bar\.sync\s+0;", "", "race in shared memory|before it is"),
    "backward, a copy not waited for": (
        "backward, float32", r"(cp\.async\.wait_group\s+)0;", r"\g<1>1;", "is read before it is written",
    ),
    "gather, its bound dropped": ("gather, float32", r"setp\.lt\.s64", "setp.le.s64", "out of bounds"),
    "mix, rounded towards zero": ("mix, 12 layers", r"cvt\.rn\.bf16", "cvt.rz.bf16", "differ"),
    "mix, in two roundings": (
        "mix, 12 layers", r"fma\.rn\.f32\s+(%f\d+), (%f\d+), (%f\d+), (\S+);",
        r"mul.rn.f32 %f0, \2, \3; add.rn.f32 \1, %f0, \4;", "differ",
    ),
}  # fmt: skip


def noticed(folder: Path, name: str) -> str:
    """How a kernel that is broken on purpose shows."""
    kind, pattern, new, _ = MUTATIONS[name]
    there = device(folder)
    there.arch, there.mutate = 90, lambda ptx: re.sub(pattern, new, ptx)
    torch.manual_seed(0)
    try:
        wrong = [str(c) for c in CASES[kind](there) if not c.ok]
    except EmulationError as error:
        return str(error)
    return f"differ: {wrong}" if wrong else "not at all"


def said(folder: Path, op: str, *arguments) -> str:
    """What a call that should fail raises."""
    there = device(folder)
    there.arch, there.mutate = 90, str
    try:
        there(op, *arguments)
    except (RuntimeError, EmulationError) as error:
        return str(error)
    return "nothing"
