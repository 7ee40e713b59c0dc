"""Model families as tables, by `config.model_type`. Adding one is adding a table; `LiGO(family=)` takes any other."""

from growkit.growth.families.bert import BERT, ROBERTA
from growkit.growth.families.gpt2 import GPT2
from growkit.growth.families.llama import LLAMA, QWEN3
from growkit.growth.families.vit import VIT

FAMILIES = {
    "bert": BERT, "deit": VIT, "gpt2": GPT2, "llama": LLAMA, "mistral": LLAMA, "qwen2": LLAMA, "qwen3": QWEN3,
    "roberta": ROBERTA, "vit": VIT,
}  # fmt: skip
