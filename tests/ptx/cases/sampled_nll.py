"""The sampled likelihood and its gradient: within rounding of float64, labels those of the reference."""

import contextlib
import math

import torch

from growkit import reference
from growkit.kernels import sampled_nll

from .case import Case, Cases
from .compare import compare, relative, within
from .tensors import ALIGNED, BF16, F32, FP16, place

CASES: Cases = {}
TILE = sampled_nll.TILE.value
KEY = {"seed": 3, "refresh": 5}
LONG = 12 * TILE  # elements of full tiles in the row that is counted: a vocabulary such as GPT-2's


def logits(rows, V, dtype, around=(0, 0), scale=3):
    """[rows, V]; around: elements in front of and behind each row that do not belong to it."""
    front, back = around
    make = torch.Generator().manual_seed(rows * V)
    z = (scale * torch.randn(rows, V, generator=make)).to(dtype)
    whole = place(torch.zeros(rows * (V + front + back), dtype=dtype), "p").view(rows, V + front + back)
    return whole[:, front : front + V].copy_(z)


def uniform(rows, row=0):
    given = {"seed": KEY["seed"], "stream": reference.LABELS, "parameter": 0, "time": KEY["refresh"]}
    return (reference.random_bits(32, row, rows, **given) >> 8).double() * 2**-24


def label_test(z, row=0):
    """Labels are the reference's, but where the uniform is within 1e-5 of a boundary of the distribution."""

    def test(labels, expected, i):
        u = uniform(len(z), row)
        for n in (labels != expected).nonzero()[:, 0].tolist():
            p = z[n].double().softmax(-1)
            upper, y = p.cumsum(-1), int(labels[n])
            if not (p[y] > 0 and upper[y] - p[y] - 1e-5 <= u[n] <= upper[y] + 1e-5):
                return False
        return True

    return test


def gradient_error(z, lse, labels, weight, dtype):
    """What the roundings of weight * (exp2((z - lse) * log2 e) - onehot) come to at most, for each element."""
    z, finfo = z.detach(), torch.finfo(dtype)
    p, x = z.softmax(-1), (z - lse.double()[:, None]).abs()
    of_p = 2**-23 * (z.abs() + 4 * lse.double().abs()[:, None] + 4 * x) + 2**-21
    onehot = torch.nn.functional.one_hot(labels.clamp(min=0), z.shape[1])
    exact = (weight * (p - onehot)).abs()
    rounding = exact * (finfo.eps / 2 + 2**-22) + finfo.smallest_normal * finfo.eps
    return (weight * p * of_p + weight * onehot * 2**-23 + rounding + 2**-126).reshape(-1)


def _case(variant, shapes, dtype, *, around=(0, 0), masked=False, split=False, overwrite=False, row=0):
    def check(layout):
        eps, vector = torch.finfo(F32).eps, 16 // dtype.itemsize
        for rows, V in ((1, LONG + vector),) if layout is ALIGNED else shapes:
            z = logits(rows, V, dtype, around)
            before, mask = z.clone(), torch.arange(rows) % 3 != 1 if masked else None
            with contextlib.ExitStack() as stack:
                if split:
                    stack.callback(setattr, sampled_nll, "parts", sampled_nll.parts)
                    sampled_nll.parts = lambda *_: sampled_nll.PARTS
                nll, labels, lse = sampled_nll.sampled_nll(z, mask, **KEY, row=row)
            _, expected, _ = reference.sampled_nll(z, mask, **KEY, row=row)
            yield compare("labels", [labels], [expected], "1e-5 of a boundary", label_test(z, row))
            wide = z.double()
            yield compare("lse", [lse], [wide.logsumexp(-1).float()], "8 eps", relative(8 * eps, 8 * eps))
            loss = torch.nn.functional.cross_entropy(wide, labels)
            yield compare("nll", [nll], [loss.float()], "16 eps", relative(16 * eps, 16 * eps))
            wide.requires_grad_()
            torch.nn.functional.cross_entropy(wide, labels).backward(torch.tensor(7.0, dtype=torch.float64))
            out = z if overwrite else None
            if not overwrite and any(around):  # other rows, other alignment than the logits
                out = place(torch.full((rows * (V + 1),), math.nan, dtype=dtype), "p").view(rows, V + 1)[:, 1:]
            found = sampled_nll.sampled_nll_backward(torch.tensor(7.0), z, labels, lse, out=out)
            allowed = gradient_error(wide, lse, labels, 7 / int((labels >= 0).sum()), dtype)
            test = within([wide.grad], [allowed])
            yield compare("gradient", [found], [wide.grad.to(dtype)], "float32 rounding", test)
            if not overwrite:
                yield compare("logits untouched", [z], [before])

    CASES["sampled_nll", variant] = Case(check, None if any(around) else LONG)


# One element, less than a vector, no full tile, tiles with nothing, little and much behind them.
SHAPES = ((3, 1), (5, 7), (4, 100), (3, TILE), (3, TILE + 7), (2, 2 * TILE + 1500))
for name, each in (("float32", F32), ("bfloat16", BF16), ("float16", FP16)):
    _case(name, SHAPES, each)
for name, each in (("float32", F32), ("bfloat16", BF16)):
    _case(f"{name}, unaligned rows, mask", ((5, 37), (4, TILE + 801)), each, around=(3, 2), masked=True)
    shapes = ((3, TILE + 801), (2, 5 * TILE + 3))
    _case(f"{name}, unaligned rows, overwrite", shapes, each, around=(1, 4), overwrite=True)
    _case(f"{name}, split rows", ((3, 3), (2, TILE + 5), (3, 5 * TILE + 3)), each, split=True)
_case("bfloat16, mask, overwrite", ((5, 37), (4, TILE + 800)), BF16, masked=True, overwrite=True, row=2**40)


def _no_distribution(layout):
    """Rows with NaN, infinities or nothing above -inf: label V-1, NaN likelihood, and no trace of it in other rows."""
    for V in (4, TILE + 100):
        for bad in (math.nan, math.inf, -math.inf):
            z = logits(3, V, F32)
            _, good, _ = sampled_nll.sampled_nll(z, **KEY)
            z[1, ... if bad == -math.inf else V // 2] = bad
            nll, labels, lse = sampled_nll.sampled_nll(z, **KEY)
            _, expected, _ = reference.sampled_nll(z, **KEY)
            yield compare("labels", [labels], [expected])
            yield compare("other labels", [labels[::2]], [good[::2]])
            finite = torch.stack((nll.isfinite(), *lse.isfinite())).to(torch.int64)
            yield compare("finite", [finite], [torch.tensor([0, 1, 0, 1])])
            mask = torch.tensor([True, False, True])
            _, labels, lse = sampled_nll.sampled_nll(z, mask, **KEY)
            found = sampled_nll.sampled_nll_backward(torch.ones(()), z, labels, lse)
            yield compare("masked gradient", [found[1]], [torch.zeros(V)])
            yield compare("finite gradient", [found.isfinite().to(torch.int64)], [torch.ones(3, V, dtype=torch.int64)])


CASES["sampled_nll", "rows without a distribution"] = Case(_no_distribution, elements=None)
