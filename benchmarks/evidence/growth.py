"""The studies of docs/results/growth.md, as those of `sophia`."""

from typing import Any

from benchmarks.evidence import sophia
from benchmarks.evidence.search import Ask, better, changed, config, over_seeds, three_rates, two_rates, until_worse

SMALL, BETWEEN, LARGE = "1x32", "2x48", "4x64"
OTHER_SIZES = ("1x48", "3x64")
TOTAL, START_TOTAL = 9e11, 3e11  # FLOPs of a run, everything counted; of those that compare starts
SMALL_STEPS, SMALL_LR, LR, BETA2 = 1000, 4e-3, 1.5e-3, 0.99  # near what the study of optimizers found
STARTS = ("lossless", "official", "stack", "hypercloning")
MORE_STARTS = ("lemon", "interpolate", "net2net", "fpi", "aki")
FITS = (20, 50, 100)


def direct(size: str, scale: float = 1.0, total: float = TOTAL) -> dict:
    """One size for all FLOPs."""
    lr = SMALL_LR if size == SMALL else LR
    return config({"size": size, "lr": lr, "beta2": BETA2, "flops": total * scale})


def small_stage(steps: int, scale: float = 1.0) -> dict:
    return {"size": SMALL, "lr": SMALL_LR, "beta2": BETA2, "steps": max(2, round(steps * scale)), "decay": 0}


def grown(start: str, scale: float = 1.0, total: float = TOTAL, **last: Any) -> dict:
    large = {"size": LARGE, "start": start, "lr": LR, "beta2": BETA2, "flops": total * scale}
    return config(small_stage(SMALL_STEPS, scale), large | last)


def growth(ask: Ask, scale: float = 1.0) -> None:
    """Growing against its ends, and against every other size, at equal total FLOPs."""
    for arm in growth_arms(ask, scale).values():
        if arm:
            over_seeds(ask, arm)
    over_seeds(ask, config(small_stage(SMALL_STEPS, scale)))  # for its curve
    for size in OTHER_SIZES:
        if arm := other_size(ask, size, scale):
            over_seeds(ask, arm)


def growth_arms(ask: Ask, scale: float = 1.0) -> dict[str, dict | None]:
    never = direct(SMALL, scale)
    return {
        f"{LARGE} from scratch": three_rates(ask, direct(LARGE, scale)),
        f"{SMALL} grown into {LARGE}": three_rates(ask, grown("lossless", scale)),
        f"{BETWEEN} from scratch": three_rates(ask, direct(BETWEEN, scale)),
        f"{SMALL} never grown": changed(never, lr=1.6 * never["stages"][-1]["lr"]),
    }


def other_size(ask: Ask, size: str, scale: float = 1.0) -> dict | None:
    """Untuned: the learning rate is that of the size between."""
    best = three_rates(ask, direct(BETWEEN, scale))
    return best and changed(best, size=size)


MORE_SEEDS = (0, 1, 2, 3, 4)


def best_size(ask: Ask, scale: float = 1.0) -> None:
    """Growing into the size that does best from scratch, against that size; and, untuned, into the others."""
    if grown_into := into_between(ask, scale):
        over_seeds(ask, grown_into)
        over_seeds(ask, changed(grown_into, flops=TOTALS[1] * scale))
        over_seeds(ask, grown_into, MORE_SEEDS)
        for size in OTHER_SIZES:
            over_seeds(ask, changed(grown_into, size=size))
    if from_scratch := three_rates(ask, direct(BETWEEN, scale)):
        over_seeds(ask, from_scratch, MORE_SEEDS)


def into_between(ask: Ask, scale: float = 1.0) -> dict | None:
    base = changed(grown("lossless", scale), size=BETWEEN)
    return two_rates(ask, changed(base, lr=1.6 * LR))


def starts(ask: Ask, scale: float = 1.0) -> None:
    """Ways to start the large model, and operator steps, at a third of the FLOPs."""
    for arm in start_arms(ask, scale).values():
        if arm:
            over_seeds(ask, arm)


def start_arms(ask: Ask, scale: float = 1.0) -> dict[str, dict | None]:
    total = START_TOTAL
    arms = {f"{LARGE} from scratch": two_rates(ask, direct(LARGE, scale, total))}
    arms[f"{SMALL} never grown"] = two_rates(ask, direct(SMALL, scale, total))
    arms |= {start: two_rates(ask, grown(start, scale, total)) for start in STARTS}
    lossless = arms["lossless"]
    for steps in FITS:
        fit = max(2, round(steps * scale))
        arms[f"lossless, {steps} operator steps"] = lossless and changed(lossless, fit=fit)
    arms[f"official, {steps} operator steps"] = two_rates(ask, grown("official", scale, total, fit=fit))
    arms["lossless, the optimizer's state grown too"] = lossless and changed(lossless, carry=True)
    return arms


def more_starts(ask: Ask, scale: float = 1.0) -> None:
    """The other starts, and two growths in place of one."""
    for arm in more_start_arms(ask, scale).values():
        if arm:
            over_seeds(ask, arm)


def more_start_arms(ask: Ask, scale: float = 1.0) -> dict[str, dict | None]:
    arms = {start: two_rates(ask, grown(start, scale, START_TOTAL)) for start in MORE_STARTS}
    return arms | {f"lossless, twice, by way of {BETWEEN}": two_rates(ask, twice(scale))}


def twice(scale: float = 1.0) -> dict:
    """Two growths: after the small model's, the size between trains until two fifths of all FLOPs are spent."""
    between = {"size": BETWEEN, "start": "lossless", "lr": LR, "beta2": BETA2, "decay": 0}
    large = {"size": LARGE, "start": "lossless", "lr": LR, "beta2": BETA2, "flops": START_TOTAL * scale}
    return config(small_stage(SMALL_STEPS, scale), between | {"flops": START_TOTAL * scale * 0.4}, large)


# arm: (what changes in the small model's stage, in the large one's)
RESTARTS = {
    "new optimizer, warm-up": ({}, {}),
    "new optimizer, no warm-up": ({}, {"warmup": 1}),
    "grown optimizer, warm-up": ({}, {"carry": True}),
    "grown optimizer, no warm-up": ({}, {"carry": True, "warmup": 1}),
    "small model's rate brought to 0 first": ({"decay": 0.4}, {}),
    "decay over the last 20 %": ({}, {"decay": 0.2}),
    "decay over the last 60 %": ({}, {"decay": 0.6}),
    "decay from the start": ({}, {"decay": 1.0}),
}


def restarts(ask: Ask, scale: float = 1.0) -> None:
    """How the learning rate and the optimizer's state come through growth, with a lossless start."""
    for arm in RESTARTS:
        if best := restart(ask, arm, scale):
            over_seeds(ask, best)


def restart(ask: Ask, arm: str, scale: float = 1.0) -> dict | None:
    before, after = RESTARTS[arm]
    base = grown("lossless", scale, START_TOTAL, **after)
    small, large = base["stages"]
    return two_rates(ask, base | {"stages": [small | before, large]})


# --- C: both ----------------------------------------------------------------------------------------------------------

TOTALS = (3e11, 6e11, TOTAL)  # runs with a schedule of their own


def by_sophia(ask: Ask, base: dict, scale: float = 1.0) -> dict | None:
    """`base` with SophiaG in its last stage, by what the study of optimizers found, and that lr or 1.6 times it."""
    found = sophia.tuned(ask, "sophiag", scale)
    if found is None:
        return None
    options = {name: found.config["stages"][-1][name] for name in ("optimizer", "lr", "beta1", "rho")}
    *others, stage = base["stages"]
    stage = {name: value for name, value in stage.items() if name != "beta2"}  # AdamW's
    return two_rates(ask, base | {"stages": [*others, stage | options]})


def both(ask: Ask, scale: float = 1.0) -> None:
    """Growth with SophiaG after it; and what shorter runs, with and without growth, reach."""
    for best in both_arms(ask, scale).values():
        for total in TOTALS if best else ():
            over_seeds(ask, changed(best, flops=total * scale))


def both_arms(ask: Ask, scale: float = 1.0) -> dict[str, dict | None]:
    """What is compared at several totals: the settings are those found at the whole of it."""
    arms = growth_arms(ask, scale)
    return {
        f"{SMALL} grown into {LARGE}, then SophiaG": by_sophia(ask, grown("lossless", scale), scale),
        f"{SMALL} grown into {LARGE}, AdamW": arms[f"{SMALL} grown into {LARGE}"],
        f"{BETWEEN} from scratch, AdamW": arms[f"{BETWEEN} from scratch"],
    }


# --- when to grow -----------------------------------------------------------------------------------------------------

GROWN_AT = (500, SMALL_STEPS, 2000, 4000, 8000)


def when(ask: Ask, scale: float = 1.0) -> None:
    """The small model grown at several points of its training, all else equal; and how fast its loss falls there."""
    if best := growth_arms(ask, scale)[f"{SMALL} grown into {LARGE}"]:
        for steps in GROWN_AT:
            over_seeds(ask, grown_at(best, steps, scale))
    over_seeds(ask, falls(scale))


def grown_at(best: dict, steps: int, scale: float = 1.0) -> dict:
    """`best`, its small model grown after so many steps."""
    small, large = best["stages"]
    return best | {"stages": [small | {"steps": max(2, round(steps * scale))}, large]}


def falls(scale: float = 1.0) -> dict:
    """The small model alone, up to the last point of growth."""
    return config(small_stage(GROWN_AT[-1], scale) | {"look": max(4, round(100 * scale)), "fall": -1.0})


FALL, LOOK, LATEST = 0.07, 500, 0.5  # the rule, made from seeds 0 to 2 of `when`; LATEST is of all FLOPs
HELD_OUT, POINTS = (3, 4, 5), (500, SMALL_STEPS, 4000)


def rule(ask: Ask, scale: float = 1.0) -> None:
    """Grown by the rule, and at fixed points, on seeds and pairs of sizes that the rule was not made from."""
    for best in rule_cases(ask, scale).values():
        if best:
            for each in (by_rule(best, scale), *(grown_at(best, steps, scale) for steps in POINTS)):
                over_seeds(ask, each, HELD_OUT)


def rule_cases(ask: Ask, scale: float = 1.0) -> dict[str, dict | None]:
    """What is grown, but for the point of growth."""
    small, large = OTHER_SIZES
    other = grown("lossless", scale, lr=2.56 * LR, size=large)  # untuned: what the sizes between and large had as best
    other["stages"][0]["size"] = small
    return {
        f"{SMALL} into {LARGE}": growth_arms(ask, scale)[f"{SMALL} grown into {LARGE}"],
        f"{small} into {large}": other,
        f"{SMALL} into {LARGE}, a third of the FLOPs": start_arms(ask, scale)["lossless"],
    }


def by_rule(best: dict, scale: float = 1.0) -> dict:
    """`best`, its small model grown when its loss falls more slowly, and before more than LATEST is spent."""
    small, large = best["stages"]
    small = {name: value for name, value in small.items() if name != "steps"}
    small |= {"flops": LATEST * large["flops"], "look": max(4, round(LOOK * scale)), "fall": FALL}
    return best | {"stages": [small, large]}


# --- a million parameters ---------------------------------------------------------------------------------------------

SMALLER, BELOW, MIDDLE = "2x64", "3x64", "3x96"
MILLION_TOTAL = 9.74e12  # what the steps of `sophia.million` cost
SHARES = (1 / 3, 2 / 3, 1)  # of it; runs with a schedule of their own
# run: (its size at the end, whether it is grown into that)
MILLION_ARMS = {
    f"{sophia.MILLION} from scratch": (sophia.MILLION, False),
    f"{SMALLER} grown into {sophia.MILLION}": (sophia.MILLION, True),
    f"{MIDDLE} from scratch": (MIDDLE, False),
    f"{SMALLER} grown into {MIDDLE}": (MIDDLE, True),
    f"{BELOW} from scratch": (BELOW, False),
    f"{SMALLER} grown into {BELOW}": (BELOW, True),
    f"{SMALLER} never grown": (SMALLER, False),
}


def million_growth(ask: Ask, scale: float = 1.0) -> None:
    """Growing into a million parameters, and into a size between, against every size; and what shorter runs reach."""
    arms = {arm: million_arm(ask, *arm, scale) for arm in MILLION_ARMS.values()}
    if grown := arms[sophia.MILLION, True]:
        for share in SHARES[:-1]:
            over_seeds(ask, shortened(grown, share))
    if large := arms[sophia.MILLION, False]:
        over_seeds(ask, shortened(large, SHARES[-2]))
    if middle := arms[MIDDLE, False]:  # its first two trials are alike, so on the other side of these, too
        ask(changed(middle, lr=sophia.tuned(ask, "adamw", scale).config["stages"][-1]["lr"] / 2))
    if into_below := arms[BELOW, True]:
        over_seeds(ask, into_below)


def million_arm(ask: Ask, size: str, grown: bool, scale: float = 1.0) -> dict | None:
    """Everything but the rates is AdamW's of `sophia.million`; these are searched for as there.

    Growing into BELOW is untuned: the learning rate is that of growing into MIDDLE.
    """
    if grown and size == BELOW:
        best = million_arm(ask, MIDDLE, True, scale)
        return best and changed(best, size=size)
    scratch = sophia.at_million(ask, "adamw", scale)
    if scratch is None or (size == sophia.MILLION and not grown):
        return scratch and scratch.config
    base = sophia.tuned(ask, "adamw", scale).config["stages"][-1]
    small = base | {"steps": max(2, round(sophia.MILLION_STEPS * scale)), "decay": 0}
    last = {name: value for name, value in base.items() if name != "steps"}
    last |= {"size": size, "flops": MILLION_TOTAL * scale}
    found = until_worse(ask, config(small, last | {"start": "lossless"}) if grown else config(last))
    return found and found.config


def shortened(arm: dict, share: float) -> dict:
    """`arm` with its last stage ending at a share of the FLOPs of all, or, of one from scratch, of the steps."""
    stage = arm["stages"][-1]
    if "flops" in stage:
        return changed(arm, flops=stage["flops"] * share)
    return changed(arm, steps=max(2, round(stage["steps"] * share)))


# --- ViT --------------------------------------------------------------------------------------------------------------

VIT_RATES = (2e-3, 8e-3)
VIT_ARMS = {
    "scratch": {},
    "never grown": {},
    "lossless": {"start": "lossless"},
    "lossless, fitted": {"start": "lossless", "fit": 20},
    "stack": {"start": "stack"},
    "hypercloning": {"start": "hypercloning"},
    "official, fitted": {"start": "official", "fit": 20},
}


def vit_config(arm: str, lr: float, scale: float = 1.0) -> dict:
    return {"task": "vit", "seed": 0, "scale": scale, "stages": [{"arm": arm, "lr": lr, "decay": 0.4, **VIT_ARMS[arm]}]}


def vit(ask: Ask, scale: float = 1.0) -> None:
    """Growth of a ViT on handwritten digits, at equal total FLOPs."""
    for arm in VIT_ARMS:
        trials = [(ask(each), each) for each in (vit_config(arm, lr, scale) for lr in VIT_RATES)]
        if None not in [loss for loss, _ in trials]:
            over_seeds(ask, better(trials))


STUDIES = (growth, best_size, starts, more_starts, restarts, both, when, rule, million_growth, vit)
