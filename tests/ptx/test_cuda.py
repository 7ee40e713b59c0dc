"""csrc's CUDA kernels as nvcc compiles them, and the entry points that launch them, on the memory of CPU tensors."""

import re
from pathlib import Path

import pytest
import torch
from compilers import needs_nvcc, nvcc_home, toolchain

pytest.importorskip("triton")

from ptx import cuda
from ptx.cuda import cases

pytestmark = needs_nvcc
# Those of which architectures get different instructions, if any: with --ptx-all the others as well.
SELECTION = {"mix, 12 layers", "backward, bfloat16", "gather, float32", "split, left"}


@pytest.fixture(scope="module")
def built(compiled_once):
    """The folder that ptx.cuda.build filled."""

    def make(folder):
        cuda.build(folder, nvcc_home())

    sources = cuda.ROOT / "csrc", cuda.HOST, Path(cuda.__file__), cuda.ROOT / "setup.py"
    return compiled_once(make, *sources, toolchain(nvcc_home() / "bin/nvcc", "g++"))


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        everything = metafunc.config.getoption("--ptx-all", default=False)
        chosen = [(name, arch) for arch in (90, 80, 100) for name in cases.CASES
                  if everything or arch == 90 or name in SELECTION]  # fmt: skip
        metafunc.parametrize("case", chosen, ids=[f"{name}-sm_{arch}" for name, arch in chosen])


def test_case(case, built, compiled, tabulate):
    found = compiled(cases.examine, built, *case)
    tabulate(f"{case[0]:<57} sm_{case[1]:<4} {'; '.join(map(str, found))}")
    assert found and not [str(comparison) for comparison in found if not comparison.ok]


@pytest.mark.parametrize("name", cases.MUTATIONS)
def test_a_broken_kernel_is_caught(name, built, compiled):
    found = compiled(cases.noticed, built, name)
    assert re.search(cases.MUTATIONS[name][-1], found), found


X, W, OUT, NONE = torch.ones(2, 3, 5), torch.ones(4, 2), torch.ones(4, 3, 5), torch.empty(0)
REFUSED = {
    "needs 4 targets": ("kron_mix_", [*OUT[:1]], [X], [W], [NONE] * 2),
    r"out must have the shape \[ 3 5 \], got \[ 3 2 \]": ("kron_mix_", [*OUT[..., :2]], [X], [W], [NONE] * 2),
    "X must be float32, bfloat16 or float16": ("kron_mix_", [*OUT], [X.double()], [W], [NONE] * 2),
    "w must be float32": ("kron_mix_", [*OUT], [X], [W.bfloat16()], [NONE] * 2),
    "column scale must have the shape": ("kron_mix_", [*OUT], [X], [W], [torch.ones(3), torch.ones(4)]),
    "at most 64 layers, got 65 and 4": ("kron_mix_backward_", None, None, OUT, X, torch.ones(4, 65)),
    "U must be contiguous": ("kron_mix_backward_", None, None, OUT, torch.ones(2, 5, 3).mT, W),
    "layers must be contiguous int64": ("kron_gather_", OUT, X, torch.zeros(4, dtype=torch.int32)),
    "out must have the dtype of X": ("kron_gather_", OUT.double(), X),
    "trap": ("kron_gather_", torch.ones(1, 3, 5), X, torch.tensor([2])),  # an index out of range
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_does_not_fit_is_refused(words, built, compiled):
    found = compiled(cases.said, built, *REFUSED[words])
    assert re.search(words, found), found
