"""Curvature estimates, left in `.grad` for the optimizer to fold into `h`.

The gradient of the sampled-label loss (GNB), or the Hessian-vector product (Hutchinson).
"""

from collections import defaultdict

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from growkit import ops
from growkit.optim import distributed


def gnb(processes, calls, key, *, logits=None, mask=None, loss=None):
    """Gauss-Newton-Bartlett: leave in `.grad` the gradient of the *summed* NLL of labels sampled from the model.

    With ghat = grad / N, the gradient of the mean NLL of N labels, E[N*ghat^2] is the diagonal of the Gauss-Newton
    matrix of the mean loss (Sophia, arXiv:2305.14342, Algorithm 2). Returns this process's part of N, a 0-d tensor.
    """
    model, weight = processes.module, processes.weight
    count, row = 0, 0
    for i, (args, kwargs) in enumerate(calls):
        with processes.guarded():
            if loss is None:
                # The true labels only say which positions count: without them the model computes no loss of its own.
                output = model(*args, **{k: v for k, v in kwargs.items() if k not in ("labels", "num_items_in_batch")})
                z, counts = _scored(model, _logits(output) if logits is None else logits(output), args, kwargs, mask)
                z = z.flatten(0, -2)
            else:
                nll, n = loss(model(*args, **kwargs))
        before, whole = processes.rows(0 if loss else len(z), len(calls) - i)
        if loss is None:
            nll, labels, _ = ops.sampled_nll(z, counts, row=row + before, **key)
            n = (labels != -100).sum()
            row += whole
        (nll * n * weight).backward()
        count = count + torch.as_tensor(n)
    processes.sum_()
    return count


def _logits(output):
    z = getattr(output, "logits", output[0] if isinstance(output, (tuple, list)) else output)
    if not isinstance(z, torch.Tensor) or z.dim() < 2 or not z.is_floating_point():
        raise TypeError(
            f"curvature refresh: the model returned {type(output).__name__} without logits [..., V]; "
            "pass logits=callable(output)"
        )
    if z.shape[-1] < 2:
        raise ValueError(
            f"curvature refresh: logits have shape {tuple(z.shape)}, expected at least 2 classes to sample from; "
            "pass loss=callable(output) returning (loss of labels drawn from the model, number of labels)"
        )
    return z


def _scored(model, z, args, kwargs, mask):
    """The logits that the training loss scores, and a bool mask [rows] of them (None: all)."""
    labels = kwargs.get("labels")
    counts = mask(args, kwargs) if mask is not None else None if labels is None else labels != -100
    # transformers' causal models shift inside: position t is scored against label t+1, the last one against nothing.
    if mask is None and z.dim() > 2 and getattr(model, "loss_type", "") in (None, "ForCausalLM"):
        if counts is None and kwargs.get("attention_mask") is not None:
            counts = kwargs["attention_mask"] != 0
        # Masking the last position, not cutting it off, leaves the logits where they are.
        counts = torch.ones(z.shape[:-1], dtype=torch.bool, device=z.device) if counts is None else counts.roll(-1, -1)
        counts[..., -1] = False
    if counts is not None and counts.shape != z.shape[:-1]:
        raise ValueError(
            f"curvature refresh: the mask of labels has shape {tuple(counts.shape)}, expected {tuple(z.shape[:-1])}; "
            "pass mask=callable(args, kwargs)"
        )
    return z, None if counts is None else counts.flatten()


def hutchinson(processes, calls, key, *, loss=None):
    """Hutchinson: leave Hu in `.grad`, H the Hessian of the mean loss over `calls`, u the Rademacher probe of `key`.

    E[u*(Hu)] is the diagonal of H (Sophia, arXiv:2305.14342, Algorithm 1). Reverse over reverse, so every operator of
    the model must be twice differentiable: attention runs in its plain mathematical form, compiled modules eagerly.
    The losses of several processes are averaged, as DDP averages their gradients; u is the same on all of them.
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
        total = None
        for i, (args, kwargs) in enumerate(calls):
            with processes.guarded(), sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
                output = processes.module(*args, **kwargs)
                value = (_loss(output) if loss is None else loss(output)) / (len(calls) * processes.size)
                first = torch.autograd.grad(value, params, create_graph=True, allow_unused=True)
                # A silent zero would hide missing curvature, so a parameter outside the loss is an error.
                if missing := [i for i, g in zip(indices, first, strict=True) if g is None or not g.requires_grad]:
                    raise ValueError(f"Hutchinson refresh: the loss has no second derivative in parameters {missing}")
            processes.rows(0, len(calls) - i)
            second = torch.autograd.grad(first, params, u)
            total = second if total is None else [a + b for a, b in zip(total, second, strict=True)]
        for i, hu in zip(indices, processes.sums(total), strict=True):
            processes.params[i].grad = distributed.shard_of(hu, processes.params[i])


def _loss(output):
    value = getattr(output, "loss", None)
    if value is None:
        raise TypeError(
            f"Hutchinson refresh: the model returned {type(output).__name__} without a loss; "
            "pass labels to the model, or loss=callable(output)"
        )
    return value
