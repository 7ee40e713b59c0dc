"""Kinds of growth against what their papers say, weight by weight."""

import typing

import pytest
import torch

from growkit import LiGO
from growkit.cli import growth as cli
from growkit.growth.ligo import StartName
from growkit.growth.spaces import Terms
from growkit.growth.starts import STARTS

transformers = pytest.importorskip("transformers")

from growth.models import CONFIGS, batches, bert, change, gpt2, model  # noqa: E402


def _copied(grown, weight, axis):
    """Which of the first rows each row of a grown weight is."""
    rows = grown.movedim(axis, 0)
    return [next(i for i, other in enumerate(weight.movedim(axis, 0)) if other.equal(row)) for row in rows]


def test_net2net_copies_drawn_units_and_splits_what_is_read_of_them():
    """Net2WiderNet (arXiv:1511.05641), eq. 1 and 2, with parts that sum to one in place of 1 / count."""
    small = model(gpt2(24, 3, 2, 50))
    grown = LiGO(small, {"n_inner": 77}, start="net2net", seed=3).grow()
    index = None
    for old, new in zip(small.transformer.h, grown.transformer.h, strict=True):
        found = _copied(new.mlp.c_fc.weight, old.mlp.c_fc.weight, 1)
        assert found[:50] == list(range(50)) and (index is None or found == index)
        index = found
        total = torch.zeros_like(old.mlp.c_proj.weight).index_add_(0, torch.tensor(found), new.mlp.c_proj.weight)
        torch.testing.assert_close(total, old.mlp.c_proj.weight, rtol=1e-12, atol=1e-14)
    assert len(set(index[50:])) == 27 and index[50:] != sorted(index[50:])
    other = LiGO(small, {"n_inner": 77}, start="net2net", seed=4).grow()
    assert not other.transformer.h[0].mlp.c_fc.weight.equal(grown.transformer.h[0].mlp.c_fc.weight)


def test_fpi_is_lossless_where_norms_see_whole_copies_and_refused_elsewhere():
    small = model(bert(24, 3, 2, 50))
    assert change(small, LiGO(small, bert(72, 9, 3, 77), start="fpi").grow()) < 1e-12
    with pytest.raises(ValueError, match="hidden_size: .* a multiple of 24: got 40, nearest 48"):
        LiGO(small, bert(40, 5, 3, 77), start="fpi")


def test_aki_writes_new_units_by_the_next_layer_and_reads_them_as_copies():
    """bert2BERT (arXiv:2110.07143): U^l(*, j) of W^l for j <= d_out, of W^(l+1)(*, g(j)) for others; then stacked."""
    small = model(gpt2(24, 3, 2, 50))
    operator = LiGO(small, {"n_inner": 77, "n_layer": 3}, start="aki")
    assert isinstance(operator.maps["ffn_write"], Terms) and "next layer" in operator.reason and not operator.exact
    grown, layers = operator.grow(), small.transformer.h
    for t, (own, following) in enumerate([(0, 1), (1, 1), (0, 1)]):
        new = grown.transformer.h[t].mlp
        assert new.c_fc.weight[:, :50].equal(layers[own].mlp.c_fc.weight)
        index = torch.tensor(_copied(new.c_fc.weight[:, 50:], layers[following].mlp.c_fc.weight, 1))
        assert new.c_fc.bias[50:].equal(layers[following].mlp.c_fc.bias[index])
        read = new.c_proj.weight[:50].clone().index_add_(0, index, new.c_proj.weight[50:])
        torch.testing.assert_close(read, layers[own].mlp.c_proj.weight, rtol=1e-12, atol=1e-14)
        assert grown.transformer.h[t].attn.c_attn.weight.equal(layers[own].attn.c_attn.weight)


def test_staged_growth_puts_two_copies_side_by_side():
    """[[W, 0], [0, W]] (staged training, arXiv:2203.06211): a sum of two Kronecker terms."""
    small = model(gpt2(24, 3, 2, 50))
    operator = LiGO(small, gpt2(48, 6, 3, 100), start="staged")
    grown = operator.grow()
    assert operator.exact and change(small, grown) < 1e-12
    for t, old in enumerate(small.transformer.h):
        layer = grown.transformer.h[2 * t]  # the second copy of the first layer adds nothing
        for name in ("mlp.c_fc", "mlp.c_proj", "attn.c_proj"):
            W, new = old.get_submodule(name), layer.get_submodule(name)
            assert new.weight.equal(torch.block_diag(W.weight, W.weight)) and new.bias.equal(W.bias.repeat(2)), name
        for W, new in zip(old.attn.c_attn.weight.chunk(3, 1), layer.attn.c_attn.weight.chunk(3, 1), strict=True):
            assert new.equal(torch.block_diag(W, W))
    for name, weight in operator.expand().items():
        torch.testing.assert_close(weight, grown.get_parameter(name).detach(), rtol=1e-12, atol=1e-13)
    with pytest.raises(ValueError, match="n_head: two copies .*: got 3, nearest 6; n_inner: .*: got 77, nearest 100"):
        LiGO(small, gpt2(48, 3, 3, 77), start="staged")


@pytest.mark.parametrize("sharing", ["model", "target", "source"])
def test_a_sum_of_terms_is_the_same_at_once_and_layer_by_layer(sharing):
    small = model(CONFIGS["llama"](24, 6, 2, 50, 3))
    operator = LiGO(small, CONFIGS["llama"](40, 10, 4, 77, 5), start="aki", sharing=sharing)
    grown = dict(operator.grow().named_parameters())
    for name, weight in operator.expand().items():
        torch.testing.assert_close(weight, grown[name].detach(), rtol=1e-12, atol=1e-13)
        assert weight.requires_grad
    first = operator.maps["residual_write"].terms[0]
    operator.maps["residual_write"] = Terms(first, first, first)
    with pytest.raises(ValueError, match="maps: a weight is between sums of 2 and 3 terms"):
        operator.expand()


def test_every_start_has_a_type_and_a_word_of_the_command():
    assert tuple(STARTS) == typing.get_args(StartName) == cli.STARTS


def _parallel(model, module):
    """Cosine of the gradients of every two units of the first layer's module that have the same weights."""
    tokens = next(batches(1))
    model(tokens, labels=tokens).loss.backward()
    layers = model.base_model.encoder.layer if hasattr(model.base_model, "encoder") else model.base_model.layers
    weight = layers[0].get_submodule(module).weight
    _, group = torch.unique(weight.detach(), dim=0, return_inverse=True)
    pairs = [(int((group == g).nonzero()[0]), unit) for unit, g in enumerate(group)]
    return torch.stack([torch.cosine_similarity(*weight.grad[list(pair)], 0) for pair in pairs if len(set(pair)) > 1])


NOISY = {
    "lemon": ("llama", (24, 6, 2, 50, 3), (40, 10, 4, 77, 5), ["mlp.up_proj", "self_attn.q_proj"]),
    "fpi": ("bert", (24, 3, 2, 50), (48, 6, 2, 77), ["intermediate.dense", "attention.self.value"]),
    "staged": ("qwen2", (24, 6, 2, 50, 3), (48, 12, 4, 100, 6), []),
}


@pytest.mark.parametrize("start", NOISY)
def test_noise_keeps_the_output_and_sends_copies_apart_from_the_first_step(start):
    family, small_size, big_size, modules = NOISY[start]
    small = model(CONFIGS[family](*small_size))
    big = CONFIGS[family](*big_size)
    plain, noisy = (LiGO(small, big, start=start, noise=noise, seed=1) for noise in (0.0, 0.3))
    assert noisy.exact and change(small, noisy.grow()) < (1e-12 if family == "bert" else 1e-5)
    assert not all(p.equal(plain.grow().get_parameter(name)) for name, p in noisy.grow().named_parameters())
    for module in modules:
        assert _parallel(plain.grow(), module).min() > 1 - 1e-5
        assert _parallel(noisy.grow(), module).max() < 1 - 1e-3, module


def test_the_state_of_an_optimizer_grows_as_without_noise():
    small = model(gpt2(24, 3, 2, 50))
    optimizer = torch.optim.AdamW(small.parameters())
    for tokens in batches(2):
        small(tokens, labels=tokens).loss.backward()
        optimizer.step()
    moments = []
    for noise in (0.0, 0.3):
        operator = LiGO(small, gpt2(48, 6, 3, 77), start="hypercloning", noise=noise)
        grown = operator.grow_optimizer(optimizer, operator.grow())
        moments.append([state["exp_avg"] for state in grown.state.values()])
    assert all(plain.equal(noisy) for plain, noisy in zip(*moments, strict=True))
    assert any(noisy.any() for noisy in moments[1])


def test_noise_is_refused_where_there_are_no_copies():
    small = model(gpt2(24, 3, 2, 50))
    for start in ("lossless", "aki"):  # copies of the next layer's units are no copies
        with pytest.raises(ValueError, match="noise: got 0.1, but this start has no copies"):
            LiGO(small, gpt2(40, 5, 3, 77), start=start, noise=0.1)
    with pytest.raises(ValueError, match="noise: got -1, expected a number from 0 up"):
        LiGO(small, gpt2(40, 5, 3, 77), start="lemon", noise=-1)
