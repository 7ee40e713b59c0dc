"""What cannot grow, or not without loss, is refused by name before anything happens."""

import copy

import pytest
import torch
from torch import nn

from growkit import LiGO
from growkit.growth.spaces import Copy, Dense

transformers = pytest.importorskip("transformers")

from growth.models import bert, gpt2, model  # noqa: E402

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
