"""Accelerate: attach() as in a loop of one's own, before or after prepare().

python examples/accelerate_loop.py
torchrun --nproc-per-node 2 examples/accelerate_loop.py
"""

import accelerate
import tiny
import torch

import growkit


def main(steps=30, accumulate=1, batch=tiny.BATCH):
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    model = tiny.new_model()
    optimizer = growkit.SophiaG(growkit.param_groups(model, 0.1), **growkit.presets["short-run"])
    optimizer.attach(model, every=5)
    loader = torch.utils.data.DataLoader(tiny.windows(steps * tiny.BATCH), batch_size=batch)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for inputs in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**inputs).loss)
            optimizer.step()
            optimizer.zero_grad()
    metrics = optimizer.optimizer.metrics()  # out of Accelerate's wrapper
    model = accelerator.unwrap_model(model)
    accelerator.print(f"Accelerate: loss {tiny.loss_of(model):.4f}, {metrics}")
    return model


if __name__ == "__main__":
    main()
