"""Is it Sophia, or is it us? The demo's small model under the official loop, op by op, and under growkit.

Three runs from the same weights on the same batches: the op sequence of the official SophiaG (Liu et al.,
arXiv:2305.14342) in the official loop; growkit.SophiaG in the same loop; growkit.SophiaG with attach(). The first two
must agree to the bit. The third draws its own labels, on the last training batch, does not clip their gradient and
refreshes after steps 1, 11, ... rather than 10, 20, ...: it may differ by chance, not by kind.

    python examples/official_loop.py [steps]
"""

import itertools
import sys

import torch
from torch.nn.functional import cross_entropy

import growkit
from growkit import demo
from growkit.bench.sophia import OfficialSophia

BS = demo.BATCH * (demo.CONTEXT - 1)


def official_loop(optimizer, model, corpus, steps):
    """The official script's loop: refresh after steps 10, 20, ... on a fresh batch, all gradients clipped at 1."""
    generator = torch.Generator().manual_seed(0)
    fresh = corpus.batches(0, 3)
    for step, batch in zip(range(1, steps + 1), corpus.batches(0), strict=False):
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(bs=BS)
        optimizer.zero_grad()
        if step % demo.REFRESH_EVERY == 0:
            logits = model(input_ids=next(fresh)["input_ids"]).logits[:, :-1].flatten(0, 1)
            labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
            cross_entropy(logits, labels).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.update_hessian()
            optimizer.zero_grad()


def attached_loop(optimizer, model, corpus, steps):
    optimizer.attach(model, every=demo.REFRESH_EVERY)
    for batch in itertools.islice(corpus.batches(0), steps):
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def main(steps):
    corpus = demo.Corpus(demo.read_text()[1], "cpu")
    models = {}
    for name, optimizer, loop in (
        ("official operations, official loop", OfficialSophia, official_loop),
        ("growkit.SophiaG, official loop", growkit.SophiaG, official_loop),
        ("growkit.SophiaG, attach()", growkit.SophiaG, attached_loop),
    ):
        models[name] = model = demo.new_model(demo.SMALL, 0, "cpu")
        loop(optimizer(demo.groups(model), **demo.SOPHIA), model, corpus, steps)
        print(f"{name:36} {demo.bits_per_byte(model, corpus):.6f} bits per byte after {steps} steps", flush=True)
    official, ours, _ = (list(model.parameters()) for model in models.values())
    equal = all(torch.equal(a, b) for a, b in zip(official, ours, strict=True))
    print("first two: every parameter equal bit for bit" if equal else "first two: PARAMETERS DIFFER")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 300))
