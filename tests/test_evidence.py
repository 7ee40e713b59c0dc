"""The commands of docs/results, small: runs and their store, every study, the report; and what the pages show."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import growkit

ROOT = Path(__file__).parents[1]
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.fixture
def short_text(monkeypatch):
    from benchmarks.evidence import runs

    monkeypatch.setattr(runs, "MARKED", 4)
    monkeypatch.setattr(runs, "VALIDATED", 8)
    monkeypatch.setattr(runs, "text", lambda: bytes(range(97, 123)) * 1000)
    runs.corpus.cache_clear()
    yield
    runs.corpus.cache_clear()


def small_problem(seed=0):
    torch.manual_seed(seed)
    p = torch.nn.Parameter(torch.randn(6, 4))
    return p, [torch.randn(6, 4) for _ in range(4)]


def steps(optimizer, p, gradients):
    for g in gradients:
        p.grad = g.clone()
        optimizer.step()
    return p.detach()


def test_lion_is_its_equation_and_with_equal_betas_sophia_without_curvature():
    from benchmarks.evidence.optimizers import Lion

    p, gradients = small_problem()
    expected, m = p.detach().double(), torch.zeros(6, 4).double()
    for g in gradients:
        expected = expected * (1 - 1e-2 * 0.1) - 1e-2 * (0.9 * m + 0.1 * g.double()).sign()
        m = 0.8 * m + 0.2 * g.double()
    torch.testing.assert_close(steps(Lion([p], 1e-2, (0.9, 0.8), 0.1), p, gradients).double(), expected)
    (p, _), (q, _) = small_problem(), small_problem()
    sign = steps(Lion([p], 1e-2, (0.8, 0.8), 0.1), p, gradients)
    sophia = steps(growkit.SophiaG([q], lr=1e-2, betas=(0.8, 0.99), rho=0.0, weight_decay=0.1), q, gradients)
    torch.testing.assert_close(sign, sophia)


def test_nesterov_is_the_option_and_without_curvature_lion():
    from benchmarks.evidence.optimizers import Lion, make

    for name, flag in (("nesterov", True), ("sophiag", False)):
        optimizer = make(torch.nn.Linear(4, 4), name, lr=1e-2, beta1=0.9, rho=0.05, seed=0)
        assert type(optimizer) is growkit.SophiaG
        assert [group["nesterov"] for group in optimizer.param_groups] == [flag, flag]
    (p, gradients), (q, _) = small_problem(), small_problem()
    lion = steps(Lion([p], 1e-2, (0.81, 0.9), 0.1), p, gradients)
    options = {"betas": (0.9, 0.99), "rho": 0.0, "weight_decay": 0.1, "nesterov": True}
    torch.testing.assert_close(steps(growkit.SophiaG([q], lr=1e-2, **options), q, gradients), lion)


def test_a_corrected_h_is_divided_by_its_weight():
    from benchmarks.evidence.optimizers import CorrectedSophiaG

    p, gradients = small_problem()
    optimizer = CorrectedSophiaG([p], lr=1e-2, rho=0.5)
    steps(optimizer, p, gradients[:1])
    optimizer.update_hessian()
    optimizer.update_hessian()
    steps(optimizer, p, gradients[1:2])
    assert optimizer.param_groups[0]["rho"] == pytest.approx(0.5 / (1 - 0.99**2))


def answers(study, known, scale=1.0):
    """The configs that a study asks for, were known(config) the answer."""
    from benchmarks.evidence import __main__ as command
    from benchmarks.evidence.store import key

    asked = {}

    def ask(config):
        asked[key(config)] = config
        return known(config)

    command.STUDIES[study](ask, scale)
    return list(asked.values())


def by_rate(config):
    """A loss that is least at one learning rate, so that every search ends, and less after more steps."""
    stage = config["stages"][-1]
    return abs(stage["lr"] - 1e-3) + 0.01 * config["seed"] + 2.0 + 600 / stage.get("steps", 600)


def test_every_optimizer_has_as_many_trials_and_its_best_runs_on_three_seeds():
    configs = answers("optimizers", by_rate)
    trials = Counter((config["stages"][-1]["optimizer"], config["seed"] == 0) for config in configs)
    assert set(trials.values()) == {6, 2}


def test_a_search_goes_on_at_the_better_end():
    from benchmarks.evidence import search, sophia

    found = search.search(lambda config: config["stages"][-1]["lr"], sophia.optimizer_config("adamw"))
    assert found.config["stages"][-1]["lr"] == pytest.approx(4e-3 / 4)
    assert search.search(lambda config: None, sophia.optimizer_config("adamw")) is None


STUDIES = """
optimizers horizons details size million growth best_size starts more_starts restarts both when rule million_growth vit
thirty thirty_growth
""".split()


@pytest.mark.parametrize("study", STUDIES)
def test_each_kind_of_run_of_each_study(study, tmp_path, short_text, monkeypatch):
    """At a thousandth of its size: it trains, counts what it spends, and is there for the next that asks."""
    from benchmarks.evidence import __main__ as command
    from benchmarks.evidence import gpu
    from benchmarks.evidence.store import Store

    assert set(STUDIES) == set(command.STUDIES)
    for name, value in {"DEVICE": "cpu", "SMALL": "1x64", "BETWEEN": "1x128", "LARGE": "2x128", "TOTAL": 2e13}.items():
        monkeypatch.setattr(gpu, name, value)
    kinds = {}
    for config in answers(study, by_rate, 1e-3):
        stage = config["stages"][-1]
        kind = tuple(stage.get(name) for name in ("optimizer", "start", "fit", "carry", "arm", "cosine"))
        kind += (config.get("device"),)
        kind += ("fall" in config["stages"][0], bool(config["stages"][0]["decay"]))
        kinds[kind] = config
    store = Store(tmp_path)
    done_before = DONE.copy()
    for kind, config in kinds.items():
        if kind in done_before:  # by another study
            continue
        DONE.add(kind)
        record = command.run(config, store)
        assert 0 < record["bits"] < 12 and record["steps"] >= 1
        assert store.get(config) == record == json.loads(json.dumps(record))
        if config["task"] == "lm" and "flops" in config["stages"][-1] and record["steps"] > 8:
            assert record["flops"] <= 1.1 * config["stages"][-1]["flops"]


DONE = set()


def filled_store(folder):
    """Records of every study, with losses that nothing was trained for."""
    from benchmarks.evidence import __main__ as command
    from benchmarks.evidence import growth
    from benchmarks.evidence.store import Store

    store = Store(folder)
    for study in command.STUDIES:
        for config in answers(study, by_rate):
            point = [3e11, 10, by_rate(config), 0.2]
            facts = {"parameters": 1000, "small_flops": 1e10, "small_bits": 3.0, "start_bits": 3.0, "error": 9.0}
            facts |= {"small_steps": 500, "falls": [[steps, 0.1] for steps in growth.GROWN_AT]}
            record = {"config": config, "bits": by_rate(config), "flops": 3e11, "steps": 10, "points": [point]}
            store.put(record | facts)


def test_a_packed_study_is_read_back_and_reported(tmp_path):
    """Every table and figure, of packed files alone."""
    from benchmarks.evidence import __main__ as command
    from benchmarks.evidence import report

    folder = tmp_path / "data"
    filled_store(folder)
    command.main([*command.STUDIES, "--pack", "--out", str(folder)])
    shutil.rmtree(folder / "runs")
    for study in command.STUDIES:
        assert all(record is not None for _, record in command.wanted(study, report.Results(folder).store))
    page = "".join(f"<!-- table {name} -->\nold\n<!-- end -->\n" for name in report.TABLES)
    (tmp_path / "page.md").write_text(page)
    report.main(["--out", str(tmp_path)])
    text = (tmp_path / "page.md").read_text()
    assert "\nold\n" not in text and "3.010 (3.000 to 3.020)" in text
    tables = text.split("<!-- end -->")[:-1]
    assert len(tables) == len(report.TABLES)
    for table in tables:
        head, *rows = [line for line in table.splitlines() if line.startswith("|")]
        assert len(rows) > 2 and {row.count("|") for row in rows} == {head.count("|")}
    assert {file.stem for file in tmp_path.glob("*.png")} == set(report.FIGURES)


def test_where_nothing_was_run_the_tables_say_so(tmp_path):
    from benchmarks.evidence import report
    from benchmarks.evidence.results import NONE

    results = report.Results(tmp_path)
    for name in ("optimizers", "million", "growth", "starts", "restarts", "both", "rule", "million_growth", "vit"):
        assert NONE in "".join(report.TABLES[name](results))


def test_a_stage_ends_where_its_training_loss_falls_less():
    from benchmarks.evidence import runs

    assert runs.fall([8.0, 4.0, 3.0, 1.0]) == pytest.approx(1 - 2.0 / 4.0)
    losses = [n**-0.1 for n in range(1, 4001)]  # a power law falls by the same share at any point
    assert runs.fall(losses) == pytest.approx(1 - 2**-0.1, abs=1e-3)
    assert runs.fall(losses[:1000]) == pytest.approx(1 - 2**-0.1, abs=1e-3)


@pytest.mark.parametrize("learns", [False, True])
def test_the_rule_as_docs_growing_md_has_it(learns):
    """A loop that looks after 8 steps grows a model that learns nothing, and leaves one that learns."""
    from transformers import GPT2Config, GPT2LMHeadModel

    page = (ROOT / "docs/growing.md").read_text()
    loop = page[page.index("from growkit.growth import Schedule") :].partition("```")[0].replace("% 500", "% 8")
    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64, n_positions=8, bos_token_id=0, eos_token_id=0)
    model, tokens = GPT2LMHeadModel(config), torch.randint(64, (4, 8))
    names = {"model": model, "new_optimizer": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2 if learns else 0.0)}
    names |= {"batches": [{"input_ids": tokens, "labels": tokens}] * 10, "optimizer": names["new_optimizer"](model)}
    exec(loop, names)
    assert names["growths"] == (not learns) and names["model"].config.n_layer == (1 if learns else 4)


def test_a_cosine_goes_from_the_end_of_warm_up_to_its_share_of_the_rate(short_text):
    from benchmarks.evidence import runs, search

    rates = []
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    stage = {"size": "1x16", "lr": 2.0**-10, "beta2": 0.99, "steps": 44, "warmup": 4}
    for last in ({}, {"cosine": 0.0}, {"cosine": 0.1}):
        runs.lm(search.config(stage | last, batch=1))
    hook.remove()
    line, to_0, to_a_tenth = (torch.tensor(rates[i : i + 44]) * 2**10 for i in (0, 44, 88))
    assert line[4:27].tolist() == [1.0] * 23 and line[-1] == pytest.approx(1 / (0.4 * 44))
    assert to_0[:5].tolist() == to_a_tenth[:5].tolist() == line[:5].tolist() == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert to_0[4 + 10].item() == pytest.approx((1 + 2**-0.5) / 2) and to_0[4 + 20].item() == pytest.approx(0.5)
    assert 0 < to_0[-1] < 0.002 and (to_0.diff()[4:] < 0).all()
    torch.testing.assert_close(to_a_tenth[4:], 0.1 + 0.9 * to_0[4:])


def test_two_processes_do_not_run_the_same(tmp_path):
    from benchmarks.evidence import sophia
    from benchmarks.evidence.store import Store

    config = sophia.optimizer_config("adamw")
    with Store(tmp_path).claim(config) as first, Store(tmp_path).claim(config) as second:
        assert first and not second
    with Store(tmp_path).claim(config) as again:
        assert again
    Store(tmp_path).put({"config": config, "bits": 1.0})
    with Store(tmp_path).claim(config) as done:
        assert not done


def test_a_run_that_diverged_loses(tmp_path):
    from benchmarks.evidence import report, sophia

    results, config = report.Results(tmp_path), sophia.optimizer_config("adamw")
    results.store.put({"config": config, "bits": None})
    assert results.ask(config) == float("inf")


def test_the_pages_show_what_the_records_say():
    from benchmarks.evidence import report

    results = report.Results(ROOT / "docs/results/data")
    for page in (ROOT / "docs/results").glob("*.md"):
        assert report.filled(page.read_text(), results) == page.read_text(), f"{page.name}: run the report again"


def test_sweep_runs_the_example(tmp_path):
    words = "--tiny --steps 3 --trials 1 --batch 2 --arms AdamW SophiaG".split()
    command = [sys.executable, "-m", "benchmarks.evidence.sweep", tmp_path / "out.jsonl", *words]
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    first, *runs = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert first["bytes"] == 2**17 and {run["arm"] for run in runs} == {"AdamW", "SophiaG"}
    assert all([point[0] for point in run["points"]] == [1, 2, 3] and "error" not in run for run in runs)
