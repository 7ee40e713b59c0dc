"""The tables of optimizers, of the records: those of `sophia`, and `gpu.thirty`."""

import json
import math
import statistics

from benchmarks.evidence import gpu, search, sophia
from benchmarks.evidence.results import NONE, SEEDS, by_seed, cell, setting, table

NAMES = {
    "adamw": "AdamW",
    "nadamw": "NAdamW",
    "lion": "Lion",
    "sign": "sign of the momentum",
    "sophiag": "SophiaG",
    "sophiah": "SophiaH",
    "nesterov": "SophiaG, Nesterov momentum",
    "mixed": "SophiaG, AdamW for embeddings, norms, biases",
}
CONTENDERS = {
    "mixed, no curvature": "sign of the momentum, AdamW for embeddings, norms, biases",
    "adamw, embeddings": f"AdamW, {sophia.EMBEDDINGS}",
}


def optimizer_table(results):
    header = (
        "optimizer",
        "best of 6 trials",
        f"bits/byte, {sophia.SHORT} steps",
        "AdamW's steps to the same loss, x",
        f"bits/byte, {sophia.LONG} steps",
        "unclipped at the end",
        "CPU time per step, AdamW 1",
    )
    return table(header, optimizer_rows(results))


def optimizer_rows(results):
    times = results.folder / "times.json"
    times = json.loads(times.read_text())["ratios"] if times.exists() else {}
    adamw = sophia.tuned(results.ask, "adamw")
    adamw = results.losses(adamw and adamw.config)
    by = slope(adamw, results.losses(sophia.at_horizon(results.ask, "adamw", sophia.LONG)), sophia.LONG / sophia.SHORT)
    for name, title in NAMES.items():
        found = sophia.tuned(results.ask, name)
        if found is None:
            yield title, *[NONE] * 6
            continue
        longer = sophia.at_horizon(results.ask, name, sophia.LONG)
        unclipped = [record["points"][-1][3] for record in results.records(found.config)]
        yield (
            title,
            setting(found.config),
            cell(results.losses(found.config)),
            gain(adamw, results.losses(found.config), by),
            cell(results.losses(longer)),
            "-" if None in unclipped else f"{statistics.fmean(unclipped):.2f}",
            f"{times[name]:.2f}" if name in times else NONE,
        )


def slope(short, long, ratio):
    """Bits that AdamW gains by each doubling of its steps, from its losses at two horizons, `ratio` apart."""
    return None if None in (short, long) else (statistics.fmean(short) - statistics.fmean(long)) / math.log2(ratio)


def gain(adamw, losses, by):
    """AdamW's steps, over those it took, that would end at these losses, where each doubling gains `by`."""
    if None in (adamw, losses, by):
        return NONE
    return cell([2 ** ((a - b) / by) for a, b in zip(adamw, losses, strict=True)], 2)


def trial_rows(results):
    for name, title in NAMES.items():
        found = sophia.tuned(results.ask, name)
        for bits, config in found.trials if found else ():
            yield title, setting(config), f"{bits:.3f}"


def detail_rows(results):
    for name, changes in sophia.DETAILS.items():
        if found := sophia.tuned(results.ask, name):
            yield from changed_rows(results, NAMES[name], found.config, changes)
    for name, changes in sophia.LONG_DETAILS.items():
        if longer := sophia.at_horizon(results.ask, name, sophia.LONG):
            yield from changed_rows(results, f"{NAMES[name]}, {sophia.LONG} steps", longer, changes)


def changed_rows(results, name, config, changes):
    tuned = results.losses(config)
    yield name, "as tuned", cell(tuned), ""
    for change, values in changes.items():
        losses = results.losses(search.changed(config, **values))
        apart = tuned and losses and [b - a for a, b in zip(tuned, losses, strict=True)]
        yield name, change, cell(losses), cell(apart)


def size_rows(results):
    for name in ("adamw", "nadamw", "sophiag", "nesterov"):
        best = sophia.at_size(results.ask, name)
        yield NAMES[name], best and setting(best, ("lr",)) or NONE, cell(results.losses(best))


def million_rows(results):
    adamw = sophia.at_million(results.ask, "adamw")
    shorter = adamw and results.losses(sophia.shorter(adamw.config))
    adamw = adamw and results.losses(adamw.config)
    by = slope(shorter, adamw, sophia.MILLION_STEPS / sophia.SHORTER)
    for row in sophia.CONTENDERS:
        title, found = CONTENDERS.get(row) or NAMES[row], sophia.at_million(results.ask, row)
        if found is None:
            yield title, *[NONE] * 7
            continue
        trials = ", ".join(f"{setting(config, ('lr',))}: {bits:.3f}" for bits, config in found.trials)
        rates, losses = setting(found.config, ("lr", "other_lr")), results.losses(found.config)
        yield title, rates, trials, *by_seed(results, found.config), gain(adamw, losses, by)


def thirty_rows(results):
    """Of those that were run."""
    for name in gpu.CONTENDERS:
        if found := gpu.tuned(results.ask, name):
            tried = "; ".join(f"{setting(each)}: {bits:.3f}" for bits, each in found.trials)
            yield NAMES[name], setting(found.config), *by_seed(results, found.config), tried
            without = search.changed(found.config, **sophia.WITHOUT_H)
            if name == "sophiag" and results.records(without):
                yield f"{NAMES[name]}, no curvature", "", *by_seed(results, without), ""


TABLES = {
    "optimizers": optimizer_table,
    "trials": lambda r: table(("optimizer", "setting", "bits/byte, seed 0"), trial_rows(r)),
    "details": lambda r: table(("optimizer", "change", "bits/byte", "apart from as tuned"), detail_rows(r)),
    "size": lambda r: table(("optimizer", "setting", "bits/byte"), size_rows(r)),
    "million": lambda r: table(
        ("optimizer", "best", "trials on seed 0", *[f"seed {i}" for i in SEEDS], "bits/byte", "AdamW's steps, x"),
        million_rows(r),
    ),
    "thirty": lambda r: table(
        ("optimizer", "best", *[f"seed {i}" for i in SEEDS], "bits/byte", "trials on seed 0"), thirty_rows(r)
    ),
}
