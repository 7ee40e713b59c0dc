"""The figures of the results pages, of the records; `report` saves them."""

import statistics

from matplotlib.figure import Figure

from benchmarks.evidence import gpu, growth, growth_tables, search, sophia, sophia_tables
from benchmarks.evidence.results import flops

COLORS = {"direct": "#4c72b0", "grown": "#c44e52", "middle": "#8c8c8c", "never": "#55a868"}


def axes(count, width, height, **options):
    """(a figure, its `count` panels side by side)"""
    drawn = Figure(figsize=(width, height), layout="constrained")
    (panels,) = drawn.subplots(1, count, squeeze=False, **options)
    for ax in panels:
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    return drawn, panels


def optimizer_figure(results):
    """Seeds of each optimizer at its best setting, at two horizons and two sizes more; the bands are AdamW's ranges."""
    configs = {sophia_tables.NAMES[name]: at_horizons(results, name, name) for name in sophia_tables.NAMES}
    for row, title in sophia_tables.CONTENDERS.items():
        name, change = sophia.CONTENDERS[row]
        changed = [config and search.changed(config, **change) for config in configs[sophia_tables.NAMES[name]][:2]]
        configs[title] = [*changed, *at_horizons(results, name, row)[2:]]
    losses = {title: [results.losses(config) for config in each] for title, each in configs.items()}
    shown = [title for title in losses if losses[title][0]]
    shown.sort(key=lambda title: -statistics.fmean(losses[title][0]))
    words = [f"{sophia.SIZE}, {sophia.SHORT:,} steps", f"{sophia.SIZE}, {sophia.LONG:,} steps"]
    words += [f"{sophia.MILLION}, {sophia.MILLION_STEPS:,} steps", f"{gpu.LARGE}, {gpu.STEPS:,} steps"]
    drawn, panels = axes(len(words), 15, 4.4, sharey=True)
    for i, (ax, run) in enumerate(zip(panels, words, strict=True)):
        for y, title in enumerate(shown):
            if (seeds := losses[title][i]) is None:
                continue
            color = COLORS["grown" if "Sophia" in title else "direct"]
            ax.plot(seeds, [y] * len(seeds), "o", color=color, alpha=0.6)
            ax.plot([statistics.fmean(seeds)] * 2, [y - 0.3, y + 0.3], color=color, linewidth=2.2)
            if title == "AdamW":
                ax.axvspan(min(seeds), max(seeds), color=color, alpha=0.15, linewidth=0)
        ax.set_yticks(range(len(shown)), shown)
        ax.set_xlabel(f"bits per byte, {run}")
    return drawn


def at_horizons(results, name, row):
    """Configs, or None, of the short and the long horizon, and of the models of one and of 31.8 million parameters."""
    short = sophia.tuned(results.ask, name)
    million = sophia.at_million(results.ask, row) if row in sophia.CONTENDERS else None
    largest = gpu.tuned(results.ask, row) if row in gpu.CONTENDERS else None
    larger = [each and each.config for each in (million, largest)]
    return [short and short.config, sophia.at_horizon(results.ask, name, sophia.LONG), *larger]


def growth_figure(results):
    """What each size reaches for the same FLOPs, trained directly, and grown; at two totals."""
    million = [growth_tables.million_sizes(results, grown) for grown in (False, True)]
    budgets = [
        (growth_tables.sizes(results), growth_tables.grown_sizes(results), growth.SMALL, growth.TOTAL),
        (*million, growth.SMALLER, growth.MILLION_TOTAL),
    ]
    drawn, panels = axes(len(budgets), 13, 4.2)
    for ax, (from_scratch, grown, small, total) in zip(panels, budgets, strict=True):
        count = {size: records[0]["parameters"] for size, records in from_scratch.items()}
        for found, color, words in ((from_scratch, "direct", "from scratch"), (grown, "grown", f"grown from {small}")):
            losses = {count[size]: [record["bits"] for record in records] for size, records in found.items()}
            x, means = list(losses), [statistics.fmean(each) for each in losses.values()]
            ax.plot(x, means, "o-", color=COLORS[color], label=words)
            low, high = ([limit(each) for each in losses.values()] for limit in (min, max))
            ax.fill_between(x, low, high, color=COLORS[color], alpha=0.2, linewidth=0)
        ax.set_xscale("log")
        ax.set_xticks(list(count.values()), [f"{size}\n{each:,}" for size, each in count.items()], fontsize=8)
        ax.minorticks_off()
        ax.set_xlabel(f"layers x width, parameters; every run costs {flops(total)} FLOPs, everything counted")
        ax.set_ylabel("bits per byte of held-out text")
        ax.legend(frameon=False)
    return drawn


def curve_figure(results):
    """Loss on the way, on a part of the held-out text, against all FLOPs spent."""
    drawn, (ax,) = axes(1, 7.0, 4.2)
    for (name, config), color in zip(growth.growth_arms(results.ask).items(), COLORS.values(), strict=True):
        records = results.records(config)
        if records is None:
            continue
        if len(config["stages"]) > 1:
            band(ax, results.records(search.config(growth.small_stage(growth.SMALL_STEPS))), color, ":")
        band(ax, records, color, "-", name)
    ax.set_ylim(top=4.5)
    ax.set_xlabel("training FLOPs, the small model's before growth included (dotted)")
    ax.set_ylabel("bits per byte of held-out text")
    ax.legend(frameon=False)
    return drawn


def when_figure(results):
    """Final loss by the point of growth, on held-out seeds, and by the rule."""
    cases = growth.rule_cases(results.ask)
    drawn, panels = axes(len(cases), 12, 3.6)
    for ax, (case, best) in zip(panels, cases.items(), strict=True):
        fixed = [results.records(best and growth.grown_at(best, steps), growth.HELD_OUT) for steps in growth.POINTS]
        at_points = {records[0]["small_flops"]: [r["bits"] for r in records] for records in fixed if records}
        if at_points:
            x, losses = [100 * each / best["stages"][-1]["flops"] for each in at_points], at_points.values()
            ax.plot(x, [statistics.fmean(each) for each in losses], "o-", color=COLORS["direct"], label="fixed points")
            low, high = ([limit(each) for each in losses] for limit in (min, max))
            ax.fill_between(x, low, high, color=COLORS["direct"], alpha=0.2, linewidth=0)
        for r in results.records(best and growth.by_rule(best), growth.HELD_OUT) or ():
            ax.plot(100 * r["small_flops"] / best["stages"][-1]["flops"], r["bits"], "D", color=COLORS["grown"])
        ax.set_title(case, fontsize=10)
        ax.set_xlabel("grown after this share of all FLOPs, %")
    drawn.axes[0].plot([], [], "D", color=COLORS["grown"], label="by the rule")
    drawn.axes[0].legend(frameon=False)
    drawn.axes[0].set_ylabel("bits per byte of held-out text")
    return drawn


def band(ax, records, color, style, name=None):
    x = [point[0] for point in records[0]["points"]]
    heights = [[record["points"][i][2] for record in records] for i in range(len(x))]
    ax.plot(x, [statistics.fmean(each) for each in heights], style, color=color, label=name)
    ax.fill_between(x, [min(e) for e in heights], [max(e) for e in heights], color=color, alpha=0.2, linewidth=0)


FIGURES = {"optimizers": optimizer_figure, "sizes": growth_figure, "curves": curve_figure, "when": when_figure}
