"""The demo as its user runs it, on models of a few thousand weights: what it writes, repeats, refuses and keeps."""

import json
import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

demo = pytest.importorskip("growkit.demo", reason="needs growkit[demo]")
from transformers import GPT2LMHeadModel  # noqa: E402


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    for name, value in {
        "CONTEXT": 16,
        "BATCH": 4,
        "VALIDATION_WINDOWS": 8,
        "SMALL": {"n_layer": 1, "n_embd": 16, "n_head": 2},
        "LARGE": {"n_layer": 2, "n_embd": 24, "n_head": 3},
        "SMALL_STEPS": 24,
        "FIT_STEPS": 6,
        "LARGE_STEPS": 12,
        "SWEEP": {
            "AdamW": {"lr": (1e-3, 2e-3), "beta1": (0.8,)},
            "SophiaG": {"lr": (1e-3,), "beta1": (0.7,), "rho": (0.2,)},
        },
        "CONFIRM_SEEDS": 2,
    }.items():
        monkeypatch.setattr(demo, name, value)


@pytest.fixture
def run(tmp_path):
    def call(folder="out", **options):
        defaults = {"data": None, "device": "cpu", "seed": 0, "steps_scale": 1.0, "full": False}
        return demo.run(out=tmp_path / folder, **{**defaults, **options})

    return call


def results(folder):
    return json.loads((folder / "results.json").read_text())


def without_seconds(table):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in table]


def test_demo_writes_table_curves_and_a_checkpoint_that_loads(run, tmp_path, capsys):
    assert run() == 0
    out = capsys.readouterr().out
    small, grown, fitted, trained, scratch = results(tmp_path / "out")["table"]
    assert "pydoc_data.topics" in out and "sha256" in out and "curvature refreshes" in out
    assert "bits/byte" in out and "FLOPs, everything counted" in out
    assert abs(grown["bits_per_byte"] - small["bits_per_byte"]) < 1e-5  # lossless
    assert small["steps"] == 24 and fitted["steps"] == 30 and trained["steps"] == 42
    assert small["flops"] < fitted["flops"] < trained["flops"]
    large_step = demo.step_flops(demo.new_model(demo.LARGE, 0, "cpu"))
    assert trained["flops"] - 2.1 * large_step < scratch["flops"] <= trained["flops"]  # a step and its refresh
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
    loaded, info = GPT2LMHeadModel.from_pretrained(tmp_path / "out" / "grown", output_loading_info=True)
    assert not any(info.values())
    corpus = demo.Corpus(demo.read_text()[1], "cpu")
    assert demo.bits_per_byte(loaded, corpus) == pytest.approx(trained["bits_per_byte"], abs=1e-6)
    assert not list((tmp_path / "out").glob("*.partial"))


def test_same_seed_same_table(run, tmp_path):
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert run(folder, seed=seed) == 0
    a, b, c = (without_seconds(results(tmp_path / folder)["table"]) for folder in "abc")
    assert a == b
    assert a != c


def test_interrupted_demo_keeps_what_had_finished(run, tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo._Job, "train_large", interrupted)
    assert run() == 130
    assert [row["what"] for row in results(tmp_path / "out")["table"]][:2] == ["small model", "grown, lossless start"]
    assert (tmp_path / "out" / "curves.png").exists()
    GPT2LMHeadModel.from_pretrained(tmp_path / "out" / "small")
    assert "interrupted" in capsys.readouterr().out


def test_full_sweeps_both_optimizers_and_confirms_the_best(run, tmp_path):
    assert run(full=True) == 0
    written = results(tmp_path / "out")
    assert [e["optimizer"] for e in written["sweep"]] == ["AdamW", "AdamW", "SophiaG"]
    for optimizer, runs in written["best"].items():
        tried = [e for e in written["sweep"] if e["optimizer"] == optimizer]
        assert [r["seed"] for r in runs] == [0, 1]
        assert runs[0]["bits_per_byte"] == min(e["bits_per_byte"] for e in tried)
    growth, _, adamw, small = written["table"][-4:]
    assert adamw["what"] == "large from scratch, best AdamW, same FLOPs"
    assert small["what"] == "small, never grown, same FLOPs"
    assert 0.5 * growth["flops"] < adamw["flops"] <= growth["flops"] and small["flops"] <= growth["flops"]


def test_data_may_be_a_file_or_a_folder(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.md").write_text("first")
    (tmp_path / "c.bin").write_bytes(b"\x00")
    assert demo.read_text(tmp_path / "b.txt") == (str(tmp_path / "b.txt"), b"second")
    assert demo.read_text(tmp_path)[1] == b"first\nsecond"


def test_too_little_text_is_refused(run, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("short")
    assert run(data=tmp_path / "short.txt") == 2
    assert "5 bytes of text, expected at least 3200" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_validation_text_is_never_trained_on():
    corpus = demo.Corpus(bytes(range(200)) * 40, "cpu")
    assert len(corpus.train) == 7200
    windows = corpus.validation
    assert windows.shape[1] == demo.CONTEXT and windows[0, 0] == 7200 % 200


def test_step_flops_agree_with_a_counter():
    model = demo.new_model({"n_layer": 2, "n_embd": 64, "n_head": 4}, 0, "cpu")
    batch = next(demo.Corpus(demo.read_text()[1], "cpu").batches(0))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(**batch).loss.backward()
    # Not counted by either: norms and activations. The backward of the first layer's input is not there.
    assert demo.step_flops(model) == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("passes", [0.5, 1, 2, 10.9, 11, 12, 23, 118])
def test_steps_for_is_the_most_that_fits(passes):
    model = demo.new_model(demo.LARGE, 0, "cpu")
    cost = demo.step_flops(model)

    def spent(steps):
        return steps + math.ceil(steps / demo.REFRESH_EVERY)

    steps = demo.steps_for(passes * cost, model, refreshed=True)
    assert steps == 1 or spent(steps) <= passes
    assert spent(steps + 1) > passes
    assert demo.steps_for(passes * cost, model, refreshed=False) == max(1, int(passes))


@pytest.mark.parametrize(
    ("grown", "scratch", "words"),
    [(2.0, 2.5, "growing wins"), (2.5, 2.0, "growing loses"), (2.0, 2.005, "growing ties")],
)
def test_verdict_says_who_won(grown, scratch, words):
    points = [{"flops": 1e9, "bits_per_byte": bits} for bits in (grown, scratch)]
    said = demo.verdict(*(demo.Run("x", points=[{**p, "flops": 1e8, "bits_per_byte": 8.0}, p]) for p in points))
    assert words in said


def test_a_checkpoint_that_does_not_load_back_is_an_error_and_replaces_nothing(tmp_path, monkeypatch):
    model = demo.new_model(demo.SMALL, 0, "cpu")
    demo.save(model, tmp_path / "grown")
    before = (tmp_path / "grown" / "model.safetensors").read_bytes()
    other = demo.new_model(demo.SMALL, 1, "cpu")
    monkeypatch.setattr(GPT2LMHeadModel, "from_pretrained", lambda *_, **__: (other, {"missing_keys": set()}))
    with torch.no_grad():
        model.transformer.wte.weight.add_(1)
    with pytest.raises(RuntimeError, match="does not load back: other logits"):
        demo.save(model, tmp_path / "grown")
    assert (tmp_path / "grown" / "model.safetensors").read_bytes() == before
