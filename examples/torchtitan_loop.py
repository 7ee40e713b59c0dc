"""torchtitan's container of optimizers, as its Trainer builds and steps it: python examples/torchtitan_loop.py"""

import tiny
from torch.nn.functional import cross_entropy
from torchtitan.components.optimizer import ParamGroupConfig

import growkit
from growkit.integrations.torchtitan import SophiaContainer


def group(pattern, weight_decay):
    options = growkit.presets["short-run"] | {"weight_decay": weight_decay}
    return ParamGroupConfig(pattern=pattern, optimizer_name="SophiaG", optimizer_kwargs=options)


def main(steps=30):
    model = tiny.new_model()
    groups = [group("norm|embed_tokens", 0.0), group(".*", 0.1)]
    config = SophiaContainer.Config(implementation="for-loop", every=5, param_groups=groups)
    optimizers = SophiaContainer(config, model_parts=[model])
    for batch in tiny.batches(steps):
        logits = model(batch["input_ids"]).logits[:, :-1]
        cross_entropy(logits.float().flatten(0, 1), batch["labels"][:, 1:].flatten()).backward()
        optimizers.step()
        optimizers.zero_grad()
    print(f"torchtitan: loss {tiny.loss_of(model):.4f}, {optimizers.metrics()}")
    return model


if __name__ == "__main__":
    main()
