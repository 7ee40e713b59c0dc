"""8-bit state: the codes, the kernels against the reference, and the schemas of the ops.

Kernels run on a GPU where there is one, else in Triton's interpreter.
"""

import pytest
import torch

from growkit import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = (0, 1, 63, 257, 4096, 4396)
SCALARS = {"lr": 6e-4, "beta1": 0.965, "rho_bs": 256.0, "eps": 1e-15, "weight_decay": 0.2}
KEY = {"seed": 0x1234_5678_9ABC_DEF1, "parameter": list(range(3, 3 + len(SIZES)))}
# Starts of shards: of a block of random bits, within one, beyond 32 bits, beyond 32 bits of blocks.
OFFSETS = [0, 1, 32, 8, 2**33 + 32, 2**40 + 7]
F32, BF16 = torch.float32, torch.bfloat16
UNSIGNED, SIGNED = torch.uint8, torch.int8


def spread(n, decades, make, signed=True):
    x = torch.randn(n, generator=make) * 10 ** (-decades * torch.rand(n, generator=make))
    return x if signed else x.abs()


def coded(x, dtype, bits=None):
    codes = torch.full(x.shape, 99, dtype=dtype, device=x.device)
    scale = torch.full((-(-x.numel() // 256), 2), float("nan"), device=x.device)
    reference.quantise_(codes, scale, x, bits)
    return codes, scale


def bits(n, time):
    return reference.random_bits(16, 0, n, seed=1, stream=9, parameter=0, time=time)


# --- codes ---


@pytest.mark.parametrize("dtype", [UNSIGNED, SIGNED], ids=str)
@pytest.mark.parametrize("decades", [0, 1, 4, 10, 11])
def test_codes_keep_relative_accuracy(dtype, decades):
    x = 10.0 ** (3 - decades * torch.linspace(0, 1, 256).flip(0))
    x = torch.cat((x[torch.randperm(256)], torch.zeros(3), x[:40])) * (1 if dtype == UNSIGNED else -1)
    found = reference.dequantise(*coded(x, dtype))
    assert found.shape == x.shape and (found[256:259] == 0).all() and (found.sign() == x.sign()).all()
    levels = {UNSIGNED: 255, SIGNED: 127}[dtype]
    error = (found / x - 1).nan_to_num().abs()
    # Half the distance of two neighbours, seen from the lower one; a block may have less to span.
    assert error.max() <= 1.7 * decades / (levels - 1) + 1e-4
    assert decades < 4 or error.max() > 0.5 * decades / (levels - 1)
    assert torch.equal(found[x.abs() == x.abs().min()], x[x.abs() == x.abs().min()])
    again = coded(found, dtype, bits(len(x), 0))
    assert torch.equal(reference.dequantise(*again), found)  # what codes hold stays, whatever the bits


@pytest.mark.parametrize("dtype", [UNSIGNED, SIGNED], ids=str)
def test_stochastic_rounding_has_the_right_mean_and_two_neighbours(dtype):
    x = spread(700, 6, torch.Generator().manual_seed(2), signed=dtype == SIGNED)
    x[:256] *= 10 ** torch.linspace(0, -10, 256)  # some beyond the 12 decades of a block
    found = torch.stack([reference.dequantise(*coded(x, dtype, bits(len(x), t))) for t in range(400)])
    low, high = found.min(0).values, found.max(0).values
    assert ((found == low) | (found == high)).all()
    both = high > low  # close to one neighbour, the other one may never come
    assert both.float().mean() > 0.97 and ((low <= x) & (x <= high))[both].all()
    # The mean of 400 draws of two values: within 6 standard deviations, of at most half their distance.
    assert ((found.mean(0) - x).abs() <= 6 * 0.5 * (high - low) / 20)[both].all()
    total = x.double().abs().sum()
    assert abs(float(found.double().abs().mean(0).sum() / total) - 1) < 1e-3


def test_codes_of_zeros_of_what_is_not_finite_and_of_negative_curvature():
    codes, scale = coded(torch.zeros(300), UNSIGNED)
    assert not codes.any() and not scale.any() and not reference.dequantise(codes, scale).any()
    codes, scale = coded(torch.empty(0), SIGNED)
    assert codes.shape == (0,) and scale.shape == (0, 2) and reference.dequantise(codes, scale).shape == (0,)
    for wrong in (float("nan"), float("inf"), -float("inf")):
        x = torch.ones(600)
        x[300] = wrong
        found = reference.dequantise(*coded(x, SIGNED))
        assert not found[300].isfinite() and found.isfinite().sum() == 599
        assert (found[:256] == 1).all() and (found[512:] == 1).all()
    assert reference.dequantise(*coded(torch.tensor([-1.0, 2.0]), UNSIGNED)).tolist() == [0.0, 2.0]


def test_rounding_to_nearest_would_stall():
    """Why bits are drawn: an h that should go from 1 to 2 by 1 % per refresh, in a block whose extremes stand still."""
    target = torch.cat((torch.tensor([1e-6, 1e4]), torch.full((254,), 2.0)))
    start = torch.where(target == 2, 1.0, target)
    ends = {}
    for name in ("nearest", "stochastic"):
        codes, scale = coded(start, UNSIGNED)
        for refresh in range(400):
            h = 0.99 * reference.dequantise(codes, scale) + 0.01 * target
            reference.quantise_(codes, scale, h, None if name == "nearest" else bits(256, refresh))
        ends[name] = reference.dequantise(codes, scale)[2:].mean()
    assert ends["nearest"] < 1.1 and abs(ends["stochastic"] - 2) < 0.1


# --- kernels ---

triton = pytest.importorskip("triton")

from growkit.kernels import sophia8bit  # noqa: E402


def operands(p=F32, g=F32, h=UNSIGNED, master=False, shapes=SIZES):
    make = torch.Generator().manual_seed(1)
    lists = {"p": [0.02 * torch.randn(n, generator=make) for n in shapes]}
    lists["g"] = [1e-3 * spread(n, 3, make).to(g) for n in shapes]
    if master:
        lists["master"] = [t.clone() for t in lists["p"]]
    lists["p"] = [t.to(p) for t in lists["p"]]
    for name, size, decades, dtype in (("m", 1e-3, 3, SIGNED), ("h", 1e-5, 8, h)):
        made = [coded((size * spread(t.numel(), decades, make)).view(t.shape), dtype) for t in lists["p"]]
        lists[name], lists[name + "_scale"] = map(list, zip(*made, strict=True))
    return {name: [t.to(DEVICE) for t in tensors] for name, tensors in lists.items()}


def counted(found, expected):
    """Number of elements that differ, over two lists; tensors of equal dtype and shape."""
    assert all(f.dtype == e.dtype and f.shape == e.shape for f, e in zip(found, expected, strict=True))
    return sum(int((f != e).sum()) for f, e in zip(found, expected, strict=True))


def assert_same_codes(found, expected, name):
    """Codes equal but where a last bit of float32 moves one over the threshold of its random bits: 1 in 1,000 here.

    The extremes of a block are floats; where terms of different signs cancel, many last bits of one may differ.
    """
    total = sum(t.numel() for t in expected[name])
    assert counted(found[name], expected[name]) <= total / 1000
    for f, e in zip(found[name + "_scale"], expected[name + "_scale"], strict=True):
        torch.testing.assert_close(f, e, rtol=1e-4, atol=0)


STEPS = {
    "float32": ({}, {}),
    "float32, max, signed": ({"h": SIGNED}, {"denominator": "max", "eps": 1e-12}),
    "maximize": ({}, {"maximize": True}),
    "nesterov": ({}, {"nesterov": True}),
    "bfloat16 gradients": ({"g": BF16}, {}),
    "bfloat16, stochastic": ({"p": BF16, "g": BF16}, {"stochastic": True}),
    "bfloat16, master": ({"p": BF16, "g": BF16, "master": True}, {"stochastic": True}),
}


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("case", "offset"), [(case, OFFSETS) for case in STEPS] + [("float32", [0] * len(SIZES))], ids=str
)
def test_step_kernel_equals_reference(case, offset):
    dtypes, options = STEPS[case]
    options = {**SCALARS, **options, **KEY, "offset": offset, "step": torch.tensor(7.0)}
    found, expected = (operands(**dtypes) for _ in range(2))
    counts = [torch.zeros((), dtype=torch.int64, device=DEVICE) for _ in range(2)]
    sophia8bit.sophia_step_8bit_(**found, unclipped=counts[0], **options)
    reference.sophia_step_8bit_(**expected, unclipped=counts[1], **options)
    assert_same_codes(found, expected, "m")
    for name in ("h", "h_scale", "g"):
        assert counted(found[name], operands(**dtypes)[name]) == 0
    for name in ("p", "master") if "master" in found else ("p",):
        if found[name][0].dtype == F32:
            for f, e in zip(found[name], expected[name], strict=True):
                torch.testing.assert_close(f, e, rtol=2**-22, atol=2**-22 * SCALARS["lr"])
        else:
            assert counted(found[name], expected[name]) <= sum(SIZES) / 1000
    total = sum(SIZES)
    assert 0 < counts[0] < total and abs(counts[0] - counts[1]) <= total / 1000


@pytest.mark.gpu
def test_the_step_kernel_repeats_itself_at_one_step_alone():
    lists = [operands(p=BF16, g=BF16) for _ in range(3)]
    for one, step in zip(lists, (7.0, 7.0, 8.0), strict=True):
        sophia8bit.sophia_step_8bit_(**one, **SCALARS, **KEY, step=torch.tensor(step), stochastic=True)
    found, again, other = lists
    assert all(counted(again[name], found[name]) == 0 for name in found)
    assert counted(other["m"], found["m"]) > sum(SIZES) / 10


def fold(module, kind, lists, **options):
    h = lists["h"], lists["h_scale"]
    if kind == "gnb":
        return module.gnb_ema_8bit_(*h, lists["g"], **options)
    return module.hutchinson_ema_8bit_(*h, lists["g"], lists["p"] if kind == "given" else None, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["gnb", "given", "drawn"])
@pytest.mark.parametrize("g", [F32, BF16], ids=str)
def test_refresh_kernel_equals_reference(kind, g):
    options = {**KEY, "refresh": 5, "offset": OFFSETS, "beta2": 0.99, "scale": torch.tensor(3.0, device=DEVICE)}
    dtypes = {"g": g, "h": UNSIGNED if kind == "gnb" else SIGNED}
    found, expected = (operands(**dtypes) for _ in range(2))
    fold(sophia8bit, kind, found, **options)
    fold(reference, kind, expected, **options)
    assert_same_codes(found, expected, "h")
    assert all(counted(found[k], operands(**dtypes)[k]) == 0 for k in ("p", "g", "m", "m_scale"))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["gnb", "drawn"])
def test_the_refresh_kernel_repeats_itself_at_one_refresh_alone(kind):
    lists = [operands(h=SIGNED) for _ in range(3)]
    for one, refresh in zip(lists, (5, 5, 6), strict=True):
        fold(sophia8bit, kind, one, **KEY, refresh=refresh, beta2=0.99)
    found, again, other = lists
    assert all(counted(again[name], found[name]) == 0 for name in found)
    assert counted(other["h"], found["h"]) > 0


def test_skip_leaves_everything():
    lists, skip = operands(h=SIGNED), torch.tensor(True, device=DEVICE)
    for module in (sophia8bit, reference):
        module.sophia_step_8bit_(**lists, **SCALARS, **KEY, step=torch.tensor(1.0), skip=skip)
        for kind in ("gnb", "given", "drawn"):
            fold(module, kind, lists, **KEY, refresh=1, beta2=0.9, skip=skip)
    assert all(counted(lists[name], operands(h=SIGNED)[name]) == 0 for name in lists)


@pytest.mark.gpu
def test_device_scalars_of_the_step_kernel():
    found, expected = operands(), operands()
    numbers = {k: torch.tensor(SCALARS[k], dtype=torch.float64, device=DEVICE) for k in ("lr", "rho_bs")}
    options = {**KEY, "step": torch.tensor(3.0, device=DEVICE), "scale": torch.tensor(0.25, device=DEVICE)}
    sophia8bit.sophia_step_8bit_(**found, **SCALARS | numbers, **options, skip=torch.tensor(0.0, device=DEVICE))
    for g in expected["g"]:
        g.mul_(0.25)
    reference.sophia_step_8bit_(**expected, **SCALARS, **KEY, step=torch.tensor(3.0))
    for f, e in zip(found["p"], expected["p"], strict=True):
        torch.testing.assert_close(f, e, rtol=2**-21, atol=2**-21 * SCALARS["lr"])
    assert_same_codes(found, expected, "m")


@pytest.mark.parametrize("module", [sophia8bit, reference], ids=["kernel", "reference"])
@pytest.mark.parametrize("layout", ["transposed", pytest.param("unaligned", marks=pytest.mark.gpu), "gaps"])
def test_blocks_are_row_major_in_any_layout_of_p_and_g(module, layout):
    make = {
        "transposed": lambda t: t.t().contiguous().t(),
        "unaligned": lambda t: torch.cat((t.flatten()[:1], t.flatten()))[1:].view(t.shape),
        "gaps": lambda t: torch.stack((t, t), dim=-1)[..., 0],
    }[layout]
    shapes = [(20, 70), (257,)]
    options = {**SCALARS, "seed": 5, "parameter": [0, 1], "step": torch.tensor(1.0)}
    plain, odd = operands(shapes=shapes), operands(shapes=shapes)
    for name in ("p", "g"):
        odd[name] = [make(t) if t.dim() == 2 else t for t in odd[name]]
    places = [t.data_ptr() for t in odd["p"]]
    for lists in (plain, odd):
        module.sophia_step_8bit_(**lists, **options)
        module.gnb_ema_8bit_(lists["h"], lists["h_scale"], lists["g"], beta2=0.9, refresh=0, seed=5, parameter=[0, 1])
    assert all(counted(odd[name], plain[name]) == 0 for name in plain)
    assert [t.data_ptr() for t in odd["p"]] == places


def test_many_tensors_take_one_launch(monkeypatch):
    launches = []
    run = sophia8bit._sophia_step_8bit.run
    monkeypatch.setattr(sophia8bit._sophia_step_8bit, "run", lambda *a, **k: (launches.append(k["grid"]), run(*a, **k)))
    lists = operands(shapes=(5,) * 8 + (5000,))
    sophia8bit.sophia_step_8bit_(**lists, **SCALARS, step=torch.tensor(1.0), seed=1, parameter=range(9))
    assert launches == [(8 + 2,)]
    sophia8bit.sophia_step_8bit_([], [], [], [], [], [], **SCALARS, step=torch.tensor(1.0), seed=1, parameter=[])
    sophia8bit.gnb_ema_8bit_([], [], [], beta2=0.9, seed=1, refresh=0, parameter=[])
    assert len(launches) == 1


MISFITS = {
    "m_scale.3. has 6 elements, expected 4": ("m_scale", lambda t: torch.cat((t, t[:1])), ValueError),
    "h is torch.float32, expected one of torch.uint8, torch.int8": ("h", torch.Tensor.float, TypeError),
    "p is torch.int8, expected one of torch.float32": ("p", lambda t: t.to(torch.int8), TypeError),
}


@pytest.mark.parametrize("words", MISFITS)
def test_lists_that_do_not_fit_are_named(words):
    name, change, error = MISFITS[words]
    lists = operands()
    lists[name] = [change(t) if error is TypeError or i == 3 else t for i, t in enumerate(lists[name])]
    with pytest.raises(error, match=words):
        sophia8bit.sophia_step_8bit_(**lists, **SCALARS, **KEY, step=torch.tensor(1.0))


# --- ops ---


@pytest.mark.parametrize("lr", [1e-3, torch.tensor(1e-3)], ids=str)
def test_opcheck(lr):
    lists = {k: [t.cpu() for t in v] for k, v in operands(h=SIGNED, shapes=(5000, 3)).items()}
    scalars = {**SCALARS, "lr": lr} if isinstance(lr, float) else {**SCALARS, "lr": lr, "rho_bs": torch.tensor(256.0)}
    op = torch.ops.growkit.sophia_step_8bit_
    key = {"seed": 1, "parameter": [0, 1]}
    arguments = tuple(lists[k] for k in ("p", "g", "m", "h", "m_scale", "h_scale"))
    torch.library.opcheck(
        op.default if isinstance(lr, float) else op.tensor, arguments, {**scalars, **key, "step": torch.tensor(1.0)}
    )
    h = lists["h"], lists["h_scale"], lists["g"]
    torch.library.opcheck(torch.ops.growkit.gnb_ema_8bit_.default, h, {"beta2": 0.9, "refresh": 1, **key})
    torch.library.opcheck(torch.ops.growkit.hutchinson_ema_8bit_.default, h, {"beta2": 0.9, "refresh": 1, **key})


def test_fakes_name_what_does_not_fit():
    lists = {k: [t.to("meta") for t in v] for k, v in operands(shapes=(5000, 3)).items()}
    op, key = torch.ops.growkit, {"seed": 1, "refresh": 0, "beta2": 0.9}
    with pytest.raises(TypeError, match="hutchinson_ema_8bit_: h.0. is torch.uint8 .* expected contiguous torch.int8"):
        op.hutchinson_ema_8bit_(lists["h"], lists["h_scale"], lists["g"], **key, parameter=[0, 1])
    with pytest.raises(ValueError, match="gnb_ema_8bit_: parameter has 1 indices, expected 2"):
        op.gnb_ema_8bit_(lists["h"], lists["h_scale"], lists["g"], **key, parameter=[0])
    with pytest.raises(ValueError, match=r"h_scale.1. is .* \(20, 2\) on meta, expected .* \(1, 2\)"):
        op.gnb_ema_8bit_(lists["h"], [lists["h_scale"][0]] * 2, lists["g"], **key, parameter=[0, 1])
