"""Sophia's update as the plainest Triton kernel: a launch per tensor, or one over flat buffers. Baselines only.

Needs Triton when it is imported. The flat form, which knows its one length, is the upper bound for a kernel that walks
many tensors in one launch.
"""

import triton
import triton.language as tl


@triton.jit
def _step(p, g, m, h, n, lr, decay, beta1, gain, rho_bs, eps, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    m_new = tl.load(m + at, mask=inside) * beta1 + tl.load(g + at, mask=inside) * gain
    u = m_new / (tl.load(h + at, mask=inside) * rho_bs + eps)
    u = tl.minimum(tl.maximum(u, -1.0), 1.0)
    tl.store(p + at, tl.load(p + at, mask=inside) * decay - lr * u, mask=inside)
    tl.store(m + at, m_new, mask=inside)


def per_tensor_step_(p, g, m, h, *, lr, beta1, rho_bs, weight_decay, eps=1e-15, block=1024):
    """The update of `growkit.ops.sophia_step_` on contiguous tensors of one dtype, one launch for each."""
    for tensors in zip(p, g, m, h, strict=True):
        n = tensors[0].numel()
        grid = (triton.cdiv(n, block),)
        _step[grid](*tensors, n, lr, 1 - lr * weight_decay, beta1, 1 - beta1, rho_bs, eps, BLOCK=block)
