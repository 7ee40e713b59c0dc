"""LiGO on GPT-2 and BERT: lossless growth, the published operator, learning the map, checkpoints."""

import copy
import json
import math
import warnings
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn

from growkit import LiGO
from growkit.growth.spaces import Copy, Dense, HeadStructured, Identity, IdentityTop

transformers = pytest.importorskip("transformers")

VOCABULARY, POSITIONS = 61, 24


def _gpt2(hidden, heads, layers, ffn=None, **options):
    return transformers.GPT2Config(
        n_embd=hidden, n_head=heads, n_layer=layers, n_inner=ffn, vocab_size=VOCABULARY, n_positions=POSITIONS,
        bos_token_id=0, eos_token_id=0, **options,
    )  # fmt: skip


def _bert(hidden, heads, layers, ffn, **options):
    return transformers.BertConfig(
        hidden_size=hidden, num_attention_heads=heads, num_hidden_layers=layers, intermediate_size=ffn,
        vocab_size=VOCABULARY, max_position_embeddings=POSITIONS, **options,
    )  # fmt: skip


def _model(config, dtype=torch.float64):
    """A model whose every parameter is random, biases and norms included."""
    torch.manual_seed(0)
    kind = transformers.GPT2LMHeadModel if config.model_type == "gpt2" else transformers.BertForMaskedLM
    model = kind(config).to(dtype).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            norm = name.endswith("weight") and p.ndim == 1
            p.copy_(torch.randn_like(p) * (0.3 if p.ndim == 1 else p.shape[-1] ** -0.5) + norm)
    return model


def _trained(config, steps=5):
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for tokens in _batches(steps):
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def _batches(count):
    """Counting up from a random token: easy to learn."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        start = torch.randint(VOCABULARY, (4, 1), generator=generator)
        tokens = (start + torch.arange(16)) % VOCABULARY
        yield tokens


@torch.no_grad()
def _change(small, big):
    """max |logit change| / max |logit|"""
    tokens = torch.randint(VOCABULARY, (3, POSITIONS), generator=torch.Generator().manual_seed(2))
    old, new = small.eval()(tokens).logits, big.eval()(tokens).logits
    return float((new - old).abs().max() / old.abs().max())


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
    small = _model(_gpt2(*small_size, **options))
    operator = LiGO(small, _gpt2(*big_size, **options))
    assert operator.exact and not operator.reason
    assert _change(small, operator.grow()) < 1e-12


@pytest.mark.parametrize("sharing", ["model", "target", "source"])
def test_lossless_growth_of_a_trained_gpt2_changes_no_logit(sharing):
    small = _trained(_gpt2(48, 3, 3, 70))
    operator = LiGO(small, _gpt2(80, 5, 5, 123), sharing=sharing)
    assert _change(small, operator.grow()) < 1e-12


def test_lossless_growth_can_be_repeated():
    small = _model(_gpt2(24, 3, 2))
    middle = LiGO(small, _gpt2(40, 5, 3)).grow()
    assert _change(small, LiGO(middle, _gpt2(56, 7, 4)).grow()) < 1e-12


BERT_GROWTHS = {
    "depth-mlp": ((24, 3, 3, 50), (24, 3, 5, 77)),
    "twice-the-width-more-heads": ((24, 3, 3, 50), (48, 6, 5, 77)),
    "three-times-the-width-larger-heads": ((24, 3, 2, 50), (72, 3, 7, 50)),
}


@pytest.mark.parametrize("growth", BERT_GROWTHS.values(), ids=BERT_GROWTHS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_lossless_growth_of_a_randomised_bert_changes_no_logit(growth, tied):
    small_size, big_size = growth
    small = _model(_bert(*small_size, tie_word_embeddings=tied))
    operator = LiGO(small, _bert(*big_size, tie_word_embeddings=tied))
    assert operator.exact
    assert _change(small, operator.grow()) < 1e-12


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_closest_growth_of_bert_to_a_fractional_width_reports_its_error(tied):
    small = _model(_bert(48, 3, 3, 70, tie_word_embeddings=tied))
    big = _bert(80, 5, 5, 123, tie_word_embeddings=tied)
    with pytest.warns(UserWarning, match="hidden_size is a multiple of 48: got 80, nearest 96"):
        operator = LiGO(small, big, start="closest")
    assert not operator.exact and "multiple of 48" in operator.reason
    assert operator.check() == pytest.approx(_change(small, operator.grow()), rel=0.5)
    assert operator.check() < 0.15 < _change(small, LiGO(small, big, start="official").grow())


def test_closest_is_lossless_where_that_is_possible():
    small = _model(_gpt2(24, 3, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        operator = LiGO(small, _gpt2(32, 4, 3), start="closest")
    assert operator.exact and _change(small, operator.grow()) < 1e-12


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
    small, big = (_gpt2(24, 3, 2), _gpt2(32, 4, 3)) if family == "gpt2" else (_bert(24, 3, 2, 50), _bert(32, 4, 3, 60))
    operator = LiGO(_model(small), big, start="official", sharing=sharing)
    assert not operator.exact and operator.ties["ffn_read"] == "ffn_write"
    assert set(operator.maps) == {f"{space}_write" for space in ("residual", "query", "key", "value", "ffn")}
    for matrix in [*(m.C for m in operator.maps.values()), *operator.depth.values()]:
        torch.testing.assert_close(matrix.sum(-1), torch.ones_like(matrix[..., 0]))
    assert all(w.argmax(1).tolist() == [0, 1, 0] for w in operator.depth.values())
    assert operator.maps["query_write"].C.ndim == (2 if sharing == "model" else 3)
    assert math.isfinite(_change(_model(small), operator.grow()))


def test_a_map_set_by_the_user_unties_its_side():
    operator = LiGO(_model(_gpt2(24, 3, 2, 50)), _gpt2(24, 3, 2, 70), start="official")
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
    operator = LiGO(_model(_gpt2(6, 2, 2, 6), torch.float32), _gpt2(6, 2, 3, ffn), sharing="target")
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
    small = _model(_gpt2(24, 3, 2, 50))
    operator = LiGO(small, _gpt2(24, 3, 2, 77))
    index = torch.arange(77) % 50
    count = torch.bincount(index)[index].double()
    operator.maps["ffn_write"], operator.maps["ffn_read"] = Copy(index, 50), Copy(index, 50, 1 / count)
    assert _change(small, operator.grow()) < 1e-12


LEARNING = {
    "lossless": (_gpt2(24, 3, 2, 50), _gpt2(40, 5, 3, 70), "lossless"),
    "lossless-larger-heads": (_gpt2(24, 3, 2, 50), _gpt2(40, 4, 3, 70), "lossless"),
    "official": (_gpt2(24, 3, 2, 50), _gpt2(40, 5, 3, 70), "official"),
    "bert": (_bert(24, 3, 2, 50), _bert(48, 6, 3, 70), "lossless"),
}


@pytest.mark.parametrize(("small", "big", "start"), LEARNING.values(), ids=LEARNING)
def test_fit_lowers_the_loss_moves_every_operator_and_leaves_the_small_model(small, big, start):
    model = _model(small, torch.float32).train()
    before = copy.deepcopy(model.state_dict())
    operator = LiGO(model, big, start=start)
    initial = copy.deepcopy(operator.state_dict())
    stream = torch.random.get_rng_state()
    seen = []
    losses = operator.fit(
        _batches(24), steps=12, lr=1e-2, accumulate=2, mask_token=3,
        progress=lambda step, loss: seen.append((step, loss)),
    )  # fmt: skip
    assert min(losses[-3:]) < 0.95 * losses[0] and seen == list(enumerate(losses))
    assert not operator.exact
    for name, value in operator.named_parameters():
        assert not value.equal(initial[name]), name
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert torch.random.get_rng_state().equal(stream)


def test_fit_gives_the_operator_the_gradient_of_the_whole_map():
    """One step of fit against autograd straight through the grown model."""
    small, big = _model(_gpt2(24, 3, 2)), _gpt2(32, 4, 3, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    operator, other = LiGO(small, big), LiGO(small, big)
    batches = list(_batches(2))
    operator.fit(batches, steps=1, accumulate=2)

    weights = other.expand()
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    model = other.grow()
    loss = sum(torch.func.functional_call(model, weights, (b,), {"labels": b}).loss for b in batches) / 2
    loss.backward()
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-3, weight_decay=0.0)
    nn.utils.clip_grad_norm_(other.parameters(), 1.0)
    optimizer.step()
    for (name, a), b in zip(operator.named_parameters(), other.parameters(), strict=True):
        # A first step of Adam is lr*sign(gradient): compare where the gradient is not rounding noise.
        firm = b.grad.abs() > 1e-9
        torch.testing.assert_close(a[firm], b[firm], rtol=1e-6, atol=1e-9, msg=name)


def test_fit_takes_a_loss_of_its_own_and_repeats_itself():
    def loss(model, batch):
        return model(batch).logits.float().logsumexp(-1).mean()

    runs = []
    for _ in range(2):
        operator = LiGO(_model(_gpt2(24, 3, 2), torch.float32), _gpt2(32, 4, 3), seed=3)
        runs.append(operator.fit(_batches(4), steps=4, loss=loss))
        torch.rand(1)  # the global stream plays no part
    assert runs[0] == runs[1] and runs[0][-1] < runs[0][0]
    other = LiGO(_model(_gpt2(24, 3, 2), torch.float32), _gpt2(32, 4, 3), seed=4)
    assert other.fit(_batches(4), steps=4, loss=loss) != runs[0]


@pytest.mark.parametrize(("small", "big"), [
    (_gpt2(24, 3, 2, 50), _gpt2(40, 5, 3, 70)), (_gpt2(24, 3, 2, 50), _gpt2(40, 4, 3, 70)),
    (_bert(24, 3, 2, 50), _bert(72, 9, 3, 70)),
], ids=["gpt2", "gpt2-larger-heads", "bert"])  # fmt: skip
def test_every_weight_of_a_grown_model_learns(small, big):
    """No coordinate is dead and no two copies stay equal."""
    model = LiGO(_model(small), big).grow()  # no dropout, which would tell copies apart
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    for tokens in _batches(8):
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, p in model.named_parameters():
        moved = p.detach() != before[name]
        if name.endswith(("embeddings.weight", "wte.weight", "wpe.weight")):
            moved = moved[moved.any(1)]  # rows of unseen tokens and positions stay
        if name.endswith("c_attn.bias"):
            moved = torch.cat(moved.chunk(3)[::2])  # attention does not depend on the key bias
        if name.endswith("key.bias"):
            continue
        assert moved.all(), f"{name}: {int((~moved).sum())} of {moved.numel()} elements did not move"
    if small.model_type == "bert":  # three copies of the residual stream
        first, second, third = model.bert.embeddings.word_embeddings.weight.detach().chunk(3, 1)
        assert not first.allclose(second) and not second.allclose(third)


def test_maps_and_depth_survive_saving():
    operator = LiGO(_model(_gpt2(24, 3, 2), torch.float32), _gpt2(32, 4, 3))
    operator.fit(_batches(2), steps=2)
    assert not any("small" in name for name in operator.state_dict())  # the small weights are not saved again
    other = LiGO(_model(_gpt2(24, 3, 2), torch.float32), _gpt2(32, 4, 3), seed=5)
    other.load_state_dict(operator.state_dict())
    for (name, a), b in zip(operator.expand().items(), other.expand().values(), strict=True):
        assert a.equal(b), name


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_a_grown_checkpoint_loads_with_nothing_missing_or_unexpected(tmp_path, family, dtype, tied):
    if family == "gpt2":
        small, big = _gpt2(24, 3, 2, tie_word_embeddings=tied), _gpt2(40, 5, 3, tie_word_embeddings=tied)
    else:
        small, big = _bert(24, 3, 2, 50, tie_word_embeddings=tied), _bert(48, 6, 3, 70, tie_word_embeddings=tied)
    given = copy.deepcopy(big.to_dict())
    operator = LiGO(_model(small, dtype), big)
    grown = operator.grow()
    assert big.to_dict() == given
    assert grown.dtype == dtype and next(operator.parameters()).dtype == torch.float32
    embedding = grown.get_input_embeddings().weight
    assert (grown.get_output_embeddings().weight.data_ptr() == embedding.data_ptr()) == tied
    grown.save_pretrained(tmp_path)
    loaded, info = type(grown).from_pretrained(tmp_path, output_loading_info=True, dtype=dtype)
    assert not any(info.values()), info
    assert loaded.config.architectures == [type(grown).__name__]
    assert _change(grown, loaded) == 0


def test_the_norm_eps_stays():
    operator = LiGO(_model(_gpt2(24, 3, 2, layer_norm_epsilon=1e-2)), _gpt2(32, 4, 2))
    assert operator.config.layer_norm_epsilon == 1e-2
    assert operator.exact


def test_flops_of_an_expansion_are_counted():
    operator = LiGO(_model(_gpt2(24, 3, 2)), _gpt2(24, 3, 4, 130))
    D, F1, F2, L1, L2 = 24, 96, 130, 2, 4
    width = 2 * L1 * (F2 - F1) * F1 * (2 * D + 1)  # MLP weights and the bias between them
    mix_mlp = 2 * L1 * L2 * F2 * (2 * D + 1)
    mix_rest = 2 * L1 * L2 * (4 * D * D + 9 * D)  # q, k, v, o, other biases, norms
    assert operator.flops_per_expansion.forward == width + mix_mlp + mix_rest
    assert operator.flops_per_expansion.backward == width + 2 * mix_mlp + mix_rest


BAD_GROWTHS = {
    "vocabulary": (_gpt2(24, 3, 2), _gpt2(32, 4, 2), {"vocab_size": 8}, "vocab_size: got 8, expected at least 61"),
    "positions": (_gpt2(24, 3, 2), _gpt2(32, 4, 2), {"n_positions": 8}, "n_positions: got 8, expected at least 24"),
    "tie": (_gpt2(24, 3, 2), _gpt2(32, 4, 2), {"tie_word_embeddings": False}, "tie_word_embeddings: got False"),
    "activation": (_bert(24, 3, 2, 50), _bert(24, 3, 3, 50), {"hidden_act": "relu"}, "hidden_act: got 'relu'"),
    "fewer-layers": (_gpt2(24, 3, 2), _gpt2(32, 4, 1), {}, "big_config.n_layer: got 1, expected at least 2"),
    "narrower": (_gpt2(24, 3, 2, 50), _gpt2(12, 3, 2, 50), {}, "big_config.n_embd: got 12, expected at least 24"),
    "fewer-heads": (_gpt2(24, 3, 2), _gpt2(32, 2, 2), {}, "big_config.n_head: got 2, expected at least 3"),
    "smaller-mlp": (_gpt2(24, 3, 2), _gpt2(32, 4, 2, 90), {}, "big_config.n_inner: got 90, expected at least 96"),
    "smaller-heads": (_gpt2(24, 3, 2), _gpt2(32, 8, 2), {}, "n_head: got 8, which makes heads of 4, expected .* 8"),
    "odd-heads": (_gpt2(24, 3, 2), _gpt2(32, 5, 2), {}, "n_head: got 5, expected a divisor of n_embd = 32"),
    "other-family": (_gpt2(24, 3, 2), _bert(24, 3, 2, 96), {}, "big_config: got model_type 'bert', expected 'gpt2'"),
    "fractional": (_bert(24, 3, 2, 50), _bert(40, 5, 2, 50), {}, "hidden_size: .* multiple of 24: got 40, nearest 48"),
}


@pytest.mark.parametrize(("small", "big", "change", "message"), BAD_GROWTHS.values(), ids=BAD_GROWTHS)
def test_impossible_growth_is_refused_by_name(small, big, change, message):
    big = copy.deepcopy(big)
    for name, value in change.items():
        setattr(big, name, value)
    with pytest.raises(ValueError, match=message):
        LiGO(_model(small), big)


def test_bad_arguments_are_refused_by_name():
    small, big = _model(_gpt2(24, 3, 2)), _gpt2(32, 4, 3)
    with pytest.raises(ValueError, match="start: got 'copy', expected one of 'lossless', 'closest', 'official'"):
        LiGO(small, big, start="copy")
    with pytest.raises(ValueError, match="sharing: got 'layer'"):
        LiGO(small, big, sharing="layer")
    with pytest.raises(ValueError, match="small_model: got Linear of model_type None"):
        LiGO(nn.Linear(2, 2), big)
    with pytest.raises(ValueError, match=r"index: expected .* \[0, 3\)"):
        Copy([0, 3], 3)
    untied = _model(_gpt2(24, 3, 2))
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())
    with pytest.raises(ValueError, match=r"lm_head.weight is \[61, 24\], expected None by the model's own config"):
        LiGO(untied, big)
    mixed = _model(_gpt2(24, 3, 2))
    mixed.transformer.ln_f.float()
    with pytest.raises(ValueError, match="ln_f.weight is torch.float32 .*, expected torch.float64"):
        LiGO(mixed, big)
    operator = LiGO(small, big)
    with pytest.raises(ValueError, match="batches: ran out after 3, expected steps \\* accumulate = 8"):
        operator.fit(_batches(3), steps=4, accumulate=2)
    with pytest.raises(ValueError, match="no loss; expected 'labels'"):
        operator.fit([{"input_ids": torch.zeros(1, 4, dtype=torch.int64)}], steps=1)
    with pytest.raises(ValueError, match="steps, accumulate: got 0, 1"):
        operator.fit(_batches(1), steps=0)
    with pytest.raises(ValueError, match="lr, warmup: got 0.001, 3"):
        operator.fit(_batches(1), steps=1, warmup=3)
    operator.maps["ffn_write"] = Dense(torch.zeros(8, 5, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"got \[8, 5\]"):
        operator.expand()
