"""SophiaG and SophiaH with 8-bit state: beside float32 state, in files, and after 1,000 steps."""

import copy
import io
import pickle

import pytest
import torch
from torch.nn import Parameter

from growkit import reference
from growkit.optim import SophiaG, SophiaH

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F32, BF16 = torch.float32, torch.bfloat16
UNSIGNED, SIGNED = torch.uint8, torch.int8


def params(*shapes, dtype=F32):
    make = torch.Generator().manual_seed(1)
    return [Parameter(torch.randn(s, generator=make).to(dtype).to(DEVICE)) for s in shapes or ((70, 64), (9,))]


def drive(optimizer, first=0, steps=6):
    for step in range(first, first + steps):
        for refreshing in (False, True)[: 1 + (step % 3 == 2)]:
            make = torch.Generator().manual_seed(2 * step + refreshing)
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.grad = (1e-2 * torch.randn(p.shape, generator=make)).to(p.dtype).to(DEVICE)
            optimizer.update_hessian() if refreshing else optimizer.step()
    return [p.detach() for group in optimizer.param_groups for p in group["params"]]


def dequantised(optimizer, i=0):
    state = optimizer.state[optimizer.param_groups[0]["params"][i]]
    if "exp_avg_scale" not in state:
        return state["exp_avg"], state["hessian"]
    return tuple(reference.dequantise(state[k], state[k + "_scale"]) for k in ("exp_avg", "hessian"))


def everything(optimizer):
    return [t for p, s in optimizer.state.items() for t in (p, *(s[key] for key in sorted(s)))]


BOTH = pytest.mark.parametrize("cls", [SophiaG, SophiaH])


@BOTH
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_state_is_a_quarter_and_stays_beside_float32_state(cls, dtype):
    a, b = cls(params(dtype=dtype), 1e-3, state_dtype="8bit"), cls(params(dtype=F32), 1e-3)
    drive(a, steps=30), drive(b, steps=30)
    large, small = (a.state[p] for p in a.param_groups[0]["params"])
    assert (large["exp_avg"].dtype, large["hessian"].dtype) == (SIGNED, UNSIGNED if cls is SophiaG else SIGNED)
    assert large["exp_avg_scale"].shape == large["hessian_scale"].shape == (18, 2)
    assert small["exp_avg"].dtype == F32 and "exp_avg_scale" not in small  # fewer than 4096 elements
    assert sum(t.nbytes for k, t in large.items() if k != "step") == 2 * (70 * 64 + 18 * 8)
    for x, y in zip(dequantised(a), dequantised(b), strict=True):
        assert (x - y).abs().mean() < 0.15 * y.abs().mean()
        assert abs(float((x * y).sum() / y.square().sum()) - 1) < 0.01


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64], ids=str)
def test_wider_parameters_keep_wide_state(dtype):
    a, b = (SophiaG(params((70, 64), dtype=dtype), 1e-3, state_dtype=s) for s in ("8bit", None))
    assert all(map(torch.equal, drive(a), drive(b))) and "hessian_scale" not in next(iter(a.state.values()))


def through_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def reloaded(optimizer):
    fresh = type(optimizer)([{"params": g["params"]} for g in optimizer.param_groups], 0.5, seed=77)
    fresh.load_state_dict(through_file(optimizer.state_dict()))
    return fresh


@BOTH
@pytest.mark.parametrize("way", [reloaded, copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_continue_bit_for_bit(cls, way):
    mode = {"dtype": F32} if way is reloaded else {"dtype": BF16}
    whole, half = (cls(params(**mode), 1e-3, state_dtype="8bit") for _ in range(2))
    drive(whole)
    drive(half, steps=3)
    half = way(half)
    drive(half, first=3, steps=3)
    assert half.param_groups[0]["state_dtype"] == "8bit"
    assert all(map(torch.equal, everything(half), everything(whole)))


@BOTH
def test_files_with_float32_state_are_quantised_and_the_other_way(cls):
    wide = cls(params(), 1e-3)
    drive(wide)
    narrow = cls(params(), 1e-3, state_dtype="8bit")
    narrow.load_state_dict(through_file(wide.state_dict()))
    state = narrow.state[narrow.param_groups[0]["params"][0]]
    assert state["exp_avg"].dtype == SIGNED and narrow.param_groups[0]["state_dtype"] == "8bit"
    for x, y in zip(dequantised(narrow), dequantised(wide), strict=True):
        torch.testing.assert_close(x, y, rtol=0.2, atol=0)
    back = cls(params(), 1e-3, state_dtype=F32)
    back.load_state_dict(through_file(narrow.state_dict()))
    assert "exp_avg_scale" not in back.state[back.param_groups[0]["params"][0]]
    assert all(map(torch.equal, dequantised(back), dequantised(narrow)))
    for optimizer in (narrow, back):
        drive(optimizer, first=6, steps=3)
    official = {
        "state": wide.state_dict()["state"],
        "param_groups": [{"params": [0, 1], "lr": 0.1, "bs": wide.param_groups[0]["bs"]}],
    }
    with pytest.warns(UserWarning, match="has no"):
        narrow.load_state_dict(official)
    for x, y in zip(dequantised(narrow), dequantised(wide), strict=True):
        torch.testing.assert_close(x, y, rtol=0.2, atol=0)


def test_codes_of_the_other_class_are_refused():
    a = SophiaH(params(), 1e-3, state_dtype="8bit")
    drive(a)
    b = SophiaG(params(), 1e-3)
    with pytest.raises(ValueError, match="curvature is that of hutchinson, expected gnb"):
        b.load_state_dict(a.state_dict())


BROKEN = {
    "exp_avg_scale": (lambda t: t[:3], ValueError, r"exp_avg_scale\[0\] is .* \(3, 2\) .* expected .* \(18, 2\)"),
    "exp_avg": (torch.Tensor.float, TypeError, r"exp_avg\[0\] is torch.float32 .* expected contiguous torch.int8"),
    "hessian_scale": (None, ValueError, "expected .'hessian_scale'. as well"),
}


@pytest.mark.parametrize("key", BROKEN)
def test_a_file_that_does_not_fit_changes_nothing(key):
    change, error, words = BROKEN[key]
    optimizer = SophiaG(params(), 1e-3, state_dtype="8bit")
    drive(optimizer)
    file = copy.deepcopy(optimizer.state_dict())
    value = file["state"][0].pop(key)
    if change is not None:
        file["state"][0][key] = change(value)
    before = [t.clone() for t in everything(optimizer)]
    with pytest.raises(error, match=words):
        optimizer.load_state_dict(file)
    assert all(map(torch.equal, before, everything(optimizer)))


def test_compiled_step_equals_the_eager_one():
    eager, compiled = (SophiaG(params(), torch.tensor(1e-3), state_dtype="8bit") for _ in range(2))
    drive(eager), drive(compiled)
    step = torch.compile(compiled.step, backend="aot_eager")
    for optimizer, function in ((eager, eager.step), (compiled, step)):
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.full_like(p, 1e-3)
        function(), function()
    assert all(map(torch.equal, everything(eager), everything(compiled)))


@pytest.mark.parametrize(("cls", "decades", "median", "tail"), [(SophiaG, 2, 0.04, 0.16), (SophiaG, 10, 0.15, 0.6)])
def test_accuracy_over_1000_steps_against_float32_state(cls, decades, median, tail):
    """100 refreshes of curvatures that spread over `decades` in every block; the same gradients for both."""
    make = torch.Generator().manual_seed(3)
    curvature = 10 ** (-6 - decades * torch.rand(4096, generator=make)).to(DEVICE)
    a, b = (cls([Parameter(torch.zeros(4096, device=DEVICE))], 1e-3, state_dtype=s) for s in ("8bit", None))
    for step in range(1000):
        for refreshing in (False, True)[: 1 + (step % 10 == 9)]:
            g = curvature.sqrt() * torch.randn(4096, generator=make).to(DEVICE)
            for optimizer in (a, b):
                optimizer.param_groups[0]["params"][0].grad = g
                optimizer.update_hessian() if refreshing else optimizer.step(bs=1)
    (m, h), (m32, h32) = dequantised(a), dequantised(b)
    error = (h / h32 - 1).sort().values
    size = error.abs().sort().values
    assert size[2048] < median and size[4096 * 99 // 100] < tail and abs(error.mean()) < 6 * error.std() / 64
    assert (m.sign() == m32.sign()).float().mean() > 0.95
    assert ((m - m32) / curvature.sqrt()).square().mean().sqrt() < 0.2 * (m32 / curvature.sqrt()).square().mean().sqrt()
