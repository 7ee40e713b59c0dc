"""The optimizer's state: dtypes, and files of this class, of the official one and of distributed checkpoints."""

import copy
import io
import pickle

import pytest
import torch
from optim.runs import BOTH, assert_same, drive, fill_grads, params, snapshot

from growkit import ops
from growkit.bench.sophia import OfficialSophia
from growkit.optim import SophiaG, SophiaH


def test_distributed_checkpoint_round_trip():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2).bfloat16()
    optimizer = SophiaG(model.parameters(), 1e-2, bf16_update="master", bs=64)
    drive(optimizer, steps=5)
    optimizer.zero_grad()
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    twin = copy.deepcopy(model)
    loaded = SophiaG(twin.parameters(), 3e-4, bf16_update="master")
    set_optimizer_state_dict(twin, loaded, saved)
    assert loaded.state[twin.weight]["exp_avg"].dtype == torch.float32
    assert {k: loaded.param_groups[0][k] for k in ("lr", "bs", "steps", "refreshes")} == {
        "lr": 1e-2,
        "bs": 64,
        "steps": 5,
        "refreshes": 1,
    }
    assert_same(drive(optimizer, 5), drive(loaded, 5))


def test_bfloat16_state_is_float32_and_survives_load():
    ps = params(dtype=torch.bfloat16)
    optimizer = SophiaG(ps, 1e-2)
    drive(optimizer)
    other = SophiaG(params(dtype=torch.bfloat16))
    other.load_state_dict(optimizer.state_dict())
    for a, b in zip(ps, other.param_groups[0]["params"], strict=True):
        for key in ("exp_avg", "hessian"):
            assert other.state[b][key].dtype == torch.float32
            assert torch.equal(other.state[b][key], optimizer.state[a][key])
            assert other.state[b][key].data_ptr() != optimizer.state[a][key].data_ptr()


@pytest.mark.parametrize("mode", ["stochastic", "master"])
def test_bfloat16_run_stays_beside_the_float32_run(mode):
    half, full = params((64, 32), dtype=torch.bfloat16), params((64, 32))
    full[0].data.copy_(half[0].data)
    a, b = SophiaG(half, 1e-3, bf16_update=mode), SophiaG(full, 1e-3)
    for step in range(100):
        fill_grads(full, step)
        half[0].grad = full[0].grad.bfloat16()
        full[0].grad = half[0].grad.float()
        a.step(), b.step()
    if mode == "master":
        assert torch.equal(a.state[half[0]]["master"], full[0]) and torch.equal(half[0], full[0].bfloat16())
    else:
        # 100 unbiased roundings of |p| < 4, each with sigma < 2^-8 at most: mean over 2048 elements within 5 sigma.
        assert (half[0].float() - full[0]).mean().abs() < 5 * 2**-7 * 10 / 2048**0.5 / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bfloat16_state_stays_beside_float32_state(dtype):
    narrow, wide = params((64, 32), dtype=dtype), params((64, 32), dtype=dtype)
    a, b = SophiaG(narrow, 1e-3, state_dtype=torch.bfloat16, bs=1e5), SophiaG(wide, 1e-3, bs=1e5)
    for _ in range(10):
        drive(a, steps=9), drive(b, steps=9)
    for key in ("exp_avg", "hessian"):
        x, y = a.state[narrow[0]][key], b.state[wide[0]][key]
        assert x.dtype == torch.bfloat16 and y.dtype == torch.float32
        # m is rounded 28 times within the memory of its EMA, h 100 times; each time by at most 2^-8 of its size.
        assert (x - y).abs().mean() < 2**-6 * y.abs().mean()
    assert abs(float(a.state[narrow[0]]["hessian"].mean() / b.state[wide[0]]["hessian"].mean()) - 1) < 2e-3
    same = reloaded(SophiaG(params((4,)), state_dtype=torch.bfloat16))
    assert same.param_groups[0]["state_dtype"] == torch.bfloat16


def test_nearest_rounding_would_stall_the_curvature():
    """Why a bfloat16 h is rounded stochastically: 1 % of what is left to go is soon below half a step of the format."""
    h = {name: [torch.ones(1000, dtype=torch.bfloat16)] for name in ("nearest", "stochastic")}
    for refresh in range(600):
        key = {"seed": 3, "refresh": refresh, "parameter": [0]}
        for name, options in (("nearest", {}), ("stochastic", key)):
            ops.gnb_ema_(h[name], [torch.full((1000,), 2.0)], beta2=0.99, **options)
    assert h["nearest"][0].mean() < 3.7 < 3.97 < h["stochastic"][0].float().mean() < 4.03


@BOTH
def test_float16_parameters_train_with_a_grad_scaler(cls):
    half, full = params(dtype=torch.float16), params()
    for p, q in zip(half, full, strict=True):
        q.data.copy_(p.data)
    a, b = cls(half, 1e-3), cls(full, 1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for step in range(8):
        fill_grads(full, step)
        scale = scaler.scale(torch.ones(()))
        for p, q in zip(half, full, strict=True):
            p.grad = (q.grad * scale).half()
            q.grad = p.grad.float() / scale
            if step == 4:
                p.grad[...] = float("inf")
        if step != 4:
            b.step()
        scaler.step(a)
        scaler.update()
    for p, q in zip(half, full, strict=True):
        assert a.state[p]["master"].dtype == torch.float32
        assert torch.equal(a.state[p]["master"], q) and torch.equal(p, q.half())
    assert a.stats()["skipped_steps"] == 1 and scaler.get_scale() == 128


def through_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def reloaded(optimizer):
    fresh = type(optimizer)([{"params": g["params"]} for g in optimizer.param_groups], 0.5, seed=77)
    fresh.load_state_dict(through_file(optimizer.state_dict()))
    return fresh


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize(
    "way", [reloaded, copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["file", "deepcopy", "pickle"]
)
def test_copies_continue_bit_for_bit(cls, dtype, way):
    ps = params(dtype=dtype)
    mode = "master" if way is reloaded else "stochastic"
    optimizer = cls([{"params": ps[:2], "lr": 1e-2}, {"params": ps[2:], "seed": 3}], bf16_update=mode)
    drive(optimizer, steps=7)
    values = [p.detach().clone() for p in ps]
    twin = way(optimizer)
    assert_same(snapshot(twin), snapshot(optimizer))
    drive(optimizer, 7)
    expected = snapshot(optimizer)
    for p, value in zip((p for g in twin.param_groups for p in g["params"]), values, strict=True):
        p.data.copy_(value)
    drive(twin, 7)
    assert_same(snapshot(twin), expected)


def official_file(ps, **changes):
    """A state dict as the published SophiaG writes it."""
    state = {
        i: {"step": torch.tensor(40.0), "exp_avg": torch.full_like(p, 1e-3), "hessian": torch.full_like(p, 1e-6)}
        for i, p in enumerate(p.detach() for p in ps)
    }
    group = {"lr": 6e-4, "betas": (0.9, 0.95), "rho": 0.05, "weight_decay": 0.2, "maximize": False}
    return {"state": state, "param_groups": [group | {"capturable": False, "params": [*range(len(ps))]} | changes]}


@pytest.mark.parametrize(
    "step", [torch.tensor(40.0), 40, 40.0, torch.full((1,), 40.0)], ids=["0-d", "int", "float", "1-d"]
)
def test_official_file_loads_and_keeps_its_options(step):
    ps, file = params(), official_file(params())
    for state in file["state"].values():
        state["step"] = step
    optimizer = SophiaG(ps, bs=480 * 1024)
    with pytest.warns(UserWarning, match="no bs: keeping bs=491520"):
        optimizer.load_state_dict(file)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["rho"], group["bs"]) == (6e-4, (0.9, 0.95), 0.05, 491520)
    theirs = params()
    official = OfficialSophia(theirs, 6e-4, (0.9, 0.95), 0.05, 0.2)
    for p in theirs:
        official.state[p]["exp_avg"].fill_(1e-3), official.state[p]["hessian"].fill_(1e-6)
    fill_grads(ps, 0), fill_grads(theirs, 0)
    optimizer.step(), official.step(bs=480 * 1024)
    assert all(map(torch.equal, ps, theirs))
    assert optimizer.state[ps[0]]["step"] == 41 and optimizer.state[ps[0]]["step"].dim() == 0


def test_old_official_file_with_gamma_loads_as_rho_times_bs():
    file = official_file(params())
    file["param_groups"][0]["gamma"] = 2e4 + 0 * file["param_groups"][0].pop("rho")
    optimizer = SophiaG(params(), bs=1000)
    with pytest.warns(UserWarning, match="no bs"):
        optimizer.load_state_dict(file)
    assert optimizer.param_groups[0]["rho"] == 20 and "gamma" not in optimizer.param_groups[0]


@pytest.mark.filterwarnings("ignore:the loaded file has no bs")
def test_official_bfloat16_file_is_widened_and_gets_a_master_copy():
    ps = params(dtype=torch.bfloat16)
    optimizer = SophiaG(ps, bf16_update="master")
    optimizer.load_state_dict(official_file(ps))
    assert optimizer.state[ps[0]]["hessian"].dtype == torch.float32
    fill_grads(ps, 0)
    optimizer.step()
    for p in ps:
        assert torch.equal(p, optimizer.state[p]["master"].bfloat16())


def test_load_keeps_the_schedule_of_an_attached_optimizer_if_the_file_has_none():
    model = torch.nn.Linear(3, 2)
    saved = SophiaG(model.parameters()).state_dict()
    optimizer = SophiaG(model.parameters())
    optimizer.attach(model, every=3, phase="official")
    optimizer.load_state_dict(saved)
    assert (optimizer.param_groups[0]["every"], optimizer.param_groups[0]["phase"]) == (3, "official")


def test_load_respects_what_the_hooks_of_the_user_made_of_the_file():
    ps = params((3,), (3,), dtype=torch.bfloat16)
    optimizer = SophiaG(ps)
    drive(optimizer)
    other = SophiaG(params((3,), (3,), dtype=torch.bfloat16))

    def swap(_, file):
        return file | {"state": {0: file["state"][1], 1: file["state"][0]}}

    other.register_load_state_dict_pre_hook(swap)
    other.load_state_dict(optimizer.state_dict())
    a, b = other.param_groups[0]["params"]
    assert torch.equal(other.state[a]["exp_avg"], optimizer.state[ps[1]]["exp_avg"])
    assert torch.equal(other.state[b]["exp_avg"], optimizer.state[ps[0]]["exp_avg"])


@pytest.mark.parametrize("old", [False, True], ids=["named", "from before the key"])
def test_a_file_of_the_other_class_is_refused(old):
    files = []
    for cls in (SophiaG, SophiaH):
        optimizer = cls(params())
        drive(optimizer)
        files.append(copy.deepcopy(optimizer.state_dict()))
    if old:
        del files[0]["param_groups"][0]["curvature"]
    optimizer = SophiaH(params())
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="curvature is that of gnb, expected hutchinson"):
        optimizer.load_state_dict(files[0])
    assert_same(snapshot(optimizer), before)
    if not old:
        with pytest.raises(ValueError, match="curvature is that of hutchinson, expected gnb"):
            SophiaG(params()).load_state_dict(files[1])


@pytest.mark.parametrize("change", [{"lr": "1e-4"}, {"betas": (0.9, 2.0)}, {"rho": None}], ids=str)
def test_a_file_with_numbers_that_no_step_can_use_changes_nothing(change):
    optimizer = SophiaG(params())
    drive(optimizer)
    file, before = copy.deepcopy(optimizer.state_dict()), snapshot(optimizer)
    file["param_groups"][0].update(change)
    with pytest.raises((TypeError, ValueError), match="Invalid"):
        optimizer.load_state_dict(file)
    assert_same(snapshot(optimizer), before)
