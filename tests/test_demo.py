"""The demo as its user runs it, on models of a few thousand weights: what it writes, repeats, refuses and keeps."""

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

runs = pytest.importorskip("growkit.demo.runs", reason="needs growkit[demo]")
from transformers import GPT2LMHeadModel  # noqa: E402

from growkit.__main__ import main  # noqa: E402
from growkit.demo import report, story  # noqa: E402
from growkit.demo.settings import SPREAD, Settings, read_text  # noqa: E402

TINY = Settings(
    context=16,
    batch=4,
    small={"n_layer": 1, "n_embd": 16, "n_head": 2},
    middle={"n_layer": 2, "n_embd": 16, "n_head": 2},
    large={"n_layer": 4, "n_embd": 24, "n_head": 3},
    flops=4e8,
    small_steps=24,
    fit_steps=3,
)


TEXT = read_text()[1][:24_000]


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "topics.txt"
    file.write_bytes(TEXT)
    return file


def run(out, **options):
    defaults = {"data": None, "device": "cpu", "seed": 0, "steps_scale": 1.0, "settings": TINY}
    return story.run(out=out, **{**defaults, **options})


@pytest.fixture(scope="module")
def done(tmp_path_factory, text):
    """The whole demo, once: (what it printed, its folder, results.json)."""
    out = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", printed := io.StringIO())
        assert run(out, data=text, sophia=True) == 0
    return printed.getvalue(), out, json.loads((out / "results.json").read_text())


def test_final_has_every_run_and_what_it_cost(done):
    printed, out, results = done
    final = results["final"]
    assert final.keys() == {*report.FINAL, "adamw_scratch", "flops"}
    assert final["adamw_scratch"] == final["scratch"]
    for name in report.FINAL:
        assert f"{final[name]:.4f}" in printed and final["flops"][name] == results["runs"][name]["flops"]
        assert 0.8 * TINY.flops < final["flops"][name] <= TINY.flops  # equal but for the last step
    assert "topics.txt" in printed and "sha256" in printed and "Everything counted" in printed
    assert not list(out.glob("*.partial"))


def test_growth_is_lossless_and_pays_for_everything(done):
    small, grown = (done[2]["runs"][name] for name in ("small", "grown"))
    assert abs(grown["after_start"] - small["bits_per_byte"]) < 1e-5
    assert grown["small_flops"] == small["flops"] and grown["fit_flops"] > 0
    assert grown["points"][: len(small["points"])] == small["points"]
    flops = [point["flops"] for point in grown["points"]]
    assert flops == sorted(flops) and grown["steps"] > small["steps"] + TINY.fit_steps


def test_checkpoints_load_and_have_the_loss_that_was_printed(done):
    _, out, results = done
    loaded, info = GPT2LMHeadModel.from_pretrained(out / "grown", output_loading_info=True)
    assert not any(info.values())
    corpus = runs.Corpus(TEXT, TINY, "cpu")
    assert runs.bits_per_byte(loaded, corpus) == pytest.approx(results["final"]["grown"], abs=1e-6)
    GPT2LMHeadModel.from_pretrained(out / "small")


def test_figure_is_written(done):
    assert (done[1] / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def corpus():
    return runs.Corpus(TEXT, TINY, "cpu")


def test_same_seed_same_run(corpus, tmp_path):
    a, b, c = (runs.scratch(runs.Run(TINY, corpus, seed, "cpu"), tmp_path, None) for seed in (0, 0, 1))
    assert a["bits_per_byte"] == b["bits_per_byte"] != c["bits_per_byte"]


def test_a_small_model_that_goes_on_is_one_run(corpus, tmp_path):
    """small, then never_grown in another process, is the run that does all of it at once."""
    left = runs.small(runs.Run(TINY, corpus, 0, "cpu"), tmp_path, None)["left"]
    parts = runs.never_grown(runs.Run(TINY, corpus, 0, "cpu"), tmp_path, left)
    whole = runs.Run(TINY, corpus, 0, "cpu")
    model = whole.new_model(TINY.small)
    whole.train(model, whole.adamw(model, "small"), "small", whole.steps_left(model))
    assert parts["steps"] == whole.steps and parts["flops"] == whole.flops
    assert parts["bits_per_byte"] == whole.points[-1]["bits_per_byte"]


def test_the_rate_rises_stays_and_falls_to_the_end(corpus):
    this = runs.Run(dataclasses.replace(TINY, warmup=4), corpus, 0, "cpu")
    model = this.new_model(TINY.large)
    optimizer, rates = this.sophia(model), []
    optimizer.register_step_pre_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
    base = optimizer.param_groups[0]["lr"]
    this.train(model, optimizer, "large", 40)
    assert [rate / base for rate in rates[:5]] == pytest.approx([0.25, 0.5, 0.75, 1, 1])
    assert rates[4:25] == [base] * 21 and rates[-1] == pytest.approx(base / 16)
    assert optimizer.param_groups[0]["lr"] == base
    assert this.flops == runs.step_flops(model, TINY.batch) * 44  # with 4 refreshes


def test_ctrl_c_keeps_what_had_finished_and_leaves_no_process(untraced, tmp_path, text):
    """As in a terminal, where Ctrl-C reaches the whole group of processes."""
    words = "-u -m growkit demo --steps-scale 0.03 --out out --data"
    command = [sys.executable, *words.split(), text]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    printed = []
    for line in process.stdout:
        # Once: a line whose writing was interrupted is written again.
        if line.startswith("small:") and line not in printed:
            os.killpg(process.pid, signal.SIGINT)
        printed.append(line)
    printed = "".join(printed)
    assert process.wait(timeout=60) == 130, printed
    assert "had finished, see out" in printed and "Traceback" not in printed
    assert "small" in json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    GPT2LMHeadModel.from_pretrained(tmp_path / "out" / "small")
    with pytest.raises(ProcessLookupError):
        for _ in range(100):  # Python's own helper of multiprocessing ends by itself, a moment later
            os.killpg(process.pid, 0)
            time.sleep(0.1)


def test_interrupted_before_anything_finished(tmp_path, monkeypatch, capsys):
    def trained(*_):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(story, "trained", trained)
    assert run(tmp_path / "out") == 130
    assert "interrupted: nothing had finished" in capsys.readouterr().out
    assert not (tmp_path / "out" / "results.json").exists()


def test_a_run_that_fails_is_an_error_with_its_traceback(tmp_path):
    broken = dataclasses.replace(TINY, large={"n_layer": 4, "n_embd": 15, "n_head": 3})
    with pytest.raises(RuntimeError, match=r"(?s)run \w+ failed:.*Traceback"):
        run(tmp_path / "out", settings=broken)


def test_without_a_terminal_a_line_now_and_then_says_how_long(capsys, monkeypatch):
    teller = story.Teller(story.Console(width=200), {"small": (None, 10), "scratch": (None, 30)})
    now = iter(teller.start + seconds for seconds in (11, 22, 33, 44))
    monkeypatch.setattr(story.time, "monotonic", lambda: next(now))
    for share in (0.2, 0.4, 0.6, 0.8):
        teller.told("small", share, 4.0)
    assert capsys.readouterr().out.splitlines() == [
        "  22 s: small 40% at 4.00 bits/byte; about 198 s left",
        "  44 s: small 80% at 4.00 bits/byte; about 176 s left",
    ]


def test_a_checkpoint_of_ones_own_is_grown_and_trained(done, text, tmp_path, capsys):
    """The demo's own small model, which knows bytes and has no tokenizer."""
    words = ["--pretrained", str(done[1] / "small"), "--data", str(text), "--out", str(tmp_path / "own")]
    assert main(["demo", *words]) == 0
    printed = capsys.readouterr().out
    final = json.loads((tmp_path / "own" / "results.json").read_text())["final"]
    assert final["logit_change"] < 1e-5 and final["grown_start"] == pytest.approx(final["small"], abs=1e-5)
    assert final["grown"] < final["grown_start"] and f"{final['grown']:.4f}" in printed
    for name in ("grown", "trained"):
        _, info = GPT2LMHeadModel.from_pretrained(tmp_path / "own" / name, output_loading_info=True)
        assert not any(info.values())


@pytest.mark.parametrize(
    ("folder", "data", "words"),
    [
        ("empty", "topics.txt", "has no config.json"),
        ("small", "short.txt", "tokens, expected at least"),
        ("small", "binary.bin", "is no text: byte 128"),
    ],
)
def test_a_checkpoint_or_text_that_cannot_be_used_is_refused(done, text, tmp_path, capsys, folder, data, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "small").symlink_to(done[1] / "small")
    (tmp_path / "topics.txt").write_bytes(TEXT)
    (tmp_path / "short.txt").write_bytes(TEXT[:100])
    (tmp_path / "binary.bin").write_bytes(bytes(range(256)) * 20)
    names = {"--pretrained": folder, "--data": data, "--out": "out"}
    assert main(["demo", *(word for flag, name in names.items() for word in (flag, str(tmp_path / name)))]) == 2
    assert words in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "out" / "grown").exists()


def test_too_little_text_is_refused(tmp_path, capsys):
    (tmp_path / "short.txt").write_text("short")
    assert run(tmp_path / "out", data=tmp_path / "short.txt") == 2
    assert "5 bytes of text, expected at least 3200" in " ".join(capsys.readouterr().out.split())
    (tmp_path / "short.txt").rename(tmp_path / "short.bin")
    assert run(tmp_path / "out", data=tmp_path) == 2
    assert "expected files with the suffix .txt, .md" in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "out").exists()


def test_no_text_is_a_warning(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(story, "trained", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    (tmp_path / "x.bin").write_bytes(bytes(range(256)) * 20)
    assert run(tmp_path / "out", data=tmp_path / "x.bin") == 130
    assert "may be no text: byte 128 is no UTF-8" in " ".join(capsys.readouterr().out.split())


def test_validation_text_is_never_trained_on():
    corpus = runs.Corpus(bytes(range(200)) * 40, TINY, "cpu")
    assert len(corpus.train) == 7200
    assert corpus.validation.shape == (800 // 16, 16)  # all of it
    assert corpus.validation[0, 0] == 7200 % 200


def test_step_flops_agree_with_a_counter(corpus):
    model = runs.Run(TINY, corpus, 0, "cpu").new_model({"n_layer": 2, "n_embd": 64, "n_head": 4})
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(**corpus.batch(0, 0)).loss.backward()
    # Not counted by either: norms and activations. The backward of the first layer's input is not there.
    assert runs.step_flops(model, TINY.batch) == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("passes", [0.5, 1, 2, 10.9, 11, 12, 23, 118])
def test_steps_for_is_the_most_that_fits(passes):
    def spent(steps):
        return steps + -(-steps // 10)

    steps = runs.steps_for(passes, 1, every=10)
    assert steps == 1 or spent(steps) <= passes
    assert spent(steps + 1) > passes
    assert runs.steps_for(passes, 1) == max(1, int(passes))


def outcome(**bits):
    bits = {"small": 2.5, "grown": 2.0, "scratch": 2.2, "never_grown": 2.2, "middle": 1.9, **bits}
    bits = {"sophia_grown": 2.0, "sophia_scratch": 2.3, **bits}
    runs = {name: {"bits_per_byte": value, "flops": 1e9} for name, value in bits.items()}
    runs["grown"] |= {"small_flops": 2e8, "fit_flops": 1e7, "after_start": 2.5, "after_fit": 2.46}
    return " ".join(report.verdict(runs))


@pytest.mark.parametrize(
    ("bits", "words"),
    [
        ({}, "growing pays. It reaches 2.000: 0.200 better than large from scratch and 0.200 better than small, never"),
        ({}, "2.000 cost 8.0e+08 FLOPs: 80% of what the large model from scratch was allowed"),
        ({}, "cost 1.0e+07 FLOPs (1%) and gave 0.040"),
        ({}, "middle size trained directly for the same FLOPs reaches 1.900, 0.100 better than growing"),
        ({}, "is 0.100 worse than AdamW from scratch (2.300) and level with AdamW (apart by 0.000"),
        ({"scratch": 1.8}, "growing does not pay. It reaches 2.000: 0.200 worse than large from scratch"),
        ({"never_grown": 1.8}, "does not pay. It reaches 2.000: 0.200 better than large from scratch and 0.200 worse"),
        ({"never_grown": 2.0 + SPREAD / 2}, "does not pay"),
        ({"middle": 2.3}, "reaches 2.300, 0.300 worse than growing"),
        ({"sophia_grown": 1.8}, "0.200 better than AdamW on the grown model (1.800)"),
    ],
)
def test_verdict_is_what_came_out(bits, words):
    assert words in outcome(**bits)


def test_without_sophia_the_verdict_says_whose_runs_these_are():
    runs = {name: {"bits_per_byte": 2.0, "flops": 1e9} for name in ("small", *report.FINAL[:4])}
    runs["grown"] |= {"small_flops": 2e8, "fit_flops": 1e7, "after_start": 2.5, "after_fit": 2.46}
    assert list(report.verdict(runs))[-1].startswith("The optimizer of these runs is AdamW")
    assert list(report.verdict(runs, as_measured=False))[-1].startswith("Seeds differ by up to")


def test_labels_stand_apart():
    assert report._apart([1.0, 1.01, 1.02, 2.0], 0.1) == pytest.approx([1.0, 1.1, 1.2, 2.0])


def test_a_checkpoint_that_does_not_load_back_is_an_error_and_replaces_nothing(corpus, tmp_path, monkeypatch):
    model, other = (runs.Run(TINY, corpus, seed, "cpu").new_model(TINY.small) for seed in (0, 1))
    runs.save(model, tmp_path / "grown")
    before = (tmp_path / "grown" / "model.safetensors").read_bytes()
    monkeypatch.setattr(GPT2LMHeadModel, "from_pretrained", lambda *_, **__: (other, {"missing_keys": set()}))
    with torch.no_grad():
        model.transformer.wte.weight.add_(1)
    with pytest.raises(RuntimeError, match="does not load back: other logits"):
        runs.save(model, tmp_path / "grown")
    assert (tmp_path / "grown" / "model.safetensors").read_bytes() == before
