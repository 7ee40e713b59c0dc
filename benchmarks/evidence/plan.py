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


def over_seeds(ask: Ask, config: dict, seeds=(0, 1, 2)) -> list[float] | None:
    """Final losses by seed, or None while one is missing."""
    found = [ask(seeded(config, seed)) for seed in seeds]
    return None if None in found else found


# --- A: optimizers ----------------------------------------------------------------------------------------------------

SIZE, SHORT, LONG = "2x64", 600, 1800

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
    """The tuned settings at three times the steps, with the learning rate or half of it."""
    for name in ("adamw", "sophiag", "mixed", "nesterov", "nadamw", "sign", "sophiah", "lion"):
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

SMALL, BETWEEN, LARGE = "1x32", "2x48", "4x64"
OTHER_SIZES = ("1x48", "3x64")
TOTAL, START_TOTAL = 9e11, 3e11  # FLOPs of a run, everything counted; of those that compare starts
SMALL_STEPS, SMALL_LR, LR, BETA2 = 1000, 4e-3, 1.5e-3, 0.99  # near what the study of optimizers found
STARTS = ("lossless", "official", "stack", "hypercloning")
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


def two_rates(ask: Ask, base: dict) -> dict | None:
    """The better of lr and 1.6 times it on seed 0."""
    lr = base["stages"][-1]["lr"]
    trials = [(ask(each), each) for each in (base, changed(base, lr=1.6 * lr))]
    return None if None in [bits for bits, _ in trials] else better(trials)


def three_rates(ask: Ask, base: dict) -> dict | None:
    """The best of 1.6 lr, 2.56 lr and one further at the better end, on seed 0."""
    lr = base["stages"][-1]["lr"]
    trials = [(ask(each), each) for each in (changed(base, lr=by * lr) for by in (1.6, 2.56))]
    if None in [bits for bits, _ in trials]:
        return None
    third = changed(base, lr=lr * (1 if trials[0][0] < trials[1][0] else 4.096))
    trials.append((ask(third), third))
    return None if trials[-1][0] is None else better(trials)


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
    arms = {start: two_rates(ask, grown(start, scale, START_TOTAL)) for start in ("lemon", "interpolate")}
    return arms | {f"lossless, twice, by way of {BETWEEN}": two_rates(ask, twice(scale))}


def twice(scale: float = 1.0) -> dict:
    """Two growths: after the small model's, the size between trains until two fifths of all FLOPs are spent."""
    between = {"size": BETWEEN, "start": "lossless", "lr": LR, "beta2": BETA2, "decay": 0}
    large = {"size": LARGE, "start": "lossless", "lr": LR, "beta2": BETA2, "flops": START_TOTAL * scale}
    return config(small_stage(SMALL_STEPS, scale), between | {"flops": START_TOTAL * scale * 0.4}, large)


# --- C: both ----------------------------------------------------------------------------------------------------------

TOTALS = (3e11, 6e11, TOTAL)  # runs with a schedule of their own


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


# --- when to grow, and details ----------------------------------------------------------------------------------------

GROWN_AT = (500, SMALL_STEPS, 2000, 4000)


def when(ask: Ask, scale: float = 1.0) -> None:
    """The small model grown at several points of its training, all else equal."""
    if best := growth_arms(ask, scale)[f"{SMALL} grown into {LARGE}"]:
        for steps in GROWN_AT:
            over_seeds(ask, grown_at(best, steps, scale))


def grown_at(best: dict, steps: int, scale: float = 1.0) -> dict:
    return best | {"stages": [config(small_stage(steps, scale))["stages"][0], best["stages"][-1]]}


EMBEDDINGS = "embeddings, norms, biases at twice the lr"
# name: what changes in the tuned setting
DETAILS = {
    "mixed": {"no curvature": {"rho": 1e-9}},
    "adamw": {
        EMBEDDINGS: {"other_lr": 4e-3},
        "warm-up 120": {"warmup": 120},
        "linear decay": {"decay": 1.0},
    },
    "sophiag": {
        "no curvature": {"rho": 1e-9},
        "h corrected": {"optimizer": "corrected"},
        "50 refreshes at first": {"optimizer": "early"},
        "official values": {"lr": 6e-4, "beta1": 0.965, "rho": 0.05, "weight_decay": 0.2},
        "warm-up 120": {"warmup": 120},
        "linear decay": {"decay": 1.0},
        "weight decay 0.4": {"weight_decay": 0.4},
    },
    "nesterov": {"no curvature": {"rho": 1e-9}},
}


def details(ask: Ask, scale: float = 1.0) -> None:
    """One change at a time to the tuned settings of the short horizon."""
    for name, changes in DETAILS.items():
        if found := tuned(ask, name, scale):
            for change in changes.values():
                over_seeds(ask, changed(found.config, **change))
    if longer := at_horizon(ask, "adamw", LONG, scale):
        over_seeds(ask, changed(longer, **DETAILS["adamw"][EMBEDDINGS]))


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


_ALL = (optimizers, horizons, details, size, growth, best_size, starts, more_starts, both, when, vit)
STUDIES = {study.__name__: study for study in _ALL}
