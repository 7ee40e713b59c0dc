"""Running a training call once more: on what training saw, and without a trace."""

from __future__ import annotations

import bisect
import contextlib
import copy
import dataclasses
import random
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch

_thread = threading.local()


def replaying() -> bool:
    """Whether a refresh is running the model: no call of any model is a training call then."""
    return getattr(_thread, "replaying", False)


@dataclasses.dataclass
class Call:
    """A call of the model, with what is known of it: `scored` maps an output's path to what training read there."""

    args: tuple
    kwargs: dict
    autocast: dict | None = None
    modules: ModuleState | None = None
    scored: dict = dataclasses.field(default_factory=dict)

    @classmethod
    def seen(cls, model: torch.nn.Module, args: tuple, kwargs: dict) -> Call:
        """The call about to be made, as copies: batch buffers are filled anew, inputs normalised in place."""
        device = next(model.parameters()).device.type
        autocast = {
            "device_type": device,
            "dtype": torch.get_autocast_dtype(device),
            "enabled": torch.is_autocast_enabled(device),
        }
        args, kwargs = copied((args, kwargs))
        return cls(args, kwargs, autocast, ModuleState(model))

    @classmethod
    def of(cls, batch: Any) -> Call:
        """A batch as a call: mappings are passed by keyword, a tuple or list by position."""
        if isinstance(batch, Mapping):
            return cls((), dict(batch))
        return cls(tuple(batch) if isinstance(batch, (tuple, list)) else (batch,), {})

    def __call__(self, model: torch.nn.Module) -> Any:
        if self.autocast is None:
            args, kwargs = copied((self.args, self.kwargs))
            return model(*args, **kwargs)
        self.modules.restore(detach=True)
        with torch.autocast(**self.autocast):
            return model(*self.args, **self.kwargs)


def copied(x: Any, memo: dict | None = None) -> Any:
    """x with every tensor in it as a copy outside of any graph. Modules and functions stay what they are."""
    memo = {} if memo is None else memo
    if id(x) in memo:
        return memo[id(x)][1]
    if isinstance(x, torch.Tensor):
        result = x.detach().clone()
        if x.requires_grad:  # for models that differentiate with respect to their inputs
            result.requires_grad_()
    elif isinstance(x, (torch.nn.Module, type)) or callable(x):
        return x
    elif isinstance(x, tuple):
        items = [copied(each, memo) for each in x]
        result = type(x)(*items) if hasattr(x, "_fields") else type(x)(items)
    elif isinstance(x, list):
        result = copy.copy(x)
        result[:] = [copied(each, memo) for each in x]
    elif isinstance(x, dict) or hasattr(x, "__dict__"):
        result = copy.copy(x)
        for key, value in list(x.items()) if isinstance(x, dict) else []:
            result[key] = copied(value, memo)
        for key, value in list(getattr(result, "__dict__", {}).items()):
            result.__dict__[key] = copied(value, memo)
    else:
        return x
    memo[id(x)] = x, result  # x as well: its id must not be used again
    return result


class ModuleState:
    """What a forward may change in a model: buffers, and plain attributes such as counters, lists, hidden states.

    Hooks as well: transformers installs some in a first forward, and notes in an attribute that it has.
    """

    _STRUCTURE = frozenset(name for name in vars(torch.nn.Module()) if name != "training" and "hook" not in name)

    def __init__(self, model: torch.nn.Module):
        # Copied without asking whether they change: BatchNorm does not count its writes in `_version`.
        self._buffers = [
            (m._buffers, k, b, b.clone()) for m in model.modules() for k, b in m._buffers.items() if b is not None
        ]
        self._attributes = []
        for module in model.modules():
            own = {k: v for k, v in vars(module).items() if k not in self._STRUCTURE}
            inner = {k: _inner(v) for k, v in own.items() if isinstance(v, (list, dict, set, torch.Tensor))}
            self._attributes.append((module, own, inner))

    @torch.no_grad()
    def restore(self, detach: bool = False) -> None:
        """detach: leave tensors that carry the graph of an earlier call (hidden states) without it."""
        for buffers, name, buffer, value in self._buffers:
            buffers[name] = buffer.copy_(value)
        for module, own, inner in self._attributes:
            now = vars(module)
            for name in [k for k in now if k not in self._STRUCTURE and k not in own]:
                del now[name]
            now.update(own)
            for name, (value, version) in inner.items():
                kept = own[name]
                if isinstance(kept, torch.Tensor):
                    if kept._version != version:
                        kept.detach().copy_(value)
                    if detach and kept.grad_fn is not None:
                        now[name] = value.clone()
                elif isinstance(kept, list):
                    kept[:] = value
                else:
                    kept.clear()
                    kept.update(value)


def _inner(value):
    """(a copy of what it holds, version)"""
    return (value.detach().clone(), value._version) if isinstance(value, torch.Tensor) else (copy.copy(value), None)


@contextlib.contextmanager
def undisturbed(model: torch.nn.Module, params: list[torch.Tensor]) -> Iterator[None]:
    """Gradients, hooks of parameters, the model's state and all random states are afterwards as they were before.

    Inside, no parameter of the model or of `params` has a gradient, and no hook on one runs: those step other
    optimizers, or clip and count what is a training gradient.
    """
    params = list(dict.fromkeys([*model.parameters(), *params]))
    for p in params:
        p.grad = p.grad  # torch refuses here what could not be put back
    grads = _outside_graphs([p.grad for p in params])
    hooks = [h for p in params for h in (p._backward_hooks, getattr(p, "_post_accumulate_grad_hooks", None)) if h]
    hooks = [(h, dict(h)) for h in hooks]
    state = ModuleState(model)
    randoms = _random_states()
    before, _thread.replaying = replaying(), True
    try:
        with torch.random.fork_rng(devices={p.device.index for p in params if p.is_cuda}):
            for p in params:
                p.grad = None
            for h, _ in hooks:
                h.clear()
            yield
    finally:
        _thread.replaying = before
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        for h, own in hooks:
            h.update(own)
        state.restore()
        for put, value in randoms:
            put(value)


def _outside_graphs(tensors):
    """The same; as copies those in memory of CUDA graphs, whose replay in a refresh writes the next gradient there.

    torch.cuda.make_graphed_callables leaves gradients there.
    """
    if not any(map(_on_gpu, tensors)):
        return tensors
    if torch.cuda.get_allocator_backend() != "native":  # cudaMallocAsync does not tell what belongs to a graph
        return [t.clone() if _on_gpu(t) else t for t in tensors]
    pools = [s for s in torch.cuda.memory_snapshot() if tuple(s["segment_pool_id"]) != (0, 0)]
    segments = sorted((s["address"], s["address"] + s["total_size"]) for s in pools)
    starts = [start for start, _ in segments]

    def inside(t):
        i = bisect.bisect(starts, t.data_ptr()) - 1
        return i >= 0 and t.data_ptr() < segments[i][1]

    return [t.clone() if segments and _on_gpu(t) and inside(t) else t for t in tensors]


def _on_gpu(t):
    """Shards, which FSDP2 keeps itself, and sparse gradients are never in a graph's memory."""
    return type(t) is torch.Tensor and t.is_cuda and t.layout == torch.strided


def _random_states():
    numpy = sys.modules.get("numpy")
    return [(random.setstate, random.getstate())] + (
        [(numpy.random.set_state, numpy.random.get_state())] if numpy else []
    )
