"""A ViT on handwritten digits: trained small, grown, its map fitted, trained on; against from scratch at equal FLOPs.

    pip install 'growkit[hf]' scikit-learn     # which brings the 1,797 images; no download
    python examples/grow_vit.py [--scale 1.0] [--seeds 2]

Every run may cost the same, everything counted: the small model's training, the operator's steps, the large one's. What
is printed is the error on every fourth image, that none is trained on, as the mean over seeds and its range.
"""

import argparse
import time

import torch
from sklearn.datasets import load_digits
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTConfig, ViTForImageClassification

import growkit

SMALL = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 64}
LARGE = {"num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 128}
BATCH, SMALL_STEPS, FIT_STEPS, LARGE_STEPS = 64, 600, 20, 150
# Tried on seed 0: 2e-3 to 1.6e-2, 1e-3 to 8e-3 and 1e-3 to 1.6e-2, each twice the one before.
RATES = {"small": 8e-3, "grown": 2e-3, "scratch": 8e-3}


def data():
    """(training, held out), each images [N, 1, 8, 8] within [0, 1] and labels [N]."""
    digits = load_digits()
    images, labels = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None], torch.tensor(digits.target)
    held = torch.arange(len(labels)) % 4 == 3
    return (images[~held], labels[~held]), (images[held], labels[held])


def batches(images, labels, seed):
    draw = torch.Generator().manual_seed(seed)
    while True:
        rows = torch.randint(len(labels), (BATCH,), generator=draw)
        yield {"pixel_values": images[rows], "labels": labels[rows]}


def new_model(sizes, seed):
    torch.manual_seed(seed)
    return ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=2, num_channels=1, num_labels=10))


def step_flops(model, feed):
    with FlopCounterMode(display=False) as counter:
        model(**next(feed)).loss.backward()
    model.zero_grad()
    return counter.get_total_flops()


def train(model, feed, steps, lr, decay=0.4):
    """AdamW, a tenth of warm-up, then constant, and down to 0 in the last `decay` of the steps."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.05)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(
            1, (step + 1) / (0.1 * steps), (steps - step) / (decay * steps + 1e-9)
        )
        model(**next(feed)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model


@torch.no_grad()
def error(model, images, labels):
    """Percent of images that are named wrong."""
    return 100 * float((model.eval()(pixel_values=images).logits.argmax(-1) != labels).float().mean())


def compare(seed, scale, rates=RATES):
    """run -> (steps of the large or only model, FLOPs, error)"""
    training, held_out = data()
    small_steps, fit_steps, large_steps = (max(2, round(n * scale)) for n in (SMALL_STEPS, FIT_STEPS, LARGE_STEPS))
    feed = batches(*training, seed)
    small, scratch = new_model(SMALL, seed), new_model(LARGE, seed)
    cost, large_cost = step_flops(small, feed), step_flops(scratch, feed)
    begun, budget = small_steps * cost, small_steps * cost + large_steps * large_cost
    train(small, feed, small_steps, rates["small"], decay=0.0)
    found = {"small, when it is grown": (small_steps, begun, error(small, *held_out))}

    def finish(name, model, spent):
        steps = max(1, round((budget - spent) / large_cost))
        train(model, batches(*training, seed + 100), steps, rates["scratch" if model is scratch else "grown"])
        found[name] = steps, spent + steps * large_cost, error(model, *held_out)

    operator, state = growkit.LiGO(small, LARGE, seed=seed), {}
    found["... and right after growth"] = 0, begun, error(operator.grow(), *held_out)
    finish("grown, trained on", operator.grow(), begun)
    operator.train().fit(batches(*training, seed + 200), fit_steps, state=state)
    spent = begun + state["plain_steps"] * large_cost
    found[f"grown, fitted in {fit_steps} steps"] = 0, spent, error(operator.grow(), *held_out)
    finish("grown, fitted, trained on", operator.grow(), spent)
    finish("large from scratch", scratch, 0)
    steps = round(budget / cost)
    alone = train(new_model(SMALL, seed), batches(*training, seed), steps, rates["small"])
    found["small, never grown"] = steps, steps * cost, error(alone, *held_out)
    return found


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="of all numbers of steps")
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    started = time.process_time()
    runs = [compare(seed, options.scale) for seed in range(options.seeds)]
    print("| run | steps | FLOPs | error, % | of the seeds |\n|---|---|---|---|---|")
    for name, (steps, flops, _) in runs[0].items():
        errors = [run[name][2] for run in runs]
        spread = f"{min(errors):.1f} to {max(errors):.1f}"
        print(f"| {name} | {steps} | {flops:.2e} | {sum(errors) / len(errors):.1f} | {spread} |")
    print(f"\n{time.process_time() - started:.0f} s of one CPU core")
    return runs


if __name__ == "__main__":
    main()
