"""Grow a small model of every family by every kind of growth, and print what became of it as a table.

    python benchmarks/growth_table.py [--families gpt2 llama ...] [--starts lossless stack ...] [--dtype float64]
    python benchmarks/growth_table.py --trained 300    # instead: really trained models, grown losslessly

Every parameter of the small models is random, so that nothing agrees by chance. Each grown model is saved and loaded
again with nothing missing, unexpected or mismatched; compared with the small one on random tokens or pixels; asked to
generate the same text where its logits are the same; and trained for some steps, after which no element may be without
gradient and no two copies the same. Needs `pip install 'growkit[hf]'`, some minutes of one CPU core and no download.
"""

import argparse
import math
import tempfile
import warnings

import torch
import transformers

from growkit import LiGO
from growkit.growth.starts import STARTS

TOKENS = {"vocab_size": 61, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def gpt2(hidden, heads, kv, layers, ffn):
    return transformers.GPT2Config(
        n_embd=hidden, n_head=heads, n_layer=layers, n_inner=ffn, n_positions=24, **TOKENS
    )  # fmt: skip


def bert(config):
    def make(hidden, heads, kv, layers, ffn):
        return config(
            hidden_size=hidden, num_attention_heads=heads, num_hidden_layers=layers, intermediate_size=ffn,
            max_position_embeddings=26, vocab_size=61,
        )  # fmt: skip

    return make


def vision(config):
    def make(hidden, heads, kv, layers, ffn):
        return config(
            hidden_size=hidden, num_attention_heads=heads, num_hidden_layers=layers, intermediate_size=ffn,
            image_size=8, patch_size=4, num_labels=5,
        )  # fmt: skip

    return make


def llama(config):
    def make(hidden, heads, kv, layers, ffn):
        return config(
            hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=kv, head_dim=8, num_hidden_layers=layers,
            intermediate_size=ffn, max_position_embeddings=24, **TOKENS,
        )  # fmt: skip

    return make


def experts(config, *units):
    """4 experts, of which 2 are chosen; with a larger hidden size twice as many of both."""

    def make(hidden, heads, kv, layers, ffn):
        times = 1 if hidden == SMALL[0] else 2
        return config(
            hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=kv, head_dim=8, num_hidden_layers=layers,
            max_position_embeddings=24, num_experts=4 * times, num_experts_per_tok=2 * times,
            experts_implementation="eager", **{"intermediate_size": 50} | dict.fromkeys(units, ffn) | TOKENS,
        )  # fmt: skip

    return make


def opt(hidden, heads, kv, layers, ffn):
    return transformers.OPTConfig(
        hidden_size=hidden, num_attention_heads=heads, num_hidden_layers=layers, ffn_dim=ffn,
        max_position_embeddings=24, activation_function="gelu", **TOKENS,
    )  # fmt: skip


# family -> class, config, whether the hidden size or the heads grow by whole copies only
FAMILIES = {
    "gpt2": ("GPT2LMHeadModel", gpt2, False),
    "bert": ("BertForMaskedLM", bert(transformers.BertConfig), True),
    "roberta": ("RobertaForMaskedLM", bert(transformers.RobertaConfig), True),
    "vit": ("ViTForImageClassification", vision(transformers.ViTConfig), False),
    "deit": ("DeiTForImageClassification", vision(transformers.DeiTConfig), False),
    "llama": ("LlamaForCausalLM", llama(transformers.LlamaConfig), False),
    "mistral": ("MistralForCausalLM", llama(transformers.MistralConfig), False),
    "qwen2": ("Qwen2ForCausalLM", llama(transformers.Qwen2Config), False),
    "qwen3": ("Qwen3ForCausalLM", llama(transformers.Qwen3Config), False),
    "phi3": ("Phi3ForCausalLM", llama(transformers.Phi3Config), False),
    "gemma": ("GemmaForCausalLM", llama(transformers.GemmaConfig), False),
    "gemma2": ("Gemma2ForCausalLM", llama(transformers.Gemma2Config), False),
    "gemma3_text": ("Gemma3ForCausalLM", llama(transformers.Gemma3TextConfig), False),
    "olmo2": ("Olmo2ForCausalLM", llama(transformers.Olmo2Config), True),
    "olmo3": ("Olmo3ForCausalLM", llama(transformers.Olmo3Config), True),
    "mixtral": ("MixtralForCausalLM", experts(transformers.MixtralConfig, "intermediate_size"), False),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        experts(transformers.Qwen2MoeConfig, "moe_intermediate_size", "shared_expert_intermediate_size"),
        False,
    ),
    "qwen3_moe": ("Qwen3MoeForCausalLM", experts(transformers.Qwen3MoeConfig, "moe_intermediate_size"), False),
    "gpt_neox": ("GPTNeoXForCausalLM", bert(transformers.GPTNeoXConfig), False),
    "opt": ("OPTForCausalLM", opt, False),
}
TRAINED = ("gpt2", "bert", "vit", "llama")
SMALL = (24, 3, 3, 3, 50)  # hidden, heads, key and value heads, layers, MLP
GROUPED = (24, 6, 3, 3, 50)


def sizes(family, start):
    """Small and large sizes: every direction at once, where the kind of growth allows it."""
    copied = FAMILIES[family][2] or start in ("hypercloning", "fpi")
    grouped = family in (
        "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo2", "olmo3", "mixtral",
        "qwen2_moe", "qwen3_moe",
    )  # fmt: skip
    small = GROUPED if grouped else SMALL
    if start == "zero_blocks":
        return small, (*small[:3], 5, small[4])
    if start == "staged":
        return small, (48, 2 * small[1], 2 * small[2], 5, 2 * small[4])
    if grouped:
        return small, ((48, 12, 6, 5, 77) if copied else (40, 10, 5, 5, 77))
    return small, ((48, 6, 6, 5, 77) if copied else (40, 5, 5, 5, 77))


def random_model(name, config, dtype):
    torch.manual_seed(0)
    model = getattr(transformers, name)(config).to(dtype).eval()
    with torch.no_grad():
        for leaf, p in model.named_parameters():
            gain = leaf.endswith("weight") and p.ndim == 1
            p.copy_(torch.randn_like(p) * (0.3 if p.ndim == 1 else p.shape[-1] ** -0.5) + gain)
    return model


def batch(model, seed):
    generator = torch.Generator().manual_seed(seed)
    if model.main_input_name == "pixel_values":
        images = torch.randn(16, 3, 8, 8, generator=generator, dtype=model.dtype)
        return {"pixel_values": images, "labels": torch.randint(5, (16,), generator=generator)}
    tokens = torch.randint(2, 61, (16, 20), generator=generator)  # 0 and 1 pad in some families
    return {"input_ids": tokens, "labels": tokens}


def problems(small, grown, exact, steps):
    """What is wrong with a grown model, in words."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        grown.save_pretrained(folder)
        options = {"experts_implementation": "eager"} if hasattr(grown.config, "num_experts_per_tok") else {}
        loaded, info = type(grown).from_pretrained(folder, output_loading_info=True, dtype=grown.dtype, **options)
    if any(info.values()):
        found.append(f"loading: {info}")
    inputs = {name: x for name, x in batch(small, 1).items() if name != "labels"}
    with torch.no_grad():
        if not loaded.eval()(**inputs).logits.equal(grown(**inputs).logits):
            found.append("the loaded model computes something else")
    if exact and small.can_generate():
        texts = [m.generate(inputs["input_ids"][:2], max_new_tokens=4, do_sample=False) for m in (small, grown)]
        if not texts[0].equal(texts[1]):
            found.append("generates something else")
    return found + untrained(grown, steps)


def untrained(model, steps):
    """Parameters with elements that training does not reach, and those with rows or columns that stay equal."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    for step in range(steps):
        model(**batch(model, step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    found, rotary = [], hasattr(model.config, "rope_parameters")
    for name, p in model.named_parameters():
        moved = p.detach() != before[name]
        if p.ndim == 2 and ("embed" in name or "wte" in name or "wpe" in name):
            moved = moved[moved.any(1)]  # rows of tokens and positions that no batch has stay
        elif name.endswith("c_attn.bias"):
            moved = torch.cat(moved.chunk(3)[::2])  # softmax does not see the bias of keys ...
        elif name.endswith("query_key_value.bias"):  # ... but where positions rotate them, here a part of each head
            moved = moved.unflatten(0, (model.config.num_attention_heads, 3, -1))[:, ::2]
        elif name.endswith(("key.bias", "k_proj.bias")) and not rotary:
            continue
        if not moved.all():
            found.append(f"{name}: {int((~moved).sum())} of {moved.numel()} elements without gradient")
        for axis in range(p.ndim if p.ndim == 2 or "experts" in name else 0):
            if torch.unique(p.detach(), dim=axis).shape[axis] < p.shape[axis]:
                found.append(f"{name}: copies stay equal along axis {axis}")
    return found


def trained_model(family, steps):
    """A model in float32 that has learned to count (tokens), or to tell the brightest of four corners (images)."""
    name, config, _ = FAMILIES[family]
    torch.manual_seed(0)
    model = getattr(transformers, name)(config(*sizes(family, "lossless")[0])).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(steps):
        loss = model(**task(model, step)).loss
        loss.backward()
        losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    tail = max(1, steps // 10)
    return model.eval(), *(float(torch.stack(part).mean()) for part in (losses[:tail], losses[-tail:]))


def task(model, seed):
    """A batch in which there is something to learn; of a masked LM every fourth token is hidden."""
    generator = torch.Generator().manual_seed(seed)
    if model.main_input_name == "pixel_values":
        corner = torch.randint(4, (16,), generator=generator)
        images = torch.randn(16, 3, 8, 8, generator=generator)
        images.view(16, 3, 2, 4, 2, 4)[torch.arange(16), :, corner // 2, :, corner % 2] += 1.0
        return {"pixel_values": images, "labels": corner}
    tokens = 2 + (torch.randint(50, (16, 1), generator=generator) + torch.arange(20)) % 50
    if not type(model).__name__.endswith("MaskedLM"):
        return {"input_ids": tokens, "labels": tokens}
    hidden = (torch.arange(20) % 4 == 1).expand_as(tokens)
    return {"input_ids": tokens.masked_fill(hidden, 60), "labels": tokens.masked_fill(~hidden, -100)}


def run_trained(family, steps):
    """(first loss, last loss, small and grown model's loss of a new batch, relative change of the logits, problems)"""
    small, first, last = trained_model(family, steps)
    operator = LiGO(small, FAMILIES[family][1](*sizes(family, "lossless")[1]))
    inputs = task(small, steps)
    change = operator.check({name: x for name, x in inputs.items() if name != "labels"})
    grown = operator.grow()
    with torch.no_grad():
        losses = [float(model(**inputs).loss) for model in (small, grown)]
    found = [] if operator.exact else [f"logits change by {change:.1e}"]
    if not math.isclose(*losses, rel_tol=1e-3, abs_tol=1e-5):
        found.append(f"the loss is {losses[1]:.6f}, the small model's {losses[0]:.6f}")
    return first, last, *losses, change, found + problems(small, grown, operator.exact, 8)


def run(family, start, dtype, steps, noise=0.0):
    """(relative change of the logits, whether it counts as none, problems)"""
    name, config, _ = FAMILIES[family]
    small_size, big_size = sizes(family, start)
    small = random_model(name, config(*small_size), dtype)
    if family == "roberta":
        small.config.layer_norm_eps = 1e-12
    operator = LiGO(small, config(*big_size), start=start, noise=noise)
    change, exact = operator.check(), operator.exact
    return change, exact, problems(small, operator.grow(), exact, steps)


def print_trained(steps):
    wrong = []
    print("| | first loss | last loss | new batch, small | new batch, grown | change of logits |\n|---|" + "---|" * 5)
    for family in TRAINED:
        first, last, small, grown, change, found = run_trained(family, steps)
        print(f"| {family} | {first:.3f} | {last:.3f} | {small:.4f} | {grown:.4f} | {change:.0e} |", flush=True)
        wrong += [f"{family}, trained: {words}" for words in found]
    return told(wrong)


def told(wrong):
    print("\n".join(wrong) if wrong else "\nEvery grown model loads, generates, and trains in every element.")
    return 1 if wrong else 0


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=FAMILIES)
    parser.add_argument("--starts", nargs="+", default=list(STARTS), choices=STARTS)
    parser.add_argument("--dtype", default="float64", choices=("float64", "float32"))
    parser.add_argument("--noise", type=float, default=0.0, help="of the starts that copy")
    parser.add_argument("--steps", type=int, default=20, help="of training after growth")
    parser.add_argument("--trained", type=int, metavar="STEPS", help=f"of training {', '.join(TRAINED)} before growth")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)

    if options.trained:
        return print_trained(options.trained)
    wrong = []
    print("| | " + " | ".join(options.starts) + " |\n|---|" + "---|" * len(options.starts))
    for family in options.families:
        cells = []
        for start in options.starts:
            change, exact, found = run(family, start, getattr(torch, options.dtype), options.steps, options.noise)
            cells.append(f"{change:.0e}" if exact else f"({change:.2f})")
            wrong += [f"{family}, {start}: {words}" for words in found]
        print(f"| {family} | " + " | ".join(cells) + " |", flush=True)
    return told(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
