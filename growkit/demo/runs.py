"""What the demo trains: models, what they cost, and the runs. Each run is one process's work, on one thread.

Everything is a byte-level language model (256 tokens), so results are bits per byte of held-out text.
"""

import io
import math
import os
import shutil
import time
import traceback

import torch
import transformers

import growkit
from growkit.demo.settings import read_text

MARKS = 8  # points of a curve; one on all of the held-out text costs as much as twenty steps
TELL = 0.5  # seconds between two words of a run to the parent


class Corpus:
    """Bytes split in two: the first nine tenths to train on, the windows of the last tenth to validate on."""

    def __init__(self, text, settings, device):
        data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().to(device)
        split, self.batch_size = len(data) * 9 // 10, settings.batch
        self.train, held_out = data[:split], data[split:]
        self.window = torch.arange(settings.context, device=device)
        self.validation = held_out[: len(held_out) // settings.context * settings.context].view(-1, settings.context)

    def batch(self, seed, step):
        """{"input_ids", "labels"}, [batch, context]: the same for the same seed and step."""
        generator = torch.Generator().manual_seed(1_000_003 * seed + step)
        starts = torch.randint(len(self.train) - len(self.window), (self.batch_size, 1), generator=generator)
        if self.window.is_cuda:  # from other memory a copy would wait for all that is queued
            starts = starts.pin_memory()
        tokens = self.train[starts.to(self.window.device, non_blocking=True) + self.window]
        return {"input_ids": tokens, "labels": tokens}


@torch.no_grad()
def bits_per_byte(model, corpus):
    was_training = model.training
    model.eval()
    total = sum(len(w) * float(model(input_ids=w, labels=w).loss) for w in corpus.validation.split(256))
    model.train(was_training)
    return total / len(corpus.validation) / math.log(2)


def config(size, context):
    return transformers.GPT2Config(
        **size,
        vocab_size=256,
        n_positions=context,
        bos_token_id=None,
        eos_token_id=None,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        activation_function="gelu_pytorch_tanh",  # GPT-2's own, as one operator: a tenth of the time on a CPU
        use_cache=False,
    )


def step_flops(model, batch):
    """FLOPs of one forward and backward of a batch: 6 per weight and token, and 12*L*d*T per token for attention.

    Weights are those of matrix products: position embeddings do not count, token embeddings count once, as the head.
    """
    c = model.config
    weights = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "wpe" not in name)
    return batch * c.n_positions * (6 * weights + 12 * c.n_layer * c.n_embd * c.n_positions)


def refreshes(optimizer):
    """How many more forward and backward passes the curvature has cost so far."""
    return int(optimizer.param_groups[0].get("refreshes", 0))


def steps_for(flops, cost, every=None):
    """The most steps of `cost` within `flops`, at least one; `every`: with a refresh after steps 1, 1 + every, ..."""
    passes = int(flops / cost)
    return max(1, passes - math.ceil(passes / (every + 1)) if every else passes)


class Run:
    """One run: what it has cost so far, everything counted, and its curve.

    seconds are CPU seconds of training, validation left out: they mean the same beside other jobs. tell(share, run) is
    called twice a second with the share of this run that is done.
    """

    def __init__(self, settings, corpus, seed, device, tell=lambda share, run: None):
        self.settings, self.corpus, self.seed, self.device, self.tell = settings, corpus, seed, device, tell
        self.flops, self.seconds, self.steps, self.points, self.facts = 0.0, 0.0, 0, [], {}
        self._told = 0.0

    def new_model(self, size):
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            model = transformers.GPT2LMHeadModel(config(size, self.settings.context))
        return model.to(self.device).train()

    def sophia(self, model):
        preset = growkit.presets[self.settings.sophia]
        optimizer = growkit.SophiaG(growkit.param_groups(model, preset["weight_decay"]), seed=self.seed, **preset)
        optimizer.attach(model, every=self.settings.refresh_every)
        return optimizer

    def adamw(self, model, rate):
        s = self.settings
        groups = growkit.param_groups(model, s.weight_decay)
        return torch.optim.AdamW(groups, lr=s.rates[rate], betas=s.betas, fused=True)  # a tenth of the time on a CPU

    def steps_left(self, model, optimizer=None):
        """Steps of `model` that what is left of the FLOPs pays for, refreshes of a SophiaG included."""
        s = self.settings
        every = s.refresh_every if isinstance(optimizer, growkit.SophiaG) else None
        return steps_for(s.flops - self.flops, step_flops(model, s.batch), every)

    def mark(self, model, phase):
        point = {"phase": phase, "flops": self.flops, "seconds": self.seconds, "steps": self.steps}
        self.points.append(point | {"bits_per_byte": bits_per_byte(model, self.corpus)})
        self.facts["parameters"] = sum(p.numel() for p in model.parameters())

    def warmup(self, steps):
        """Steps of a schedule over `steps` after which the learning rate is whole."""
        return min(self.settings.warmup, max(1, steps // 10))

    def decay(self, step, steps):
        """The share of the learning rate that is left at a step: constant (1 or more), at the end in a line to 0."""
        return (steps - step) / (self.settings.decay * steps)

    def backward(self, model):
        """Leave the gradients of the next batch in the parameters."""
        model(**self.corpus.batch(self.seed, self.steps)).loss.backward()

    def train(self, model, optimizer, phase, last, *, first=0, steps=None):
        """Steps `first` to `last` of a schedule over `steps`: the rate goes up in warm-up, then as `decay` has it."""
        s, steps = self.settings, steps or last
        cost, between = step_flops(model, s.batch), max(1, steps // MARKS)
        rates = [group["lr"] for group in optimizer.param_groups]
        if not self.points:
            self.mark(model, phase)
        for step in range(first, last):
            start, before = time.process_time(), refreshes(optimizer)
            share = min(1.0, (step + 1) / self.warmup(steps), self.decay(step, steps))
            for group, lr in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = lr * share
            self.backward(model)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            self.seconds += time.process_time() - start
            self.flops += cost * (1 + refreshes(optimizer) - before)
            self.steps += 1
            if (step + 1) % between == 0 or step + 1 == last:
                self.mark(model, phase)
            if time.monotonic() - self._told > TELL or step + 1 == last:
                self._told = time.monotonic()
                self.tell((step + 1 - first) / (last - first), self)
        for group, lr in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = lr
        if isinstance(optimizer, growkit.SophiaG):
            stats = optimizer.stats()
            self.facts |= {name: stats[name] for name in ("refreshes", "skipped", "unclipped")}

    def result(self):
        cost = {"flops": self.flops, "cpu_seconds": self.seconds, "steps": self.steps}
        return {**self.facts, **cost, "bits_per_byte": self.points[-1]["bits_per_byte"], "points": self.points}


# --- the runs: (run, folder, what the run before left) -> its result, with "left" for those that go on from there -----


def small(run, folder, _):
    """The small model, at a constant rate: it is not finished but grown, or trained on."""
    model = run.new_model(run.settings.small)
    optimizer = run.adamw(model, "small")
    steps = run.steps_left(model)
    run.train(model, optimizer, "small", min(run.settings.small_steps, steps), steps=steps)
    save(model, folder / "small")
    left = io.BytesIO()  # bytes, for the parent has no torch to receive tensors with
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "run": run.result()}, left)
    return run.result() | {"left": left.getvalue()}


def _go_on(run, left):
    """The small model as `small` left it, and the state of its optimizer; the run has cost what that one had."""
    left = torch.load(io.BytesIO(left), map_location=run.device)
    done = left["run"]
    run.flops, run.seconds, run.steps, run.points = (done[k] for k in ("flops", "cpu_seconds", "steps", "points"))
    model = run.new_model(run.settings.small)
    model.load_state_dict(left["model"])
    return model, left["optimizer"]


def never_grown(run, folder, left):
    model, state = _go_on(run, left)
    optimizer = run.adamw(model, "small")
    optimizer.load_state_dict(state)
    total = run.steps + run.steps_left(model)
    run.train(model, optimizer, "small", total, first=run.steps, steps=total)
    return run.result()


def grown(run, folder, left):
    large = _grow(run, left)
    run.train(large, run.adamw(large, "grown"), "large", run.steps_left(large))
    save(large, folder / "grown")
    return run.result()


def sophia_grown(run, folder, left):
    large = _grow(run, left)
    optimizer = run.sophia(large)
    run.train(large, optimizer, "large", run.steps_left(large, optimizer))
    return run.result()


def _grow(run, left):
    """The small model grown without loss, and a few steps of the operator that grows it."""
    s = run.settings
    model, _ = _go_on(run, left)
    start = time.process_time()
    operator = growkit.LiGO(model, config(s.large, s.context), start="lossless", seed=run.seed)
    started = operator.grow().to(run.device)
    run.seconds += time.process_time() - start
    run.mark(started, "operator")
    run.facts["small_flops"], run.facts["after_start"] = run.flops, run.points[-1]["bits_per_byte"]
    start = time.process_time()
    operator.fit((run.corpus.batch(run.seed, run.steps + i) for i in range(s.fit_steps)), steps=s.fit_steps)
    large = operator.grow().to(run.device).train()
    run.seconds += time.process_time() - start
    run.facts["fit_flops"] = s.fit_steps * (step_flops(large, s.batch) + sum(operator.flops_per_expansion))
    run.flops += run.facts["fit_flops"]
    run.steps += s.fit_steps
    run.mark(large, "operator")
    run.facts["after_fit"] = run.points[-1]["bits_per_byte"]
    return large


def scratch(run, folder, _):
    model = run.new_model(run.settings.large)
    run.train(model, run.adamw(model, "scratch"), "large", run.steps_left(model))
    return run.result()


def sophia_scratch(run, folder, _):
    model = run.new_model(run.settings.large)
    optimizer = run.sophia(model)
    run.train(model, optimizer, "large", run.steps_left(model, optimizer))
    return run.result()


def middle(run, folder, _):
    model = run.new_model(run.settings.middle)
    run.train(model, run.adamw(model, "middle"), "middle", run.steps_left(model))
    return run.result()


def save(model, folder):
    """Save the checkpoint, load it back, and check that nothing is missing and that it computes the same."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    loaded, info = type(model).from_pretrained(partial, output_loading_info=True)
    wrong = {k: v for k, v in info.items() if v}
    tokens = torch.arange(model.config.n_positions, device=model.device)[None]
    was_training = model.training
    with torch.no_grad():
        same = torch.equal(loaded.to(model.device).eval()(tokens).logits, model.eval()(tokens).logits)
    model.train(was_training)
    if wrong or not same:
        raise RuntimeError(f"the saved checkpoint does not load back: {wrong or 'other logits'}")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


RUNS = {run.__name__: run for run in (small, never_grown, grown, scratch, middle, sophia_grown, sophia_scratch)}


def serve(pipe, settings, data, seed, device, folder):
    """What a process of the demo does: receive (name, left), train that run, send how it goes; until the pipe closes.

    Sends ("told", (share, bits per byte)) on the way, then ("done", result) or ("failed", traceback).
    """
    torch.set_num_threads(1)  # models this small lose time to threads that wait for each other
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    corpus = Corpus(read_text(data)[1], settings, device)

    def tell(share, run):
        pipe.send(("told", (share, run.points[-1]["bits_per_byte"])))

    while True:
        try:
            name, left = pipe.recv()
            try:
                done = "done", RUNS[name](Run(settings, corpus, seed, device, tell), folder, left) | {"device": device}
            except (BrokenPipeError, EOFError):
                raise
            except Exception:
                done = "failed", traceback.format_exc()
            pipe.send(done)
        except (BrokenPipeError, EOFError):  # the parent is gone, and with it what this is for
            return
