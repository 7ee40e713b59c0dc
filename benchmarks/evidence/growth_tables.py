"""The tables of growth, of the records: those of `growth`, and `gpu.thirty_growth`."""

import statistics

from benchmarks.evidence import gpu, growth, search, sophia
from benchmarks.evidence.results import NONE, SEEDS, by_seed, cell, flops, table

ARM = ("run", "lr", "right after growth", "operator's FLOPs", "bits/byte")
MILLION_AT = ("at a third of the FLOPs", "at two thirds", f"at {flops(growth.MILLION_TOTAL)}")
AT = [f"at {flops(total)} FLOPs" for total in growth.TOTALS]


def growth_arms(results):
    into = {f"{growth.SMALL} grown into {growth.BETWEEN}": growth.into_between(results.ask)}
    return growth.growth_arms(results.ask) | into


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
    from_scratch = search.three_rates(results.ask, growth.direct(growth.BETWEEN))
    into, totals = growth.into_between(results.ask), growth.TOTALS[1:]
    targets = results.losses(from_scratch)
    for name, config in ((f"{growth.BETWEEN} from scratch", from_scratch), (f"{growth.SMALL} grown into it", into)):
        losses = [results.losses(config and search.changed(config, flops=total)) for total in totals]
        seeds = results.losses(config, growth.MORE_SEEDS)
        by_seed = [f"{each:.3f}" for each in seeds] if seeds else [NONE] * len(growth.MORE_SEEDS)
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


def by_parameters(results, configs):
    """size -> its records, of those that were run."""
    found = {size: results.records(config) for size, config in configs.items()}
    found = {size: records for size, records in found.items() if records}
    return dict(sorted(found.items(), key=lambda item: item[1][0]["parameters"]))


def sizes(results):
    """size -> records of it trained directly, in the order of parameters; those that were run."""
    arms = growth.growth_arms(results.ask)
    configs = {size: growth.other_size(results.ask, size) for size in growth.OTHER_SIZES}
    configs[growth.SMALL] = arms[f"{growth.SMALL} never grown"]
    configs |= {size: arms[f"{size} from scratch"] for size in (growth.BETWEEN, growth.LARGE)}
    return by_parameters(results, configs)


def grown_sizes(results):
    """size -> records of it grown from the small one, in the order of parameters; those that were run."""
    into = growth.into_between(results.ask)
    configs = {size: into and search.changed(into, size=size) for size in growth.OTHER_SIZES} | {growth.BETWEEN: into}
    configs[growth.LARGE] = growth.growth_arms(results.ask)[f"{growth.SMALL} grown into {growth.LARGE}"]
    return by_parameters(results, configs)


def size_curve_rows(results):
    grown = grown_sizes(results)
    for size, records in sizes(results).items():
        r = records[0]
        lr = f"{r['config']['stages'][-1]['lr']:.2g}"
        after = "" if size == growth.SMALL else cell([r["bits"] for r in grown[size]] if size in grown else None)
        yield size, f"{r['parameters']:,}", f"{r['steps']:,}", lr, cell([r["bits"] for r in records]), after


def both_rows(results):
    targets = results.losses(growth.growth_arms(results.ask)[f"{growth.LARGE} from scratch"])
    for name, config in growth.both_arms(results.ask).items():
        losses = [results.losses(config and search.changed(config, flops=total)) for total in growth.TOTALS]
        yield name, *map(cell, losses), saving(losses, growth.TOTALS, targets)


def restart_rows(results):
    first, *others = [(arm, growth.restart(results.ask, arm)) for arm in growth.RESTARTS]
    as_always = results.losses(first[1])
    for arm, config in (first, *others):
        losses = results.losses(config)
        apart = as_always and losses and [b - a for a, b in zip(as_always, losses, strict=True)]
        lr = f"{config['stages'][-1]['lr']:.2g}" if config else NONE
        yield arm, lr, cell(losses), "" if arm == first[0] else cell(apart)


def when_rows(results):
    best = growth.growth_arms(results.ask)[f"{growth.SMALL} grown into {growth.LARGE}"]
    alone = results.records(growth.falls())
    for steps in growth.GROWN_AT if best else ():
        records = results.records(growth.grown_at(best, steps))
        falling = cell(alone and [100 * dict(r["falls"])[steps] for r in alone], 1)
        if records is None:
            yield steps, NONE, NONE, falling, NONE
            continue
        share = statistics.fmean(r["small_flops"] / growth.TOTAL for r in records)
        small, large = (cell([r[bits] for r in records]) for bits in ("small_bits", "bits"))
        yield steps, f"{share:.0%}", small, falling, large


def rule_rows(results):
    for case, best in growth.rule_cases(results.ask).items():
        arms = {f"step {steps}": best and growth.grown_at(best, steps) for steps in growth.POINTS}
        arms["by the rule"] = best and growth.by_rule(best)
        for name, config in arms.items():
            records = results.records(config, growth.HELD_OUT)
            if records is None:
                yield case, name, *[NONE] * 3
                continue
            steps = ", ".join(dict.fromkeys(f"{r['small_steps']:,}" for r in records))
            share = statistics.fmean(r["small_flops"] / config["stages"][-1]["flops"] for r in records)
            yield case, name, steps, f"{share:.0%}", cell([r["bits"] for r in records])


def million_growth_rows(results):
    arms = {name: growth.million_arm(results.ask, *arm) for name, arm in growth.MILLION_ARMS.items()}
    large = results.losses(arms[f"{sophia.MILLION} from scratch"])
    for name, config in arms.items():
        records = results.records(config)
        if records is None:
            yield name, *[NONE] * 10
            continue
        losses = [results.losses(growth.shortened(config, share)) for share in growth.SHARES]
        lr, (*shorter, _) = f"{config['stages'][-1]['lr']:.2g}", losses
        yield (
            name,
            f"{records[0]['parameters']:,}",
            f"{records[0]['steps']:,}",
            lr,
            *("" if each is None else cell(each) for each in shorter),
            *by_seed(results, config),
            "" if None in losses else saving(losses, growth.SHARES, large),
        )


def million_sizes(results, grown):
    """size -> records of it at a million parameters' FLOPs, grown or from scratch, as `sizes` has them."""
    arms = [arm for arm in growth.MILLION_ARMS.values() if arm[1] == grown]
    return by_parameters(results, {arm[0]: growth.million_arm(results.ask, *arm) for arm in arms})


def thirty_growth_rows(results):
    """Of those that were run."""
    for name, config in gpu.growth_arms(results.ask).items():
        if config is None:
            continue
        (first,) = results.records(config, SEEDS[:1])
        after = f"{first['start_bits']:.3f}" if "start_bits" in first else ""
        yield (
            name,
            f"{config['stages'][-1]['lr']:.2g}",
            f"{first['parameters']:,}",
            f"{first['steps'] - first.get('small_steps', 0):,}",
            after,
            *by_seed(results, config),
        )


def vit_rows(results):
    for arm in growth.VIT_ARMS:
        trials = [(results.ask(each), each) for each in (growth.vit_config(arm, lr) for lr in growth.VIT_RATES)]
        best = None if None in [loss for loss, _ in trials] else search.better(trials)
        records = results.records(best)
        if records is None:
            yield arm, *[NONE] * 3
            continue
        cells = cell([r["bits"] for r in records]), cell([r["error"] for r in records], 1)
        yield arm, f"{best['stages'][-1]['lr']:.3g}", *cells


TABLES = {
    "thirty_growth": lambda r: table(
        (*ARM[:2], "parameters", "steps", ARM[2], *[f"seed {i}" for i in SEEDS], ARM[4]),
        thirty_growth_rows(r),
    ),
    "growth": lambda r: table(ARM, arm_rows(r, growth_arms(r))),
    "starts": lambda r: table(ARM, arm_rows(r, growth.start_arms(r.ask) | growth.more_start_arms(r.ask))),
    "best": lambda r: table(
        ("run", *AT[1:], *[f"seed {i}" for i in growth.MORE_SEEDS], "saved, seeds 0 to 2"), best_rows(r)
    ),
    "sizes": lambda r: table(
        ("layers x width", "parameters", "steps", "lr", "from scratch", f"grown from {growth.SMALL}"),
        size_curve_rows(r),
    ),
    "both": lambda r: table(("run", *AT, "saved"), both_rows(r)),
    "restarts": lambda r: table(("run", "lr", "bits/byte", "apart from the first"), restart_rows(r)),
    "when": lambda r: table(
        ("grown at step", "of all FLOPs", "small, when it is grown", "its fall per doubling, %", "bits/byte"),
        when_rows(r),
    ),
    "rule": lambda r: table(("growth", "grown", "at steps", "of all FLOPs", "bits/byte"), rule_rows(r)),
    "million_growth": lambda r: table(
        ("run", "parameters", "steps", "lr", *MILLION_AT[:-1], *[f"seed {i}" for i in SEEDS], MILLION_AT[-1], "saved"),
        million_growth_rows(r),
    ),
    "vit": lambda r: table(("run", "lr", "bits/label", "error, %"), vit_rows(r)),
}
