"""Update, refreshes, probe and norm, with state of 16 or 32 bits: the bits of the reference."""

import contextlib
import math

import torch

from growkit import reference
from growkit.kernels import probe, sophia

from .case import Case, Cases
from .compare import compare, few, fused_addcmul, near, relative, spacing, within
from .launchers import on_device
from .tensors import AWKWARD, BF16, F32, FP16, Layout, key, operands, place

CASES: Cases = {}
SCALARS = {"lr": 6e-4, "beta1": 0.965, "rho_bs": 256.0, "eps": 1e-15, "weight_decay": 0.2}
HALF = {"p": BF16, "g": BF16}
FOUR = torch.tensor(4.0)


def counters(wanted=True):
    """Two counts of unclipped elements, the kernel's and the reference's."""
    return [place(torch.zeros((), dtype=torch.int64), "p") for _ in range(2)] if wanted else [None] * 2


def untouched(names, found, made):
    return [compare(f"{name} untouched", found[name], made[name]) for name in names]


def _step(variant, options=None, *, stochastic=False, count=True, device=(), wide=F32, programs=None, **dtypes):
    """device: names of scalars that lie on the device, with the dtype `wide`."""

    def check(layout):
        given = SCALARS | (options or {})
        if stochastic:
            given |= {"step": torch.tensor(7.0), **key(layout)}
        found, expected = operands(layout, **dtypes), operands(layout, **dtypes)
        counts = counters(count)
        there = {name: on_device(float(given[name]), wide) for name in device}
        with contextlib.ExitStack() as stack:
            if programs:
                stack.callback(setattr, sophia, "PROGRAMS", sophia.PROGRAMS)
                sophia.PROGRAMS = programs
            sophia.sophia_step_(**found, unclipped=counts[0], **given | there)
        reference.sophia_step_(**expected, unclipped=counts[1], **given)
        # From an lr on the device the kernel computes 1 - lr*weight_decay in float32, the host in double.
        if not device:
            yield compare("p", found["p"], expected["p"])
        elif stochastic:
            yield compare("p", found["p"], expected["p"], "1/1000 differ", few(1e-3))
        else:
            exact = operands(layout, **dtypes, dtype=torch.float64)
            reference.sophia_step_(**exact, **given)
            test = near(exact["p"], spacing(dtypes.get("p", F32)) or 2**-22)
            yield compare("p", found["p"], expected["p"], "2x the reference's error", test)
        yield compare("m", found["m"], expected["m"])
        if "master" in dtypes:
            yield compare("master", found["master"], expected["master"])
        yield from untouched(("g", "h"), found, operands(layout, **dtypes))
        if count:
            yield compare("count", counts[:1], counts[1:])

    CASES["sophia_step_", variant] = Case(check)


_step("float32", count=False)
_step("float32, count")
_step("float32, max", {"denominator": "max", "eps": 1e-12}, count=False)
_step("float32, maximize", {"maximize": True})
_step("float32, nesterov", {"nesterov": True}, count=False)
_step("float32, two programs", programs=2)
_step("float32, scale and skip=0", {"scale": torch.tensor(0.25), "skip": torch.tensor(0.0)})
_step("float32, skip=1", {"skip": torch.tensor(1.0)})
_step("float32, skip=True", {"skip": torch.tensor(True)})
_step("float32, skip=False", {"skip": torch.tensor(False)}, count=False)
GIVEN = {"scale": torch.tensor(0.25), "skip": torch.tensor(0.0)}
_step("float32, device scalars", GIVEN, device=("lr", "rho_bs"))
_step("float32, device scalars of 64 bits", device=("lr", "rho_bs"), wide=torch.float64, count=False)
_step("bfloat16 g", g=BF16)
_step("float16 g", g=FP16)
_step("bfloat16, stochastic", stochastic=True, count=False, **HALF)
_step("bfloat16, step on device", GIVEN, stochastic=True, device=("step", "lr", "rho_bs"), **HALF)
_step("bfloat16, stochastic, bfloat16 state", stochastic=True, state=BF16, **HALF)
_step("bfloat16, nearest", count=False, **HALF)
_step("bfloat16, nearest, max", {"denominator": "max", "eps": 1e-12}, **HALF)
_step("bfloat16, master", count=False, master=F32, **HALF)
_step("bfloat16, master, nesterov", GIVEN | {"nesterov": True}, master=F32, **HALF)
_step("float16, master", {"maximize": True}, p=FP16, g=FP16, master=F32)
_step("bfloat16 state", count=False, state=BF16)
_step("bfloat16, all", state=BF16, **HALF)
NESTEROV = {"nesterov": True, "maximize": True, "denominator": "max", "eps": 1e-12}
_step("bfloat16, all, nesterov", NESTEROV, stochastic=True, state=BF16, **HALF)


def _refresh(variant, kind, *, stochastic=False, scale=None, skip=None, **dtypes):
    """The bits of the reference with a fused addcmul, and near it as it is."""

    def check(layout):
        options = {"beta2": 0.99, "scale": scale, "skip": skip}
        if stochastic or kind == "drawn":
            options |= {**key(layout), "refresh": 5}

        def run(module, dtype=None):
            lists = operands(layout, **dtypes, dtype=dtype, given=kind == "given")
            if kind == "gnb":
                module.gnb_ema_(lists["h"], lists["g"], **options)
            else:
                module.hutchinson_ema_(lists["h"], lists["g"], lists.get("u"), **options)
            return lists["h"]

        found = run(sophia)
        with fused_addcmul():
            yield compare("h", found, run(reference))
        if not stochastic:
            exact, made = run(reference, torch.float64), operands(layout, **dtypes)["h"]
            step = spacing(dtypes.get("state", F32))
            # Where terms cancel the rounding is that of the terms, of which h before is one.
            allowed = [x.abs() * (step + 2**-21) + h.double().abs() * 2**-22 for x, h in zip(exact, made, strict=True)]
            test = within(exact, allowed)
            yield compare("h, addcmul in three roundings", found, run(reference), "2^-21 of the terms", test)

    CASES["gnb_ema_" if kind == "gnb" else "hutchinson_ema_", variant] = Case(check)


_refresh("float32", "gnb")
_refresh("float32, scale and skip=0", "gnb", scale=FOUR, skip=torch.tensor(0.0))
_refresh("float32, skip=1", "gnb", skip=torch.tensor(1.0))
_refresh("bfloat16 g", "gnb", g=BF16)
_refresh("float16 g", "gnb", scale=FOUR, g=FP16)
_refresh("bfloat16 h, stochastic", "gnb", stochastic=True, state=BF16)
_refresh("bfloat16 h, nearest", "gnb", state=BF16)
_refresh("given, float32", "given")
_refresh("given, bfloat16 g and u", "given", scale=FOUR, g=BF16)
_refresh("given, float16 g and u", "given", scale=FOUR, g=FP16)
_refresh("given, bfloat16 h", "given", scale=FOUR, state=BF16)
_refresh("drawn, float32", "drawn")
_refresh("drawn, bfloat16 g", "drawn", scale=FOUR, g=BF16)
_refresh("drawn, float16 g", "drawn", scale=FOUR, g=FP16)
_refresh("drawn, bfloat16 h, stochastic", "drawn", stochastic=True, state=BF16)
_refresh("drawn, skip=1", "drawn", skip=torch.tensor(True))


def _probe(dtype):
    def check(layout):
        blank = [torch.full((n,), math.nan, dtype=dtype) for n in layout.sizes]
        found, expected = ([place(t, "u", layout, i) for i, t in enumerate(blank)] for _ in range(2))
        probe.rademacher_(found, refresh=3, **key(layout))
        reference.rademacher_(expected, refresh=3, **key(layout))
        yield compare("u", found, expected)

    CASES["rademacher_", str(dtype).removeprefix("torch.")] = Case(check)


def _norm(dtype):
    def check(layout):
        g = operands(layout, g=dtype)["g"]
        exact = sum((t.double().square().sum() for t in g), torch.zeros((), dtype=torch.float64))
        found = sophia.squared_norm(g)
        yield compare("sum", [found.float().view(1)], [exact.float().view(1)], "1e-6", relative(1e-6))

    CASES["squared_norm", str(dtype).removeprefix("torch.")] = Case(check)


for each in (F32, BF16, FP16):
    _probe(each)
    _norm(each)


def _many(layout):
    """101 tensors in one launch, most of them far smaller than a chunk."""
    layout = Layout((5,) * 100 + (5000,), False) if layout is AWKWARD else Layout((4096,) * 2)
    found, expected = operands(layout), operands(layout)
    sophia.sophia_step_(**found, **SCALARS)
    reference.sophia_step_(**expected, **SCALARS)
    yield compare("p", found["p"], expected["p"])
    yield compare("m", found["m"], expected["m"])


def _strides(layout):
    """Tensors that are not contiguous: transposed alike (walked in memory order), or one of them alone (copied)."""
    for which in (("p", "g", "m", "h"), ("g",)):
        lists = [operands(Layout((70 * 130,)), **HALF) for _ in range(2)]
        for each in lists:
            for name in each:
                t = each[name][0].view(70, 130)
                each[name] = [t.t().contiguous().t() if name in which else t]
        sophia.sophia_step_(**lists[0], **SCALARS)
        reference.sophia_step_(**lists[1], **SCALARS)
        for name in ("p", "m"):
            yield compare(f"{name}, {len(which)} transposed", lists[0][name], lists[1][name])


ODD = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-40, -1e-40, 1e-45, 3e38, -3e38, 1.0, 1e-3])


def _special_values(layout):
    """NaN, infinities, zeros of both signs and subnormals, wherever they stand: every triple of ODD in p, g and m."""
    grid = torch.cartesian_prod(ODD, ODD, ODD)
    columns = [grid[:, 0], grid[:, 1], grid[:, 2], grid[:, 1].abs()]
    columns = [torch.cat((c, c.flip(0), c.roll(7), c[:5])) for c in columns]  # full chunks and a tail

    def lists(*dtypes):
        return {k: [place(t.to(d), k)] for k, t, d in zip(("p", "g", "m", "h"), columns, dtypes, strict=True)}

    for dtypes in ((F32,) * 4, (BF16, BF16, F32, F32)):
        for denominator in ("add", "max"):
            options = SCALARS | {"denominator": denominator, "eps": 1e-12}
            if dtypes[0] == BF16:
                options |= {"step": torch.tensor(3.0), "seed": 4, "parameter": [1]}
            found, expected = lists(*dtypes), lists(*dtypes)
            sophia.sophia_step_(**found, **options)
            reference.sophia_step_(**expected, **options)
            for name in ("p", "m"):
                yield compare(f"{name}, {denominator}", found[name], expected[name])


CASES["sophia_step_", "float32, many tensors"] = Case(_many)
CASES["sophia_step_", "bfloat16, nearest, strided"] = Case(_strides, elements=None)
CASES["sophia_step_", "special values"] = Case(_special_values, elements=None)
