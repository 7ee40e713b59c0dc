"""Is it Sophia, or is it us? A small model of the demo's text under the official loop, op by op, and under growkit.

Three runs from the same weights on the same batches: the op sequence of the official SophiaG (Liu et al.,
arXiv:2305.14342) in the official loop; growkit.SophiaG in the same loop; growkit.SophiaG with attach(). The first two
must agree to the bit. The third draws its own labels, on the last training batch, does not clip their gradient and
refreshes after steps 1, 11, ... rather than 10, 20, ...: it may differ by chance, not by kind.

    python benchmarks/official_loop.py [steps]
"""

import sys

import torch
from torch.nn.functional import cross_entropy

import growkit
from growkit.bench.sophia import OfficialSophia
from growkit.demo import runs
from growkit.demo.settings import Settings, read_text

SETTINGS = Settings(context=128, batch=12, small={"n_layer": 3, "n_embd": 96, "n_head": 6})
SOPHIA = {"lr": 1e-3, "betas": (0.7, 0.99), "rho": 0.2, "weight_decay": 0.1}
EVERY = 10
BS = SETTINGS.batch * (SETTINGS.context - 1)


def start(seed):
    """A run of the small model: its text and batches, the model, its groups of parameters."""
    run = runs.Run(SETTINGS, runs.Corpus(read_text()[1], SETTINGS, "cpu"), seed, "cpu")
    model = run.new_model(SETTINGS.small)
    return run, model, growkit.param_groups(model, weight_decay=0.1)


def sampled_loss(model, batch, generator):
    """The official curvature loss: the mean NLL of labels drawn from the model itself."""
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1)
    labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
    return cross_entropy(logits, labels)


def official_loop(optimizer, model, run, steps):
    """The official script's loop: refresh after steps 10, 20, ... on a fresh batch, all gradients clipped at 1."""
    generator = torch.Generator().manual_seed(0)
    for step in range(1, steps + 1):
        model(**run.corpus.batch(0, step)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(bs=BS)
        optimizer.zero_grad()
        if step % EVERY == 0:
            sampled_loss(model, run.corpus.batch(0, steps + step), generator).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.update_hessian()
            optimizer.zero_grad()


def attached_loop(optimizer, model, run, steps):
    optimizer.attach(model, every=EVERY)
    for step in range(1, steps + 1):
        model(**run.corpus.batch(0, step)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def main(steps):
    models = {}
    for name, optimizer, loop in (
        ("official operations, official loop", OfficialSophia, official_loop),
        ("growkit.SophiaG, official loop", growkit.SophiaG, official_loop),
        ("growkit.SophiaG, attach()", growkit.SophiaG, attached_loop),
    ):
        run, models[name], groups = start(0)
        loop(optimizer(groups, **SOPHIA), models[name], run, steps)
        bits = runs.bits_per_byte(models[name], run.corpus)
        print(f"{name:36} {bits:.6f} bits per byte after {steps} steps", flush=True)
    official, ours, _ = (list(model.parameters()) for model in models.values())
    equal = all(torch.equal(a, b) for a, b in zip(official, ours, strict=True))
    print("first two: every parameter equal bit for bit" if equal else "first two: PARAMETERS DIFFER")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 300))
