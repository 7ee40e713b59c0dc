"""GNB and Hutchinson against exact curvature, and which of a model's logits they score."""

import pytest
import torch
from optim.runs import ATTENTION, BOTH, DECLARED, LABELS, TOKENS, estimate, language_model, mlp
from torch import nn
from torch.func import functional_call, hessian
from torch.nn.functional import cross_entropy

from growkit import ops
from growkit.optim import SophiaG, SophiaH


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

    mean, sigma = averaged(SophiaG, Model(), batches, 250, mask=lambda args, kwargs: args[1], **DECLARED[SophiaG])
    assert_mean(mean, gauss_newton_diagonal(model, x, mask), sigma)


def test_gnb_is_the_gradient_of_cross_entropy_with_its_labels():
    model = mlp(torch.float64)
    x = torch.randn(12, 4, dtype=torch.float64)
    optimizer = SophiaG(model.parameters(), bs=7)
    seen = []

    def loss(z):  # a likelihood of one's own: here the same one, with the labels in sight
        labels = torch.distributions.Categorical(logits=z).sample()
        seen.append(labels)
        return cross_entropy(z, labels), len(labels)

    optimizer.refresh(model, [x[:8], x[8:]], likelihood=loss)
    gradients = torch.autograd.grad(cross_entropy(model(x), torch.cat(seen)), model.parameters())
    expected = 12 / 7 * torch.cat([g.flatten() for g in gradients]).square()
    torch.testing.assert_close(estimate(optimizer), expected, rtol=1e-12, atol=0)


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
    a.refresh(model, [x], **DECLARED[cls])
    b.refresh(other, [x], **DECLARED[cls])
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


SCORED = {
    # which of the 2x5 positions are scored by the training loss
    "gpt2 plain": ("gpt2", {}, [[1, 1, 1, 1, 1], [1, 1, 1, 1, 1]]),
    "gpt2 labels": ("gpt2", {"labels": LABELS}, [[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]),
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
    nll = ops.sampled_nll

    def capture(z, *args, **kwargs):
        result = nll(z, *args, **kwargs)
        captured.extend((z, result[1]))
        return result

    monkeypatch.setattr(ops, "sampled_nll", capture)
    optimizer.refresh(model, [batch], **({} if "labels" in batch else DECLARED[SophiaG]))
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
    optimizer._fold = lambda count, **options: (counted.append(int(count)), fold(count, **options))
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
        (lambda z: {"scores": z}, {}),
        (lambda z: {"scores": z, "other": z.exp()}, {"logits": lambda out: out["scores"]}),
        (lambda z: z.T, {"logits": lambda out: out.T}),
        (lambda z: z.view(2, 3, 3), {}),
    ],
    ids=["tuple", "list", "dict", "two", "transposed", "3-d"],
)
def test_outputs_of_any_kind_give_the_same_estimate(wrap, options):
    x = torch.randn(6, 4)
    plain, wrapped = mlp(), Tuple(wrap)
    a, b = SophiaG(plain.parameters()), SophiaG(wrapped.parameters())
    a.refresh(plain, [x], **DECLARED[SophiaG])
    b.refresh(wrapped, [(x,)], **options, **DECLARED[SophiaG])
    torch.testing.assert_close(estimate(a), estimate(b), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("wrap", "options", "error", "words"),
    [
        (lambda z: {"a": z[:, 1:], "b": z[:, :2]}, {}, TypeError, r"several outputs .*\(a, b\): pass logits=callable"),
        (lambda z: z.sum(), {}, TypeError, "returned Tensor without logits"),
        (lambda z: z[:, :1], {}, ValueError, r"\(6, 1\).*at least 2 classes to sample from"),
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
        optimizer.refresh(model, [torch.randn(6, 4)], **DECLARED[SophiaG], **options)
    assert not optimizer.state and optimizer.stats()["refreshes"] == 0
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    optimizer.attach(model)  # nor is it stuck in a refresh
    model(torch.randn(6, 4))
    assert optimizer._attachment.called
