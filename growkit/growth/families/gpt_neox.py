from growkit.growth.families.table import Attention, Family, Residual, Size, by_head, embedding, linear, norm

GPT_NEOX = Family(
    layers=Size("num_hidden_layers"),
    residual=Residual(Size("hidden_size"), norm="layer", eps="layer_norm_eps"),
    attention=Attention(
        Size("num_attention_heads"), rotary=lambda config: config.rope_parameters["partial_rotary_factor"]
    ),
    hidden={"ffn": Size("intermediate_size")},
    tables={"vocabulary": Size("vocab_size"), "positions": Size("max_position_embeddings")},
    modules={
        "embed_in": embedding("vocabulary", "residual"),
        "layers.*.input_layernorm": norm("residual"),
        "layers.*.attention.query_key_value": linear("residual", by_head("query", "key", "value")),
        "layers.*.attention.dense": linear("value", "residual"),
        "layers.*.post_attention_layernorm": norm("residual"),
        "layers.*.mlp.dense_h_to_4h": linear("residual", "ffn"),
        "layers.*.mlp.dense_4h_to_h": linear("ffn", "residual"),
        "final_layer_norm": norm("head"),
        "lm_head": linear("head", "vocabulary"),
        "score": linear("head", None),
        "classifier": linear("head", None),
        "qa_outputs": linear("head", None),
    },
)
