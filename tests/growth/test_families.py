"""Every family, with every head class: lossless growth of width, depth, heads and MLP at once; what is carried over."""

import pytest

from growkit import LiGO

transformers = pytest.importorskip("transformers")

from growth.models import CONFIGS, FIRST, model  # noqa: E402

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
    post = family in ("bert", "roberta")
    small = model(head, CONFIGS[family](24, 3, 2, 50))
    big = CONFIGS[family](48 if post else 40, 6 if post else 5, 3, 77)
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
    small = model(FIRST[family], CONFIGS[family](24, 3, 2, 50))
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
