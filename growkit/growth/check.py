"""Whether two models compute the same, measured on inputs made here."""

from collections.abc import Mapping

import torch
from torch import nn

# Relative change of an output that passes for none, by the dtype that the model computes in.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-1}


@torch.no_grad()
def output_change(
    small: nn.Module, big: nn.Module, inputs: Mapping[str, torch.Tensor] | torch.Tensor | None = None, seed: int = 0
) -> float:
    """max |output_big - output_small| / max |output_small|, the largest over all floating point outputs.

    inputs: of both models; by default random tokens or pixels from `seed`, of the small model. Where an output of the
    large model is larger, its first coordinates count: of hidden states the small one's, of logits the old tokens.
    inf where either is not finite. ValueError where no inputs can be made, or no output can be compared.
    """
    if inputs is None:
        inputs = random_inputs(small, seed)
    if isinstance(inputs, torch.Tensor):
        inputs = {getattr(small, "main_input_name", "input_ids"): inputs}
    device = next(small.parameters()).device
    inputs = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
    old, new = (_outputs(model(**inputs)) for model in (small, big))
    changes = []
    for name, a in old.items():
        b = new[name][tuple(slice(n) for n in a.shape)]
        changes.append(float(((b - a).abs().max() / a.abs().max()).nan_to_num(float("inf"))))
    if not changes:
        raise ValueError("inputs: the model gave no floating point output to compare")
    return max(changes)


def random_inputs(model: nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tokens or pixels for a Hugging Face model, drawn from `seed` alone."""
    generator, config = torch.Generator("cpu").manual_seed(seed), model.config
    name = getattr(model, "main_input_name", "input_ids")
    if name == "input_ids" and hasattr(config, "vocab_size"):
        length = min(64, getattr(config, "max_position_embeddings", 64) - 2)  # RoBERTa's positions start at 2
        return {name: torch.randint(config.vocab_size, (1, length), generator=generator, device="cpu")}
    if name == "pixel_values":
        size = (config.image_size,) * 2 if isinstance(config.image_size, int) else tuple(config.image_size)
        shape, dtype = (2, config.num_channels, *size), next(model.parameters()).dtype
        return {name: torch.randn(shape, generator=generator, dtype=dtype, device="cpu")}
    raise ValueError(f"inputs: expected some, as random {name} cannot be made for {type(model).__name__}")


def _outputs(output):
    """Floating point tensors of a model's output by name, hidden states and caches aside."""
    if isinstance(output, torch.Tensor):
        return {"output": output}
    named = output.items() if isinstance(output, Mapping) else enumerate(output)
    return {name: x for name, x in named if isinstance(x, torch.Tensor) and x.is_floating_point()}
