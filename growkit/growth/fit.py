"""Learning the operators of a LiGO on the large model's own loss."""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import distributed, nn
from torch.utils.flop_counter import FlopCounterMode

from growkit.growth.batches import IGNORED, inputs_of, is_causal, label_count, taken
from growkit.growth.build import Shard
from growkit.growth.shards import check_fully_sharded, write
from growkit.growth.worth import doubt, plain_steps
from growkit.optim import SophiaG
from growkit.warn import warn

_REFRESH_EVERY = 10  # steps, of SophiaG's curvature


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
    shard: Shard | None = None,
) -> list[float]:
    """Learn the operators on the large model's own loss; the small weights stay as they are. Returns the losses.

    batches: iterable of model inputs: mappings with labels, (inputs, labels) as a DataLoader gives them, or inputs
        alone: of causal LMs (labels = tokens), of masked images and, with mask_token, of masked LMs. steps * accumulate
        are taken.
    loss: loss(model, batch) -> scalar, or (scalar, number of labels it is the mean of); default the model's own. It is
        in train or eval mode as this module is.
    lr: peak; linear warm-up over `warmup` * steps, then linear decay. No weight decay, gradients clipped at norm 1.
    accumulate: micro-batches per step; each counts by its number of labels. One expansion per step however many.
    progress: called with (step, loss) after each step.
    mask_token, mask_rate: id of the token that hides others, and the share of tokens, or patches, that are predicted.
    state: a dict that this fills after each step. Saved together with `state_dict()` and given again, with the same
        arguments and batches, it goes on where it stopped. state["plain_steps"] is what the steps so far have cost:
        their FLOPs over those of one step that trains the grown model on as many batches.
    optimizer: "sophiag" refreshes its curvature every 10 steps by labels sampled from the logits, and takes no loss=.
    shard: is given the large model with its parameters on the meta device, and calls FSDP2's `fully_shard` on its
        layers and on it. Every rank then keeps shards of weights and gradients, makes or gathers those of one module
        type at a time, and expands twice per step. Without it every rank has the large model.

    Where torch.distributed is set up, every rank gives batches of its own and all take the same step. Dropout, masks
    and sampled labels are drawn from `seed`. FloatingPointError where a loss or its gradient is not
    finite, ValueError where batches run out; the operator is then as before that step, or as before the fit.

    Warns at the end where the losses show no drop beyond their noise. A drop does not show that the fit paid: whether
    plain training would have lowered the loss further for the same FLOPs is not known without doing it, and
    examples/grow_vit.py does it.
    """
    if steps < 1 or accumulate < 1:
        raise ValueError(f"steps, accumulate: got {steps}, {accumulate}, expected at least 1")
    if not lr > 0 or not 0 <= warmup <= 1:
        raise ValueError(f"lr, warmup: got {lr}, {warmup}, expected lr > 0 and warmup within [0, 1]")
    if not 0 < mask_rate <= 1:
        raise ValueError(f"mask_rate: got {mask_rate}, expected it within (0, 1]")
    if optimizer not in ("adamw", "sophiag"):
        raise ValueError(f"optimizer: got {optimizer!r}, expected 'adamw' or 'sophiag'")
    if optimizer == "sophiag" and loss is not None:
        raise ValueError(
            "loss: with optimizer='sophiag' expected None, as labels are sampled from the model's own logits"
        )
    feed = taken(batches, steps * accumulate)
    if optimizer == "adamw":
        update = torch.optim.AdamW(self.parameters(), lr=lr, weight_decay=0.0)
    else:
        update = SophiaG(self.parameters(), lr=lr, weight_decay=0.0, bs=1)
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
    run = (_ShardedStep if shard else _Step)(self, loss, mask_token, mask_rate, state.get("plain_flops"), shard)
    expansion = self.flops_per_expansion
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
            refresh = update if optimizer == "sophiag" and step % _REFRESH_EVERY == 0 else None
            losses.append(run(micro, step, refresh))
            update.step()
        finally:
            update.zero_grad()
        schedule.step()
        refreshes = math.ceil((step + 1) / _REFRESH_EVERY) if optimizer == "sophiag" else 0
        state.update(
            losses=list(losses),
            optimizer=update.state_dict(),
            schedule=schedule.state_dict(),
            plain_flops=run.flops,
            plain_steps=plain_steps(step + 1, run.flops, expansion, refreshes, accumulate),
        )
        if progress:
            progress(step, losses[-1])
    if found := doubt(losses, state["plain_steps"]):
        warn(found)
    return losses


class _Step:
    """Gradients of one step: expand once, run the micro-batches through the large model, back into the operators."""

    def __init__(self, operator, loss, mask_token, mask_rate, flops, shard):
        self.operator, self.loss, self.masks = operator, loss, (mask_token, mask_rate)
        self.flops = flops  # of the model alone in one step, counted in the first
        self.model = operator.skeleton(shard=shard).train(operator.training)
        self.parameters = dict(self.model.named_parameters())
        device = next(self.model.parameters()).device
        self.devices = [device] if device.type == "cuda" else []
        together = distributed.is_available() and distributed.is_initialized()
        self.rank, self.ranks = (distributed.get_rank(), distributed.get_world_size()) if together else (0, 1)

    def __call__(self, batches, step, refresh=None):
        """The loss; refresh: an optimizer whose curvature is due."""
        self._expand()
        seeds = [
            self.operator.seed + (step * len(batches) + micro) * self.ranks + self.rank for micro in range(len(batches))
        ]
        counts = [None] * len(batches)
        if self.loss is None:
            batches = [inputs_of(self.model, batch, *self.masks, s) for batch, s in zip(batches, seeds, strict=True)]
            counts = [label_count(self.model, batch) for batch in batches]
        if refresh:
            total, number = self._accumulate([_sampled_loss(self.model, batches[0], seeds[0], self.devices)])
            self._into_operators(number, more=True)
            for p in self.operator.parameters():
                p.grad *= math.sqrt(number)  # h is in units of N * g^2
            refresh.update_hessian()
            refresh.zero_grad()
            for parameter in self.parameters.values():
                parameter.grad = None
        micro = (self._loss(*each) for each in zip(batches, counts, seeds, strict=True) if each[1] != 0)
        if self.flops is None:
            with FlopCounterMode(display=False) as counter:
                total, number = self._accumulate(micro)
            self.flops = counter.get_total_flops()
        else:
            total, number = self._accumulate(micro)
        if not number:
            raise FloatingPointError(f"loss: the batches of step {step} have no label that it could be the mean of")
        if not math.isfinite(total):
            raise FloatingPointError(f"loss: got {total} in step {step}; the operator is as before it")
        self._into_operators(number)
        norm = nn.utils.clip_grad_norm_(self.operator.parameters(), 1.0)
        if not bool(norm.isfinite()):
            raise FloatingPointError(f"loss: its gradient is not finite in step {step}; the operator is as before it")
        return total / number

    def _accumulate(self, losses):
        """Gradients of the sum over labels of mean losses, (loss, labels); the sum and the labels, over all ranks."""
        total = torch.zeros(2, dtype=torch.float64)
        for value, count in losses:
            (value * count).backward()
            total += torch.tensor([float(value.detach()) * count, count], dtype=torch.float64)
        if self.ranks > 1:
            total = total.to(self.devices[0] if self.devices else "cpu")
            distributed.all_reduce(total)
        return total.tolist()

    def _expand(self):
        """Give the model its weights, as leaves: its graph ends there."""
        self.weights = self.operator.expand()
        for name, parameter in self.parameters.items():
            parameter.data = self.weights[name].detach().to(parameter.dtype)
            parameter.grad = None

    def _into_operators(self, number, more=False):
        """Gradients of the operators from those of the model, divided by the number of labels."""
        grown = [n for n, p in self.parameters.items() if p.grad is not None and self.weights[n].requires_grad]
        torch.autograd.backward(
            [self.weights[name] for name in grown],
            [(self.parameters[name].grad / number).to(self.weights[name].dtype) for name in grown],
            retain_graph=more,
        )
        if not more:
            self.weights = None  # or the next expansion would be made beside this one
        for p in self.operator.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            if self.ranks > 1:
                distributed.all_reduce(p.grad)

    def _loss(self, batch, count, seed):
        """A micro-batch's loss and the number of labels it is the mean of."""
        with torch.random.fork_rng(self.devices):
            torch.manual_seed(seed)
            if self.loss is not None:
                value = self.loss(self.model, batch)
                return value if isinstance(value, tuple) else (value, 1)
            value = self.model(**batch).loss
        if value is None:
            raise ValueError("batches: the model returned no loss; expected 'labels' in every batch, or pass loss=")
        return value, count


class _ShardedStep(_Step):
    """The same for a model whose parameters FSDP2 shards, one module type at a time."""

    def __init__(self, operator, *arguments):
        super().__init__(operator, *arguments)
        check_fully_sharded(self.model)
        for module in self.model.modules():
            if hasattr(module, "set_gradient_divide_factor"):
                module.set_gradient_divide_factor(1.0)  # a sum, as it is divided by all labels later

    @torch.no_grad()
    def _expand(self):
        for row in self.operator.rows:
            for name, value in zip(row.names, self.operator.expand_row(row), strict=True):
                write(self.parameters[name], value)
                self.parameters[name].grad = None

    def _into_operators(self, number, more=False):
        for row in self.operator.rows:
            grads = [self.parameters[name].grad for name in row.names]
            reached = [layer for layer, grad in enumerate(grads) if grad is not None]
            weights = self.operator.expand_row(row) if reached else None
            if reached and weights.requires_grad:
                whole = [(grads[layer].full_tensor() / number).to(weights.dtype) for layer in reached]
                torch.autograd.backward([weights[layer] for layer in reached], whole)
        for p in self.operator.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad


def _sampled_loss(model, inputs, seed, devices):
    """Mean cross-entropy of labels drawn from the model itself where the batch has labels (Gauss-Newton-Bartlett)."""
    labels = inputs.get("labels")
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        logits = model(**inputs).logits
        if labels is None or labels.is_floating_point() or labels.shape != logits.shape[:-1]:
            raise ValueError("optimizer: 'sophiag' expected one integer label per row of logits; use 'adamw'")
        if is_causal(model):
            logits, labels = logits[:, :-1], labels[:, 1:]
        z = logits[labels != IGNORED].float()
        sampled = torch.multinomial(z.detach().softmax(-1), 1).squeeze(-1)
    return nn.functional.cross_entropy(z, sampled), len(z)
