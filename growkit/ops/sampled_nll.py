"""Likelihood of sampled labels, with its gradient: see `growkit.reference.sampled_nll`."""

import torch

from growkit import reference
from growkit.ops.registry import define, library, with_kernel


def _sampled_nll_fake(logits, mask=None, *, seed, refresh, row=0, overwrite=False):
    torch._check_value(
        logits.dim() == 2 and logits.is_floating_point(),
        lambda: f"sampled_nll: logits have shape {tuple(logits.shape)} and {logits.dtype}, expected floats [rows, V]",
    )
    torch._check_value(
        mask is None or (mask.dtype == torch.bool and mask.shape == logits.shape[:1]),
        lambda: f"sampled_nll: mask has shape {tuple(mask.shape)} and {mask.dtype}, expected bool [{len(logits)}]",
    )
    lse = logits.new_empty(len(logits), dtype=torch.promote_types(logits.dtype, torch.float32))
    return lse.new_empty(()), lse.new_empty(len(logits), dtype=torch.int64), lse


_sample = with_kernel("sampled_nll", reference.sampled_nll)
_sample_backward = with_kernel("sampled_nll", reference.sampled_nll_backward)
define(
    "sampled_nll(Tensor logits, Tensor? mask=None, *, int seed, int refresh, int row=0, bool overwrite=False)"
    " -> (Tensor, Tensor, Tensor)",
    lambda logits, mask=None, *, overwrite=False, **key: _sample(logits, mask, **key),
    _sampled_nll_fake,
)
define(
    "sampled_nll_backward(Tensor grad, Tensor logits, Tensor labels, Tensor lse) -> Tensor",
    _sample_backward,
    lambda grad, logits, labels, lse: torch.empty_like(logits),
)


def _sample_backward_in_place(grad, logits, labels, lse):
    _sample_backward(grad, logits, labels, lse, out=logits)


define(
    "sampled_nll_backward_(Tensor grad, Tensor(a!) logits, Tensor labels, Tensor lse) -> ()",
    _sample_backward_in_place,
    lambda grad, logits, labels, lse: None,
)


def _sampled_nll_setup(ctx, inputs, keyword_only_inputs, output):
    _, labels, lse = output
    ctx.overwrite = keyword_only_inputs["overwrite"]
    ctx.save_for_backward(inputs[0], labels, lse)
    ctx.mark_non_differentiable(labels, lse)


def _sampled_nll_gradient(ctx, grad, *_):
    logits, labels, lse = ctx.saved_tensors
    if not ctx.overwrite:
        return torch.ops.growkit.sampled_nll_backward(grad, logits, labels, lse), None
    logits = logits.detach()
    torch.ops.growkit.sampled_nll_backward_(grad, logits, labels, lse)
    return logits, None


torch.library.register_autograd(
    "growkit::sampled_nll", _sampled_nll_gradient, setup_context=_sampled_nll_setup, lib=library
)


def sampled_nll(logits, mask=None, *, seed, refresh, row=0, overwrite=False):
    _sampled_nll_fake(logits, mask, seed=seed, refresh=refresh, row=row)
    return torch.ops.growkit.sampled_nll(logits, mask, seed=seed, refresh=refresh, row=row, overwrite=overwrite)


sampled_nll.__doc__ = f"""{reference.sampled_nll.__doc__.rstrip()}

    overwrite: let the backward write the gradient into the memory of the logits, where nothing else needs them any
    more; by default it allocates one tensor of that size. Autograd raises RuntimeError if a node had saved them.
    """
