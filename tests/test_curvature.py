"""GNB and Hutchinson against exact curvature; attach() and refresh(): schedule, models, and what stays untouched."""

import copy
import functools
import pickle
import random
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian
from torch.nn.functional import cross_entropy

from growkit.optim import SophiaG, SophiaH, curvature

BOTH = pytest.mark.parametrize("cls", [SophiaG, SophiaH])
LOSS = {SophiaG: {}, SophiaH: {"loss": lambda z: cross_entropy(z.flatten(0, -2), torch.arange(z[..., 0].numel()) % 3)}}


def mlp(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def estimate(optimizer):
    """The last refresh's estimate of the curvature, if h was zero before it."""
    ps = [p for g in optimizer.param_groups for p in g["params"]]
    h = torch.cat([optimizer.state[p]["hessian"].flatten() for p in ps])
    return h / (1 - optimizer.param_groups[0]["betas"][1])


def averaged(cls, model, batches, runs, **options):
    """Mean and standard error of `runs` independent refreshes, through the public interface."""
    optimizer = cls(model.parameters(), **({"bs": 1} if cls is SophiaG else {}))
    found = []
    for seed in range(runs):
        optimizer.state.clear()
        optimizer.param_groups[0]["seed"] = seed
        optimizer.refresh(model, batches, **options)
        found.append(estimate(optimizer))
    found = torch.stack(found)
    return found.mean(0), found.std(0) / runs**0.5


def assert_mean(found, exact, sigma, floor=1e-9):
    """Every element within 5 standard errors, and their squares as large as chance makes them, not larger."""
    z = (found - exact) / (sigma + floor)
    assert z.abs().max() < 5.5
    assert z.square().mean() < 2


def flat_parameters(model):
    names, ps = zip(*model.named_parameters(), strict=True)
    sizes, shapes = [p.numel() for p in ps], [p.shape for p in ps]
    flat = torch.cat([p.detach().flatten() for p in ps])

    def unflatten(flat):
        return {n: t.view(s) for n, t, s in zip(names, flat.split(sizes), shapes, strict=True)}

    return flat, unflatten


def gauss_newton_diagonal(model, x, mask):
    """Exact diagonal of the Gauss-Newton matrix of the mean NLL: mean over rows of J^T (diag(s) - s s^T) J."""
    flat, unflatten = flat_parameters(model)
    jacobian = torch.func.jacrev(lambda f: functional_call(model, unflatten(f), (x,)).flatten(0, -2))(flat)
    s = model(x).flatten(0, -2).softmax(-1).detach()
    inner = torch.diag_embed(s) - s[:, :, None] * s[:, None, :]
    rows = torch.einsum("nip,nij,njp->np", jacobian, inner, jacobian)
    return rows[mask.flatten()].mean(0)


# --- Gauss-Newton-Bartlett ---


@pytest.mark.parametrize("case", ["one batch", "three batches", "uneven batches", "masked", "masked batches"])
def test_gnb_times_labels_is_the_gauss_newton_diagonal(case):
    model = mlp(torch.float64)
    x = torch.randn(12, 4, dtype=torch.float64)
    mask = torch.arange(12) % 3 != 1 if "masked" in case else torch.ones(12, dtype=torch.bool)
    cuts = {"one batch": [12], "masked": [12], "uneven batches": [1, 8, 3]}.get(case, [4, 4, 4])
    batches = [(part, m) for part, m in zip(x.split(cuts), mask.split(cuts), strict=True)]

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = model

        def forward(self, x, counts):
            return self.body(x)

    mean, sigma = averaged(SophiaG, Model(), batches, 250, mask=lambda args, kwargs: args[1])
    assert_mean(mean, gauss_newton_diagonal(model, x, mask), sigma)


def test_gnb_is_the_gradient_of_cross_entropy_with_its_labels():
    model = mlp(torch.float64)
    x = torch.randn(12, 4, dtype=torch.float64)
    optimizer = SophiaG(model.parameters(), bs=7)
    seen = []

    def loss(z):  # the option for other likelihoods: here the same one, with the labels in sight
        labels = torch.distributions.Categorical(logits=z).sample()
        seen.append(labels)
        return cross_entropy(z, labels), len(labels)

    optimizer.refresh(model, [x[:8], x[8:]], loss=loss)
    gradients = torch.autograd.grad(cross_entropy(model(x), torch.cat(seen)), model.parameters())
    expected = 12 / 7 * torch.cat([g.flatten() for g in gradients]).square()
    torch.testing.assert_close(estimate(optimizer), expected, rtol=1e-12, atol=0)


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


# --- Hutchinson ---


def quadratic_loss(model, x, y):
    return lambda f: cross_entropy(functional_call(model, f, (x,)), y)


def exact_hessian_diagonal(loss_of_flat, flat):
    return hessian(loss_of_flat)(flat).diagonal()


class WithLoss(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x, y):
        return cross_entropy(self.body(x), y)


def test_hutchinson_mean_is_the_hessian_diagonal_of_an_mlp():
    model = mlp(torch.float64)
    x, y = torch.randn(12, 4, dtype=torch.float64), torch.randint(3, (12,))
    flat, unflatten = flat_parameters(model)
    exact = exact_hessian_diagonal(lambda f: cross_entropy(functional_call(model, unflatten(f), (x,)), y), flat)
    for batches in ([(x, y)], [(x[:6], y[:6]), (x[6:], y[6:])]):
        mean, sigma = averaged(SophiaH, WithLoss(model), batches, 200, loss=lambda value: value)
        assert_mean(mean, exact, sigma)
    assert (exact < 0).any()  # the case that a Gauss-Newton estimate cannot see


@pytest.mark.parametrize("cls", [nn.Linear, nn.Conv2d])
def test_hutchinson_probe_is_one_and_the_same_in_any_memory_layout(cls):
    # A diagonal Hessian makes u*(Hu) exact: with another probe on either side it would have random signs.
    p = nn.Parameter(torch.randn(6, 40).mT if cls is nn.Linear else torch.randn(3, 4, 5, 6).mT)
    assert not p.is_contiguous()
    weight = torch.rand(p.shape) + 1

    class Quadratic(nn.Module):
        def __init__(self):
            super().__init__()
            self.p = p

        def forward(self, scale):
            return (scale * weight * self.p.contiguous() ** 2).sum()

    model = Quadratic()
    optimizer = SophiaH(model.parameters())
    optimizer.refresh(model, [1.0], loss=lambda value: value)
    torch.testing.assert_close(optimizer.state[p]["hessian"], 0.02 * weight)


def test_hutchinson_of_complex_parameters_and_of_later_groups():
    z, x = nn.Parameter(torch.randn(5, dtype=torch.complex64)), nn.Parameter(torch.randn(7))

    class Quadratic(nn.Module):
        def __init__(self):
            super().__init__()
            self.z, self.x = z, x

        def forward(self, scale):
            return scale * (3 * z.real.square() + 5 * z.imag.square()).sum() / 2 + (x**2).sum() * 2

    model = Quadratic()
    optimizer = SophiaH([z], seed=1, betas=(0.9, 0.5))
    optimizer.refresh(model, [1.0], loss=lambda value: value)
    optimizer.add_param_group({"params": [x], "seed": 2})
    optimizer.refresh(model, [1.0], loss=lambda value: value)
    h = torch.view_as_real(optimizer.state[z]["hessian"])
    torch.testing.assert_close(h, torch.tensor([3.0, 5.0]).expand(5, 2) * 0.75)
    torch.testing.assert_close(optimizer.state[x]["hessian"], torch.full((7,), 2.0))


@BOTH
def test_maximize_takes_the_curvature_of_minus_the_loss(cls):
    model, other = mlp(), mlp()
    x = torch.randn(6, 4)
    a, b = cls(model.parameters(), maximize=True), cls(other.parameters())
    a.refresh(model, [x], **LOSS[cls])
    b.refresh(other, [x], **LOSS[cls])
    assert torch.equal(estimate(a), estimate(b) * (-1 if cls is SophiaH else 1))


@pytest.mark.parametrize(
    ("make", "options", "error", "words"),
    [
        (lambda: nn.Linear(4, 3), {}, TypeError, "returned Tensor without a loss; pass labels"),
        (
            lambda: nn.Linear(4, 3),
            {"loss": lambda z: z.sum()},
            ValueError,
            r"no second derivative in parameters \[0, 1\]",
        ),
    ],
    ids=["no loss", "linear"],
)
def test_hutchinson_says_what_it_cannot_differentiate(make, options, error, words):
    model = make()
    optimizer = SophiaH(model.parameters())
    with pytest.raises(error, match=words):
        optimizer.refresh(model, [torch.randn(2, 4)], **options)
    assert not optimizer.state and optimizer.stats()["refreshes"] == 0


# --- Hugging Face and other models ---


@functools.cache
def language_model(kind):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    quiet = {"attn_implementation": "sdpa"}
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=7, n_positions=8, n_embd=4, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **quiet,
        )  # fmt: skip
        return transformers.GPT2LMHeadModel(config).double()
    config = transformers.BertConfig(
        vocab_size=7, hidden_size=4, num_hidden_layers=1, num_attention_heads=2, intermediate_size=5, pad_token_id=0,
        max_position_embeddings=8, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **quiet,
    )  # fmt: skip
    cls = transformers.BertForMaskedLM if kind == "bert" else transformers.BertForNextSentencePrediction
    return cls(config).double()


TOKENS = torch.tensor([[1, 2, 3, 4, 5], [6, 5, 4, 0, 0]])
LABELS = torch.tensor([[1, 2, 3, 4, 5], [6, 5, 4, -100, -100]])
ATTENTION = (TOKENS > 0).long()
SCORED = {
    # which of the 2x5 positions are scored by the training loss
    "gpt2 plain": ("gpt2", {}, [[1, 1, 1, 1, 0], [1, 1, 1, 1, 0]]),
    "gpt2 labels": ("gpt2", {"labels": LABELS}, [[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]),
    "gpt2 attention": ("gpt2", {"attention_mask": ATTENTION}, [[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]),
    "gpt2 both": ("gpt2", {"attention_mask": ATTENTION, "labels": LABELS}, [[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]),
    "bert labels": ("bert", {"labels": LABELS}, [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
    "bert sparse labels": (
        "bert",
        {"labels": torch.where(TOKENS == 5, TOKENS, -100)},
        [[0, 0, 0, 0, 1], [0, 1, 0, 0, 0]],
    ),
    "bert plain": ("bert", {}, [[1, 1, 1, 1, 1], [1, 1, 1, 1, 1]]),
}


@pytest.mark.parametrize("case", SCORED)
def test_gnb_scores_the_positions_that_the_training_loss_scores(case, monkeypatch):
    kind, batch, positions = SCORED[case]
    model, positions = language_model(kind), torch.tensor(positions).bool()
    batch = {"input_ids": TOKENS, **batch}
    if "labels" in batch:  # the loss of transformers itself has a gradient at these positions and no other
        output = model(**batch)
        (gradient,) = torch.autograd.grad(output.loss, output.logits)
        assert torch.equal(gradient.abs().sum(-1) > 0, positions)
    optimizer = SophiaG(model.parameters(), bs=1)
    captured = []
    nll = curvature.ops.sampled_nll

    def capture(z, *args, **kwargs):
        result = nll(z, *args, **kwargs)
        captured.extend((z, result[1]))
        return result

    monkeypatch.setattr(curvature.ops, "sampled_nll", capture)
    optimizer.refresh(model, [batch])
    labels = torch.full(TOKENS.shape, -100)
    width = captured[1].numel() // 2
    labels[:, :width] = captured[1].view(2, width)
    assert torch.equal(labels != -100, positions)
    z = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    gradients = torch.autograd.grad(
        cross_entropy(z.flatten(0, 1), labels.flatten()), list(model.parameters()), allow_unused=True
    )
    for p, g in zip(model.parameters(), gradients, strict=True):
        if g is not None:
            h = optimizer.state[p]["hessian"]
            torch.testing.assert_close(h, 0.01 * int(positions.sum()) * g.square(), rtol=1e-9, atol=1e-24)


def test_hutchinson_mean_is_the_hessian_diagonal_of_gpt2_with_sdpa():
    model = language_model("gpt2")
    assert model.config._attn_implementation == "sdpa"
    batch = {"input_ids": TOKENS, "labels": LABELS}
    flat, unflatten = flat_parameters(model)
    flat.requires_grad_()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        loss = functional_call(model, unflatten(flat), kwargs=batch, tie_weights=True).loss
        (g,) = torch.autograd.grad(loss, flat, create_graph=True)
        exact = torch.stack([torch.autograd.grad(g[i], flat, retain_graph=True)[0][i] for i in range(len(flat))])
    mean, sigma = averaged(SophiaH, model, [batch], 100)
    assert_mean(mean, exact.detach(), sigma, floor=1e-7)
    assert exact.abs().max() > 0.01


def test_gnb_does_not_shift_a_sequence_classifier():
    model = language_model("next sentence")
    optimizer = SophiaG(model.parameters(), bs=1)
    labels = torch.tensor([0, 1])
    counted = []
    fold = optimizer._fold
    optimizer._fold = lambda count: (counted.append(int(count)), fold(count))
    optimizer.refresh(model, [{"input_ids": TOKENS, "labels": labels}])
    assert counted == [2]


class Tuple(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.body, self.wrap = mlp(), wrap

    def forward(self, x):
        return self.wrap(self.body(x))


@pytest.mark.parametrize(
    ("wrap", "options"),
    [
        (lambda z: (z, "aux"), {}),
        (lambda z: [z], {}),
        (lambda z: {"scores": z}, {"logits": lambda out: out["scores"]}),
        (lambda z: z.T, {"logits": lambda out: out.T}),
        (lambda z: z.view(2, 3, 3), {}),
    ],
    ids=["tuple", "list", "dict", "transposed", "3-d"],
)
def test_outputs_of_any_kind_give_the_same_estimate(wrap, options):
    x = torch.randn(6, 4)
    plain, wrapped = mlp(), Tuple(wrap)
    a, b = SophiaG(plain.parameters()), SophiaG(wrapped.parameters())
    a.refresh(plain, [x])
    b.refresh(wrapped, [(x,)], **options)
    torch.testing.assert_close(estimate(a), estimate(b), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("wrap", "options", "error", "words"),
    [
        (lambda z: {"scores": z}, {}, TypeError, "returned dict without logits .* pass logits=callable"),
        (lambda z: z.sum(), {}, TypeError, "returned Tensor without logits"),
        (lambda z: z[:, :1], {}, ValueError, r"\(6, 1\).*at least 2 classes.*pass loss="),
        (lambda z: z, {"mask": lambda a, k: torch.ones(5).bool()}, ValueError, r"\(5,\), expected \(6,\).*pass mask="),
    ],
    ids=["dict", "scalar", "one class", "mask"],
)
def test_outputs_that_cannot_be_scored_are_named_and_nothing_changes(wrap, options, error, words):
    model = Tuple(wrap)
    optimizer = SophiaG(model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    grads = [p.grad for p in model.parameters()]
    with pytest.raises(error, match=words):
        optimizer.refresh(model, [torch.randn(6, 4)], **options)
    assert not optimizer.state and optimizer.stats()["refreshes"] == 0
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    optimizer.attach(model)  # nor is it stuck in a refresh
    model(torch.randn(6, 4))
    assert optimizer._attachment.inputs is not None


# --- the schedule ---


def forward_backward(model, step, size=6, scale=lambda loss: loss):
    make = torch.Generator().manual_seed(step)
    p = next(model.parameters())
    x = torch.randn(size, 4, generator=make, dtype=torch.float64).to(p.dtype)
    scale(cross_entropy(model(x), torch.arange(size) % 3)).backward()
    return x


def loop(model, optimizer, steps, first=0):
    """Train; return the steps (from 1) after which a refresh took place."""
    refreshed = []
    for step in range(first, first + steps):
        optimizer.zero_grad()
        forward_backward(model, step)
        before = optimizer.stats()["refreshes"]
        optimizer.step()
        if optimizer.stats()["refreshes"] > before:
            refreshed.append(step + 1)
    return refreshed


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
    expected = copy.deepcopy(optimizer)
    optimizer.step()
    twin = mlp()
    expected = SophiaG(twin.parameters())
    twin.load_state_dict(model.state_dict())
    expected.refresh(twin, [x])
    assert torch.equal(estimate(optimizer), estimate(expected))


def test_masked_labels_reach_the_refresh_of_an_attached_optimizer():
    model = language_model("gpt2")
    twin = copy.deepcopy(model)
    optimizer = SophiaG(model.parameters(), 1e-3)
    optimizer.attach(model)
    model(input_ids=TOKENS, labels=LABELS).loss.backward()
    optimizer.step()
    twin.load_state_dict(model.state_dict())
    expected = SophiaG(twin.parameters())
    expected.refresh(twin, [{"input_ids": TOKENS, "labels": LABELS}])
    model.zero_grad()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(optimizer.state[p]["hessian"], expected.state[q]["hessian"])
    optimizer.detach()


# --- what a refresh must not touch ---


class Disturbing(nn.Module):
    """Dropout, BatchNorm, a buffer that is replaced, a parameter outside the optimizer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.norm, self.drop = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)
        self.outer, self.scale = nn.Linear(8, 3), nn.Parameter(torch.ones(3))
        self.register_buffer("calls", torch.zeros(()))
        self.masks = []

    def forward(self, x):
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
    optimizer.refresh(model, [x], **LOSS[cls])
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
        return masks, dict(model.named_buffers())

    with_refresh, without = train(True), train(False)
    assert all(map(torch.equal, with_refresh[0], without[0]))
    assert all(torch.equal(b, without[1][n]) for n, b in with_refresh[1].items())


def test_an_exception_in_the_refresh_restores_everything_too():
    model = mlp()
    optimizer = SophiaG(model.parameters())
    x = forward_backward(model, 0)
    grads = [p.grad for p in model.parameters()]

    def fail(output):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        optimizer.refresh(model, [x, x], loss=fail)
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    assert not optimizer._refreshing and optimizer.stats()["refreshes"] == 0


@BOTH
def test_a_refresh_that_is_not_finite_is_skipped_counted_and_reported(cls):
    model = mlp()
    optimizer = cls(model.parameters())
    x = torch.randn(6, 4)
    optimizer.refresh(model, [x], **LOSS[cls])
    before = estimate(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.refresh(model, [x * float("nan")], **LOSS[cls])
    assert torch.equal(estimate(optimizer), before)
    assert optimizer.stats()["skipped"] == 1
    with pytest.warns(UserWarning, match="skipped a curvature refresh"):
        optimizer.refresh(model, [x], **LOSS[cls])
    assert not torch.equal(estimate(optimizer), before)


def test_a_refresh_without_labels_is_skipped_and_an_empty_micro_batch_harmless():
    model = mlp()
    x = torch.randn(6, 4)
    none = {"mask": lambda args, kwargs: torch.zeros(6, dtype=torch.bool)}
    optimizer = SophiaG(model.parameters())
    optimizer.refresh(model, [x], **none)
    assert optimizer.stats()["skipped"] == 1 and not estimate(optimizer).any()
    # Row numbers go on over an empty batch, so only the first batch of each may carry labels to be comparable.
    some = {"mask": lambda args, kwargs: torch.full((6,), args[0] is x)}
    a, b = SophiaG(model.parameters()), SophiaG(model.parameters())
    a.refresh(model, [x, x.clone()], **some)
    b.refresh(model, [x])
    assert torch.equal(estimate(a), estimate(b)) and a.stats()["skipped"] == 0


# --- attaching ---


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
    assert optimizer._attachment.inputs[0][0] is x
    optimizer.step()
    assert optimizer.stats()["skipped"] == 0 and optimizer.stats()["refreshes"] == 1
    assert optimizer._attachment.inputs is None  # no batch is held longer than needed


def test_the_autocast_of_the_training_forward_is_entered_again():
    model, seen = mlp(), []
    model[0].register_forward_hook(lambda m, a, out: seen.append((out.dtype, torch.is_autocast_enabled("cpu"))))
    optimizer = SophiaG(model.parameters())
    optimizer.attach(model, every=1)
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
    model, other = mlp(), mlp()
    optimizer = SophiaG(other.parameters())
    optimizer.attach(model, every=3)
    with pytest.warns(UserWarning, match="took 7 steps without a curvature refresh"):
        loop(other, optimizer, 8)


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
