"""torchtitan's container of optimizers, which resolves optimizers by name and is handed the model."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torchtitan.components.optimizer import OptimizersContainer

from growkit.optim import SophiaG, SophiaH

_CLASSES = {"SophiaG": SophiaG, "SophiaH": SophiaH}


class SophiaContainer(OptimizersContainer):
    """OptimizersContainer that knows the names "SophiaG" and "SophiaH" beside its own, and attaches them to the model.

        SophiaContainer.Config(every=10, param_groups=[ParamGroupConfig(pattern=".*", optimizer_name="SophiaG", ...)])

    Raises ValueError for a model in several parts (pipeline parallelism), whose outputs are no logits.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        """every, attach: keywords of the optimizers' `attach`."""

        every: int = 10
        attach: dict[str, Any] = field(default_factory=dict)

    def __init__(self, config: Config, *, model_parts: list[nn.Module]) -> None:
        if len(model_parts) != 1:
            raise ValueError(
                f"SophiaContainer: the model is in {len(model_parts)} parts, expected 1: a refresh needs the whole "
                "model's outputs, so pipeline parallelism is not supported"
            )
        super().__init__(config, model_parts=model_parts)
        for optimizer in self.optimizers:
            if isinstance(optimizer, tuple(_CLASSES.values())):
                optimizer.attach(model_parts[0], config.every, **config.attach)

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable[..., Optimizer]:
        return _CLASSES.get(name) or OptimizersContainer._resolve_optimizer_factory(name)

    def metrics(self) -> dict[str, float]:
        """`metrics()` of the growkit optimizers, as "sophia/NAME"."""
        named = [optimizer.metrics() for optimizer in self.optimizers if hasattr(optimizer, "metrics")]
        return {f"sophia/{name}": value for metrics in named for name, value in metrics.items()}
