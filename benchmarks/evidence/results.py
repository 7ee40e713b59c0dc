"""The records as the tables and figures ask for them, and how a table shows them."""

import math
import statistics

from benchmarks.evidence import search
from benchmarks.evidence.store import Store

SEEDS = (0, 1, 2)
NONE = "not measured"


class Results:
    """What the tables ask: final losses by seed, and settings that won."""

    def __init__(self, folder):
        self.store, self.folder = Store(folder), folder

    def ask(self, config):
        record = self.store.get(config)
        if record is None:
            return None
        return math.inf if record["bits"] is None else record["bits"]

    def records(self, config, seeds=SEEDS):
        """One a seed, or None while one is missing."""
        found = [config and self.store.get(search.seeded(config, seed)) for seed in seeds]
        return None if None in found else found

    def losses(self, config, seeds=SEEDS):
        records = self.records(config, seeds)
        return records and [record["bits"] for record in records]


def cell(values, digits=3):
    """Mean and range."""
    if values is None:
        return NONE
    return f"{statistics.fmean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def by_seed(results, config):
    """A cell for each seed, then mean and range of those that were run, of which there is one."""
    found = [results.losses(config, [seed]) for seed in SEEDS]
    return [*(f"{each[0]:.3f}" if each else NONE for each in found), cell([each[0] for each in found if each])]


def flops(total):
    return f"{total:.3g}".replace("e+", "e")


def setting(config, names=("lr", "beta1", "beta2", "rho", "other_lr", "weight_decay")):
    stage = config["stages"][-1]
    return ", ".join(f"{name} {stage[name]:.3g}" for name in names if name in stage)


def table(header, rows):
    yield "| " + " | ".join(header) + " |"
    yield "|---" * len(header) + "|"
    for row in rows:
        yield "| " + " | ".join(map(str, row)) + " |"
