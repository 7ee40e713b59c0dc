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

from growth.models import CONFIGS, bert, change, gpt2, model  # noqa: E402


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


@pytest.mark.parametrize("sharing", ["model", "target", "source"])
def test_a_sum_of_terms_is_the_same_at_once_and_layer_by_layer(sharing):
    small = model(CONFIGS["llama"](24, 6, 2, 50, 3))
    operator = LiGO(small, CONFIGS["llama"](40, 10, 4, 77, 5), start="aki", sharing=sharing)
    grown = dict(operator.grow().named_parameters())
    for name, weight in operator.expand().items():
        torch.testing.assert_close(weight, grown[name].detach(), rtol=1e-12, atol=1e-13)
        assert weight.requires_grad
    operator.maps["residual_write"] = Terms(torch.stack([operator.maps["residual_write"].M[0].detach()] * 3))
    with pytest.raises(ValueError, match="maps: a weight is between sums of 2 and 3 terms"):
        operator.expand()


def test_every_start_has_a_type_and_a_word_of_the_command():
    assert tuple(STARTS) == typing.get_args(StartName) == cli.STARTS
