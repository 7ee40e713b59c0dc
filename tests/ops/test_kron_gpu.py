"""The CUDA kernels of growkit._C against their references in float64, and expansion through them."""

import pytest
import torch

from growkit import ops, reference
from growkit.bench import pairs
from growkit.bench.kron import CUBLAS_ERROR
from growkit.kron import expand, plan

pytestmark = pytest.mark.gpu
GIGABYTES = pytest.mark.xdist_group("gigabytes of the GPU, expansion")  # one worker, so that all of them fit


@pytest.fixture(autouse=True)
def kernels():
    if not expand._has_kernels(torch.device("cuda", torch.cuda.current_device())):
        pytest.skip(f"no kernels for this device: {expand.extension}")


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, device="cuda").to(dtype)


def double(x):
    return x.double() if x.is_floating_point() else x


def assert_close_to_float64(fast, same_dtype, exact):
    """|fast - exact| <= 2 |reference of the same dtype - exact| + what one rounding of the largest value can do."""
    atol = 4 * torch.finfo(fast.dtype).eps * exact.abs().max().item() if exact.numel() else 0
    bound = 2 * (same_dtype.double() - exact).abs() + atol
    excess = ((fast.double() - exact).abs() - bound).max().item() if exact.numel() else 0
    assert fast.isfinite().all() and excess <= 0, f"beyond the bound by {excess}"


LAYOUTS = {
    "whole": lambda L, r, c, dtype: (torch.empty(L, r, c, device="cuda", dtype=dtype),),
    "rows": lambda L, r, c, dtype: torch.empty(L, r, c, device="cuda", dtype=dtype).unbind(),
    "padded": lambda L, r, c, dtype: torch.full((L, r, c + 5), 7.0, device="cuda", dtype=dtype)[..., :c].unbind(),
    "transposed": lambda L, r, c, dtype: torch.empty(L, c, r, device="cuda", dtype=dtype).mT.unbind(),
    "unaligned": lambda L, r, c, dtype: (
        torch.empty(L * r * c + 1, device="cuda", dtype=dtype)[1:].view(L, r, c).unbind()
    ),
}  # fmt: skip
SHAPES = [
    (6, 12, 33, 64),
    (1, 3, 1, 1),
    (12, 24, 63, 100),
    (24, 48, 5, 132),
    (32, 7, 40, 33),
    (33, 20, 9, 36),
    (5, 300, 3, 8),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtypes", [
    (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16),
    (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32),
], ids=str)  # fmt: skip
def test_small_mix_of_every_shape_at_once(layout, dtypes):
    jobs, expected = ([], [], [], []), []
    empty = torch.empty(0, device="cuda")
    for L1, L2, rows, columns in SHAPES:
        for depth in (True, False):
            X, w = randn(L1, rows, columns, dtype=dtypes[0]), randn(L2, L1) if depth else empty
            scale = [randn(rows), randn(columns)] if L1 % 2 else [empty, empty]
            L = L2 if depth else L1
            out = LAYOUTS[layout](L, rows, columns, dtypes[1])
            for job, more in zip(jobs, (out, [X], [w], scale), strict=True):
                job.extend(more)
            exact = torch.einsum("ab,bij->aij", double(w), double(X)) if depth else double(X)
            if L1 % 2:
                exact = exact * double(scale[0])[:, None] * double(scale[1])
            same = torch.empty(L, rows, columns, device="cuda", dtype=dtypes[1])
            reference.kron_mix_([same], [X], [w], scale)
            expected.append((out, same, exact))
    torch.ops.growkit.kron_mix_(*jobs)
    for out, same, exact in expected:
        assert_close_to_float64(out[0] if len(out) == 1 and out[0].ndim == 3 else torch.stack(list(out)), same, exact)
        if layout == "padded":
            padding = out[0].as_strided(
                (*out[0].shape[:1], 5), out[0].stride(), out[0].storage_offset() + out[0].shape[1]
            )
            assert (padding == 7).all()


def test_small_mix_of_more_jobs_than_one_launch_holds():
    X = [randn(2, 3, 1 + j % 9) for j in range(200)]
    out = [torch.empty(50, 3, 1 + j % 9, device="cuda") for j in range(200)]
    w = randn(50, 2)
    targets = [y for tensor in out for y in tensor]
    torch.ops.growkit.kron_mix_(targets, X, [w] * 200, [w.new_empty(0)] * 400)
    for x, y in zip(X, out, strict=True):
        torch.testing.assert_close(y, torch.einsum("ab,bij->aij", w.double(), x.double()).float())


def test_small_mix_of_nothing():
    empty = torch.empty(0, device="cuda")
    torch.ops.growkit.kron_mix_([], [], [], [])
    torch.ops.growkit.kron_mix_([randn(4, 0, 3)], [randn(2, 0, 3)], [randn(4, 2)], [empty] * 2)
    zero = randn(4, 5, 3)
    torch.ops.growkit.kron_mix_([zero], [randn(0, 5, 3)], [randn(4, 0)], [empty] * 2)
    assert not zero.any()  # a sum over no layers


@pytest.mark.parametrize("bad, message", [
    (lambda out, X, w, s: (out[:1], X, w, s), "needs 4 targets"),
    (lambda out, X, w, s: ([y[:, :2] for y in out], X, w, s), r"out must have the shape \[ 3 5 \], got \[ 3 2 \]"),
    (lambda out, X, w, s: (out, [X[0].double()], w, s), "X must be float32, bfloat16 or float16"),
    (lambda out, X, w, s: (out, X, [w[0].bfloat16()], s), "w must be float32"),
    (lambda out, X, w, s: (out, X, w, [s[0], w[0][0]]), "column scale must have the shape"),
    (lambda out, X, w, s: (out, X, [w[0].cpu()], s), "w must be on CUDA device"),
])  # fmt: skip
def test_small_mix_names_what_is_wrong(bad, message):
    empty = torch.empty(0, device="cuda")
    arguments = (list(randn(4, 3, 5)), [randn(2, 3, 5)], [randn(4, 2)], [empty, empty])
    with pytest.raises(RuntimeError, match=message):
        torch.ops.growkit.kron_mix_(*bad(*arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("L1", "L2"), [(1, 1), (6, 12), (12, 24), (22, 32), (24, 48), (64, 64), (3, 61), (63, 2)])
def test_small_mix_backward(dtype, L1, L2):
    for rows, columns in ((7, 33), (1, 1), (65, 128), (300, 1000)):
        G, U, w = randn(L2, rows, columns, dtype=dtype), randn(L1, rows, columns, dtype=dtype), randn(L2, L1)
        results = []
        for _ in range(2):
            mixed, dw = torch.empty_like(U), torch.empty_like(w)
            torch.ops.growkit.kron_mix_backward_(mixed, dw, G, U, w)
            results.append((mixed, dw))
        assert all(x.equal(y) for x, y in zip(*results, strict=True))  # run to run
        alone = torch.empty_like(U), torch.empty_like(w)
        torch.ops.growkit.kron_mix_backward_(alone[0], None, G, U, w)
        torch.ops.growkit.kron_mix_backward_(None, alone[1], G, U, w)
        assert alone[0].equal(mixed) and alone[1].equal(dw)
        same = torch.empty_like(U), torch.empty_like(w)
        reference.kron_mix_backward_(*same, G, U, w)
        exact = torch.einsum("ab,aij->bij", w.double(), G.double()), torch.einsum("aij,bij->ab", G.double(), U.double())
        assert_close_to_float64(mixed, same[0], exact[0])
        # of so many products of variance 1; the sum in one run of additions would be far off this
        assert (dw - exact[1]).abs().max().item() < 2e-6 * (rows * columns) ** 0.5


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("indexed", [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)])
def test_small_gather_is_exact_to_the_bit(dtype, indexed):
    for L, rows, columns in ((2, 3, 64), (3, 17, 33), (1, 1, 1), (2, 300, 1), (4, 100, 1000)):
        X = randn(L, rows, columns).mul(50).to(dtype)
        index = [
            torch.randint(n, (n + 5,), device="cuda") if on else None for n, on in zip(X.shape, indexed, strict=True)
        ]
        shape = [n if i is None else n + 5 for n, i in zip(X.shape, index, strict=True)]
        for source in (X, X.mT.contiguous().mT, torch.cat([X, X], 2)[..., :columns]):
            out, expected = (torch.zeros(shape, device="cuda", dtype=dtype) for _ in range(2))
            torch.ops.growkit.kron_gather_(out, source, *index)
            reference.kron_gather_(expected, source, *index)
            assert out.equal(expected)


KINDS = (None, "dense", "identity_top", "copy")


def case(B_kind, A_kind, o, i, L1, L2, dtype=torch.float32):
    def make(kind, old, new):
        if kind is None:
            return None
        if kind == "copy":
            return torch.randint(old, (new,), device="cuda")
        return randn(new - old if kind == "identity_top" else new, old, dtype=dtype) / old**0.5

    W, w = randn(L1, o[0], i[0], dtype=dtype), randn(L2, L1, dtype=dtype) / L1**0.5
    options = {"B_kind": B_kind or "dense", "A_kind": A_kind or "dense"}
    return [W, make(B_kind, *o), make(A_kind, *i), w], options


def relative(x, exact):
    return ((x.double() - exact).abs().max() / exact.abs().max()).item()


@pytest.mark.parametrize("B_kind", KINDS)
@pytest.mark.parametrize("A_kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_small_expansion_and_its_gradients(B_kind, A_kind, dtype, monkeypatch):
    monkeypatch.setattr(plan, "PANEL_BYTES", 6 * 96 * 4 * 20)
    monkeypatch.setattr(plan, "PENDING_BYTES", 6 * 96 * 4 * 20)
    inputs, options = case(B_kind, A_kind, (32, 96 if B_kind else 32), (24, 88 if A_kind else 24), 6, 12, dtype)
    exact_inputs = [None if x is None else double(x) for x in inputs]
    leaves = [
        [x.requires_grad_() for x in xs if x is not None and x.is_floating_point()] for xs in (exact_inputs, inputs)
    ]
    exact, fast = ops.kron_expand(*exact_inputs, **options), ops.kron_expand(*inputs, **options)
    G = randn(*exact.shape)
    expected, got = (torch.autograd.grad(y, xs, G.to(y)) for y, xs in zip((exact, fast), leaves, strict=True))
    limit = 2e-6 if dtype == torch.float32 else 3e-2
    for x, y in zip((fast, *got), (exact, *expected), strict=True):
        assert relative(x, y.detach()) < limit
    with torch.no_grad():
        assert relative(ops.kron_expand(*inputs, **options), exact) < limit
        out = [torch.empty(exact.shape[2], exact.shape[1], device="cuda", dtype=dtype).mT for _ in range(12)]
        ops.kron_expand_into([dict(zip("W B A w".split(), inputs, strict=True)) | dict(out=out) | options])
        assert relative(torch.stack(out), exact) < limit


LIMITS = {"highest": CUBLAS_ERROR, "high": 2e-3, "medium": 2e-2}


@GIGABYTES
@pytest.mark.parametrize("precision", LIMITS)
@pytest.mark.parametrize("kind", ["dense", "identity_top"])
@pytest.mark.parametrize("name", pairs.PAIRS)
def test_pairs_against_float64(name, kind, precision):
    """The square and the largest module of each pair, at full size: forward and gradients."""
    pair = pairs.PAIRS[name]
    for o, i in (((pair.d1, pair.d2), (pair.d1, pair.d2)), ((pair.f1, pair.f2), (pair.d1, pair.d2))):
        inputs, options = case(kind, kind, o, i, pair.L1, pair.L2)
        exact_inputs = [x.double() for x in inputs]
        for x in (*inputs[1:], *exact_inputs[1:]):
            x.requires_grad_()
        exact = ops.kron_expand(*exact_inputs, **options)
        G = randn(*exact.shape)
        expected = torch.autograd.grad(exact, exact_inputs[1:], G.double())
        exact = exact.detach()
        fast = ops.kron_expand(*inputs, **options, precision=precision)
        assert relative(fast.detach(), exact) < LIMITS[precision]
        got = torch.autograd.grad(fast, inputs[1:], G)
        # a gradient sums up to 10^7 products, whose order float32 alone feels
        for x, y in zip(got, expected, strict=True):
            assert relative(x, y) < 3 * LIMITS[precision]
        del exact, expected, fast, got, G


@GIGABYTES
@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("kind", ["dense", "identity_top"])
@pytest.mark.parametrize("name", pairs.PAIRS)
def test_growth_stays_within_its_memory(name, kind, precision):
    """Beside W: at most 64 MB and one module's stack, and never 2 GB."""
    pair = pairs.PAIRS[name]
    inputs, options = case(kind, kind, (pair.f1, pair.f2), (pair.d1, pair.d2), pair.L1, pair.L2)
    out = list(torch.empty(pair.L2, pair.f2, pair.d2, device="cuda"))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ops.kron_expand_into(
        [dict(zip("W B A w".split(), inputs, strict=True)) | dict(out=out, precision=precision) | options]
    )
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    assert extra <= min(4 * pairs.count(pair).largest_stack + (64 << 20), 2 << 30), f"{extra / 2**20:.0f} MB"


def test_kernels_run_on_the_current_stream():
    X, w, empty = randn(4, 512, 512), randn(8, 4), torch.empty(0, device="cuda")
    expected = torch.einsum("ab,bij->aij", w.double(), 2 * X.double()).float()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    out = torch.zeros(8, 512, 512, device="cuda")
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # what runs on another stream would not wait for this
        X.mul_(2)
        torch.ops.growkit.kron_mix_([out], [X], [w], [empty] * 2)
    side.synchronize()
    torch.testing.assert_close(out, expected)


def test_expansion_in_a_cuda_graph_follows_its_inputs():
    inputs, options = case("identity_top", "identity_top", (64, 96), (64, 96), 6, 12)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.no_grad():
        ops.kron_expand(*inputs, **options)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        W_new = ops.kron_expand(*inputs, **options)
    for _ in range(2):
        for x in inputs:
            x.normal_()
        graph.replay()
        exact = ops.kron_expand(*map(double, inputs), **options)
        assert relative(W_new, exact) < 2e-6


def test_the_same_run_twice_gives_the_same_bits():
    inputs, options = case("identity_top", "dense", (256, 320), (128, 192), 12, 24)
    for x in inputs:
        x.requires_grad_()
    runs = []
    for _ in range(2):
        W_new = ops.kron_expand(*inputs, **options)
        runs.append((W_new, *torch.autograd.grad(W_new.square().sum(), inputs)))
    assert all(x.equal(y) for x, y in zip(*runs, strict=True))
