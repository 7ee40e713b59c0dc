"""What the examples beside this file train: a byte-level Llama of 11,000 parameters on help texts every Python has."""

import pydoc_data.topics

import torch
import transformers

CONTEXT, BATCH = 32, 4


def new_model():
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**shape, vocab_size=256, max_position_embeddings=CONTEXT, use_cache=False)
    return transformers.LlamaForCausalLM(config)


def windows(count):
    """`count` consecutive windows of the text, [{"input_ids", "labels"}, ...], each CONTEXT bytes."""
    topics = pydoc_data.topics.topics
    text = "\n".join(topics[name] for name in sorted(topics)).encode()[: count * CONTEXT]
    return [{"input_ids": row, "labels": row} for row in torch.tensor(list(text)).view(count, CONTEXT)]


def batches(steps):
    """`steps` batches of BATCH windows in order, as a DataLoader makes them of windows(steps * BATCH)."""
    return torch.utils.data.DataLoader(windows(steps * BATCH), batch_size=BATCH)


def loss_of(model, count=64):
    """Mean loss of the first `count` windows, as a number."""
    rows = batches(count // BATCH)
    with torch.no_grad():
        return float(sum(model(**{k: t.to(model.device) for k, t in each.items()}).loss for each in rows) / len(rows))
