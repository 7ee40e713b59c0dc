"""Models made of a class and a config, whole or as shards that `fully_shard` lays over several processes."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

Shard = Callable[[nn.Module], Any]


def build(
    model_class: type, config: Any, dtype: torch.dtype, device: torch.device, shard: Shard | None = None
) -> nn.Module:
    """A model of this config on this device, its parameters of no meaning yet.

    shard: lays out the parameters of the model it is given, which are on the meta device, so that no process ever holds
        them all.
    """
    config, devices = copy.deepcopy(config), [device] if device.type == "cuda" else []
    hook = register_module_parameter_registration_hook(_to_meta) if shard else None
    try:
        with torch.random.fork_rng(devices), torch.device(device):
            if hasattr(model_class, "_from_config"):
                model = model_class._from_config(config, dtype=dtype)
            else:
                model = model_class(config).to(dtype)
    finally:
        if hook:
            hook.remove()
    if not shard:
        return model.to(device)
    shard(model)
    return model._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t)  # to_empty, buffers kept


def _to_meta(module, name, parameter):
    """What a module registers in its place; a tied parameter, which is there by now, stays the same one."""
    if parameter is None or parameter.is_meta:
        return None
    return nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
