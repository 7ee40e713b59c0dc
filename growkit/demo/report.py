"""What came out of the demo: results.json, the figure, the table, and the verdict in words."""

import itertools
import json
import os

from matplotlib.figure import Figure
from rich.table import Table

from growkit.demo.settings import SPREAD, read_text

# run: (what the table calls it, its label in the figure, its colour)
NAMES = {
    "small": ("small, when it is grown", None, None),
    "grown": ("small, grown, trained on", "grown", "#c44e52"),
    "scratch": ("large from scratch", "large from scratch", "#4c72b0"),
    "never_grown": ("small, never grown", "small, never grown", "#55a868"),
    "middle": ("middle size from scratch", "middle size", "#8c8c8c"),
    "sophia_grown": ("grown, trained on by SophiaG", "grown, SophiaG", "#e39c37"),
    "sophia_scratch": ("large from scratch, SophiaG", "large, SophiaG", "#8172b3"),
}
FINAL = tuple(name for name, (_, label, _) in NAMES.items() if label)


def write(results, folder):
    """results.json and curves.png of what has finished, each under a temporary name first."""
    runs = results["runs"]
    done = [name for name in FINAL if name in runs]
    results["final"] = {name: runs[name]["bits_per_byte"] for name in done}
    results["final"]["flops"] = {name: runs[name]["flops"] for name in done}
    if "scratch" in runs:  # all runs but those of SophiaG train with AdamW
        for each, of in ((results["final"], "bits_per_byte"), (results["final"]["flops"], "flops")):
            each["adamw_scratch"] = runs["scratch"][of]
    _replace(folder / "results.json", lambda file: file.write_text(json.dumps(results, indent=1) + "\n"))
    if done:
        _replace(folder / "curves.png", lambda file: figure(results).savefig(file, dpi=150, format="png"))


def _replace(file, write):
    partial = file.with_name(file.name + ".partial")
    write(partial)
    os.replace(partial, file)


def tell(results, console):
    table = Table(title="bits per byte of held-out text, lower is better; everything spent is counted")
    for column in ("run", "parameters", "steps", "FLOPs", "CPU s", "bits/byte"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for name, (title, *_) in NAMES.items():
        if name not in results["runs"]:
            continue
        r = results["runs"][name]
        cells = f"{r['parameters']:,}", f"{r['steps']:,}", f"{r['flops']:.2e}", f"{r['cpu_seconds']:.0f}"
        table.add_row(title, *cells, f"{r['bits_per_byte']:.3f}")
    console.print(table)
    settings = results["settings"]
    as_measured = settings["steps_scale"] == 1 and results["text"]["source"] == read_text()[0]
    for line in verdict(results["runs"], as_measured):
        console.print(f"- {line}", markup=False)


def verdict(runs, as_measured=True):
    """Who won, in lines of words; every one is computed from what came out.

    as_measured: whether these are runs like those that seeds were compared on.
    """
    bits = {name: runs[name]["bits_per_byte"] for name in runs}
    grown, total = runs["grown"], runs["grown"]["flops"]
    ends = [_against(bits["grown"], bits[name], NAMES[name][1]) for name in ("scratch", "never_grown")]
    pays = all(bits["grown"] < bits[name] - SPREAD for name in ("scratch", "never_grown"))
    yield (
        f"Everything counted, {total:.1e} FLOPs for each: growing {'pays' if pays else 'does not pay'}. It reaches "
        f"{bits['grown']:.3f}: {' and '.join(ends)}."
    )
    own = total - grown["small_flops"]
    yield (
        f"With the small model given, as somebody's checkpoint, {bits['grown']:.3f} cost {own:.1e} FLOPs: "
        f"{own / total:.0%} of what the large model from scratch was allowed."
    )
    fit, change = grown["fit_flops"], grown["after_start"] - grown["after_fit"]
    yield (
        f"The start was lossless ({runs['small']['bits_per_byte']:.3f} before and {grown['after_start']:.3f} after); "
        f"training the operator cost {fit:.1e} FLOPs ({fit / total:.0%}) and gave {change:.3f}."
    )
    words = _against(bits["middle"], bits["grown"], "growing")
    yield (
        f"The limit: a middle size trained directly for the same FLOPs reaches {bits['middle']:.3f}, {words}. "
        "Growing is for a small model that exists, or a large one that is wanted."
    )
    if "sophia_grown" in runs:
        ours = [_against(bits[f"sophia_{name}"], bits[name], "AdamW") for name in ("scratch", "grown")]
        yield (
            f"The optimizer: all this is AdamW, tuned. SophiaG by its preset for short runs is {ours[0]} from scratch "
            f"({bits['sophia_scratch']:.3f}) and {ours[1]} on the grown model ({bits['sophia_grown']:.3f})."
        )
    else:
        yield "The optimizer of these runs is AdamW, tuned; growkit demo --sophia runs SophiaG's beside them."
    if not as_measured:
        yield f"Seeds differ by up to {SPREAD} in the whole demo on its own text; for other runs that is not known."


def _against(ours, others, name):
    """ "0.123 better than NAME", unless two seeds of one run may differ by as much."""
    gap = others - ours
    if abs(gap) <= SPREAD:
        return f"level with {name} (apart by {abs(gap):.3f}, seeds by up to {SPREAD})"
    return f"{abs(gap):.3f} {'better' if gap > 0 else 'worse'} than {name}"


def figure(results):
    """Validation bits per byte against FLOPs and against CPU seconds; labels stand at the ends of their lines."""
    runs = {name: results["runs"][name] for name in FINAL if name in results["runs"]}
    drawn = Figure(figsize=(10, 5), layout="constrained")
    axes = drawn.subplots(1, 2, sharey=True, width_ratios=(1.5, 1))
    bits = sorted((run["bits_per_byte"], name) for name, run in runs.items())
    low, high = bits[0][0] - 0.1, bits[-1][0] + 0.9  # where every run starts, near 8 bits, is of no interest
    heights = dict(zip(bits, _apart([y for y, _ in bits], 0.055 * (high - low)), strict=True))
    for ax, key, label in zip(axes, ("flops", "seconds"), ("training FLOPs", "training CPU seconds"), strict=True):
        right = max(run["points"][-1][key] for run in runs.values())
        for (y, name), height in heights.items():
            color, points = NAMES[name][2], runs[name]["points"]
            for phase, part in itertools.groupby(_joined(points), key=lambda point: point["phase"]):
                line = zip(*((point[key], point["bits_per_byte"]) for point in part), strict=True)
                given = name == "grown" and phase == "small"  # it may be somebody's checkpoint
                ax.plot(*line, color=color, linewidth=2.2, linestyle=":" if given else "-")
            x = points[-1][key]
            ax.plot(x, y, "o", color=color, markersize=6)
            words, at = (f"{NAMES[name][1]} {y:.2f}", right) if key == "flops" else (f"{y:.2f}", x)
            ax.annotate(words, (x, y), (at + 0.04 * right, height), color=color, va="center", fontsize=13)
        ax.set_xlim(0, right * (1.75 if key == "flops" else 1.25))
        ax.set_ylim(low, high)
        ax.set_xlabel(label, fontsize=13)
        ax.tick_params(labelsize=12)
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("bits per byte, held-out text", fontsize=13)
    return drawn


def _apart(heights, least):
    """The sorted `heights`, each moved up as far as it must be to stand `least` above the one before."""
    placed = []
    for height in heights:
        placed.append(max(height, placed[-1] + least) if placed else height)
    return placed


def _joined(points):
    """Each phase starts where the one before ended, so that the drawn line has no gaps."""
    for before, point in zip([None, *points], points, strict=False):
        if before is not None and before["phase"] != point["phase"]:
            yield {**before, "phase": point["phase"]}
        yield point
