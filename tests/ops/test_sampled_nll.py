"""Likelihood of sampled labels: the oracle against exact statistics and cross-entropy, and the op's autograd."""

import math

import pytest
import torch

from growkit import ops
from growkit.reference import blocks

KEY = {"seed": 3, "refresh": 5}


@pytest.mark.parametrize("block", [64, 1 << 17])
def test_sampled_labels_follow_the_softmax(block, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", block)
    rows, z = 20000, torch.tensor([0.3, -1.0, 2.0, -math.inf, 0.0, 1.5, -math.inf])
    _, labels, _ = ops.sampled_nll(z.expand(rows, -1), **KEY)
    expected = z.softmax(-1) * rows
    found = torch.bincount(labels, minlength=7)
    possible = expected > 0
    assert not found[~possible].any()
    chi2 = ((found - expected) ** 2 / expected)[possible].sum()
    assert chi2 < 4 + 5 * math.sqrt(8)  # 4 degrees of freedom: mean 4, variance 8
    # Successive rows are independent: the joint counts of neighbours factorise.
    pairs = torch.bincount(labels[::2] * 7 + labels[1::2], minlength=49).view(7, 7)
    joint = torch.outer(z.softmax(-1), z.softmax(-1)) * rows / 2
    chi2 = ((pairs - joint) ** 2 / joint)[joint > 0].sum()
    assert chi2 < 24 + 5 * math.sqrt(48)


def test_sampled_labels_depend_on_the_global_row_alone(monkeypatch):
    z = torch.randn(50, 11)
    _, labels, _ = ops.sampled_nll(z, **KEY)
    monkeypatch.setattr(blocks, "BLOCK", 11)
    parts = [ops.sampled_nll(z[a:b], **KEY, row=a)[1] for a, b in [(0, 20), (20, 21), (21, 50)]]
    assert torch.equal(torch.cat(parts), labels)
    assert not torch.equal(ops.sampled_nll(z, seed=3, refresh=6)[1], labels)
    assert not torch.equal(ops.sampled_nll(z, seed=4, refresh=5)[1], labels)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sampled_nll_is_cross_entropy_of_its_labels(dtype, masked, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 40)
    z = (3 * torch.randn(33, 17)).to(dtype).requires_grad_()
    mask = torch.arange(33) % 3 != 0 if masked else None
    nll, labels, lse = ops.sampled_nll(z, mask, **KEY)
    assert ((labels == -100) == ~(mask if masked else torch.ones(33, dtype=torch.bool))).all()
    wide = z.detach().double().requires_grad_()
    exact = torch.nn.functional.cross_entropy(wide, labels)
    bound = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    torch.testing.assert_close(nll.double(), exact, rtol=20 * bound, atol=0)
    torch.testing.assert_close(lse.double(), wide.logsumexp(-1), rtol=20 * bound, atol=20 * bound)
    (7 * nll).backward()
    (7 * exact).backward()
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(z.grad.double(), wide.grad, rtol=max(step, 100 * bound), atol=10 * bound)
    assert z.grad.dtype == dtype and (not masked or not z.grad[~mask].any())


def test_sampled_nll_gradcheck():
    z = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([True, True, False, True, True, False])
    # Labels are constant in a neighbourhood of almost every z.
    assert torch.autograd.gradcheck(lambda z: ops.sampled_nll(z, mask, **KEY)[0], z, eps=1e-7)


def test_sampled_nll_of_extreme_logits():
    z = torch.tensor(
        [[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [-math.inf, 0.0, -math.inf], [1e4, 1e4, -math.inf]], requires_grad=True
    )
    nll, labels, _ = ops.sampled_nll(z, **KEY)
    nll.backward()
    assert nll.isfinite() and z.grad.isfinite().all()
    assert labels[0] == 0 and labels[2] == 1 and labels[3] in (0, 1)
    assert abs(nll.item() * 4 - (math.log(3) + math.log(2))) < 1e-2  # 1e4 has steps of 1e-3 in float32


def test_sampled_nll_of_a_nan_row_is_nan_and_a_masked_one_harmless():
    z = torch.randn(3, 4)
    z[1] = math.nan
    mask = torch.tensor([True, False, True])
    assert ops.sampled_nll(z, **KEY)[0].isnan()
    z.requires_grad_()
    nll = ops.sampled_nll(z, mask, **KEY)[0]
    nll.backward()
    assert nll.isfinite() and z.grad.isfinite().all()


def test_no_rows_give_nan_without_a_gradient():
    for rows, mask in ((0, None), (3, torch.zeros(3, dtype=torch.bool))):
        z = torch.randn(rows, 4, requires_grad=True)
        nll, _, _ = ops.sampled_nll(z, mask, **KEY)
        assert nll.isnan()
        (nll * 0).backward()
        assert not z.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sampled_nll_may_write_its_gradient_over_the_logits(dtype):
    x, mask = torch.randn(6, 8, dtype=dtype), torch.tensor([True, True, False, True, True, True])
    gradients = []
    for overwrite in (False, True):
        w = torch.randn(8, 50, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
        logits = x @ w
        seen = []
        logits.register_hook(seen.append)
        nll, labels, _ = ops.sampled_nll(logits, mask, **KEY, overwrite=overwrite)
        nll.backward()
        assert (seen[0].data_ptr() == logits.data_ptr()) == overwrite
        gradients.append((w.grad, labels))
    assert all(map(torch.equal, *gradients))


def test_logits_that_another_node_needs_are_not_overwritten_unnoticed():
    logits = torch.randn(4, 9, requires_grad=True).tanh()  # whose backward reads its result
    nll, _, _ = ops.sampled_nll(logits, **KEY, overwrite=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        nll.backward()


# --- contract ---

LOGITS = torch.randn(4, 3, requires_grad=True)
CHECKS = {
    "plain": ((LOGITS,), KEY),
    "overwrite": ((LOGITS,), {**KEY, "overwrite": True}),
    "mask": ((LOGITS, torch.tensor([True, False, True, True])), KEY),
}


@pytest.mark.parametrize("case", CHECKS)
def test_opcheck(case):
    tests = ["test_schema", "test_faketensor", "test_autograd_registration"]
    tests += ["test_aot_dispatch_dynamic"] if case == "mask" else []
    torch.library.opcheck(torch.ops.growkit.sampled_nll.default, *CHECKS[case], test_utils=tests)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((torch.zeros(2, 3, 4),), [r"\(2, 3, 4\)", r"\[rows, V\]"]),
        ((torch.zeros(4, 3), torch.ones(3, dtype=torch.bool)), [r"\(3,\)", r"\[4\]"]),
        ((torch.zeros(4, 3), torch.ones(4)), ["float32", "bool"]),
    ],
)
def test_fake_raises_and_names_both_shapes(args, words, fake_call):
    fake_call("sampled_nll", args, KEY, words)
