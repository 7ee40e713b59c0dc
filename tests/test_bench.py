"""The benchmarks measure what they say, check what they time, and fail when they should."""

import ast
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from growkit import ops, reference
from growkit.__main__ import main
from growkit.bench import instructions, kron, measure, saved, sophia, table
from growkit.kernels import cpu
from growkit.kron import expand, plan

ROOT = Path(__file__).parents[1]


# --- timing ----------------------------------------------------------------------------------------------------------


def test_ratio_is_of_the_first_to_the_second():
    x = torch.randn(300, 300)
    calls = {"many": lambda: [x @ x for _ in range(60)], "few": lambda: [x @ x for _ in range(3)]}
    pairs = measure.paired(calls, "cpu", rounds=5)
    found = pairs.ratio("many", "few")
    assert found.value > 4 and found.noise >= 0
    assert found.detail["p10"] <= found.value <= found.detail["p90"]
    assert pairs.seconds("many").value > pairs.seconds("few").value > 0


def test_every_contender_has_every_place_of_the_order():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    rounds = []
    measure.paired(calls, "cpu", rounds=4, before=rounds.append, sample=0)
    assert rounds == [0, 1, 2, 3]
    timed = order[9:]  # each three times before: to warm up, and to see what it takes
    assert [timed[i : i + 4] for i in range(0, 16, 4)] == [list("abca"), list("bcaa"), list("caab"), list("aabc")]


def test_what_cannot_run_is_reported_in_its_own_words():
    def broken():
        raise RuntimeError("no such kernel\nmore")

    pairs = measure.paired(
        {"works": lambda: None, "broken": measure.attempt(lambda: broken)}, "cpu", rounds=2, sample=0
    )
    assert pairs.ratio("works", "broken") == "broken: RuntimeError: no such kernel"


def test_clock_is_named():
    with pytest.raises(ValueError, match="'sun', expected one of gpu, wall, host, cpu"):
        measure.seconds(lambda: None, "sun")


def test_cpu_clock_leaves_sleep_out():
    assert measure.seconds(lambda: time.sleep(0.05), "cpu") < 0.02 < measure.seconds(lambda: time.sleep(0.05), "wall")


def test_hardware_names_no_machine():
    described = measure.hardware()
    assert described["torch"] == torch.__version__ and os.uname().nodename not in json.dumps(described)
    assert measure.slug() == measure.slug().lower().strip("-")


# --- Sophia's workloads ----------------------------------------------------------------------------------------------


def test_gpt2_shapes_are_those_of_the_model():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_embd=24, n_head=2, vocab_size=31, n_positions=9)
    model = transformers.GPT2LMHeadModel(config)
    assert sophia.gpt2_shapes(2, 24, 31, 9) == [tuple(p.shape) for p in model.parameters()]


@pytest.mark.parametrize(
    ("model", "tensors", "millions"),
    [("gpt2-small", 148, 124.4), ("gpt2-medium", 292, 354.8), ("gpt2-xl", 580, 1557.6), ("nanogpt", 75, 124.4)],
)
def test_lists_have_the_size_of_their_models(model, tensors, millions):
    shapes = sophia.MODELS[model][0]()
    assert len(shapes) == tensors
    assert sum(torch.Size(shape).numel() for shape in shapes) / 1e6 == pytest.approx(millions, abs=0.05)


def test_lists_are_renewed_in_place_and_aligned():
    lists = sophia.Lists("gpt2-small", "cpu", tiny=True)
    assert all(t.data_ptr() % 64 == 0 for t in lists.p)
    ragged = sophia.Lists("ragged", "cpu", tiny=True)
    assert any(t.data_ptr() % 16 for t in ragged.p)
    former = lists.g[0].clone()
    lists.renew("g")
    assert not torch.equal(lists.g[0], former) and (lists.flat["h"] >= 0).all()


CONTENDERS = {
    "official": lambda *lists: [sophia.official_step(*t, **sophia.SCALARS) for t in zip(*lists, strict=True)],
    "foreach": lambda *lists: sophia.foreach_step(*lists, **sophia.SCALARS),
    "foreach, tensor lr": lambda *lists: sophia.foreach_step(*lists, **sophia.SCALARS | {"lr": torch.tensor(6e-4)}),
    "growkit": lambda *lists: ops.sophia_step_(*lists, eps=1e-15, **sophia.SCALARS),
}


@pytest.mark.parametrize("model", ["gpt2-small", "ragged"])
@pytest.mark.parametrize("name", CONTENDERS)
def test_contenders_compute_the_update(name, model):
    lists = sophia.Lists(model, "cpu", tiny=True)
    sophia.check_update(lists, lambda: CONTENDERS[name](*lists.lists))


@pytest.mark.parametrize("flat", [False, True])
def test_triton_baselines_compute_the_update(flat):
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
        pytest.skip("Triton needs a GPU, or TRITON_INTERPRET=1")
    from growkit.bench.triton_step import per_tensor_step_

    lists = sophia.Lists("ragged", "cuda" if torch.cuda.is_available() else "cpu", tiny=True)
    tensors = [[lists.flat[name]] for name in "pgmh"] if flat else lists.lists
    sophia.check_update(lists, lambda: per_tensor_step_(*tensors, **sophia.SCALARS))


def wrong_lr(*lists):
    ops.sophia_step_(*lists, eps=1e-15, **sophia.SCALARS | {"lr": 6.01e-4})


def lost_tail(*lists):
    ops.sophia_step_(*(tensors[:-1] for tensors in lists), eps=1e-15, **sophia.SCALARS)


def spoilt_m(p, g, m, h):
    ops.sophia_step_(p, g, m, h, eps=1e-15, **sophia.SCALARS)
    m[1].view(-1)[-1] = torch.nan


@pytest.mark.parametrize("wrong", [wrong_lr, lost_tail, spoilt_m])
def test_check_finds_a_wrong_update(wrong):
    lists = sophia.Lists("gpt2-small", "cpu", tiny=True)
    with pytest.raises(AssertionError, match=r"[pm]\[\d+\]"):
        sophia.check_update(lists, lambda: wrong(*lists.lists))


@pytest.mark.parametrize(("workload", "where"), [(sophia.cpu_step, reference), (sophia.cpu_step_compiled, ops)])
def test_cpu_step_refuses_to_time_other_bits(workload, where, monkeypatch):
    case = workload(tiny=True)
    case.check()
    step = where.sophia_step_
    wrong = lambda *lists, lr, **options: step(*lists, lr=lr * (1 + 1e-6), **options)  # noqa: E731
    monkeypatch.setattr(where, "sophia_step_", wrong)
    with pytest.raises(AssertionError, match=r"differ in p\["):
        case.check()


def test_compiled_step_is_measured_where_it_is_built():
    rows = sophia.cpu_step_compiled(tiny=True).rows(1)
    assert len(rows) == 3 and all(id.startswith("C1.compiled.") for id in rows)
    for value in rows.values():
        assert value.value > 0 if cpu._C else value == "growkit._C is not built here"


# --- counts: these gate, for they do not depend on the machine's mood ------------------------------------------------


def test_bytes_of_an_update_and_of_the_state():
    lists = sophia.Lists("gpt2-small", "cpu", tiny=True)
    case = sophia.update("gpt2-small", "cpu", tiny=True)
    assert case.bytes == 24 * lists.elements
    assert sophia.refresh_gnb("gpt2-small", "cpu", tiny=True).bytes == 12 * lists.elements
    assert sophia.update_mixed("bfloat16", "gpt2-xl", "cpu", tiny=True).bytes / 18 == pytest.approx(
        sophia.update_mixed("bfloat16-master", "gpt2-xl", "cpu", tiny=True).bytes / 24
    )


def test_operators_of_an_update(monkeypatch):
    """The official step starts 10 kernels a tensor, a foreach step 9 in all, growkit's one call of its op."""
    lists = sophia.Lists("gpt2-small", "cpu", tiny=True)
    count = len(lists.p)
    assert measure.launches(lambda: CONTENDERS["official"](*lists.lists)) == 10 * count
    assert measure.launches(lambda: CONTENDERS["foreach"](*lists.lists)) == 9
    calls = []
    optimizer = sophia.with_state(lists.parameters())
    monkeypatch.setattr(ops, "sophia_step_", lambda p, *lists, **scalars: calls.append(len(p)))
    optimizer.step()
    assert calls == [count]


# Least counted FLOPs of the blocks: dense maps, [I; C]; and the official mix-first order with dense maps.
FLOPS = {
    "bert-base": (131e9, 45e9, 290e9),
    "gpt2-medium": (761e9, 196e9, 1628e9),
    "gpt2-xl": (4.48e12, 1.66e12, 9934e9),
    "llama-7b": (38.3e12, 19.1e12, 65.9e12),
}


@pytest.mark.parametrize("pair", kron.PAIRS)
def test_flops_of_an_expansion(pair):
    dense, top = (kron.Problem(pair, kind, "meta") for kind in ("dense", "top"))
    size = dense.size
    mix_first = sum(plan.cost("DAB", size.L1, size.L2, *dense.axes[name]).flops for name in dense.modules)
    assert (dense.flops, top.flops, mix_first) == pytest.approx(FLOPS[pair], rel=0.012)


@pytest.mark.parametrize("kind", kron.KINDS)
def test_counted_flops_are_executed(kind):
    from torch.utils.flop_counter import FlopCounterMode

    problem = kron.Problem("gpt2-medium", kind, "cpu", tiny=True)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for name, order in problem.orders.items():  # what the op runs, for the op itself is opaque to the counter
            expand.forward(*problem.arguments(name), problem.kind, problem.kind, order, False, None)
    assert counter.get_total_flops() == problem.flops


# --- LiGO's workloads ------------------------------------------------------------------------------------------------

EXPANSIONS = (
    kron.growkit_expand,
    kron.literal_loop,
    kron.official_style,
    kron.einsum,
    kron.best_order_bmm,
    kron.per_layer,
)


@pytest.mark.parametrize("expand", EXPANSIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", kron.KINDS)
@pytest.mark.parametrize("pair", ["gpt2-medium", "llama-7b"])
def test_baselines_expand_alike(pair, kind, expand):
    kron.check_expansion(kron.Problem(pair, kind, "cpu", tiny=True), "highest", expand)


@pytest.mark.parametrize("kind", kron.KINDS)
def test_baselines_have_the_same_gradients(kind):
    problem = kron.Problem("gpt2-medium", kind, "cpu", tiny=True, dtype=torch.float64)
    for t in problem.operators:
        t.requires_grad_()
    found = []
    for way in (kron.growkit_expand, kron.official_style, kron.best_order_bmm, kron.per_layer):
        large = way(problem)
        total = sum((layer * layer).sum() for layers in large.values() for layer in layers)
        found.append(torch.autograd.grad(total, problem.operators))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


@pytest.mark.parametrize("wrong", ["unwritten", "other layers"])
def test_check_finds_a_wrong_expansion(wrong):
    problem = kron.Problem("gpt2-medium", "top", "cpu", tiny=True)

    def expand(problem):
        large = kron.growkit_expand(problem)
        large["proj"] = torch.empty_like(large["proj"]) if wrong == "unwritten" else large["proj"].roll(1, 0)
        return large

    with pytest.raises(AssertionError, match="expand is off by"):
        kron.check_expansion(problem, "highest", expand)


# --- the table -------------------------------------------------------------------------------------------------------


def test_every_goal_has_a_workload_and_is_asked_for_by_its_name():
    assert set(table.MEASURED_BY.values()) - {None} <= set(table.WORKLOADS)
    assert table.select(["S4"]) == ["S4.gpt2-small", "S4.nanogpt", "S4.gpt2-xl"]
    assert {id.partition(".")[0] for id in table.select(["S"])} == {f"S{i}" for i in range(1, 12)}
    assert {id.partition(".")[0] for id in table.select(["L"])} == {f"L{i}" for i in range(1, 8)}
    assert table.select([]) == list(table.GOALS)
    with pytest.raises(ValueError, match="'S99', expected the id of a goal"):
        table.select(["S99"])


def row(value, relation=">=", bound=2.0, **options):
    return table.Row(table.Goal("C1.official", "what", relation, bound), value, **options)


def test_verdicts():
    assert row(measure.Value(2.0)).verdict == "met" and row(measure.Value(1.99)).verdict == "missed"
    assert row(measure.Value(2.0), "<=").verdict == "met" and row(measure.Value(2.01), "<=").verdict == "missed"
    assert row("no GPU").verdict == "not measured" and row("broke", failed=True).verdict == "FAILED"
    assert row(measure.Value(float("nan"))).verdict == "missed"
    assert row(measure.Value(5.0), "").verdict == "-"
    assert row(measure.Value(1.99, 0.02)).verdict == "missed by less than noise"
    assert row(measure.Value(1.99, 0.001)).verdict == row(measure.Value(1.99, 0.9)).verdict == "missed"
    assert row(measure.Value(2.01, 0.02), "<=").verdict == "missed by less than noise"


def test_table_shows_goal_measured_and_noise():
    text = table.render([row(measure.Value(5.301, 0.0234))])
    assert [cell.strip() for cell in text.splitlines()[2].strip("|").split("|")] == [
        "C1.official",
        "what",
        ">= 2 x",
        "5.30 x",
        "2.3 %",
        "met",
    ]
    assert "not measured: no GPU: C1.official" in table.render([row("no GPU")])


def test_a_workload_that_fails_its_check_shows_no_figure(monkeypatch, capsys, tmp_path):
    def wrong():
        raise AssertionError("off by 3")

    broken = measure.Case(lambda: None, wrong, lambda rounds: {"C1.official": measure.Value(9.0)})
    monkeypatch.setitem(table.WORKLOADS, "cpu-step", table.Workload("cpu-step", "cpu", lambda **options: broken))
    path = tmp_path / "out.json"
    assert main(["bench", "C1.official", "--device", "cpu", "--json", str(path)]) == 1
    rows = {row["id"]: row for row in json.loads(path.read_text())["rows"]}
    assert rows["C1.official"]["reason"] == "AssertionError: off by 3" and "value" not in rows["C1.official"]
    assert "FAILED" in capsys.readouterr().out


def test_bench_writes_whole_files_only(monkeypatch, tmp_path, capsys):
    tiny = table.Workload("cpu-step", "cpu", lambda device, tiny: sophia.cpu_step(tiny=True))
    monkeypatch.setitem(table.WORKLOADS, "cpu-step", tiny)
    path = tmp_path / "out.json"
    assert main(["bench", "C1.official", "S9.8bit", "--device", "cpu", "--json", str(path)]) == 0
    assert [file.name for file in tmp_path.iterdir()] == ["out.json"]
    saved = json.loads(path.read_text())
    assert saved["hardware"]["torch"] == torch.__version__
    found = {row["id"]: row for row in saved["rows"]}
    assert found["C1.official"]["value"] > 0 and found["C1.official"]["detail"]["seconds"].keys() >= {"official"}
    assert found["S9.8bit.copy"]["verdict"] == "not measured"
    assert "C1.official" in capsys.readouterr().out


def test_bench_lists_ids_with_titles_in_any_case(capsys):
    assert main(["bench", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(table.GOALS)
    assert all(goal.what in line for goal, line in zip(table.GOALS.values(), lines, strict=True))
    for words in (["s4", "c1.OFFICIAL"], ["S4", "C1.official"]):
        assert main(["bench", "--list", *words]) == 0
    once, again = capsys.readouterr().out.split("S4.gpt2-small")[1:]
    assert once == again


@pytest.mark.parametrize(("finished", "words"), [(0, "nothing had finished"), (2, "these had finished")])
def test_interrupted_bench_prints_what_it_has(monkeypatch, capsys, finished, words):
    def measured(ids, device):
        yield from (table.Row(table.GOALS[id], measure.Value(3.0)) for id in ids[:finished])
        raise KeyboardInterrupt

    monkeypatch.setattr(table, "measure", measured)
    assert main(["bench", "C1"]) == 130
    printed = capsys.readouterr()
    assert f"interrupted: {words}" in printed.err
    assert printed.out.count("3.00 x") == finished


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("bench Q7", ("ID", "'Q7'", "expected")),
        ("bench --json no/such/folder/x", ("--json", "no/such/folder/x", "cannot be written")),
        ("bench --device tpu", ("--device", "'tpu'")),
    ],
)
def test_bench_refuses_bad_flags(flags, words, capsys):
    assert main(flags.split()) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words)


def test_instructions_say_why_they_are_not_counted(monkeypatch):
    monkeypatch.setattr(instructions.shutil, "which", lambda name: None)
    (value,) = instructions.step_instructions("cpu").rows(1).values()
    assert value == "valgrind is not installed"


@pytest.mark.skipif(instructions.why_not() is not None, reason=str(instructions.why_not()))
def test_a_count_that_fails_is_no_count(monkeypatch):
    monkeypatch.setattr(instructions.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="valgrind exited with 1"):
        instructions.count()


# --- regression runs -------------------------------------------------------------------------------------------------


def regression_run(storage, *words):
    words = [
        "-q",
        "--benchmark-enable",
        "--benchmark-quiet",
        "--benchmark-compare-fail=median:50%",
        "--rounds=5",
        *words,
    ]
    return subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks", f"--benchmark-storage=file://{storage}", *words],
        cwd=ROOT,
        # Not a worker of pytest-xdist, in which pytest-benchmark measures nothing.
        env={k: v for k, v in os.environ.items() if "XDIST" not in k} | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def test_a_slowed_kernel_fails_and_nothing_passes_in_silence(untraced, tmp_path, monkeypatch):
    """One run makes the baseline, the next is compared; then a slow kernel, a new test and another machine show."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    (tmp_path / "small.py").write_text(
        "from growkit.bench import table\n"
        "rows_of = table.rows_of\n"
        "table.rows_of = lambda name, ids, device, rounds, tiny, between: rows_of(\n"
        "    name, ids, device, rounds, True, between=between)\n"
    )
    storage, select = tmp_path / "saved", ("-k", "cpu-expand-query", "-p", "small")
    first = regression_run(storage, *select)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "no saved run of this hardware" in first.stdout and "C2.official.query" in first.stdout
    (baseline,) = storage.glob("*/0001_baseline.json")

    (tmp_path / "slow.py").write_text(
        "from growkit.kron import expand\n"
        "forward = expand.forward\n"
        "def three_times(*arguments):\n"
        "    forward(*arguments), forward(*arguments)\n"
        "    return forward(*arguments)\n"
        "expand.forward = three_times\n"
    )
    slowed = regression_run(storage, *select, "-p", "slow")
    assert slowed.returncode != 0 and "Performance has regressed" in slowed.stdout + slowed.stderr
    assert "1 slower than is allowed" in slowed.stdout

    saved = json.loads(baseline.read_text())
    saved["benchmarks"][0]["fullname"] += "-renamed"
    baseline.write_text(json.dumps(saved))
    assert "new, nothing to compare: test_workload[cpu-expand-query]" in regression_run(storage, *select).stdout

    saved["machine_info"]["cpu"] = "Another CPU"
    baseline.write_text(json.dumps(saved))
    other = regression_run(storage, *select)
    assert other.returncode != 0 and "this machine has" in other.stdout + other.stderr


def test_page_of_the_gpu_shows_what_its_runs_saved():
    files = sorted((ROOT / "benchmarks/results/nvidia-h200").glob("?-*.json"))
    assert len(files) == 6 and saved.page(files) in (ROOT / "docs/h200.md").read_text()


# --- what waits for a GPU --------------------------------------------------------------------------------------------


def test_on_gpu_lists_its_parts_within_nine_minutes():
    script = ROOT / "benchmarks" / "on_gpu.sh"
    done = subprocess.run([script, "--dry-run"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *parts, total = done.stdout.splitlines()[1:]
    names = ["install", "tests", "sanitizer", "pretrain", "sophia", "expansion", "tune", "evidence"]
    assert [line.split()[0] for line in parts] == names
    assert float(total.split()[1]) < int(total.split()[2]) / 60 < 9


def test_on_gpu_runs_files_that_a_bare_machine_can_import():
    """torch with what it brings, pytest and transformers: a file that needs more would keep all others from running."""
    there = {"torch", "triton", "numpy", "pytest", "transformers", "growkit", *sys.stdlib_module_names}
    script = (ROOT / "benchmarks" / "on_gpu.sh").read_text()
    files = {path for path in (ROOT / "tests").glob("**/test_*.py") if "mark.gpu" in path.read_text()} - {
        Path(__file__)
    }
    named = [word for word in re.findall(r" (tests/\S+\.py)", script) if "*/" not in word]  # not what grep goes through
    files |= {path for word in named for path in ROOT.glob(word)}
    assert len(files) > 4
    for path in files:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Expr) and "importorskip" in ast.unparse(node):
                break  # skipped as a whole where something is missing
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert {name.partition(".")[0] for name in names} <= there | {"ops", "optim", "ptx"}, path


FAKE_PYTHON = """#!/usr/bin/env bash
case "$*" in
    *"-m gpu"*) exit 5 ;;                      # nothing selected: no failure
    *table.run*) echo '{}' >"$3" ;;            # the first argument of what -c runs
    *tune.py* | *sweep*) echo '{}' >"${@: -1}"; exit 3 ;;
esac
"""


def on_gpu(folder, *parts):
    python = folder / "python"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    words = [ROOT / "benchmarks" / "on_gpu.sh", folder / "out", *parts]
    done = subprocess.run(words, env=os.environ | {"PYTHON": str(python)}, capture_output=True, text=True)
    return done, {path.name for path in (folder / "out").iterdir()}


def test_on_gpu_keeps_what_a_failed_part_wrote(tmp_path):
    done, files = on_gpu(tmp_path)
    assert done.returncode == 1 and "pretrain: FAILED with exit code 3" in done.stdout and "tune" not in done.stdout
    assert {"tests.txt", "sophia.json", "sophia.txt", "expansion.json", "pretrain.jsonl", "sanitizer.txt"} <= files
    assert len(files) <= 8


def test_on_gpu_runs_the_parts_that_are_asked_for(tmp_path):
    done, files = on_gpu(tmp_path, "expansion", "tune")
    assert "tune: FAILED with exit code 3" in done.stdout
    assert files == {"expansion.json", "expansion.txt", "tune.jsonl", "tune.txt"}
    done, _ = on_gpu(tmp_path, "exspansion")
    assert done.returncode == 1 and "no part exspansion" in done.stderr


def test_every_point_of_the_tuning_grid_computes_the_update(monkeypatch):
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
        pytest.skip("Triton needs a GPU, or TRITON_INTERPRET=1")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import tune

    lists = sophia.Lists("ragged", "cuda" if torch.cuda.is_available() else "cpu", tiny=True)
    grid = {"block": (128, 256), "warps": (4,), "chunk": (256, 512), "programs": (0, 2)}
    for point in tune.points(grid):
        with tune.launched_with(**point):
            sophia.check_update(lists, lambda: tune.sophia.sophia_step_(*lists.lists, eps=1e-15, **sophia.SCALARS))
    assert tune.multi_tensor.CHUNK == 4096 and tune.sophia.PROGRAMS is None


def test_tune_without_a_gpu_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import tune

    monkeypatch.setattr("sys.argv", ["tune.py", str(tmp_path / "out.jsonl")])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        tune.main()
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize("study", ["mixed", "panels", "host"])
def test_studies_of_tune_run(study, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import tune

    lines = list(tune.STUDIES[study]("cuda" if torch.cuda.is_available() else "cpu", tiny=True))
    assert len(lines) == {"mixed": 6, "panels": 6, "host": 1}[study] and all(len(line) == 3 for line in lines)
