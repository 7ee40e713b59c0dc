"""Every kernel compiled for real GPUs on any machine, and what the compiler made of it; no GPU takes part.

In a process of its own: Triton decides when it is imported whether it interprets or compiles.
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from growkit import kernels, reference

triton = pytest.importorskip("triton")


def report(*arguments, **environment):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    command = [sys.executable, "-m", "growkit.kernels.report", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def rows(compiled_once):
    def make(folder):
        done = report("--json")
        assert done.stdout, done.stderr
        (folder / "rows.json").write_text(done.stdout)

    read = Path(kernels.__path__[0]), Path(reference.__path__[0]), triton.__version__
    return json.loads((compiled_once(make, *read) / "rows.json").read_text())


def test_no_kernel_has_a_problem(rows):
    assert rows and not [row for row in rows if row["problems"]]
    assert not any(row["local_bytes"] or row["f64"] for row in rows)
    streaming = [row for row in rows if "loads_128" in row]
    # 8 codes per thread are 64 bits, and a block's scales are two numbers; everything else has no such excuse.
    plain = [row for row in streaming if row["module"] != "sophia8bit"]
    assert plain and all(row["loads_narrow"] == row["stores_narrow"] == 0 for row in plain)
    assert all(row["loads_128"] + row["stores_128"] > 0 and row["instructions_per_element"] > 1 for row in streaming)


def launched():
    """(module, name) of the jitted functions that no jitted function calls: those that a launcher starts."""
    jitted, called = set(), set()
    for path in Path(kernels.__path__[0]).glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
                jitted.add((path.stem, node.name))
                calls = [call.func for call in ast.walk(node) if isinstance(call, ast.Call)]
                called |= {func.id for func in calls if isinstance(func, ast.Name)}
    return {(module, name) for module, name in jitted if name not in called}


def test_no_kernel_is_left_out(rows):
    assert {("sampled_nll", f"{name}_kernel") for name in ("sample", "partial", "backward")} <= launched()
    for module, name in launched():
        found = {row["arch"] for row in rows if (row["module"], row["kernel"]) == (module, name)}
        assert found == {"sm_80", "sm_90", "sm_100"}, f"{module}.{name} is not in {module}.VARIANTS"


COPIES = """
import triton
import triton.language as tl

@triton.jit
def full(x, y, n, BLOCK: tl.constexpr):
    off = tl.arange(0, BLOCK)
    for i in range(0, n, BLOCK):
        tl.store(y + i + off, tl.load(x + i + off) + 1)

@triton.jit
def masked(x, y, n, BLOCK: tl.constexpr):
    off = tl.arange(0, BLOCK)
    for i in range(0, n, BLOCK):
        tl.store(y + i + off, tl.load(x + i + off, off < n - i) + 1, off < n - i)

@triton.jit
def double(x, y, n, BLOCK: tl.constexpr):
    off = tl.arange(0, BLOCK)
    for i in range(0, n, BLOCK):
        tl.store(y + i + off, (tl.load(x + i + off).to(tl.float64) * 1.1).to(tl.float32))

@triton.jit
def sorted(x, y, n, BLOCK: tl.constexpr):
    off = tl.arange(0, BLOCK)
    for i in range(0, n, BLOCK):
        tl.store(y + i + off, tl.sort(tl.load(x + i + off)))

def variant(kernel, **changes):
    fields = {
        "name": "", "kernel": kernel, "types": {"x": "*fp32", "y": "*fp32", "n": "i32"}, "constants": {"BLOCK": 1024},
        "aligned": ("x", "y"), "registers": 255, "reads": 4, "writes": 4,
        "options": {"num_warps": 4, "enable_fp_fusion": True},
    }
    return fields | changes

VARIANTS = [
    variant(full),
    variant(full, aligned=(), name="unaligned"),
    variant(full, registers=8, instructions=1, name="narrow limits"),
    variant(masked),
    variant(double),
    variant(sorted, options={"num_warps": 1, "maxnreg": 24}),
]
"""


def test_the_report_sees_what_it_is_for(tmp_path):
    """A mask that defeats 128-bit loads, unknown alignment, spills, double precision, limits passed: each is named."""
    (tmp_path / "copies.py").write_text(COPIES)
    done = report("copies", "--arch", "90", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1, done.stderr
    assert "masked  sm_90: 0 loads of the hot path are 128 bits wide" in done.stderr
    head, columns, *lines = done.stdout.splitlines()
    assert triton.__version__ in head and "instr/element" in columns and len(lines) == 6

    done = report("copies", "--arch", "90", "--json", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1, done.stderr
    good, unaligned, limits, masked, double, spilled = json.loads(done.stdout)
    assert good["problems"] == [] and good["loads_128"] == good["stores_128"] > 0 and good["loads_narrow"] == 0
    for row in (unaligned, masked):
        assert [p.split(" are ")[0] for p in row["problems"]] == ["0 loads of the hot path", "0 stores of the hot path"]
        assert row["loads_narrow"] == row["stores_narrow"] > 0
    assert any("registers, 8 allowed" in p for p in limits["problems"])
    assert any("instructions per element, 1 allowed" in p for p in limits["problems"])
    assert double["problems"] == ["double precision instructions"]
    assert any("local memory" in p for p in spilled["problems"]) and spilled["local_bytes"] > 0


def test_the_report_refuses_the_interpreter():
    done = report(TRITON_INTERPRET="1")
    assert done.returncode == 2 and "TRITON_INTERPRET is set" in done.stderr
