"""A listing decoded into instructions that can be executed."""

import functools
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .arithmetic import SEMANTICS, Operation, approximate
from .errors import EmulationError, Unsupported
from .operands import Operands, parts, spread
from .parse import Statement, parse
from .values import SIGNED, UNSIGNED, bits_of, dtype_of
from .warp import WARP_WIDE

if TYPE_CHECKING:
    from .batch import Batch

Execute = Callable[["Batch", Any], None]  # the last is the threads that take part, None for all


class Instruction:
    """kind: "plain", "warp" (by whole warps), "branch" (to `target`), "barrier" or "return"."""

    __slots__ = ("execute", "guard", "kind", "registers", "statement", "target")

    def __init__(self, statement: Statement, guard: int | None, registers: list[int]):
        self.statement, self.guard, self.registers = statement, guard, registers
        self.kind, self.target, self.execute = "plain", 0, None

    def __str__(self):
        return f"PTX line {self.statement.line} ({self.statement.where}): {self.statement.text}"


class Program:
    """A kernel in a PTX module. Raises Unsupported for what the emulator does not know, with the line.

    name: of the kernel, where there are several. threads: per program, where the PTX leaves that to the launch.
    """

    def __init__(self, ptx: str, name: str | None = None, threads: int | None = None):
        listing = parse(ptx, name)
        self.name, self.parameters, self.static = listing.name, listing.parameters, listing.static
        self.threads = threads or listing.threads
        self.names = Operands(listing)
        self.shared_unit = 4  # bytes of the smallest access to shared memory
        self.code = [self._decoded(statement, listing.labels) for statement in listing.statements]

    def _decoded(self, statement, labels):
        index = self.names.index
        registers = [index[name] for name in re.findall(r"%[\w.]+", statement.text) if name in index]
        instruction = Instruction(statement, statement.guard and index[statement.guard], registers)
        name, *modifiers = statement.opcode.split(".")
        try:
            if name == "bra":
                instruction.kind, instruction.target = "branch", labels[statement.operands[0]]
            elif name in ("ret", "exit"):
                instruction.kind = "return"
            elif name in ("bar", "barrier") and "warp" not in modifiers:
                instruction.kind = "barrier"
                if statement.operands != ["0"] or "sync" not in modifiers:
                    raise Unsupported("barrier other than 0, or of some threads")
            else:
                warp = name in WARP_WIDE or name in ("bar", "barrier")
                instruction.kind = "warp" if warp else "plain"
                instruction.execute = self._execution(name, modifiers, statement.operands)
        except (Unsupported, KeyError, ValueError, IndexError) as error:
            raise Unsupported(f"{instruction}: {error!r}") from None
        return instruction

    def _execution(self, name: str, modifiers: list[str], operands: list[str]) -> Execute:
        if name in ("bar", "barrier"):
            return lambda batch, active: None
        if name == "trap":
            return _trap
        if name == "ld":
            return self._load(modifiers, operands)
        if name == "st":
            return self._store(modifiers, operands)
        if name in ("red", "atom"):
            return self._atomic(name, modifiers, operands)
        if name == "cp" and modifiers[0] == "async":
            return self._copy(modifiers[1:], operands)
        if name in WARP_WIDE:
            if name in ("ldmatrix", "stmatrix"):
                self.shared_unit = min(self.shared_unit, 16)
            return WARP_WIDE[name](modifiers, operands, self.names)
        if name == "mov" and any("{" in operand for operand in operands):
            return self._pack(modifiers, operands)
        if name not in SEMANTICS:
            raise Unsupported("instruction")
        operation = SEMANTICS[name](modifiers, len(operands) - 1)
        if len(operation.sources) != len(operands) - 1:
            raise Unsupported(f"{len(operands) - 1} operands, expected {len(operation.sources)}")
        return self._plain(operation, operands)

    def _plain(self, operation: Operation, operands: list[str]) -> Execute:
        write, wanted, function = self.names.writer(operands[0]), dtype_of(operation.result), operation.function
        read = [self.names.reader(text, kind) for text, kind in zip(operands[1:], operation.sources, strict=True)]

        def convert(value):
            return value if value.dtype == wanted else value.astype(wanted)

        if operation.ulp is not None:
            return lambda batch, active: write(
                batch, approximate(operation, [x(batch.r) for x in read], batch.noise), active
            )
        if len(read) == 1:
            (a,) = read
            return lambda batch, active: write(batch, convert(function(a(batch.r))), active)
        if len(read) == 2:
            a, b = read
            return lambda batch, active: write(batch, convert(function(a(batch.r), b(batch.r))), active)
        return lambda batch, active: write(batch, convert(function(*[x(batch.r) for x in read])), active)

    def _pack(self, modifiers, operands) -> Execute:
        """mov between one register and several of a part of its width, the lowest bits first."""
        bits = bits_of(modifiers[0])
        destination, source = operands
        if "{" in source:
            members = parts(source)
            size = bits // len(members)
            reads = [self.names.reader_or_poison(member, size) for member in members]
            write, unsigned = self.names.writer(destination), UNSIGNED[bits]

            def pack(batch, active):
                values = [read(batch.r).astype(unsigned) << unsigned(size * k) for k, read in enumerate(reads)]
                write(batch, functools.reduce(np.bitwise_or, values), active)

            return pack
        members = parts(destination)
        size = bits // len(members)
        read, writes = self.names.reader(source, f"b{bits}"), [self.names.writer(member) for member in members]
        unsigned, narrow = UNSIGNED[bits], UNSIGNED[size]

        def unpack(batch, active):
            value = read(batch.r)
            for k, write in enumerate(writes):
                write(batch, (value >> unsigned(size * k)).astype(narrow), active)

        return unpack

    _CACHING = {"nc", "relaxed", "weak", "gpu", "cta", "sys", "ca", "cg", "cs", "wb", "wt", "lu"}

    def _access(self, modifiers, values):
        """(space, type, bytes) of a load or store and the registers that it moves."""
        if modifiers[0] not in ("global", "param", "shared", "shared::cta", "local", "const"):
            modifiers = ["global", *modifiers]  # a generic address, here never one of shared memory or parameters
        space, *modifiers, kind = modifiers
        vector = [m for m in modifiers if m in ("v2", "v4", "v8")]
        for modifier in modifiers:
            if modifier not in (*self._CACHING, *vector) and not modifier.startswith(("L1::", "L2::")):
                raise Unsupported(f"modifier .{modifier}")
        registers = parts(values)
        if len(registers) != (int(vector[0][1:]) if vector else 1):
            raise Unsupported(f"{len(registers)} values")
        if space not in ("global", "param", "shared", "shared::cta"):
            raise Unsupported(f"memory .{space}")
        space, size = space.partition("::")[0], bits_of(kind) // 8
        if space == "shared":
            self.shared_unit = min(self.shared_unit, size)
        return space, kind, size, registers

    def _load(self, modifiers, operands) -> Execute:
        target, place = operands
        space, kind, size, registers = self._access(modifiers, target)
        writes, storage = [self.names.writer(register) for register in registers], np.dtype(UNSIGNED[8 * size])
        address, signed = self.names.address(place), SIGNED[8 * size] if kind[0] == "s" else None

        def load(batch, active):
            lanes = batch.lanes if active is None else active.nonzero()[0]
            access = getattr(batch, f"{space}_load")
            found = access(spread(address(batch.r), lanes), lanes, storage, len(writes))
            for write, value in zip(writes, found, strict=True):
                value = value if signed is None else value.view(signed)
                if active is not None:
                    whole = np.zeros(batch.threads, value.dtype)
                    whole[lanes] = value
                    value = whole
                write(batch, value, active)

        return load

    def _store(self, modifiers, operands) -> Execute:
        place, values = operands
        space, _, size, registers = self._access(modifiers, values)
        if space == "param":
            raise Unsupported("store to a parameter")
        address, reads = self.names.address(place), [self.names.reader(x, f"b{8 * size}") for x in registers]

        def store(batch, active):
            lanes = batch.lanes if active is None else active.nonzero()[0]
            access = batch.global_store if space == "global" else batch.shared_store
            access(spread(address(batch.r), lanes), lanes, [spread(read(batch.r), lanes) for read in reads])

        return store

    def _copy(self, modifiers, operands) -> Execute:
        """cp.async: copies to shared memory that go on, their groups, and waiting for all but the last few groups."""

        def lanes_of(batch, active):
            return batch.lanes if active is None else active.nonzero()[0]

        if modifiers == ["commit_group"]:
            return lambda batch, active: batch.end_group(lanes_of(batch, active))
        if modifiers == ["wait_group"]:
            last = int(operands[0])
            return lambda batch, active: batch.await_groups(lanes_of(batch, active), last)
        cache, to_space, from_space = modifiers
        to, source, size, *read = operands
        if to_space.partition("::")[0] != "shared" or from_space != "global" or set(read) - {size}:
            raise Unsupported("copy")
        if size not in {"ca": ("4", "8", "16"), "cg": ("16",)}[cache]:
            raise Unsupported(f"{size} bytes")
        to, source, count = self.names.address(to), self.names.address(source), int(size) // 4

        def copy(batch, active):
            lanes = lanes_of(batch, active)
            batch.start_copy(spread(to(batch.r), lanes), spread(source(batch.r), lanes), lanes, count)

        return copy

    def _atomic(self, name, modifiers, operands) -> Execute:
        """red and atom on global memory, thread after thread."""
        kind, operation = modifiers[-1], next((m for m in modifiers if m in _ATOMIC), None)
        if "global" not in modifiers or operation is None or kind not in ("u32", "s32", "u64", "s64", "b32", "f32"):
            raise Unsupported("atomic")
        first = 0 if name == "red" else 1
        address, read = self.names.address(operands[first]), self.names.reader(operands[first + 1], kind)
        write = None if name == "red" else self.names.writer(operands[0])

        def execute(batch, active):
            lanes = batch.lanes if active is None else active.nonzero()[0]
            old = np.zeros(batch.threads, dtype_of(kind))
            addresses, values = spread(address(batch.r), lanes), spread(read(batch.r), lanes)
            old[lanes] = batch.memory.update(addresses, values, _ATOMIC[operation])
            if write:
                write(batch, old, active)

        return execute


_ATOMIC = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or}


def _trap(batch, active):
    raise EmulationError("trap")


@functools.lru_cache(256)
def program(ptx: str, name: str | None = None, threads: int | None = None) -> Program:
    return Program(ptx, name, threads)
