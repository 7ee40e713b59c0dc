"""Which tensors go into one call: dtypes, layouts, parameters without gradients, and what is kept from step to step."""

import copy

import torch
from optim.runs import BOTH, assert_same, fill_grads, params, snapshot
from torch.nn import Parameter

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
    both(lambda o, own: o.load_state_dict(copy.deepcopy(o.state_dict())))
    both(lambda o, own: setattr(own[0], "data", own[0].data.double()) or setattr(own[0], "grad", own[0].grad.double()))


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
