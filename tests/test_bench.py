"""The benchmarks run, check what they time, and report ratios the right way up."""

import pytest
import torch

from growkit import ops
from growkit.bench import __main__, sophia
from growkit.bench.measure import paired


def test_gpt2_shapes_are_those_of_the_model():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_embd=24, n_head=2, vocab_size=31, n_positions=9)
    model = transformers.GPT2LMHeadModel(config)
    assert sophia.gpt2_shapes(2, 24, 31, 9) == [tuple(p.shape) for p in model.parameters()]
    assert len(sophia.gpt2_shapes()) == 148


def test_paired_is_the_ratio_of_first_to_second():
    x = torch.randn(300, 300)
    result = paired(lambda: [x @ x for _ in range(60)], lambda: [x @ x for _ in range(3)])
    assert result["ratio"] > 4 and result["a"] > result["b"] > 0 and result["noise"] >= 0


def test_cpu_step_refuses_to_time_another_result(monkeypatch):
    shapes = sophia.gpt2_shapes(1, 8, 16, 4)
    assert sophia.cpu_step(shapes, rounds=2)["ratio"] > 0
    step = ops.sophia_step_
    monkeypatch.setattr(ops, "sophia_step_", lambda *lists, lr, **options: step(*lists, lr=lr * 1.001, **options))
    with pytest.raises(AssertionError, match="differ in p"):
        sophia.cpu_step(shapes, rounds=2)


def test_bench_prints_ratio_and_noise(monkeypatch, capsys):
    monkeypatch.setattr(sophia, "gpt2_shapes", lambda: [(9, 4), (4,)])
    __main__.main()
    assert "ratio" in (out := capsys.readouterr().out) and "noise" in out and "same bits" in out
