"""Gemma 1 to 3: LLaMA with gains stored less 1, embeddings times sqrt(hidden_size); from 2 on, blocks end in norms."""

import math
from dataclasses import replace

from growkit.growth.families.llama import LLAMA, QWEN3
from growkit.growth.families.table import embedding, linear, norm

GEMMA = replace(
    LLAMA,
    residual=replace(LLAMA.residual, gain_offset=1.0, multiplier=math.sqrt),
    modules={**LLAMA.modules, "embed_tokens": embedding("vocabulary", "embedded")},
)
# Scores are divided by a number of the config's own.
GEMMA2 = replace(
    GEMMA,
    attention=replace(GEMMA.attention, scaled=False),
    modules={
        **GEMMA.modules,
        "layers.*.self_attn.o_proj": linear("value", "branch"),
        "layers.*.post_attention_layernorm": norm("branch"),
        "layers.*.pre_feedforward_layernorm": norm("residual"),
        "layers.*.mlp.down_proj": linear("ffn", "branch"),
        "layers.*.post_feedforward_layernorm": norm("branch"),
    },
)
GEMMA3 = replace(
    GEMMA2,
    attention=replace(GEMMA2.attention, normed="head_dim"),
    modules={**QWEN3.modules, **GEMMA2.modules},
)
