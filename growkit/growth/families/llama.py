"""LLaMA and its kin: RMS norms, a gated MLP, grouped queries, rotary positions. SmolLM and SmolLM2 are LLaMA."""

from dataclasses import replace

from growkit.growth.families.table import Attention, Family, Residual, Size, embedding, linear, norm, tensor

LLAMA = Family(
    layers=Size("num_hidden_layers"),
    residual=Residual(Size("hidden_size"), norm="rms", eps="rms_norm_eps"),
    attention=Attention(
        Size("num_attention_heads"),
        Size("num_key_value_heads", lambda config: config.num_attention_heads),
        Size("head_dim", lambda config: config.hidden_size // config.num_attention_heads),
        rotary=1.0,
    ),
    hidden={"ffn": Size("intermediate_size")},
    tables={"vocabulary": Size("vocab_size"), "positions": Size("max_position_embeddings")},
    modules={
        "embed_tokens": embedding("vocabulary", "residual"),
        "layers.*.input_layernorm": norm("residual"),
        "layers.*.self_attn.q_proj": linear("residual", "query"),
        "layers.*.self_attn.k_proj": linear("residual", "key"),
        "layers.*.self_attn.v_proj": linear("residual", "value"),
        "layers.*.self_attn.o_proj": linear("value", "residual"),
        "layers.*.post_attention_layernorm": norm("residual"),
        "layers.*.mlp.gate_proj": linear("residual", "ffn"),
        "layers.*.mlp.up_proj": linear("residual", "ffn"),
        "layers.*.mlp.down_proj": linear("ffn", "residual"),
        "norm": norm("head"),
        "lm_head": linear("head", "vocabulary"),
        "score": linear("head", None),
        "qa_outputs": linear("head", None),
    },
)
QWEN3 = replace(
    LLAMA,
    attention=replace(LLAMA.attention, normed="head_dim"),
    modules={
        **LLAMA.modules,
        "layers.*.self_attn.q_norm.weight": tensor("query_gain"),
        "layers.*.self_attn.k_norm.weight": tensor("key_gain"),
    },
)
# Norms stand behind what blocks add, and over the queries and keys of all heads.
OLMO2 = replace(
    LLAMA,
    residual=replace(LLAMA.residual, bare=True),
    attention=replace(LLAMA.attention, normed="heads"),
    modules={
        **{name: leaves for name, leaves in LLAMA.modules.items() if name != "layers.*.input_layernorm"},
        "layers.*.self_attn.q_norm.weight": tensor("query_gains"),
        "layers.*.self_attn.k_norm.weight": tensor("key_gains"),
        "layers.*.self_attn.o_proj": linear("value", "branch"),
        "layers.*.post_attention_layernorm": norm("branch"),
        "layers.*.mlp.down_proj": linear("ffn", "branch"),
        "layers.*.post_feedforward_layernorm": norm("branch"),
    },
)
PHI3 = replace(
    LLAMA,
    attention=replace(LLAMA.attention, rotary=lambda config: config.rope_parameters["partial_rotary_factor"]),
    modules={
        **LLAMA.modules,
        "layers.*.self_attn.qkv_proj": linear("residual", ("query", "key", "value")),
        "layers.*.mlp.gate_up_proj": linear("residual", ("ffn", "ffn")),
    },
)
