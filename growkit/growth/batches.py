"""What `fit` takes as a batch: tensors, pairs of a DataLoader, mappings; which labels it has, and masks of its own."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

IGNORED = -100  # the label that no loss counts


def is_causal(model: nn.Module) -> bool:
    return type(model).__name__.endswith(("ForCausalLM", "LMHeadModel", "DoubleHeadsModel"))


def is_masked(model: nn.Module) -> bool:
    return type(model).__name__.endswith("ForMaskedLM")


def is_masked_image(model: nn.Module) -> bool:
    return type(model).__name__.endswith("ForMaskedImageModeling")


def inputs_of(model: nn.Module, batch: Any, mask_token: int | None, mask_rate: float, seed: int) -> dict[str, Any]:
    """Keyword arguments of the model, on its device, with labels.

    batch: a mapping, as it is; inputs alone, of a causal LM (labels = tokens), or of a masked LM or a model of masked
        images, whose tokens or patches are then masked here; or (inputs, labels).
    """
    bare = not isinstance(batch, Mapping)
    if isinstance(batch, (list, tuple)) and 1 <= len(batch) <= 2 and all(isinstance(x, torch.Tensor) for x in batch):
        names = (getattr(model, "main_input_name", "input_ids"), "labels")
        batch = dict(zip(names, batch, strict=False))
    elif isinstance(batch, torch.Tensor):
        batch = {getattr(model, "main_input_name", "input_ids"): batch}
    elif bare:
        raise ValueError(
            f"batches: got a {type(batch).__name__}, expected a tensor, (inputs, labels) or a mapping of inputs"
        )
    given = {name: x.to(model.device) if isinstance(x, torch.Tensor) else x for name, x in batch.items()}
    tokens, labels = given.get("input_ids"), given.get("labels")
    if is_masked(model) and tokens is not None:
        if labels is None:
            if mask_token is None:
                raise ValueError(
                    "mask_token: got None, expected the id of the token that hides others, or batches with labels"
                )
            given |= _masked(tokens, given.get("attention_mask"), model.config, mask_token, mask_rate, seed)
        elif labels.shape == tokens.shape and bool((labels == tokens).all()):
            raise ValueError("batches: the labels of a masked LM are its unmasked inputs: it would learn to copy them")
    elif is_causal(model) and bare and labels is None:
        given["labels"] = tokens
    elif is_masked_image(model) and "bool_masked_pos" not in given:
        images = given["pixel_values"]
        patches = math.prod(side // model.config.patch_size for side in images.shape[-2:])
        generator = torch.Generator("cpu").manual_seed(seed)
        chance = torch.rand(len(images), patches, generator=generator, device="cpu").to(images.device)
        given = {"pixel_values": images, "bool_masked_pos": chance <= max(mask_rate, float(chance.min()))}
    return given


def _masked(tokens, attention, config, mask_token, rate, seed):
    """BERT's masks: `rate` of the tokens are predicted; of those 80 % are hidden, 10 % random, 10 % as they are."""
    generator = torch.Generator("cpu").manual_seed(seed)
    chance, kind = (torch.rand(tokens.shape, generator=generator, device="cpu").to(tokens.device) for _ in range(2))
    other = torch.randint(config.vocab_size, tokens.shape, generator=generator, device="cpu").to(tokens.device)
    special = [getattr(config, f"{name}_token_id", None) for name in ("pad", "bos", "eos")]
    free = ~torch.isin(tokens, torch.tensor([s for s in special if isinstance(s, int)], device=tokens.device))
    if attention is not None:
        free &= attention.bool()
    chance = chance.masked_fill(~free, 1.0)
    chosen = free & (chance <= max(rate, float(chance.min())))
    hidden = torch.where(kind < 0.8, mask_token, torch.where(kind < 0.9, other, tokens))
    return {"input_ids": torch.where(chosen, hidden, tokens), "labels": tokens.masked_fill(~chosen, IGNORED)}


def label_count(model: nn.Module, inputs: Mapping[str, Any]) -> int:
    """How many labels, or masked patches, the model's own loss is the mean of."""
    if is_masked_image(model):
        return int(inputs["bool_masked_pos"].sum())
    labels = inputs.get("labels")
    if not isinstance(labels, torch.Tensor):
        return max((len(x) for x in inputs.values() if isinstance(x, torch.Tensor) and x.ndim), default=1)
    if is_causal(model):
        labels = labels[..., 1:]
    return int((labels != IGNORED).sum()) if not labels.is_floating_point() else labels.numel()


def taken(batches: Any, count: int) -> Iterator[Any]:
    """The batches of one fit after another; ValueError where their number is known and too small, or they run out."""
    try:
        known = len(batches)
    except TypeError:
        known = None
    if known is not None and known < count:
        raise ValueError(f"batches: ran out after {known}, expected steps * accumulate = {count}")

    def feed():
        number = 0
        for batch in batches:
            yield batch
            number += 1
            if number == count:
                return
        raise ValueError(f"batches: ran out after {number}, expected steps * accumulate = {count}")

    return feed()
