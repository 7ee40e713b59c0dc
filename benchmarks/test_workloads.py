"""Every workload: growkit's call timed for regressions, and the goals that it measures."""

import pytest
import torch

from growkit.bench import measure, table

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Part of why a row or a baseline may be missing when every workload is run once, tiny.
NOT_HERE = (
    "about the CPU",
    "GPU memory",
    f"not taken on {DEVICE}",
    "counted at full size only",
    "opt_einsum is not installed",
    "expected a CUDA device",
)


@pytest.mark.benchmark(timer=measure.timer)
@pytest.mark.parametrize("name", table.WORKLOADS)
def test_workload(benchmark, name, collected, request):
    tiny, workload = benchmark.disabled, table.WORKLOADS[name]
    if not tiny and not table.runs_on(workload, DEVICE):
        pytest.skip(f"about {workload.needs}, this run is on {DEVICE}")
    rounds = 1 if tiny else request.config.option.rounds or (30 if DEVICE == "cuda" else 9)
    benchmark.group = name

    def time_it(case):
        taken = measure.seconds(case.run, "wall")
        target = 2e-3 if DEVICE == "cuda" else 20e-3
        benchmark.extra_info |= {"bytes": case.bytes, "flops": case.flops, **measure.hardware()}
        iterations = 1 if tiny else max(1, min(200, round(target / taken)))
        benchmark.pedantic(case.run, rounds=rounds, iterations=iterations, warmup_rounds=1)

    ids = [id for id, by in table.MEASURED_BY.items() if by == name]
    rows = table.rows_of(name, ids, DEVICE, rounds, tiny, between=time_it)
    collected += rows
    benchmark.extra_info["rows"] = table.as_json(rows, DEVICE)["rows"]
    assert not [row for row in rows if row.failed]
    if tiny:
        for row in rows:
            missing = [row.value] if isinstance(row.value, str) else row.value.detail.get("missing", {}).values()
            assert all(any(words in why for words in NOT_HERE) for why in missing), missing
