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


def three_rates(ask: Ask, base: dict) -> dict | None:
    """The best of lr, half and double it on seed 0."""
    lr = base["stages"][-1]["lr"]
    trials = [(ask(each), each) for each in (changed(base, lr=lr * by) for by in (1, 0.5, 2))]
    return None if None in [bits for bits, _ in trials] else better(trials)


def over_seeds(ask: Ask, config: dict, seeds=(0, 1, 2)) -> list[float] | None:
    """Final losses by seed, or None while one is missing."""
    found = [ask(seeded(config, seed)) for seed in seeds]
    return None if None in found else found


# --- A: optimizers ----------------------------------------------------------------------------------------------------

SIZE, SHORT, LONG = "2x64", 600, 2400

# optimizer: (first setting, the two other values of two more coordinates): 8 trials each
OPTIMIZERS = {
    "adamw": ({"lr": 4e-3, "beta2": 0.95}, {"beta1": (0.8, 0.95), "beta2": (0.9, 0.99)}),
    "nadamw": ({"lr": 4e-3, "beta2": 0.95}, {"beta1": (0.8, 0.95), "beta2": (0.9, 0.99)}),
    "lion": ({"lr": 1e-3, "beta2": 0.95}, {"beta1": (0.8, 0.6), "beta2": (0.9, 0.98)}),
    "sign": ({"lr": 1e-3, "beta1": 0.8}, {"beta1": (0.9, 0.7), "weight_decay": (0.4, 0.0)}),
    "sophiag": ({"lr": 1e-3, "beta1": 0.8, "rho": 0.05}, {"beta1": (0.9, 0.7), "rho": (0.2, 0.0125)}),
    "sophiah": ({"lr": 1e-3, "beta1": 0.8, "rho": 0.01}, {"beta1": (0.9, 0.7), "rho": (0.04, 0.0025)}),
    "nesterov": ({"lr": 1e-3, "beta1": 0.9, "rho": 0.05}, {"beta1": (0.95, 0.8), "rho": (0.2, 0.0125)}),
    "mixed": (
        {"lr": 1e-3, "beta1": 0.8, "rho": 0.05, "other_lr": 4e-3},
        {"beta1": (0.9, 0.7), "other_lr": (2e-3, 8e-3)},
    ),
}


def optimizer_config(name: str, scale: float = 1.0, size: str = SIZE) -> dict:
    steps = max(2, round(SHORT * scale))
    return config({"size": size, "optimizer": name, "steps": steps, **OPTIMIZERS[name][0]})


def tuned(ask: Ask, name: str, scale: float = 1.0) -> Found | None:
    """The better, over three seeds, of the best two settings of 8 trials on seed 0."""
    found = search(ask, optimizer_config(name, scale), OPTIMIZERS[name][1])
    if found is None:
        return None
    means = [(over_seeds(ask, each), each) for _, each in found.trials[:2]]
    if None in [bits for bits, _ in means]:
        return None
    return Found(better([(sum(bits), each) for bits, each in means]), found.trials)


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

SMALL, BETWEEN, LARGE, TOTAL = "1x32", "2x48", "4x64", 6e11
SIZES = ("1x32", "1x48", "2x32", "2x48", "3x48", "3x64", "4x64")
SMALL_STEPS, SMALL_LR, DIRECT_LR, GROWN_LR = 1500, 6e-3, 4e-3, 2.5e-3
STARTS = ("lossless", "stack", "interpolate", "hypercloning", "lemon", "official")


def direct(size: str, scale: float = 1.0) -> dict:
    """One size for all FLOPs."""
    return config({"size": size, "lr": DIRECT_LR, "beta2": 0.95, "flops": TOTAL * scale})


def small_stage(steps: int, scale: float = 1.0) -> dict:
    return {"size": SMALL, "lr": SMALL_LR, "beta2": 0.95, "steps": max(2, round(steps * scale)), "decay": 0}


def grown(start: str, scale: float = 1.0, small_steps: int = SMALL_STEPS, **last: Any) -> dict:
    large = {"size": LARGE, "start": start, "lr": GROWN_LR, "beta2": 0.95, "flops": TOTAL * scale}
    return config(small_stage(small_steps, scale), large | last)


def best_grown(ask: Ask, start: str, scale: float = 1.0, **last: Any) -> dict | None:
    return three_rates(ask, grown(start, scale, **last))


def growth(ask: Ask, scale: float = 1.0) -> None:
    """At equal total FLOPs: every start of growth, and every size trained directly."""
    for base in [direct(LARGE, scale), grown("lossless", scale), direct(BETWEEN, scale), direct(SMALL, scale)]:
        if best := three_rates(ask, base):
            over_seeds(ask, best)
    for start in STARTS[1:]:
        if best := best_grown(ask, start, scale):
            over_seeds(ask, best)
    if best := best_grown(ask, "official", scale, fit=fits(scale)[2]):
        over_seeds(ask, best)
    if best := best_grown(ask, "lossless", scale):
        for steps in fits(scale):
            over_seeds(ask, changed(best, fit=steps))
        over_seeds(ask, changed(best, carry=True))
    if best := three_rates(ask, twice(scale)):
        over_seeds(ask, best)
    for size in SIZES:
        if best := three_rates(ask, direct(size, scale)):
            over_seeds(ask, best)


def fits(scale: float = 1.0) -> list[int]:
    return [max(2, round(steps * scale)) for steps in (20, 50, 100)]


def twice(scale: float = 1.0) -> dict:
    """Two growths: the size between is trained for a fifth of all FLOPs."""
    between = {"size": BETWEEN, "start": "lossless", "lr": GROWN_LR, "beta2": 0.95, "decay": 0}
    large = {"size": LARGE, "start": "lossless", "lr": GROWN_LR, "beta2": 0.95, "flops": TOTAL * scale}
    small = small_stage(SMALL_STEPS * 2 // 3, scale)
    return config(small, between | {"flops": TOTAL * scale * 0.35}, large)


STUDIES = {"optimizers": optimizers, "growth": growth, "horizons": horizons}
