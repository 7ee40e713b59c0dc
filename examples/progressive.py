"""Progressive training, no pretrained model: a byte-level Llama that starts at 1 layer x 16 and grows twice on the way.

    python examples/progressive.py [--new-optimizer]

Prints the loss of 256 windows of the text every 100 steps, right before and after each growth, and 1, 2, 5 and 20 steps
later. With --new-optimizer the grown model gets a new AdamW in place of the grown one, at the same learning rate.
"""

import sys

import tiny
import torch

from growkit.growth import Schedule

STAGES = [
    (200, {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}),
    (400, {"num_hidden_layers": 4, "hidden_size": 48, "num_attention_heads": 6, "intermediate_size": 96}),
]


def adamw(model, lr=4e-3):
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)


def told(step, model, note=""):
    size = f"{model.config.num_hidden_layers} x {model.config.hidden_size}"
    print(f"step {step:4}  {size:7} {model.num_parameters():7,} parameters  loss {tiny.loss_of(model, 256):.5f}{note}")


def main(steps=600, stages=STAGES, new_optimizer=False):
    model = tiny.new_model()
    optimizer = adamw(model)
    rate = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps)
    schedule, grown = Schedule(stages), steps
    for step, batch in enumerate(tiny.batches(steps)):
        small = model
        model, optimizer = schedule.step(step, model, optimizer, rate)
        if model is not small:
            grown = step
            told(step, small)
            told(step, model, f"  outputs changed by {schedule.changes[step]:.0e} relative")
            if new_optimizer:
                optimizer = rate.optimizer = adamw(model, rate.get_last_lr()[0])
        elif step % 100 == 0 or step - grown in (1, 2, 5, 20):
            told(step, model)
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
    told(steps, model)
    return model


if __name__ == "__main__":
    main(new_optimizer="--new-optimizer" in sys.argv)
