"""The compiled CPU kernels give the bits of the reference, with every instruction set, layout and number of threads."""

import itertools
import os
import subprocess
import sys

import pytest
import torch

from growkit import ops, reference
from growkit.kernels import cpu

F, B = torch.float32, torch.bfloat16
SCALARS = {"lr": 6e-4, "beta1": 0.965, "rho_bs": 256.0, "eps": 1e-15, "weight_decay": 0.2}
SIZES = (0, 1, 63, 5003, 17001)
SETS = ("DEFAULT", "AVX2", "AVX512")

built = pytest.mark.skipif(cpu._C is None, reason="growkit._C is not built here")


def operands(dtypes, sizes=SIZES, seed=0):
    """p, g, m, h as lists; half the elements are clipped, some of the longer tensors are zero, huge, tiny or odd."""
    make = torch.Generator().manual_seed(seed)
    odd = torch.tensor([0.0, -0.0, 1e-40, -1e-45, 3e38, float("inf"), -float("inf"), float("nan")])
    lists = []
    for k, (dtype, scale) in enumerate(zip(dtypes, (1, 1e-3, 1e-3, 1e-5), strict=True)):
        values = [torch.randn(n, generator=make).mul_(scale) for n in sizes]
        values = [v.abs_() if k == 3 else v for v in values]
        for v in values:
            for i, x in enumerate(odd) if len(v) > 100 else ():
                v[i * (k + 3) :: 101 + 2 * k] = x  # with most combinations of what the four lists hold
        lists.append([v.to(dtype) for v in values])
    return lists


def bits(t):
    """The bit patterns, with one NaN for all: which one arithmetic gives, no format defines."""
    return torch.where(t.isnan(), torch.nan, t).view({F: torch.int32, B: torch.int16}[t.dtype])


def assert_same(found, expected):
    for name, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert torch.equal(bits(a), bits(b)), f"list {name}, tensor {i} of {len(a)} elements"


def copies(lists):
    return [[t.clone() for t in x] for x in lists]


def fused_sets():
    """The instruction sets of this machine that round a*b + c once, as torch's kernels do now."""
    torchs = torch.backends.cpu.get_cpu_capability()
    return [name for name in SETS[1 : SETS.index(torchs) + 1]] if torchs in SETS[1:] else [torchs]


@pytest.fixture(params=fused_sets())
def instructions(request):
    assert cpu._C.use_instructions(request.param) == (request.param if request.param in SETS else "DEFAULT")
    yield
    cpu._C.use_instructions(torch.backends.cpu.get_cpu_capability())


@built
@pytest.mark.parametrize("dtypes", [(F, F, F, F), (B, B, F, F), (B, B, B, B), (F, B, B, F)], ids=str)
def test_step_has_the_bits_of_the_reference(dtypes, instructions):
    roundings = [("nearest", None)]
    if dtypes[0] == B:
        roundings += [("stochastic", 2**40 + 5), ("master", None)]
    flags = False, True
    for denominator, (rounding, seed), other, nesterov in itertools.product(("add", "max"), roundings, flags, flags):
        ours = operands(dtypes)
        theirs = copies(ours)
        masters = [[p.float() for p in x[0]] if rounding == "master" else None for x in (ours, theirs)]
        counts = torch.zeros((), dtype=torch.int64), torch.ones((), dtype=torch.int64)
        options = SCALARS | {"denominator": denominator, "maximize": other, "nesterov": nesterov}
        options |= {"scale": torch.tensor(0.37), "weight_decay": 0.0} if other else {}
        options |= {"seed": seed, "step": torch.tensor(7.0), "parameter": range(3, 8), "offset": (0, 1, 2, 2**35, 13)}
        cpu.sophia_step_(*ours, masters[0], counts[0], **options)
        reference.sophia_step_(*theirs, masters[1], counts[1], **options)
        assert_same([ours[0], ours[2], masters[0] or []], [theirs[0], theirs[2], masters[1] or []])
        assert counts[0] + 1 == counts[1] and counts[0] > 1000


@built
@pytest.mark.parametrize("dtypes", [(F, F), (B, F), (F, B), (B, B)], ids=str)
def test_refresh_has_the_bits_of_the_reference(dtypes, instructions):
    for scale, seed in itertools.product((None, torch.tensor(0.37)), (None, -3) if dtypes[0] == B else (None,)):
        _, g, _, h = operands((F, dtypes[1], F, dtypes[0]))
        expected = copies([h])
        key = {"seed": seed, "refresh": 2, "parameter": range(5), "offset": (0, 1, 2, 3, 5)}
        cpu.gnb_ema_(h, g, scale, beta2=0.99, **key)
        reference.gnb_ema_(*expected, g, scale, beta2=0.99, **key)
        assert_same([h], expected)


@built
@pytest.mark.skipif(fused_sets() == ["DEFAULT"], reason="tested with it already")
def test_bits_follow_the_instruction_set_of_torch():
    """Without fused multiply-add the reference rounds twice, and so must we: in a process where torch has none."""
    code = (
        "import importlib.util, sys, torch\n"
        "spec = importlib.util.spec_from_file_location('tests', sys.argv[1])\n"
        "tests = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(tests)\n"
        "for narrow in (torch.float32, torch.bfloat16):\n"
        "    tests.test_step_has_the_bits_of_the_reference((narrow, narrow, torch.float32, torch.float32), None)\n"
        "tests.test_refresh_has_the_bits_of_the_reference((torch.float32, torch.float32), None)\n"
        "print(torch.backends.cpu.get_cpu_capability())\n"
    )
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "default"}
    done = subprocess.run([sys.executable, "-c", code, __file__], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "DEFAULT", done.stdout + done.stderr


@built
def test_threads_change_nothing():
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            lists, unclipped = operands((B, B, F, F), (*SIZES, 200_003)), torch.zeros((), dtype=torch.int64)
            cpu.sophia_step_(*lists, None, unclipped, **SCALARS, seed=1, step=torch.tensor(1), parameter=range(6))
            results.append((lists, int(unclipped)))
    finally:
        torch.set_num_threads(threads)
    assert cpu._C.build_info()["torch_threads"]
    for lists, unclipped in results[1:]:
        assert_same(lists, results[0][0])
        assert unclipped == results[0][1]


def shaped(t, layout):
    matrix = t[: len(t) // 6 * 6].view(-1, 6)
    if layout == "unaligned":
        whole = torch.empty(t.numel() + 3, dtype=t.dtype)
        return whole[3:].copy_(t)
    if layout == "transposed":
        return matrix.T.contiguous().T
    if layout == "gaps":
        return torch.zeros(len(matrix), 12, dtype=t.dtype)[:, ::2].copy_(matrix)
    return matrix.clone()


# What lies in memory as in none, or in another order than random bits count in, is the oracle's.
@built
@pytest.mark.parametrize(("layouts", "random", "oracle"), [
    (("unaligned",) * 4, True, False),
    (("transposed",) * 4, False, False),
    (("transposed",) * 4, True, True),
    (("transposed", "rows", "rows", "rows"), False, True),
    (("gaps",) * 4, False, True),
])  # fmt: skip
def test_layouts(layouts, random, oracle, monkeypatch):
    dtypes = (B, B, F, F) if random else (F, F, F, F)
    plain = operands(dtypes, (600, 5003))
    ours, theirs = ([[shaped(t, layout) for t in x] for x, layout in zip(plain, layouts, strict=True)] for _ in "ab")
    keys = {"seed": 4, "step": torch.tensor(2), "parameter": (8, 9), "offset": (3, 100)} if random else {}
    reference.sophia_step_(*theirs, **SCALARS, **keys)
    called = []
    monkeypatch.setattr(reference, "sophia_step_", spy(called, reference.sophia_step_))
    cpu.sophia_step_(*ours, **SCALARS, **keys)
    assert_same(ours, theirs)
    assert called == ([2] if oracle else [])


def spy(called, function):
    def spied(tensors, *args, **kwargs):
        called.append(len(tensors))
        return function(tensors, *args, **kwargs)

    return spied


@built
def test_one_call_takes_what_it_can_and_leaves_the_rest(monkeypatch):
    """float32, float64, float16 with a master, bfloat16 with and without one, and a subclass, in one list."""

    class Other(torch.Tensor):
        pass

    def lists():
        p = [torch.linspace(-1, 1, n, dtype=torch.float64) for n in (70, 71, 72, 73, 74)]
        p = [t.to(dtype) for t, dtype in zip(p, (F, torch.float64, torch.float16, B, F), strict=True)]
        p[4] = p[4].as_subclass(Other)
        g, m, h = ([torch.full_like(t, x, dtype=torch.promote_types(t.dtype, F)) for t in p] for x in (1, 2e-3, 1e-5))
        return p, g, m, h, [t.float() for t in p]

    ours, theirs, called = lists(), lists(), []
    reference.sophia_step_(*theirs, **SCALARS)
    monkeypatch.setattr(reference, "sophia_step_", spy(called, reference.sophia_step_))
    cpu.sophia_step_(*ours, **SCALARS)
    assert called == [3]
    for a, b in zip(itertools.chain(*ours), itertools.chain(*theirs), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@built
def test_every_way_to_call_an_op_gets_there(monkeypatch):
    """Directly, through the dispatcher, compiled; each marks what it writes as written."""
    served = []
    monkeypatch.setattr(cpu, "_C", type("Counting", (), {"gnb_ema": lambda *a, **k: served.append(len(a[0]))}))
    h, g = [torch.ones(5)], [torch.ones(5)]
    version = h[0]._version
    ops.gnb_ema_(h, g, beta2=0.9)
    torch.ops.growkit.gnb_ema_(h, g, beta2=0.9)
    torch.compile(lambda h, g: ops.gnb_ema_(h, g, beta2=0.9), backend="eager", fullgraph=True)(h, g)
    assert served == [1, 1, 1] and h[0]._version == version + 3
    assert torch._C._dispatch_has_kernel_for_dispatch_key("growkit::gnb_ema_", "CPU")
    ops.gnb_ema_(h, g, None, torch.tensor(True), beta2=0.9)
    assert served == [1, 1, 1]


@built
def test_compiled_code_refuses_rows_of_another_length():
    with pytest.raises(ValueError, match="tensors: wrong number of entries"):
        cpu._C.gnb_ema([(0, 0, 1)], [False] * 2, beta2=0, gain=0, random=False, seed=0, stream=0, time=0)
    with pytest.raises(ValueError, match="narrow: wrong number of lists"):
        cpu._C.gnb_ema([], [False], beta2=0, gain=0, random=False, seed=0, stream=0, time=0)
