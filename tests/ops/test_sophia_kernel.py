"""Sophia's kernels against the reference: on a GPU where there is one, else in Triton's interpreter.

What tests/ptx compares with the reference, of compiled kernels and to the bit, is marked `gpu` here.
"""

import pytest
import torch

pytest.importorskip("triton")

from growkit import reference
from growkit.bench.sophia import official_step
from growkit.kernels import multi_tensor, probe, sophia
from growkit.kernels.lists import TensorList

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = (0, 1, 63, 5003, 4096, 8192, 9001)
SCALARS = {"lr": 6e-4, "beta1": 0.965, "rho_bs": 256.0, "eps": 1e-15, "weight_decay": 0.2}
KEY = {"seed": 0x1234_5678_9ABC_DEF1, "parameter": list(range(3, 3 + len(SIZES)))}
# Starts of shards: whole words, within a word, beyond 32 bits, beyond 32 bits of blocks.
OFFSETS = [0, 1, 32, 8, 2**33 + 24, 2**40 + 7, 128]
F32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def operands(p=F32, g=F32, state=F32, master=None, shapes=SIZES, dtype=None):
    """Lists p, g, m, h [, master] of the given dtypes, or all of `dtype` with the same values."""
    make = torch.Generator().manual_seed(1)

    def tensors(scale, own, signed=True):
        made = [torch.randn(n, generator=make).mul_(scale) for n in shapes]
        return [(t if signed else t.abs()).to(own).to(dtype or own).to(DEVICE) for t in made]

    lists = {"p": tensors(0.02, p), "g": tensors(1e-3, g), "m": tensors(1e-3, state), "h": tensors(1e-5, state, False)}
    if master:
        lists["master"] = [t.to(dtype or master) for t in lists["p"]]
    return lists


def assert_close(found, expected, exact, step=0.0):
    """|found - exact| <= 2*|expected - exact| + rounding; step: relative spacing of a stored format that is coarser."""
    for f, e, x in zip(found, expected, exact, strict=True):
        x = x.double()
        # Where terms cancel, the rounding is that of the terms, which are at most a few times the largest result.
        allowed = (
            2 * (e.double() - x).abs() + x.abs() * max(step, 2**-23) + (x.abs().max() if x.numel() else 0) * 2**-24
        )
        wrong = (f.double() - x).abs() > allowed
        assert not wrong.any(), (int(wrong.sum()), f[wrong][:3], e[wrong][:3])


def spacing(dtype):
    """Relative distance of two neighbours, where the store may round to the other one; 0 for float32."""
    return {F32: 0.0, BF16: 2**-7, FP16: 2**-10}[dtype]


DTYPES = {
    "float32": {},
    "bfloat16 gradients": {"g": BF16},
    "bfloat16, nearest": {"p": BF16, "g": BF16},
    "bfloat16, master": {"p": BF16, "g": BF16, "master": F32},
    "float16, master": {"p": FP16, "g": FP16, "master": F32},
    "bfloat16 states": {"state": BF16},
    "all bfloat16": {"p": BF16, "g": BF16, "state": BF16},
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize(
    "options", [{}, {"denominator": "max", "eps": 1e-12}, {"maximize": True}, {"nesterov": True}], ids=str
)
def test_step_kernel_equals_reference(dtypes, options):
    dtypes = DTYPES[dtypes]
    found, expected, exact = operands(**dtypes), operands(**dtypes), operands(**dtypes, dtype=torch.float64)
    counts = [torch.zeros((), dtype=torch.int64, device=DEVICE) for _ in range(2)]
    sophia.sophia_step_(*found.values(), unclipped=counts[0], **SCALARS | options)
    reference.sophia_step_(*expected.values(), unclipped=counts[1], **SCALARS | options)
    reference.sophia_step_(*exact.values(), **SCALARS | options)
    own = dtypes.get("p", F32)
    # A difference in the last bit of m/d moves p by lr times as much.
    assert_close(found["p"], expected["p"], exact["p"], spacing(own) or 2**-22)
    assert_close(found["m"], expected["m"], exact["m"], 2 * spacing(dtypes.get("state", F32)))
    assert all(map(torch.equal, found["h"], operands(**dtypes)["h"]))
    assert all(map(torch.equal, found["g"], operands(**dtypes)["g"]))
    if "master" in dtypes:
        assert_close(found["master"], expected["master"], exact["master"], 2**-22)
    total = sum(SIZES)
    assert 0 < counts[0] < total and abs(counts[0] - counts[1]) <= 1e-3 * total


@pytest.mark.gpu
@pytest.mark.parametrize(("state", "offset"), [(F32, OFFSETS), (BF16, OFFSETS), (F32, [0] * len(SIZES))], ids=str)
def test_stochastic_rounding_of_the_kernel_draws_the_reference_bits(state, offset):
    found, expected = operands(BF16, BF16, state), operands(BF16, BF16, state)
    for lists, step_ in ((found, sophia.sophia_step_), (expected, reference.sophia_step_)):
        step_(*lists.values(), **SCALARS, step=torch.tensor(7.0), **KEY, offset=offset)
    # A float32 result in which the two differ in the last bit rounds to another neighbour once in 2^16 times.
    differ = sum(int((f != e).sum()) for f, e in zip(found["p"], expected["p"], strict=True))
    assert differ <= sum(SIZES) / 1000


@pytest.mark.gpu
def test_stochastic_rounding_of_the_kernel_repeats_itself_at_one_step_alone():
    lists = [operands(BF16, BF16) for _ in range(4)]
    for one, step in zip(lists, (7.0, 7.0, 8.0, None), strict=True):
        sophia.sophia_step_(*one.values(), **SCALARS, **({} if step is None else KEY | {"step": torch.tensor(step)}))
    found, again, other, nearest = (one["p"] for one in lists)
    assert all(map(torch.equal, again, found))
    assert not all(map(torch.equal, other, found)) and not all(map(torch.equal, nearest, found))


@pytest.mark.gpu
@pytest.mark.parametrize(("found_inf", "moves"), [(0.0, True), (1.0, False), (False, True), (True, False)])
def test_scale_and_skip_of_the_step_kernel(found_inf, moves):
    found, expected = operands(), operands()
    scale, skip = torch.tensor(0.25, device=DEVICE), torch.tensor(found_inf, device=DEVICE)
    sophia.sophia_step_(*found.values(), **SCALARS, scale=scale, skip=skip)
    for g in expected["g"]:
        g.mul_(0.25)
    if moves:
        sophia.sophia_step_(*expected.values(), **SCALARS)
    assert all(map(torch.equal, found["p"] + found["m"], expected["p"] + expected["m"]))


@pytest.mark.gpu
def test_tensor_lr_and_rho_bs_of_the_step_kernel():
    found, expected = operands(), operands()
    numbers = {k: torch.tensor(SCALARS[k], dtype=torch.float64, device=DEVICE) for k in ("lr", "rho_bs")}
    sophia.sophia_step_(*found.values(), **SCALARS | numbers)
    sophia.sophia_step_(*expected.values(), **SCALARS)
    for f, e in zip(found["p"], expected["p"], strict=True):
        torch.testing.assert_close(f, e, rtol=2**-22, atol=0)


@pytest.mark.gpu
def test_a_nan_gradient_stays_where_it_is():
    lists = operands()
    lists["g"][3][17] = float("nan")
    sophia.sophia_step_(*lists.values(), **SCALARS)
    assert [int(t.isnan().sum()) for t in lists["p"]] == [0, 0, 0, 1, 0, 0, 0] and lists["p"][3][17].isnan()


REFRESHES = {
    "gnb": lambda h, g, u, key: (sophia.gnb_ema_, reference.gnb_ema_, (h, g), {}),
    "given": lambda h, g, u, key: (sophia.hutchinson_ema_, reference.hutchinson_ema_, (h, g, u), {}),
    "drawn": lambda h, g, u, key: (sophia.hutchinson_ema_, reference.hutchinson_ema_, (h, g), key),
}


@pytest.mark.gpu
@pytest.mark.parametrize("kind", REFRESHES)
@pytest.mark.parametrize("dtypes", [{}, {"g": BF16}, {"state": BF16}, {"g": FP16}], ids=str)
def test_refresh_kernel_equals_reference(kind, dtypes):
    scale = torch.tensor(3.0, device=DEVICE)
    key = {**KEY, "refresh": 5, "offset": OFFSETS}
    results = []
    for which, dtype in ((0, None), (1, None), (1, torch.float64)):
        lists = operands(**dtypes, dtype=dtype)
        u = operands(dtype=dtype)["p"]
        function, args, options = (lambda f: (f[which], f[2], f[3]))(REFRESHES[kind](lists["h"], lists["g"], u, key))
        function(*args, scale=scale, beta2=0.99, **options)
        results.append(lists["h"])
    coarse = dtypes.get("state") == BF16
    assert_close(*results, 2 * spacing(BF16) if coarse else 0.0)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["gnb", "drawn"])
def test_refresh_kernel_rounds_bfloat16_curvature_with_the_reference_bits(kind):
    key = {**KEY, "refresh": 5, "offset": OFFSETS}
    results = []
    for which in (0, 1):
        lists = operands(state=BF16)
        functions = REFRESHES[kind](lists["h"], lists["g"], None, key)
        functions[which](*functions[2], beta2=0.99, **key)
        results.append(lists["h"])
    differ = sum(int((f != e).sum()) for f, e in zip(*results, strict=True))
    assert differ <= sum(SIZES) / 1000


def test_skip_of_the_refresh_kernel():
    for kind in REFRESHES:
        lists = operands()
        u = operands()["p"]
        function, _, args, options = REFRESHES[kind](lists["h"], lists["g"], u, {**KEY, "refresh": 1})
        function(*args, skip=torch.tensor(True, device=DEVICE), beta2=0.99, **options)
        assert all(map(torch.equal, lists["h"], operands()["h"]))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F32, BF16, FP16], ids=str)
def test_probe_kernel_writes_the_reference_signs(dtype):
    found, expected = ([torch.empty(n, dtype=dtype, device=DEVICE) for n in SIZES] for _ in range(2))
    key = {**KEY, "refresh": 3, "offset": OFFSETS}
    probe.rademacher_(found, **key)
    reference.rademacher_(expected, **key)
    assert all(map(torch.equal, found, expected))
    other = [torch.empty_like(t) for t in found]
    probe.rademacher_(other, **{**key, "refresh": 4})
    assert [torch.equal(a, b) for a, b in zip(found, other, strict=True)] == [n < 2 for n in SIZES] or SIZES[1] == 1
    assert abs(found[-1].float().mean()) < 5 / SIZES[-1] ** 0.5


def test_probe_of_shards_is_the_probe_of_the_whole():
    whole = torch.empty(9000, device=DEVICE)
    probe.rademacher_([whole], seed=1, refresh=2, parameter=[6])
    starts = [0, 4097, 4160, 8999]
    shards = [torch.empty(b - a, device=DEVICE) for a, b in zip(starts, [*starts[1:], 9000], strict=True)]
    probe.rademacher_(shards, seed=1, refresh=2, parameter=[6] * 4, offset=starts)
    assert torch.equal(torch.cat(shards), whole)


@pytest.mark.parametrize("dtypes", [[F32], [BF16]], ids=str)
def test_squared_norm_kernel(dtypes):
    g = operands(g=dtypes[0])["g"]
    exact = sum(float(t.double().square().sum()) for t in g)
    assert float(sophia.squared_norm(g)) == pytest.approx(exact, rel=1e-6)
    assert float(sophia.squared_norm([torch.empty(0, device=DEVICE)])) == 0
    g[2][5] = float("inf")
    assert sophia.squared_norm(g).isinf()


# --- layouts ---


def strided(layout):
    """Four tensors of shape (40, 130): their layouts, and whether they can be walked in memory order."""
    make = {
        "transposed": lambda t: t.t().contiguous().t(),
        "gaps": lambda t: torch.stack((t, t), dim=-1)[..., 0],
        "unaligned": lambda t: torch.cat((t.flatten()[:1], t.flatten()))[1:].view(t.shape),
        "expanded": lambda t: t,
    }[layout]
    return lambda t: make(t.to(DEVICE))


@pytest.mark.parametrize("layout", ["transposed", "gaps", pytest.param("unaligned", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("which", [("p", "g", "m", "h"), ("p",), ("g", "h")], ids=str)
@pytest.mark.parametrize("dtype", [pytest.param(F32, marks=pytest.mark.gpu), BF16], ids=str)
def test_layouts(layout, which, dtype):
    """Tensors in any layout get what contiguous ones get, random bits included, in their own memory."""
    shapes = [(40, 130), (7,), (64, 64)]
    plain = operands(dtype, dtype, shapes=shapes)
    odd = {k: [strided(layout)(t) if t.dim() == 2 and k in which else t.clone() for t in v] for k, v in plain.items()}
    kept = {k: [t.data_ptr() for t in v] for k, v in odd.items()}
    options = {**SCALARS, "step": torch.tensor(1.0), "seed": 5, "parameter": [0, 1, 2]}
    sophia.sophia_step_(*plain.values(), **options)
    sophia.sophia_step_(*odd.values(), **options)
    for k in plain:
        assert all(map(torch.equal, odd[k], plain[k])) and [t.data_ptr() for t in odd[k]] == kept[k]


def test_many_tensors_take_one_launch(monkeypatch):
    launches = []
    run = sophia._sophia_step.run
    monkeypatch.setattr(sophia._sophia_step, "run", lambda *a, **k: (launches.append(k["grid"]), run(*a, **k)))
    lists = operands(shapes=(5,) * 40 + (5000,))
    expected = operands(shapes=(5,) * 40 + (5000,))
    sophia.sophia_step_(*lists.values(), **SCALARS)
    reference.sophia_step_(*expected.values(), **SCALARS)
    for f, e in zip(lists["p"], expected["p"], strict=True):
        torch.testing.assert_close(f, e)
    assert launches == [(40 + 2,)]


@pytest.mark.gpu
def test_a_persistent_launch_gives_the_same(monkeypatch):
    found, expected = operands(), operands()
    counts = [torch.zeros((), dtype=torch.int64, device=DEVICE) for _ in range(2)]
    sophia.sophia_step_(*expected.values(), unclipped=counts[0], **SCALARS)
    monkeypatch.setattr(sophia, "PROGRAMS", 2)
    sophia.sophia_step_(*found.values(), unclipped=counts[1], **SCALARS)
    assert all(map(torch.equal, found["p"], expected["p"])) and counts[0] == counts[1] > 0


def test_gradients_that_move_are_found_and_tables_are_kept():
    multi_tensor._tables.clear(), multi_tensor._plans.clear()
    lists, expected = operands(), operands()
    for _ in range(3):
        lists["g"] = [t.clone().mul_(1.5) for t in lists["g"]]
        for g in expected["g"]:
            g.mul_(1.5)
        sophia.sophia_step_(*lists.values(), **SCALARS)
        sophia.sophia_step_(*expected.values(), **SCALARS)
    assert all(map(torch.equal, lists["p"], expected["p"])) and len(multi_tensor._tables) == 1
    # The same addresses under other shapes are another table.
    flat = [torch.cat([t.flatten() for t in expected[k]]) for k in expected]
    whole = [[t] for t in flat]
    parts = [list(t.clone().split([5000, len(t) - 5000])) for t in flat]
    sophia.sophia_step_(*whole, **SCALARS)
    sophia.sophia_step_(*parts, **SCALARS)
    assert torch.equal(whole[0][0], torch.cat(parts[0]))


def test_a_tensor_list_is_checked_again_when_a_tensor_lies_elsewhere():
    lists = {k: TensorList(v) for k, v in operands().items()}
    sophia.sophia_step_(*lists.values(), **SCALARS)
    plan = lists["p"].known["plan"]
    sophia.sophia_step_(*lists.values(), **SCALARS)
    assert lists["p"].known["plan"] is plan
    lists["p"][3].data = lists["p"][3].data.double()
    with pytest.raises(ValueError, match="p.3. is torch.float64 .* expected torch.float32"):
        sophia.sophia_step_(*lists.values(), **SCALARS)


def test_tables_are_bounded():
    for n in range(1, multi_tensor._KEPT + 5):
        sophia.squared_norm([torch.zeros(n, device=DEVICE)])
    assert len(multi_tensor._tables) <= multi_tensor._KEPT and len(multi_tensor._plans) <= multi_tensor._KEPT


def test_empty_lists_do_nothing():
    sophia.sophia_step_([], [], [], [], **SCALARS)
    sophia.gnb_ema_([], [], beta2=0.9)
    sophia.hutchinson_ema_([], [], beta2=0.9)
    probe.rademacher_([], seed=0, refresh=0, parameter=[])


def replace(lists, name, i, make):
    lists[name][i] = make(lists[name][i])


MISFITS = {
    "g has 6 tensors, expected 7": (ValueError, lambda x: x["g"].pop()),
    "m.3. has 7 elements, expected 5003": (ValueError, lambda x: replace(x, "m", 3, lambda t: t[:7])),
    "h.2. is torch.bfloat16 .* expected torch.float32": (
        ValueError,
        lambda x: replace(x, "h", 2, torch.Tensor.bfloat16),
    ),
    "g is torch.float64, expected one of torch": (TypeError, lambda x: x.update(g=[t.double() for t in x["g"]])),
    "g.1. is torch.float32 on meta, expected": (ValueError, lambda x: replace(x, "g", 1, lambda t: t.to("meta"))),
}


@pytest.mark.parametrize("words", MISFITS)
def test_lists_that_do_not_fit_are_named(words):
    error, change = MISFITS[words]
    lists = operands()
    change(lists)
    before = [t.clone() for t in lists["p"]]
    with pytest.raises(error, match=words):
        sophia.sophia_step_(*lists.values(), **SCALARS)
    assert all(map(torch.equal, before, lists["p"]))


# --- what only a GPU can show ---


@pytest.mark.gpu
def test_float32_step_and_refresh_have_the_bits_of_the_official_ops():
    make = torch.Generator("cuda").manual_seed(0)
    ours = [[torch.randn(n, device="cuda", generator=make).mul_(s) for n in SIZES] for s in (0.02, 1e-3, 1e-3, 1e-5)]
    for h in ours[3]:
        h.abs_()
    theirs = [[t.clone() for t in tensors] for tensors in ours]
    for _ in range(5):
        sophia.sophia_step_(*ours, **SCALARS)
        sophia.gnb_ema_(ours[3], ours[1], beta2=0.99)
        for p, g, m, h in zip(*theirs, strict=True):
            official_step(p, g, m, h, **{k: v for k, v in SCALARS.items() if k != "eps"})
            h.mul_(0.99).addcmul_(g, g, value=1 - 0.99)
    for a, b in zip(ours, theirs, strict=True):
        assert all(map(torch.equal, a, b))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_narrow_parameters_are_the_master_rounded_to_nearest(dtype):
    lists = operands(dtype, dtype, master=F32)
    sophia.sophia_step_(*lists.values(), **SCALARS)
    assert all(torch.equal(p, w.to(dtype)) for p, w in zip(lists["p"], lists["master"], strict=True))


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    n, tail = 2**31 + 3 * multi_tensor.CHUNK + 5, 5005
    p, g, m, h = (torch.empty(n, dtype=BF16, device="cuda").normal_(0, s) for s in (0.02, 1e-3, 1e-3, 1e-5))
    h.abs_()
    ends = [[t[-tail:].cpu()] for t in (p, g, m, h)]
    options = {**SCALARS, "step": torch.tensor(3.0), "seed": 9, "parameter": [2]}
    sophia.sophia_step_([p], [g], [m], [h], **options)
    reference.sophia_step_(*ends, **options, offset=[n - tail])
    assert int((p[-tail:].cpu() != ends[0][0]).sum()) <= 5
    torch.testing.assert_close(m[-tail:].cpu(), ends[2][0], rtol=2**-7, atol=0)
    key = {"seed": 1, "refresh": 2, "parameter": [0]}
    probe.rademacher_([p], **key)
    reference.rademacher_(ends[0], **key, offset=[n - tail])
    assert torch.equal(p[-tail:].cpu(), ends[0][0])
