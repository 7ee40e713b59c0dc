"""ViT and DeiT: the patches, class, mask and distillation tokens write the stream."""

from growkit.growth.families.table import Attention, Family, Residual, Size, linear, norm, tensor

VIT = Family(
    layers=Size("num_hidden_layers"),
    residual=Residual(Size("hidden_size"), norm="layer", eps="layer_norm_eps"),
    attention=Attention(Size("num_attention_heads")),
    hidden={
        "ffn": Size("intermediate_size"),
        "pooled": Size("pooler_output_size", lambda config: config.hidden_size),
    },
    tables={},
    modules={
        "embeddings.cls_token": tensor(None, None, "residual_write"),
        "embeddings.mask_token": tensor(None, None, "residual_write"),
        "embeddings.distillation_token": tensor(None, None, "residual_write"),
        "embeddings.position_embeddings": tensor(None, None, "residual_write"),
        "embeddings.patch_embeddings.projection.weight": tensor("residual_write", None, None, None),
        "embeddings.patch_embeddings.projection.bias": tensor("residual_write"),
        "layers.*.layernorm_before": norm("residual"),
        "layers.*.attention.q_proj": linear("residual", "query"),
        "layers.*.attention.k_proj": linear("residual", "key"),
        "layers.*.attention.v_proj": linear("residual", "value"),
        "layers.*.attention.o_proj": linear("value", "residual"),
        "layers.*.layernorm_after": norm("residual"),
        "layers.*.mlp.fc1": linear("residual", "ffn"),
        "layers.*.mlp.fc2": linear("ffn", "residual"),
        "layernorm": norm("head"),
        "pooler.dense": linear("head", "pooled"),
        "classifier": linear("head", None),
        "cls_classifier": linear("head", None),
        "distillation_classifier": linear("head", None),
        "decoder.0.weight": tensor(None, "head_read", None, None),
        "decoder.0.bias": tensor(None),
    },
)
