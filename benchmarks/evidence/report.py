"""Tables and figures of the records: python -m benchmarks.evidence.report [--out docs/results]

A page says with <!-- table NAME --> and <!-- end --> where a table goes; what stands between is replaced.
"""

import argparse
import json
import math
import re
import statistics
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.evidence import plan
from benchmarks.evidence.store import Store

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
        found = [config and self.store.get(plan.seeded(config, seed)) for seed in seeds]
        return None if None in found else found

    def losses(self, config, seeds=SEEDS):
        records = self.records(config, seeds)
        return records and [record["bits"] for record in records]


def cell(values, digits=3):
    """Mean and range."""
    if values is None:
        return NONE
    return f"{statistics.fmean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def flops(total):
    return f"{total:.0e}".replace("e+", "e")


def table(header, rows):
    yield "| " + " | ".join(header) + " |"
    yield "|---" * len(header) + "|"
    for row in rows:
        yield "| " + " | ".join(map(str, row)) + " |"


def setting(config, names=("lr", "beta1", "beta2", "rho", "other_lr", "weight_decay")):
    stage = config["stages"][-1]
    return ", ".join(f"{name} {stage[name]:.3g}" for name in names if name in stage)


# --- optimizers -------------------------------------------------------------------------------------------------------


def optimizer_rows(results):
    times = results.folder / "times.json"
    times = json.loads(times.read_text())["ratios"] if times.exists() else {}
    for name, title in NAMES.items():
        found = plan.tuned(results.ask, name)
        if found is None:
            yield title, *[NONE] * 6
            continue
        longer = plan.at_horizon(results.ask, name, plan.LONG)
        unclipped = [record["points"][-1][3] for record in results.records(found.config)]
        yield (
            title,
            setting(found.config),
            cell(results.losses(found.config)),
            gain(results, results.losses(found.config)),
            cell(results.losses(longer)),
            "-" if None in unclipped else f"{statistics.fmean(unclipped):.2f}",
            f"{times[name]:.2f}" if name in times else NONE,
        )


def slope(results):
    """Bits that AdamW gains by each doubling of its steps, from the short horizon to the long one."""
    short = plan.tuned(results.ask, "adamw")
    longer = plan.at_horizon(results.ask, "adamw", plan.LONG)
    losses = results.losses(short and short.config), results.losses(longer)
    if None in losses:
        return None
    return (statistics.fmean(losses[0]) - statistics.fmean(losses[1])) / math.log2(plan.LONG / plan.SHORT)


def gain(results, losses):
    """Steps of AdamW, over those of the short horizon, that would end at the same loss."""
    adamw, by = results.losses(plan.tuned(results.ask, "adamw").config), slope(results)
    if None in (adamw, losses, by):
        return NONE
    gaps = [a - b for a, b in zip(adamw, losses, strict=True)]
    return cell([2 ** (gap / by) for gap in gaps], 2)


def optimizer_table(results):
    header = (
        "optimizer",
        "best of 6 trials",
        f"bits/byte, {plan.SHORT} steps",
        "AdamW's steps to the same loss, x",
        f"bits/byte, {plan.LONG} steps",
        "unclipped at the end",
        "CPU time per step, AdamW 1",
    )
    return table(header, optimizer_rows(results))


def trial_rows(results):
    for name, title in NAMES.items():
        found = plan.tuned(results.ask, name)
        for bits, config in found.trials if found else ():
            yield title, setting(config), f"{bits:.3f}"


def detail_rows(results):
    for name, changes in plan.DETAILS.items():
        if found := plan.tuned(results.ask, name):
            yield from changed_rows(results, NAMES[name], found.config, changes)
    if longer := plan.at_horizon(results.ask, "adamw", plan.LONG):
        changes = {plan.EMBEDDINGS: plan.DETAILS["adamw"][plan.EMBEDDINGS]}
        yield from changed_rows(results, f"AdamW, {plan.LONG} steps", longer, changes)


def changed_rows(results, name, config, changes):
    tuned = results.losses(config)
    yield name, "as tuned", cell(tuned), ""
    for change, values in changes.items():
        losses = results.losses(plan.changed(config, **values))
        apart = tuned and losses and [b - a for a, b in zip(tuned, losses, strict=True)]
        yield name, change, cell(losses), cell(apart)


def size_rows(results):
    for name in ("adamw", "nadamw", "sophiag", "nesterov"):
        best = plan.at_size(results.ask, name)
        yield NAMES[name], best and setting(best, ("lr",)) or NONE, cell(results.losses(best))


# --- growth -----------------------------------------------------------------------------------------------------------


def arm_rows(results, arms):
    for name, config in arms.items():
        records = results.records(config)
        if records is None:
            yield name, *[NONE] * 4
            continue
        right_after = [r.get("fit_bits", r.get("start_bits")) for r in records]
        operator = statistics.fmean(r.get("fit_flops", 0) / r["flops"] for r in records)
        yield (
            name,
            f"{config['stages'][-1]['lr']:.2g}",
            "" if None in right_after else f"{statistics.fmean(right_after):.2f}",
            f"{operator:.0%}" if operator else "",
            cell([r["bits"] for r in records]),
        )


def best_rows(results):
    from_scratch = plan.three_rates(results.ask, plan.direct(plan.BETWEEN))
    into, totals = plan.into_between(results.ask), plan.TOTALS[1:]
    targets = results.losses(from_scratch)
    for name, config in ((f"{plan.BETWEEN} from scratch", from_scratch), (f"{plan.SMALL} grown into it", into)):
        losses = [results.losses(config and plan.changed(config, flops=total)) for total in totals]
        seeds = results.losses(config, plan.MORE_SEEDS)
        by_seed = [f"{each:.3f}" for each in seeds] if seeds else [NONE] * len(plan.MORE_SEEDS)
        last = "" if config == from_scratch else saving(losses, totals, targets)
        yield name, cell(losses[0]), cell(seeds), *by_seed, last


def saving(losses, totals, targets):
    """In words, how much less than all FLOPs reaches the targets; losses of each total by seed, targets by seed."""
    if targets is None or None in losses:
        return NONE
    found = [reaches(each, totals, target) for *each, target in zip(*losses, targets, strict=True)]
    if None in found:
        return "none"
    saved = [1 - each / totals[-1] for each in found]
    return f"{min(saved):.0%} to {max(saved):.0%}" + (" or more" if min(found) == totals[0] else "")


def growth_arms(results):
    into = {f"{plan.SMALL} grown into {plan.BETWEEN}": plan.into_between(results.ask)}
    return plan.growth_arms(results.ask) | into


def sizes(results):
    """size -> records of it trained directly, in the order of parameters; those that were run."""
    arms = plan.growth_arms(results.ask)
    configs = {size: plan.other_size(results.ask, size) for size in plan.OTHER_SIZES}
    configs[plan.SMALL] = arms[f"{plan.SMALL} never grown"]
    configs |= {size: arms[f"{size} from scratch"] for size in (plan.BETWEEN, plan.LARGE)}
    found = {size: results.records(config) for size, config in configs.items()}
    found = {size: records for size, records in found.items() if records}
    return dict(sorted(found.items(), key=lambda item: item[1][0]["parameters"]))


def grown_sizes(results):
    """size -> records of it grown from the small one, in the order of parameters; those that were run."""
    into = plan.into_between(results.ask)
    configs = {size: into and plan.changed(into, size=size) for size in plan.OTHER_SIZES} | {plan.BETWEEN: into}
    configs[plan.LARGE] = plan.growth_arms(results.ask)[f"{plan.SMALL} grown into {plan.LARGE}"]
    found = {size: results.records(config) for size, config in configs.items()}
    found = {size: records for size, records in found.items() if records}
    return dict(sorted(found.items(), key=lambda item: item[1][0]["parameters"]))


def size_curve_rows(results):
    grown = grown_sizes(results)
    for size, records in sizes(results).items():
        r = records[0]
        lr = f"{r['config']['stages'][-1]['lr']:.2g}"
        after = "" if size == plan.SMALL else cell([r["bits"] for r in grown[size]] if size in grown else None)
        yield size, f"{r['parameters']:,}", f"{r['steps']:,}", lr, cell([r["bits"] for r in records]), after


def reaches(losses, totals, target):
    """FLOPs at which a loss, falling in a line of log FLOPs between those measured, is at `target`.

    The least measured where it is below already; None where it is above at the end.
    """
    points = sorted(zip(totals, losses, strict=True))
    if points[0][1] <= target:
        return points[0][0]
    for (a, high), (b, low) in zip(points, points[1:], strict=False):
        if low <= target:
            return a * (b / a) ** ((high - target) / (high - low))
    return None


def both_rows(results):
    targets = results.losses(plan.growth_arms(results.ask)[f"{plan.LARGE} from scratch"])
    for name, config in plan.both_arms(results.ask).items():
        losses = [results.losses(config and plan.changed(config, flops=total)) for total in plan.TOTALS]
        yield name, *map(cell, losses), saving(losses, plan.TOTALS, targets)


def when_rows(results):
    best = plan.growth_arms(results.ask)[f"{plan.SMALL} grown into {plan.LARGE}"]
    for steps in plan.GROWN_AT if best else ():
        records = results.records(plan.grown_at(best, steps))
        if records is None:
            yield steps, *[NONE] * 3
            continue
        share = statistics.fmean(r["small_flops"] / plan.TOTAL for r in records)
        yield steps, f"{share:.0%}", cell([r["small_bits"] for r in records]), cell([r["bits"] for r in records])


def vit_rows(results):
    for arm in plan.VIT_ARMS:
        trials = [(results.ask(each), each) for each in (plan.vit_config(arm, lr) for lr in plan.VIT_RATES)]
        best = None if None in [loss for loss, _ in trials] else plan.better(trials)
        records = results.records(best)
        if records is None:
            yield arm, *[NONE] * 3
            continue
        cells = cell([r["bits"] for r in records]), cell([r["error"] for r in records], 1)
        yield arm, f"{best['stages'][-1]['lr']:.3g}", *cells


ARM = ("run", "lr", "right after growth", "operator's FLOPs", "bits/byte")
AT = [f"at {flops(total)} FLOPs" for total in plan.TOTALS]
TABLES = {
    "optimizers": optimizer_table,
    "trials": lambda r: table(("optimizer", "setting", "bits/byte, seed 0"), trial_rows(r)),
    "details": lambda r: table(("optimizer", "change", "bits/byte", "apart from as tuned"), detail_rows(r)),
    "size": lambda r: table(("optimizer", "setting", "bits/byte"), size_rows(r)),
    "growth": lambda r: table(ARM, arm_rows(r, growth_arms(r))),
    "starts": lambda r: table(ARM, arm_rows(r, plan.start_arms(r.ask) | plan.more_start_arms(r.ask))),
    "best": lambda r: table(
        ("run", *AT[1:], *[f"seed {i}" for i in plan.MORE_SEEDS], "saved, seeds 0 to 2"), best_rows(r)
    ),
    "sizes": lambda r: table(
        ("layers x width", "parameters", "steps", "lr", "from scratch", f"grown from {plan.SMALL}"), size_curve_rows(r)
    ),
    "both": lambda r: table(("run", *AT, "saved"), both_rows(r)),
    "when": lambda r: table(("grown at step", "of all FLOPs", "small, when it is grown", "bits/byte"), when_rows(r)),
    "vit": lambda r: table(("run", "lr", "bits/label", "error, %"), vit_rows(r)),
}


# --- figures ----------------------------------------------------------------------------------------------------------

COLORS = {"direct": "#4c72b0", "grown": "#c44e52", "middle": "#8c8c8c", "never": "#55a868"}


def axes(width=7.0, height=4.2):
    drawn = Figure(figsize=(width, height), layout="constrained")
    ax = drawn.subplots()
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    return drawn, ax


def optimizer_figure(results):
    """Three seeds of each optimizer at its best setting, at both horizons; the bands are AdamW's ranges."""
    found = {name: plan.tuned(results.ask, name) for name in NAMES}
    configs = {
        NAMES[name]: (found[name] and found[name].config, plan.at_horizon(results.ask, name, plan.LONG))
        for name in NAMES
    }
    change = plan.DETAILS["adamw"][plan.EMBEDDINGS]
    extra = [config and plan.changed(config, **change) for config in configs["AdamW"]]
    configs["AdamW, embeddings at twice the lr (untuned)"] = extra
    losses = {title: [results.losses(config) for config in pair] for title, pair in configs.items()}
    shown = [title for title in losses if losses[title][0]]
    shown.sort(key=lambda title: -statistics.fmean(losses[title][0]))
    drawn = Figure(figsize=(10, 4.2), layout="constrained")
    for i, (ax, steps) in enumerate(zip(drawn.subplots(1, 2, sharey=True), (plan.SHORT, plan.LONG), strict=True)):
        for y, title in enumerate(shown):
            if (seeds := losses[title][i]) is None:
                continue
            color = COLORS["grown" if "Sophia" in title else "direct"]
            ax.plot(seeds, [y] * len(seeds), "o", color=color, alpha=0.6)
            ax.plot([statistics.fmean(seeds)] * 2, [y - 0.3, y + 0.3], color=color, linewidth=2.2)
            if title == "AdamW":
                ax.axvspan(min(seeds), max(seeds), color=color, alpha=0.15, linewidth=0)
        ax.set_yticks(range(len(shown)), shown)
        ax.set_xlabel(f"bits per byte after {steps:,} steps")
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    return drawn


def growth_figure(results):
    """What each size reaches for the same FLOPs, trained directly, and grown."""
    drawn, ax = axes()
    from_scratch, grown = sizes(results), grown_sizes(results)
    count = {size: records[0]["parameters"] for size, records in from_scratch.items()}
    for found, color, words in ((from_scratch, "direct", "from scratch"), (grown, "grown", f"grown from {plan.SMALL}")):
        losses = {count[size]: [record["bits"] for record in records] for size, records in found.items()}
        x, means = list(losses), [statistics.fmean(each) for each in losses.values()]
        ax.plot(x, means, "o-", color=COLORS[color])
        low, high = ([limit(each) for each in losses.values()] for limit in (min, max))
        ax.fill_between(x, low, high, color=COLORS[color], alpha=0.2, linewidth=0)
        if x:
            at = {"textcoords": "offset points", "ha": "right"}
            ax.annotate(words, (x[-1], means[-1]), (-14, 2), color=COLORS[color], **at)
    ax.set_xscale("log")
    ax.set_xticks(list(count.values()), [f"{size}\n{each:,}" for size, each in count.items()], fontsize=8)
    ax.minorticks_off()
    ax.set_xlabel(f"layers x width, parameters; every run costs {flops(plan.TOTAL)} FLOPs, everything counted")
    ax.set_ylabel("bits per byte of held-out text")
    return drawn


def curve_figure(results):
    """Loss on the way, on a part of the held-out text, against all FLOPs spent."""
    drawn, ax = axes()
    for (name, config), color in zip(plan.growth_arms(results.ask).items(), COLORS.values(), strict=True):
        records = results.records(config)
        if records is None:
            continue
        if len(config["stages"]) > 1:
            band(ax, results.records(plan.config(plan.small_stage(plan.SMALL_STEPS))), color, ":")
        band(ax, records, color, "-", name)
    ax.set_ylim(top=4.5)
    ax.set_xlabel("training FLOPs, the small model's before growth included (dotted)")
    ax.set_ylabel("bits per byte of held-out text")
    ax.legend(frameon=False)
    return drawn


def band(ax, records, color, style, name=None):
    x = [point[0] for point in records[0]["points"]]
    heights = [[record["points"][i][2] for record in records] for i in range(len(x))]
    ax.plot(x, [statistics.fmean(each) for each in heights], style, color=color, label=name)
    ax.fill_between(x, [min(e) for e in heights], [max(e) for e in heights], color=color, alpha=0.2, linewidth=0)


FIGURES = {"optimizers": optimizer_figure, "sizes": growth_figure, "curves": curve_figure}


def filled(page, results):
    """The text of a page with its tables as the records have them."""

    def made(match):
        return "\n".join([match[1], "", *TABLES[match[2]](results), "", "<!-- end -->"])

    return re.sub(r"(<!-- table (\w+) -->).*?<!-- end -->", made, page, flags=re.DOTALL)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence.report", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    out = parser.parse_args(arguments).out
    results = Results(out / "data")
    for page in out.glob("*.md"):
        page.write_text(filled(page.read_text(), results))
    for name, figure in FIGURES.items():
        figure(results).savefig(out / f"{name}.png", dpi=110)


if __name__ == "__main__":
    main()
