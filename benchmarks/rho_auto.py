"""rho="auto" against fixed values of rho, from good and bad starts: bits per byte of held-out text, over seeds.

    python benchmarks/rho_auto.py [steps] [seeds]

A byte-level Llama of 21,000 parameters, batches of 16 x 32 bytes, lr 1e-3 with warm-up over a tenth and then cosine to
a tenth, betas (0.7, 0.99), refresh every 10 steps, no clipping of gradients.
"""

import math
import pydoc_data.topics
import statistics
import sys

import torch
import transformers

import growkit

FIXED = (0.0004, 0.04, 0.2, 1.0, 4.0)
STARTS = (0.0004, 0.04, 4.0)
CASES = [(rho, None) for rho in FIXED] + [(rho, 0.1) for rho in STARTS]


def data():
    """Windows of 32 bytes of the help texts that every Python has: to train on, held out."""
    topics = pydoc_data.topics.topics
    text = "\n".join(topics[name] for name in sorted(topics)).encode()[: 13_000 * 32]
    rows = torch.tensor(list(text)).view(13_000, 32)
    held_out = torch.arange(len(rows)) % 20 == 0
    return rows[~held_out], rows[held_out]


def new_model(seed):
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**shape, vocab_size=256, tie_word_embeddings=True, use_cache=False)
    return transformers.LlamaForCausalLM(config)


def train(rho, target, seed, steps):
    """(bits per byte, last unclipped fraction, last rho)"""
    rows, held_out = data()
    model, chosen = new_model(seed), torch.Generator().manual_seed(seed)
    options = growkit.presets["short-run"] | {"rho": rho, "target_unclipped": target}
    optimizer = growkit.SophiaG(growkit.param_groups(model, 0.1), **options)
    optimizer.attach(model, every=10)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min((t + 1) / (0.1 * steps), 0.55 + 0.45 * math.cos(math.pi * t / steps))
    )
    for _ in range(steps):
        batch = rows[torch.randint(len(rows), (16,), generator=chosen)]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
    with torch.no_grad():
        bits = float(model(input_ids=held_out, labels=held_out).loss) / math.log(2)
    metrics = optimizer.metrics()
    return bits, metrics["unclipped"], metrics["rho"]


def main(steps=600, seeds=6):
    print(f"| rho | bits per byte, mean of {seeds} seeds (range) | unclipped at the end | rho at the end |")
    print("|---|---|---|---|")
    for rho, target in CASES:
        bits, unclipped, last = zip(*(train(rho, target, seed, steps) for seed in range(seeds)), strict=True)
        name = f"{rho:g}" if target is None else f"auto, from {rho:g}"
        print(
            f"| {name} | {statistics.mean(bits):.3f} ({min(bits):.3f} to {max(bits):.3f}) "
            f"| {statistics.mean(unclipped):.2f} | {statistics.mean(last):.3g} |",
            flush=True,
        )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
