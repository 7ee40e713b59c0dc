"""param_groups: who decays, what is tied, frozen or named; presets: usable as they are, a source for every value."""

import inspect

import pytest
import torch
from torch import nn

import growkit


def names(groups):
    return {name: group["weight_decay"] for group in groups for name, _ in group["params"]}


class Experts(nn.Module):
    """What a model may hold besides Linear: bare parameters, stacked biases, a norm not torch's, a class token."""

    class RMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 3))

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(7, 4)
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, 4))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.w = nn.Parameter(torch.zeros(3, 4, 4))
        self.w_bias = nn.Parameter(torch.zeros(3, 4))
        self.norm = self.RMSNorm()
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.head = nn.Linear(4, 7)
        self.head.weight = self.tokens.weight


def test_the_rule_on_every_kind_of_parameter():
    groups = growkit.param_groups(Experts(), 0.3, no_decay=["cls_*"])
    decayed = {"w": 0.3}
    undecayed = dict.fromkeys(["pos_embed", "cls_token", "w_bias", "tokens.weight", "norm.weight", "head.bias"], 0.0)
    assert names(groups) == decayed | undecayed
    assert names(growkit.param_groups(Experts(), 0.3))["cls_token"] == 0.3


@pytest.mark.parametrize("kind", ["gpt2", "llama", "vit"])
def test_matrices_of_blocks_decay_and_nothing_else_does_in_transformers(kind):
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = {
        "gpt2": lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=9, n_positions=4)
        ),
        "llama": lambda: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**small, vocab_size=9, tie_word_embeddings=True)
        ),
        "vit": lambda: transformers.ViTForImageClassification(
            transformers.ViTConfig(**small, image_size=8, patch_size=4)
        ),
    }[kind]()
    found = names(growkit.param_groups(model, 0.1))
    expected = {
        name: 0.1
        if p.dim() > 1 and not any(word in name for word in ("wte", "wpe", "embed_tokens", "_embeddings"))
        else 0
        for name, p in model.named_parameters()
    }
    if kind == "vit":
        expected["vit.embeddings.patch_embeddings.projection.weight"] = 0.1
        expected["vit.embeddings.cls_token"] = 0
    assert found == expected
    assert sum(len(g["params"]) for g in growkit.param_groups(model, 0.1)) == len(list(model.parameters()))


def test_groups_serve_any_optimizer_and_keep_names():
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    for cls in (growkit.SophiaG, torch.optim.AdamW):
        saved = cls(growkit.param_groups(model, 0.2)).state_dict()["param_groups"]
        assert [(g["weight_decay"], g["param_names"]) for g in saved] == [
            (0.2, ["0.weight"]),
            (0.0, ["0.bias", "1.weight", "1.bias"]),
        ]
    assert [g["weight_decay"] for g in growkit.param_groups(nn.LayerNorm(3), 0.2)] == [0.0]  # no empty group


@pytest.mark.parametrize(
    ("model", "decay", "options", "error", "words"),
    [
        ([], 0.1, {}, TypeError, "model is list, expected a torch.nn.Module"),
        (nn.Linear(2, 2), -0.1, {}, ValueError, "weight_decay=-0.1, expected a finite number >= 0"),
        (nn.Linear(2, 2), float("nan"), {}, ValueError, "weight_decay=nan"),
        (nn.Linear(2, 2), 0.1, {"no_decay": ["*.weight"]}, ValueError, r"no_decay=\['\*.weight'\] match no trainable"),
        (nn.ReLU(), 0.1, {}, ValueError, "ReLU has no parameter that requires a gradient"),
    ],
)
def test_bad_input_is_named(model, decay, options, error, words):
    with pytest.raises(error, match=words):
        growkit.param_groups(model, decay, **options)


@pytest.mark.parametrize("name", growkit.presets)
def test_presets_are_options_with_sources(name):
    preset = growkit.presets[name]
    cls = getattr(growkit, preset.optimizer)
    assert set(preset) == set(preset.sources) and all(preset.sources.values()) and preset.run
    optimizer = cls(growkit.param_groups(nn.Linear(2, 2), preset["weight_decay"]), **preset)
    assert all(optimizer.defaults[key] == value for key, value in preset.items())
    assert set(preset) <= set(inspect.signature(cls).parameters)
