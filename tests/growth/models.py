"""Tiny models of every family for the tests of growth: any size, every parameter random."""

import functools

import torch
import transformers

VOCABULARY, POSITIONS = 61, 24

_TOKENS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "vocab_size": VOCABULARY}


def gpt2(hidden, heads, layers, ffn=None, kv=None, **options):
    return transformers.GPT2Config(
        n_embd=hidden, n_head=heads, n_layer=layers, n_inner=ffn, n_positions=POSITIONS, **_TOKENS | options
    )


def _encoder(config, hidden, heads, layers, ffn, kv=None, **options):
    return config(
        hidden_size=hidden, num_attention_heads=heads, num_hidden_layers=layers, intermediate_size=ffn,
        vocab_size=VOCABULARY, max_position_embeddings=POSITIONS, **options,
    )  # fmt: skip


def _vision(config, hidden, heads, layers, ffn, kv=None, **options):
    return config(
        hidden_size=hidden, num_attention_heads=heads, num_hidden_layers=layers, intermediate_size=ffn, image_size=8,
        patch_size=4, num_labels=5, **options,
    )  # fmt: skip


def _llama(config, hidden, heads, layers, ffn, kv=None, **options):
    return config(
        hidden_size=hidden, num_attention_heads=heads, num_hidden_layers=layers, intermediate_size=ffn,
        num_key_value_heads=kv or heads, max_position_embeddings=POSITIONS, **{"head_dim": 8} | _TOKENS | options,
    )  # fmt: skip


def _opt(hidden, heads, layers, ffn, kv=None, **options):
    return transformers.OPTConfig(
        hidden_size=hidden, num_attention_heads=heads, num_hidden_layers=layers, ffn_dim=ffn,
        max_position_embeddings=POSITIONS, **_TOKENS | options,
    )  # fmt: skip


bert = functools.partial(_encoder, transformers.BertConfig)


def _experts(config, hidden, heads, layers, ffn, kv=None, *, experts=4, chosen=2, **options):
    units = {"intermediate_size": ffn, "num_local_experts": experts}
    if config is not transformers.MixtralConfig:
        units = {"moe_intermediate_size": ffn, "num_experts": experts, "intermediate_size": 9}
    if config is transformers.Qwen2MoeConfig:
        units["shared_expert_intermediate_size"] = ffn + 3
    return config(
        hidden_size=hidden, num_attention_heads=heads, num_hidden_layers=layers, num_key_value_heads=kv or heads,
        max_position_embeddings=POSITIONS, num_experts_per_tok=chosen, experts_implementation="eager",
        **units | {"head_dim": 8} | _TOKENS | options,
    )  # fmt: skip


CONFIGS = {
    "gpt2": gpt2,
    "bert": bert,
    "roberta": functools.partial(_encoder, transformers.RobertaConfig),
    "vit": functools.partial(_vision, transformers.ViTConfig),
    "deit": functools.partial(_vision, transformers.DeiTConfig),
    "llama": functools.partial(_llama, transformers.LlamaConfig),
    "mistral": functools.partial(_llama, transformers.MistralConfig),
    "qwen2": functools.partial(_llama, transformers.Qwen2Config),
    "qwen3": functools.partial(_llama, transformers.Qwen3Config),
    "gpt_neox": functools.partial(_encoder, transformers.GPTNeoXConfig),
    "opt": _opt,
    "phi3": functools.partial(_llama, transformers.Phi3Config),
    "gemma": functools.partial(_llama, transformers.GemmaConfig),
    "gemma2": functools.partial(_llama, transformers.Gemma2Config, query_pre_attn_scalar=8),
    "gemma3_text": functools.partial(_llama, transformers.Gemma3TextConfig, query_pre_attn_scalar=8),
    "olmo2": functools.partial(_llama, transformers.Olmo2Config),
    "olmo3": functools.partial(_llama, transformers.Olmo3Config),
    "mixtral": functools.partial(_experts, transformers.MixtralConfig),
    "qwen2_moe": functools.partial(_experts, transformers.Qwen2MoeConfig),
    "qwen3_moe": functools.partial(_experts, transformers.Qwen3MoeConfig),
}
FIRST = {
    "gpt2": "GPT2LMHeadModel", "bert": "BertForMaskedLM", "roberta": "RobertaForMaskedLM",
    "vit": "ViTForImageClassification", "deit": "DeiTForImageClassification", "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM", "opt": "OPTForCausalLM", "phi3": "Phi3ForCausalLM", "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM", "gemma3_text": "Gemma3ForCausalLM", "mixtral": "MixtralForCausalLM",
    "olmo2": "Olmo2ForCausalLM", "olmo3": "Olmo3ForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM",
}  # fmt: skip


def model(config, dtype=torch.float64, name=None):
    """A model of this class in eval mode whose every parameter is random, biases and norms included."""
    torch.manual_seed(0)
    made = getattr(transformers, name or FIRST[config.model_type])(config).to(dtype).eval()
    with torch.no_grad():
        for leaf, p in made.named_parameters():
            norm = leaf.endswith("weight") and p.ndim == 1
            p.copy_(torch.randn_like(p) * (0.3 if p.ndim == 1 else p.shape[-1] ** -0.5) + norm)
    return made


def batches(count):
    """Counting up from a random token: easy to learn."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        start = torch.randint(VOCABULARY, (4, 1), generator=generator)
        yield (start + torch.arange(16)) % VOCABULARY


@torch.no_grad()
def change(small, big):
    """max |logit change| / max |logit|"""
    tokens = torch.randint(VOCABULARY, (3, POSITIONS), generator=torch.Generator().manual_seed(2))
    old, new = small.eval()(tokens).logits, big.eval()(tokens).logits
    return float((new - old).abs().max() / old.abs().max())
