"""The studies of docs/results/gpu.md, as those of `sophia` and `growth`, on models of up to 31.8 million parameters."""

from benchmarks.evidence import search, sophia
from benchmarks.evidence.search import Ask, Found, changed, over_seeds, two_rates

DEVICE = "cuda"
SMALL, BETWEEN, LARGE, STEPS = "5x256", "8x384", "10x512", 1000
TOTAL = 8.41e14  # FLOPs of these steps of the large model
GROWN_AT = 900  # steps of the small model: an eighth of them

# row: (first setting, another value of one more coordinate): 5 trials each; but for the rates, as tuned at 2x64
CONTENDERS = {
    "adamw": ({"lr": 5e-4, "beta1": 0.8, "beta2": 0.99}, {"beta1": (0.9,)}),
    "sophiag": ({"lr": 1.25e-4, "beta1": 0.8, "rho": 0.05}, {"beta1": (0.9,)}),
    "nesterov": ({"lr": 1.25e-4, "beta1": 0.9, "rho": 0.05}, {"beta1": (0.95,)}),
    "lion": ({"lr": 1.25e-4, "beta1": 0.8, "beta2": 0.9}, {"beta2": (0.95,)}),
    "mixed": ({"lr": 1.25e-4, "beta1": 0.8, "rho": 0.05, "other_lr": 5e-4}, {"beta1": (0.9,)}),
}


def config(*stages: dict) -> dict:
    return search.config(*({"warmup": 100} | stage for stage in stages), context=256, head=64, device=DEVICE)


def thirty(ask: Ask, scale: float = 1.0) -> None:
    """Optimizers tuned alike on 31.8 million parameters, and SophiaG without its curvature."""
    for name in CONTENDERS:
        tuned(ask, name, scale)
    if found := tuned(ask, "sophiag", scale):
        over_seeds(ask, changed(found.config, **sophia.WITHOUT_H))


def tuned(ask: Ask, name: str, scale: float = 1.0) -> Found | None:
    """The best of 5 trials on seed 0, once it has run on three seeds."""
    first, others = CONTENDERS[name]
    steps = max(2, round(STEPS * scale))
    found = search.search(ask, config({"size": LARGE, "optimizer": name, "steps": steps, **first}), others)
    return found if found and over_seeds(ask, found.config) else None


def thirty_growth(ask: Ask, scale: float = 1.0) -> None:
    """Growth into them and into half their size, at the FLOPs of AdamW's run from scratch."""
    for best in growth_arms(ask, scale).values():
        if best:
            over_seeds(ask, best)


def growth_arms(ask: Ask, scale: float = 1.0) -> dict[str, dict | None]:
    """AdamW as tuned from scratch in all of them, but for the rate: that or 1.6 times it."""
    found = tuned(ask, "adamw", scale)
    if found is None:
        return {}
    (scratch,) = found.config["stages"]
    every = {name: value for name, value in scratch.items() if name != "steps"}
    small = every | {"size": SMALL, "steps": max(2, round(GROWN_AT * scale)), "decay": 0, "lr": 1.6 * scratch["lr"]}
    last = every | {"flops": TOTAL * scale}
    arms = {f"{LARGE} from scratch": found.config}
    for size in (LARGE, BETWEEN):
        grown = config(small, last | {"size": size, "start": "lossless"})
        arms[f"{SMALL} grown into {size}"] = two_rates(ask, grown)
    for size in (BETWEEN, SMALL):
        arms[f"{size} from scratch"] = two_rates(ask, config(last | {"size": size}))
    return arms


STUDIES = (thirty, thirty_growth)
