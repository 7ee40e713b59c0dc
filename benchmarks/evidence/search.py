"""Configs of runs, and searches among them.

A search asks: `ask` returns the final loss of a config, or None while that is not known.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

Ask = Callable[[dict], float | None]


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


def until_worse(ask: Ask, base: dict) -> Found | None:
    """Trials on seed 0: the rates of `base`, 0.7 of them, and steps of sqrt(2) on from the better until one is worse.

    The best one runs on three seeds.
    """

    def trial(by):
        stage = base["stages"][-1]
        config = changed(base, **{rate: stage[rate] * by for rate in ("lr", "other_lr") if rate in stage})
        return ask(config), config

    trials = [trial(by) for by in (1, math.sqrt(0.5))]
    if None in [bits for bits, _ in trials]:
        return None
    up = trials[0][0] < trials[1][0]
    for by in (math.sqrt(2), 2, math.sqrt(8)) if up else (0.5, math.sqrt(0.125), 0.25):
        trials.append(trial(by))
        if trials[-1][0] is None:
            return None
        if better(trials) is not trials[-1][1]:
            break
    over_seeds(ask, better(trials))
    return Found(better(trials), sorted(trials, key=lambda each: each[0]))
