from growkit.growth.families.table import Attention, Family, Residual, Size, conv1d, embedding, linear, norm

# The last norm is the head's: with a tied head, the embedding reads what it writes.
GPT2 = Family(
    layers=Size("n_layer"),
    residual=Residual(Size("n_embd"), norm="layer", eps="layer_norm_epsilon"),
    attention=Attention(Size("n_head"), scaled="scale_attn_weights", layer_scaled="scale_attn_by_inverse_layer_idx"),
    hidden={"ffn": Size("n_inner", lambda config: 4 * config.n_embd)},
    tables={"vocabulary": Size("vocab_size"), "positions": Size("n_positions")},
    modules={
        "wte": embedding("vocabulary", "residual"),
        "wpe": embedding("positions", "residual"),
        "h.*.ln_1": norm("residual"),
        "h.*.attn.c_attn": conv1d("residual", ("query", "key", "value")),
        "h.*.attn.c_proj": conv1d("value", "residual"),
        "h.*.ln_2": norm("residual"),
        "h.*.mlp.c_fc": conv1d("residual", "ffn"),
        "h.*.mlp.c_proj": conv1d("ffn", "residual"),
        "ln_f": norm("head"),
        "lm_head": linear("head", "vocabulary"),
        "score": linear("head", None),
        "classifier": linear("head", None),
        "qa_outputs": linear("head", None),
        "multiple_choice_head.summary": linear("head", None),
    },
)
