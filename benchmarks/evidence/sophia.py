"""The studies of docs/results/sophia.md: which runs each needs, given what is known so far.

A study is a function of `ask`, which returns the final loss of a config, or None while that is not known; it asks for
more as answers come. `scale` multiplies all numbers of steps and FLOPs, for tests.
"""

from benchmarks.evidence.search import Ask, Found, better, changed, config, over_seeds, search, until_worse

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


EMBEDDINGS = "embeddings, norms, biases at twice the lr"
WITHOUT_H = {"rho": 1e-9}  # every element is clipped
COSINES = {"cosine to 0": {"cosine": 0.0}, "cosine to a tenth": {"cosine": 0.1}}
SHAPES = {
    "warm-up 120": {"warmup": 120},
    "decay over the last 20 %": {"decay": 0.2},
    "decay over the last 60 %": {"decay": 0.6},
    "linear decay": {"decay": 1.0},
    **COSINES,
}


def cosine_at(lr: float, *times: float) -> dict[str, dict]:
    """A cosine spends other shares of its steps at high and low rates: at other rates than `lr`, too."""
    return {f"cosine to 0, {by} times the lr": {"cosine": 0.0, "lr": by * lr} for by in times}


# name: what changes in the tuned setting
DETAILS = {
    "mixed": {"no curvature": WITHOUT_H},
    "adamw": {EMBEDDINGS: {"other_lr": 4e-3}, **SHAPES, **cosine_at(2e-3, 1.4, 2, 2.8)},
    "sophiag": {
        "no curvature": WITHOUT_H,
        "h corrected": {"optimizer": "corrected"},
        "50 refreshes at first": {"optimizer": "early"},
        "official values": {"lr": 6e-4, "beta1": 0.965, "rho": 0.05, "weight_decay": 0.2},
        "weight decay 0.4": {"weight_decay": 0.4},
        **SHAPES,
        **cosine_at(1e-3, 0.7, 1.4, 2),
    },
    "nesterov": {"no curvature": WITHOUT_H},
}
LONG_DETAILS = {
    "mixed": {
        "no curvature": WITHOUT_H,
        "beta1 0.9": {"beta1": 0.9},
        "decay over the last 20 %": {"decay": 0.2},
    },
    "nesterov": {"no curvature": WITHOUT_H},
    "sophiag": {
        "no curvature": WITHOUT_H,
        "decay over the last 20 %": {"decay": 0.2},
        "decay over the last 60 %": {"decay": 0.6},
        **COSINES,
        **cosine_at(1e-3, 0.7, 1.4, 2),
    },
    "adamw": {
        EMBEDDINGS: {"other_lr": 4e-3},
        f"{EMBEDDINGS}, decay over the last 20 %": {"other_lr": 4e-3, "decay": 0.2},
        "beta1 0.9": {"beta1": 0.9},
        "decay over the last 20 %": {"decay": 0.2},
        "decay over the last 60 %": {"decay": 0.6},
        **COSINES,
        **cosine_at(2e-3, 1.4, 2, 2.8),
    },
}


def details(ask: Ask, scale: float = 1.0) -> None:
    """One change at a time to the tuned settings, at both horizons."""
    for name, changes in DETAILS.items():
        if found := tuned(ask, name, scale):
            for change in changes.values():
                over_seeds(ask, changed(found.config, **change))
    for name, changes in LONG_DETAILS.items():
        if longer := at_horizon(ask, name, LONG, scale):
            for change in changes.values():
                over_seeds(ask, changed(longer, **change))


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


MILLION, MILLION_STEPS, SHORTER = "5x128", 3000, 2000
# row: (optimizer, what changes in its tuned setting); the order is that of the runs
CONTENDERS = {
    "adamw": ("adamw", {}),
    "mixed": ("mixed", {}),
    "mixed, no curvature": ("mixed", WITHOUT_H),
    "adamw, embeddings": ("adamw", {"other_lr": 4e-3}),
    "sophiag": ("sophiag", {}),
    "lion": ("lion", {}),
    "sign": ("sign", {}),
    "nesterov": ("nesterov", {}),
}


def million(ask: Ask, scale: float = 1.0) -> None:
    """The contenders on a model of a million parameters, trained for thousands of steps."""
    for row in CONTENDERS:
        at_million(ask, row, scale)
    if adamw := at_million(ask, "adamw", scale):
        over_seeds(ask, shorter(adamw.config, scale))


def shorter(config: dict, scale: float = 1.0) -> dict:
    """AdamW's, for what more steps gain it."""
    return changed(config, steps=max(2, round(SHORTER * scale)))


def at_million(ask: Ask, row: str, scale: float = 1.0) -> Found | None:
    """The tuned setting of a row at a million parameters, its rates searched for anew."""
    name, change = CONTENDERS[row]
    found = tuned(ask, name, scale)
    if found is None:
        return None
    return until_worse(ask, changed(found.config, size=MILLION, steps=max(2, round(MILLION_STEPS * scale)), **change))


STUDIES = (optimizers, horizons, details, size, million)
