"""What torch promises of every optimizer, through all flags that torch's own suite tries; and bounds for any input.

The flags and the wrong arguments come from torch.testing._internal.common_optimizers, in which torch describes its own
optimizers; growkit's are described there in the same words.
"""

import copy
import io
import itertools
import pickle
import warnings

import pytest
import torch
from torch.nn import Parameter
from torch.utils._pytree import tree_flatten

from growkit.optim import SophiaG, SophiaH

# A bare GPU machine, which runs the GPU tests of this file's folder, may lack what these need.
pytest.importorskip("hypothesis")
pytest.importorskip("expecttest")

from hypothesis import example, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch.testing._internal import common_optimizers as common  # noqa: E402

CLASSES = {"SophiaG": SophiaG, "SophiaH": SophiaH}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def inputs(device, dtype=None):
    options = {
        "default": {},
        "lr": {"lr": 0.01},
        "tensor lr": {"lr": torch.tensor(1e-3)},
        "weight decay": {"weight_decay": 0.9},
        "maximize, nesterov": {"weight_decay": 0.1, "maximize": True, "nesterov": True},
        "rho, eps, betas": {"rho": 1.0, "eps": 1e-8, "betas": (0.9, 0.95)},
        "clip": {"clip_grad_norm": 0.1},
        "master": {"bf16_update": "master"},
        "bf16 state": {"state_dtype": torch.bfloat16},
        "8-bit state": {"state_dtype": "8bit"},
    }
    if "cuda" in str(device):
        options["capturable"] = {"capturable": True, "lr": torch.tensor(1e-3)}
    else:  # torch itself tries foreach on other devices only
        options["foreach"] = {"foreach": True}
    return [common.OptimizerInput(params=None, kwargs=kwargs, desc=desc) for desc, kwargs in options.items()]


def info(cls):
    return common.OptimizerInfo(
        cls,
        optim_inputs_func=inputs,
        optim_error_inputs_func=common.get_error_inputs_for_all_optims,
        supported_impls=("foreach", "fused"),
        supports_fused_on=("cuda",),
        has_capturable_arg=True,
        not_og_supported_flags=("foreach", "fused", "maximize", "capturable", "differentiable"),
    )


def cases():
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for (name, cls), device, (kind, dtype) in itertools.product(CLASSES.items(), devices, DTYPES.items()):
        marks = [pytest.mark.gpu] if device == "cuda" else []
        for case in common._get_optim_inputs_including_global_cliquey_kwargs(device, dtype, info(cls)):
            flags = "-".join(f"{key}={case.kwargs[key]}" for key in ("foreach", "fused") if key in case.kwargs)
            id = f"{name}-{device}-{kind}-{case.desc}-{flags or 'no flag'}"
            yield pytest.param(cls, device, dtype, case.kwargs, marks=marks, id=id)


every_flag = pytest.mark.parametrize(("cls", "device", "dtype", "options"), list(cases()))


def parameters(device, dtype, shapes=((10, 5), (5000,), (), (0, 3))):
    make = torch.Generator().manual_seed(1)
    return [Parameter(torch.randn(shape, generator=make).to(device, dtype)) for shape in shapes]


def fill(ps, seed):
    make = torch.Generator().manual_seed(seed)
    for p in ps:
        p.grad = (torch.randn(p.shape, generator=make) * 1e-2).to(p)


def train(optimizer, first, steps):
    ps = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(first, first + steps):
        if step % 3 == 0:
            fill(ps, 1000 + step)
            optimizer.update_hessian()
        fill(ps, step)
        optimizer.step()
    return ps


def assert_same(a, b):
    (a, a_spec), (b, b_spec) = tree_flatten(a), tree_flatten(b)
    assert a_spec == b_spec
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y) and x.dtype == y.dtype if isinstance(x, torch.Tensor) else x == y


@every_flag
def test_the_step_goes_downhill(cls, device, dtype, options):
    weight, bias = parameters(device, dtype, ((10, 5), (10,)))
    x = torch.randn(5, device=device, dtype=dtype)
    optimizer = cls([weight, bias], **{"lr": 1e-2, **options, "weight_decay": 0.0})

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = (weight.float().mv(x.float()) + bias.float()).pow(2).sum()
        loss.backward()
        return loss

    first = closure().item()
    for _ in range(20):
        last = optimizer.step(closure).item()
    assert last > first if options.get("maximize") else last < first


@every_flag
def test_no_gradient_is_no_change(cls, device, dtype, options):
    ps = parameters(device, dtype)
    before = [p.detach().clone() for p in ps]
    optimizer = cls(ps, **options)
    optimizer.step()
    assert_same([p.detach() for p in ps], before)
    for p in ps:
        p.grad = torch.zeros_like(p)
    optimizer.param_groups[0]["weight_decay"] = 0.0
    optimizer.step()
    assert_same([p.detach() for p in ps], before)
    assert all(set(optimizer.state[p]) >= {"step", "exp_avg", "hessian"} for p in ps)


@every_flag
def test_flags_that_choose_a_way_to_compute_choose_no_result(cls, device, dtype, options):
    plain = {key: value for key, value in options.items() if key not in ("foreach", "fused")}
    assert_same(
        [p.detach() for p in train(cls(parameters(device, dtype), **options), 0, 4)],
        [p.detach() for p in train(cls(parameters(device, dtype), **plain), 0, 4)],
    )


@every_flag
def test_files_copies_and_pickles_go_on_bit_for_bit(cls, device, dtype, options):
    optimizer = cls(parameters(device, dtype), **options)
    train(optimizer, 0, 4)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert_same(saved, optimizer.state_dict())
    public = {name for name in dir(optimizer) if not name.startswith("_")}
    loaded = cls([Parameter(p.detach().clone()) for p in optimizer.param_groups[0]["params"]], **options)
    loaded.load_state_dict(saved)
    copies = [loaded, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    expected = [p.detach() for p in train(optimizer, 4, 3)]
    for twin in copies:
        assert {name for name in dir(twin) if not name.startswith("_")} == public
        assert_same([p.detach() for p in train(twin, 4, 3)], expected)


@every_flag
def test_older_files_lack_flags_and_have_numbers_for_step(cls, device, dtype, options):
    optimizer = cls(parameters(device, dtype), **options)
    train(optimizer, 0, 4)
    file = copy.deepcopy(optimizer.state_dict())
    for group, flag in itertools.product(file["param_groups"], info(cls).not_og_supported_flags):
        del group[flag]
    for state in file["state"].values():
        state["step"] = state["step"].item()
    fresh = cls([Parameter(p.detach().clone()) for p in optimizer.param_groups[0]["params"]], **options)
    fresh.load_state_dict(file)
    assert all(torch.is_tensor(fresh.state[p]["step"]) for p in fresh.param_groups[0]["params"])
    assert_same([p.detach() for p in train(fresh, 4, 3)], [p.detach() for p in train(optimizer, 4, 3)])


@pytest.mark.parametrize("cls", CLASSES.values())
def test_wrong_arguments_are_told_apart(cls):
    for case in info(cls).optim_error_inputs_func("cpu", torch.float32):
        wrong = case.optimizer_error_input
        given = wrong.params if wrong.params is not None else parameters("cpu", torch.float32, ((1, 1),))
        expected = pytest.warns if issubclass(case.error_type, Warning) else pytest.raises
        with expected(case.error_type, match=case.error_regex):
            cls(given, **wrong.kwargs)
    for flag in ("differentiable", "fused"):  # what does not apply here is refused in words
        with pytest.raises(RuntimeError, match=flag):
            cls(parameters("cpu", torch.float32), **{flag: True})


@pytest.mark.parametrize("cls", CLASSES.values())
@pytest.mark.parametrize("named", ["to named", "from named"])
def test_files_with_and_without_names_load_into_each_other(cls, named):
    model = torch.nn.Linear(3, 2)
    ways = model.named_parameters(), model.parameters()
    source, target = (cls(way) for way in (ways if named == "from named" else ways[::-1]))
    train(source, 0, 2)
    target.load_state_dict(source.state_dict())
    assert_same(target.state_dict()["state"], source.state_dict()["state"])


@pytest.mark.parametrize("cls", CLASSES.values())
def test_hooks_run_once_each_and_zero_grad_clears(cls):
    ps = parameters("cpu", torch.float32)
    optimizer, seen = cls(ps), []
    optimizer.register_step_pre_hook(lambda *a: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *a: seen.append("post"))
    optimizer.register_state_dict_pre_hook(lambda *a: seen.append("before save"))
    optimizer.register_state_dict_post_hook(lambda *a: seen.append("saved"))
    optimizer.register_load_state_dict_pre_hook(lambda *a: seen.append("before load"))
    optimizer.register_load_state_dict_post_hook(lambda *a: seen.append("loaded"))
    fill(ps, 0)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["pre", "post", "before save", "saved", "before load", "loaded"]
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in ps)
    optimizer.zero_grad()
    assert all(p.grad is None for p in ps)


@pytest.mark.parametrize("cls", CLASSES.values())
def test_schedulers_of_every_kind_drive_number_and_tensor_lr_alike(cls):
    from torch.optim import lr_scheduler as schedulers

    makers = [
        lambda o: schedulers.StepLR(o, step_size=2, gamma=0.5),
        lambda o: schedulers.ReduceLROnPlateau(o, patience=0),
        lambda o: schedulers.SequentialLR(
            o, [schedulers.LinearLR(o, total_iters=2), schedulers.ExponentialLR(o, gamma=0.9)], milestones=[2]
        ),
    ]
    for make in makers:
        results = []
        for lr in (1e-2, torch.tensor(1e-2, dtype=torch.float64)):
            ps = parameters("cpu", torch.float32)
            optimizer = cls(ps, lr=lr)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # SequentialLR itself calls what torch warns of
                scheduler = make(optimizer)
                for step in range(6):
                    fill(ps, step)
                    optimizer.step()
                    scheduler.step(*([1.0] if isinstance(scheduler, schedulers.ReduceLROnPlateau) else []))
            assert float(optimizer.param_groups[0]["lr"]) < 1e-2
            results.append([p.detach() for p in ps])
        assert_same(*results)


# --- bounds for any input ---

# What float32 holds, subnormal numbers and both zeros included.
numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)
elements = st.lists(st.tuples(numbers, numbers, numbers, numbers), min_size=1, max_size=8)
positive = st.floats(min_value=2**-40, max_value=8.0, width=32)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    cls=st.sampled_from(list(CLASSES.values())),
    elements=elements,
    lr=st.floats(min_value=0, max_value=10.0),
    decay=st.floats(min_value=0, max_value=0.1),
    beta1=st.floats(min_value=0, max_value=0.999),
    rho=st.floats(min_value=0, max_value=1e6),
    maximize=st.booleans(),
)
def test_a_step_of_any_size_stays_within_lr_and_goes_against_m(cls, elements, lr, decay, beta1, rho, maximize):
    p, g, m, h = torch.tensor(elements, dtype=torch.float32).unbind(1)
    if cls is SophiaG:
        h = h.abs()  # an average of squares; Hutchinson's estimate has either sign
    p = p.clamp(-1e30, 1e30)
    parameter = Parameter(p.clone())
    optimizer = cls([parameter], lr=lr, betas=(beta1, 0.99), rho=rho, weight_decay=decay, maximize=maximize)
    step = torch.zeros(())
    optimizer.state[parameter] = {"step": step, "exp_avg": m.clone(), "hessian": h.clone()}
    parameter.grad = g.clone()
    optimizer.step()
    found, moment = parameter.detach().double(), optimizer.state[parameter]["exp_avg"]
    assert found.isfinite().all() and moment.isfinite().all()
    moved = found - p.double() * (1 - lr * decay)
    rounding = 2.0**-22 * (p.abs().double() + lr) + 2.0**-148
    assert (moved.abs() <= lr + rounding).all()
    assert ((moved * moment.sign()) <= rounding).all()  # never with m, whatever h is


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    cls=st.sampled_from(list(CLASSES.values())),
    elements=st.lists(st.tuples(numbers, numbers), min_size=1, max_size=8),
    beta2=st.floats(min_value=0, max_value=1, exclude_max=True),
)
@example(cls=SophiaG, elements=[(0.0, 2.0**64)], beta2=0.0)  # finite, and its square is not
def test_a_refresh_of_any_size_keeps_h_finite(cls, elements, beta2):
    h, g = torch.tensor(elements, dtype=torch.float32).unbind(1)
    h = h.abs() if cls is SophiaG else h
    parameter = Parameter(torch.zeros_like(h))
    optimizer = cls([parameter], betas=(0.9, beta2))
    optimizer.state[parameter] = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(h), "hessian": h.clone()}
    parameter.grad = g.clone()
    optimizer.update_hessian()
    found = optimizer.state[parameter]["hessian"]
    assert found.isfinite().all()
    assert cls is SophiaH or (found >= 0).all()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    cls=st.sampled_from(list(CLASSES.values())),
    mode=st.sampled_from(["stochastic", "master", "nearest"]),
    state_dtype=st.sampled_from([None, torch.bfloat16]),
    elements=st.lists(st.tuples(numbers, numbers), min_size=1, max_size=8),
    lr=st.floats(min_value=0, max_value=1.0),
)
def test_bfloat16_steps_are_bounded_too(cls, mode, state_dtype, elements, lr):
    p, g = torch.tensor(elements, dtype=torch.float32).clamp(-1e30, 1e30).bfloat16().unbind(1)
    parameter = Parameter(p.clone())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of "nearest"
        optimizer = cls([parameter], lr=lr, weight_decay=0.0, bf16_update=mode, state_dtype=state_dtype)
    parameter.grad = g.clone()
    for _ in range(2):
        optimizer.step()
    found = parameter.detach().double()
    assert found.isfinite().all()
    # One step of the format per update, each way.
    assert ((found - p.double()).abs() <= 2 * lr + 2 * 2.0**-7 * (p.abs().double() + 2 * lr) + 2.0**-130).all()
