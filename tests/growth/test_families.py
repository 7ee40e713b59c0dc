"""Every family, with every head class: lossless growth of width, depth, heads and MLP at once; what is carried over."""

import dataclasses
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from growkit import LiGO
from growkit.growth.families.table import Attention, Family, Residual, Size, by_head, linear, norm, tensor

transformers = pytest.importorskip("transformers")

from growth.models import CONFIGS, FIRST, VOCABULARY, model  # noqa: E402

HEADS = {
    "gpt2": ["GPT2Model", "GPT2ForSequenceClassification", "GPT2ForTokenClassification", "GPT2ForQuestionAnswering"],
    "bert": ["BertModel", "BertForPreTraining", "BertForSequenceClassification", "BertForTokenClassification"],
    "roberta": ["RobertaModel", "RobertaForSequenceClassification", "RobertaForTokenClassification"],
    "vit": ["ViTModel", "ViTForMaskedImageModeling"],
    "deit": ["DeiTModel", "DeiTForImageClassificationWithTeacher"],
    "llama": ["LlamaModel", "LlamaForSequenceClassification", "LlamaForTokenClassification"],
}
CLASSES = [*FIRST.items(), *((family, head) for family, heads in HEADS.items() for head in heads)]


@pytest.mark.parametrize(("family", "head"), CLASSES, ids=[head for _, head in CLASSES])
def test_lossless_growth_in_every_direction(family, head):
    whole = family in ("bert", "roberta", "olmo2", "olmo3")
    small = model(CONFIGS[family](24, 3, 2, 50), name=head)
    big = CONFIGS[family](48 if whole else 40, 6 if whole else 5, 3, 77)
    operator = LiGO(small, big)
    tolerance = 1e-5 if hasattr(big, "rms_norm_eps") else 1e-12  # transformers' RMSNorm computes in float32
    assert operator.check() < tolerance and operator.exact


class _Read(dict):
    """Weights that say which of them were read."""

    def __init__(self, weights):
        super().__init__(weights)
        self.read = []

    def __getitem__(self, name):
        self.read.append(name)
        return super().__getitem__(name)


@pytest.mark.parametrize(("family", "start"), [("gpt2", "lossless"), ("llama", "official"), ("bert", "lemon")])
def test_weights_are_read_one_module_type_at_a_time_and_grown_one_by_one(family, start):
    small = model(CONFIGS[family](24, 3, 2, 50))
    big = CONFIGS[family](48, 6, 3, 77)
    expected = dict(LiGO(small, big, start=start).grow().named_parameters())
    small.config.architectures = [FIRST[family]]
    weights = _Read(small.state_dict())
    operator = LiGO(small.config, big, start=start, weights=weights)
    del weights.read[:]
    pairs = operator.tensors()
    name, value = next(pairs)
    assert weights.read == operator.rows[0].small_names
    grown = {name: value} | dict(pairs)
    assert list(grown) == [name for row in operator.rows for name in row.names] and grown.keys() == expected.keys()
    for name, value in grown.items():
        assert (value - expected[name]).abs().max() < 1e-12, name


@settings(max_examples=10, deadline=None, derandomize=True)
@given(data=st.data())
def test_grouped_heads_of_any_number_and_any_width_keep_the_function(data):
    """Groups stay, are joined by new queries, or are cut in several; heads grow by their rotary frequencies."""
    kv, group, dim = (data.draw(st.integers(1, 3)) for _ in range(3))
    kv2, group2, times = (data.draw(st.integers(1, 5)) for _ in range(3))
    dim, dim2 = 4 * dim, 4 * dim * min(times, 2)
    big_kv = max(kv2, kv)
    heads, big_heads = kv * group, big_kv * group2
    assume(big_heads >= heads)
    tied = data.draw(st.booleans())
    options = {"tie_word_embeddings": tied}
    width, big_width = 12 * heads, 12 * heads * big_heads // math.gcd(heads, big_heads)
    small = model(CONFIGS["llama"](width, heads, 2, 9, kv, head_dim=dim, **options))
    big = CONFIGS["llama"](big_width, big_heads, 3, 20, big_kv, head_dim=dim2, **options)
    start = data.draw(st.sampled_from(["lossless", "lemon", "hypercloning"]))
    if kv * -(-group // group2) > big_kv:
        with pytest.raises(ValueError, match="num_key_value_heads: .* groups of"):
            LiGO(small, big, start=start)
    else:
        assert LiGO(small, big, start=start).check() < 1e-5


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16, "factor": 8.0}
LARGER_HEADS = {
    "llama": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    "mistral": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, **LLAMA3}},
    "phi3": {}, "gemma2": {}, "qwen3": {}, "gemma3_text": {}, "mixtral": {},
    "gpt_neox": {"num_attention_heads": 3, "hidden_size": 48},
}  # fmt: skip


@pytest.mark.parametrize("family", LARGER_HEADS)
def test_frequencies_keep_their_pairs_in_larger_heads(family):
    options = LARGER_HEADS[family]
    sizes, options = (options, {}) if "hidden_size" in options else ({"head_dim": 16}, options)
    operator = LiGO(model(CONFIGS[family](24, 3, 2, 50, **options)), sizes)
    assert operator.check() < 1e-5 and operator._big["head_dim"] == 16


def test_new_tokens_and_positions_leave_the_old_ones_alone():
    for family in ("gpt2", "bert", "llama"):
        config = CONFIGS[family](24, 3, 2, 50)
        positions = "n_positions" if family == "gpt2" else "max_position_embeddings"
        operator = LiGO(model(config), {"vocab_size": 70, positions: 40})
        assert operator.check() < 1e-5 and operator.config.vocab_size == 70
        logits = operator.grow()(torch.arange(40)[None]).logits  # a new token's logit is the mean of the old ones
        torch.testing.assert_close(logits[..., 61], logits[..., :61].mean(-1))


def test_what_is_not_a_size_is_the_small_models():
    small = model(CONFIGS["qwen2"](24, 3, 2, 50, use_sliding_window=True, sliding_window=4, max_window_layers=1))
    assert small.config.layer_types == ["full_attention", "sliding_attention"]
    small.config.id2label = {0: "a", 1: "b"}
    small.generation_config.eos_token_id = [7, 9]
    config = CONFIGS["qwen2"](24, 3, 4, 50, bos_token_id=None, eos_token_id=None)
    operator = LiGO(small, config)
    grown = operator.grow()
    assert grown.config.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 2
    assert (grown.config.sliding_window, grown.config.eos_token_id, grown.config.id2label[1]) == (4, 0, "b")
    assert grown.generation_config.eos_token_id == [7, 9]
    assert operator.check() == 0


def test_sizes_alone_keep_the_size_of_heads():
    operator = LiGO(model(CONFIGS["mistral"](24, 3, 2, 50, head_dim=4)), {"hidden_size": 48, "num_attention_heads": 6})
    assert operator.config.head_dim == 4 and operator.config.num_key_value_heads == 3
    assert operator.check() < 1e-5


@dataclasses.dataclass
class OwnConfig:
    width: int
    heads: int
    depth: int
    units: int


class Own(nn.Module):
    """Before-norm blocks with bare matrices, q, k and v joined head by head, and a saved buffer."""

    def __init__(self, config):
        super().__init__()
        self.config, D = config, config.width
        self.tokens = nn.Parameter(torch.empty(VOCABULARY, D))
        self.blocks = nn.ModuleList()
        for _ in range(config.depth):
            block = nn.Module()
            block.first, block.second = nn.LayerNorm(D), nn.LayerNorm(D)
            block.qkv, block.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
            block.up, block.down = nn.Linear(D, config.units), nn.Linear(config.units, D)
            self.blocks.append(block)
        self.last, self.head = nn.LayerNorm(D), nn.Conv1d(D, 7, 1)
        self.register_buffer("temperature", torch.ones(()))

    def forward(self, input_ids):
        x = self.tokens[input_ids]
        for block in self.blocks:
            q, k, v = block.qkv(block.first(x)).unflatten(-1, (self.config.heads, 3, -1)).transpose(1, 2).unbind(-2)
            x = x + block.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))
            x = x + block.down(block.up(block.second(x)).tanh())
        return self.head(self.last(x).mT) / self.temperature


OWN = Family(
    layers=Size("depth"),
    residual=Residual(Size("width"), norm="layer", eps=""),
    attention=Attention(Size("heads")),
    hidden={"units": Size("units")},
    tables={},
    modules={
        "tokens": tensor(None, "residual_write"),
        "blocks.*.first": norm("residual"),
        "blocks.*.qkv": linear("residual", by_head("query", "key", "value")),
        "blocks.*.out": linear("value", "residual"),
        "blocks.*.second": norm("residual"),
        "blocks.*.up": linear("residual", "units"),
        "blocks.*.down": linear("units", "residual"),
        "last": norm("head"),
        "head.weight": tensor(None, "head_read", None),
        "head.bias": tensor(None),
    },
)


@pytest.mark.parametrize("start", ["lossless", "lemon"])
def test_a_model_and_a_table_of_ones_own(start):
    small = Own(OwnConfig(12, 3, 2, 20)).double()
    small.temperature.fill_(3)
    for p in small.parameters():
        nn.init.normal_(p, std=0.3)
    operator = LiGO(small, OwnConfig(20, 5, 3, 33), start=start, family=OWN)
    tokens = torch.arange(8)[None]
    assert operator.check(tokens) < 1e-12
    grown = operator.grow()
    assert grown.temperature == 3 and grown.config == OwnConfig(20, 5, 3, 33)
    with pytest.raises(ValueError, match="inputs: expected some, as random input_ids cannot be made for Own"):
        operator.check()
    losses = operator.fit(
        [tokens] * 4, steps=4, loss=lambda net, batch: nn.functional.cross_entropy(net(batch), batch % 7)
    )
    assert losses[-1] < losses[0]
    with pytest.raises(ValueError, match="table does not know: tokens"):
        LiGO(small, {"depth": 3}, family=dataclasses.replace(OWN, modules={**OWN.modules, "tokens": {}}))
