"""SophiaG and SophiaH as optimizers: the official trajectory, the torch.optim contract, bad input."""

import copy
import json
import pathlib
import warnings

import numpy
import pytest
import torch
from optim.runs import BOTH, assert_same, drive, fill_grads, params, snapshot
from torch.nn import Parameter

from growkit import ops
from growkit.bench.sophia import OfficialSophia
from growkit.optim import SophiaG, SophiaH

DATA = pathlib.Path(__file__).parents[1] / "data"


BIT_EQUAL = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


@pytest.mark.parametrize("name", ["default_fp64", "gpt2small_fp32", "maximize_fp64"])
def test_published_code_gives_the_same_trajectory(name):
    golden = numpy.load(DATA / f"sophiag_{name}.npz")
    meta = json.loads(str(golden["meta"]))
    ps = [Parameter(torch.tensor(golden[f"p0_{i}"])) for i in range(meta["tensors"])]
    n, (decay, no_decay) = meta["n_decayed"], meta["weight_decay"]
    groups = [{"params": ps[:n], "weight_decay": decay}, {"params": ps[n:], "weight_decay": no_decay}]
    optimizer = SophiaG(groups, lr=meta["lr"], betas=tuple(meta["betas"]), rho=meta["rho"], maximize=meta["maximize"])
    fp64 = meta["dtype"] == "torch.float64"
    # Without AVX2 a rounding may differ: 30 steps of at most one ulp each.
    bound = 1e-14 if fp64 else 0 if BIT_EQUAL else 30 * 2**-23
    for step in range(meta["steps"]):
        for i, p in enumerate(ps):
            p.grad = torch.tensor(golden[f"g{step}_{i}"])
        optimizer.step(bs=meta["bs"])
        if step % meta["refresh_every"] == meta["refresh_every"] - 1:
            for i, p in enumerate(ps):
                p.grad = torch.tensor(golden[f"gh{step}_{i}"])
            optimizer.update_hessian()
        if step + 1 in meta["checkpoints"]:
            for i, p in enumerate(ps):
                found = {"p": p.detach(), "m": optimizer.state[p]["exp_avg"], "h": optimizer.state[p]["hessian"]}
                for key, value in found.items():
                    expected = torch.tensor(golden[f"{key}{step + 1}_{i}"])
                    torch.testing.assert_close(value, expected, rtol=bound, atol=bound if key == "p" else 0)


def test_published_code_gives_the_frozen_vector():
    p = Parameter(torch.tensor([0.5, -0.25, 0.125, 2, -3]))
    optimizer = SophiaG([p], lr=1e-2, rho=0.05, weight_decay=0.2)
    g, gh = torch.tensor([1e-3, -2e-3, 3e-4, 0, 5e-2]), torch.tensor([1e-3, 5e-3, 2e-2, 1e-2, 0])
    for kind, grad in [("step", g), ("refresh", gh), ("step", -0.5 * g), ("refresh", 2 * gh), ("step", g + gh)]:
        p.grad = grad
        optimizer.step(bs=1024) if kind == "step" else optimizer.update_hessian()
    state = optimizer.state[p]
    expected = {
        "p": [0.46706602, -0.238562971, 0.107055053, 1.97802413, -3.011976],
        "m": [8.57053747e-05, 7.35892463e-05, 7.15211558e-04, 3.49999988e-04, 2.53526866e-03],
        "h": [4.99000059e-08, 1.24749999e-06, 1.99599999e-05, 4.98999998e-06, 0],
    }
    for key, value in {"p": p.detach(), "m": state["exp_avg"], "h": state["hessian"]}.items():
        # Nine digits name one float32.
        torch.testing.assert_close(value, torch.tensor(expected[key]), rtol=0 if BIT_EQUAL else 2e-7, atol=0)
    assert state["step"] == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_training_loop_of_the_official_script_is_bit_equal(dtype):
    torch.manual_seed(0)
    make = torch.nn.Sequential(torch.nn.Embedding(7, 6), torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 7))
    ours, theirs = make.to(dtype), copy.deepcopy(make)
    options = {"lr": 1e-2, "betas": (0.965, 0.99), "rho": 0.05, "weight_decay": 0.2}
    optimizer, official = SophiaG(ours.parameters(), **options), OfficialSophia(theirs.parameters(), **options)
    for step in range(40):
        x, y, sampled = torch.randint(7, (3, 12)).unbind()
        for model, opt in ((ours, optimizer), (theirs, official)):
            model.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            opt.step(bs=12)
            if step % 10 == 9:
                model.zero_grad()
                torch.nn.functional.cross_entropy(model(x), sampled).backward()
                opt.update_hessian()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(optimizer.state[p][key], value) for key, value in official.state[q].items())
    assert optimizer.state[p]["step"] == 40


def test_update_hessian_may_come_first():
    ours, theirs = params(), params()
    optimizer, official = SophiaG(ours, 1e-2), OfficialSophia(theirs, 1e-2, (0.965, 0.99), 0.04, 0.1)
    for ps, opt in ((ours, optimizer), (theirs, official)):
        fill_grads(ps, 0)
        opt.update_hessian()
        fill_grads(ps, 1)
        opt.step(bs=5120)
    assert all(map(torch.equal, ours, theirs))


@BOTH
def test_groups_override_every_option(cls):
    names = {"lr": 3e-3, "betas": (0.5, 0.6), "rho": 0.5, "weight_decay": 0.3, "eps": 1e-3, "maximize": True}
    names |= {"seed": 5} | ({"bs": 17} if cls is SophiaG else {})
    together, alone = params((4, 3), (5,)), params((4, 3), (5,))
    separate = [drive(cls([alone[0]], 1e-2)), drive(cls([alone[1]], **names))]
    optimizer = cls([{"params": together[:1]}, {"params": together[1:], **names}], 1e-2)
    for step in range(8):
        for p in together:  # as two separate optimizers would see them
            fill_grads([p], step)
        optimizer.step()
        if step % 3 == 2 and cls is SophiaG:
            for p in together:
                fill_grads([p], 1000 + step)
            optimizer.update_hessian()
        elif step % 3 == 2:
            for p in together:
                fill_grads([p], 1000 + step)
            u = [torch.empty(p.shape) for p in together]
            ops.rademacher_(u[:1], seed=0, refresh=step // 3, parameter=[0])
            ops.rademacher_(u[1:], seed=5, refresh=step // 3, parameter=[0])
            optimizer.update_hessian(u)
    assert torch.equal(together[0], separate[0][0]) and torch.equal(together[1], separate[1][0])


def test_bf16_update_is_a_group_option():
    ps = params((4, 3), (4, 3), (4, 3), dtype=torch.bfloat16)
    modes = ("stochastic", "master", "nearest")
    with pytest.warns(UserWarning, match="nearest"):
        optimizer = SophiaG([{"params": [p], "bf16_update": mode} for p, mode in zip(ps, modes, strict=True)])
    drive(optimizer)
    assert [("master" in optimizer.state[p]) for p in ps] == [False, True, False]


@BOTH
def test_scheduler_moves_lr_and_betas(cls):
    schedule = {"max_lr": 1e-2, "total_steps": 10, "base_momentum": 0.8, "max_momentum": 0.95}
    results = []
    for lr in (1e-3, torch.tensor(1e-3, dtype=torch.float64)):
        ps = params()
        optimizer = cls(ps, lr)
        before = optimizer.param_groups[0]["lr"]
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, **schedule)
        seen = []
        for step in range(10):
            fill_grads(ps, step)
            optimizer.step()
            group = optimizer.param_groups[0]
            seen.append((float(group["lr"]), group["betas"][0]))
            if step < 9:
                scheduler.step()
        assert len(set(seen)) == 10 and (not torch.is_tensor(lr) or optimizer.param_groups[0]["lr"] is before)
        results.append((ps, seen))
    assert results[0][1] == results[1][1]
    assert all(map(torch.equal, results[0][0], results[1][0]))
    # The values that the scheduler set are the ones used: the same steps by hand, with a new optimizer each time.
    ps = params()
    optimizer = cls(ps)
    for step, (lr, beta1) in enumerate(results[0][1]):
        optimizer.param_groups[0].update(lr=lr, betas=(beta1, 0.99))
        fill_grads(ps, step)
        optimizer.step()
    assert all(map(torch.equal, ps, results[0][0]))


@BOTH
def test_named_parameters_and_closure(cls):
    model = torch.nn.Linear(3, 2)
    optimizer = cls(model.named_parameters(), 1e-2)
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = model(torch.ones(4, 3)).square().mean()
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure)) for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]


@BOTH
def test_maximize_is_the_step_on_minus_the_loss(cls):
    up, down = params(), params()
    a, b = cls(up, 1e-2, maximize=True), cls(down, 1e-2)
    for step in range(9):
        for ps, opt, sign in ((up, a, -1), (down, b, 1)):
            fill_grads(ps, step)
            for p in ps:
                p.grad *= sign
            opt.step()
            if step % 3 == 0:
                opt.update_hessian()
    assert all(map(torch.equal, up, down))


@BOTH
def test_complex_is_view_as_real(cls):
    z = params((4, 3), (2,), dtype=torch.complex64)
    x = [Parameter(torch.view_as_real(p.detach()).clone()) for p in z]
    a, b = cls(z, 1e-2), cls(x, 1e-2)
    for step in range(9):
        fill_grads(x, step)
        for p, q in zip(z, x, strict=True):
            p.grad = torch.view_as_complex(q.grad.clone())
        a.step(), b.step()
        if step % 3 == 0:
            a.update_hessian(), b.update_hessian()
        elif step % 3 == 1 and cls is SophiaH:
            u = [torch.randn_like(q) for q in x]
            a.update_hessian([torch.view_as_complex(t) for t in u]), b.update_hessian(u)
    for p, q in zip(z, x, strict=True):
        assert torch.equal(torch.view_as_real(p), q)
        assert torch.equal(torch.view_as_real(a.state[p]["hessian"]), b.state[q]["hessian"])


@BOTH
def test_add_param_group_joins_the_schedule(cls):
    ps = params((4, 3), (5,))
    optimizer = cls(ps[:1], 1e-2)
    drive(optimizer, steps=4)
    optimizer.add_param_group({"params": ps[1:], "lr": 1e-3})
    first, second = optimizer.param_groups
    for key in ("every", "phase", "steps", "refreshes"):
        assert first[key] == second[key]
    drive(optimizer, first=4)
    if cls is SophiaH:  # both groups are folded with the probe that a refresh would write
        ps = params((4, 3), (5,))
        optimizer = cls([{"params": ps[:1]}, {"params": ps[1:], "seed": 9}])
        fill_grads(ps, 0)
        optimizer.update_hessian()
        u = [torch.empty(p.shape) for p in ps]
        ops.rademacher_(u, seed=0, refresh=0, parameter=[0, 1])
        for p, s in zip(ps, u, strict=True):
            torch.testing.assert_close(optimizer.state[p]["hessian"], 0.01 * s * p.grad)


@BOTH
@pytest.mark.parametrize("protocol", ["step", "unscale"])
def test_grad_scaler_skips_an_infinite_step_and_unscales_the_others(cls, protocol):
    plain, scaled = params(), params()
    a, b = cls(plain, 1e-2), cls(scaled, 1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(6):
        bad = step == 3
        fill_grads(plain, step)
        if not bad:
            a.step()
        scale = scaler.scale(torch.ones(()))
        fill_grads(scaled, step)
        for p in scaled:
            p.grad *= float("inf") if bad else scale
        if protocol == "unscale":
            scaler.unscale_(b)
        scaler.step(b)
        scaler.update()
    assert scaler.get_scale() == 512
    assert all(map(torch.equal, plain, scaled)) and b.state[scaled[0]]["step"] == 5


def test_compiled_step_equals_eager():
    def make():
        return [*params((4, 3), ()), *params((7,), dtype=torch.bfloat16)]

    eager, compiled = make(), make()
    a, b = (SophiaG(ps, torch.tensor(1e-2, dtype=torch.float64)) for ps in (eager, compiled))
    step = torch.compile(b.step, backend="aot_eager")
    for i in range(3):
        for ps, optimizer in ((eager, a), (compiled, b)):
            optimizer.param_groups[0]["lr"].fill_(1e-2 / (i + 1))
            fill_grads(ps, i)
        a.step(), step()
    assert all(map(torch.equal, eager, compiled))


@pytest.mark.parametrize("options", [{}, {"clip_grad_norm": 0.05}], ids=["plain", "clip"])
def test_one_compiled_graph_serves_a_whole_schedule(options):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    eager, compiled = params(), params()
    a, b = (SophiaG(ps, torch.tensor(1e-2, dtype=torch.float64), bs=8, **options) for ps in (eager, compiled))
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100) for optimizer in (a, b)]
    graphs = CompileCounterWithBackend("inductor")
    step = torch.compile(b.step, backend=graphs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the schedulers do not see that the compiled step is a step
        for i in range(100):
            fill_grads(eager, i), fill_grads(compiled, i)
            a.step(), (step if i else b.step)()  # the first step makes the state, which would be a graph of its own
            if i % 10 == 0:
                fill_grads(eager, 1000 + i), fill_grads(compiled, 1000 + i)
                a.update_hessian(), b.update_hessian()
            for schedule in schedules:
                schedule.step()
    # With a cold cache the compiler may run a graph of its own through the same backend.
    ours = [g for g in graphs.graphs if any("growkit" in str(node.target) for node in g.graph.nodes)]
    assert len(ours) == 1
    for p, q in zip(eager, compiled, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    assert a.stats()["steps"] == b.stats()["steps"] == 100


@BOTH
def test_clip_grad_norm_is_torchs_clipping_without_its_pass(cls):
    theirs, ours = params(), params()
    a = cls(theirs, 1e-2)
    b = cls([{"params": ours[:1]}, {"params": ours[1:], "weight_decay": 0.3}], 1e-2, clip_grad_norm=0.02)
    a.add_param_group({"params": params((2,))})
    for step in range(6):
        fill_grads(theirs, step), fill_grads(ours, step)
        before = [p.grad.clone() for p in ours]
        torch.nn.utils.clip_grad_norm_(theirs, 0.02 if step else 1e9)
        b.param_groups[0]["clip_grad_norm"] = 0.02 if step else 1e9
        for group in a.param_groups:
            group["weight_decay"] = 0.1
        b.param_groups[1]["weight_decay"] = 0.1
        a.step(), b.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(ours, before, strict=True))
    for p, q in zip(theirs, ours, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)


@BOTH
def test_a_step_without_a_finite_norm_is_skipped_and_counted(cls):
    ps = params()
    optimizer = cls(ps, 1e-2, clip_grad_norm=1.0)
    fill_grads(ps, 0)
    optimizer.step()
    before = snapshot(optimizer)[:2]
    fill_grads(ps, 1)
    ps[1].grad[2] = float("nan")
    optimizer.step()
    assert_same(snapshot(optimizer)[:2], before)
    assert optimizer.stats()["skipped_steps"] == 1


def test_clip_grad_norm_of_groups_must_agree():
    ps = params((2,), (3,))
    with pytest.raises(ValueError, match="clip_grad_norm: 2.0, expected 1.0 as in the first group"):
        SophiaG([{"params": ps[:1]}, {"params": ps[1:], "clip_grad_norm": 2.0}], clip_grad_norm=1.0)


EIGHT_BITS = [torch.zeros(2).to(torch.float8_e4m3fn).requires_grad_()]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"lr": -1.0}, ValueError, "learning rate: -1.0, expected .* >= 0"),
        ({"lr": float("nan")}, ValueError, "learning rate: nan"),
        ({"lr": torch.tensor([1.0, 2.0])}, ValueError, r"lr must be 1-element, got shape \(2,\)"),
        ({"rho": -0.1}, ValueError, "rho: -0.1, expected .* >= 0"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay: -0.1, expected .* >= 0"),
        ({"eps": -1e-9}, ValueError, "eps: -1e-09, expected .* >= 0"),
        ({"betas": (1.0, 0.9)}, ValueError, "beta parameter at index 0: 1.0, expected 0 <= beta < 1"),
        ({"betas": (0.9, -0.1)}, ValueError, "beta parameter at index 1: -0.1, expected 0 <= beta < 1"),
        ({"betas": 0.9}, ValueError, "Invalid betas: 0.9, expected two numbers"),
        ({"betas": (0.9,)}, ValueError, r"betas: \(0.9,\), expected two"),
        ({"bs": 0}, ValueError, "bs: 0, expected .* > 0"),
        ({"bs": -5}, ValueError, "bs: -5, expected .* > 0"),
        ({"bs": float("inf")}, ValueError, "bs: inf, expected a finite"),
        ({"seed": 0.5}, TypeError, "seed: 0.5, expected an integer"),
        ({"bf16_update": "kahan"}, ValueError, "bf16_update: 'kahan', expected 'stochastic', 'master' or 'nearest'"),
        ({"fused": True}, RuntimeError, "fused=True needs triton and CUDA parameters, parameter 0 is on cpu"),
        ({"clip_grad_norm": 0.0}, ValueError, "clip_grad_norm: 0.0, expected None or a finite number > 0"),
        ({"state_dtype": torch.int8}, ValueError, "state_dtype: torch.int8, expected None, torch.float32,"),
        ({"differentiable": True}, RuntimeError, "differentiable=True is not supported"),
        ({"params": EIGHT_BITS}, TypeError, "parameter 0 has dtype torch.float8_e4m3fn, expected one of torch.float32"),
        ({"params": []}, ValueError, "empty parameter list"),
        ({"params": torch.zeros(2)}, TypeError, "iterable of Tensors"),
        ({"params": [1.0]}, TypeError, "can only optimize Tensors"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_construction_names_argument_given_and_expected(options, error, words):
    options = {"params": params()} | options
    with pytest.raises(error, match=words):
        SophiaG(**options)
    if "params" not in options or len(options) == 1:
        return
    optimizer = SophiaG(params((2,)))
    before = snapshot(optimizer)
    with pytest.raises(error, match=words):
        optimizer.add_param_group(options)
    assert_same(snapshot(optimizer), before)


def test_duplicate_parameters_warn_in_a_group_and_raise_across_groups():
    (p,) = params((2,))
    with pytest.warns(UserWarning, match="duplicate"):
        SophiaG([p, p])
    with pytest.raises(ValueError, match="more than one parameter group"):
        SophiaG([{"params": [p]}, {"params": [p]}])


def used():
    optimizer = SophiaG(params((4, 3), (5,)), 1e-2)
    drive(optimizer)
    return optimizer


def sparse_gradient(optimizer):
    ps = optimizer.param_groups[0]["params"]
    fill_grads(ps, 0)
    ps[1].grad = ps[1].grad.to_sparse()


def other_state_shape(optimizer):
    ps = optimizer.param_groups[0]["params"]
    fill_grads(ps, 0)
    optimizer.state[ps[1]]["hessian"] = torch.zeros(6)


def other_file(change):
    def load(optimizer):
        file = copy.deepcopy(optimizer.state_dict())
        change(file)
        optimizer.load_state_dict(file)

    return load


def nothing(optimizer):
    fill_grads(optimizer.param_groups[0]["params"], 0)


LOAD = {
    "shape": lambda f: f["state"][1].update(hessian=torch.zeros(6)),
    "adam": lambda f: f["state"][1].update(exp_avg_sq=f["state"][1].pop("hessian")),
    "groups": lambda f: f["param_groups"].append(f["param_groups"][0]),
    "size": lambda f: f["param_groups"][0]["params"].append(2),
}


@pytest.mark.parametrize(
    ("prepare", "call", "error", "words"),
    [
        (sparse_gradient, lambda o: o.step(), RuntimeError, "SophiaG does not support sparse gradients"),
        (sparse_gradient, lambda o: o.update_hessian(), RuntimeError, "SophiaG does not support sparse gradients"),
        (other_state_shape, lambda o: o.step(), ValueError, r"hessian\[0\] has shape \(6,\).*expected \(5,\)"),
        (nothing, lambda o: o.step(bs=0), ValueError, "bs: 0, expected"),
        (nothing, lambda o: o.step(bs=-3), ValueError, "bs: -3, expected"),
        (nothing, other_file(LOAD["shape"]), ValueError, r"hessian of parameter 1 .*\(6,\), expected \(5,\)"),
        (nothing, other_file(LOAD["adam"]), ValueError, r"parameter 1 has .*'exp_avg_sq'.* expected \['hessian'\]"),
        (nothing, other_file(LOAD["groups"]), ValueError, "different number of parameter groups"),
        (nothing, other_file(LOAD["size"]), ValueError, "doesn't match the size"),
        (nothing, lambda o: o.attach(3), TypeError, "model is int, expected a torch.nn.Module"),
        (nothing, lambda o: o.attach(torch.nn.Identity(), every=0), ValueError, "every=0, expected an integer >= 1"),
        (nothing, lambda o: o.attach(torch.nn.Identity(), every=2.5), ValueError, "every=2.5, expected an integer"),
        (nothing, lambda o: o.attach(torch.nn.Identity(), phase="late"), ValueError, "'late', expected 'paper' or"),
        (nothing, lambda o: o.attach(torch.nn.Identity(), masks=len), TypeError, "unexpected keyword argument 'masks'"),
        (nothing, lambda o: o.attach(torch.nn.Identity(), mask=3), TypeError, "mask is int, expected a callable"),
        (nothing, lambda o: o.refresh(torch.nn.Identity(), []), ValueError, "batches is empty, expected at least one"),
        (nothing, lambda o: o.refresh(torch.nn.Identity(), torch.ones(2)), TypeError, "batches is Tensor, expected"),
    ],
    ids=lambda x: x[:24] if isinstance(x, str) else "",
)
def test_a_bad_call_names_the_argument_and_changes_nothing(prepare, call, error, words):
    optimizer = used()
    prepare(optimizer)
    before = snapshot(optimizer)
    with pytest.raises(error, match=words):
        call(optimizer)
    assert_same(snapshot(optimizer), before)


def test_bad_probes_of_update_hessian_change_nothing():
    optimizer = SophiaH(params((4, 3), (5,)))
    drive(optimizer)
    before = snapshot(optimizer)
    for u, words in [
        ([torch.ones(4, 3)], "u has 1 tensors, expected 2"),
        ([torch.ones(5)] * 2, r"u\[0\].*\(5,\).*\(4, 3\)"),
    ]:
        with pytest.raises(ValueError, match=words):
            optimizer.update_hessian(u)
        assert_same(snapshot(optimizer), before)


def test_nearest_warns_once():
    with pytest.warns(UserWarning, match="bf16_update='nearest' loses"):
        SophiaG(params(dtype=torch.bfloat16), bf16_update="nearest")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SophiaG(params(), bf16_update="nearest")
        SophiaG(params(dtype=torch.bfloat16))


def test_twenty_steps_without_a_refresh_warn_once():
    ps = params()
    optimizer = SophiaG(ps)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(20):
            fill_grads(ps, step)
            optimizer.step()
    with pytest.warns(UserWarning, match="without a curvature refresh") as caught:
        for _ in range(30):
            optimizer.step()
    assert len(caught) == 1


def test_everything_clipped_warns_and_stats_report_it():
    ps = params()
    optimizer = SophiaG(ps, rho=0.0)
    assert optimizer.stats() == {"steps": 0, "refreshes": 0, "skipped": 0, "skipped_steps": 0, "unclipped": None}
    with pytest.warns(UserWarning, match="clips every element"):
        for step in range(60):
            fill_grads(ps, step)
            optimizer.step()
            if step % 10 == 0:
                optimizer.update_hessian()
    assert optimizer.stats() == {"steps": 60, "refreshes": 6, "skipped": 0, "skipped_steps": 0, "unclipped": 0.0}
