"""Negative log-likelihood of labels sampled from the model's own softmax, for the Gauss-Newton-Bartlett refresh."""

import torch

from growkit.reference import blocks
from growkit.reference.random import LABELS, random_bits


def sampled_nll(logits, mask=None, *, seed, refresh, row=0):
    """Mean negative log-likelihood of labels sampled from the model's own softmax (Sophia, Algorithm 2, lines 3-5).

        y_n ~ softmax(z_n);  nll = sum_n mask_n * (logsumexp(z_n) - z_n[y_n]) / N,  N = sum_n mask_n

    logits: [rows, V], any floating dtype, computed in float32 or wider; mask: bool [rows], True where the label counts
    (default all). The label is the inverse CDF of 24 bits keyed by (seed, refresh, row + n): the first y whose
    cumulative probability exceeds them. Returns (nll: 0-d, labels: int64 [rows], -100 where masked,
    lse: [rows]). N = 0 gives NaN. Temporaries: two blocks of rows, never a logits-sized tensor.
    """
    labels = logits.new_empty(len(logits), dtype=torch.int64)
    lse = logits.new_empty(len(logits), dtype=blocks.wide(logits))
    chosen = torch.empty_like(lse)
    bits = random_bits(32, row, len(logits), seed=seed, stream=LABELS, parameter=0, time=refresh, device=logits.device)
    uniform = (bits >> 8).to(lse.dtype) * 2**-24  # exact, and below 1 in float32
    for rows in _row_blocks(logits):
        z = logits[rows].to(lse.dtype)
        lse[rows] = z.logsumexp(-1)
        cdf = (z - lse[rows, None]).exp_().cumsum_(-1)
        labels[rows] = torch.searchsorted(cdf, uniform[rows, None] * cdf[:, -1:], right=True)[:, 0].clamp_(
            max=logits.shape[1] - 1  # only a row with a NaN reaches past the end
        )
        chosen[rows] = z.gather(1, labels[rows, None])[:, 0]
    if mask is None:
        return (lse - chosen).mean(), labels, lse
    return (lse - chosen)[mask].mean(), labels.masked_fill_(~mask, -100), lse


def sampled_nll_backward(grad, logits, labels, lse, *, out=None):
    """Gradient of `sampled_nll` with respect to the logits: grad * (softmax(z_n) - onehot(y_n)) / N, zero where masked.

    Allocates the result, in the dtype of the logits, unless it goes to `out` (which may be the logits themselves), and
    one block of rows.
    """
    counts = labels != -100
    weight = grad / counts.sum()
    result = torch.empty_like(logits) if out is None else out
    for rows in _row_blocks(logits):
        d = (logits[rows].to(lse.dtype) - lse[rows, None]).exp_()
        d.scatter_add_(1, labels[rows, None].clamp(min=0), d.new_full((len(d), 1), -1))
        result[rows] = torch.where(counts[rows, None], d.mul_(weight), 0)
    return result


def _row_blocks(logits):
    rows = max(1, 2 * blocks.BLOCK // max(1, logits.shape[1]))
    return [slice(i, i + rows) for i in range(0, len(logits), rows)]
