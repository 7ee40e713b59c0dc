"""Calls that an editor and a type checker must take as they are. Checked, never run."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from typing_extensions import assert_type

import growkit

model = nn.Linear(4, 4)
optimizer = growkit.SophiaG(model.parameters(), lr=1e-3, betas=(0.9, 0.99), rho=0.05, weight_decay=0.1)
assert_type(optimizer, growkit.SophiaG)
as_torch: torch.optim.Optimizer = growkit.SophiaH(model.parameters(), lr=1e-3)
growkit.SophiaG(growkit.param_groups(model, 0.1), state_dtype="8bit", bf16_update="master", nesterov=True)
growkit.SophiaG(growkit.param_groups(model, 0.1), **growkit.presets["gpt2-125m"])
optimizer.attach(model, every=10, phase="official")
optimizer.attach(model, 10, mask=lambda args, kwargs: kwargs["labels"] != -100)
optimizer.refresh(model, [{"input_ids": torch.zeros(2, 4, dtype=torch.int64)}], logits=lambda output: output.logits)
optimizer.step()
torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)


def batches() -> Iterator[dict[str, torch.Tensor]]:
    yield {"input_ids": torch.zeros(2, 4, dtype=torch.int64)}


def grow(small: nn.Module, config: Any) -> nn.Module:
    operator = growkit.LiGO(small, {"n_layer": 4}, start="lossless")
    operator = growkit.LiGO(small, config, start="official", sharing="target", seed=1)
    losses = operator.fit(batches(), steps=20, lr=1e-3, accumulate=2, progress=lambda step, loss: None)
    assert_type(losses, list[float])
    return operator.grow()
