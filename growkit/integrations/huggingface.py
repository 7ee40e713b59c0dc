"""transformers.Trainer, and the trainers made from it (TRL's)."""

import inspect
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback

from growkit.optim import SophiaG, param_groups
from growkit.optim.replay import replaying


class Sophia:
    """Builds groups of parameters and an attached optimizer for a Trainer:

        Trainer(model, args, ..., optimizer_cls_and_kwargs=(growkit.integrations.huggingface.Sophia, {"rho": 0.05}))

    The keywords are those of `__call__`, which the Trainer calls with its model. Metrics go to the Trainer's logger.
    """

    def __call__(
        self,
        model: nn.Module,
        *,
        optimizer: type[Optimizer] = SophiaG,
        lr: float | None = None,
        weight_decay: float | None = None,
        no_decay: tuple[str, ...] = (),
        every: int = 10,
        attach: dict[str, Any] | None = None,
        **options: Any,
    ) -> Optimizer:
        """optimizer: growkit.SophiaG or SophiaH. lr, weight_decay: by default `learning_rate` and `weight_decay` of the
        Trainer's arguments. no_decay: as in `growkit.param_groups`. every and `attach`: keywords of `attach`. options:
        those of the optimizer. Raises ValueError without an lr, if no Trainer is calling.
        """
        trainer = _caller()
        if trainer is None and (lr is None or weight_decay is None):
            raise ValueError("Sophia: lr and weight_decay are missing, and no Trainer is calling that has them")
        lr = trainer.args.learning_rate if lr is None else lr
        weight_decay = trainer.args.weight_decay if weight_decay is None else weight_decay
        built = optimizer(param_groups(model, weight_decay, no_decay=no_decay), lr=lr, **options)
        attach = attach or {}
        if _computes_no_logits(model):
            model.register_forward_pre_hook(_with_logits, with_kwargs=True)
            attach = {"likelihood": "categorical", "mask": _scored, **attach} if optimizer is SophiaG else attach
        built.attach(model, every, **attach)
        if trainer is not None:
            log_metrics(trainer)
        return built


def _caller() -> Trainer | None:
    """The Trainer whose method called Sophia(): a factory is handed the model, but neither it nor its arguments."""
    trainer = inspect.currentframe().f_back.f_back.f_locals.get("self")
    return trainer if isinstance(trainer, Trainer) else None


def _computes_no_logits(model: nn.Module) -> bool:
    """Whether TRL has replaced the forward by one that, asked with `fused_lm_head`, gives a loss without logits."""
    forwards = (module.__dict__.get("forward") for module in model.modules())
    return any(
        "fused_lm_head" in forward.__code__.co_varnames for forward in forwards if isinstance(forward, MethodType)
    )


def _with_logits(model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """A refresh draws labels from the logits."""
    return args, {name: value for name, value in kwargs.items() if name != "fused_lm_head" or not replaying()}


def _scored(args: tuple, kwargs: dict) -> torch.Tensor:
    """Which positions TRL's loss reads: position t is scored against label t+1, unless the labels come shifted."""
    if kwargs.get("shift_labels") is not None:
        return kwargs["shift_labels"] != -100
    counts = kwargs["labels"].roll(-1, -1) != -100
    counts[..., -1] = False
    return counts


def log_metrics(trainer: Trainer) -> None:
    """Add the optimizer's `metrics()`, as "sophia/NAME", to what the Trainer logs of training and to its log history.

    `Sophia` does so by itself; for a Trainer made with `optimizers=(optimizer, scheduler)`.
    """
    callbacks = trainer.callback_handler.callbacks
    if not any(isinstance(callback, _Metrics) for callback in callbacks):
        callbacks.insert(0, _Metrics())  # before those that pass the logs on


class _Metrics(TrainerCallback):
    def on_log(self, args, state, control, logs=None, optimizer=None, **kwargs):
        optimizer = getattr(optimizer, "optimizer", optimizer)  # out of Accelerate's wrapper
        if logs is not None and "loss" in logs and hasattr(optimizer, "metrics"):
            metrics = {f"sophia/{name}": value for name, value in optimizer.metrics().items()}
            logs.update(metrics)
            state.log_history[-1].update(metrics)
