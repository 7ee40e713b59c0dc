"""attach() and refresh(): the schedule, and what stays untouched."""

import copy
import pickle
import random
import warnings

import pytest
import torch
from optim import runs
from optim.runs import BOTH, DECLARED, LABELS, LOSS, TOKENS, estimate, forward_backward, language_model, loop, mlp
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from growkit.optim import SophiaG, SophiaH, attach, gaussian, replay
from growkit.optim.replay import replaying


@pytest.mark.parametrize("bs", [1, 5120, 1 << 20])
def test_trajectory_of_an_attached_optimizer_does_not_depend_on_bs(bs):
    def train(bs):
        model = mlp(torch.float64)
        optimizer = SophiaG(model.parameters(), 1e-2, bs=bs, eps=0.0)
        optimizer.attach(model, every=2)
        loop(model, optimizer, 12)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    torch.testing.assert_close(train(bs), train(1 << 10), rtol=1e-12, atol=1e-14)
    if bs != 5120:  # powers of two are exact
        assert torch.equal(train(bs), train(1 << 10))


def test_step_with_another_bs_on_an_attached_optimizer_raises():
    model = mlp()
    optimizer = SophiaG(model.parameters(), bs=64)
    optimizer.attach(model)
    forward_backward(model, 0)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"step\(bs=65\).*attached with bs=64"):
        optimizer.step(bs=65)
    assert all(map(torch.equal, model.parameters(), before)) and not optimizer.state
    optimizer.step(bs=64)


@BOTH
@pytest.mark.parametrize(
    ("every", "phase", "expected"),
    [
        (10, "paper", [1, 11, 21]),
        (10, "official", [10, 20]),
        (1, "paper", [*range(1, 26)]),
        (1, "official", [*range(1, 26)]),
        (4, "paper", [1, 5, 9, 13, 17, 21, 25]),
    ],
)
def test_refreshes_follow_the_schedule(cls, every, phase, expected):
    model = mlp()
    optimizer = cls(model.parameters(), 1e-3)
    optimizer.attach(model, every=every, phase=phase, **LOSS[cls])
    assert loop(model, optimizer, 25) == expected
    assert optimizer.stats()["steps"] == 25


@BOTH
@pytest.mark.parametrize("stop", [5, 10, 11, 13])
def test_schedule_and_trajectory_survive_a_file(cls, stop):
    def fresh():
        model = mlp()
        optimizer = cls(model.parameters(), 1e-2)
        optimizer.attach(model, every=6, **LOSS[cls])
        return model, optimizer

    model, optimizer = fresh()
    refreshed = loop(model, optimizer, 25)
    first, saver = fresh()
    seen = loop(first, saver, stop)
    second, loader = fresh()
    second.load_state_dict(first.state_dict())
    loader.load_state_dict(copy.deepcopy(saver.state_dict()))
    seen += loop(second, loader, 25 - stop, stop)
    assert seen == refreshed == [1, 7, 13, 19, 25]
    assert all(map(torch.equal, model.parameters(), second.parameters()))


def test_a_step_without_a_forward_is_not_one_of_the_schedule():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = mlp()
    optimizer = SophiaG(model.parameters())
    optimizer.attach(model)
    get_optimizer_state_dict(model, optimizer)  # takes one step with zero gradients to make the state
    assert optimizer.stats()["steps"] == 0
    assert loop(model, optimizer, 12) == [1, 11]


def test_accumulation_refreshes_once_on_the_last_micro_batch():
    model = mlp()
    optimizer = SophiaG(model.parameters())
    optimizer.attach(model, every=1)
    for micro in range(3):
        x = forward_backward(model, micro, size=4 + micro)
    twin = copy.deepcopy(model)  # the curvature is that of the weights the batch was trained at
    optimizer.step()
    expected = SophiaG(twin.parameters())
    expected.refresh(twin, [x], **DECLARED[SophiaG])
    assert torch.equal(estimate(optimizer), estimate(expected))


def test_masked_labels_reach_the_refresh_of_an_attached_optimizer():
    model = language_model("gpt2")
    twin = copy.deepcopy(model)
    optimizer = SophiaG(model.parameters(), 1e-3)
    optimizer.attach(model)
    model(input_ids=TOKENS, labels=LABELS).loss.backward()
    optimizer.step()
    expected = SophiaG(twin.parameters())
    expected.refresh(twin, [{"input_ids": TOKENS, "labels": LABELS}])
    model.zero_grad()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(optimizer.state[p]["hessian"], expected.state[q]["hessian"])
    optimizer.detach()


class Disturbing(nn.Module):
    """Dropout, BatchNorm, a replaced buffer, a parameter outside the optimizer, a hook from the first call on."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.norm, self.drop = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)
        self.outer, self.scale = nn.Linear(8, 3), nn.Parameter(torch.ones(3))
        self.register_buffer("calls", torch.zeros(()))
        self.masks = []

    def forward(self, x):
        if "hooked" not in vars(self):
            self.hooked = self.outer.register_forward_hook(lambda module, args, output: output * 2)
        self.calls = self.calls + 1
        hidden = self.drop(self.norm(self.inner(x)).tanh())
        self.masks.append(hidden == 0)
        return self.outer(hidden) * self.scale


@BOTH
def test_a_refresh_leaves_no_trace_but_h(cls):
    model = Disturbing()
    inside = [p for n, p in model.named_parameters() if n != "scale"]
    optimizer = cls(inside, 1e-2)
    x = forward_backward(model, 0)
    grads = [p.grad for p in model.parameters()]
    values = [g.clone() for g in grads]
    buffers = dict(model.named_buffers())
    copies = {n: b.clone() for n, b in buffers.items()}
    python, state = random.getstate(), torch.get_rng_state()
    weights = [p.detach().clone() for p in model.parameters()]
    optimizer.refresh(model, [x], **DECLARED[cls])
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    assert all(map(torch.equal, grads, values)) and all(map(torch.equal, model.parameters(), weights))
    assert all(b is buffers[n] and torch.equal(b, copies[n]) for n, b in model.named_buffers())
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == python
    assert model.training and estimate(optimizer).any()


@BOTH
def test_training_with_refreshes_draws_the_dropout_masks_of_training_without(cls):
    def train(attach):
        model = Disturbing()
        optimizer = cls([*model.inner.parameters(), *model.outer.parameters()], lr=0.0, weight_decay=0.0)
        if attach:
            optimizer.attach(model, every=1, **LOSS[cls])
        torch.manual_seed(1)
        masks = []
        for step in range(5):
            model.masks.clear()
            forward_backward(model, step)
            masks.append(model.masks[0])
            optimizer.step()
        assert len(model.outer._forward_hooks) == 1
        return masks, dict(model.named_buffers())

    with_refresh, without = train(True), train(False)
    assert all(map(torch.equal, with_refresh[0], without[0]))
    assert all(torch.equal(b, without[1][n]) for n, b in with_refresh[1].items())


def test_a_sparse_gradient_that_a_hook_makes_dense_is_refreshed_too():
    x, found = torch.arange(4), []
    for sparse in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(6, 3, sparse=sparse))
        weight = model[0].weight
        optimizer = SophiaG([weight])
        optimizer.attach(model)
        if sparse:
            weight.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", p.grad.to_dense()))
        cross_entropy(model(x), x % 3).backward()
        optimizer.step()
        found.append(optimizer.state[weight]["hessian"])
    assert found[0].any() and torch.equal(*found)


def test_an_exception_in_the_refresh_restores_everything_too():
    model = mlp()
    optimizer = SophiaG(model.parameters())
    x = forward_backward(model, 0)
    grads = [p.grad for p in model.parameters()]

    def fail(output):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        optimizer.refresh(model, [x, x], likelihood=fail)
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    assert not replaying() and optimizer.stats()["refreshes"] == 0


@BOTH
def test_a_refresh_that_is_not_finite_is_skipped_counted_and_reported(cls):
    model = mlp()
    optimizer = cls(model.parameters())
    x = torch.randn(6, 4)
    optimizer.refresh(model, [x], **DECLARED[cls])
    before = estimate(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.refresh(model, [x * float("nan")], **DECLARED[cls])
    assert torch.equal(estimate(optimizer), before)
    assert optimizer.stats()["skipped"] == 1
    with pytest.warns(UserWarning, match="skipped a curvature refresh"):
        optimizer.refresh(model, [x], **DECLARED[cls])
    assert not torch.equal(estimate(optimizer), before)


def test_a_refresh_without_labels_is_skipped_and_an_empty_micro_batch_harmless():
    model = mlp()
    x = torch.randn(6, 4)
    none = {"mask": lambda args, kwargs: torch.zeros(6, dtype=torch.bool)}
    optimizer = SophiaG(model.parameters())
    optimizer.refresh(model, [x], **none, **DECLARED[SophiaG])
    assert optimizer.stats()["skipped"] == 1 and not estimate(optimizer).any()
    # Row numbers go on over an empty batch, so only the first batch of each may carry labels to be comparable.
    some = {"mask": lambda args, kwargs: torch.full((6,), args[0] is x)}
    a, b = SophiaG(model.parameters()), SophiaG(model.parameters())
    a.refresh(model, [x, x.clone()], **some, **DECLARED[SophiaG])
    b.refresh(model, [x], **DECLARED[SophiaG])
    assert torch.equal(estimate(a), estimate(b)) and a.stats()["skipped"] == 0


def test_forwards_without_training_or_gradients_are_ignored():
    model = mlp()
    optimizer = SophiaG(model.parameters())
    optimizer.attach(model, every=1)
    x = forward_backward(model, 0)
    with torch.no_grad():
        model(torch.full((2, 4), float("nan")))
    model.eval()
    model(torch.full((2, 4), float("nan")))
    model.train()
    assert torch.equal(optimizer._attachment.call.args[0], x)
    optimizer.step()
    assert optimizer.stats()["skipped"] == 0 and optimizer.stats()["refreshes"] == 1
    assert optimizer._attachment.call is None  # no batch is held longer than needed


def test_the_autocast_of_the_training_forward_is_entered_again():
    model, seen = mlp(), []
    model[0].register_forward_hook(lambda m, a, out: seen.append((out.dtype, torch.is_autocast_enabled("cpu"))))
    optimizer = SophiaG(model.parameters())
    optimizer.attach(model, every=1, likelihood=gaussian(1.0))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(torch.randn(6, 4)).float().square().mean()
    loss.backward()
    optimizer.step()
    forward_backward(model, 0)
    with torch.autocast("cpu", torch.bfloat16):
        optimizer.step()
    assert seen == [(torch.bfloat16, True)] * 2 + [(torch.float32, False)] * 2


def test_attach_twice_raises_and_detach_undoes_it():
    model = mlp()
    optimizer = SophiaG(model.parameters())
    optimizer.attach(model, every=1)
    with pytest.raises(RuntimeError, match="attached already, call detach"):
        optimizer.attach(model)
    assert loop(model, optimizer, 2) == [1, 2]
    optimizer.detach()
    optimizer.detach()
    assert not model._forward_pre_hooks and loop(model, optimizer, 2) == []
    optimizer.attach(model, every=1)
    assert loop(model, optimizer, 1) == [1]


@pytest.mark.parametrize("way", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_a_copy_is_attached_to_nothing_and_says_so_once(way):
    model = mlp()
    optimizer = SophiaG(model.parameters())
    optimizer.attach(model)
    loop(model, optimizer, 2)
    twin = way(optimizer)
    for p in twin.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    with pytest.warns(UserWarning, match="attached with every=10, but this copy is attached to no model") as caught:
        twin.step()
        twin.step()
    assert len(caught) == 1 and loop(model, optimizer, 10, 2) == [11]


def test_a_copy_or_file_of_the_model_carries_neither_optimizer_nor_batch():
    model = mlp()
    optimizer = SophiaG(model.parameters())
    optimizer.attach(model, every=1)
    x = forward_backward(model, 0)
    size = len(pickle.dumps(mlp()))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))
        assert len(pickle.dumps(twin)) < size + 1000
    loop(model, optimizer, 1)
    assert optimizer.stats()["refreshes"] == 1


def test_an_attached_model_that_is_never_called_warns():
    model = mlp()
    optimizer = SophiaG(model.parameters())
    optimizer.attach(model, every=3)
    parts = nn.Sequential(*model)  # the same parameters under another roof
    with pytest.warns(UserWarning, match="two steps without seeing a call of the attached model") as caught:
        loop(parts, optimizer, 3)
    assert len(caught) == 1 and caught[0].filename == runs.__file__
    with pytest.warns(UserWarning, match="took 7 steps without a curvature refresh"):
        loop(parts, optimizer, 5)


def test_attach_works_with_a_compiled_model():
    model, eager = mlp(), mlp()
    compiled = torch.compile(model, backend="eager")
    a, b = SophiaG(model.parameters(), 1e-2), SophiaG(eager.parameters(), 1e-2)
    a.attach(model, every=3)
    b.attach(eager, every=3)
    assert loop(compiled, a, 7) == loop(eager, b, 7) == [1, 4, 7]
    assert all(map(torch.equal, model.parameters(), eager.parameters()))


def test_attach_works_with_grad_scaler():
    model = mlp()
    optimizer = SophiaG(model.parameters(), 1e-2)
    optimizer.attach(model, every=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    plain = mlp()
    expected = SophiaG(plain.parameters(), 1e-2)
    expected.attach(plain, every=2)
    for step in range(6):
        optimizer.zero_grad()
        forward_backward(model, step, scale=scaler.scale)
        scaler.step(optimizer)
        scaler.update()
    loop(plain, expected, 6)
    assert all(map(torch.equal, model.parameters(), plain.parameters()))


def test_training_with_attach_lowers_the_loss():
    for cls in (SophiaG, SophiaH):
        model = mlp()
        x = torch.randn(30, 4)
        y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
        optimizer = cls(model.parameters(), 1e-2, rho=0.05, weight_decay=0.0)
        optimizer.attach(model, **({} if cls is SophiaG else {"loss": lambda z, y=y: cross_entropy(z, y)}))
        losses = []
        for _ in range(150):
            optimizer.zero_grad()
            loss = cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.4 * losses[0]
        assert 0 < optimizer.stats()["unclipped"] < 1


class Waits(TorchDispatchMode):
    """Operators whose result depends on values, for which the host would wait, but for those that read `known`."""

    def __init__(self, known):
        super().__init__()
        self.known, self.found = {t.data_ptr() for t in known}, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        reading = name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount")
        reading |= name == "index" and any(t is not None and t.dtype == torch.bool for t in args[1])
        if reading and args[0].data_ptr() not in self.known:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


LIKELIHOODS = {
    "categorical": lambda z: cross_entropy(z, torch.tensor([0, 1, 2, -100, -100, 0])),
    "bernoulli": lambda z: binary_cross_entropy_with_logits(z, torch.arange(18.0).view(6, 3) % 2),
    "gaussian": lambda z: z.square().mean(),
}


@pytest.mark.parametrize("kind", LIKELIHOODS)
def test_only_the_first_refresh_waits_to_learn_what_the_loss_scores(kind):
    model = mlp()
    optimizer = SophiaG(model.parameters(), 1e-3)
    optimizer.attach(model, every=1, likelihood=gaussian(1.0) if kind == "gaussian" else None)
    found = []
    for step in range(3):
        optimizer.zero_grad()
        loss = LIKELIHOODS[kind](model(torch.randn(6, 4, generator=torch.Generator().manual_seed(step))))
        counters = [v for group in optimizer.param_groups for v in group.values() if isinstance(v, torch.Tensor)]
        with Waits(counters) as waits:
            loss.backward()
            at = optimizer._attachment
            attach.estimate(optimizer, model, [at.call], at.process_group, at.options, at.known)
        found.append(waits.found)
        optimizer.step()
    assert found[0] and not found[1] and not found[2], found


def flat(ps):
    return [nn.Parameter(torch.cat([p.detach().flatten() for p in ps]))]


def one_in_float32(ps):
    """As Megatron's optimizers do with those in 16 bits: a copy that requires no gradient."""
    return [ps[0].detach().clone(), *ps[1:]]


@pytest.mark.parametrize("replaced, lost", [(flat, 4), (one_in_float32, 1)])
def test_parameters_that_a_wrapper_has_replaced_by_copies_are_refused(replaced, lost):
    model = mlp()
    optimizer = SophiaG(model.parameters())
    optimizer.attach(model)
    optimizer.param_groups[0]["params"] = copies = replaced(list(model.parameters()))
    forward_backward(model, 0)
    copies[0].grad = torch.ones_like(copies[0])
    before = copies[0].clone()
    with pytest.raises(
        RuntimeError, match=f"{lost} of the 4 parameters .* replaced after attach.* DeepSpeed's ZeRO and"
    ):
        optimizer.step()
    assert torch.equal(copies[0], before) and not optimizer.state


def test_an_optimizer_of_none_of_the_models_parameters_is_refused_whether_they_require_gradients_or_not():
    model = mlp()
    for ps in (flat(model.parameters()), [p.detach() for p in model.parameters()]):
        with pytest.raises(ValueError, match=rf"none of the optimizer's {len(ps)} parameters .*Megatron's"):
            SophiaG(ps).attach(model)


@pytest.mark.parametrize("late", [False, True])
def test_gradients_in_main_grad_are_refused(late):
    """As Megatron's DDP and layers with fused accumulation have them."""
    model = mlp()
    optimizer = SophiaG(model.parameters())
    if late:
        optimizer.attach(model)
    model[0].weight.main_grad = torch.zeros_like(model[0].weight)
    forward_backward(model, 0)
    with pytest.raises(RuntimeError, match="parameter 0.weight has its gradient in main_grad"):
        optimizer.step() if late else optimizer.attach(model)
    assert not optimizer.state


def test_parameters_of_zero_stage_3_are_refused():
    model = mlp()
    model[0].weight.ds_id = 0  # DeepSpeed's mark
    with pytest.raises(RuntimeError, match="DeepSpeed's ZeRO stage 3"):
        SophiaG(model.parameters()).attach(model)


class Graphed(nn.Module):
    """As torch.cuda.make_graphed_callables leaves a module: the gradients of every backward lie in the same memory."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        self.memory = memory = [torch.zeros_like(p) for p in module.parameters()]

        class Replay(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, *params):
                ctx.save_for_backward(x)
                return module(x).detach()

            @staticmethod
            def backward(ctx, g):
                with torch.enable_grad():
                    found = torch.autograd.grad(module(*ctx.saved_tensors), list(module.parameters()), g)
                return None, *[into.copy_(new).detach() for into, new in zip(memory, found, strict=True)]

        self.replay = Replay.apply

    def forward(self, x):
        return self.replay(x, *self.module.parameters())


def test_a_refresh_leaves_gradients_in_the_memory_of_a_cuda_graph(monkeypatch):
    def train(wrap):
        module = mlp()
        model = wrap(module)
        optimizer = SophiaG(model.parameters(), 1e-2)
        optimizer.attach(model, every=2)
        for seed in range(6):
            x = torch.randn(32, 4, generator=torch.Generator().manual_seed(seed))
            cross_entropy(model(x), torch.arange(32) % 3).backward()
            optimizer.step()
            optimizer.zero_grad()
        return torch.cat([p.detach().flatten() for p in module.parameters()])

    eager = train(lambda module: module)
    monkeypatch.setattr(replay, "_on_gpu", lambda t: isinstance(t, torch.Tensor))
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
    memory = []
    monkeypatch.setattr(
        torch.cuda,
        "memory_snapshot",
        lambda: [
            {"segment_pool_id": (0, 1), "address": t.data_ptr(), "total_size": t.untyped_storage().nbytes()}
            for t in memory
        ],
    )

    def graphed(module):
        model = Graphed(module)
        memory[:] = model.memory
        return model

    assert torch.equal(train(graphed), eager)
