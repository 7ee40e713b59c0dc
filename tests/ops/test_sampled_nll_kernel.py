"""The kernels of the sampled NLL against the reference and float64: compiled where there is a GPU, else interpreted.

Interpreted, a row costs some 20 ms, so shapes are small here. What tests/ptx shows of the compiled kernels on a CPU is
marked `gpu`, as what is large.
"""

import math

import pytest
import torch

from growkit import reference

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
kernels = pytest.importorskip("growkit.kernels.sampled_nll")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GIGABYTES = pytest.mark.xdist_group("gigabytes of the GPU, sampled_nll")  # one worker, so that all of them fit
KEY = {"seed": 3, "refresh": 5}
TILE = kernels.TILE.value
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One element, less than a vector, no full tile, tiles with nothing, little and much behind them, GPT-2's vocabulary.
SHAPES = [(3, 1), (5, 7), (4, 100), (3, TILE), (3, TILE + 7), (3, 2 * TILE + 1500), (2, 50257)]


def logits(rows, V, dtype=torch.float32, scale=3):
    return (scale * torch.randn(rows, V)).to(dtype).to(DEVICE)


def uniform(rows, row=0, *, seed, refresh):
    key = {"seed": seed, "stream": reference.LABELS, "parameter": 0, "time": refresh}
    return (reference.random_bits(32, row, rows, **key) >> 8).double() * 2**-24


def check_labels(z, labels, key=KEY, row=0):
    """Labels are the reference's, but where the uniform is within 1e-5 of a boundary; returns how many those are."""
    z, labels = z.cpu(), labels.cpu()
    other = (labels != reference.sampled_nll(z, **key, row=row)[1]).nonzero()[:, 0]
    u = uniform(len(z), row, **key)
    for n in other.tolist():
        p = z[n].double().softmax(-1)
        upper, y = p.cumsum(-1), labels[n].item()
        assert p[y] > 0 and upper[y] - p[y] - 1e-5 <= u[n] <= upper[y] + 1e-5
    return len(other)


def check_values(z, nll, labels, lse, mask=None):
    wide = z.cpu().double()
    expected = torch.nn.functional.cross_entropy(wide, labels.cpu())
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(lse.cpu().double(), wide.logsumexp(-1), rtol=8 * eps, atol=8 * eps)
    torch.testing.assert_close(nll.cpu().double(), expected, rtol=16 * eps, atol=16 * eps, equal_nan=True)
    assert nll.dtype == lse.dtype == torch.float32 and nll.dim() == 0 and labels.dtype == torch.int64


def check_gradient(found, grad, z, labels):
    wide = z.cpu().double().requires_grad_()
    torch.nn.functional.cross_entropy(wide, labels.cpu()).backward(torch.tensor(float(grad), dtype=torch.float64))
    # Interpreted, conversions to bfloat16 cut off; on a GPU they round to nearest.
    step = torch.finfo(z.dtype).eps * (1 if DEVICE == "cpu" else 0.5) + 1e-5
    tiny = torch.finfo(z.dtype).smallest_normal * step
    torch.testing.assert_close(found.cpu().double(), wide.grad, rtol=step, atol=max(tiny, 1e-7 * abs(grad) / len(z)))
    assert found.dtype == z.dtype and found.shape == z.shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 5), *(pytest.param(s, marks=pytest.mark.gpu) for s in SHAPES)], ids=str)
def test_every_shape_and_dtype(shape, dtype):
    z = logits(*shape, dtype)
    nll, labels, lse = kernels.sampled_nll(z, **KEY)
    assert check_labels(z, labels) <= 1
    check_values(z, nll, labels, lse)
    grad = torch.tensor(7.0, device=DEVICE)
    found = kernels.sampled_nll_backward(grad, z, labels, lse)
    if len(z):
        check_gradient(found, 7, z, labels)
    again = kernels.sampled_nll(z, **KEY)
    assert all(torch.equal(a, b) for a, b in zip(again, (nll, labels, lse), strict=True)) or not len(z)


LAYOUTS = {
    "padded vocabulary": lambda z: torch.nn.functional.pad(z, (0, 13))[:, :-13],
    "unaligned base": lambda z: torch.nn.functional.pad(z, (3, 2))[:, 3:-2],
    "every other row": lambda z: z.repeat_interleave(2, 0)[::2],
    "one row for all": lambda z: z[:1].expand(len(z), -1),
    "columns first": lambda z: z.mT.contiguous().mT,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [
    pytest.param(name, marks=pytest.mark.gpu) if name in ("padded vocabulary", "unaligned base") else name
    for name in LAYOUTS
])  # fmt: skip
def test_layouts(layout, dtype):
    z = LAYOUTS[layout](logits(4, TILE + 801, dtype))
    before = z.clone()
    nll, labels, lse = kernels.sampled_nll(z, **KEY)
    assert check_labels(z, labels) <= 1
    check_values(z, nll, labels, lse)
    found = kernels.sampled_nll_backward(torch.ones((), device=DEVICE), z, labels, lse)
    check_gradient(found, 1, z, labels)
    assert torch.equal(z, before) and found.stride() == torch.empty_like(z).stride()


@pytest.mark.gpu
@pytest.mark.parametrize("V", [3, TILE + 5, 5 * TILE + 3])
def test_split_rows(V, monkeypatch):
    """More programs than steps, and steps that do not divide evenly: some parts are empty."""
    z = logits(3, V, torch.bfloat16)
    whole = kernels.sampled_nll(z, **KEY)
    monkeypatch.setattr(kernels, "parts", lambda *_: kernels.PARTS)
    nll, labels, lse = kernels.sampled_nll(z, **KEY)
    assert check_labels(z, labels) <= 1
    check_values(z, nll, labels, lse)
    torch.testing.assert_close(nll, whole[0])


@pytest.mark.parametrize("counted", [(0, 2, 3), (4,), ()], ids=str)
def test_mask(counted):
    z = logits(5, 37, torch.bfloat16)
    mask = torch.zeros(10, dtype=torch.bool, device=DEVICE)[::2]
    mask[list(counted)] = True
    nll, labels, lse = kernels.sampled_nll(z, mask, **KEY)
    everywhere = kernels.sampled_nll(z, **KEY)
    assert torch.equal(labels, everywhere[1].masked_fill(~mask, -100)) and torch.equal(lse, everywhere[2])
    check_values(z, nll, labels, lse)
    if not counted:
        assert nll.isnan()
    z[~mask] = math.nan  # of a masked row nothing may matter
    found = kernels.sampled_nll_backward(torch.ones((), device=DEVICE), z, labels, lse)
    assert not found[~mask].any() and found.isfinite().all()
    if counted:
        check_gradient(found[mask], 1, z[mask], labels[mask])


@pytest.mark.parametrize("row", [1, 2, 3, 2**31 - 2, 2**32 - 2, 2**40])
def test_labels_depend_on_the_global_row_alone(row):
    z = logits(3, 11)
    labels = kernels.sampled_nll(z, **KEY, row=row)[1]
    assert check_labels(z, labels, row=row) == 0
    assert torch.equal(kernels.sampled_nll(z[2:], **KEY, row=row + 2)[1], labels[2:])


@pytest.mark.parametrize("key", [{"seed": 2**63 + 7, "refresh": 2**32 - 1}, {"seed": -1, "refresh": 2**31}], ids=str)
def test_large_keys(key):
    z = logits(8, 50)
    assert check_labels(z, kernels.sampled_nll(z, **key)[1], key) == 0


@pytest.mark.parametrize("V", [7, TILE + 100, 2 * TILE + 1500])
@pytest.mark.parametrize(("row", "u"), [(18150528, 0), (15899685, 1 - 2**-24)])
def test_extreme_uniforms(row, u, V):
    """The two rows of 2^24 or so that draw the first and the last possible number: ends of the range of labels."""
    assert uniform(1, row, **KEY) == u
    z = logits(1, V)
    z[0, :2] = z[0, -2:] = -math.inf
    z[0, 2] = z[0, -3] = -200  # of probability 0 in float32
    label = kernels.sampled_nll(z, **KEY, row=row)[1]
    check_labels(z, label, row=row)  # the uniform is within 1e-5 of the end, and so must the label's share be
    assert z[0, label] > -200 and (label == 3 or u)


@triton.jit
def search_kernel(z, sums, target, results, V, choose: tl.constexpr, search: tl.constexpr):
    chosen, left = choose(tl.load(sums + tl.arange(0, 16)), target)
    tl.store(results, chosen)
    tl.store(results + 1, search(z, 1, V, 0.0, target))


def test_rounding_never_leads_to_an_impossible_label():
    """A target that rounding left below 0 or above the sum of all ends at the first or last positive probability."""
    V, inf = 700, math.inf
    z = torch.full((V,), -inf, device=DEVICE)
    z[[0, 40, 41, 300, 600]] = 0.0  # 0 lies before the searched range
    sums = torch.zeros(16, device=DEVICE)
    sums[[2, 3, 9]] = 1.0
    for target, chosen, label in [
        (-1e-9, 2, 40),
        (0.0, 2, 40),
        (1.0, 3, 41),
        (2.5, 9, 300),
        (3.5, 9, 600),
        (99, 9, 600),
    ]:
        results = torch.empty(2, dtype=torch.int32, device=DEVICE)
        arguments = z, sums, float(target), results, V, kernels._choose, kernels._search
        search_kernel[(1,)](*arguments, num_warps=8, enable_fp_fusion=True)
        assert results.tolist() == [chosen, label]


def test_masked_vocabulary():
    """One or two possible labels in a long row, in its head, runs and tail: no impossible one is ever drawn."""
    V = 2 * TILE + 900
    places = [0, 1, 5, 300, 511, 512, TILE, 2 * TILE - 1, 2 * TILE + 1, V - 1]
    z = torch.full((2 * len(places), V), -math.inf, device=DEVICE)[:, 1:]
    for n, y in enumerate(places):
        z[n, min(y, V - 2)] = -50.0
        z[len(places) + n, [min(y, V - 2), 4000]] = 2.0
    nll, labels, lse = kernels.sampled_nll(z, **KEY)
    assert check_labels(z, labels) == 0 and z.gather(1, labels[:, None]).isfinite().all()
    check_values(z, nll, labels, lse)
    check_gradient(kernels.sampled_nll_backward(torch.ones((), device=DEVICE), z, labels, lse), 1, z, labels)


def test_huge_logits():
    inf = math.inf
    z = torch.tensor([[1e4, -1e4, 0], [-1e4] * 3, [-inf, 0, -inf], [1e4, 1e4, -inf], [-3e38] * 3, [3e38, -3e38, 1]])
    z = z.to(DEVICE)
    nll, labels, lse = kernels.sampled_nll(z, **KEY)
    assert labels[0] == 0 and labels[2] == 1 and labels[3] in (0, 1) and labels[5] == 0
    check_values(z, nll, labels, lse)  # subtracting the maximum first keeps what 1e4 + log 3 rounds away
    found = kernels.sampled_nll_backward(torch.ones((), device=DEVICE), z, labels, lse)
    assert found.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("V", [4, TILE + 100])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_without_a_distribution(bad, V):
    """Label V-1 and a NaN likelihood, as in the reference; other rows are not touched by it."""
    z = logits(3, V)
    good = kernels.sampled_nll(z, **KEY)[1]
    z[1, ... if bad == -math.inf else V // 2] = bad
    nll, labels, lse = kernels.sampled_nll(z, **KEY)
    assert labels[1] == V - 1 and nll.isnan() and not lse[1].isfinite()
    assert torch.equal(labels[::2], good[::2]) and lse[::2].isfinite().all()
    assert torch.equal(labels.cpu(), reference.sampled_nll(z.cpu(), **KEY)[1])
    mask = torch.tensor([True, False, True], device=DEVICE)
    nll, labels, lse = kernels.sampled_nll(z, mask, **KEY)
    assert nll.isfinite()
    assert kernels.sampled_nll_backward(torch.ones((), device=DEVICE), z, labels, lse).isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backward_into_the_logits(dtype):
    z = torch.nn.functional.pad(logits(3, TILE + 801, dtype), (0, 5))[:, :-5]
    _, labels, lse = kernels.sampled_nll(z, **KEY)
    grad = torch.tensor(0.5, device=DEVICE)
    expected = kernels.sampled_nll_backward(grad, z, labels, lse)
    other = torch.empty(3, TILE + 802, dtype=dtype, device=DEVICE)[:, 1:]  # other rows, other alignment than z
    assert kernels.sampled_nll_backward(grad, z, labels, lse, out=other) is other and torch.equal(other, expected)
    assert kernels.sampled_nll_backward(grad, z, labels, lse, out=z) is z and torch.equal(z, expected)


def test_backward_into_saved_logits_is_refused_by_autograd():
    x = logits(3, 7).requires_grad_()
    z = x.tanh()  # tanh needs its own result
    _, labels, lse = kernels.sampled_nll(z.detach(), **KEY)
    d = kernels.sampled_nll_backward(torch.ones((), device=DEVICE), z.detach(), labels, lse, out=z.detach())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.backward(d)


def test_bad_arguments():
    z = logits(3, 7)
    _, labels, lse = kernels.sampled_nll(z, **KEY)
    grad, before = torch.ones((), device=DEVICE), z._version
    for words, out in [
        (r"float16 \(3, 7\).*expected torch.float32 \(3, 7\)", z.half()),
        (r"\(7, 3\).*expected.*\(3, 7\)", logits(7, 3)),
        (r"strides \(1, 3\), expected \(at least 7, 1\)", logits(7, 3).mT),
        (r"strides \(0, 1\)", logits(1, 7).expand(3, -1)),
    ]:
        with pytest.raises(ValueError, match=words):
            kernels.sampled_nll_backward(grad, z, labels, lse, out=out)
    assert z._version == before
    with pytest.raises(TypeError, match="float64, expected one of"):
        kernels.sampled_nll(z.double(), **KEY)
    with pytest.raises(ValueError, match=r"\(3, 0\).*0 < V"):
        kernels.sampled_nll(z[:, :0], **KEY)


# --- what needs a GPU ---


@GIGABYTES
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "V"), [(2048, 50257), (512, 262144), (64, 262147), (4097, 32000)])
def test_large(rows, V, dtype):
    """With whole and split rows; labels as on the CPU."""
    z = logits(rows, V, dtype)
    nll, labels, lse = kernels.sampled_nll(z, **KEY)
    assert check_labels(z, labels) <= max(2, rows // 100)
    torch.testing.assert_close(lse, z.float().logsumexp(-1), rtol=1e-6, atol=1e-6)
    found = kernels.sampled_nll_backward(torch.ones((), device=DEVICE), z, labels, lse)
    for a in range(0, rows, 64):
        part = slice(a, a + 64)
        wide = z[part].double().softmax(-1)
        wide.scatter_add_(1, labels[part, None], torch.full_like(wide[:, :1], -1))
        step = torch.finfo(dtype).eps / 2 + 1e-5
        tiny = torch.finfo(dtype).smallest_normal * 2 * step
        torch.testing.assert_close(found[part].double(), wide / rows, rtol=step, atol=max(tiny, 1e-7 / rows))
    again = kernels.sampled_nll(z, **KEY)
    assert all(torch.equal(a, b) for a, b in zip(again, (nll, labels, lse), strict=True))


@GIGABYTES
@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    rows, V = 45000, 50257
    z = torch.randn(rows, V, dtype=torch.bfloat16, device=DEVICE)
    assert z.numel() > 2**31
    _, labels, lse = kernels.sampled_nll(z, **KEY)
    last = slice(rows - 32, rows)
    assert check_labels(z[last], labels[last], row=rows - 32) <= 1
    torch.testing.assert_close(lse[last], z[last].float().logsumexp(-1), rtol=1e-6, atol=1e-6)
    expected = z[last].float().softmax(-1)
    kernels.sampled_nll_backward(torch.tensor(float(rows), device=DEVICE), z, labels, lse, out=z)
    expected.scatter_add_(1, labels[last, None], torch.full_like(expected[:, :1], -1))
    torch.testing.assert_close(z[last].float(), expected, rtol=0.005, atol=1e-6)


@GIGABYTES
@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "per_row"), [(4096, 32), (64, 1200)])
def test_memory_is_a_few_bytes_per_row(rows, per_row):
    z = logits(rows, 65536, torch.bfloat16)
    grad = torch.ones((), device=DEVICE)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    _, labels, lse = kernels.sampled_nll(z, **KEY)
    kernels.sampled_nll_backward(grad, z, labels, lse, out=z)
    assert torch.cuda.max_memory_allocated() - before <= per_row * rows + 16384  # torch rounds each up to 512 bytes


@pytest.mark.gpu
def test_no_host_synchronisation_and_no_recompilation():
    z, mask = logits(64, 1000), torch.ones(64, dtype=torch.bool, device=DEVICE)
    grad = torch.ones((), device=DEVICE)
    _, labels, lse = kernels.sampled_nll(z, mask, **KEY)
    kernels.sampled_nll_backward(grad, z, labels, lse)
    compiled = [kernels.sample_kernel, kernels.backward_kernel]
    before = [sum(len(entry[0]) for entry in kernel.device_caches.values()) for kernel in compiled]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for refresh, row, V in [(1, 0, 1000), (16, 16, 999), (2**31, 2**31, 16), (2**32 - 1, 2**40, 1)]:
            view = z[:, -V:]
            _, labels, lse = kernels.sampled_nll(view, mask, seed=2**63 + refresh, refresh=refresh, row=row)
            kernels.sampled_nll_backward(grad, view, labels, lse, out=view)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert before == [sum(len(entry[0]) for entry in kernel.device_caches.values()) for kernel in compiled]
