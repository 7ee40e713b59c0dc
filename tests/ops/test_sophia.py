"""Sophia's oracle against the official op sequence and exact statistics, and the schemas of its ops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from growkit import ops
from growkit.bench.sophia import official_step
from growkit.reference import blocks

BLOCK = 64
LR, BETA1, RHO_BS, EPS, DECAY = 1e-2, 0.965, 0.05 * 1024, 1e-15, 0.2
OFFICIAL = {"lr": LR, "beta1": BETA1, "rho_bs": RHO_BS, "weight_decay": DECAY}
SCALARS = {**OFFICIAL, "eps": EPS}
KEY = {"seed": 3, "refresh": 5}


def operands(shape, dtype=torch.float32, seed=0):
    """p, g, m, h of which about half the elements are clipped; some exact zeros."""
    make = torch.Generator().manual_seed(seed)
    p, g, m, h = (torch.randn(shape, generator=make, dtype=torch.float64) for _ in range(4))
    g, m, h = g * 1e-3, m * 1e-3, h.square() * 2e-5
    m, h = m * (m.abs() > 1e-4), h * (h > 1e-6)
    return [t.to(dtype) for t in (p, g, m, h)]


def strided(t):
    """A view of the same values with gaps between them."""
    wide = t.new_zeros(*t.shape[:-1], 2 * t.shape[-1]) if t.dim() else t.new_zeros(2)
    view = wide[..., ::2] if t.dim() else wide[1]
    return view.copy_(t)


LAYOUTS = {
    "contiguous": lambda t: t.clone(),
    "transposed": lambda t: t.mT.contiguous().mT,
    "strided": strided,
}
SIZES = [(), (0,), (1,), (BLOCK - 1,), (BLOCK,), (BLOCK + 1,), (5003,), (0, 3), (63, 5), (3, 5, 7, 4)]
every_layout = pytest.mark.parametrize(
    ("shape", "layout"), [(s, x) for s in SIZES for x in LAYOUTS if len(s) > 1 or x != "transposed"], ids=str
)


# --- update ---


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_layout
def test_step_is_the_official_op_sequence_bit_for_bit(shape, layout, dtype, maximize, small_block):
    p, g, m, h = operands(shape, dtype)
    expected = [t.clone() for t in (p, g, m, h)]
    ours = [LAYOUTS[layout](t) for t in (p, g, m, h)]
    for _ in range(3):
        official_step(*expected, **OFFICIAL, maximize=maximize)
        ops.sophia_step_(*([t] for t in ours), **SCALARS, maximize=maximize)
    assert all(map(torch.equal, ours, expected))


@pytest.mark.parametrize("denominator", ["add", "max"])
@pytest.mark.parametrize("maximize", [False, True])
def test_nesterov_clips_what_beta1_m_plus_a_share_of_g_is(denominator, maximize):
    p, g, m, h = operands((63, 5), torch.float64)
    sign = -1 if maximize else 1
    new_m = BETA1 * m + (1 - BETA1) * sign * 3 * g
    mbar = BETA1 * new_m + (1 - BETA1) * sign * 3 * g
    d = RHO_BS * h + EPS if denominator == "add" else (RHO_BS * h).clamp(min=1e-12)
    new_p = (1 - LR * DECAY) * p - LR * (mbar / d).clamp(-1, 1)
    options = {**SCALARS, "eps": EPS if denominator == "add" else 1e-12, "denominator": denominator}
    options |= {"maximize": maximize, "nesterov": True, "scale": torch.tensor(3.0)}
    for dtype in (torch.float64, torch.float32):
        ours, count = [t.to(dtype, copy=True) for t in operands((63, 5), torch.float64)], torch.tensor(0)
        ops.sophia_step_(*([t] for t in ours), None, count, **options)
        torch.testing.assert_close(ours[0], new_p.to(dtype)), torch.testing.assert_close(ours[2], new_m.to(dtype))
        assert count == (mbar.abs() < d).sum() and 0 < count < p.numel()


def test_step_walks_mixed_layouts_and_channels_last(small_block):
    p, g, m, h = operands((2, 3, 8, 5))
    expected = [t.clone() for t in (p, g, m, h)]
    official_step(*expected, **OFFICIAL)
    last = {"memory_format": torch.channels_last}
    for ours in ([t.contiguous(**last) for t in (p, g, m, h)], [p.clone(**last), g.clone(), m.clone(**last), h.mT.mT]):
        ops.sophia_step_(*([t] for t in ours), **SCALARS)
        assert all(map(torch.equal, ours, expected))


def test_step_is_the_official_op_sequence_at_the_real_block_size():
    assert blocks.BLOCK > 0
    for size in (blocks.BLOCK - 1, blocks.BLOCK, 2 * blocks.BLOCK + 17):
        expected = operands(size)
        ours = [t.clone() for t in expected]
        official_step(*expected, **OFFICIAL)
        ops.sophia_step_(*([t] for t in ours), **SCALARS)
        assert all(map(torch.equal, ours, expected))


class LargestTemporary(TorchDispatchMode):
    """Elements of the largest tensor that an operation returned in memory of its own."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        old = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in old:
                self.largest = max(self.largest, t.numel())
        return result


def test_step_and_refreshes_make_no_temporary_larger_than_a_block(small_block):
    # What makes the CPU step fast, checked without a clock: everything between reads and writes stays in cache.
    p, g, m, h = ([t] for t in operands(50 * BLOCK))
    half = [p[0].bfloat16()]
    counter = torch.zeros((), dtype=torch.int64)
    with LargestTemporary() as seen:
        ops.sophia_step_(p, g, m, h, None, counter, **SCALARS)
        ops.sophia_step_(half, g, m, h, **SCALARS, step=torch.tensor(1.0), seed=0, parameter=[0])
        ops.gnb_ema_(h, g, beta2=0.99)
        ops.rademacher_(p, **KEY, parameter=[0])
        ops.hutchinson_ema_(h, g, beta2=0.99, **KEY, parameter=[0])
    assert 0 < seen.largest <= 4 * BLOCK  # a step of Philox returns whole blocks of four words
    with LargestTemporary() as seen:
        ops.sophia_step_(p, g, m, h, **SCALARS)
    assert seen.largest <= BLOCK


scales = st.floats(1e-20, 1e20) | st.just(0.0)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    scales,
    scales,
    scales,
    st.sampled_from(["add", "max"]),
    st.sampled_from([torch.float32, torch.float64]),
    st.booleans(),
)
def test_step_never_moves_further_than_lr_nor_against_m(seed, p_scale, m_scale, h_scale, denominator, dtype, maximize):
    make = torch.Generator().manual_seed(seed)
    p, g, m, h = (torch.randn(40, generator=make, dtype=torch.float64) for _ in range(4))
    h = h if denominator == "max" else h.abs()
    p, g, m, h = ((t * s).to(dtype) for t, s in ((p, p_scale), (g, m_scale), (m, m_scale), (h, h_scale)))
    if seed % 2:
        p, g, m, h = map(strided, (p, g, m, h))
    before = p.clone()
    eps = 1e-12 if denominator == "max" else EPS
    scalars = {**SCALARS, "eps": eps, "denominator": denominator, "maximize": maximize}
    ops.sophia_step_([p], [g], [m], [h], **scalars)
    move = p.double() - before.double() * (1 - LR * DECAY)
    ulp = torch.finfo(dtype).eps
    assert p.isfinite().all()
    slack = 2 * ulp * (before.abs().double() + LR)
    assert (move.abs() <= LR + slack).all()
    assert (move * m.double().sign() <= slack).all()


def test_negative_curvature_moves_by_lr_along_minus_sign_m():
    p, m = torch.zeros(4), torch.tensor([1e-3, -1e-3, 0.0, 1e-9])
    h = torch.tensor([-1e-3, -1e20, -1.0, 0.0])
    scalars = {**SCALARS, "rho_bs": 0.01, "eps": 1e-12, "beta1": 0.5}
    ops.sophia_step_([p], [m.clone()], [m], [h], denominator="max", **scalars)
    torch.testing.assert_close(p, torch.tensor([-LR, LR, 0, -LR]), rtol=1e-7, atol=0)


def test_step_scale_skip_and_unclipped():
    p, g, m, h = operands(100)
    plain, scaled, skipped = ([t.clone() for t in (p, g, m, h)] for _ in range(3))
    scaled[1] *= 1024  # as GradScaler leaves it: a power of two is exact
    count = torch.tensor(7)
    ops.sophia_step_(*([t] for t in plain), None, count, **SCALARS)
    ops.sophia_step_(*([t] for t in scaled), **SCALARS, scale=torch.tensor(1 / 1024))
    ops.sophia_step_(*([t] for t in skipped), **SCALARS, skip=torch.tensor(1.0))
    assert torch.equal(plain[0], scaled[0]) and torch.equal(plain[2], scaled[2])
    assert all(map(torch.equal, skipped, (p, g, m, h)))
    assert count == 7 + (plain[2].abs() < RHO_BS * h + EPS).sum()


# --- bfloat16 ---


def rounded_step(p, g, m, h, *, step=1, **extra):
    key = {"step": torch.tensor(float(step)), "seed": 11, "parameter": [2]}
    ops.sophia_step_([p], [g], [m], [h], **{**SCALARS, **key, **extra})


def test_stochastic_rounding_is_unbiased_and_goes_to_a_neighbour():
    wide, g, m, h = operands(64)
    p = wide.bfloat16()
    exact = p.float()
    ops.sophia_step_([exact], [g], [m.clone()], [h], **SCALARS)
    runs = 2000
    results = torch.stack([p] * runs)
    for i in range(runs):
        rounded_step(results[i], g, m.clone(), h, step=i)
    low = (exact.view(torch.int32) & -0x10000).view(torch.float32)  # toward zero
    high = (low.view(torch.int32) + 0x10000).view(torch.float32)
    results = results.float()
    assert ((results == low) | (results == high)).all()
    fraction = (exact - low) / (high - low)
    sigma = (fraction * (1 - fraction) / runs).sqrt()
    found = (results == high).float().mean(0)
    # 64 elements, 5 sigma each: a right implementation fails with probability 4e-5, and the seed is fixed.
    assert ((found - fraction).abs() <= 5 * sigma + 2**-16).all()
    assert ((found - fraction) / sigma.clamp(min=1e-6)).mean().abs() < 5 / 8


@pytest.mark.parametrize("mode", ["stochastic", "nearest"])
def test_decay_over_1000_steps_survives_stochastic_rounding_only(mode):
    # lr*weight_decay = 1e-4 is below half a bfloat16 step (2^-9): nearest rounding never moves.
    p = torch.full((2000,), 1.0, dtype=torch.bfloat16)
    zero = torch.zeros(2000)
    for step in range(1000):
        extra = {} if mode == "stochastic" else {"seed": None}
        rounded_step(p, zero, zero, zero, step=step, lr=1e-3, weight_decay=0.1, **extra)
    if mode == "nearest":
        assert (p == 1).all()
    else:
        # Variance of one step is below w*2^-8*1e-4, so sigma of the mean of 2000 walks is below 5e-4.
        assert abs(p.float().mean() - (1 - 1e-4) ** 1000) < 5 * 5e-4


def test_master_is_the_float32_run_rounded_to_nearest(small_block):
    wide, g, m, h = operands(5003)
    p, master = wide.bfloat16(), wide.bfloat16().float()
    alone = [master.clone(), g.clone(), m.clone(), h.clone()]
    for _ in range(20):
        ops.sophia_step_([p], [g], [m], [h], [master], **SCALARS)
        ops.sophia_step_(*([t] for t in alone), **SCALARS)
        assert torch.equal(master, alone[0]) and torch.equal(p, alone[0].bfloat16())


def test_nearest_is_the_float32_step_rounded_once():
    wide, g, m, h = operands(500)
    p, exact = wide.bfloat16(), wide.bfloat16().float()
    ops.sophia_step_([p], [g], [m.clone()], [h], **SCALARS)
    ops.sophia_step_([exact], [g], [m], [h], **SCALARS)
    assert torch.equal(p, exact.bfloat16())


def test_infinite_and_nan_bfloat16_parameters_stay_what_they_are():
    p = torch.tensor([math.inf, -math.inf, math.nan, 1.0], dtype=torch.bfloat16)
    zero = torch.zeros(4)
    rounded_step(p, zero, zero.clone(), zero)
    assert p[0] == math.inf and p[1] == -math.inf and p[2].isnan() and p[3].isfinite()


# --- probe and other random bits ---


def rademacher(shape, dtype=torch.float32, parameter=7, offset=0, **key):
    u = torch.empty(shape, dtype=dtype)
    ops.rademacher_([u], **{**KEY, **key}, parameter=[parameter], offset=[offset])
    return u


def test_rademacher_is_the_same_for_any_block_offset_and_dtype(monkeypatch):
    whole = rademacher(5003)
    assert set(whole.tolist()) == {1.0, -1.0}
    monkeypatch.setattr(blocks, "BLOCK", 100)
    assert torch.equal(rademacher(5003), whole)
    for dtype in (torch.float64, torch.bfloat16):
        assert torch.equal(rademacher(5003, dtype).float(), whole)
    for first, stop in [(0, 1), (1001, 3001), (5002, 5003), (40, 40)]:
        assert torch.equal(rademacher(stop - first, offset=first), whole[first:stop])


def test_rademacher_is_balanced_and_its_keys_are_independent():
    n = 1 << 16
    probes = [rademacher(n), rademacher(n, parameter=8), rademacher(n, seed=4), rademacher(n, refresh=6)]
    for i, u in enumerate(probes):
        assert abs(u.sum()) < 5 * math.sqrt(n)
        assert abs((u[1:] * u[:-1]).sum()) < 5 * math.sqrt(n)
        for v in probes[:i]:
            assert abs((u * v).sum()) < 5 * math.sqrt(n)


@pytest.mark.parametrize("shape", [(6, 30), (2, 3, 4, 5)], ids=str)
def test_random_bits_belong_to_the_element_whatever_the_memory_layout(shape, small_block):
    # A saved h, a gradient and a parameter may each be laid out otherwise; they must still see the same probe.
    u = rademacher(shape)
    layouts = [*LAYOUTS.values(), lambda t: t.transpose(0, 1).contiguous().transpose(0, 1)]
    p, g, m, h = operands(shape)
    expected, half = p.bfloat16(), [f(p.bfloat16()) for f in layouts]
    rounded_step(expected, g, m.clone(), h)
    for i, a in enumerate(layouts):
        written = a(torch.zeros(shape))
        ops.rademacher_([written], **KEY, parameter=[7])
        assert torch.equal(written, u)
        rounded_step(half[i], g, a(m), layouts[i - 1](h))
        assert torch.equal(half[i], expected)
        for b in layouts:
            estimate = a(torch.zeros(shape))
            ops.hutchinson_ema_([estimate], [b(g)], beta2=0.5, **KEY, parameter=[7])
            assert torch.equal(estimate, 0.5 * u * g)


def test_rounding_bits_of_a_shard_are_those_of_the_whole(monkeypatch):
    wide, g, m, h = operands(1000)
    p = wide.bfloat16()
    shards = []
    for first, stop in [(0, 300), (300, 301), (301, 1000)]:
        part = [t[first:stop].clone() for t in (p, g, m, h)]
        rounded_step(*part, offset=[first])
        shards.append(part[0])
    monkeypatch.setattr(blocks, "BLOCK", 77)
    rounded_step(p, g, m, h)
    assert torch.equal(torch.cat(shards), p)


# --- refreshes ---


@every_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gnb_ema_is_the_official_refresh_bit_for_bit(shape, dtype, layout, small_block):
    _, g, _, h = operands(shape, dtype)
    expected, ours = h.clone(), LAYOUTS[layout](h)
    expected.mul_(0.99).addcmul_(g, g, value=1 - 0.99)
    ops.gnb_ema_([ours], [LAYOUTS[layout](g)], beta2=0.99)
    assert torch.equal(ours, expected)


def test_refresh_scale_and_skip():
    _, g, _, h = operands(50, torch.float64)
    u = rademacher(50, torch.float64)
    for update, term in (
        (lambda h, *a: ops.gnb_ema_([h], [g], *a, beta2=0.99), g * g),
        (lambda h, *a: ops.hutchinson_ema_([h], [g], [u], *a, beta2=0.99), g * u),
        (lambda h, *a: ops.hutchinson_ema_([h], [g], None, *a, beta2=0.99, **KEY, parameter=[7]), g * u),
    ):
        scaled, skipped = h.clone(), h.clone()
        update(scaled, torch.tensor(3.0))
        update(skipped, torch.tensor(3.0), torch.tensor(True))
        torch.testing.assert_close(scaled, 0.99 * h + 0.03 * term, rtol=1e-13, atol=0)
        assert torch.equal(skipped, h)


# --- contract ---


def lists(*shapes, dtype=torch.float32):
    return [[t for t in group] for group in zip(*(operands(s, dtype) for s in shapes), strict=True)]


P, G, M, H = lists((5,), (3, 4), (), (0,))
HALF = [p.bfloat16() for p in P]
ROUNDING = {"step": torch.tensor(1.0), "seed": 1, "parameter": [0, 1, 2, 3]}
PROBE = {**KEY, "parameter": [0, 1, 2, 3]}
CHECKS = {
    "step": ("sophia_step_", (P, G, M, H), SCALARS),
    "step nesterov": ("sophia_step_", (P, G, M, H), {**SCALARS, "nesterov": True}),
    "step bf16": ("sophia_step_", (HALF, G, M, H), {**SCALARS, **ROUNDING}),
    "step master": ("sophia_step_", (HALF, G, M, H, [p.clone() for p in P]), SCALARS),
    "step counter": ("sophia_step_", (P, G, M, H, None, torch.tensor(0)), SCALARS),
    "step scale": ("sophia_step_", (P, G, M, H), {**SCALARS, "scale": torch.tensor(2.0), "skip": torch.tensor(0.0)}),
    "step empty": ("sophia_step_", ([], [], [], []), SCALARS),
    "step tensor lr": (
        "sophia_step_.tensor",
        (P, G, M, H),
        {**SCALARS, "lr": torch.tensor(LR), "rho_bs": torch.tensor(SCALARS["rho_bs"])},
    ),
    "gnb": ("gnb_ema_", (H, G), {"beta2": 0.99}),
    "gnb scale": ("gnb_ema_", (H, G, torch.tensor(2.0), torch.tensor(0.0)), {"beta2": 0.99}),
    "gnb empty": ("gnb_ema_", ([], []), {"beta2": 0.99}),
    "hutchinson": ("hutchinson_ema_", (H, G), {"beta2": 0.99, **PROBE}),
    "hutchinson u": ("hutchinson_ema_", (H, G, P), {"beta2": 0.99}),
    "hutchinson empty": ("hutchinson_ema_", ([], []), {"beta2": 0.99}),
    "rademacher": ("rademacher_", (P,), PROBE),
    "rademacher empty": ("rademacher_", ([],), {**KEY, "parameter": []}),
    "squared norm": ("squared_norm", (G,), {}),
}


@pytest.mark.parametrize("case", CHECKS)
def test_opcheck(case):
    name, args, kwargs = CHECKS[case]
    name, _, overload = name.partition(".")
    op = getattr(getattr(torch.ops.growkit, name), overload or "default")
    torch.library.opcheck(op, args, kwargs, test_utils=["test_schema", "test_faketensor", "test_autograd_registration"])


@pytest.mark.parametrize("case", ["step", "step bf16", "gnb", "hutchinson", "rademacher"])
def test_opcheck_under_aot(case):
    name, args, kwargs = CHECKS[case]
    op = getattr(torch.ops.growkit, name).default
    torch.library.opcheck(op, args, kwargs, test_utils=["test_aot_dispatch_dynamic"])


@pytest.mark.parametrize(
    ("name", "args", "kwargs", "words"),
    [
        ("sophia_step_", ([P[1]], [P[0]], [M[1]], [H[1]]), SCALARS, [r"g\[0\]", r"\(5,\)", r"\(3, 4\)"]),
        ("sophia_step_", (P, G, M[:2], H), SCALARS, ["m has 2", "expected 4"]),
        ("sophia_step_", (HALF, G, M, H, P[:3]), SCALARS, ["master has 3", "expected 4"]),
        ("sophia_step_", (P, G, M, H), {**SCALARS, "denominator": "sum"}, ["denominator", "sum", "'add' or 'max'"]),
        ("gnb_ema_", ([H[1]], [G[0]]), {"beta2": 0.9}, [r"g\[0\]", r"\(5,\)", r"\(3, 4\)"]),
        ("hutchinson_ema_", ([H[1]], [G[0]]), {"beta2": 0.9, **PROBE}, [r"hu\[0\]", r"\(5,\)", r"\(3, 4\)"]),
        ("hutchinson_ema_", (H, G), {"beta2": 0.9}, ["parameter", "4", "0"]),
        ("rademacher_", (P,), {**KEY, "parameter": [0]}, ["1", "expected 4"]),
    ],
)
def test_fakes_raise_and_name_both_shapes(name, args, kwargs, words, fake_call):
    fake_call(name, args, kwargs, words)
