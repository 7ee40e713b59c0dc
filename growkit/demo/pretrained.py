"""`growkit demo --pretrained FOLDER`: a checkpoint of the user's own, grown, compared with itself, and trained on."""

import json
import time

import torch
import transformers
from rich.console import Console

import growkit
from growkit.demo.settings import read_text
from growkit.growth import recipe
from growkit.growth.checkpoint import open_checkpoint
from growkit.text import doubts

BATCH, CONTEXT, STEPS, VALIDATION_WINDOWS = 4, 128, 40, 32
TIMES = 2  # as many parameters as the small model
SOPHIA = {"lr": 1e-4, "rho": 0.05, "betas": (0.9, 0.99)}  # careful: what was learned is to be kept
LINE_EVERY = 20  # seconds


def run(*, folder, data, device, seed, out, steps_scale):
    """Grow the checkpoint to about twice its parameters into out/grown, train that on the text, save out/trained.

    The exit code is 0, 2 for a checkpoint or a text that cannot be used, 130 if interrupted.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    console = Console(highlight=False, soft_wrap=True)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        checkpoint = open_checkpoint(folder)
        small = checkpoint.model().to(device)
        windows = _windows(checkpoint, *read_text(data))
        count = sum(p.numel() for p in small.parameters())
        plan = recipe.plan(recipe.Recipe(str(folder), params=str(TIMES * count), seed=seed))
        sizes = ", ".join(f"{name} {a} to {b}" for name, (a, b) in plan.sizes.items())
        console.print(f"{checkpoint.model_class.__name__}: {sizes}; parameters {count:,} to {plan.parameters[1]:,}")
        held_out, windows = windows[-VALIDATION_WINDOWS:].to(device), windows[:-VALIDATION_WINDOWS]
        before = _loss(small, held_out)
        measured = recipe.run(plan, out / "grown", force=True)
        large = checkpoint.model_class.from_pretrained(out / "grown", local_files_only=True).to(device)
        start = _loss(large, held_out)
        change = measured["relative_output_change"]
        console.print(
            f"grown into {out / 'grown'}: logits change by {change:.1e} of the largest, measured on both files"
        )
        console.print(f"loss on {len(held_out)} held-out windows: small {before:.4f}, grown {start:.4f}")
        after = _train(large, windows, held_out, max(1, round(STEPS * steps_scale)), seed, console)
        large.save_pretrained(out / "trained")
    except ValueError as error:
        console.print(f"growkit demo: {error}", markup=False)
        return 2
    except KeyboardInterrupt:
        kept = f"{out / 'grown'} is complete" if (out / "grown").exists() else "nothing had finished"
        console.print(f"\ninterrupted: {kept}")
        return 130
    final = {"small": before, "grown_start": start, "grown": after, "logit_change": change}
    (out / "results.json").write_text(json.dumps({"pretrained": str(folder), "final": final}, indent=1) + "\n")
    console.print(f"trained on: {after:.4f}, by {start - after:+.4f}; written to {out}: results.json, grown/, trained/")
    return 0


def _windows(checkpoint, name, text):
    """[windows, tokens]: by the checkpoint's tokenizer, or bytes for a model of bytes. ValueError for too few."""
    if doubt := doubts(text):
        raise ValueError(f"--data {name} is no text: {doubt}")
    if any("tokenizer" in path.name or "vocab" in path.name for path in checkpoint.companions):
        tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint.folder, local_files_only=True)
        tokens = torch.tensor(tokenizer(text.decode(errors="replace"), verbose=False).input_ids)
    elif checkpoint.config.vocab_size == 256:
        tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    else:
        raise ValueError(f"{checkpoint.folder}: has no tokenizer, expected one, or a vocabulary of 256, of bytes")
    length = min(CONTEXT, getattr(checkpoint.config, "max_position_embeddings", CONTEXT))
    count = len(tokens) // length
    if count < VALIDATION_WINDOWS + BATCH:
        needed = (VALIDATION_WINDOWS + BATCH) * length
        raise ValueError(f"--data {name}: {len(tokens)} tokens, expected at least {needed}")
    return tokens[: count * length].view(count, length)


@torch.no_grad()
def _loss(model, windows):
    model.eval()
    return sum(float(model(input_ids=w, labels=w).loss) * len(w) for w in windows.split(BATCH)) / len(windows)


def _train(model, windows, held_out, steps, seed, console):
    model.train()
    optimizer = growkit.SophiaG(growkit.param_groups(model, 0.1), seed=seed, **SOPHIA)
    optimizer.attach(model, every=10)
    draw = torch.Generator().manual_seed(seed)
    started = line = time.monotonic()
    for step in range(1, steps + 1):
        chosen = windows[torch.randint(len(windows), (BATCH,), generator=draw)].to(held_out.device)
        loss = model(input_ids=chosen, labels=chosen).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        now = time.monotonic()
        if now - line >= LINE_EVERY:
            line, left = now, (now - started) * (steps - step) / step
            console.print(
                f"{now - started:4.0f} s: step {step} of {steps}, loss {loss.detach():.3f}; {left:.0f} s left"
            )
    return _loss(model, held_out)
