"""One run: from a config, a dict, to a record of what came out, a dict too. The loop is the demo's.

    {"seed": 0, "batch": 16, "context": 32, "stages": [STAGE, ...]}

A stage trains one model: {"size": "2x64", "optimizer": "adamw", "lr": 4e-3, "beta1": 0.9, ...} with, for its end,
"steps" (of this stage) or "flops" (of the whole run, everything counted), "warmup" in steps and "decay", the share at
whose end the learning rate is 0 (0: constant); "cosine", in its place: the share of the rate at which a cosine from the
end of warm-up ends. With "look" and "fall", a constant stage ends earlier: at the first multiple of "look" steps where
its training loss falls by less than this share as its steps double. All but the first stage grow the model of the one
before: "start" is a start of `growkit.LiGO`, "fit" its steps, "carry" whether the optimizer's state is grown too.

With "device": "cuda" a run is on a GPU, with products in bfloat16 and CUDA graphs; "head": the dimensions of a head.
"""

import functools
import hashlib
import importlib.util
import math
import statistics
import sysconfig
import time
from pathlib import Path

import torch
import transformers

import growkit
from benchmarks.evidence import optimizers
from growkit.demo import runs as demo
from growkit.demo.settings import Settings

HEAD = 16  # dimensions of a head, where a config does not say
MARKED, VALIDATED = 256, 2048  # windows of held-out text that a point of a curve is measured on, and the end
CHUNKS = 8  # points of a curve
EXAMPLES = Path(__file__).parents[2] / "examples"
LEFT_OUT = {"test", "tests", "site-packages", "idlelib", "lib2to3", "ensurepip"}
OPTIONS = ("lr", "beta1", "beta2", "rho", "weight_decay", "every", "other_lr", "eps")


@functools.cache
def text():
    """The source of Python's library without its tests, files in the order of a hash of their names.

    The last tenth, which validates, is so a sample of all of them.
    """
    library = Path(sysconfig.get_path("stdlib"))
    files = {file.relative_to(library): file for file in library.rglob("*.py")}
    names = [name for name in files if not LEFT_OUT & set(name.parts)]
    names.sort(key=lambda name: hashlib.sha256(name.as_posix().encode()).digest())
    return b"\n".join(files[name].read_bytes() for name in names)


@functools.cache
def corpus(context, batch, device="cpu"):
    """The demo's, and the windows that the end of a run is measured on: evenly spread over the held-out tenth.

    Of less than twice as many windows, it is the first ones.
    """
    made = demo.Corpus(text(), Settings(context=context, batch=batch), device)
    held_out = made.validation
    made.validation = held_out[:: len(held_out) // MARKED][:MARKED]
    return made, held_out[:: len(held_out) // VALIDATED][:VALIDATED]


def shape(size, head=HEAD):
    """GPT-2's fields of "LAYERSxWIDTH" with heads of `head` dimensions."""
    layers, width = map(int, size.split("x"))
    return {"n_layer": layers, "n_embd": width, "n_head": width // head}


class Run(demo.Run):
    """The demo's, whose points tell how far from clipped a Sophia is, and whose learning rate may fall in a cosine."""

    optimizer, cosine = None, None  # cosine: the share of the rate that it ends at

    def mark(self, model, phase):
        super().mark(model, phase)
        if hasattr(self.optimizer, "stats"):
            self.points[-1]["unclipped"] = self.optimizer.stats().get("unclipped")

    def decay(self, step, steps):
        if self.cosine is None:
            return super().decay(step, steps)
        warmup = self.warmup(steps)
        through = max(0, step - warmup) / max(1, steps - warmup)
        return self.cosine + (1 - self.cosine) * (1 + math.cos(math.pi * through)) / 2

    def trained(self, model):
        """What training calls: what an optimizer is attached to."""
        return model

    def bits(self, model):
        return demo.bits_per_byte(model, self.corpus)


class Logits(torch.nn.Module):
    """A language model as a function of tokens alone, which a CUDA graph can hold: (batch, T) to (batch, T, V)."""

    def __init__(self, model, context, device):
        super().__init__()
        self.model = model
        self.register_buffer("mask", torch.ones(1, 1, context, context, dtype=torch.bool, device=device).tril())

    def forward(self, tokens):
        return self.model(input_ids=tokens, attention_mask=self.mask).logits


class MixedRun(Run):
    """Products in bfloat16; on a GPU, forward and backward of a step are CUDA graphs: launching them takes longer."""

    def autocast(self):
        return torch.autocast(self.device, torch.bfloat16, cache_enabled=False)

    def trained(self, model):
        self.logits = Logits(model, self.settings.context, self.device).train()
        if self.device == "cuda":
            with self.autocast():
                torch.cuda.make_graphed_callables(self.logits, (self.corpus.batch(self.seed, 0)["input_ids"],))
        return self.logits

    def backward(self, model):
        tokens = self.corpus.batch(self.seed, self.steps)["input_ids"]
        with self.autocast():
            scores = self.logits(tokens)[:, :-1].flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(scores, tokens[:, 1:].flatten())
        loss.backward()

    def bits(self, model):
        with self.autocast():
            return super().bits(model)

    def mark(self, model, phase):
        with self.autocast():
            super().mark(model, phase)


def settings(config, stage):
    decay = stage["decay"] or 1.0  # a constant stage ends long before its schedule does
    return Settings(context=config["context"], batch=config["batch"], warmup=stage["warmup"], decay=decay)


def lm(config, begun=None):
    """(record, what a longer run with the same first stages goes on from).

    begun: that of `config` without its last stage, or None if it has only one.
    """
    if "device" not in config:
        torch.set_num_threads(1)  # models this small lose time to threads that wait for each other
    transformers.logging.set_verbosity_error()
    device, stage = config.get("device", "cpu"), config["stages"][-1]
    data, validation = corpus(config["context"], config["batch"], device)
    run = (MixedRun if "device" in config else Run)(settings(config, stage), data, config["seed"], device)
    run.cosine = stage.get("cosine")
    large = shape(stage["size"], config.get("head", HEAD))
    if begun is None:
        model, grown_optimizer = run.new_model(large), None
    else:
        run.flops, run.seconds, run.steps = begun["flops"], begun["seconds"], begun["steps"]
        model, grown_optimizer = _grow(run, begun, stage, large)
    options = {name: stage[name] for name in OPTIONS if name in stage}
    run.optimizer = optimizer = optimizers.make(run.trained(model), stage["optimizer"], seed=config["seed"], **options)
    if stage.get("carry"):
        optimizer.load_state_dict(grown_optimizer | {"param_groups": optimizer.state_dict()["param_groups"]})
    _train(run, model, optimizer, stage)
    run.corpus = Validated(data, validation)
    bits = run.bits(model)
    record = {
        "config": config,
        "bits": bits if math.isfinite(bits) else None,
        "flops": run.flops,
        "steps": run.steps,
        "seconds": run.seconds,
        "points": [
            [point[key] for key in ("flops", "steps", "bits_per_byte")] + [point.get("unclipped")]
            for point in run.points
        ],
        **run.facts,
    }
    left = {"model": model, "optimizer": optimizer, "flops": run.flops, "seconds": run.seconds, "steps": run.steps}
    return record, left


class Validated:
    """What `bits_per_byte` reads of a corpus."""

    def __init__(self, data, validation):
        self.batch, self.validation = data.batch, validation


def _grow(run, begun, stage, size):
    """The large model of `begun`'s, its map fitted, and the grown state of its optimizer or None."""
    before, start = begun["model"], time.process_time()
    operator = growkit.LiGO(before, demo.config(size, run.settings.context), start=stage["start"], seed=run.seed)
    large, steps = operator.grow(), stage.get("fit", 0)
    run.facts |= {"small_flops": run.flops, "small_steps": run.steps}
    run.facts["small_bits"] = run.bits(before)
    run.facts["start_bits"] = run.bits(large)
    if steps:
        feed = (run.corpus.batch(run.seed, run.steps + i) for i in range(steps))
        operator.fit(feed, steps=steps, lr=stage.get("fit_lr", 1e-3))
        large = operator.grow()
        run.facts["fit_flops"] = steps * (
            demo.step_flops(large, run.settings.batch) + sum(operator.flops_per_expansion)
        )
        run.facts["fit_bits"] = run.bits(large)
        run.flops += run.facts["fit_flops"]
        run.steps += steps
    state = operator.grow_optimizer(begun["optimizer"], large).state_dict() if stage.get("carry") else None
    run.seconds += time.process_time() - start
    return large.train(), state


def _train(run, model, optimizer, stage):
    if "steps" in stage:
        steps = stage["steps"]
    else:
        every = stage.get("every", 10) if stage["optimizer"] in optimizers.SOPHIAS else None
        steps = demo.steps_for(stage["flops"] - run.flops, demo.step_flops(model, run.settings.batch), every)
    if stage["decay"]:
        run.train(model, optimizer, stage["size"], steps)
        return
    if "fall" in stage:
        run.facts["falls"] = _train_until(run, model, optimizer, stage, steps)
        return
    marks = sorted({round(steps * (i + 1) / CHUNKS) for i in range(CHUNKS)} - {0})
    for first, last in zip([0, *marks], marks, strict=False):
        run.train(model, optimizer, stage["size"], last, first=first, steps=10**9)


def _train_until(run, model, optimizer, stage, steps):
    """Train at a constant rate up to the first look that finds a `fall` below the stage's: [[steps, fall], ...]."""
    losses, falls, look = [], [], stage["look"]
    hook = model.register_forward_hook(lambda _, __, out: losses.append(out.loss.item()) if model.training else None)
    for last in range(look, steps + 1, look):
        run.train(model, optimizer, stage["size"], last, first=last - look, steps=10**9)
        falls.append([last, fall(losses)])
        if falls[-1][1] < stage["fall"]:
            break
    hook.remove()
    return falls


def fall(losses):
    """The share by which training loss, at a constant learning rate, has fallen as steps doubled last.

    losses: of each step so far. Their means over the last half of the steps and over the quarter before it.
    """
    half, quarter = len(losses) // 2, len(losses) // 4
    return 1 - statistics.fmean(losses[half:]) / statistics.fmean(losses[quarter:half])


def text_hash():
    return hashlib.sha256(text()).hexdigest()


@functools.cache
def digits():
    """examples/grow_vit.py, which trains and grows a ViT on handwritten digits."""
    spec = importlib.util.spec_from_file_location("grow_vit", EXAMPLES / "grow_vit.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def vit(config, begun=None):
    """(record, None): one arm of the example, with the bits of the held-out labels in place of its error alone."""
    torch.set_num_threads(1)
    d, seed, stage = digits(), config["seed"], config["stages"][-1]
    training, (images, labels) = d.data()
    started, feed = time.process_time(), d.batches(*training, seed)
    small_steps, large_steps, fit = (
        max(2, round(n * config["scale"])) for n in (d.SMALL_STEPS, d.LARGE_STEPS, stage.get("fit", 0))
    )
    small = d.new_model(d.SMALL, seed)
    cost, large_cost = (d.step_flops(each, feed) for each in (small, d.new_model(d.LARGE, seed)))
    budget, spent = small_steps * cost + large_steps * large_cost, 0
    model, each = (small, cost) if stage["arm"] == "never grown" else (d.new_model(d.LARGE, seed), large_cost)
    if "start" in stage:
        d.train(small, feed, small_steps, d.RATES["small"], decay=0.0)
        operator, state = growkit.LiGO(small, d.LARGE, start=stage["start"], seed=seed).train(), {}
        if stage.get("fit"):
            operator.fit(d.batches(*training, seed + 200), fit, state=state)
        model, spent = operator.grow(), small_steps * cost + state.get("plain_steps", 0) * large_cost
    steps = max(1, round((budget - spent) / each))
    d.train(model, d.batches(*training, seed + 100), steps, stage["lr"], decay=stage["decay"])
    with torch.no_grad():
        bits = float(model.eval()(pixel_values=images, labels=labels).loss) / math.log(2)
    record = {"config": config, "bits": bits, "error": d.error(model, images, labels)}
    cost = {"flops": spent + steps * each, "steps": steps, "seconds": time.process_time() - started, "points": []}
    return record | cost, None


TASKS = {"lm": lm, "vit": vit}
