"""Update and refreshes with m and h in 8-bit codes: the bits of the reference."""

import torch

from growkit import reference
from growkit.kernels import sophia8bit

from .case import Case, Cases
from .compare import compare, few, fused_addcmul, relative
from .launchers import on_device
from .sophia import FOUR, GIVEN, HALF, ODD, SCALARS, counters, untouched
from .tensors import BF16, F32, SIGNED, UNSIGNED, Layout, coded_operands, key

CASES: Cases = {}


def _step(variant, options=None, *, device=(), count=False, **dtypes):
    """device: names of scalars that lie on the device."""

    def check(layout):
        given = SCALARS | (options or {}) | {**key(layout), "step": torch.tensor(7.0)}
        found, expected = coded_operands(layout, **dtypes), coded_operands(layout, **dtypes)
        counts = counters(count)
        there = {name: on_device(float(given[name])) for name in device}
        sophia8bit.sophia_step_8bit_(**found, unclipped=counts[0], **given | there)
        reference.sophia_step_8bit_(**expected, unclipped=counts[1], **given)
        yield compare("m", found["m"], expected["m"])
        yield compare("m_scale", found["m_scale"], expected["m_scale"])
        for name in ("p", "master") if "master" in found else ("p",):
            if not device:
                yield compare(name, found[name], expected[name])
            elif found[name][0].dtype == F32:
                test = relative(2**-21, 2**-21 * SCALARS["lr"])
                yield compare(name, found[name], expected[name], "2^-21", test)
            else:
                yield compare(name, found[name], expected[name], "1/1000 differ", few(1e-3))
        yield from untouched(("g", "h", "h_scale"), found, coded_operands(layout, **dtypes))
        if count:
            yield compare("count", counts[:1], counts[1:])

    CASES["sophia_step_8bit_", variant] = Case(check)


_step("float32")
_step("float32, count", count=True)
_step("float32, max", {"denominator": "max", "eps": 1e-12}, h=SIGNED)
_step("float32, maximize", {"maximize": True}, count=True)
_step("float32, nesterov", {"nesterov": True})
_step("float32, device scalars", GIVEN, device=("lr", "rho_bs", "step"), count=True)
_step("float32, skip=1", {"skip": torch.tensor(1.0)})
_step("bfloat16 g", g=BF16)
_step("bfloat16, stochastic", {"stochastic": True}, **HALF)
_step("bfloat16, nearest", count=True, **HALF)
_step("bfloat16, master", {"stochastic": True}, master=True, **HALF)


def _refresh(variant, kind, *, scale=None, skip=None, **dtypes):
    def check(layout):
        options = {**key(layout), "refresh": 5, "beta2": 0.99, "scale": scale, "skip": skip}
        own = {"h": UNSIGNED if kind == "gnb" else SIGNED} | dtypes
        found, expected = (coded_operands(layout, **own, given=kind == "given") for _ in range(2))
        for module, lists in ((sophia8bit, found), (reference, expected)):
            h = lists["h"], lists["h_scale"]
            with fused_addcmul():
                if kind == "gnb":
                    module.gnb_ema_8bit_(*h, lists["g"], **options)
                else:
                    module.hutchinson_ema_8bit_(*h, lists["g"], lists.get("u"), **options)
        yield compare("h", found["h"], expected["h"])
        yield compare("h_scale", found["h_scale"], expected["h_scale"])

    CASES["gnb_ema_8bit_" if kind == "gnb" else "hutchinson_ema_8bit_", variant] = Case(check)


_refresh("float32", "gnb")
_refresh("float32, signed h, scale", "gnb", h=SIGNED, scale=FOUR)
_refresh("bfloat16 g", "gnb", g=BF16)
_refresh("float32, skip=1", "gnb", skip=torch.tensor(1.0))
_refresh("given, float32", "given")
_refresh("given, bfloat16 g and u", "given", scale=FOUR, g=BF16)
_refresh("drawn, float32", "drawn")
_refresh("drawn, bfloat16 g", "drawn", scale=FOUR, g=BF16)


def _special_values(layout):
    """One ODD value in p and one in g in each block of 256, and blocks of nothing else, through codes and back."""
    for unsigned in (True, False):
        results = []
        for module in (sophia8bit, reference):
            lists = coded_operands(Layout((256 * 160 + 100,)), h=UNSIGNED if unsigned else SIGNED)
            odd = torch.cartesian_prod(ODD, ODD)
            for k, name in enumerate(("p", "g")):
                lists[name][0][17 : 256 * len(odd) : 256] = odd[:, k]
                lists[name][0][256 * 145 : 256 * 157] = ODD.repeat_interleave(256)
            given = {"seed": 4, "parameter": [1]}
            for step in range(2):  # the second reads what the first wrote of NaN and infinities
                module.sophia_step_8bit_(**lists, **SCALARS, **given, step=torch.tensor(float(step)))
                with fused_addcmul():
                    h = lists["h"], lists["h_scale"], lists["g"]
                    module.gnb_ema_8bit_(*h, **given, refresh=step, beta2=0.9)
                    if not unsigned:
                        module.hutchinson_ema_8bit_(*h, lists["p"], **given, refresh=step, beta2=0.9)
            results.append(lists)
        for name in ("p", "m", "m_scale", "h", "h_scale"):
            yield compare(f"{name}, {'un' * unsigned}signed", results[0][name], results[1][name])


CASES["sophia_step_8bit_", "and refreshes, special values"] = Case(_special_values, elements=None)
