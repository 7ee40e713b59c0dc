"""The table of docs/growth.md, thinned: what is in it holds for every cell, and the program finds what is wrong."""

import importlib.util
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
_spec = importlib.util.spec_from_file_location(
    "growth_table", Path(__file__).parents[2] / "benchmarks" / "growth_table.py"
)
growth_table = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(growth_table)

CELLS = [
    ("gpt2", "stack"), ("gpt2", "lemon"), ("bert", "lossless"), ("vit", "overlap"), ("deit", "zero_blocks"),
    ("llama", "hypercloning"), ("qwen2", "zero_pad"), ("qwen3", "lossless"), ("roberta", "official"),
    ("gemma2", "net2net"), ("bert", "fpi"), ("llama", "aki"), ("qwen2_moe", "staged"),
]  # fmt: skip
LOSSLESS = {"lossless", "lemon", "hypercloning", "zero_blocks", "zero_pad", "net2net", "fpi", "staged"}


@pytest.mark.parametrize(("family", "start"), CELLS)
def test_a_grown_model_loads_generates_and_learns_in_every_element(family, start):
    change, exact, problems = growth_table.run(family, start, torch.float64, steps=8)
    assert exact == (start in LOSSLESS) and problems == []


@pytest.mark.parametrize(
    ("family", "steps"),
    [("gpt2", 40), ("llama", 40), *(pytest.param(f, 300, marks=pytest.mark.slow) for f in growth_table.TRAINED)],
)
def test_a_trained_model_grows_without_loss(family, steps):
    first, last, _, _, change, problems = growth_table.run_trained(family, steps)
    assert last < 0.9 * first and change < 1e-5 and problems == []


def test_what_training_does_not_reach_is_found():
    """Units written and read as zero, and two units that are copies read alike."""
    config = growth_table.gpt2(24, 3, 3, 2, 50)
    model = growth_table.random_model("GPT2LMHeadModel", config, torch.float64)
    with torch.no_grad():
        first, second = (layer.mlp for layer in model.transformer.h)
        first.c_proj.weight[4], first.c_fc.weight[:, 4], first.c_fc.bias[4] = 0.0, 0.0, 0.0
        second.c_proj.weight[5] = second.c_proj.weight[4]
        second.c_fc.weight[:, 5], second.c_fc.bias[5] = second.c_fc.weight[:, 4], second.c_fc.bias[4]
    found = "\n".join(growth_table.untrained(model, 3))
    assert "h.0.mlp.c_fc.weight: 24 of 1200 elements without gradient" in found
    assert "h.1.mlp.c_fc.weight: copies stay equal along axis 1" in found
