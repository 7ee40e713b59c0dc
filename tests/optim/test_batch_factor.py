"""E[rho*bs*h] = rho * (diagonal of the Gauss-Newton matrix of the mean loss), however the labels come to the refresh.

One refresh gives thousands of independent draws: the model holds R copies of its parameters, each scoring the same n
rows. Over all R*n labels ghat of one copy is 1/R of that copy's own mean gradient over its n labels, so R * N * ghat^2,
N = R*n, is one draw of n * g^2. The estimate goes through the real path: attach or refresh, ops.sampled_nll, the fold.
"""

import pytest
import torch
from torch import nn

from growkit.optim import SophiaG

DRAWS, ROWS, CLASSES = 4096, 8, 5
BETA2, RHO = 0.75, 0.04


class Copies(nn.Module):
    """logits[r, n] = V_r tanh(W_r x_n + b_r), 4 -> 6 -> 5: 60 parameters in each of DRAWS copies, equal at first."""

    def __init__(self):
        super().__init__()
        make = torch.Generator().manual_seed(0)
        shapes = {"W": (6, 4), "b": (6,), "V": (CLASSES, 6)}
        for name, shape in shapes.items():
            one = torch.randn(shape, generator=make, dtype=torch.float64)
            self.register_parameter(name, nn.Parameter(one.expand(DRAWS, *shape).clone()))

    def forward(self, x, counts=None):
        hidden = torch.tanh(torch.einsum("rhi,ni->rnh", self.W, x) + self.b[:, None])
        return torch.einsum("rch,rnh->rnc", self.V, hidden)


def inputs():
    return torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def exact_diagonal(model, x):
    """Mean over rows of the diagonal of J^T (diag(s) - s s^T) J, of one copy, in the order W, b, V."""
    one = [p.detach()[0].clone() for p in model.parameters()]

    def logits(W, b, V):
        return torch.tanh(x @ W.mT + b) @ V.mT

    jacobian = torch.cat([j.flatten(2) for j in torch.func.jacrev(logits, argnums=(0, 1, 2))(*one)], -1)
    s = logits(*one).softmax(-1)
    inner = torch.diag_embed(s) - s[:, :, None] * s[:, None, :]
    return torch.einsum("nip,nij,njp->np", jacobian, inner, jacobian).mean(0)


def draws(optimizer):
    """[DRAWS, parameters]: rho*bs*h of each copy, had its labels been all the labels, without the EMA's 1 - beta2."""
    group = optimizer.param_groups[0]
    h = torch.cat([optimizer.state[p]["hessian"].flatten(1) for p in group["params"]], 1)
    return group["rho"] * group["bs"] * h * DRAWS / (1 - BETA2)


def mask(args, kwargs):
    counts = args[1] if len(args) > 1 else torch.ones(len(args[0]), dtype=torch.bool)
    return counts.expand(DRAWS, -1)


def train(optimizer, model, calls, every=1):
    """One step over `calls` as micro-batches; lr is 0, so that the parameters stay those of the exact diagonal."""
    optimizer.attach(model, every=every, mask=mask, likelihood="categorical")
    for call in calls:
        (model(*call).logsumexp(-1).mean() / len(calls)).backward()
    optimizer.step()


def whole(optimizer, model, x):
    optimizer.refresh(model, [(x,)], mask=mask, likelihood="categorical")
    return x


def micro_batches(sizes):
    def refresh(optimizer, model, x):
        optimizer.refresh(model, [(part,) for part in x.split(sizes)], mask=mask, likelihood="categorical")
        return x

    return refresh


def masked(optimizer, model, x):
    counts = torch.arange(ROWS) % 3 != 1
    parts = [(a, c) for a, c in zip(x.split([5, 3]), counts.split([5, 3]), strict=True)]
    optimizer.refresh(model, parts, mask=mask, likelihood="categorical")
    return x[counts]


def attached(optimizer, model, x):
    train(optimizer, model, [(x,)])
    return x


def accumulated(optimizer, model, x):
    """The refresh takes the last micro-batch alone, and is the curvature of the loss on it."""
    train(optimizer, model, [(x[:5],), (x[5:],)])
    return x[5:]


CASES = {
    "whole": whole,
    "attached": attached,
    "accumulated": accumulated,
    "micro-batches of 4": micro_batches(4),
    "micro-batches of 1": micro_batches(1),
    "uneven": micro_batches([1, 5, 2]),
    "masked": masked,
}


@pytest.mark.parametrize(("case", "bs"), [*((case, 5120) for case in CASES), ("masked", 1)])
def test_rho_bs_h_is_rho_times_the_gauss_newton_diagonal(case, bs):
    model = Copies()
    optimizer = SophiaG(model.parameters(), lr=0.0, rho=RHO, bs=bs, betas=(0.9, BETA2))
    rows = CASES[case](optimizer, model, inputs())
    found, exact = draws(optimizer), RHO * exact_diagonal(model, rows)
    assert exact.numel() == 60 and len(found) >= 4000
    trace = found.sum(1)
    error = trace.std() / len(found) ** 0.5
    assert error < 0.03 * exact.sum()  # a wrong factor would be seen
    assert abs(trace.mean() - exact.sum()) < 3 * error
    z = (found.mean(0) - exact) / (found.std(0) / len(found) ** 0.5)
    assert z.abs().max() < 4.5 and z.square().mean() < 2
