"""The goals, each written once, the workloads that measure them, and the one table that both `growkit bench` and
`make bench` print."""

import functools
import gc
import json
import math
import operator
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from growkit.bench import ceilings, instructions, kron, sampled_nll, sophia, sophia8bit, training
from growkit.bench.measure import Value, hardware, reason


class Goal(NamedTuple):
    """One line of the table. relation: ">=" or "<=", or "" where a figure is only reported."""

    id: str
    what: str
    relation: str
    bound: float
    unit: str = "x"


class Workload(NamedTuple):
    """build(device=, tiny=) -> Case. needs: "cuda" or "cpu", the device that its figures are about, or "any"."""

    name: str
    needs: str
    build: Callable


LOUD = 0.2  # of a value: noise from here on excuses no miss, for it would excuse any


class Row(NamedTuple):
    """A goal and what was measured: `value` is a Value, or in words why there is none. failed: the run went wrong."""

    goal: Goal
    value: object
    failed: bool = False

    @property
    def verdict(self):
        if self.failed:
            return "FAILED"
        if isinstance(self.value, str):
            return "not measured"
        if not self.goal.relation:
            return "-"
        reaches = operator.ge if self.goal.relation == ">=" else operator.le
        value, noise = self.value.value, self.value.noise or 0
        if reaches(value, self.goal.bound):
            return "met"
        noise = noise if noise < LOUD else 0
        better = 1 + noise if self.goal.relation == ">=" else 1 - noise
        return "missed by less than noise" if reaches(value * better, self.goal.bound) else "missed"


def _workloads():
    def add(name, needs, build, *arguments):
        workloads.append(Workload(name, needs, functools.partial(build, *arguments)))

    workloads = []
    add("ceilings", "any", ceilings.ceilings)
    for model in ("gpt2-small", "gpt2-medium", "gpt2-xl", "nanogpt", "many-small", "ragged", "llama-1b"):
        add(f"update-float32-{model}", "cuda", sophia.update, model)
    add("update-compiled-gpt2-small", "cuda", sophia.update_compiled, "gpt2-small")
    for form in sophia.FORMATS:
        add(f"update-{form}-gpt2-xl", "cuda", sophia.update_mixed, form, "gpt2-xl")
    add("update-8bit-gpt2-xl", "cuda", sophia8bit.update, "gpt2-xl-coded")
    add("update-clip-gpt2-xl", "cuda", sophia.clip, "gpt2-xl")
    for model in ("gpt2-small", "gpt2-xl"):
        add(f"refresh-gnb-{model}", "cuda", sophia.refresh_gnb, model)
    add("refresh-hutchinson-gpt2-xl", "cuda", sophia.refresh_hutchinson, "gpt2-xl")
    add("refresh-nll", "cuda", sampled_nll.refresh)
    add("training-gpt2-small", "cuda", training.step)
    for model in ("gpt2-small", "gpt2-xl"):
        add(f"host-{model}", "cuda", sophia.host, model)
    add("host-instructions", "any", instructions.step_instructions)
    for pair, kind, precision in (
        ("bert-base", "top", "highest"),
        ("gpt2-medium", "top", "highest"),
        ("gpt2-medium", "top", "high"),
        ("gpt2-medium", "top", "medium"),
        ("gpt2-medium", "dense", "high"),
        ("gpt2-medium", "dense", "medium"),
        ("gpt2-xl", "top", "highest"),
        ("llama-7b", "top", "high"),
        ("llama-7b", "top", "medium"),
    ):
        add(f"expand-fwd-{pair}-{kind}-{precision}", "cuda", kron.forward, pair, kind, precision)
    add("expand-fwd-compiled-gpt2-medium", "cuda", kron.forward_compiled, "gpt2-medium")
    add("expand-bwd-gpt2-medium-top", "cuda", kron.backward, "gpt2-medium", "top")
    add("mix", "cuda", kron.mix, "gpt2-medium")
    for pair in ("gpt2-medium", "llama-7b"):
        add(f"memory-{pair}", "cuda", kron.memory, pair)
    add("cpu-step", "cpu", sophia.cpu_step)
    add("cpu-step-pages-kept", "cpu", sophia.cpu_step_pages_kept)
    add("cpu-step-compiled", "cpu", sophia.cpu_step_compiled)
    for module in ("query", "fc"):
        add(f"cpu-expand-{module}", "cpu", kron.cpu_expand, module)
    return {workload.name: workload for workload in workloads}


WORKLOADS = _workloads()

_COPY = "bandwidth / copy's"
# id, what (ratios are of times, unless they are of bandwidths), workload, relation, bound, unit if not "x". The bounds
# are the project's goals; a missed one stays as it is.
_TABLE = (
    ("copy", "copy", "ceilings", "", 0, "GB/s"),
    ("fill", "fill", "ceilings", "", 0, "GB/s"),
    *(
        (f"{group}.{kind}", f"{what}, {kind}", "ceilings", "", 0, "TFLOP/s")
        for group, what in (("mm", "one product of 8192 (CPU: 512)"), ("bmm", "12 products of 1024 (CPU: 256)"))
        for kind in ceilings.PRODUCTS
    ),
    *(
        (f"S1.{m}", f"update, {m}, float32: {_COPY}", f"update-float32-{m}", ">=", 0.92)
        for m in ("gpt2-small", "gpt2-medium", "gpt2-xl")
    ),
    *(
        (f"S2.{m}", f"update, {m}: growkit / fused AdamW", f"update-float32-{m}", "<=", 0.857)
        for m in ("gpt2-small", "gpt2-medium", "gpt2-xl")
    ),
    *(
        (
            f"S3.{id}",
            f"{what}, gpt2-small: growkit / compiled foreach, {clock}",
            "update-compiled-gpt2-small",
            "<=",
            goal,
        )
        for id, what, clock, goal in (("graph", "update", "CUDA graphs", 1.0), ("wall", "step()", "wall", 0.80))
    ),
    ("S3.compile", "first step of a process, compiling", "host-gpt2-small", "<=", 5, "s"),
    ("S3.recompiles", "kernels compiled over 100 values of lr", "host-gpt2-small", "<=", 0, ""),
    *(
        (f"S4.{m}", f"step(), {m}: official / growkit, wall", f"update-float32-{m}", ">=", goal)
        for m, goal in (("gpt2-small", 8), ("nanogpt", 4), ("gpt2-xl", 3.6))
    ),
    ("S5.gpt2-small", "update, gpt2-small: flat buffers / growkit", "update-float32-gpt2-small", ">=", 0.97),
    ("S6.copy.gpt2-xl", f"GNB refresh, gpt2-xl: {_COPY}", "refresh-gnb-gpt2-xl", ">=", 0.90),
    ("S6.official.gpt2-xl", "GNB refresh, gpt2-xl: growkit / official", "refresh-gnb-gpt2-xl", "<=", 0.63),
    ("S6.wall.gpt2-small", "GNB refresh, gpt2-small: official / growkit, wall", "refresh-gnb-gpt2-small", ">=", 2.8),
    ("S7.regenerated.gpt2-xl", "Hutchinson refresh: u regenerated / u read", "refresh-hutchinson-gpt2-xl", "<=", 0.80),
    ("S7.probe.gpt2-xl", "probe written: bandwidth / fill's", "refresh-hutchinson-gpt2-xl", ">=", 0.85),
    ("S8.launches.many-small", "update, 1,000 tensors of 1,000: launches", "update-float32-many-small", "<=", 1, ""),
    ("S8.gpu.many-small", "update, 1,000 tensors of 1,000, in L2", "update-float32-many-small", "<=", 40, "us"),
    (
        "S8.wall.many-small",
        "step(), 1,000 tensors of 1,000: official / growkit, wall",
        "update-float32-many-small",
        ">=",
        20,
    ),
    *(
        (f"S9.{form}.gpt2-xl", f"step(), {what}: {_COPY}", f"update-{form}-gpt2-xl", ">=", 0.88)
        for form, what in (
            ("bfloat16", "bfloat16 p and g"),
            ("bfloat16-master", "bfloat16 p and g, master"),
            ("bfloat16-state", "bfloat16 p, g, m, h"),
        )
    ),
    ("S9.8bit.copy", f"step(), 8-bit m and h: {_COPY}", "update-8bit-gpt2-xl", ">=", 0.75),
    ("S9.8bit.time", "step(), float32 p and g: 8-bit m and h / float32", "update-8bit-gpt2-xl", "<=", 0.75),
    *(
        (f"S10.host.{m}", f"step(), {count} tensors: time of the host", f"host-{m}", "<=", goal, "us")
        for m, count, goal in (("gpt2-small", 148, 100), ("gpt2-xl", 580, 300))
    ),
    ("S10.graph", "step() captured, replayed with another lr: same bits", "host-gpt2-small", ">=", 1, ""),
    ("S10.temporaries", "step(): memory allocated and freed", "host-gpt2-small", "<=", 0, "B"),
    ("S10.instructions", "step(), 148 tensors, all but the launch: instructions", "host-instructions", "", 0, ""),
    ("S11.gpt2-xl", "step(): clip inside / clip_grad_norm_ before", "update-clip-gpt2-xl", "<=", 0.80),
    ("N1.time", "sampled labels' loss and gradient: Categorical / growkit", "refresh-nll", "", 0),
    ("N1.memory", "the same, in peak memory", "refresh-nll", "", 0),
    ("N2.refreshed", "training, gpt2-small, refresh every 10: SophiaG / fused AdamW", "training-gpt2-small", "", 0),
    ("N2.update", "the same without the refresh", "training-gpt2-small", "", 0),
    *(
        (
            f"L1.{p}.top.highest",
            f"expansion, {p}, float32: best torch / growkit",
            f"expand-fwd-{p}-top-highest",
            ">=",
            1.7,
        )
        for p in ("gpt2-medium", "gpt2-xl")
    ),
    *(
        (f"L2.{p}.{k}.{n}", f"expansion, {p}, {k}, {t}: best torch / growkit", f"expand-fwd-{p}-{k}-{n}", ">=", goal)
        for p, k, goal in (("gpt2-medium", "dense", 1.10), ("gpt2-medium", "top", 1.20), ("llama-7b", "top", 0.97))
        for n, t in (("high", "TF32"), ("medium", "bfloat16"))
    ),
    *(
        (
            f"L3.{p}.top.{n}",
            f"expansion, {p}: float32 official style / growkit, {t}",
            f"expand-fwd-{p}-top-{n}",
            ">=",
            goal,
        )
        for p, n, t, goal in (
            ("bert-base", "highest", "float32", 5),
            ("gpt2-medium", "highest", "float32", 5),
            ("gpt2-medium", "high", "TF32", 10),
        )
    ),
    (
        "L4.literal.bert-base.top.highest",
        "expansion, bert-base: literal loop / growkit",
        "expand-fwd-bert-base-top-highest",
        ">=",
        20,
    ),
    (
        "L4.compiled.gpt2-medium",
        "expansion, gpt2-medium: compiled official style / growkit",
        "expand-fwd-compiled-gpt2-medium",
        ">=",
        3,
    ),
    *(
        (f"L5.{id}.gpt2-medium", f"gradients, gpt2-medium: {what}", "expand-bwd-gpt2-medium-top", relation, goal)
        for id, what, relation, goal in (
            ("forward", "backward / forward", "<=", 2.3),
            ("official", "autograd of official style / growkit", ">=", 2),
            ("strong", "autograd of best torch / growkit", ">=", 1.15),
        )
    ),
    *(
        (f"L6.{id}", f"{what}, gpt2-medium: {_COPY}", "mix", ">=", goal)
        for id, what, goal in (
            ("mix", "depth mix", 0.88),
            ("gather", "gather", 0.85),
            ("backward", "backward of the mix", 0.75),
        )
    ),
    ("L7.gpt2-medium", "grow(): peak beyond one module type's intermediate", "memory-gpt2-medium", "<=", 64, "MiB"),
    ("L7.llama-7b", "growing llama-7b's gate in place: peak beyond its result", "memory-llama-7b", "<=", 2, "GiB"),
    *(
        (f"C1.{malloc}{id}", f"CPU reference step, {what}{words}", f"cpu-step{workload}", relation, goal)
        for malloc, words, workload in (("", "", ""), ("pages-kept.", ", pages kept", "-pages-kept"))
        for id, what, relation, goal in (
            ("official", "same bits: official / growkit", ">=", 2.0),
            ("adamw", "growkit / fused AdamW", "<=", 2.2),
        )
    ),
    *(
        (f"C1.compiled.{id}", f"compiled CPU step, gpt2-small, {what}", "cpu-step-compiled", relation, goal)
        for id, what, relation, goal in (
            ("reference", "same bits: reference / growkit", ">=", 2),
            ("adamw", "1 thread: growkit / fused AdamW", "<=", 0.9),
            ("adamw.2-threads", "2 threads, wall: growkit / fused AdamW", "<=", 0.9),
        )
    ),
    *(
        (f"C2.{id}.{m}", f"CPU {what}, bert-base, {m}: {ratio} / growkit", f"cpu-expand-{m}", ">=", goal)
        for id, what, ratio, goal, modules in (
            ("official", "expansion", "official style", 2, ("query", "fc")),
            ("einsum", "expansion", "4-operand einsum", 6, ("query",)),
            ("backward", "gradients", "per-layer autograd", 1.8, ("query", "fc")),
        )
        for m in modules
    ),
)
GOALS = {id: Goal(id, what, relation, bound, *unit) for id, what, _, relation, bound, *unit in _TABLE}
MEASURED_BY = {id: workload for id, _, workload, *_ in _TABLE}
NOTHING_TO_MEASURE = "this version has nothing to measure"


def select(words):
    """Ids of the goals that each of `words` names: an id, or the beginning of one up to a dot; "S" is S1 to S11.

    Upper and lower case are the same. No words: all. Raises ValueError for a word that names none.
    """
    chosen = {}
    for word in words or [""]:
        low = word.lower()
        found = [id for id in GOALS if not low or f"{id}.".lower().startswith(f"{low}.") or _series(id).lower() == low]
        if not found:
            known = ", ".join(dict.fromkeys(id.partition(".")[0] for id in GOALS))
            raise ValueError(f"got {word!r}, expected the id of a goal, or the beginning of one: {known}")
        chosen |= dict.fromkeys(found)
    return list(chosen)


def _series(id):
    """S of S10.host, L of L1: the letter of a numbered id."""
    head = id.partition(".")[0]
    return head[0] if head[0].isupper() else ""


def listing(ids):
    """A line for each of `ids`: id, what it measures, the goal."""
    width = max(map(len, ids))
    return "\n".join(f"{id:{width}}  {GOALS[id].what}{_target(GOALS[id], ' (goal ', ')')}" for id in ids)


def runs_on(workload, device):
    return workload.needs in ("any", torch.device(device).type)


def measure(ids, device, rounds=None, tiny=False):
    """Yield a Row for each of `ids`, workload by workload; the check in float64 comes before and after the timing."""
    rounds = rounds or (30 if torch.device(device).type == "cuda" else 9)
    rest = dict.fromkeys(ids)
    for id in ids:
        if id not in rest:
            continue
        name = MEASURED_BY[id]
        together = [other for other in rest if MEASURED_BY[other] == name]
        for other in together:
            del rest[other]
        yield from rows_of(name, together, device, rounds, tiny)


def rows_of(name, ids, device, rounds, tiny=False, between=None):
    """Rows for `ids`, all of the workload `name`. An error of the workload makes failed rows, not an exception.

    between: called with the Case after its check and before its rows.
    """
    if name is None:
        return [Row(GOALS[id], NOTHING_TO_MEASURE) for id in ids]
    workload = WORKLOADS[name]
    if not tiny and not runs_on(workload, device):
        return [Row(GOALS[id], f"about {workload.needs}, this run is on {device}") for id in ids]
    case = None
    try:
        case = workload.build(device=device, tiny=tiny)
        case.check()
        if between is not None:
            between(case)
        found = case.rows(rounds)
        case.check()
    except Exception as error:
        return [Row(GOALS[id], reason(error), failed=True) for id in ids]
    finally:
        case = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return [Row(GOALS[id], found.get(id, f"not taken on {device}")) for id in ids]


# --- output ----------------------------------------------------------------------------------------------------------


def number(x):
    if x == 0 or not math.isfinite(x):
        return f"{x:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(x))))
    return f"{x:,.{digits}f}"


def render(rows):
    """The table in Markdown: id, what, goal, measured, noise, verdict; then why some rows were not measured."""
    lines = [["id", "what", "goal", "measured", "noise", "verdict"]]
    reasons = {}
    for row in sorted(rows, key=lambda row: list(GOALS).index(row.goal.id)):
        goal, unit = row.goal, f" {row.goal.unit}".rstrip()
        measured, noise = "", ""
        if isinstance(row.value, Value):
            measured = number(row.value.value) + unit
            noise = "" if row.value.noise is None else f"{100 * row.value.noise:.1f} %"
        else:
            reasons.setdefault(f"{row.verdict}: {row.value}", []).append(goal.id)
        lines.append([goal.id, goal.what, _target(goal), measured, noise, row.verdict])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    table = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    table.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(table + ["", *(f"{why}: {', '.join(ids)}" for why, ids in reasons.items())]).rstrip()


def _target(goal, before="", after=""):
    """>= 0.92 x, say; nothing for a goal that only reports."""
    return f"{before}{goal.relation} {goal.bound:g} {goal.unit}".rstrip() + after if goal.relation else ""


def as_json(rows, device):
    return {
        "hardware": hardware() | {"device": str(device)},
        "rows": [
            {
                **row.goal._asdict(),
                "verdict": row.verdict,
                **(row.value._asdict() if isinstance(row.value, Value) else {"reason": row.value}),
            }
            for row in rows
        ],
    }


def write_json(path, rows, device):
    """Write all rows so far; a reader, or an interruption, never meets half a file."""
    part = Path(f"{path}.part")
    part.write_text(json.dumps(as_json(rows, device), indent=1) + "\n")
    os.replace(part, path)


def run(ids=(), device="auto", json=None):
    """Measure, print the table, and return the exit code: 1 if a workload failed, which a missed goal is not.

    Interrupted, it prints the rows that it has, and returns 130.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)
    rows, start, interrupted = [], time.perf_counter(), False
    try:
        for row in measure(select(ids), device):
            rows.append(row)
            if row.failed or isinstance(row.value, Value):
                seconds = time.perf_counter() - start
                print(f"{seconds:6.1f} s  {row.goal.id}: {row.verdict}", file=sys.stderr, flush=True)
            if json:
                write_json(json, rows, device)
    except KeyboardInterrupt:
        interrupted = True
        print("\ninterrupted: " + ("these had finished" if rows else "nothing had finished"), file=sys.stderr)
        if not rows:
            return 130
    print(", ".join(f"{key} {value}" for key, value in hardware().items() if value is not None))
    print()
    print(render(rows))
    return 130 if interrupted else int(any(row.failed for row in rows))
