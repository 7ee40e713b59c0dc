"""One attached step of each kind of model: the curvature is that of what its loss scores, or is asked for in words."""

import copy

import pytest
import torch
from optim.runs import LABELS, TOKENS, language_model, mlp
from torch import nn
from torch.nn import functional as F

from growkit import ops
from growkit.optim import SophiaG, gaussian


class Wrapped(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, *args, **kwargs):
        return self.body(*args, **kwargs)


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.first, self.second = mlp(), nn.Linear(3, 4), nn.Linear(3, 5)

    def forward(self, x):
        z = self.body(x).tanh()
        return self.first(z), self.second(z)


SPECIAL = {"vocab_size": 12, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 2}
PARTS = {f"{part}_{name}": 1 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
PARTS |= {name: 8 for name in ("d_model", "encoder_ffn_dim", "decoder_ffn_dim")} | {"dropout": 0.0}


def transformer(name, **shape):
    """A model of transformers by its class, made from a configuration of this shape."""
    transformers = pytest.importorskip("transformers")
    cls = getattr(transformers, name)
    return cls(cls.config_class(**shape))


def bart():
    return transformer("BartForConditionalGeneration", max_position_embeddings=16, **PARTS, **SPECIAL)


def t5():
    shape = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
    return transformer("T5ForConditionalGeneration", **shape, **SPECIAL)


def whisper():
    shape = {"num_mel_bins": 4, "max_source_positions": 4, "max_target_positions": 16}
    return transformer("WhisperForConditionalGeneration", **shape, **PARTS, **SPECIAL)


def llava():
    tiny = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    image = {"model_type": "clip_vision_model", "image_size": 4, "patch_size": 2} | tiny
    text = {"model_type": "llama", "vocab_size": 12, "max_position_embeddings": 16} | tiny
    return transformer("LlavaForConditionalGeneration", vision_config=image, text_config=text, image_token_id=11)


def lora():
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(copy.deepcopy(language_model("gpt2")), peft.LoraConfig(r=2, target_modules=["c_attn"]))


def compiled():
    return torch.compile(copy.deepcopy(language_model("gpt2")), backend="aot_eager")


X, CLASSES = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3


def shifted(labels):
    """The rows that are scored where each position is asked for the next one."""
    return torch.cat([labels[:, 1:] != -100, torch.zeros(len(labels), 1).bool()], 1)


SHIFTED = shifted(LABELS)
PIXELS = torch.ones(2, 3, 4, 4)
CAPTION = torch.cat([torch.full((2, 4), 11), TOKENS], 1), torch.cat([torch.full((2, 4), -100), LABELS], 1)
TARGETS = torch.randn(6, 3, generator=torch.Generator().manual_seed(2))
TEXT = {"input_ids": TOKENS, "labels": LABELS}
own = lambda output, *_: output["loss"]  # noqa: E731
# kind: model, its call, the loss of its output, the rows that it scores, the axis of the classes (None: elementwise);
# and what attach() is told. Regression, which draws no labels, has tests of its own.
KINDS = {
    "causal": (lambda: copy.deepcopy(language_model("gpt2")), TEXT, own, SHIFTED, -1),
    "masked": (lambda: copy.deepcopy(language_model("bert")), TEXT, own, LABELS != -100, -1),
    "seq2seq": (bart, {"input_ids": TOKENS, "labels": LABELS}, own, LABELS != -100, -1),
    "T5 from labels alone": (t5, {"input_ids": TOKENS, "labels": LABELS}, own, LABELS != -100, -1),
    "speech": (whisper, {"input_features": torch.ones(2, 4, 8), "labels": LABELS}, own, LABELS != -100, -1),
    "classifier": (mlp, {"input": X}, lambda z: F.cross_entropy(z, CLASSES), torch.ones(6).bool(), -1),
    "segmentation": (
        lambda: nn.Conv2d(4, 3, 1), {"input": X.view(2, 4, 3, 1)},
        lambda z: F.cross_entropy(z, CLASSES.view(2, 3, 1)), torch.ones(2, 3, 1).bool(), 1,
    ),
    "multi-label": (
        mlp, {"input": X}, lambda z: F.binary_cross_entropy_with_logits(z, (TARGETS > 0).float()),
        torch.ones(6, 3).bool(), None,
    ),
    "multimodal": (
        llava, {"input_ids": CAPTION[0], "pixel_values": PIXELS, "labels": CAPTION[1]}, own, shifted(CAPTION[1]), -1,
    ),
    "two heads": (
        Heads, {"input": X}, lambda z: F.cross_entropy(z[0], CLASSES) + 0.1 * z[1].square().mean(),
        torch.ones(6).bool(), -1, {"logits": lambda z: z[0]},
    ),
    "wrapped": (lambda: Wrapped(copy.deepcopy(language_model("gpt2"))), TEXT, own, SHIFTED, -1),
    "peft": (lora, TEXT, own, SHIFTED, -1),
    "compiled": (compiled, TEXT, own, SHIFTED, -1),
    "ignored": (
        mlp, {"input": X}, lambda z: F.cross_entropy(z, CLASSES, ignore_index=1), CLASSES != 1, -1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_the_curvature_is_that_of_what_the_loss_scores(kind, monkeypatch):
    make, call, loss, rows, axis, *told = KINDS[kind]
    told = told[0] if told else {}
    torch.manual_seed(1)
    model = make()
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = SophiaG(params, lr=0.0, bs=1)
    optimizer.attach(model, **told)
    loss(model(*call.values()) if "input" in call else model(**call)).backward()
    drawn, nll = [], ops.sampled_nll
    monkeypatch.setattr(ops, "sampled_nll", lambda *a, **k: drawn.append(nll(*a, **k)) or drawn[-1])
    optimizer.step()
    labels = drawn[0][1].view(rows.shape)
    assert len(drawn) == 1 and torch.equal(labels != -100, rows)
    output = model(*call.values()) if "input" in call else model(**call)
    z = told["logits"](output) if told else output if isinstance(output, torch.Tensor) else output["logits"]
    z = torch.stack([torch.zeros_like(z), z], -1) if axis is None else z.movedim(axis, -1)
    with torch.compiler.set_stance("force_eager"):
        gradients = torch.autograd.grad(F.cross_entropy(z[rows], labels[rows]), params, allow_unused=True)
    for p, g in zip(params, gradients, strict=True):
        if g is not None:
            torch.testing.assert_close(
                optimizer.state[p]["hessian"], 0.01 * int(rows.sum()) * g.square(), rtol=1e-4, atol=1e-12
            )


def attached_step(model, loss, **options):
    optimizer = SophiaG(model.parameters(), lr=1e-2, bs=1, betas=(0.9, 0.0))
    optimizer.attach(model, **options)
    loss(model(X)).backward()
    before = [p.detach().clone() for p in model.parameters()]
    try:
        optimizer.step()
    except TypeError:
        assert all(map(torch.equal, model.parameters(), before)) and not optimizer.state
        raise
    return optimizer


@pytest.mark.parametrize(
    ("model", "loss", "words"),
    [
        (mlp, lambda z: F.mse_loss(z, TARGETS), "neither that of a cross-entropy .*gaussian"),
        (mlp, lambda z: F.smooth_l1_loss(z, TARGETS), "neither that of a cross-entropy"),
        (mlp, lambda z: F.poisson_nll_loss(z, TARGETS.abs()), "neither that of a cross-entropy"),
        (Heads, lambda z: sum(F.cross_entropy(each, CLASSES) for each in z), "several outputs .*pass logits="),
        (lambda: nn.Linear(4, 1), lambda z: F.mse_loss(z, TARGETS[:, :1]), "neither that of a cross-entropy"),
    ],
    ids=["regression", "huber", "poisson", "two heads", "one output"],
)
def test_what_cannot_be_known_is_asked_for_before_anything_moves(model, loss, words):
    with pytest.raises(TypeError, match=words):
        attached_step(model(), loss)


def test_regression_has_the_curvature_of_its_squares():
    model, total = nn.Linear(4, 3), 0
    for seed in range(300):
        optimizer = SophiaG(model.parameters(), lr=0.0, bs=1, betas=(0.9, 0.0), seed=seed)
        optimizer.attach(model, likelihood=gaussian(0.5**0.5))
        F.mse_loss(model(X), TARGETS).backward()
        optimizer.step()
        optimizer.detach()
        total = total + optimizer.state[model.weight]["hessian"]
    exact = 2 / 18 * X.square().sum(0).expand(3, 4)  # the Hessian of the mean of 18 squares
    assert (total / 300 / exact).mean().sub(1).abs() < 0.15


def test_multi_label_has_the_curvature_of_its_bernoullis():
    model, total = nn.Linear(4, 3), 0
    y = (TARGETS > 0).float()
    for seed in range(300):
        optimizer = SophiaG(model.parameters(), lr=0.0, bs=1, betas=(0.9, 0.0), seed=seed)
        optimizer.attach(model)
        F.binary_cross_entropy_with_logits(model(X), y).backward()
        optimizer.step()
        optimizer.detach()
        total = total + optimizer.state[model.weight]["hessian"]
    p = model(X).detach().sigmoid()
    exact = (p * (1 - p)).mT @ X.square() / 18
    assert (total / 300 / exact).mean().sub(1).abs() < 0.15


def test_a_near_match_is_told_once_and_a_declared_one_is_not():
    def smoothed(z):
        return F.cross_entropy(z, CLASSES, label_smoothing=0.2)

    with pytest.warns(UserWarning, match="smoothed or soft labels") as caught:
        attached_step(mlp(), smoothed)
    assert len(caught) == 1
    declared = attached_step(mlp(), smoothed, likelihood="categorical")
    assert declared.stats()["refreshes"] == 1


@pytest.mark.parametrize("likelihood", ["poisson", 3, gaussian])
def test_an_unknown_likelihood_is_refused_at_attach(likelihood):
    optimizer = SophiaG(mlp().parameters())
    with pytest.raises(ValueError, match="likelihood=.*expected 'categorical', 'bernoulli'"):
        optimizer.attach(mlp(), likelihood=likelihood)
    assert optimizer.param_groups[0]["every"] == 0
