"""When a refresh is due and on which batch, and how it leaves no trace but `h`."""

import contextlib

import torch

from growkit.optim import distributed


def is_due(group):
    """Whether a refresh follows the next step: after 1, 1+k, 1+2k, ... ("paper") or k, 2k, ... ("official")."""
    every = group["every"] or 10
    return (int(group["steps"]) + 1) % every == (1 % every if group["phase"] == "paper" else 0)


class Attachment:
    """Remembers the model's last training inputs, so that the optimizer can run a refresh by itself."""

    def __init__(self, optimizer, model, every, phase, options):
        if not isinstance(model, torch.nn.Module):
            raise TypeError(f"attach: model is {type(model).__name__}, expected a torch.nn.Module")
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"attach: every={every!r}, expected an integer >= 1")
        if phase not in ("paper", "official"):
            raise ValueError(f"attach: phase={phase!r}, expected 'paper' or 'official'")
        distributed.check(model)
        for group in optimizer.param_groups:
            group.update(every=every, phase=phase)
        self.optimizer, self.model, self.options = optimizer, model, options
        self.inputs = self.autocast = None
        # Inside DDP, where a refresh calls the model, too.
        inner, _ = distributed.without_ddp(model)
        self._hook = inner.register_forward_pre_hook(self._remember, with_kwargs=True)

    def __getstate__(self):
        """A copy or a file of the model carries the hook, but neither the optimizer nor a batch: it does nothing."""
        return {"optimizer": None, "inputs": None}

    def _remember(self, model, args, kwargs):
        if self.optimizer is None:
            return
        if model.training and torch.is_grad_enabled() and not self.optimizer._refreshing:
            self.inputs = args, kwargs
            device = next(model.parameters()).device.type
            self.autocast = {
                "device_type": device,
                "dtype": torch.get_autocast_dtype(device),
                "enabled": torch.is_autocast_enabled(device),
            }

    def refresh(self):
        with torch.autocast(**self.autocast):
            run(self.optimizer, self.model, [self.inputs], **self.options)

    def remove(self):
        self._hook.remove()


def as_call(batch):
    """A batch as (args, kwargs) of the model: a dict is passed by keyword, a tuple or list by position."""
    if isinstance(batch, dict):
        return (), batch
    return (tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)), {}


def run(optimizer, model, calls, **options):
    """Estimate the curvature on `calls` (list of (args, kwargs)) and fold it into the optimizer's `h`.

    Training gradients, buffers that a forward changes (BatchNorm) and the random state are as before afterwards.
    """
    processes = distributed.Processes(optimizer, optimizer._owner(), model)
    if not optimizer._compared:
        processes.check_replicas()
        optimizer._compared = True
    optimizer._refreshing = True
    try:
        with _undisturbed(model, processes.params), processes.ready(), torch.enable_grad():
            count = optimizer._estimate(processes, calls, optimizer._refresh_key(), **options)
            optimizer._fold(count, processes=processes)
    finally:
        optimizer._refreshing = False


@contextlib.contextmanager
def _undisturbed(model, params):
    params = list(dict.fromkeys([*model.parameters(), *params]))
    grads = [p.grad for p in params]
    # Kept and restored without asking whether they changed: BatchNorm does not count its writes in `_version`.
    buffers = [(m, k, b, b.clone()) for m in model.modules() for k, b in m._buffers.items() if b is not None]
    with torch.random.fork_rng(devices={p.device.index for p in params if p.is_cuda}):
        try:
            for p in params:
                p.grad = None
            yield
        finally:
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad
            with torch.no_grad():
                for module, name, buffer, value in buffers:
                    module._buffers[name] = buffer.copy_(value)


@torch._disable_dynamo
def after_step(optimizer):
    """Count the step, refresh if one is due, and warn where no refresh ever comes."""
    attachment, group = optimizer._attachment, optimizer.param_groups[0]
    optimizer._since_refresh += 1
    if is_due(group):
        optimizer._observe()
    # A step with no forward before it (a checkpoint library making the state) is not one of the schedule.
    if attachment is None or attachment.inputs is not None:
        due = attachment is not None and is_due(group)
        for each in optimizer.param_groups:
            each["steps"] = each["steps"] + 1
        optimizer._tell_owner()
        if due:
            attachment.refresh()
        if attachment is not None:
            attachment.inputs = None
    if group["every"] and attachment is None:
        optimizer._warn_once(
            "detached",
            f"{type(optimizer).__name__} was attached with every={group['every']}, but this copy is attached to no "
            "model: call attach(model) again, or h stays as it is",
        )
    elif optimizer._since_refresh > 2 * (group["every"] or 10) and (attachment or not group["refreshes"]):
        optimizer._warn_once(
            "no refresh",
            f"{type(optimizer).__name__} took {optimizer._since_refresh} steps without a curvature refresh, so it is "
            "no second-order method: call attach(model), refresh(model, batches) or update_hessian()",
        )
