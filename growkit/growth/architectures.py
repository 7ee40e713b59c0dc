"""Model families as tables: which axis of which weight lives in which space. Adding a family is adding a table."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Family:
    """What growth has to know of a model family; values are names of config fields unless said otherwise.

    weights: name -> one entry per storage axis: None (not grown), "space_side", or a tuple of those where the axis is a
        concatenation. "*" stands for the layer index. Rows whose weight a model does not have are skipped.
    agree: fields that must be equal in the small and the big config.
    post_norm: of a post-LN family, the norm that ends a layer; empty for pre-LN.
    scaled_attention, layer_scaled_attention: flags that divide attention scores by sqrt(head_dim), by the layer number.
    """

    layers: str
    hidden: str
    heads: str
    ffn: str
    eps: str
    agree: tuple[str, ...]
    weights: dict[str, tuple] = field(repr=False)
    post_norm: str = ""
    scaled_attention: str = ""
    layer_scaled_attention: str = ""

    def size(self, config):
        """Sizes of a config by our names; ValueError where heads do not divide the hidden size."""
        sizes = {name: getattr(config, getattr(self, name)) for name in ("layers", "hidden", "heads", "ffn")}
        sizes["ffn"] = sizes["ffn"] or 4 * sizes["hidden"]  # GPT-2 writes the usual size as None
        if sizes["hidden"] % sizes["heads"]:
            raise ValueError(
                f"{self.heads}: got {sizes['heads']}, expected a divisor of {self.hidden} = {sizes['hidden']}"
            )
        return {**sizes, "head_dim": sizes["hidden"] // sizes["heads"]}


_QKV = ("query_write", "key_write", "value_write")
_GPT2 = "transformer.h.*."
_BERT = "bert.encoder.layer.*."
_MLM = "cls.predictions."

FAMILIES = {
    # Conv1D stores (in, out). The final norm is the head's: with a tied head, the embedding reads what it writes.
    "gpt2": Family(
        layers="n_layer", hidden="n_embd", heads="n_head", ffn="n_inner", eps="layer_norm_epsilon",
        agree=("vocab_size", "n_positions", "activation_function", "tie_word_embeddings", "scale_attn_weights",
               "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention"),
        scaled_attention="scale_attn_weights", layer_scaled_attention="scale_attn_by_inverse_layer_idx",
        weights={
            "transformer.wte.weight": (None, "residual_write"),
            "transformer.wpe.weight": (None, "residual_write"),
            _GPT2 + "ln_1.weight": ("residual_gain",),
            _GPT2 + "ln_1.bias": ("residual_shift",),
            _GPT2 + "attn.c_attn.weight": ("residual_read", _QKV),
            _GPT2 + "attn.c_attn.bias": (_QKV,),
            _GPT2 + "attn.c_proj.weight": ("value_read", "residual_write"),
            _GPT2 + "attn.c_proj.bias": ("residual_write",),
            _GPT2 + "ln_2.weight": ("residual_gain",),
            _GPT2 + "ln_2.bias": ("residual_shift",),
            _GPT2 + "mlp.c_fc.weight": ("residual_read", "ffn_write"),
            _GPT2 + "mlp.c_fc.bias": ("ffn_write",),
            _GPT2 + "mlp.c_proj.weight": ("ffn_read", "residual_write"),
            _GPT2 + "mlp.c_proj.bias": ("residual_write",),
            "transformer.ln_f.weight": ("head_gain",),
            "transformer.ln_f.bias": ("head_shift",),
            "lm_head.weight": (None, "head_read"),
        },
    ),
    # The tied decoder is the embedding: residual_write.
    "bert": Family(
        layers="num_hidden_layers", hidden="hidden_size", heads="num_attention_heads", ffn="intermediate_size",
        eps="layer_norm_eps",
        agree=("vocab_size", "max_position_embeddings", "type_vocab_size", "hidden_act", "tie_word_embeddings",
               "is_decoder", "add_cross_attention"),
        post_norm="output.LayerNorm",
        weights={
            "bert.embeddings.word_embeddings.weight": (None, "residual_write"),
            "bert.embeddings.position_embeddings.weight": (None, "residual_write"),
            "bert.embeddings.token_type_embeddings.weight": (None, "residual_write"),
            "bert.embeddings.LayerNorm.weight": ("residual_gain",),
            "bert.embeddings.LayerNorm.bias": ("residual_shift",),
            _BERT + "attention.self.query.weight": ("query_write", "residual_read"),
            _BERT + "attention.self.query.bias": ("query_write",),
            _BERT + "attention.self.key.weight": ("key_write", "residual_read"),
            _BERT + "attention.self.key.bias": ("key_write",),
            _BERT + "attention.self.value.weight": ("value_write", "residual_read"),
            _BERT + "attention.self.value.bias": ("value_write",),
            _BERT + "attention.output.dense.weight": ("residual_write", "value_read"),
            _BERT + "attention.output.dense.bias": ("residual_write",),
            _BERT + "attention.output.LayerNorm.weight": ("residual_gain",),
            _BERT + "attention.output.LayerNorm.bias": ("residual_shift",),
            _BERT + "intermediate.dense.weight": ("ffn_write", "residual_read"),
            _BERT + "intermediate.dense.bias": ("ffn_write",),
            _BERT + "output.dense.weight": ("residual_write", "ffn_read"),
            _BERT + "output.dense.bias": ("residual_write",),
            _BERT + "output.LayerNorm.weight": ("residual_gain",),
            _BERT + "output.LayerNorm.bias": ("residual_shift",),
            _MLM + "bias": (None,),
            _MLM + "transform.dense.weight": ("head_write", "residual_read"),
            _MLM + "transform.dense.bias": ("head_write",),
            _MLM + "transform.LayerNorm.weight": ("head_gain",),
            _MLM + "transform.LayerNorm.bias": ("head_shift",),
            _MLM + "decoder.weight": (None, "head_read"),
            _MLM + "decoder.bias": (None,),
        },
    ),
}  # fmt: skip
