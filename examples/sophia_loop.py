"""A training loop of one's own: growkit.SophiaG in place of torch.optim.AdamW, and one line more.

python examples/sophia_loop.py
"""

import tiny

import growkit


def main(steps=30):
    model = tiny.new_model()
    optimizer = growkit.SophiaG(growkit.param_groups(model, 0.1), **growkit.presets["short-run"])
    optimizer.attach(model, every=5)
    for batch in tiny.batches(steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"a loop of one's own: loss {tiny.loss_of(model):.4f}, {optimizer.metrics()}")
    return model


if __name__ == "__main__":
    main()
