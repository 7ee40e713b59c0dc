"""Sophia's steps to compare: the official op sequence, and what is timed against it."""

import torch

from growkit import ops
from growkit.bench.measure import paired


def official_step(p, g, m, h, *, lr, beta1, rho_bs, weight_decay, maximize=False):
    """The operations of the official SophiaG (Liu et al., arXiv:2305.14342), one by one and in its order."""
    g = -g if maximize else g
    p.mul_(1 - lr * weight_decay)
    m.mul_(beta1).add_(g, alpha=1 - beta1)
    ratio = (m.abs() / (rho_bs * h + 1e-15)).clamp(None, 1)
    p.addcmul_(m.sign(), ratio, value=-lr)


class OfficialSophia(torch.optim.Optimizer):
    """The official SophiaG, operation by operation: step(bs=) and update_hessian() on the gradients in `.grad`."""

    def __init__(self, params, lr, betas, rho, weight_decay):
        super().__init__(params, {"lr": lr, "betas": betas, "rho": rho, "weight_decay": weight_decay})
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = {"exp_avg": torch.zeros_like(p), "hessian": torch.zeros_like(p)}

    @torch.no_grad()
    def step(self, closure=None, bs=5120):
        for group in self.param_groups:
            scalars = {"lr": group["lr"], "beta1": group["betas"][0], "rho_bs": group["rho"] * bs}
            for p in group["params"]:
                m, h = self.state[p]["exp_avg"], self.state[p]["hessian"]
                official_step(p, p.grad, m, h, **scalars, weight_decay=group["weight_decay"])

    @torch.no_grad()
    def update_hessian(self):
        for group in self.param_groups:
            beta2 = group["betas"][1]
            for p in group["params"]:
                self.state[p]["hessian"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)


def gpt2_shapes(layers=12, width=384, vocabulary=50257, positions=1024):
    """Shapes of the parameters of a GPT-2, biases and norms included."""
    d = width
    block = [(d,), (d,), (d, 3 * d), (3 * d,), (d, d), (d,), (d,), (d,), (d, 4 * d), (4 * d,), (4 * d, d), (d,)]
    return [(vocabulary, d), (positions, d), *(block * layers), (d,), (d,)]


def cpu_step(shapes, rounds=9):
    """`paired` of the official step and `growkit.ops.sophia_step_`; raises unless both leave the same bits."""
    make = torch.Generator().manual_seed(0)
    scales = {"p": 0.02, "g": 1e-3, "m": 1e-3, "h": 1e-5}
    ours = {k: [torch.randn(s, generator=make).mul_(x) for s in shapes] for k, x in scales.items()}
    for h in ours["h"]:
        h.abs_()
    theirs = {k: [t.clone() for t in tensors] for k, tensors in ours.items()}
    scalars = {"lr": 6e-4, "beta1": 0.965, "rho_bs": 0.05 * 5120, "weight_decay": 0.2}

    def official():
        for tensors in zip(*theirs.values(), strict=True):
            official_step(*tensors, **scalars)

    result = paired(official, lambda: ops.sophia_step_(*ours.values(), eps=1e-15, **scalars), rounds)
    for _ in range(rounds):  # ours ran twice as often
        official()
    for key in ("p", "m"):
        for a, b in zip(ours[key], theirs[key], strict=True):
            if not torch.equal(a, b):
                raise AssertionError(f"sophia_step_ and the official step differ in {key}")
    return result
