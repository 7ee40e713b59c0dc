"""Every kind of warning points at the line of the user's that brought it about, through however many libraries."""

import copy
import inspect
import warnings

import pytest
import torch

import growkit


def optimizer_of():
    p = torch.nn.Parameter(torch.ones(4))
    p.grad = torch.ones_like(p)
    return growkit.SophiaG([p])


def construction():
    growkit.SophiaG([torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))], bf16_update="nearest")


def step_without_refreshes():
    optimizer = optimizer_of()
    for _ in range(21):
        optimizer.step()


def step_of_a_copy_under_a_scheduler():
    optimizer = optimizer_of()
    optimizer.attach(torch.nn.ParameterList(optimizer.param_groups[0]["params"]))
    twin = copy.deepcopy(optimizer)
    twin.param_groups[0]["params"][0].grad = torch.ones(4)
    torch.optim.lr_scheduler.LambdaLR(twin, lambda step: 1.0)  # wraps step()
    twin.step()


def step_by_a_scaler():
    optimizer = optimizer_of()
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    scaler.scale(optimizer.param_groups[0]["params"][0].sum()).backward()
    for _ in range(21):
        scaler.step(optimizer)
        scaler.update()


def load():
    file = optimizer_of().state_dict()
    del file["param_groups"][0]["bs"]
    optimizer_of().load_state_dict(file)


def growth():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20}
    small = transformers.BertForMaskedLM(transformers.BertConfig(**sizes, vocab_size=30, max_position_embeddings=16))
    growkit.LiGO(small, {"hidden_size": 24, "num_attention_heads": 3}, start="closest")


@pytest.mark.parametrize(
    "call",
    [construction, step_without_refreshes, step_of_a_copy_under_a_scheduler, step_by_a_scaler, load, growth],
    ids=lambda call: call.__name__,
)
def test_a_warning_points_at_the_users_line(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    ours = [each for each in caught if each.category is UserWarning and "lr_scheduler" not in str(each.message)]
    assert len(ours) == 1, [str(each.message) for each in caught]
    lines, first = inspect.getsourcelines(call)
    assert ours[0].filename == __file__ and first <= ours[0].lineno < first + len(lines), ours[0]
