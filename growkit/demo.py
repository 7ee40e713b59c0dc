"""The main job on real text: train a small GPT-2, grow it, train on; and the large one from scratch for equal FLOPs.

Everything is a byte-level language model (256 tokens), so results are bits per byte of held-out text.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
import platform
import pydoc_data.topics
import shutil
import sys
import time

import torch
import transformers
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import growkit

CONTEXT, BATCH, VALIDATION_WINDOWS = 128, 12, 128
SMALL = {"n_layer": 3, "n_embd": 96, "n_head": 6}
LARGE = {"n_layer": 6, "n_embd": 144, "n_head": 9}
SMALL_STEPS, FIT_STEPS, LARGE_STEPS = 400, 100, 250
REFRESH_EVERY = 10

# Settings that hold up for both sizes; docs/training.md has the sweep around them.
SOPHIA = {"lr": 1e-3, "betas": (0.7, 0.99), "rho": 0.2, "weight_decay": 0.1}
BETA2 = {"AdamW": 0.95, "SophiaG": SOPHIA["betas"][1]}
SWEEP = {
    "AdamW": {"lr": (2e-3, 4e-3, 8e-3), "beta1": (0.7, 0.8, 0.9, 0.965)},
    "SophiaG": {"lr": (1e-3, 2e-3, 4e-3), "beta1": (0.7, 0.8, 0.9, 0.965), "rho": (0.04, 0.2, 1.0)},
}
CONFIRM_SEEDS = 3

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".tex", ".html")


# --- text ------------------------------------------------------------------------------------------------------------


def read_text(path=None):
    """(name, bytes): a file, every text file below a folder in order of name, or the help texts every Python has."""
    if path is None:
        topics = pydoc_data.topics.topics
        return "pydoc_data.topics", "\n".join(topics[name] for name in sorted(topics)).encode()
    files = [path]
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.suffix.lower() in TEXT_SUFFIXES and f.is_file())
    return str(path), b"\n".join(f.read_bytes() for f in files)


class Corpus:
    """Bytes split in two: the first nine tenths to train on, windows of the last tenth to validate on."""

    def __init__(self, text, device):
        data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        split = len(data) * 9 // 10
        self.train, held_out = data[:split], data[split:]
        starts = range(0, len(held_out) - CONTEXT, CONTEXT)
        chosen = starts[:: max(1, len(starts) // VALIDATION_WINDOWS)]
        self.validation = torch.stack([held_out[i : i + CONTEXT] for i in chosen]).long().to(device)
        self.device = device

    def batches(self, seed, stream=0):
        """An endless stream of {"input_ids", "labels"}, [BATCH, CONTEXT], the same for the same seed and stream."""
        generator = torch.Generator().manual_seed(1000 * seed + stream)
        while True:
            starts = torch.randint(len(self.train) - CONTEXT, (BATCH,), generator=generator).tolist()
            tokens = torch.stack([self.train[i : i + CONTEXT] for i in starts]).long().to(self.device)
            yield {"input_ids": tokens, "labels": tokens}


@torch.no_grad()
def bits_per_byte(model, corpus):
    was_training = model.training
    model.eval()
    total = sum(len(w) * float(model(input_ids=w, labels=w).loss) for w in corpus.validation.split(32))
    model.train(was_training)
    return total / len(corpus.validation) / math.log(2)


# --- models and their cost -------------------------------------------------------------------------------------------


def config(size):
    tokens = {"vocab_size": 256, "n_positions": CONTEXT, "bos_token_id": None, "eos_token_id": None}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return transformers.GPT2Config(**size, **tokens, **dropout, use_cache=False)


def new_model(size, seed, device):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transformers.GPT2LMHeadModel(config(size)).to(device).train()


def step_flops(model):
    """FLOPs of one forward and backward of a batch: 6 per weight and token, and 12*L*d*T per token for attention.

    Weights are those of matrix products: position embeddings do not count, token embeddings count once, as the head.
    """
    c = model.config
    weights = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "wpe" not in name)
    return BATCH * CONTEXT * (6 * weights + 12 * c.n_layer * c.n_embd * CONTEXT)


def groups(model):
    """Parameter groups: weight decay for the matrices of the blocks, none for embeddings, norms and biases."""
    decayed, others = [], []
    for name, p in model.named_parameters():
        (decayed if p.dim() == 2 and "wte" not in name and "wpe" not in name else others).append(p)
    return [{"params": decayed}, {"params": others, "weight_decay": 0.0}]


def refreshes(optimizer):
    return optimizer.stats()["refreshes"] if isinstance(optimizer, growkit.SophiaG) else 0


def sophia(model, seed=0, **options):
    optimizer = growkit.SophiaG(groups(model), seed=seed, **{**SOPHIA, **options})
    optimizer.attach(model, every=REFRESH_EVERY)
    return optimizer


def adamw(model, seed, **options):
    return torch.optim.AdamW(groups(model), weight_decay=SOPHIA["weight_decay"], **options)


def builder(optimizer, setting):
    """(model, seed) -> the optimizer named in SWEEP, with one of its settings."""
    build = {"SophiaG": sophia, "AdamW": adamw}[optimizer]
    options = {k: v for k, v in setting.items() if k != "beta1"}
    options["betas"] = setting["beta1"], BETA2[optimizer]
    return lambda model, seed: build(model, seed, **options)


# --- training --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Run:
    """One curve: what it has cost so far and the validation bits per byte along the way."""

    name: str
    flops: float = 0.0
    seconds: float = 0.0
    steps: int = 0
    points: list = dataclasses.field(default_factory=list)
    notes: dict = dataclasses.field(default_factory=dict)

    def mark(self, model, corpus, phase):
        point = {"flops": self.flops, "seconds": self.seconds, "bits_per_byte": bits_per_byte(model, corpus)}
        self.points.append({"phase": phase, **point})
        return point["bits_per_byte"]

    @contextlib.contextmanager
    def clock(self):
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start


def train(run, model, corpus, optimizer, steps, bar, *, phase, seed, stream=0, marks=8):
    """Train with warm-up over a tenth of the steps and cosine decay to a tenth of the learning rate."""
    schedule = transformers.get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, num_warmup_steps=max(1, steps // 10), num_training_steps=steps, min_lr_rate=0.1
    )
    before, cost = run.flops, step_flops(model)
    if not run.points:
        run.mark(model, corpus, phase)
    task = bar.add_task(f"{run.name}: {phase} model", total=steps, loss="")
    for step, batch in zip(range(1, steps + 1), corpus.batches(seed, stream), strict=False):
        with run.clock():
            loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            run.steps += 1
            bar.update(task, advance=1, loss=f"loss {loss.detach():.3f}")
        run.flops = before + cost * (step + refreshes(optimizer))  # a refresh is one more forward and backward
        if step % max(10, steps // marks) == 0 or step == steps:
            run.mark(model, corpus, phase)
    bar.remove_task(task)
    if refreshes(optimizer):
        run.notes[phase] = {k: optimizer.stats()[k] for k in ("refreshes", "skipped", "unclipped")}
    return run.points[-1]["bits_per_byte"]


def steps_for(flops, model, refreshed):
    """The most steps that cost no more than `flops`, at least one, with a refresh after steps 1, 11, ... if any."""
    passes = int(flops / step_flops(model))
    return max(1, passes - math.ceil(passes / (REFRESH_EVERY + 1)) if refreshed else passes)


# --- the job ---------------------------------------------------------------------------------------------------------


def run(*, data, device, seed, out, steps_scale, full):
    """Run the demo; the exit code is 0, 2 for unusable text, 130 if interrupted: `out` then holds what had finished."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # a file or a pipe has no width of its own
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    name, text = read_text(data)
    if len(text) < 200 * CONTEXT:
        console.print(f"--data {name}: {len(text)} bytes of text, expected at least {200 * CONTEXT}", markup=False)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    results = {
        "command": " ".join(["growkit", *sys.argv[1:]]),
        "text": {"source": name, "bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()},
        "machine": {"device": device, "threads": torch.get_num_threads(), "python": platform.python_version()}
        | {module.__name__: module.__version__ for module in (growkit, torch, transformers)},
        "settings": {"seed": seed, "steps_scale": steps_scale, "small": SMALL, "large": LARGE, "sophia": SOPHIA},
    }
    console.print(f"text: {name}, {len(text):,} bytes, sha256 {results['text']['sha256'][:16]}…", markup=False)
    console.print(", ".join(f"{k} {v}" for k, v in results["machine"].items()), markup=False)
    job = _Job(Corpus(text, device), seed, device, steps_scale, console, out, results)
    try:
        with job.bar:
            job.main()
            if full:
                job.sweep()
    except KeyboardInterrupt:
        job.write()
        console.print(f"\ninterrupted: what had finished is in {out}")
        return 130
    return 0


class _Job:
    def __init__(self, corpus, seed, device, scale, console, out, results):
        self.corpus, self.seed, self.device, self.scale = corpus, seed, device, scale
        self.out, self.results = out, results
        self.rows, self.runs = [], []
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
        columns += TextColumn("{task.fields[loss]}"), TimeRemainingColumn()
        self.bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)

    def steps(self, steps):
        return max(2, round(steps * self.scale))

    def say(self, text):
        self.bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def row(self, what, model, run):
        parameters = sum(p.numel() for p in model.parameters())
        last = run.points[-1]
        self.rows.append(
            {"what": what, "parameters": parameters, "steps": run.steps, "flops": run.flops, "seconds": run.seconds}
            | {"bits_per_byte": last["bits_per_byte"]}
        )
        self.write()

    def main(self):
        growth = self.begin("growth")
        small = self.train_small(growth)
        large = self.grow(small, growth)
        self.train_large(large, growth)
        scratch = self.begin("from scratch")
        self.spend_alike(growth, scratch, "large from scratch, same FLOPs", LARGE)
        self.say(f"large model from scratch: {_sophia_words(scratch.notes['large'])}")
        self.show_table()
        self.say(verdict(growth, scratch))
        self.say(f"written: {', '.join(str(self.out / f) for f in ('results.json', 'curves.png', 'small', 'grown'))}")

    def begin(self, name):
        self.runs.append(Run(name))
        return self.runs[-1]

    def train(self, run, model, steps, build=sophia, seed=None, **options):
        seed = self.seed if seed is None else seed
        train(run, model, self.corpus, build(model, seed), steps, self.bar, seed=seed, **options)

    def train_small(self, growth):
        model = new_model(SMALL, self.seed, self.device)
        steps = self.steps(SMALL_STEPS)
        self.train(growth, model, steps, phase="small")
        self.row("small model", model, growth)
        self.say(f"small model trained: {_sophia_words(growth.notes['small'])}")
        self.say(save(model, self.out / "small"))
        return model

    def grow(self, small, growth):
        operator = growkit.LiGO(small, config(LARGE), start="lossless", seed=self.seed)
        started = operator.grow().to(self.device)
        before, after = growth.points[-1]["bits_per_byte"], growth.mark(started, self.corpus, "operator")
        self.row("grown, lossless start", started, growth)
        self.say(f"grown: {before:.6f} -> {after:.6f} bits per byte, changed by {abs(after - before):.1e}")
        steps = self.steps(FIT_STEPS)
        task = self.bar.add_task("growth: operator", total=steps, loss="")
        with growth.clock():
            operator.fit(
                self.corpus.batches(self.seed, 1),
                steps=steps,
                progress=lambda step, loss: self.bar.update(task, advance=1, loss=f"loss {loss:.3f}"),
            )
        self.bar.remove_task(task)
        growth.flops += steps * (step_flops(started) + sum(operator.flops_per_expansion))
        growth.steps += steps
        large = operator.grow().to(self.device).train()
        growth.mark(large, self.corpus, "operator")
        self.row(f"operator fitted, {steps} steps", large, growth)
        return large

    def train_large(self, large, growth):
        steps = self.steps(LARGE_STEPS)
        self.train(growth, large, steps, phase="large", stream=2)
        self.row("grown, trained on", large, growth)
        self.say(f"grown model trained on: {_sophia_words(growth.notes['large'])}")
        self.say(save(large, self.out / "grown"))

    def spend_alike(self, growth, run, what, size, build=sophia, refreshed=True):
        """Train a new model from scratch for the FLOPs that growth took."""
        model = new_model(size, self.seed, self.device)
        steps = steps_for(growth.flops, model, refreshed)
        self.train(run, model, steps, build, phase="small" if size is SMALL else "large", marks=10)
        self.row(what, model, run)

    def show_table(self):
        table = Table(title="validation bits per byte against everything spent so far")
        for column in ("model", "parameters", "steps", "FLOPs", "seconds", "bits/byte"):
            table.add_column(column, justify="left" if column == "model" else "right")
        for r in self.rows:
            cells = f"{r['parameters']:,}", str(r["steps"]), f"{r['flops']:.3g}", f"{r['seconds']:.1f}"
            table.add_row(r["what"], *cells, f"{r['bits_per_byte']:.4f}")
        self.bar.console.print(table)

    def write(self):
        """results.json and curves.png, each under a temporary name first."""
        self.results["table"] = self.rows
        self.results["curves"] = [dataclasses.asdict(r) for r in self.runs]
        _replace(self.out / "results.json", lambda f: f.write_text(json.dumps(self.results, indent=1)))
        _replace(self.out / "curves.png", lambda f: plot(self.runs, f))

    # --- --full ---

    def sweep(self):
        """AdamW and SophiaG alike over learning rate and beta1, and rho for SophiaG, on the small model.

        The best of each is run on more seeds. Two more runs cost what growth did: the large model from scratch with the
        best AdamW, and the small model with SophiaG, never grown.
        """
        entries, best = [], {}
        self.results |= {"sweep": entries, "best": best}
        for optimizer, axes in SWEEP.items():
            for values in itertools.product(*axes.values()):
                entries.append(self.trial(optimizer, dict(zip(axes, values, strict=True)), self.seed))
                self.write()
        for optimizer in SWEEP:
            tried = [e for e in entries if e["optimizer"] == optimizer and not math.isnan(e["bits_per_byte"])]
            first = min(tried, key=lambda e: e["bits_per_byte"])
            others = range(self.seed + 1, self.seed + CONFIRM_SEEDS)
            best[optimizer] = [first, *(self.trial(optimizer, first["setting"], seed) for seed in others)]
        self.show_sweep(entries, best)
        growth, scratch, small = self.runs[0], self.begin("from scratch, AdamW"), self.begin("never grown")
        build = builder("AdamW", best["AdamW"][0]["setting"])
        self.spend_alike(growth, scratch, "large from scratch, best AdamW, same FLOPs", LARGE, build, refreshed=False)
        self.spend_alike(growth, small, "small, never grown, same FLOPs", SMALL)
        self.show_table()
        self.say(f"Against AdamW from scratch: {verdict(growth, scratch)}")
        self.say(f"Against never growing: {verdict(growth, small)}")

    def trial(self, optimizer, setting, seed):
        run = Run(optimizer)
        model, steps = new_model(SMALL, seed, self.device), self.steps(SMALL_STEPS)
        self.train(run, model, steps, builder(optimizer, setting), seed, phase="small", marks=1)
        bits, unclipped = run.points[-1]["bits_per_byte"], run.notes.get("small", {}).get("unclipped")
        self.say(f"{optimizer} {setting} seed {seed}: {bits:.4f} bits per byte, {run.seconds:.0f} s")
        cost = {"bits_per_byte": bits, "seconds": run.seconds, "flops": run.flops, "unclipped": unclipped}
        return {"optimizer": optimizer, "setting": setting, "seed": seed, **cost}

    def show_sweep(self, entries, best):
        table = Table(title=f"small model, {self.steps(SMALL_STEPS)} steps, bits per byte, seed {self.seed}")
        for column in ("optimizer", "setting", "bits/byte", "unclipped"):
            table.add_column(column)
        for e in sorted(entries, key=lambda e: e["bits_per_byte"])[:20]:
            setting = ", ".join(f"{k} {v:g}" for k, v in e["setting"].items())
            unclipped = "" if e["unclipped"] is None else f"{e['unclipped']:.3f}"
            table.add_row(e["optimizer"], setting, f"{e['bits_per_byte']:.4f}", unclipped)
        self.bar.console.print(table)
        for optimizer, runs in best.items():
            bits = ", ".join(f"{r['bits_per_byte']:.4f}" for r in runs)
            self.say(f"best {optimizer} {runs[0]['setting']}, {len(runs)} seeds: {bits}")


def _sophia_words(notes):
    unclipped = "not counted" if notes["unclipped"] is None else f"{notes['unclipped']:.1%}"
    return f"{notes['refreshes']} curvature refreshes ({notes['skipped']} skipped), unclipped {unclipped}"


def save(model, folder):
    """Save the checkpoint, load it back, and check that nothing is missing and that it computes the same. Says so."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    loaded, info = type(model).from_pretrained(partial, output_loading_info=True)
    wrong = {k: v for k, v in info.items() if v}
    tokens = torch.arange(CONTEXT, device=model.device)[None]
    with torch.no_grad():
        same = torch.equal(loaded.to(model.device).eval()(tokens).logits, model.eval()(tokens).logits)
    if wrong or not same:
        raise RuntimeError(f"the saved checkpoint does not load back: {wrong or 'other logits'}")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    return f"checkpoint {folder}: loaded back, nothing missing or unexpected, same logits"


def verdict(growth, other):
    """Who won, in words."""
    a, b = growth.points[-1], other.points[-1]
    gap = b["bits_per_byte"] - a["bits_per_byte"]
    words = f"At {a['flops']:.3g} FLOPs, everything counted, "
    if abs(gap) < 0.01:
        words += "growing ties"
    else:
        words += "growing wins" if gap > 0 else "growing loses"
    words += f": {a['bits_per_byte']:.4f} bits per byte, {other.name} {b['bits_per_byte']:.4f} (one seed)."
    reached = [p for p in growth.points if p["bits_per_byte"] <= b["bits_per_byte"]]
    if gap > 0 and reached:
        share = reached[0]["flops"] / b["flops"]
        words += f" Growth reached the other's final value at {share:.0%} of the FLOPs."
    return words


def plot(runs, file):
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    phases = {"small": ("small model", ":"), "operator": ("operator", "--"), "large": ("large model", "-")}
    for ax, key, label in zip(axes, ("flops", "seconds"), ("training FLOPs", "training seconds"), strict=True):
        for color, run in zip(("#c44e52", "#4c72b0", "#55a868", "#8172b3"), runs, strict=False):
            for phase, points in itertools.groupby(_joined(run.points), key=lambda p: p["phase"]):
                x, y = zip(*((p[key], p["bits_per_byte"]) for p in points), strict=True)
                name, style = phases[phase]
                ax.plot(x, y, style, color=color, marker="o", markersize=3, label=f"{run.name}: {name}")
            if run.points:
                ax.annotate(f" {y[-1]:.2f}", (x[-1], y[-1]), color=color, va="center")
        ax.set_xlabel(label)
        ax.margins(x=0.08)
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    # Where every run starts, near 8 bits, is of no interest: the picture is of the last part of the way.
    last = [run.points[-1]["bits_per_byte"] for run in runs if run.points]
    if last:
        axes[0].set_ylim(0.95 * min(last), 1.6 * max(last))
    axes[0].set_ylabel("validation bits per byte")
    axes[1].legend(frameon=False)
    sizes = (f"{size['n_layer']} layers x {size['n_embd']}" for size in (SMALL, LARGE))
    figure.suptitle(f"GPT-2 on bytes: {' grown to '.join(sizes)}", fontsize=11)
    figure.savefig(file, dpi=150, format="png")


def _joined(points):
    """Each phase starts where the one before ended, so that the drawn line has no gaps."""
    for before, point in zip([None, *points], points, strict=False):
        if before is not None and before["phase"] != point["phase"]:
            yield {**before, "phase": point["phase"]}
        yield point


def _replace(file, write):
    partial = file.with_name(file.name + ".partial")
    write(partial)
    os.replace(partial, file)
