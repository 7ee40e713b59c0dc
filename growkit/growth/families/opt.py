from growkit.growth.families.table import Attention, Family, Residual, Size, embedding, linear, norm

# Position 0 is row 2. The embeddings' own size is the stream's, or there are projections, which are refused by name.
OPT = Family(
    layers=Size("num_hidden_layers"),
    residual=Residual(Size("hidden_size"), norm="layer", eps=""),
    attention=Attention(Size("num_attention_heads")),
    hidden={"ffn": Size("ffn_dim"), "projected": Size("word_embed_proj_dim", lambda config: config.hidden_size)},
    tables={"vocabulary": Size("vocab_size"), "positions": Size("max_position_embeddings", more=2)},
    expects={"do_layer_norm_before": True, "_remove_final_layer_norm": False},
    modules={
        "decoder.embed_tokens": embedding("vocabulary", "residual"),
        "decoder.embed_positions": embedding("positions", "residual"),
        "decoder.layers.*.self_attn_layer_norm": norm("residual"),
        "decoder.layers.*.self_attn.q_proj": linear("residual", "query"),
        "decoder.layers.*.self_attn.k_proj": linear("residual", "key"),
        "decoder.layers.*.self_attn.v_proj": linear("residual", "value"),
        "decoder.layers.*.self_attn.out_proj": linear("value", "residual"),
        "decoder.layers.*.final_layer_norm": norm("residual"),
        "decoder.layers.*.fc1": linear("residual", "ffn"),
        "decoder.layers.*.fc2": linear("ffn", "residual"),
        "decoder.final_layer_norm": norm("head"),
        "lm_head": linear("head", "vocabulary"),
        "score": linear("head", None),
        "qa_outputs": linear("head", None),
    },
)
