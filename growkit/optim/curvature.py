"""Curvature estimates, left in `.grad` for the optimizer to fold into `h`.

The gradient of the sampled-label loss (GNB), or the Hessian-vector product (Hutchinson).
"""

from __future__ import annotations

import contextlib
import dataclasses
import numbers
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from growkit import ops
from growkit.optim import distributed
from growkit.optim import likelihood as likelihoods
from growkit.optim.likelihood import Likelihood, Scored
from growkit.optim.processes import Processes
from growkit.optim.replay import Call
from growkit.warn import warn

_HOW = (
    "likelihood='categorical' for cross-entropy, 'bernoulli' for binary cross-entropy with logits, "
    "growkit.optim.gaussian(sigma) for squared errors (sigma=0.5**0.5 is nn.MSELoss), or a callable(output) that "
    "returns (mean NLL of labels drawn from the model, number of labels)"
)


def unknown(z: torch.Tensor) -> str:
    """What to say of an output whose gradient is that of no likelihood known here."""
    return (
        f"curvature refresh: the gradient of the training loss at the output {tuple(z.shape)} is neither that of a "
        f"cross-entropy nor that of a binary cross-entropy: pass {_HOW}; or logits=callable(output), if the loss is "
        "one of those but reads something else"
    )


def gradients(loss: torch.Tensor, params: list[torch.Tensor]) -> None:
    """Add the gradient of `loss` with respect to each of `params`, and to nothing else, to its `.grad`."""
    # torch refuses autograd.grad in the one case and gives None in the other; `undisturbed` puts aside what else is
    # touched here.
    if any(map(distributed.is_sharded, params)) or _reentrant(loss):
        loss.backward()
        return
    for p, g in zip(params, torch.autograd.grad(loss, params, allow_unused=True), strict=True):
        if g is not None:
            p.grad = g if p.grad is None else p.grad + g


def _dense(g):
    """A hook of the parameter, put aside here, may be what makes the gradient of a sparse embedding dense."""
    return g if g.layout == torch.strided else g.to_dense()


def _reentrant(loss):
    """Whether the graph holds a checkpoint of `use_reentrant=True`."""
    if loss.grad_fn is None:
        return False
    return any(node.name() == "CheckpointFunctionBackward" for node in likelihoods.behind(loss.grad_fn))


def gnb(
    processes: Processes,
    calls: list[Call],
    key: dict,
    known: dict,
    *,
    logits: Callable | None = None,
    mask: Callable | None = None,
    likelihood: Likelihood | None = None,
) -> tuple[torch.Tensor, set]:
    """Gauss-Newton-Bartlett: leave in `.grad` the gradient of the *summed* NLL of labels sampled from the model.

    With ghat = grad / N, the gradient of the mean NLL of N labels, E[N*ghat^2] is the diagonal of the Gauss-Newton
    matrix of the mean loss (Sophia, arXiv:2305.14342, Algorithm 2). Returns this process's part of N, a 0-d tensor, and
    the parameters that the estimate reaches here.

    known: {path of an output: Scored}, of earlier refreshes; what is learned here is added. The gradient of the model's
    own loss, in the training call or in this one, says which rows of which output count, and by which likelihood.
    """
    params = [p for p in processes.params if p.requires_grad]
    count, row = torch.zeros((), dtype=torch.int64), 0
    for i, call in enumerate(calls):
        with processes.guarded():
            if callable(likelihood):
                nll, n = _of_callable(likelihood(_output(processes.module, call)))
                total = nll * n
            else:
                z, scored = _scored(processes.module, call, known, logits, mask, likelihood)
        before, whole = processes.rows(0 if callable(likelihood) else likelihoods.keys(z, scored), len(calls) - i)
        if not callable(likelihood):
            total, n = likelihoods.sampled(z, scored, row=row + before, **key)
            row += whole
        gradients(total * processes.weight, params)
        count = count + n
    reached = {p for p in params if p.grad is not None}
    for p in reached:
        p.grad = _dense(p.grad)
    processes.sum_()
    return count, reached


def _of_callable(told):
    """What the user's own likelihood returned, as (NLL, labels), both 0-d tensors."""
    nll, n = told if isinstance(told, tuple) and len(told) == 2 else (None, None)
    number = isinstance(n, numbers.Real) and 0 <= n < float("inf")
    if (
        not isinstance(nll, torch.Tensor)
        or nll.numel() != 1
        or not nll.requires_grad
        or not (n.numel() == 1 if isinstance(n, torch.Tensor) else number)
    ):
        given = told if not isinstance(told, torch.Tensor) else f"a tensor {tuple(told.shape)}"
        raise TypeError(
            f"likelihood= returned {given}, expected (mean NLL of labels drawn from the model, a scalar with a "
            "gradient; their number)"
        )
    return nll.reshape(()), torch.as_tensor(n).reshape(())


def _output(model, call):
    # The loss inside of a compiled graph shows no gradient at the logits; the same call does, run eagerly.
    with contextlib.nullcontext() if call.scored else torch.compiler.set_stance("force_eager"):
        return call(model)


def _scored(model, call, known, logits, mask, likelihood):
    """(the output that the loss reads, what is known of it)"""
    output = _output(model, call)
    found = likelihoods.candidates(output)
    if logits is not None:
        z = logits(output)
        _check_logits(z, output)
        edge = likelihoods.edge_of(z) if z.grad_fn is not None else None
        outputs = likelihoods.differentiable(output)
        paths = [path for path, t in outputs.items() if t.shape == z.shape and likelihoods.edge_of(t) == edge]
        found = {paths[0] if paths else (): z}
    scored = call.scored or _of_own_loss(model, call, output, found, logits, known)
    if len(found) > 1:
        read = {path: t for path, t in found.items() if path in scored and not scored[path].empty()}
        found = read or found
    if len(found) != 1:
        names = ", ".join(".".join(map(str, path)) for path in found)
        raise TypeError(
            f"curvature refresh: the model returned {type(output).__name__} "
            + (f"with several outputs that a loss may read ({names})" if found else "without logits")
            + ": pass logits=callable(output) that returns the one to draw labels for, or likelihood=callable(output)"
        )
    ((path, z),) = found.items()
    _check_logits(z, output)
    told = scored.get(path)
    if likelihood is not None:
        told = _declared(z, told, likelihood, logits is not None)
    elif told is None:
        told = known.get(path)
        if told is None:
            raise TypeError(
                "curvature refresh: neither a loss of the model nor a training step tells what its output "
                f"{tuple(z.shape)} is scored by: pass {_HOW}"
            )
        told = dataclasses.replace(told, rows=None)
    if told.silent:
        return z, told
    if told.likelihood is None:
        raise TypeError(unknown(z))
    if path not in known:
        if not told.certain:
            warn(
                "the gradient of the training loss is not quite that of a cross-entropy with one label a row (smoothed "
                "or soft labels, weights of classes?). The curvature is estimated for one: pass "
                "likelihood='categorical' if that is right, or else another likelihood"
            )
        known[path] = dataclasses.replace(told, rows=None)
    return z, told if mask is None else dataclasses.replace(told, rows=_masked(z, told, mask, call))


def _check_logits(z, output):
    if not isinstance(z, torch.Tensor) or z.dim() < 1 or not z.is_floating_point():
        raise TypeError(
            f"curvature refresh: the model returned {type(output).__name__} without logits [..., V]; "
            "pass logits=callable(output)"
        )


def _of_own_loss(model, call, output, found, logits, known):
    """What the gradient of the loss that the model itself returned says at the outputs `found`."""
    if likelihoods.loss_of(output) is None or not found:
        return {}
    if any(map(distributed.is_sharded, model.parameters())):  # FSDP2 goes backward through a forward only once
        output = _output(model, call)
        found = {(): logits(output)} if logits is not None else likelihoods.candidates(output)
    found = {path: t for path, t in found.items() if t.grad_fn is not None}
    edges = [likelihoods.edge_of(t) for t in found.values()]
    grads = torch.autograd.grad(likelihoods.loss_of(output), edges, retain_graph=True, allow_unused=True)
    items = zip(found.items(), grads, strict=True)
    return {path: likelihoods.read(t.detach(), g, known.get(path)) for (path, t), g in items if g is not None}


def _declared(z, told, likelihood, named):
    """`told` by the gradient, corrected by what the user says."""
    if told is not None and told.silent:
        return told
    if told is not None and told.likelihood == likelihood:
        return dataclasses.replace(told, certain=True)
    axis = None
    if likelihood == "categorical":
        axis = z.dim() - 1
        if z.dim() > 3 and not named:
            raise ValueError(
                f"curvature refresh: which axis of the output {tuple(z.shape)} holds the classes is not known: pass "
                "logits=callable(output) that returns them last, as output.movedim(1, -1)"
            )
        if z.shape[-1] < 2:
            raise ValueError(
                f"curvature refresh: logits have shape {tuple(z.shape)}, expected at least 2 classes to sample from"
            )
    rows = None if told is None or told.gradient is None else likelihoods.nonzero(told.gradient, axis)
    return Scored(likelihood, axis, rows)


def _masked(z, scored, mask, call):
    rows = mask(call.args, call.kwargs)
    expected = z.shape if scored.axis is None else z.shape[: scored.axis] + z.shape[scored.axis + 1 :]
    if not isinstance(rows, torch.Tensor) or rows.shape != expected:
        raise ValueError(
            f"curvature refresh: the mask of labels has shape {tuple(getattr(rows, 'shape', ()))}, "
            f"expected {tuple(expected)}; pass mask=callable(args, kwargs)"
        )
    return rows.bool()


def hutchinson(
    processes: Processes,
    calls: list[Call],
    key: dict,
    known: dict,
    *,
    loss: Callable[[Any], torch.Tensor] | None = None,
) -> tuple[None, set]:
    """Hutchinson: leave Hu in `.grad`, H the Hessian of the mean loss over `calls`, u the Rademacher probe of `key`.

    E[u*(Hu)] is the diagonal of H (Sophia, arXiv:2305.14342, Algorithm 1). Reverse over reverse, so every operator of
    the model must be twice differentiable: attention runs in its plain mathematical form, compiled modules eagerly.
    The losses of several processes are averaged, as DDP averages their gradients; u is the same on all of them.
    Returns None, for no labels are counted, and the parameters that the loss uses here; the others have no curvature.
    """
    with processes.unsharded() as whole:
        indices = [i for i, p in enumerate(processes.params) if p.requires_grad]
        params = [whole[i] for i in indices]
        u = [torch.empty_like(p) for p in params]
        buckets = defaultdict(lambda: ([], []))
        for i, t in zip(indices, u, strict=True):
            numbers, tensors = buckets[t.device, t.dtype]
            numbers.append(i)
            tensors.append(torch.view_as_real(t) if t.is_complex() else t)
        for parameter, tensors in buckets.values():
            ops.rademacher_(tensors, parameter=parameter, **key)
        total = [None] * len(params)
        for i, call in enumerate(calls):
            # Checkpoints run their forward again in either backward: to the same operators.
            with processes.guarded(), sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
                value = _loss(call(processes.module), loss) / (len(calls) * processes.size)
                first = torch.autograd.grad(value, params, create_graph=True, allow_unused=True)
                used = [k for k, g in enumerate(first) if g is not None and g.requires_grad]
                if not used:  # a silent zero would hide missing curvature
                    raise ValueError(f"Hutchinson refresh: the loss has no second derivative in parameters {indices}")
                second = torch.autograd.grad([first[k] for k in used], [params[k] for k in used], [u[k] for k in used])
            processes.rows(0, len(calls) - i)
            for k, hu in zip(used, map(_dense, second), strict=True):
                total[k] = hu if total[k] is None else total[k] + hu
        reached = {processes.params[i] for i, hu in zip(indices, total, strict=True) if hu is not None}
        del value, first, second, hu  # the graph, and what is in `total`
        if processes.size > 1:  # what one process leaves idle another may use
            total = [torch.zeros_like(p) if hu is None else hu for p, hu in zip(params, total, strict=True)]
            processes.sums_(total)
        for i, hu in zip(indices, total, strict=True):
            if hu is not None:
                processes.params[i].grad = distributed.shard_of(hu, processes.params[i])
    return None, reached


def _loss(output, loss):
    value = likelihoods.loss_of(output) if loss is None else loss(output)
    if value is None:
        raise TypeError(
            f"Hutchinson refresh: the model returned {type(output).__name__} without a loss; "
            "pass labels to the model, or loss=callable(output)"
        )
    if not isinstance(value, torch.Tensor) or value.numel() != 1 or not value.requires_grad:
        raise TypeError(f"Hutchinson refresh: the loss is {value!r}, expected a scalar tensor with a gradient")
    if _reentrant(value):
        raise RuntimeError(
            "Hutchinson refresh: a gradient checkpoint with use_reentrant=True cannot be differentiated twice, "
            "expected use_reentrant=False"
        )
    return value
