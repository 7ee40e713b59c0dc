"""What cannot grow, or not without loss, is refused by name before anything happens."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from growkit import LiGO
from growkit.growth.families import FAMILIES
from growkit.growth.spaces import Copy, Dense

transformers = pytest.importorskip("transformers")

from growth.models import CONFIGS, bert, gpt2, model  # noqa: E402

BAD_GROWTHS = {
    "vocabulary": (gpt2(24, 3, 2), gpt2(32, 4, 2), {"vocab_size": 8}, "vocab_size: got 8, expected at least 61"),
    "positions": (gpt2(24, 3, 2), gpt2(32, 4, 2), {"n_positions": 8}, "n_positions: got 8, expected at least 24"),
    "tie": (gpt2(24, 3, 2), gpt2(32, 4, 2), {"tie_word_embeddings": False}, "tie_word_embeddings: got False"),
    "activation": (bert(24, 3, 2, 50), bert(24, 3, 3, 50), {"hidden_act": "relu"}, "hidden_act: got 'relu'"),
    "fewer-layers": (gpt2(24, 3, 2), gpt2(32, 4, 1), {}, "big_config.n_layer: got 1, expected at least 2"),
    "narrower": (gpt2(24, 3, 2, 50), gpt2(12, 3, 2, 50), {}, "big_config.n_embd: got 12, expected at least 24"),
    "fewer-heads": (gpt2(24, 3, 2), gpt2(32, 2, 2), {}, "big_config.n_head: got 2, expected at least 3"),
    "smaller-mlp": (gpt2(24, 3, 2), gpt2(32, 4, 2, 90), {}, "big_config.n_inner: got 90, expected at least 96"),
    "smaller-heads": (gpt2(24, 3, 2), gpt2(32, 8, 2), {}, "n_head: got 8, which makes heads of 4, expected .* 8"),
    "odd-heads": (gpt2(24, 3, 2), gpt2(32, 5, 2), {}, "n_head: got 5, expected a divisor of n_embd = 32"),
    "other-family": (gpt2(24, 3, 2), bert(24, 3, 2, 96), {}, "big_config: got model_type 'bert', expected 'gpt2'"),
    "fractional": (bert(24, 3, 2, 50), bert(40, 5, 2, 50), {}, "hidden_size: .* multiple of 24: got 40, nearest 48"),
}


@pytest.mark.parametrize(("small", "big", "change", "message"), BAD_GROWTHS.values(), ids=BAD_GROWTHS)
def test_impossible_growth_is_refused_by_name(small, big, change, message):
    big = copy.deepcopy(big)
    for name, value in change.items():
        setattr(big, name, value)
    with pytest.raises(ValueError, match=message):
        LiGO(model(small), big)


def test_bad_arguments_are_refused_by_name():
    small, big = model(gpt2(24, 3, 2)), gpt2(32, 4, 3)
    with pytest.raises(ValueError, match="start: got 'copy', expected one of 'lossless', 'closest', 'official'"):
        LiGO(small, big, start="copy")
    with pytest.raises(ValueError, match="sharing: got 'layer'"):
        LiGO(small, big, sharing="layer")
    with pytest.raises(ValueError, match="small_model: got Linear of model_type None"):
        LiGO(nn.Linear(2, 2), big)
    with pytest.raises(ValueError, match=r"index: expected .* \[0, 3\)"):
        Copy([0, 3], 3)
    untied = model(gpt2(24, 3, 2))
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())
    with pytest.raises(ValueError, match=r"lm_head.weight is \[61, 24\], expected None by the model's own config"):
        LiGO(untied, big)
    mixed = model(gpt2(24, 3, 2))
    mixed.transformer.ln_f.float()
    with pytest.raises(ValueError, match="ln_f.weight is torch.float32 .*, expected torch.float64"):
        LiGO(mixed, big)
    operator = LiGO(small, big)
    operator.maps["ffn_write"] = Dense(torch.zeros(8, 5, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"got \[8, 5\]"):
        operator.expand()


def test_wrapped_models_are_unwrapped_or_refused_by_name():
    small, big = model(gpt2(24, 3, 2)), gpt2(40, 5, 3)
    assert LiGO(torch.compile(small), big).exact
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(copy.deepcopy(small), peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    with pytest.raises(ValueError, match="small_model: got PeftModel with PEFT adapters, expected merge_and_unload"):
        LiGO(adapted, big)
    assert LiGO(adapted.merge_and_unload(), big).exact
    quantized = copy.deepcopy(small)
    quantized.transformer.wte.weight = nn.Parameter(
        quantized.transformer.wte.weight.to(torch.int8), requires_grad=False
    )
    with pytest.raises(ValueError, match="wte.weight is Parameter of torch.int8, .* a quantized model"):
        LiGO(quantized, big)
    with pytest.raises(ValueError, match="wte.weight is on the meta device, expected weights"):
        LiGO(copy.deepcopy(small).to("meta"), big)
    with pytest.raises(ValueError, match="does not know: transformer.h.0.crossattention"):
        LiGO(model(gpt2(24, 3, 2, add_cross_attention=True)), gpt2(40, 5, 3, add_cross_attention=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(value):
    small = model(gpt2(24, 3, 2))
    with torch.no_grad():
        small.transformer.h[1].mlp.c_fc.weight[3, 0] = value
    with pytest.raises(ValueError, match="transformer.h.1.mlp.c_fc.weight has 1 elements NaN or infinite"):
        LiGO(small, gpt2(40, 5, 3))


LLAMA, QWEN3, OLMO2 = CONFIGS["llama"], CONFIGS["qwen3"], CONFIGS["olmo2"]
LIES = {
    "norm": {"residual": replace(FAMILIES["llama"].residual, norm="layer")},
    "rotary": {"attention": replace(FAMILIES["llama"].attention, rotary=0.0)},
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_a_table_that_lies_is_found_out(lie):
    operator = LiGO(
        model(LLAMA(24, 3, 2, 50)), LLAMA(40, 5, 3, 77, head_dim=16), family=replace(FAMILIES["llama"], **lie)
    )
    assert operator.check() > 0.1 and not operator.exact and not operator.reason


def test_a_table_that_contradicts_the_shapes_is_refused():
    family = replace(FAMILIES["llama"], attention=replace(FAMILIES["llama"].attention, kv_heads=None))
    with pytest.raises(
        ValueError, match=r"family: model.layers.0.self_attn.k_proj.weight is \[24, 24\], the table says"
    ):
        LiGO(model(LLAMA(24, 6, 2, 50, 3)), {"num_hidden_layers": 3}, family=family)


ROPE = {"rope_theta": 1e4, "factor": 4.0}
YARN = {"rope_parameters": {"rope_type": "yarn", "original_max_position_embeddings": 2048, **ROPE}}
IMPOSSIBLE = {
    "rotary frequencies": (
        LLAMA(24, 3, 2, 50, **YARN), LLAMA(24, 3, 2, 50, head_dim=24, **YARN),
        "head_dim: rope_type 'yarn' .* nearest 8",
    ),
    "rotary heads": (LLAMA(24, 3, 2, 50), LLAMA(24, 3, 2, 50, head_dim=10), "head_dim: .* got 10, nearest 8"),
    "normed heads": (QWEN3(24, 3, 2, 50), QWEN3(24, 3, 2, 50, head_dim=14), "head_dim: .* norms .* nearest 16"),
    "heads normed together": (OLMO2(24, 6, 2, 50, 3), OLMO2(40, 10, 2, 50, 5), "num_attention_heads: .* nearest 12"),
    "groups": (LLAMA(36, 9, 2, 50, 3), LLAMA(40, 10, 2, 50, 5), "num_key_value_heads: .* got 5, nearest 10"),
    "post-norm eps": (
        bert(24, 3, 2, 50, layer_norm_eps=1e-3), bert(24, 3, 3, 50, layer_norm_eps=1e-3),
        "num_hidden_layers: .* nearest 2",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("small", "big", "message"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_what_cannot_be_lossless_names_the_nearest_size_and_comes_near_if_asked(small, big, message):
    with pytest.raises(ValueError, match=message):
        LiGO(model(small), big)
    with pytest.warns(UserWarning, match=f"not lossless: {message}.*outputs change by"):
        operator = LiGO(model(small), big, start="closest")
    assert not operator.exact and 0 < operator.check() < 1


def test_factors_of_frequencies_allow_no_other_heads():
    factors = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0]}
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 8, **factors, **ROPE}
    with pytest.raises(ValueError, match="big_config.head_dim: rope_type 'longrope' .* got 16, nearest 8"):
        LiGO(model(LLAMA(24, 3, 2, 50, rope_parameters=rope)), {"head_dim": 16}, start="closest")


def test_each_kind_of_growth_refuses_what_it_cannot_keep():
    small = model(gpt2(24, 3, 2))
    with pytest.raises(ValueError, match="n_embd: growth by copies .* got 40, nearest 48"):
        LiGO(small, gpt2(40, 5, 3), start="hypercloning")
    with pytest.raises(ValueError, match="n_embd: this start grows in depth only: got 40, nearest 24"):
        LiGO(small, gpt2(40, 5, 3), start="zero_blocks")
    with pytest.raises(ValueError, match="n_layer: two overlapping copies of 2 layers make at most 4: got 5"):
        LiGO(small, gpt2(24, 3, 5), start="overlap")
    listed = CONFIGS["qwen3"](16, 2, 3, 40)  # with one entry a layer, which is looked up first
    listed.layer_types = ["full_attention"] * 3
    with pytest.raises(ValueError, match="num_hidden_layers: two overlapping copies of 3 layers make at most 6: got 9"):
        LiGO(model(listed), {"num_hidden_layers": 9}, "overlap")


def test_a_config_of_sizes_only_is_sizes_only():
    small = model(gpt2(24, 3, 2))
    with pytest.raises(ValueError, match="big_config: got 'hidden_size', expected sizes: n_embd, n_head"):
        LiGO(small, {"hidden_size": 48})
    with pytest.raises(ValueError, match="big_config.n_embd: got 30.5, expected an integer"):
        LiGO(small, {"n_embd": 30.5})
    assert LiGO(small, {"n_embd": 48}).config.n_head == 6  # heads keep their size
    with pytest.raises(ValueError, match="big_config: The hidden size .* not a multiple"):
        LiGO(model(LLAMA(24, 3, 2, 50, 1)), {"num_attention_heads": 5})


def test_special_tokens_set_otherwise_are_refused():
    with pytest.raises(ValueError, match="big_config.eos_token_id: got 5, expected 0 as in the small model"):
        LiGO(model(gpt2(24, 3, 2)), gpt2(40, 5, 3, eos_token_id=5))
