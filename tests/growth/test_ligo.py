"""LiGO on GPT-2 and BERT: lossless growth, the published operator, learning the map, checkpoints."""

import copy
import json
import math
import warnings
from pathlib import Path

import numpy
import pytest
import torch

from growkit import LiGO
from growkit.growth.spaces import Copy, Dense, HeadStructured, Identity, IdentityTop

transformers = pytest.importorskip("transformers")

from growth.models import batches, bert, change, gpt2, model  # noqa: E402


def _trained(config, steps=5):
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for tokens in batches(steps):
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


GPT2_GROWTHS = {
    "everything-at-once": ((48, 3, 3, 70), (80, 5, 5, 123)),
    "larger-heads": ((24, 3, 2, None), (80, 4, 3, None)),
    "same-number-of-larger-heads": ((24, 3, 2, None), (36, 3, 3, None)),
    "depth": ((24, 3, 2, None), (24, 3, 5, None)),
    "width": ((24, 3, 2, 50), (32, 4, 2, 50)),
    "mlp": ((24, 3, 2, 50), (24, 3, 2, 77)),
    "nothing": ((24, 3, 2, None), (24, 3, 2, None)),
}


GPT2_OPTIONS = {
    "layer-scaled-attention": {"scale_attn_by_inverse_layer_idx": True},
    "unscaled-attention": {"scale_attn_weights": False},
    "untied-head": {"tie_word_embeddings": False},
}


@pytest.mark.parametrize(
    ("growth", "options"),
    [*((growth, {}) for growth in GPT2_GROWTHS)]
    + [(growth, options) for growth in ("everything-at-once", "larger-heads") for options in GPT2_OPTIONS.values()],
    ids=[*GPT2_GROWTHS, *(f"{g}-{o}" for g in ("everything-at-once", "larger-heads") for o in GPT2_OPTIONS)],
)
def test_lossless_growth_of_a_randomised_gpt2_changes_no_logit(growth, options):
    small_size, big_size = GPT2_GROWTHS[growth]
    small = model(gpt2(*small_size, **options))
    operator = LiGO(small, gpt2(*big_size, **options))
    assert operator.exact and not operator.reason
    assert change(small, operator.grow()) < 1e-12


@pytest.mark.parametrize("sharing", ["model", "target", "source"])
def test_lossless_growth_of_a_trained_gpt2_changes_no_logit(sharing):
    small = _trained(gpt2(48, 3, 3, 70))
    operator = LiGO(small, gpt2(80, 5, 5, 123), sharing=sharing)
    assert change(small, operator.grow()) < 1e-12


def test_lossless_growth_can_be_repeated():
    small = model(gpt2(24, 3, 2))
    middle = LiGO(small, gpt2(40, 5, 3)).grow()
    assert change(small, LiGO(middle, gpt2(56, 7, 4)).grow()) < 1e-12


BERT_GROWTHS = {
    "depth-mlp": ((24, 3, 3, 50), (24, 3, 5, 77)),
    "twice-the-width-more-heads": ((24, 3, 3, 50), (48, 6, 5, 77)),
    "three-times-the-width-larger-heads": ((24, 3, 2, 50), (72, 3, 7, 50)),
}


@pytest.mark.parametrize("growth", BERT_GROWTHS.values(), ids=BERT_GROWTHS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_lossless_growth_of_a_randomised_bert_changes_no_logit(growth, tied):
    small_size, big_size = growth
    small = model(bert(*small_size, tie_word_embeddings=tied))
    operator = LiGO(small, bert(*big_size, tie_word_embeddings=tied))
    assert operator.exact
    assert change(small, operator.grow()) < 1e-12


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_closest_growth_of_bert_to_a_fractional_width_reports_its_error(tied):
    small = model(bert(48, 3, 3, 70, tie_word_embeddings=tied))
    big = bert(80, 5, 5, 123, tie_word_embeddings=tied)
    with pytest.warns(UserWarning, match="hidden_size is a multiple of 48: got 80, nearest 96"):
        operator = LiGO(small, big, start="closest")
    assert not operator.exact and "multiple of 48" in operator.reason
    assert operator.check() == pytest.approx(change(small, operator.grow()), rel=0.5)
    assert operator.check() < 0.15 < change(small, LiGO(small, big, start="official").grow())


def test_closest_is_lossless_where_that_is_possible():
    small = model(gpt2(24, 3, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        operator = LiGO(small, gpt2(32, 4, 3), start="closest")
    assert operator.exact and change(small, operator.grow()) < 1e-12


@pytest.fixture(scope="module")
def golden():
    return numpy.load(Path(__file__).parents[1] / "data" / "ligo_bert_fp64.npz")


@pytest.fixture(scope="module")
def published(golden):
    """The operator with the published one's small weights and values."""
    meta = json.loads(str(golden["meta"]))
    small, large = (
        transformers.BertConfig(
            hidden_size=s["hidden"], num_attention_heads=s["heads"], num_hidden_layers=s["layers"],
            intermediate_size=s["ffn"], vocab_size=61, max_position_embeddings=20, tie_word_embeddings=False,
        ) for s in (meta["small"], meta["large"])
    )  # fmt: skip
    model = transformers.BertForMaskedLM(small).double()
    weights = {k.removeprefix("small/"): torch.from_numpy(golden[k]) for k in golden.files if k.startswith("small/")}
    assert not model.load_state_dict(weights, strict=False).unexpected_keys
    operator = LiGO(model, large, start="official")
    with torch.no_grad():
        for side, name in (("residual", "embed"), ("query",) * 2, ("key",) * 2, ("value",) * 2, ("ffn",) * 2):
            operator.maps[f"{side}_write"].C.copy_(torch.from_numpy(golden[f"op/{name}_C"]))
        for key, depth in operator.depth.items():
            name, _, kind = key.rpartition("_")
            match = [k for k in golden.files if k.replace(".", "_") == f"op/depth_{kind}/{name}"]
            depth.copy_(torch.from_numpy(golden[match[0]]))
    return operator


def test_official_start_reproduces_the_published_weights(golden, published):
    weights = published.expand()
    compared = 0
    for key in golden.files:
        if key.startswith("large/"):
            name = "bert." + key.removeprefix("large/").replace("layer.", "encoder.layer.", 1)
            name = name if name in weights else name + ".weight"
            torch.testing.assert_close(weights[name], torch.from_numpy(golden[key]), rtol=1e-12, atol=1e-12)
            compared += 1
    assert compared == 4 * 16 + 5


def test_official_start_reproduces_the_published_gradients(golden, published):
    weights = published.expand()
    value = sum(
        (torch.from_numpy(golden[key]) * weights[f"bert.encoder.{key.removeprefix('R/')}.weight"]).sum()
        for key in golden.files if key.startswith("R/")
    )  # fmt: skip
    names = {"residual": "embed", "query": "query", "key": "key", "value": "value", "ffn": "ffn"}
    maps = [published.maps[f"{side}_write"].C for side in names]
    for name, gradient in zip(names.values(), torch.autograd.grad(value, maps), strict=True):
        expected = torch.from_numpy(golden[f"grad/{name}_C"])
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12 * float(expected.abs().max()))


@pytest.mark.parametrize("family", ["gpt2", "bert"])
@pytest.mark.parametrize("sharing", ["model", "target", "source"])
def test_official_start_ties_the_read_side_and_normalises_rows(family, sharing):
    small, big = (gpt2(24, 3, 2), gpt2(32, 4, 3)) if family == "gpt2" else (bert(24, 3, 2, 50), bert(32, 4, 3, 60))
    operator = LiGO(model(small), big, start="official", sharing=sharing)
    assert not operator.exact and operator.ties["ffn_read"] == "ffn_write"
    assert set(operator.maps) == {f"{space}_write" for space in ("residual", "query", "key", "value", "ffn")}
    for matrix in [*(m.C for m in operator.maps.values()), *operator.depth.values()]:
        torch.testing.assert_close(matrix.sum(-1), torch.ones_like(matrix[..., 0]))
    assert all(w.argmax(1).tolist() == [0, 1, 0] for w in operator.depth.values())
    assert operator.maps["query_write"].C.ndim == (2 if sharing == "model" else 3)
    assert math.isfinite(change(model(small), operator.grow()))


def test_a_map_set_by_the_user_unties_its_side():
    operator = LiGO(model(gpt2(24, 3, 2, 50)), gpt2(24, 3, 2, 70), start="official")
    write, read = "transformer.h.0.mlp.c_fc.weight", "transformer.h.0.mlp.c_proj.weight"
    before = operator.expand()
    operator.maps["ffn_read"] = IdentityTop(torch.zeros(20, 50, dtype=torch.float64))
    after = operator.expand()
    assert after[write].equal(before[write]) and not after[read][50:].any() and before[read][50:].all()


def _maps():
    torch.manual_seed(0)
    return {
        "identity": Identity(6),
        "identity_top": IdentityTop(torch.randn(4, 6), 0.5),
        "identity_top_per_layer": IdentityTop(torch.randn(3, 4, 6)),
        "dense": Dense(torch.randn(10, 6), 2.0),
        "copy": Copy([0, 1, 2, 3, 4, 5, 5, 0], 6, torch.rand(8)),
        "head_structured": HeadStructured(torch.randn(4, 2), torch.randn(5, 3), 0.7),
        "head_structured_per_layer": HeadStructured(torch.randn(3, 4, 2), torch.randn(3, 5, 3)),
    }


@pytest.mark.parametrize("name", _maps())
def test_a_map_applies_the_matrix_it_shows(name):
    new = _maps()[name]
    ffn = new.matrix().shape[-2]
    operator = LiGO(model(gpt2(6, 2, 2, 6), torch.float32), gpt2(6, 2, 3, ffn), sharing="target")
    operator.maps["ffn_write"] = Copy([j % 6 for j in range(ffn)], 6)
    before = {name: x[..., :6] for name, x in operator.expand().items()}
    operator.maps["ffn_write"] = new
    after = operator.expand()
    for layer in range(3):
        matrix = new.matrix()[layer] if new.matrix().ndim == 3 else new.matrix()
        for kind in ("weight", "bias"):  # Conv1D: (in, out)
            weight = f"transformer.h.{layer}.mlp.c_fc.{kind}"
            torch.testing.assert_close(after[weight], before[weight] @ matrix.mT)


def test_head_structured_is_the_kronecker_product():
    new = HeadStructured(torch.randn(4, 2), torch.randn(5, 3))
    torch.testing.assert_close(new.matrix(), torch.kron(new.P, new.R))


def test_net2net_by_copying_maps_is_lossless():
    small = model(gpt2(24, 3, 2, 50))
    operator = LiGO(small, gpt2(24, 3, 2, 77))
    index = torch.arange(77) % 50
    count = torch.bincount(index)[index].double()
    operator.maps["ffn_write"], operator.maps["ffn_read"] = Copy(index, 50), Copy(index, 50, 1 / count)
    assert change(small, operator.grow()) < 1e-12


def test_maps_and_depth_survive_saving():
    operator = LiGO(model(gpt2(24, 3, 2), torch.float32), gpt2(32, 4, 3))
    operator.fit(batches(2), steps=2)
    assert not any("small" in name for name in operator.state_dict())  # the small weights are not saved again
    other = LiGO(model(gpt2(24, 3, 2), torch.float32), gpt2(32, 4, 3), seed=5)
    other.load_state_dict(operator.state_dict())
    for (name, a), b in zip(operator.expand().items(), other.expand().values(), strict=True):
        assert a.equal(b), name


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_a_grown_checkpoint_loads_with_nothing_missing_or_unexpected(tmp_path, family, dtype, tied):
    if family == "gpt2":
        small, big = gpt2(24, 3, 2, tie_word_embeddings=tied), gpt2(40, 5, 3, tie_word_embeddings=tied)
    else:
        small, big = bert(24, 3, 2, 50, tie_word_embeddings=tied), bert(48, 6, 3, 70, tie_word_embeddings=tied)
    given = copy.deepcopy(big.to_dict())
    operator = LiGO(model(small, dtype), big)
    grown = operator.grow()
    assert big.to_dict() == given
    assert grown.dtype == dtype and next(operator.parameters()).dtype == torch.float32
    embedding = grown.get_input_embeddings().weight
    assert (grown.get_output_embeddings().weight.data_ptr() == embedding.data_ptr()) == tied
    grown.save_pretrained(tmp_path)
    loaded, info = type(grown).from_pretrained(tmp_path, output_loading_info=True, dtype=dtype)
    assert not any(info.values()), info
    assert loaded.config.architectures == [type(grown).__name__]
    assert change(grown, loaded) == 0


def test_the_norm_eps_stays():
    operator = LiGO(model(gpt2(24, 3, 2, layer_norm_epsilon=1e-2)), gpt2(32, 4, 2))
    assert operator.config.layer_norm_epsilon == 1e-2
    assert operator.exact


def test_flops_of_an_expansion_are_counted():
    operator = LiGO(model(gpt2(24, 3, 2)), gpt2(24, 3, 4, 130))
    D, F1, F2, L1, L2 = 24, 96, 130, 2, 4
    width = 2 * L1 * (F2 - F1) * F1 * (2 * D + 1)  # MLP weights and the bias between them
    mix_mlp = 2 * L1 * L2 * F2 * (2 * D + 1)
    mix_rest = 2 * L1 * L2 * (4 * D * D + 9 * D)  # q, k, v, o, other biases, norms
    assert operator.flops_per_expansion.forward == width + mix_mlp + mix_rest
    assert operator.flops_per_expansion.backward == width + 2 * mix_mlp + mix_rest
