"""Which tensors go into one call: dtypes, layouts, parameters without gradients, and what is kept from step to step."""

import copy
import gc
import runpy
import sys
import types

import pytest
import torch
from optim.runs import BOTH, assert_same, fill_grads, params, snapshot
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import Parameter

from growkit.kernels import cpu, lists
from growkit.optim import SophiaG


@BOTH
def test_one_optimizer_serves_several_dtypes_and_layouts(cls):
    def make():
        mixed = [params((4, 3), dtype=d)[0] for d in (torch.float32, torch.float64, torch.bfloat16, torch.complex64)]
        return [*mixed, Parameter(torch.randn(3, 6).mT), Parameter(torch.randn(2, 3, 4, 5)[..., ::2])]

    together = make()
    alone = [Parameter(p.detach().clone()) for p in together]
    joint = cls(together, 1e-2)
    single = [cls([p], 1e-2) for p in alone]
    for step in range(5):
        for p, q, optimizer in zip(together, alone, single, strict=True):
            fill_grads([p], step), fill_grads([q], step)
            optimizer.step()
        joint.step()
    for p, q, optimizer in zip(together, alone, single, strict=True):
        if p.dtype == torch.bfloat16:  # other index, so other rounding bits: at most one step of the format apart
            torch.testing.assert_close(p, q, rtol=5 * 2**-7, atol=1e-3)
            assert joint.state[p]["exp_avg"].dtype == torch.float32
        else:
            assert torch.equal(p, q)
        assert torch.equal(joint.state[p]["exp_avg"], optimizer.state[q]["exp_avg"])


@BOTH
def test_parameters_without_gradient_stay_and_get_no_state(cls):
    ps = params((4, 3), (5,))
    before = ps[1].detach().clone()
    optimizer = cls(ps)
    fill_grads(ps[:1], 0)
    optimizer.step()
    assert torch.equal(ps[1], before) and ps[1] not in optimizer.state
    cls(ps).step()  # no gradient at all
    fill_grads(ps, 1)
    optimizer.step()  # joins later
    assert optimizer.state[ps[1]]["step"] is optimizer.state[ps[0]]["step"]


def test_kept_buckets_follow_parameters_gradients_and_state_that_change():
    """What step() keeps from call to call never outlives what it was made of."""
    ps, twins = params((4, 3), (5,)), params((4, 3), (5,))
    a, b = SophiaG(ps, 1e-2), SophiaG(twins, 1e-2)

    def both(change):
        for optimizer, own in ((a, ps), (b, twins)):
            fill_grads(own, 3)
            change(optimizer, own)
            if optimizer is b:
                optimizer._buckets.clear()
            optimizer.step()
        assert_same(snapshot(a), snapshot(b))

    both(lambda o, own: None)
    both(lambda o, own: setattr(own[0], "data", own[0].data.clone() + 1))
    both(lambda o, own: setattr(own[1], "grad", None))
    both(lambda o, own: None)
    both(lambda o, own: o.state[own[0]].update(exp_avg=torch.ones(4, 3)))
    both(lambda o, own: setattr(o.state[own[0]]["hessian"], "data", torch.full((4, 3), 0.5)))
    both(lambda o, own: o.state.update({own[1]: {k: v.clone() for k, v in o.state[own[1]].items()}}))
    both(lambda o, own: o.load_state_dict(copy.deepcopy(o.state_dict())))
    both(lambda o, own: setattr(own[0], "data", own[0].data.double()) or setattr(own[0], "grad", own[0].grad.double()))
    both(lambda o, own: o.param_groups[0].update(lr=0.1, weight_decay=0.0, betas=[0.5, 0.9]))
    both(lambda o, own: o.param_groups[0]["betas"].__setitem__(0, 0.7))
    both(lambda o, own: own[1].requires_grad_(False))
    both(lambda o, own: o.param_groups[0]["params"].reverse())
    both(lambda o, own: setattr(own[1], "grad", torch.ones(3, 5)[0].expand(5)))
    both(lambda o, own: setattr(own[1], "grad", torch.ones(10)[::2]))
    both(lambda o, own: setattr(own[1].grad, "data", own[1].grad.double()))
    both(lambda o, own: own.append(params((2, 2))[0]) or o.add_param_group({"params": own[2:], "lr": 0.3}))
    both(lambda o, own: o.param_groups[1]["params"].append(o.param_groups[0]["params"].pop()))
    both(lambda o, own: o.state.pop(own[0]))


@pytest.mark.parametrize(
    "change, error",
    [
        (lambda o, p: p.grad.t_(), "grad.0. has shape .3, 4.* expected .4, 3."),
        (lambda o, p: p.grad.resize_(2, 3), "grad.0. has shape .2, 3.* expected .4, 3."),
        (lambda o, p: setattr(p, "grad", p.grad.to_sparse()), "sparse"),
        (lambda o, p: setattr(p, "data", torch.ones(5, 3)), "expected .5, 3."),
        (lambda o, p: setattr(o.state[p]["exp_avg"], "data", torch.ones(7)), "exp_avg.0. has shape .7"),
        (lambda o, p: o.state[p].pop("hessian"), "expected .'hessian'. as well"),
        (lambda o, p: o.param_groups[0].update(capturable=True), "expected a CUDA device"),
    ],
)
def test_what_no_longer_fits_is_refused_before_anything_changes(change, error):
    ps = params((5,), (4, 3))
    optimizer = SophiaG([ps[1], ps[0]], 1e-2)
    for i in range(3):
        fill_grads(ps, i)
        optimizer.step()
    change(optimizer, ps[1])
    before = ps[0].detach().clone()
    with pytest.raises((RuntimeError, ValueError), match=error):
        optimizer.step()
    assert torch.equal(ps[0], before) and optimizer.stats()["steps"] == 3


def described(compiled, monkeypatch):
    """`describe` and `identities`, as growkit._C has them or as they are without it."""
    if not compiled:
        monkeypatch.setitem(sys.modules, "growkit._C", None)
    found = runpy.run_path(lists.__file__)
    assert compiled == isinstance(found["describe"], types.BuiltinFunctionType)
    return found["describe"], found["identities"]


@pytest.mark.parametrize(
    "compiled", [pytest.param(True, marks=pytest.mark.skipif(cpu._C is None, reason="not built")), False]
)
def test_a_description_tells_every_change(compiled, monkeypatch):
    describe, identities = described(compiled, monkeypatch)
    t = torch.arange(12.0).view(3, 4)
    views = [
        t,
        t.view(4, 3),
        t.view(4, 3).T,
        t[:, :2],
        t[0].expand(3, 4),
        t.view(torch.int32),
        t.view(12),
        Parameter(t),
    ]
    facts = [describe([each])[1] for each in views]
    assert all(facts.count(each) == 1 for each in facts) and len({describe([each])[0] for each in views}) == 1
    assert describe([t]) == describe([t.view(3, 4)]) and describe([t])[1] == describe([t.clone()])[1]
    assert int.from_bytes(describe([t, t[1:]])[0][8:], sys.byteorder) == t[1:].data_ptr()
    for absent in (None, t.to_sparse()):
        with pytest.raises(lists.WITHOUT_ADDRESS):
            describe([t, absent])
    first, second = object(), object()
    held = [[first, second], [second, first], [first], [], {1: {"a": first}}, {1: {"b": first}}, {1: {"a": second}}]
    held += [{2: {"a": first}}, {1: first}, {1: {}}, {1: {"a": first, "b": first}}, {}]
    told = [identities(each) for each in held]
    assert all(told.count(each) == 1 or each == identities([]) for each in told)
    assert identities({1: {"a": first}}) == told[4]


def test_what_is_kept_holds_no_gradient():
    import weakref

    ps = params()
    optimizer = SophiaG(ps, 1e-2)
    fill_grads(ps, 0)
    optimizer.step()
    gradients = [weakref.ref(p.grad) for p in ps]
    optimizer.zero_grad()
    assert not any(gradient() is not None for gradient in gradients)


def test_stochastic_bits_are_the_same_in_any_bucket():
    # The same parameter at the same index: neighbours of another dtype or without gradients make no difference.
    alone, among = params((50,), dtype=torch.bfloat16), params((50,), dtype=torch.bfloat16)
    a, b = SophiaG(alone, 1e-3), SophiaG([*among, *params((7,)), *params((9,), dtype=torch.bfloat16)], 1e-3)
    for step in range(5):
        fill_grads(alone, step), fill_grads(among, step)
        if step % 2:
            fill_grads(b.param_groups[0]["params"][1:], step)
        a.step(), b.step()
    assert torch.equal(alone[0], among[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, "8bit"], ids=str)
def test_what_is_kept_holds_no_state(dtype):
    """State that goes to the host between two steps, as where one GPU trains and generates in turn, leaves memory."""
    coded = dtype == "8bit"
    ps = params((64, 64), (3, 5), dtype=torch.float32 if coded else dtype)
    optimizer = SophiaG(ps, 1e-2, state_dtype="8bit" if coded else None)
    for i in range(3):
        fill_grads(ps, i)
        optimizer.step()
    names = ("exp_avg", "hessian", "exp_avg_scale")
    memory = [StorageWeakRef(t.untyped_storage()) for s in optimizer.state.values() for k, t in s.items() if k in names]
    assert len(memory) == (5 if coded else 4) and not any(each.expired() for each in memory)
    for state in optimizer.state.values():
        state.update({k: t.clone() for k, t in state.items() if k != "step"})
    gc.collect()
    assert all(each.expired() for each in memory)
    twin = copy.deepcopy(optimizer)
    for each in (optimizer, twin):
        fill_grads([p for group in each.param_groups for p in group["params"]], 3)
        each.step()
    assert_same(snapshot(optimizer), snapshot(twin))
