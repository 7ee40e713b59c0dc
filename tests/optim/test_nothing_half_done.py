"""Any exception out of a public method leaves everything bit-equal, and training goes on as if nothing had happened.

WAYS is a table of methods and ways to fail. A way breaks something of the training through `patch`, which mends it
afterwards, and returns the call that must raise.
"""

import copy
import functools
import random
import warnings

import numpy as np
import pytest
import torch
from optim.runs import assert_same
from torch import nn
from torch.nn import functional as F

from growkit.optim import SophiaG, SophiaH

CLASSES = torch.arange(6) % 3


class Mine(Exception):
    pass


def raises(*_, **__):
    raise Mine


def fails(*_, **__):
    """Within a refresh, where random numbers drawn leave no trace."""
    random.random(), np.random.rand(), torch.rand(1)
    raise Mine


class FailsBackward(torch.autograd.Function):
    forward = staticmethod(lambda ctx, x: x.clone())
    backward = staticmethod(fails)


class Model(nn.Module):
    """Dropout, buffers and a counter that a forward changes, parameters of two dtypes."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.drop = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.1)
        self.head = nn.Linear(8, 3, dtype=torch.bfloat16)
        self.calls = 0

    def within(self, z):
        return z

    def forward(self, x):
        self.calls += 1
        return self.head(self.within(self.drop(self.norm(self.embed(x)).tanh())).bfloat16()).float()


def loss_of(z):
    return F.cross_entropy(z, CLASSES)


class Training:
    """One attached step taken, and the backward of the next one; every step refreshes."""

    def __init__(self, cls):
        torch.manual_seed(0)
        self.cls, self.model = cls, Model()
        self.batches = torch.randn(3, 6, 4)
        self.key = "likelihood" if cls is SophiaG else "loss"
        self.told = {self.key: (lambda z: (loss_of(z), 6)) if cls is SophiaG else loss_of}
        parts = self.model.embed, self.model.norm, self.model.head
        self.optimizer = cls([{"params": part.parameters()} for part in parts], 1e-2, seed=3)
        self.attach()
        # Faults are in the last group: those before it could have moved.
        self.group, self.weight = self.optimizer.param_groups[-1], self.model.head.weight
        self.backward(0)
        self.optimizer.step()
        self.backward(1)
        self.state = self.optimizer.state[self.weight]

    def attach(self):
        self.optimizer.attach(self.model, every=1, **self.told)

    def backward(self, i):
        self.optimizer.zero_grad()
        loss_of(self.model(self.batches[i])).backward()

    def everything(self):
        optimizer, model = self.optimizer, self.model
        groups = optimizer.param_groups
        return {
            "parameters": [p.detach().clone() for p in model.parameters()],
            "gradients": [(id(p.grad), p.grad.to_dense().clone()) for p in model.parameters()],
            "model": [model.calls, model.training, [b.clone() for b in model.buffers()]],
            "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
            "state": [copy.deepcopy(optimizer.state.get(p)) for group in groups for p in group["params"]],
            "groups": [{k: copy.deepcopy(v) for k, v in group.items() if k != "params"} for group in groups],
            "members": [[id(p) for p in group["params"]] for group in groups],
            "told": [optimizer.stats(), optimizer.metrics(), optimizer._attachment is None],
            "random": [torch.get_rng_state(), random.getstate(), repr(np.random.get_state())],
        }

    def goes_on(self):
        """What another step makes of everything."""
        if self.optimizer._attachment is None:
            self.attach()
        torch.manual_seed(5)
        self.backward(2)
        self.optimizer.step()
        params = list(self.model.parameters())
        return [p.detach() for p in params], [sorted(self.optimizer.state[p].items()) for p in params]


@functools.cache
def undisturbed(cls):
    return Training(cls).goes_on()


def step(t):
    return t.optimizer.step


def refresh(t):
    return lambda: t.optimizer.refresh(t.model, [t.batches[1]], **t.told)


def then(way, call):
    """The way of failing, and the call that meets it."""
    return lambda t, patch: (way(t, patch), call(t))[1]


def warned(way):
    """The warnings of a call are errors."""
    return lambda t, patch: (way(t, patch), warnings.simplefilter("error"))[0]


def update_hessian(t):
    return t.optimizer.update_hessian


# --- in the model, while it runs for a refresh ---


def interrupts(*_):
    raise KeyboardInterrupt


MODEL = {
    "the forward raises": lambda t, patch: patch.setattr(Model, "within", fails),
    "the backward raises": lambda t, patch: patch.setattr(Model, "within", lambda model, z: FailsBackward.apply(z)),
    "a hook of an activation": lambda t, patch: patch.setattr(
        Model, "within", lambda model, z: (z.register_hook(fails), z)[1]
    ),
    "an interrupt": lambda t, patch: patch.setattr(Model, "within", interrupts),
}


def returns(g, h):
    """What the user's likelihood= (SophiaG) or loss= (SophiaH) returns."""

    def way(t, patch):
        own = g if t.cls is SophiaG else h
        patch.setitem(t.told, t.key, own)
        patch.setitem(t.optimizer._attachment.options, t.key, own)

    return way


MODEL |= {
    "the option raises": returns(fails, fails),
    "the option returns words": returns(lambda z: "3", lambda z: "3"),
    "six losses": returns(lambda z: (z[:, 0], 6), lambda z: z[:, 0]),
    "no gradient": returns(lambda z: (z.mean().detach(), 6), lambda z: z.mean().detach()),
    "two counts": returns(lambda z: (z.mean(), torch.ones(2)), lambda z: (z.mean(), 6)),
    "a count in words": returns(lambda z: (z.mean(), "6"), lambda z: None),
    "a negative count": returns(lambda z: (z.mean(), -6), lambda z: -6),
}

# --- in a group, a gradient or a state, when an op is about to be called on them ---


def option(key, value):
    return lambda t, patch: patch.setitem(t.group, key, value)


def of_state(key, make):
    return lambda t, patch: patch.setitem(t.state, key, make(t.state[key]))


def inference(x):
    with torch.inference_mode():
        return x.clone()


OPTIONS = {"lr": ["1e-4", None, torch.ones(2)], "rho": ["auto", -1.0, torch.ones(2)], "eps": [None], "bs": [0, "64"]}
OPTIONS |= {"weight_decay": [float("inf"), torch.ones(2)], "betas": [(0.9, 2.0), 0.9, [0.9, None]], "seed": [0.5]}
OPTIONS |= {"maximize": ["false"], "capturable": [True], "differentiable": [True], "bf16_update": ["up"]}
OPTIONS |= {"nesterov": [1], "state_dtype": [torch.float64], "clip_grad_norm": [-1.0], "target_unclipped": [2.0]}
GROUP = {f"{key}={value}": option(key, value) for key, values in OPTIONS.items() for value in values}
STATE = {
    "h of another shape": of_state("hessian", lambda h: h[:1]),
    "integer m": of_state("exp_avg", torch.Tensor.long),
    "8-bit m without scales": of_state("exp_avg", torch.Tensor.char),
    "complex m": of_state("exp_avg", lambda m: m + 0j),
    "sparse h": of_state("hessian", torch.Tensor.to_sparse),
    "expanded m": of_state("exp_avg", lambda m: m[:1].clone().expand(m.shape)),
    "h of inference_mode": of_state("hessian", inference),
    "h on another device": of_state("hessian", lambda h: h.to("meta")),
    "a list for h": of_state("hessian", torch.Tensor.tolist),
    "a number for step": of_state("step", float),
    "no step": lambda t, patch: patch.delitem(t.state, "step"),
    "no h": lambda t, patch: patch.delitem(t.state, "hessian"),
}
GRADIENT = {
    "a sparse gradient": lambda t, patch: patch.setattr(t.weight, "grad", t.weight.grad.to_sparse()),
    "a parameter of another shape": lambda t, patch: patch.setattr(t.weight, "data", t.weight.data[:1].clone()),
    "an expanded parameter": lambda t, patch: patch.setattr(t.weight, "data", t.weight.data[:1].clone().expand(3, 8)),
}

# --- in arguments ---


def probes(make):
    return lambda t, patch: lambda: t.optimizer.update_hessian(make([p.grad for p in t.model.parameters()]))


CALLS = {
    "step: the closure raises": lambda t, patch: lambda: t.optimizer.step(raises),
    "step: a warning": warned(then(lambda t, patch: patch.setattr(t.optimizer, "_since_refresh", 99), step)),
    "step: its hook raises": then(
        lambda t, patch: patch.setitem(t.optimizer._optimizer_step_pre_hooks, 99, raises), step
    ),
    **{f"step: bs={bs!r}": lambda t, patch, bs=bs: lambda: t.optimizer.step(bs=bs) for bs in (0, "64", 64)},
    "update_hessian: probes that are none": probes(lambda u: 3),
    "update_hessian: a probe less": probes(lambda u: u[:-1]),
    "update_hessian: a probe of another shape": probes(lambda u: [*u[:-1], torch.ones(2)]),
    "update_hessian: complex probes": probes(lambda u: [*u[:-1], u[-1] + 0j]),
    "refresh: a hook raises": then(lambda t, patch: patch.setitem(t.model.norm._forward_hooks, 99, fails), refresh),
    "refresh: a pre-hook raises": then(
        lambda t, patch: patch.setitem(t.model.head._forward_pre_hooks, 99, fails), refresh
    ),
    "refresh: no batches": lambda t, patch: lambda: t.optimizer.refresh(t.model, [], **t.told),
    "refresh: one bare batch": lambda t, patch: lambda: t.optimizer.refresh(t.model, t.batches[0], **t.told),
    "refresh: a second batch that does not fit": lambda t, patch: (
        lambda: t.optimizer.refresh(t.model, [t.batches[0], torch.ones(6, 5)], **t.told)
    ),
    "refresh: batches that raise": lambda t, patch: (
        lambda: t.optimizer.refresh(t.model, map(raises, t.batches), **t.told)
    ),
    "refresh: no model": lambda t, patch: lambda: t.optimizer.refresh(None, [t.batches[0]], **t.told),
    "refresh: an option that is none": lambda t, patch: (
        lambda: t.optimizer.refresh(t.model, [t.batches[0]], **{t.key: 3})
    ),
    "attach: twice": lambda t, patch: t.attach,
}


def attaches(**arguments):
    def way(t, patch):
        t.optimizer.detach()
        given = {"logits" if t.cls is SophiaG and key == "loss" else key: value for key, value in arguments.items()}
        return lambda: t.optimizer.attach(**{"model": t.model, **given})

    return way


CALLS["attach: a warning"] = lambda t, patch: warned(attaches(model=t.model.embed))(t, patch)
WRONG = {"model": [Model(), None], "every": [0, 2.0, True], "phase": ["late"], "loss": ["z"]}
CALLS |= {f"attach: {key}={value}": attaches(**{key: value}) for key, values in WRONG.items() for value in values}


def adds(change):
    def way(t, patch):
        group = change({"params": [nn.Parameter(torch.zeros(2))]}, t)
        return lambda: t.optimizer.add_param_group(group)

    return way


CALLS |= {
    "add_param_group: a list": adds(lambda group, t: [group]),
    "add_param_group: nothing": adds(lambda group, t: {}),
    "add_param_group: a known parameter": adds(lambda group, t: {"params": [t.weight]}),
    "add_param_group: no leaf": adds(lambda group, t: {"params": [t.weight * 2]}),
    "add_param_group: a warning": warned(
        adds(lambda group, t: {"params": [nn.Parameter(torch.zeros(2).bfloat16())], "bf16_update": "nearest"})
    ),
    "add_param_group: fused": adds(lambda group, t: group | {"fused": True}),
}
CALLS |= {
    f"add_param_group: {key}={value}": adds(lambda group, t, key=key, value=value: group | {key: value})
    for key, values in (OPTIONS | {"clip_grad_norm": [1.0], "target_unclipped": [0.5]}).items() if key != "capturable"
    for value in values
}  # fmt: skip


def loads(change):
    """A file in which everything else is new."""

    def way(t, patch):
        file = copy.deepcopy(t.optimizer.state_dict())
        for state in file["state"].values():
            state["hessian"] += 1
        for group in file["param_groups"]:
            group |= {"rho": 7.0, "steps": torch.tensor(9)}
        file = change(file) or file
        return lambda: t.optimizer.load_state_dict(file)

    return way


def in_file(**values):
    return loads(lambda file: file["state"][5].update(values))


FILES = {
    "a warning": warned(loads(lambda file: file["param_groups"][-1].__delitem__("bs"))),
    "a list": loads(lambda file: [file]),
    "no groups": loads(lambda file: {"state": file["state"]}),
    "no state": loads(lambda file: {"param_groups": file["param_groups"]}),
    "a group less": loads(lambda file: file["param_groups"].pop() and None),
    "a parameter less": loads(lambda file: file["param_groups"][-1]["params"].pop() and None),
    "h of another shape": in_file(hessian=torch.zeros(4)),
    "a list for h": in_file(hessian=[0.0]),
    "step in words": in_file(step="ten"),
    "no m": loads(lambda file: file["state"][5].__delitem__("exp_avg")),
    "steps in words": loads(lambda file: file["param_groups"][-1].update(steps="ten")),
    "of another class": loads(lambda file: file["param_groups"][-1].update(curvature="other")),
}
FILES |= {
    f"{key}={value}": loads(lambda file, key=key, value=value: file["param_groups"][-1].update({key: value}))
    for key, values in OPTIONS.items() if key != "capturable" for value in values if key != "state_dtype"
}  # fmt: skip
CALLS |= {f"load_state_dict: {name}": way for name, way in FILES.items()}
CALLS |= {
    f"load_state_dict: a {kind}-hook raises": lambda t, patch, kind=kind: (
        patch.setitem(getattr(t.optimizer, f"_optimizer_load_state_dict_{kind}_hooks"), 99, raises),
        loads(lambda file: None)(t, patch),
    )[1]
    for kind in ("pre", "post")
}


TABLE = [(step, MODEL), (refresh, MODEL), (step, GROUP | STATE | GRADIENT)]
TABLE += [(update_hessian, GROUP | STATE | GRADIENT), (refresh, STATE)]
WAYS = {f"{call.__name__}: {name}": then(way, call) for call, faults in TABLE for name, way in faults.items()} | CALLS


# What a class itself runs is tried with both.
OWN = [f"{call.__name__}: {name}" for call in (step, refresh) for name in MODEL]
OWN += [name for name in WAYS if name.startswith("update_hessian")]


@pytest.mark.parametrize(("name", "cls"), [*((name, SophiaG) for name in WAYS), *((name, SophiaH) for name in OWN)])
def test_an_exception_leaves_everything_bit_equal(name, cls):
    t = Training(cls)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        call = WAYS[name](t, patch)
        before = t.everything()
        with pytest.raises((Exception, KeyboardInterrupt)):
            call()
        assert_same(before, t.everything())
    assert_same(t.goes_on(), undisturbed(cls))
