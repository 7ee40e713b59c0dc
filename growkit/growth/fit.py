"""Learning the operators of a LiGO on the large model's own loss."""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import nn

from growkit.growth.batches import inputs_of, label_count, taken


def fit(
    self,
    batches: Iterable[Any],
    steps: int = 100,
    lr: float = 1e-3,
    warmup: float = 0.1,
    loss: Callable[[nn.Module, Any], Any] | None = None,
    accumulate: int = 1,
    progress: Callable[[int, float], None] | None = None,
    *,
    optimizer: Literal["adamw", "sophiag"] = "adamw",
    mask_token: int | None = None,
    mask_rate: float = 0.15,
    state: dict[str, Any] | None = None,
) -> list[float]:
    """Learn the operators on the large model's own loss; the small weights stay as they are. Returns the losses.

    batches: iterable of model inputs: mappings with labels, (inputs, labels) as a DataLoader gives them, or inputs
        alone: of causal LMs (labels = tokens) and, with mask_token, of masked LMs. steps * accumulate are taken.
    loss: loss(model, batch) -> scalar, or (scalar, number of labels it is the mean of); default the model's own. It is
        in train or eval mode as this module is.
    lr: peak; linear warm-up over `warmup` * steps, then linear decay. No weight decay, gradients clipped at norm 1.
    accumulate: micro-batches per step; each counts by its number of labels. One expansion per step however many.
    progress: called with (step, loss) after each step.
    mask_token, mask_rate: id of the token that hides others, and the share of tokens that a masked LM predicts.
    state: a dict that this fills after each step. Saved together with `state_dict()` and given again, with the same
        arguments and batches, it goes on where it stopped.

    Dropout, masks and sampled labels are drawn from `seed`. FloatingPointError where a loss or its gradient is not
    finite, ValueError where batches run out; the operator is then as before that step, or as before the fit.
    """
    if steps < 1 or accumulate < 1:
        raise ValueError(f"steps, accumulate: got {steps}, {accumulate}, expected at least 1")
    if not lr > 0 or not 0 <= warmup <= 1:
        raise ValueError(f"lr, warmup: got {lr}, {warmup}, expected lr > 0 and warmup within [0, 1]")
    if not 0 < mask_rate <= 1:
        raise ValueError(f"mask_rate: got {mask_rate}, expected it within (0, 1]")
    feed = taken(batches, steps * accumulate, accumulate)
    update = _optimizer(optimizer, self.parameters(), lr)
    rise = max(1, math.ceil(warmup * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        update, lambda step: min(1.0, (step + 1) / rise, (steps - step) / max(1, steps - rise))
    )
    state = {} if state is None else state
    losses = list(state.get("losses", []))
    if losses:
        update.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
    before = {name: value.clone() for name, value in self.state_dict().items()}, dict(state)
    model = self.skeleton().train(self.training)
    run = _Step(self, model, loss, mask_token, mask_rate)
    for _ in range(len(losses) * accumulate):
        next(feed)
    for step in range(len(losses), steps):
        try:
            micro = [next(feed) for _ in range(accumulate)]
        except ValueError:
            self.load_state_dict(before[0])
            state.clear()
            state.update(before[1])
            raise
        try:
            losses.append(run(micro, step))
            update.step()
        finally:
            update.zero_grad()
        schedule.step()
        state.update(losses=list(losses), optimizer=update.state_dict(), schedule=schedule.state_dict())
        if progress:
            progress(step, losses[-1])
    return losses


def _optimizer(name, parameters, lr):
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    raise ValueError(f"optimizer: got {name!r}, expected 'adamw' or 'sophiag'")


class _Step:
    """Gradients of one step: expand once, run the micro-batches through the large model, back into the operators."""

    def __init__(self, operator, model, loss, mask_token, mask_rate):
        self.operator, self.model, self.loss = operator, model, loss
        self.masks = (mask_token, mask_rate)
        self.parameters = dict(model.named_parameters())
        self.devices = [model.device] if model.device.type == "cuda" else []

    def __call__(self, batches, step):
        weights = self.operator.expand()
        for name, parameter in self.parameters.items():  # leaves: the graph of the model ends here
            parameter.data = weights[name].detach().to(parameter.dtype)
            parameter.grad = None
        seeds = range(self.operator.seed + step * len(batches), self.operator.seed + (step + 1) * len(batches))
        if self.loss is None:
            batches = [
                inputs_of(self.model, batch, *self.masks, seed) for batch, seed in zip(batches, seeds, strict=True)
            ]
            counts = [label_count(self.model, batch) for batch in batches]
        else:
            counts = [None] * len(batches)
        return self._backward(batches, counts, seeds, step, weights)

    def _backward(self, batches, counts, seeds, step, weights):
        values, total = [], 0.0
        if counts[0] is not None and not sum(counts):
            raise FloatingPointError(f"loss: the batches of step {step} have no label that it could be the mean of")
        for batch, count, seed in zip(batches, counts, seeds, strict=True):
            if count == 0:
                continue
            with torch.random.fork_rng(self.devices):
                torch.manual_seed(seed)
                value, count = self._loss(batch, count)
                if not bool(value.isfinite()):
                    raise FloatingPointError(f"loss: got {float(value)} in step {step}; the operator is as before it")
                (value * count).backward()
            values.append(value.detach() * count)
            total += count
        grown = [n for n, p in self.parameters.items() if p.grad is not None and weights[n].requires_grad]
        torch.autograd.backward(
            [weights[name] for name in grown],
            [(self.parameters[name].grad / total).to(weights[name].dtype) for name in grown],
        )
        norm = nn.utils.clip_grad_norm_(self.operator.parameters(), 1.0)
        if not bool(norm.isfinite()):
            raise FloatingPointError(f"loss: its gradient is not finite in step {step}; the operator is as before it")
        return float(sum(values) / total)

    def _loss(self, batch, count):
        if self.loss is not None:
            value = self.loss(self.model, batch)
            return value if isinstance(value, tuple) else (value, 1)
        value = self.model(**batch).loss
        if value is None:
            raise ValueError("batches: the model returned no loss; expected 'labels' in every batch, or pass loss=")
        return value, count
