"""The optimizers that are compared, by name; the baselines that neither torch nor growkit has are here."""

import functools

import torch

import growkit

BETA2 = {"adamw": 0.95, "nadamw": 0.95, "lion": 0.95}


class Lion(torch.optim.Optimizer):
    """p <- p*(1 - lr*wd) - lr*sign(b1*m + (1-b1)*g), then m <- b2*m + (1-b2)*g; arXiv:2302.06675, Algorithm 2.

    With b1 = b2 this is the sign of an average of gradients: Sophia whose h is 0. With b1 = b2^2 it is the same with
    Nesterov's momentum.
    """

    def __init__(self, params, lr, betas, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            grads, (b1, b2) = [p.grad for p in params], group["betas"]
            m = [self.state[p].setdefault("exp_avg", torch.zeros_like(p)) for p in params]
            u = torch._foreach_lerp(m, grads, 1 - b1)
            torch._foreach_sign_(u)
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, u, alpha=-group["lr"])
            torch._foreach_lerp_(m, grads, 1 - b2)


class CorrectedSophiaG(growkit.SophiaG):
    """SophiaG whose h is divided by 1 - b2^n after n refreshes, as Adam's moments are."""

    def step(self):
        for group in self.param_groups:
            rho = group.setdefault("uncorrected_rho", group["rho"])
            group["rho"] = rho / (1 - group["betas"][1] ** max(1, int(group["refreshes"])))
        super().step()


class EarlySophiaG(growkit.SophiaG):
    """SophiaG that refreshes after every step until it has done so as often as one step in `every` would in 50."""

    def step(self):
        for group in self.param_groups:
            later = group.setdefault("later", group["every"])
            group["every"] = 1 if int(group["steps"]) < 50 else later
        super().step()


class Several:
    """Optimizers of parts of one model, as one."""

    def __init__(self, *optimizers):
        self.optimizers = optimizers

    @property
    def param_groups(self):
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self):
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def stats(self):
        return self.optimizers[0].stats()


SOPHIAS = {
    "sophiag": growkit.SophiaG,
    "sophiah": growkit.SophiaH,
    "nesterov": functools.partial(growkit.SophiaG, nesterov=True),
    "corrected": CorrectedSophiaG,
    "early": EarlySophiaG,
    "mixed": growkit.SophiaG,
}


def make(model, name, *, lr, beta1, seed, beta2=None, rho=None, weight_decay=0.1, every=10, other_lr=None, eps=None):
    """The optimizer called `name` of all parameters of `model`, attached to it where it has a curvature.

    other_lr: of embeddings, norms and biases, for "adamw" and for "mixed", where these are AdamW's.
    """
    groups = growkit.param_groups(model, weight_decay)
    if other_lr:
        groups[1]["lr"] = other_lr
    beta2 = beta2 or BETA2.get(name, 0.99)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=(beta1, beta2), fused=True)  # a tenth of the time on a CPU
    if name == "nadamw":
        return torch.optim.NAdam(groups, lr=lr, betas=(beta1, beta2), decoupled_weight_decay=True)
    if name == "lion":
        return Lion(groups, lr=lr, betas=(beta1, beta2))
    if name == "sign":
        return Lion(groups, lr=lr, betas=(beta1, beta1))
    matrices, others = (groups[:1], groups[1:]) if name == "mixed" else (groups, [])
    options = {} if eps is None else {"eps": eps}
    optimizer = SOPHIAS[name](matrices, lr=lr, betas=(beta1, beta2), rho=rho, seed=seed, **options)
    optimizer.attach(model, every=every)
    if others:
        return Several(optimizer, torch.optim.AdamW(others, betas=(0.9, 0.95), fused=True))
    return optimizer
