"""Model families as tables, by `config.model_type`. Adding one is adding a table; `LiGO(family=)` takes any other."""

from growkit.growth.families.bert import BERT, ROBERTA
from growkit.growth.families.gemma import GEMMA, GEMMA2, GEMMA3
from growkit.growth.families.gpt2 import GPT2
from growkit.growth.families.gpt_neox import GPT_NEOX
from growkit.growth.families.llama import LLAMA, OLMO2, PHI3, QWEN3
from growkit.growth.families.mixtral import MIXTRAL, QWEN2_MOE, QWEN3_MOE
from growkit.growth.families.opt import OPT
from growkit.growth.families.vit import VIT

FAMILIES = {
    "bert": BERT, "deit": VIT, "gemma": GEMMA, "gemma2": GEMMA2, "gemma3_text": GEMMA3, "gpt2": GPT2,
    "gpt_neox": GPT_NEOX, "llama": LLAMA, "mistral": LLAMA, "mixtral": MIXTRAL, "olmo2": OLMO2, "olmo3": OLMO2,
    "opt": OPT, "phi3": PHI3,
    "qwen2": LLAMA, "qwen2_moe": QWEN2_MOE, "qwen3": QWEN3, "qwen3_moe": QWEN3_MOE, "roberta": ROBERTA, "vit": VIT,
}  # fmt: skip
