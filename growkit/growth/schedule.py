"""Progressive training: a model that starts small and grows while it trains, in a loop that stays the user's own."""

import bisect
import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from growkit.growth.build import Shard
from growkit.growth.check import TOLERANCE, output_change
from growkit.growth.families.table import Family
from growkit.growth.ligo import LiGO, StartName
from growkit.growth.outline import family_of, outline
from growkit.growth.shards import unsharded_class
from growkit.growth.source import unwrapped
from growkit.growth.starts import STARTS
from growkit.growth.state import check_optimizer
from growkit.optim.distributed import is_sharded
from growkit.warn import warn


class Schedule:
    """Grows a model and its optimizer at given steps of a training loop.

        schedule = Schedule([(500, {"n_layer": 4}), (1000, {"n_layer": 8, "n_embd": 256})])
        for step, batch in enumerate(batches):
            model, optimizer = schedule.step(step, model, optimizer)
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    stages: (step, sizes), by rising step: from this step on the model has these sizes, a config of its class or config
        field -> size, as `LiGO` takes them, beside those of the stages before. A stage at step 0 may describe the first
        model, which is the user's.
    start, seed, family, noise: of `LiGO`. With a start that is not lossless the loss jumps.
    wrap: what the loop's model is wrapped in, such as torch.compile or DistributedDataParallel: big model -> what
        `step` returns.
    shard: of a model under FSDP2, as for `LiGO.grow`.
    inputs: of the model, for measuring what growth changes; by default random tokens or pixels.

    changes: step -> `growth.check.output_change` of the growth made there.

    It keeps no state that a checkpoint would need: what a stage asks for is compared with the model's own config. To
    go on from a checkpoint, load model and optimizer as ever and call `step` with the number of the next step; a model
    whose files hold no config is made of `config_at`.
    """

    def __init__(
        self,
        stages: Sequence[tuple[int, Any | Mapping[str, int]]],
        start: StartName = "lossless",
        seed: int = 0,
        *,
        family: Family | None = None,
        noise: float = 0.0,
        wrap: Callable[[nn.Module], Any] | None = None,
        shard: Shard | None = None,
        inputs: Any = None,
    ):
        self._stages = [(step, sizes) for step, sizes in stages]
        steps = [step for step, _ in self._stages]
        if not steps or not all(isinstance(step, int) and step >= 0 for step in steps):
            raise ValueError(f"stages: got steps {steps}, expected one or more, each an integer from 0 on")
        if steps != sorted(set(steps)):
            raise ValueError(f"stages: got steps {steps}, expected them to rise")
        if start not in STARTS:
            raise ValueError(f"start: got {start!r}, expected one of {', '.join(map(repr, STARTS))}")
        self._start, self._seed, self._family, self._noise = start, seed, family, noise
        self._wrap, self._shard, self._inputs = wrap, shard, inputs
        self._reached: int | None = None  # number of stages that the model of the last call has been through
        self.changes: dict[int, float] = {}

    def step(
        self, step: int, model: Any, optimizer: torch.optim.Optimizer, *lr_schedulers: Any
    ) -> tuple[Any, torch.optim.Optimizer]:
        """The model and the optimizer to take this step with: those given, or larger ones where a stage begins.

        To be called before the forward pass, when no gradient waits, on every process. The first call looks through all
        stages to come, and refuses what cannot be grown before anything is trained.
        model: as the loop calls it, wrapped or not. The large one is in the same mode, train or eval, and frozen where
            it was.
        optimizer: as `LiGO.grow_optimizer` takes it; attached where the given one is, with the same options. Hooks of
            its own are not carried over.
        lr_schedulers: of torch; they go on with the new optimizer, whose groups have the old ones' learning rates.
        """
        stage = bisect.bisect_right([at for at, _ in self._stages], step)
        if stage != self._reached:
            if self._reached is None:
                self._look_ahead(model, optimizer, stage)
            if stage:
                model, optimizer = self._grown(step, model, self._wanted(stage), optimizer, lr_schedulers)
            self._reached = stage
        return model, optimizer

    def config_at(self, step: int, config: Any, model_class: type) -> Any:
        """The config that a model of this class, first made of `config`, has at a step."""
        for stage, (at, _) in enumerate(self._stages, 1):
            if at <= step:
                config = self._outline(config, model_class, self._wanted(stage)).config
        return config

    def _wanted(self, stage):
        """What so many stages ask for together: a run may begin, or count, past several."""
        config, sizes = None, {}
        for _, asked in self._stages[:stage]:
            config, sizes = (config, sizes | asked) if isinstance(asked, Mapping) else (copy.deepcopy(asked), {})
        if config is None:
            return sizes
        for field, size in sizes.items():
            setattr(config, field, size)
        return config

    def _outline(self, config, model_class, sizes):
        family, start = family_of(config, self._family, config), STARTS[self._start]
        return outline(family, model_class, config, sizes, start, self._noise)

    def _look_ahead(self, model, optimizer, stage):
        """Refuse a later growth before training has spent time on the way to it."""
        small = unwrapped(model)
        check_optimizer(optimizer)
        if model is not small and self._wrap is None:
            raise ValueError(f"wrap: got None with a {type(model).__name__}, expected what wraps the large model, too")
        if self._shard is None and any(map(is_sharded, small.parameters())):
            raise ValueError("shard: got None with a sharded model, expected what shards the large one, too")
        config, dtype = small.config, next(small.parameters()).dtype
        for later in range(max(1, stage), len(self._stages) + 1):
            try:
                found = self._outline(config, unsharded_class(small), self._wanted(later))
                found.reason(dtype)
            except ValueError as error:
                raise ValueError(f"stages: at step {self._stages[later - 1][0]}: {error}") from None
            config = found.config

    def _grown(self, step, model, sizes, optimizer, lr_schedulers):
        small = unwrapped(model)
        growth = self._outline(small.config, unsharded_class(small), sizes).growth
        if growth.small == growth.big:
            return model, optimizer
        if any(p.grad is not None and bool(p.grad.any()) for p in small.parameters()):
            raise ValueError(f"step: gradients wait at step {step}, expected the call after zero_grad()")
        operator = LiGO(small, sizes, self._start, seed=self._seed, family=self._family, noise=self._noise)
        big = operator.grow(shard=self._shard)
        grown = operator.grow_optimizer(optimizer, big)
        self.changes[step] = self._change(small, big)
        big.train(small.training)
        _freeze(operator, small, big)
        wrapped = self._wrap(big) if self._wrap else big
        attachment = getattr(optimizer, "_attachment", None)
        if attachment is not None:
            group = grown.param_groups[0]
            grown.attach(wrapped, group["every"], phase=group["phase"], **attachment.options)
            optimizer.detach()
        for scheduler in lr_schedulers:
            _follow(scheduler, grown)
        return wrapped, grown

    def _change(self, small, big):
        """Measured, in eval mode; warns where a lossless start was not."""
        mode = small.training
        small.eval()
        try:
            change = output_change(small, big, self._inputs, self._seed)
        finally:
            small.train(mode)
        tolerance = max(TOLERANCE[torch.float32], TOLERANCE[next(small.parameters()).dtype])  # RMSNorm's at the least
        if STARTS[self._start].lossless and not change <= tolerance:
            warn(f"Schedule: growing changed outputs by {change:.2g} relative, expected at most {tolerance:g}")
        return change


def _freeze(operator, small, big):
    """What comes of a frozen weight is frozen, too."""
    old, new = (dict(model.named_parameters()) for model in (small, big))
    for row in operator.rows:
        for layer, name in enumerate(row.names):
            source = row.small_names[operator._source[layer] if row.layered else 0]
            new[name].requires_grad_(old[source].requires_grad)


def _follow(scheduler, optimizer):
    """Have an LR scheduler, and those that it is made of, set the rates of another optimizer."""
    scheduler.optimizer = optimizer
    for inner in getattr(scheduler, "_schedulers", ()):
        _follow(inner, optimizer)
