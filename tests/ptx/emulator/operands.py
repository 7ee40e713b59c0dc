"""Operands of instructions as functions of the register file, a list with one array over all threads per register."""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import Unsupported
from .parse import Listing
from .values import UNSIGNED, bits_of, dtype_of

if TYPE_CHECKING:
    from .batch import Batch

# Where shared memory starts: a multiple of 16, as the PTX promises, and of nothing larger, so that code which takes a
# more aligned base for granted goes wrong here.
SHARED_BASE = 1040
PARAMETER_BASE = 1 << 62  # as of shared memory, where no tensor lies
POISON = 0xDEADBEEFDEADBEEF  # of threads that skipped the first write to a register
SPECIAL = [f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"] + ["%laneid", "%warpid"]

Read = Callable[[list], np.ndarray]
Write = Callable[["Batch", np.ndarray, Any], None]  # the last is the threads that take part, None for all


class Operands:
    """Resolves the names in one listing. index: register -> its place in the register file."""

    def __init__(self, listing: Listing):
        named = dict.fromkeys(SPECIAL, 32) | listing.registers
        self.index = {name: i for i, name in enumerate(named)}
        self.widths = list(named.values())
        self._symbols = {name: SHARED_BASE + start for name, start in listing.shared.items()}
        self._symbols |= {parameter.name: PARAMETER_BASE + parameter.offset for parameter in listing.parameters}

    def reader(self, text: str, kind: str) -> Read:
        """The operand as an array of the numpy type of `kind`, of one element where it is a constant."""
        wanted = dtype_of(kind)
        if text in self.index:
            i = self.index[text]
            width = self.widths[i]
            if kind == "pred":
                if width != 1:
                    raise Unsupported(f"{text} is no predicate")
                return lambda r: r[i]
            bits = bits_of(kind)
            unsigned = np.dtype(UNSIGNED[bits])
            if width < bits:
                raise Unsupported(f"{text} is narrower than .{kind}")
            if width > bits:
                return lambda r: r[i].astype(unsigned).view(wanted)
            return (lambda r: r[i]) if wanted == unsigned else (lambda r: r[i].view(wanted))
        if text in self._symbols:
            value = self._symbols[text]
        elif match := re.fullmatch(r"0[fd]([0-9A-Fa-f]+)", text):
            value = int(match[1], 16)
        elif re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)U?", text):
            value = int(text.rstrip("U"), 0)
        else:
            raise Unsupported(f"operand {text}")
        if kind == "pred":
            constant = np.array([value != 0])
        else:
            bits = bits_of(kind)
            constant = np.array([value & (1 << bits) - 1], UNSIGNED[bits]).view(wanted)
        return lambda r: constant

    def reader_or_poison(self, text: str, bits: int) -> Read:
        """As `reader`, but a register that nothing ever wrote holds poison: LLVM leaves unused halves undefined."""
        read, i = self.reader(text, f"b{bits}"), self.index.get(text)
        poison = np.array([POISON & (1 << bits) - 1], UNSIGNED[bits])
        return read if i is None else lambda r: poison if r[i] is None else read(r)

    def writer(self, text: str) -> Write:
        """Writes a register; narrower values are extended by their own sign."""
        if text == "_":
            return lambda batch, value, active: None
        i = self.index[text]
        width = self.widths[i]
        storage = np.dtype(bool if width == 1 else UNSIGNED[width])
        poison = storage.type(False) if width == 1 else storage.type(POISON & (1 << width) - 1)

        def write(batch, value, active):
            if value.dtype != storage:
                value = value.view(storage) if value.itemsize == storage.itemsize else value.astype(storage)
            if len(value) != batch.threads:
                value = np.repeat(value, batch.threads)
            if active is not None:
                old = batch.r[i]
                value = np.where(active, value, poison if old is None else old)
            batch.r[i] = value

        return write

    def address(self, text: str) -> Read:
        """Addresses, as uint64."""
        match = re.fullmatch(r"\[\s*([%$\w.]+)\s*(?:\+\s*(-?\w+))?\s*\]", text)
        if not match:
            raise Unsupported(f"address {text}")
        offset = np.uint64(int(match[2] or "0", 0) & (1 << 64) - 1)
        if match[1] not in self.index:
            constant = np.array([self._symbols[match[1]]], np.uint64) + offset
            return lambda r: constant
        i = self.index[match[1]]
        if self.widths[i] != 64:
            return lambda r: r[i].astype(np.uint64) + offset
        return (lambda r: r[i] + offset) if offset else (lambda r: r[i])


def parts(text: str) -> list[str]:
    """The members of an operand such as {%r1, %r2}."""
    return [part.strip() for part in text.strip("{} ").split(",")]


def spread(value: np.ndarray, lanes: np.ndarray) -> np.ndarray:
    """Values of the given threads; a constant for each of them."""
    return value[lanes] if len(value) > 1 else np.repeat(value, len(lanes))
