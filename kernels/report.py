"""What the compiler makes of every kernel, on a machine without a GPU.

    python -m growkit.kernels.report [MODULE ...] [--json] [--arch 80 90 100]

compiles each entry of VARIANTS in the modules of `growkit.kernels` (or in those named) and prints registers, local
memory, double precision and, for the hot path, its memory accesses and instructions per element. Exits with 1 where
something is not as it should be: an access of the hot path that is not 128 bits wide beyond those that the variant
allows, local memory, a double precision instruction, more registers or instructions per element than it allows. What
needs the code to be executed, tests/ptx holds against the same entries of VARIANTS.

VARIANTS is a list of dicts, the fields of `Variant`. The hot path is read off the machine code (SASS): of the innermost
loops and straight pieces of code, the one that reads most bytes of global memory by 128-bit accesses, or by any where
there are none (writes, in a kernel that reads none). Elements per pass of it are those bytes divided by the bytes that
the variant says an element takes, whatever the compiler unrolled. Padding is not counted; both sides of a branch inside
the loop are.
"""

import argparse
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from growkit import kernels

ARCHITECTURES = (80, 90, 100)


class Executed(NamedTuple):
    """At most, of the PTX as tests/ptx executes it on full chunks."""

    instructions: float | None = None  # per element
    shared: float = 0  # bytes to and from shared memory, per element
    barriers: float = 0  # per 1,024 elements
    sectors: float = 1.03  # bytes of the 32-byte sectors that warps ask for, per byte of reads and writes


class Variant(NamedTuple):
    name: str
    kernel: Any
    types: dict  # Triton's name of the type of each argument, "*bf16", "i64"; arguments not named are constexpr
    constants: dict  # values of the constexpr arguments, and None for tensors that are not given
    registers: int  # per thread, at most
    reads: float = 0  # bytes of global memory per element of the hot path; without reads and writes there is none
    writes: float = 0
    instructions: float | None = None  # per element, at most
    narrow: tuple = (0, 0)  # loads and stores of the hot path that have no need of 128 bits, at most
    aligned: tuple = ()  # arguments that are multiples of 16, as Triton's specialisation would find at launch
    options: dict = {}  # as given at launch: num_warps, enable_fp_fusion
    executed: tuple = ()  # fields of `Executed`
    wide: tuple | None = None  # bytes per element that 128-bit accesses load and store, at least; None: all


def variants(modules=()):
    """(module, Variant) of every entry of VARIANTS in `modules`, by default all of `growkit.kernels`."""
    names = modules or [f"growkit.kernels.{module.name}" for module in pkgutil.iter_modules(kernels.__path__)]
    for name in names:
        if name != "growkit.kernels.report":
            for fields in getattr(importlib.import_module(name), "VARIANTS", ()):
                yield name.rpartition(".")[2], Variant(**fields)


def examine(module, variant, arch):
    """Compile one variant for one architecture; a dict of what was found, with the list `problems`."""
    names = variant.kernel.arg_names
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in variant.aligned}
    signature = {name: variant.types.get(name, "constexpr") for name in names}
    source = ASTSource(variant.kernel, signature, variant.constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=variant.options)
    code, resources = _disassemble(compiled.asm["cubin"])
    found = {
        "module": module,
        "kernel": variant.kernel.__name__,
        "variant": variant.name,
        "arch": f"sm_{arch}",
        "registers": resources["REG"],
        "registers_allowed": variant.registers,
        "local_bytes": resources["STACK"] + resources["LOCAL"],
        "shared_bytes": resources["SHARED"],
        "f64": bool(re.search(r"\.f64\b", compiled.asm["ptx"])),
    }
    problems = []
    if variant.reads or variant.writes:
        hot, moved = _hot_path(code, "load" if variant.reads else "store")
        elements = moved / (variant.reads or variant.writes)
        count = found["instructions_per_element"] = round(len(hot) / elements, 2) if elements else None
        if count and variant.instructions and count > variant.instructions:
            problems.append(f"{count} instructions per element, {variant.instructions} allowed")
        for kind, expected, allowed in zip(
            ("load", "store"), (variant.reads, variant.writes), variant.narrow, strict=True
        ):
            sizes = [size for k, size in filter(None, map(_access, hot)) if k == kind]
            wide, narrow = sum(size >= 16 for size in sizes), sum(size < 16 for size in sizes)
            found |= {f"{kind}s_128": wide, f"{kind}s_narrow": narrow, f"{kind}s_narrow_allowed": allowed}
            if narrow > allowed or (expected and not wide + narrow):
                problems.append(f"{wide} {kind}s of the hot path are 128 bits wide, {narrow} are narrower")
    if found["registers"] > variant.registers:
        problems.append(f"{found['registers']} registers, {variant.registers} allowed")
    if found["local_bytes"] or any(word.startswith(("LDL", "STL")) for word, _ in code.values()):
        problems.append(f"{found['local_bytes']} bytes of local memory: registers spill, or an array is indexed")
    if found["f64"]:
        problems.append("double precision instructions")
    return {**found, "problems": problems}


def _disassemble(cubin):
    """({address: (opcode, operands)}, resource usage) of the one kernel in a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    code = {}
    for address, words in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", text):
        opcode, _, operands = re.sub(r"^@\S+\s+", "", words).partition(" ")
        if opcode != "NOP":
            code[int(address, 16)] = opcode, operands
    return code, {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def _access(opcode):
    """("load" or "store", bytes per thread) of a global memory instruction, None for any other."""
    word, *modifiers = opcode.split(".")
    if word not in ("LDG", "STG", "LDGSTS"):
        return None
    sizes = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    return "store" if word == "STG" else "load", next((sizes[m] for m in modifiers if m in sizes), 4)


def _hot_path(code, kind):
    """Opcodes of the innermost loop or unbranched piece of code with most bytes of one kind of access; those bytes."""
    branches = {a: re.search(r"0x([0-9a-f]+)$", operands) for a, (word, operands) in code.items() if word[:3] == "BRA"}
    jumps = {a: int(target[1], 16) for a, target in branches.items() if target}
    loops = [(to, a) for a, to in jumps.items() if to < a]
    loops = [(a, b) for a, b in loops if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in loops)]
    edges = sorted({min(code), max(code) + 1, *jumps.values(), *(a + 1 for a in jumps)})
    best, hot = None, []
    for first, last in [(a, b - 1) for a, b in zip(edges, edges[1:], strict=False)] + loops:
        piece = [word for a, (word, _) in code.items() if first <= a <= last]
        sizes = [size for k, size in filter(None, map(_access, piece)) if k == kind]
        # By bytes of 128-bit accesses first: tables read at the start may be more than a few bfloat16 elements. Of the
        # same bytes the wider accesses; the loop, not a piece of it; no long piece of code around few bytes.
        wide = sum(size for size in sizes if size >= 16)
        rank = wide, sum(sizes), -len(sizes), (first, last) in loops, -len(piece)
        if best is None or rank > best:
            best, hot = rank, piece
    return hot, best[1]


COLUMNS = {
    "kernel": "kernel",
    "variant": "variant",
    "arch": "arch",
    "registers": "regs",
    "registers_allowed": "allowed",
    "local_bytes": "local B",
    "shared_bytes": "shared B",
    "loads_128": "ld 128",
    "loads_narrow": "narrower",
    "stores_128": "st 128",
    "stores_narrow": "narrower",
    "f64": "f64",
    "instructions_per_element": "instr/element",
}


def table(rows):
    """The rows as lines of text, one column per entry of COLUMNS; `-` where a variant has no hot path to check."""
    shown = {True: "yes", False: "no", None: "-"}
    cells = [list(COLUMNS.values())]
    for row in rows:
        values = [row.get(name) for name in COLUMNS]
        cells.append([shown[v] if v is None or isinstance(v, bool) else str(v) for v in values])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m growkit.kernels.report", description=__doc__.partition("\n")[0])
    parser.add_argument("modules", nargs="*", metavar="MODULE", help="default: all of growkit.kernels")
    parser.add_argument("--arch", nargs="+", type=int, default=ARCHITECTURES, help="compute capabilities, such as 90")
    parser.add_argument("--json", action="store_true", help="print a list of objects instead of a table")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set, under which Triton compiles nothing: unset it")
    rows = [examine(*entry, arch) for entry in variants(options.modules) for arch in options.arch]
    if options.json:
        print(json.dumps(rows, indent=1))
    else:
        print(f"triton {triton.__version__}; hot path: loop instructions of the machine code per element and thread")
        print("\n".join(table(rows)))
    problems = [f"{r['kernel']} {r['variant']} {r['arch']}: {problem}" for r in rows for problem in r["problems"]]
    print(*problems, sep="\n", end="\n" if problems else "", file=sys.stderr)
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
