"""When a refresh is due, and on which call of the model: the last one that training went backward through."""

from __future__ import annotations

import functools
import weakref
from typing import Any, get_args

import torch

from growkit.optim import curvature, distributed, likelihood
from growkit.optim.options import Phase
from growkit.optim.processes import Processes
from growkit.optim.replay import Call, replaying, undisturbed
from growkit.warn import called_by, warn


def is_due(group: dict) -> bool:
    """Whether a refresh belongs to the next step: to 1, 1+k, 1+2k, ... ("paper") or k, 2k, ... ("official")."""
    every = group["every"] or 10
    return (int(group["steps"]) + 1) % every == (1 % every if group["phase"] == "paper" else 0)


class Attachment:
    """Watches a model's calls for an optimizer, so that its step() can run a refresh by itself.

    A call is kept, as copies of its inputs, where a refresh is due; it becomes `call` once a backward arrives at its
    outputs, with what the gradients there say about the loss. The hooks run outside of any compiled graph.
    """

    def __init__(
        self, optimizer: Any, model: torch.nn.Module, every: int, phase: str, process_group: Any, options: dict
    ):
        if not isinstance(model, torch.nn.Module):
            raise TypeError(f"attach: model is {type(model).__name__}, expected a torch.nn.Module")
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ValueError(f"attach: every={every!r}, expected an integer >= 1")
        if phase not in get_args(Phase):
            raise ValueError(f"attach: phase={phase!r}, expected 'paper' or 'official'")
        distributed.check(model)
        self.process_group = distributed.group_of(model, process_group)
        inside, outside = self._check_parameters(optimizer, model)
        self._inside = list(map(weakref.ref, inside))  # or what fully_shard has replaced would stay in memory
        self._outside = len(outside)
        for group in optimizer.param_groups:
            group.update(every=every, phase=phase)
        self.optimizer, self.model, self.options = optimizer, model, options
        self.known = {}  # path of an output -> what the first gradient there said
        self.units = [group["bs"] for group in optimizer.param_groups]
        self.missed = 0  # steps since the model's last call with gradients
        self.start_step()
        inner, _ = distributed.without_ddp(model)  # inside DDP: a refresh calls that
        self._hooks = [
            inner.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True),
            inner.register_forward_hook(self._after),
        ]

    def _check_parameters(self, optimizer, model):
        """(parameters of the optimizer that the model has, those that it lacks)"""
        own = dict(optimizer._named_parameters())
        inside = own.keys() & set(model.parameters())
        if own and not inside:
            raise ValueError(
                f"attach: model has none of the optimizer's {len(own)} parameters (a copy, or loaded anew? or are they "
                f"{_REPLACED}?), expected the model that is trained"
            )
        outside = own.keys() - inside
        if outside:
            warn(
                f"{type(optimizer).__name__} has parameters that the attached model lacks, which no refresh will "
                f"reach: {_listed(name for p, name in own.items() if p in outside)}"
            )
        return inside, outside

    def check_owned(self) -> None:
        """Wrappers made after attach() may have put other tensors into the optimizer, or into the model."""
        own = {p for group in self.optimizer.param_groups for p in group["params"]}
        if any(map(distributed.is_sharded, own)):  # FSDP2's modules hold other tensors while they are unsharded
            return
        shared = own.intersection(self.model.parameters())
        lost = sum(p() not in shared for p in self._inside)
        if lost and len(own) - len(shared) > self._outside:
            raise RuntimeError(
                f"curvature refresh: {lost} of the {len(self._inside)} parameters that the optimizer shared with "
                f"the attached model have been replaced after attach() (by {_REPLACED}?), which is not supported; "
                "expected fully_shard, DDP or a plain module, and attach() after it"
            )

    def check_units(self) -> None:
        """h is stored in units of the group's bs: another one from now on would scale it."""
        groups = self.optimizer.param_groups
        for unit, group in zip(self.units, groups, strict=False):
            if group["bs"] != unit and self.optimizer.param_groups[0]["refreshes"]:
                raise ValueError(
                    f"bs of a group changed from {unit} to {group['bs']} after attach(): h is stored so that bs has no "
                    "effect, expected it to stay; the labels of a refresh are counted, whatever the batch"
                )
        self.units = [group["bs"] for group in groups]

    def check_first(self) -> None:
        """Say at the first step what the first refresh would say, if training has told already."""
        if self.call.scored and self.options.get("likelihood") is None and not self.known:
            told = [each for each in self.call.scored.values() if not each.silent]
            if told and all(each.likelihood is None for each in told):
                raise TypeError(curvature.unknown(told[0].gradient))

    def __getstate__(self):
        """A copy or a file of the model carries the hooks, but neither the optimizer nor a batch: they do nothing."""
        return {"optimizer": None}

    def start_step(self) -> None:
        self.call = self._open = None
        self.called = False

    @torch.compiler.disable
    def _before(self, model, args, kwargs):
        if self.optimizer is None or replaying() or not torch.is_grad_enabled():
            return
        self.called = True
        group = self.optimizer.param_groups[0]
        # The first call of all is looked at even if nothing is due: what cannot be scored is said at the first step.
        self._open = Call.seen(model, args, kwargs) if is_due(group) or not int(group["steps"]) else None

    @torch.compiler.disable
    def _after(self, model, args, output):
        if self.optimizer is None or replaying() or self._open is None:
            return
        call, self._open = self._open, None
        outputs = {path: t for path, t in likelihood.differentiable(output).items() if t.grad_fn is not None}
        read = set()
        if "likelihood" in self.options and not callable(self.options["likelihood"]):
            every = self.options.get("logits") is not None  # which of them it takes is seen when it is called
            read = outputs.keys() if every else likelihood.candidates(output).keys()
        for path, t in outputs.items():
            edge = likelihood.edge_of(t)
            # Detached, or the hook would hold the graph that holds the hook.
            z = t.detach() if path in read and t.dim() else None
            edge.node.register_prehook(functools.partial(self._trained, call, path, z, edge.output_nr))

    @torch.no_grad()
    def _trained(self, call, path, z, output_nr, grads):
        self.call = call
        g = grads[output_nr]
        if z is not None and g is not None:
            call.scored[path] = likelihood.read(z, g, self.known.get(path))

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


_REPLACED = "flat or float32 copies, as DeepSpeed's ZeRO and Megatron's optimizers make them"


def _listed(names):
    names = list(names)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def estimate(
    optimizer: Any, model: torch.nn.Module, calls: list[Call], process_group: Any, options: dict, known: dict
) -> dict:
    """The curvature on `calls`, not yet in `h`: what `_take` folds. Nothing has changed, also where this raises."""
    distributed.check(model)
    processes = Processes(optimizer, optimizer._owner(), model, process_group)
    if not optimizer._compared:
        processes.check_replicas()
        optimizer._compared = True
    with undisturbed(model, processes.params), processes.ready(), torch.enable_grad():
        count, reached = optimizer._estimate(processes, calls, optimizer._refresh_key(), known, **options)
        for p in [p for group in optimizer.param_groups for p in group["params"]]:
            # No curvature is a part of the mean over batches, too: that of an expert which this one leaves idle.
            if p.grad is None and p.requires_grad and "hessian" in optimizer.state.get(p, ()):
                p.grad = torch.zeros_like(p)
        grads = [p.grad for p in processes.params]
    return {"processes": processes, "grads": grads, "count": count, "reached": reached}


def before_step(optimizer: Any) -> dict | None:
    """All that can go wrong, before anything has changed; returns the estimate of a refresh that is due, or None.

    The curvature is that of the weights which the batch was trained at, as in the paper's Algorithm 3.
    """
    attachment, group = optimizer._attachment, optimizer.param_groups[0]
    name = type(optimizer).__name__
    if distributed.in_backward():
        _check_in_backward(optimizer)
    if attachment is None:
        if group["every"]:
            optimizer._warn_once(
                "detached",
                f"{name} was attached with every={group['every']}, but this copy is attached to no model: call "
                "attach(model) again, or h stays as it is",
            )
        elif not group["refreshes"]:
            if optimizer._since_refresh == 0 and called_by("transformers.trainer"):  # asked once, at the first step
                optimizer._warn_once(
                    "trainer",
                    f"{name} is in a Trainer but attached to no model, so its h stays 0 and every element moves by lr: "
                    "pass optimizer_cls_and_kwargs=(growkit.integrations.huggingface.Sophia, {...}), or call "
                    "optimizer.attach(model), unless a callback of yours refreshes the curvature",
                )
            _warn_of_no_refresh(optimizer)
        return None
    _warn_of_no_refresh(optimizer)
    attachment.check_units()
    if not attachment.called:
        if attachment.missed == 1:  # a single one may be a checkpoint library making the state
            optimizer._warn_once(
                "missed",
                f"{name} took two steps without seeing a call of the attached model that records gradients: if it was "
                "compiled and called before attach(), call torch.compiler.reset() once; if its parts or a copy are "
                "called in its place, attach what is called",
            )
        return None
    if attachment.call is None:
        return None
    if not is_due(group):
        attachment.check_first()
        return None
    optimizer._telemetry.warn(optimizer)
    attachment.check_owned()
    of = attachment
    result = estimate(optimizer, of.model, [of.call], of.process_group, of.options, of.known)
    _warn_of_unreached(optimizer, result["reached"])
    return result


def after_step(optimizer: Any, result: dict | None) -> None:
    """Count the step, and fold the estimate into `h`."""
    attachment = optimizer._attachment
    optimizer._since_refresh += 1
    optimizer._observe(is_due(optimizer.param_groups[0]))
    # A step with no forward before it (a checkpoint library making the state) is not one of the schedule.
    if attachment is None or attachment.called:
        for each in optimizer.param_groups:
            each["steps"] = each["steps"] + 1
    if result is not None:
        optimizer._take(**result)
    if attachment is not None:
        attachment.missed = 0 if attachment.called else attachment.missed + 1
        attachment.start_step()


def _check_in_backward(optimizer):
    """A step taken by a hook of a parameter, as soon as its gradient is there."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if distributed.world_size() > 1 and not all(map(distributed.is_sharded, params)):
        raise RuntimeError(
            "step() within the backward: DDP reduces gradients after the hooks of their parameters, so that every "
            "process would follow gradients of its own; expected step() after the backward"
        )
    if optimizer._attachment is not None:
        raise RuntimeError(
            "step() within the backward of an attached model: a refresh belongs to the weights that the batch was "
            "trained at, and those of earlier hooks have moved; expected step() after the backward, or no attach() "
            "and, every k steps, a backward of sampled labels in which the hooks call update_hessian()"
        )


def _warn_of_no_refresh(optimizer):
    taken = optimizer._since_refresh + 1
    if taken > 2 * (optimizer.param_groups[0]["every"] or 10):
        optimizer._warn_once(
            "no refresh",
            f"{type(optimizer).__name__} took {taken} steps without a curvature refresh, so it is no second-order "
            "method: call attach(model), refresh(model, batches) or update_hessian()",
        )


_REFRESHES_TO_TELL = 3  # an expert that one batch leaves idle is no parameter without curvature


def _warn_of_unreached(optimizer, reached):
    idle, n = optimizer._unreached
    trained = {p for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
    idle = (trained if idle is None else idle & trained) - reached
    optimizer._unreached = idle, n + 1
    if idle and n + 1 >= _REFRESHES_TO_TELL:
        names = dict(optimizer._named_parameters())
        optimizer._warn_once(
            "unreached",
            f"no curvature refresh of {type(optimizer).__name__} reached the parameters "
            f"{_listed(names[p] for p in names if p in idle)}: their h stays 0, and every step moves them by lr "
            "whatever their gradient: attach() the model whose loss uses them, or say with logits= or likelihood= what "
            "else the loss reads",
        )
