"""Mixtral, Qwen2-MoE and Qwen3-MoE: LLaMA and its kin with experts in place of the MLP."""

from dataclasses import replace

from growkit.growth.families.llama import LLAMA, QWEN3
from growkit.growth.families.table import Experts, Family, Size, experts, linear, tensor


def _with_experts(dense: Family, count, hidden, modules=(), **expects):
    kept = {name: leaves for name, leaves in dense.modules.items() if ".mlp." not in name}
    return replace(
        dense,
        hidden=hidden,
        experts=Experts(Size(count), Size("num_experts_per_tok")),
        modules={
            **kept,
            "layers.*.mlp.gate.weight": tensor("expert_write", "residual_read"),
            "layers.*.mlp.experts.gate_up_proj": experts("residual", ("ffn", "ffn"), "write"),
            "layers.*.mlp.experts.down_proj": experts("ffn", "residual", "read"),
            **dict(modules),
        },
        expects=expects,
    )


# Layers without experts among others with them are refused by name.
_EVERY_LAYER = {"decoder_sparse_step": 1, "mlp_only_layers": []}
_QWEN = {"ffn": Size("moe_intermediate_size")}
MIXTRAL = _with_experts(LLAMA, "num_local_experts", LLAMA.hidden)
QWEN2_MOE = _with_experts(
    LLAMA,
    "num_experts",
    {**_QWEN, "shared": Size("shared_expert_intermediate_size")},
    {
        "layers.*.mlp.shared_expert.gate_proj": linear("residual", "shared"),
        "layers.*.mlp.shared_expert.up_proj": linear("residual", "shared"),
        "layers.*.mlp.shared_expert.down_proj": linear("shared", "residual"),
        "layers.*.mlp.shared_expert_gate": linear("residual", None),
    },
    **_EVERY_LAYER,
)
QWEN3_MOE = _with_experts(QWEN3, "num_local_experts", _QWEN, **_EVERY_LAYER)
