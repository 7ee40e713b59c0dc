"""nesterov=True: what it is equal to, in groups and files, and what metrics and rho="auto" make of it."""

import copy
import pickle

import pytest
import torch
from optim.runs import BOTH, assert_same, drive, fill_grads, params, snapshot
from torch.nn import Parameter

from growkit.optim import SophiaG

OPTIONS = {"betas": (0.9, 0.99), "rho": 0.5, "weight_decay": 0.1}


def substituted(optimizer, steps):
    """The plain optimizer on other gradients: g + beta1*(g - g before) makes mbar of m, as their equations say."""
    ps, before = optimizer.param_groups[0]["params"], None
    for step in range(steps):
        fill_grads(ps, step)
        grads = [p.grad.clone() for p in ps]
        for p, g, last in zip(ps, grads, before or map(torch.zeros_like, grads), strict=True):
            p.grad = g + 0.9 * (g - last)
        before = grads
        optimizer.step()
        if step % 3 == 2:
            fill_grads(ps, 1000 + step)
            optimizer.update_hessian()
    return ps


@BOTH
@pytest.mark.parametrize("maximize", [False, True])
def test_it_is_momentum_of_gradients_that_look_a_step_ahead(cls, maximize):
    options = OPTIONS | {"maximize": maximize}
    ours = cls(params((40, 3), dtype=torch.float64), 1e-2, nesterov=True, **options)
    plain = cls(params((40, 3), dtype=torch.float64), 1e-2, **options)
    other = cls(params((40, 3), dtype=torch.float64), 1e-2, **options)
    torch.testing.assert_close(drive(ours, steps=9), substituted(other, 9))
    assert ours.stats()["unclipped"] == other.stats()["unclipped"]
    drive(plain, steps=9)  # m itself is the plain one
    for p, q in zip(ours.state, plain.state, strict=True):
        assert not torch.equal(p, q) and torch.equal(ours.state[p]["exp_avg"], plain.state[q]["exp_avg"])


@pytest.mark.parametrize(
    "options", [{"clip_grad_norm": 0.01}, {"state_dtype": "8bit"}, {"state_dtype": torch.bfloat16}], ids=str
)
def test_each_group_has_its_own(options):
    """A norm that is clipped is that of both groups; 64 x 64 elements make 8-bit state."""
    runs = []
    for flags in ((True, False), (True, True), (False, False)):
        ps = params((64, 64), (64, 64), dtype=torch.bfloat16)
        groups = [{"params": [p], "nesterov": flag} for p, flag in zip(ps, flags, strict=True)]
        runs.append(drive(SophiaG(groups, 1e-2, **options)))
    mixed, both, none = runs
    assert torch.equal(mixed[0], both[0]) and not torch.equal(both[0], none[0])
    assert torch.equal(mixed[1], none[1]) and not torch.equal(both[1], none[1])


@BOTH
@pytest.mark.parametrize("value", [1, None, "True"])
def test_anything_but_a_bool_is_refused_by_name(cls, value):
    with pytest.raises(TypeError, match=f"Invalid nesterov: {value!r}, expected True or False"):
        cls(params(), nesterov=value)


def test_files_carry_it_and_those_from_before_it_are_without():
    optimizer = SophiaG(params(), 1e-2, nesterov=True)
    drive(optimizer)
    file, twin = copy.deepcopy(optimizer.state_dict()), SophiaG(params(), 1e-2)
    for p, q in zip(twin.param_groups[0]["params"], optimizer.param_groups[0]["params"], strict=True):
        p.data.copy_(q.data)
    twin.load_state_dict(file)
    assert twin.param_groups[0]["nesterov"] is True
    drive(optimizer, 8), drive(twin, 8)
    assert_same(snapshot(twin), snapshot(optimizer))

    for group in file["param_groups"]:
        del group["nesterov"]
    old = SophiaG(params(), nesterov=True)
    old.load_state_dict(file)
    assert old.param_groups[0]["nesterov"] is False
    for of in (optimizer.param_groups[0], optimizer.defaults):
        del of["nesterov"]
    unpickled = pickle.loads(pickle.dumps(optimizer))
    unpickled.add_param_group({"params": [Parameter(torch.ones(2))]})
    assert [group["nesterov"] for group in unpickled.param_groups] == [False, False]
    drive(unpickled)


@BOTH
@pytest.mark.parametrize("skipped", [False, True])
def test_metrics_and_auto_speak_of_what_is_clipped(cls, skipped):
    """Of few elements the sample is all of them, and rho_solved the rho that leaves 0.3 of the |mbar| below d."""
    ps = params((40, 50), (30,))
    optimizer = cls(ps, 1e-2, (0.5, 0.9), rho="auto", target_unclipped=0.3, nesterov=True, clip_grad_norm=0.1)
    for step in range(10):
        fill_grads(ps, step)
        if skipped and step == 9:
            ps[0].grad[0] = float("inf")
        optimizer.step()
        if step % 3 == 0:
            norm = torch.cat([p.grad.flatten() for p in ps]).norm()
            of = [(optimizer.state[p]["exp_avg"], p.grad * 0.1 / norm, optimizer.state[p]["hessian"]) for p in ps]
            m, g, h = (torch.cat([t.flatten() for t in x]) for x in zip(*of, strict=True))
            rho, bs = (float(optimizer.param_groups[0][key]) for key in ("rho", "bs"))
            fill_grads(ps, 1000 + step)
            optimizer.update_hessian()
    told, mbar = optimizer.metrics(), m if skipped else 0.5 * m + 0.5 * g
    if not skipped:
        assert told["unclipped"] == pytest.approx(float((mbar.abs() < rho * bs * h).double().mean()))
    assert float((mbar.abs() < told["rho_solved"] * bs * h).double().mean()) == pytest.approx(0.3, abs=0.02)
