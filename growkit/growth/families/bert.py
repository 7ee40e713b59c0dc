"""BERT and RoBERTa: one encoder, heads of other names. A tied decoder is the embedding."""

from growkit.growth.families.table import Attention, Family, Residual, Size, embedding, linear, norm

_ENCODER = {
    "embeddings.word_embeddings": embedding("vocabulary", "residual"),
    "embeddings.position_embeddings": embedding("positions", "residual"),
    "embeddings.token_type_embeddings": embedding(None, "residual"),
    "embeddings.LayerNorm": norm("residual"),
    "encoder.layer.*.attention.self.query": linear("residual", "query"),
    "encoder.layer.*.attention.self.key": linear("residual", "key"),
    "encoder.layer.*.attention.self.value": linear("residual", "value"),
    "encoder.layer.*.attention.output.dense": linear("value", "residual"),
    "encoder.layer.*.attention.output.LayerNorm": norm("residual"),
    "encoder.layer.*.intermediate.dense": linear("residual", "ffn"),
    "encoder.layer.*.output.dense": linear("ffn", "residual"),
    "encoder.layer.*.output.LayerNorm": norm("residual"),
    "pooler.dense": linear("residual", "pooled"),
    "classifier": linear(("pooled", "residual"), None),
    "qa_outputs": linear("residual", None),
}


def _family(heads):
    hidden = Size("hidden_size")
    return Family(
        layers=Size("num_hidden_layers"),
        residual=Residual(hidden, norm="layer", eps="layer_norm_eps", post_norm="output.LayerNorm"),
        attention=Attention(Size("num_attention_heads")),
        hidden={"ffn": Size("intermediate_size"), "pooled": hidden, "head": hidden},
        tables={"vocabulary": Size("vocab_size"), "positions": Size("max_position_embeddings")},
        modules=_ENCODER | heads,
    )


BERT = _family({
    "cls.predictions.transform.dense": linear("residual", "head"),
    "cls.predictions.transform.LayerNorm": norm("head"),
    "cls.predictions.decoder": linear("head", "vocabulary"),
    "cls.predictions": linear(None, "vocabulary"),
    "cls.seq_relationship": linear("pooled", None),
})  # fmt: skip
ROBERTA = _family({
    "lm_head.dense": linear("residual", "head"),
    "lm_head.layer_norm": norm("head"),
    "lm_head.decoder": linear("head", "vocabulary"),
    "lm_head": linear(None, "vocabulary"),
    "classifier.dense": linear("residual", "pooled"),
    "classifier.out_proj": linear("pooled", None),
})  # fmt: skip
