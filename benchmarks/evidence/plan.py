"""The studies: which runs each needs, given what is known so far.

A study is a function of `ask`, which returns the final loss of a config, or None while that is not known; it asks for
more as answers come. `scale` multiplies all numbers of steps and FLOPs, for tests.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

Ask = Callable[[dict], float | None]

# --- configs ----------------------------------------------------------------------------------------------------------


def config(*stages: dict, seed: int = 0, **others: Any) -> dict:
    defaults = {"warmup": 30, "decay": 0.4, "beta1": 0.9, "optimizer": "adamw"}
    whole = {"task": "lm", "seed": seed, "batch": 16, "context": 32, **others}
    return whole | {"stages": [defaults | stage for stage in stages]}


def changed(config: dict, **last: Any) -> dict:
    """The same with other values in its last stage."""
    *others, stage = config["stages"]
    return config | {"stages": [*others, stage | last]}


def seeded(config: dict, seed: int) -> dict:
    return config | {"seed": seed}


class Found(NamedTuple):
    """The best setting of a search, and all its trials, best first, as (loss, config)."""

    config: dict
    trials: list


def better(trials):
    return min(trials, key=lambda trial: trial[0])[1]


def search(ask: Ask, base: dict, others: dict[str, tuple] | None = None) -> Found | None:
    """One coordinate after the other on seed 0: four learning rates, then the other values of each of `others`.

    The rates: that of `base`, half and double it; then, where an end is best, one further out, else the one between the
    best two. None while a trial is missing.
    """
    lr = base["stages"][-1]["lr"]
    trials = [(ask(each), each) for each in (changed(base, lr=lr * by) for by in (0.5, 1, 2))]
    if None in [bits for bits, _ in trials]:
        return None
    low, middle, high = (bits for bits, _ in trials)
    if middle <= min(low, high):
        by = math.sqrt(0.5 if low < high else 2)
    else:
        by = 4 if high < low else 0.25
    fourth = changed(base, lr=lr * by)
    trials.append((ask(fourth), fourth))
    for name, values in (others or {}).items():
        if None in [bits for bits, _ in trials]:
            return None
        best = better(trials)
        trials += [(ask(each), each) for each in (changed(best, **{name: value}) for value in values)]
    if None in [bits for bits, _ in trials]:
        return None
    return Found(better(trials), sorted(trials, key=lambda trial: trial[0]))


def two_rates(ask: Ask, base: dict) -> dict | None:
    """The better of lr and 1.6 times it on seed 0."""
    lr = base["stages"][-1]["lr"]
    trials = [(ask(each), each) for each in (base, changed(base, lr=1.6 * lr))]
    return None if None in [bits for bits, _ in trials] else better(trials)


def tried_on_seeds(ask: Ask, base: dict) -> list[float] | None:
    best = two_rates(ask, base)
    return best and over_seeds(ask, best)


def over_seeds(ask: Ask, config: dict, seeds=(0, 1, 2)) -> list[float] | None:
    """Final losses by seed, or None while one is missing."""
    found = [ask(seeded(config, seed)) for seed in seeds]
    return None if None in found else found


# --- A: optimizers ----------------------------------------------------------------------------------------------------

SIZE, SHORT, LONG = "2x64", 600, 2400

# optimizer: (first setting, another value of two more coordinates): 6 trials each
OPTIMIZERS = {
    "adamw": ({"lr": 4e-3, "beta2": 0.95}, {"beta1": (0.8,), "beta2": (0.99,)}),
    "nadamw": ({"lr": 4e-3, "beta2": 0.95}, {"beta1": (0.8,), "beta2": (0.99,)}),
    "sign": ({"lr": 5e-4, "beta1": 0.8}, {"beta1": (0.9,), "weight_decay": (0.4,)}),
    "sophiag": ({"lr": 5e-4, "beta1": 0.8, "rho": 0.05}, {"beta1": (0.9,), "rho": (0.2,)}),
    "sophiah": ({"lr": 5e-4, "beta1": 0.8, "rho": 0.01}, {"beta1": (0.9,), "rho": (0.04,)}),
    "nesterov": ({"lr": 5e-4, "beta1": 0.9, "rho": 0.05}, {"beta1": (0.8,), "rho": (0.2,)}),
    "lion": ({"lr": 5e-4, "beta1": 0.8, "beta2": 0.9}, {"beta1": (0.65,), "beta2": (0.8,)}),
    "mixed": (
        {"lr": 5e-4, "beta1": 0.8, "rho": 0.05, "other_lr": 4e-3},
        {"beta1": (0.9,), "other_lr": (2e-3,)},
    ),
}


def optimizer_config(name: str, scale: float = 1.0, size: str = SIZE) -> dict:
    steps = max(2, round(SHORT * scale))
    return config({"size": size, "optimizer": name, "steps": steps, **OPTIMIZERS[name][0]})


def tuned(ask: Ask, name: str, scale: float = 1.0) -> Found | None:
    """The best of 6 trials on seed 0, once it has run on three seeds."""
    found = search(ask, optimizer_config(name, scale), OPTIMIZERS[name][1])
    return found if found and over_seeds(ask, found.config) else None


def optimizers(ask: Ask, scale: float = 1.0) -> None:
    """Eight optimizers tuned alike at a short horizon."""
    for name in OPTIMIZERS:
        tuned(ask, name, scale)


def horizons(ask: Ask, scale: float = 1.0) -> None:
    """The tuned settings at four times the steps, with the learning rate or half of it."""
    for name in OPTIMIZERS:
        at_horizon(ask, name, LONG, scale)


def at_horizon(ask: Ask, name: str, steps: int, scale: float = 1.0) -> dict | None:
    found = tuned(ask, name, scale)
    if found is None:
        return None
    longer = changed(found.config, steps=max(2, round(steps * scale)))
    lr = longer["stages"][-1]["lr"]
    trials = [(ask(each), each) for each in (longer, changed(longer, lr=lr / 2))]
    if None in [bits for bits, _ in trials]:
        return None
    over_seeds(ask, better(trials))
    return better(trials)


# --- B: growth --------------------------------------------------------------------------------------------------------

SMALL, BETWEEN, LARGE, TOTAL = "1x32", "2x48", "4x64", 3e11
SIZES = (SMALL, "1x48", BETWEEN, "3x64", LARGE)
SMALL_STEPS, SMALL_LR, LR, BETA2 = 1000, 4e-3, 1.5e-3, 0.99  # near what the study of optimizers found
STARTS = ("lossless", "official", "stack", "hypercloning")


def direct(size: str, scale: float = 1.0) -> dict:
    """One size for all FLOPs."""
    return config({"size": size, "lr": SMALL_LR if size == SMALL else LR, "beta2": BETA2, "flops": TOTAL * scale})


def small_stage(steps: int, scale: float = 1.0) -> dict:
    return {"size": SMALL, "lr": SMALL_LR, "beta2": BETA2, "steps": max(2, round(steps * scale)), "decay": 0}


def grown(start: str, scale: float = 1.0, small_steps: int = SMALL_STEPS, **last: Any) -> dict:
    large = {"size": LARGE, "start": start, "lr": LR, "beta2": BETA2, "flops": TOTAL * scale}
    return config(small_stage(small_steps, scale), large | last)


def growth(ask: Ask, scale: float = 1.0) -> None:
    """At equal total FLOPs: starts of growth, operator steps, and every size trained directly."""
    for base in (direct(LARGE, scale), grown("lossless", scale), direct(BETWEEN, scale), direct(SMALL, scale)):
        tried_on_seeds(ask, base)
    for base in [grown(start, scale) for start in STARTS[1:]] + [grown("official", scale, fit=fits(scale)[-1])]:
        tried_on_seeds(ask, base)
    if best := two_rates(ask, grown("lossless", scale)):
        for last in [{"fit": steps} for steps in fits(scale)] + [{"carry": True}]:
            over_seeds(ask, changed(best, **last))
    for size in SIZES:
        tried_on_seeds(ask, direct(size, scale))


def more_growth(ask: Ask, scale: float = 1.0) -> None:
    """The starts that the study of growth leaves out, and two growths in place of one."""
    for base in (twice(scale), grown("lemon", scale), grown("interpolate", scale)):
        tried_on_seeds(ask, base)


def fits(scale: float = 1.0) -> list[int]:
    return [max(2, round(steps * scale)) for steps in (20, 50, 100)]


def twice(scale: float = 1.0) -> dict:
    """Two growths: the size between is trained for a fifth of all FLOPs."""
    between = {"size": BETWEEN, "start": "lossless", "lr": LR, "beta2": BETA2, "decay": 0}
    large = {"size": LARGE, "start": "lossless", "lr": LR, "beta2": BETA2, "flops": TOTAL * scale}
    small = small_stage(SMALL_STEPS, scale)
    return config(small, between | {"flops": TOTAL * scale * 0.35}, large)


# --- C: both ----------------------------------------------------------------------------------------------------------

SHARES = (0.4, 0.6)  # of the FLOPs: shorter runs, with a schedule of their own


def by_sophia(ask: Ask, base: dict, scale: float = 1.0) -> dict | None:
    """`base` with SophiaG in its last stage, by what the study of optimizers found, and that lr or 1.6 times it."""
    found = tuned(ask, "sophiag", scale)
    if found is None:
        return None
    options = {name: found.config["stages"][-1][name] for name in ("optimizer", "lr", "beta1", "rho")}
    *others, stage = base["stages"]
    stage = {name: value for name, value in stage.items() if name != "beta2"}  # AdamW's
    return two_rates(ask, base | {"stages": [*others, stage | options]})


def both(ask: Ask, scale: float = 1.0) -> None:
    """Growth with SophiaG after it; and what shorter runs, with and without growth, reach."""
    for base in (grown("lossless", scale), direct(LARGE, scale)):
        if best := by_sophia(ask, base, scale):
            over_seeds(ask, best)
    for best in arms(ask, scale).values():
        for share in SHARES if best else ():
            over_seeds(ask, shorter(best, share))


def arms(ask: Ask, scale: float = 1.0) -> dict[str, dict | None]:
    """What is compared at several totals: the settings are those found at the whole of it."""
    return {
        "grown, SophiaG": by_sophia(ask, grown("lossless", scale), scale),
        "grown": two_rates(ask, grown("lossless", scale)),
        "middle size": two_rates(ask, direct(BETWEEN, scale)),
    }


def shorter(config: dict, share: float) -> dict:
    return changed(config, flops=config["stages"][-1]["flops"] * share)


# --- when to grow, and details ----------------------------------------------------------------------------------------

GROWN_AT = (250, 500, 1000, 2000, 3000)


def when(ask: Ask, scale: float = 1.0) -> None:
    """The small model grown at several points of its training, all else equal."""
    if best := two_rates(ask, grown("lossless", scale)):
        for steps in GROWN_AT:
            over_seeds(ask, grown_at(best, steps, scale))


def grown_at(best: dict, steps: int, scale: float = 1.0) -> dict:
    return best | {"stages": [config(small_stage(steps, scale))["stages"][0], best["stages"][-1]]}


# name: what changes in the tuned setting
DETAILS = {
    "sophiag": {
        "no curvature": {"rho": 1e-9},
        "h corrected": {"optimizer": "corrected"},
        "50 refreshes at first": {"optimizer": "early"},
        "official": {"lr": 6e-4, "beta1": 0.965, "rho": 0.05, "weight_decay": 0.2},
        "weight decay x4": {"weight_decay": 0.4},
        "warm-up 120": {"warmup": 120},
        "linear decay": {"decay": 1.0},
    },
    "adamw": {"warm-up 120": {"warmup": 120}, "linear decay": {"decay": 1.0}, "weight decay x4": {"weight_decay": 0.4}},
    "nesterov": {"no curvature": {"rho": 1e-9}},
}


def details(ask: Ask, scale: float = 1.0) -> None:
    """One change at a time to the tuned settings of the short horizon."""
    for name, changes in DETAILS.items():
        if found := tuned(ask, name, scale):
            for change in changes.values():
                over_seeds(ask, changed(found.config, **change))


LARGER = "4x96"


def size(ask: Ask, scale: float = 1.0) -> None:
    """The contenders on a model of three times the size: the tuned lr or half of it, all else as tuned."""
    for name in ("adamw", "nadamw", "sophiag", "nesterov"):
        at_size(ask, name, scale)


def at_size(ask: Ask, name: str, scale: float = 1.0) -> dict | None:
    found = tuned(ask, name, scale)
    if found is None:
        return None
    larger = changed(found.config, size=LARGER)
    trials = [(ask(each), each) for each in (larger, changed(larger, lr=larger["stages"][-1]["lr"] / 2))]
    if None in [bits for bits, _ in trials]:
        return None
    over_seeds(ask, better(trials))
    return better(trials)


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


_ALL = (optimizers, growth, both, horizons, when, details, more_growth, size, vit)
STUDIES = {study.__name__: study for study in _ALL}
