"""The workload of 8-bit state: its update against copy bandwidth and float32 state, and its check in float64."""

import torch

from growkit import reference
from growkit.bench.measure import Case, paired
from growkit.bench.sophia import SCALARS, Lists, copy_pair, with_state, within
from growkit.optim.state import held


def update(model, device, tiny=False):
    """`SophiaG.step()` with m and h in 8 bits, on the GPU's clock, against copy bandwidth and float32 m and h."""
    lists = Lists(model, device, tiny)
    narrow, wide = (with_state(lists.parameters(), state_dtype=kind) for kind in ("8bit", torch.float32))

    def states(key):
        states = [held(narrow.state[p]) for p in narrow.param_groups[0]["params"]]
        return [reference.dequantise(s[key], s[scale]) if (scale := f"{key}_scale") in s else s[key] for s in states]

    def check():
        """p as float64 has it from the decoded state; m within a code's spacing, 3.4 decades/126 of 12 decades."""
        narrow.step()
        lists.renew("pg")
        before = [t.double() for t in lists.p], [t.double() for t in states("exp_avg")], states("hessian")
        narrow.step()
        eps, lr = torch.finfo(torch.float32).eps, SCALARS["lr"]
        for i, (p, m, h, g, after) in enumerate(zip(*before, lists.g, states("exp_avg"), strict=True)):
            terms = eps * (m.abs() + g.double().abs())
            reference.sophia_step_([p], [g.double()], [m], [h.double()], eps=1e-15, **SCALARS)
            d = h.double() * SCALARS["rho_bs"] + 1e-15
            within(f"p[{i}]", lists.p[i], p, 4 * eps * p.abs() + lr * (8 * eps + 8 * terms / d).clamp(max=2))
            within(f"m[{i}]", after, m, 0.35 * m.abs() + 1e-11 * m.abs().amax() + 4 * terms)

    def nbytes():
        moved = {"exp_avg": 2, "exp_avg_scale": 2, "hessian": 1, "hessian_scale": 1}
        return lists.nbytes("pgp") + sum(
            times * s[key].nbytes for s in narrow.state.values() for key, times in moved.items() if key in s
        )

    def rows(rounds):
        copy, copied = copy_pair(device, tiny)
        contenders = {"growkit": narrow.step, "copy": copy, "float32": wide.step}
        pairs = paired(contenders, "gpu", rounds, before=lambda _: lists.renew("g"))
        return {
            "S9.8bit.copy": pairs.ratio("copy", "growkit", nbytes() / copied),
            "S9.8bit.time": pairs.ratio("growkit", "float32"),
        }

    return Case(narrow.step, check, rows, bytes=nbytes())
