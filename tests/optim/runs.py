"""What the optimizer's tests share: parameters, gradients and steps that depend on a seed alone, and tiny models."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn import Parameter
from torch.nn.functional import cross_entropy
from torch.utils._pytree import tree_flatten

from growkit.optim import SophiaG, SophiaH

BOTH = pytest.mark.parametrize("cls", [SophiaG, SophiaH])


def params(*shapes, dtype=torch.float32):
    make = torch.Generator().manual_seed(1)
    shapes = shapes or ((4, 3), (5,), ())
    return [Parameter(torch.randn(s, generator=make, dtype=torch.float64).to(dtype)) for s in shapes]


def fill_grads(ps, seed):
    make = torch.Generator().manual_seed(seed)
    for p in ps:
        p.grad = (torch.randn(p.shape, generator=make, dtype=torch.float64) * 1e-2).to(p.dtype)


def drive(optimizer, first=0, steps=8):
    """Steps with a refresh after every third; the gradients depend on the step alone."""
    ps = [p for g in optimizer.param_groups for p in g["params"]]
    for step in range(first, first + steps):
        fill_grads(ps, step)
        optimizer.step()
        if step % 3 == 2:
            fill_grads(ps, 1000 + step)
            optimizer.update_hessian()
    return ps


def snapshot(optimizer):
    """Everything a call may change, as values."""
    ps = [p for g in optimizer.param_groups for p in g["params"]]
    state = [{k: torch.as_tensor(v).clone() for k, v in optimizer.state.get(p, {}).items()} for p in ps]
    groups = [{k: v for k, v in sorted(g.items()) if k != "params"} for g in optimizer.param_groups]
    return [p.detach().clone() for p in ps], state, copy.deepcopy(groups)


def assert_same(a, b):
    (a, a_spec), (b, b_spec) = tree_flatten(a), tree_flatten(b)
    assert a_spec == b_spec
    for x, y in zip(a, b, strict=True):
        if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
        else:
            assert x == y


def mlp(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


# What a refresh has to be told where no training step says it, and what an attached optimizer has to be told.
DECLARED = {
    SophiaG: {"likelihood": "categorical"},
    SophiaH: {"loss": lambda z: cross_entropy(z.flatten(0, -2), torch.arange(z[..., 0].numel()) % 3)},
}
LOSS = {SophiaG: {}, SophiaH: DECLARED[SophiaH]}


def estimate(optimizer):
    """The last refresh's estimate of the curvature, if h was zero before it."""
    ps = [p for g in optimizer.param_groups for p in g["params"]]
    h = torch.cat([optimizer.state[p]["hessian"].flatten() for p in ps])
    return h / (1 - optimizer.param_groups[0]["betas"][1])


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
