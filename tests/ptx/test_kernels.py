"""Every op of Triton kernels as compiled code: results, what it must not do to memory, and what it costs."""

import pytest

pytest.importorskip("triton")

from ptx import cases

# Those that take different instructions, by architecture (conversions, shuffles, matrices in shared memory, packed
# float32): with --ptx-all the others as well.
SELECTION = {
    ("sophia_step_", "float32, device scalars"),
    ("sophia_step_", "bfloat16, step on device"),
    ("sophia_step_", "bfloat16, master"),
    ("sophia_step_", "float16, master"),
    ("sophia_step_", "bfloat16, all"),
    ("sophia_step_", "special values"),
    ("gnb_ema_", "bfloat16 g"),
    ("gnb_ema_", "bfloat16 h, stochastic"),
    ("hutchinson_ema_", "drawn, float32"),
    ("rademacher_", "bfloat16"),
    ("squared_norm", "float16"),
    ("sophia_step_8bit_", "float32, count"),
    ("sophia_step_8bit_", "bfloat16, stochastic"),
    ("hutchinson_ema_8bit_", "given, bfloat16 g and u"),
    ("sampled_nll", "bfloat16"),
    ("sampled_nll", "float32, split rows"),
}


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        everything = metafunc.config.getoption("--ptx-all", default=False)
        chosen = [(*case, arch) for arch in (90, 80, 100) for case in cases.CASES
                  if everything or arch == 90 or case in SELECTION]  # fmt: skip
        metafunc.parametrize("case", chosen, ids=[f"{op}-{variant}-sm_{arch}" for op, variant, arch in chosen])


def test_case(case, compiled, tabulate):
    op, variant, arch = case
    found = compiled(cases.examine, op, variant, arch)
    name = f"{op:<20} {variant:<36} sm_{arch:<4}"
    tabulate(f"{name} {'; '.join(map(str, found.comparisons))}")
    for traffic in found.traffic:
        tabulate(f"{name}  {traffic}")
    assert not [str(comparison) for comparison in found.comparisons if not comparison.ok]
    assert not [problem for traffic in found.traffic for problem in traffic.problems]


def test_what_the_report_compiles_is_what_launchers_launch(compiled):
    assert set(cases.CASES) >= SELECTION
    assert compiled(cases.never_launched) == []
