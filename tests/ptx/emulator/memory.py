"""Memory that kernels may touch, and what they must not do there.

Errors: an access outside of every registered stretch, or at an address that is no multiple of its size; a store to
what is registered as read-only; shared memory that is read before it is written, or beyond what the kernel asked for; a
race, where two warps touch the same bytes, one of them writes and no barrier lies between, or where two programs do;
and threads of one warp that write different values to one place, of which an undefined one would stay. Two warps of a
program that write the same value do not race.
"""

import bisect
import ctypes
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from .errors import EmulationError
from .operands import SHARED_BASE


class Who(NamedTuple):
    """Of each access: its warp, its program and the stretch of time between two barriers, numbered without repeats."""

    warp: np.ndarray
    program: np.ndarray
    epoch: np.ndarray

    def of(self, which) -> "Who":
        return Who(self.warp[which], self.program[which], self.epoch[which])


class _Shadow:
    """Who touched each unit of some memory last. Warps: -2 where several read it; programs as well."""

    def __init__(self, units: int):
        self.writer, self.writing, self.written = (np.full(units, -1, np.int64) for _ in range(3))
        self.reader, self.reading, self.read = (np.full(units, -1, np.int64) for _ in range(3))

    def on_read(self, units: np.ndarray, who: Who) -> np.ndarray:
        """Which of the accesses race."""
        wrong = (self.writer[units] >= 0) & (
            ((self.written[units] == who.epoch) & (self.writer[units] != who.warp))
            | (self.writing[units] != who.program)
        )
        before = (self.read[units] == who.epoch) & (self.reader[units] != who.warp)
        self.reader[units] = np.where(before, -2, who.warp)
        several = self.reader[units] != who.warp
        if several.any():
            self.reader[units[several]] = -2
        known = self.reading[units]
        self.reading[units] = np.where((known == -1) | (known == who.program), who.program, -2)
        several = self.reading[units] != who.program
        if several.any():
            self.reading[units[several]] = -2
        self.read[units] = who.epoch
        return wrong

    def on_write(self, units: np.ndarray, who: Who, before: np.ndarray) -> np.ndarray:
        """As `on_read`. before: whether memory held already what is written there."""
        wrong = (self.written[units] == who.epoch) & (self.writer[units] != who.warp) & ~before
        self.writer[units] = who.warp
        wrong |= (self.writing[units] != -1) & (self.writing[units] != who.program)
        wrong |= (self.read[units] == who.epoch) & (self.reader[units] != who.warp)
        wrong |= (self.reading[units] != -1) & (self.reading[units] != who.program)
        self.writing[units], self.written[units] = who.program, who.epoch
        return wrong | (self.writing[units] != who.program)


def _put(view: np.ndarray, first: np.ndarray, values: Sequence[np.ndarray], warps: np.ndarray):
    """Store neighbours at view[first ..] for each lane.

    Returns whether memory held each lane's values before, and which lanes' values another warp's replaced. Raises where
    threads of one warp write different values to one place.
    """

    def there():
        return functools.reduce(np.logical_and, [view[first + k] == value for k, value in enumerate(values)])

    before = there()
    for k, value in enumerate(values):
        view[first + k] = value
    lost = ~there()
    if lost.any():
        last = {(int(place), int(warp)): lane for lane, (place, warp) in enumerate(zip(first, warps, strict=True))}
        for lane in lost.nonzero()[0].tolist():
            other = last[int(first[lane]), int(warps[lane])]
            if any(value[lane] != value[other] for value in values):
                raise EmulationError(
                    "threads of a warp store different values to one address: which stays is undefined"
                )
    return before, lost


class _Stretch:
    """Neighbouring bytes. unit: bytes of the smallest access that races are told apart by."""

    def __init__(self, data: np.ndarray, unit: int):
        self._data, self._unit = data, unit
        self._views: dict[np.dtype, np.ndarray] = {}

    @functools.cached_property
    def _shadow(self) -> _Shadow:
        return _Shadow(-(-len(self._data) // self._unit))

    def view(self, dtype: np.dtype) -> np.ndarray:
        if dtype not in self._views:
            self._views[dtype] = self._data.view(dtype)
        return self._views[dtype]

    def units(self, offsets: np.ndarray, size: int) -> tuple[np.ndarray, int]:
        """Units of accesses of `size` bytes, and how many each takes."""
        width = max(1, size // self._unit)
        return (offsets[:, None] // self._unit + np.arange(width)).ravel(), width

    def load(self, offsets, dtype, count, who: Who, name: str, read_only=False) -> list[np.ndarray]:
        """`count` neighbours for each lane. read_only: nothing writes here, so nothing can race."""
        view, first = self.view(dtype), offsets // dtype.itemsize
        if not read_only:
            units, width = self.units(offsets, dtype.itemsize * count)
            wrong = self._shadow.on_read(units, who.of(np.arange(len(offsets)).repeat(width)))
            _refuse_race("load", wrong.reshape(-1, width).any(1), offsets, who, name)
        return [view[first + k] for k in range(count)]

    def store(self, offsets, values, who: Who, name: str) -> None:
        dtype = values[0].dtype
        before, lost = _put(self.view(dtype), offsets // dtype.itemsize, values, who.warp)
        units, width = self.units(offsets, dtype.itemsize * len(values))
        every = np.arange(len(offsets)).repeat(width)
        wrong = self._shadow.on_write(units, who.of(every), before[every])
        _refuse_race("store", wrong.reshape(-1, width).any(1) | lost, offsets, who, name)


def _refuse_race(kind, wrong, offsets, who, name):
    if wrong.any():
        lane = int(wrong.argmax())
        raise EmulationError(
            f"race in {name}: {kind} of byte {int(offsets[lane])} by warp {int(who.warp[lane])} (program "
            f"{int(who.program[lane])}), which another warp or program touches with no barrier between"
        )


class _Segment(_Stretch):
    """One registered stretch of this process's memory, start <= address < end."""

    def __init__(self, start: int, end: int, name: str, writable: bool, unit: int):
        self.start, self.end, self.name, self.writable = start, end, name, writable
        self.base = start - start % 16
        size = -(-(end - self.base) // 16) * 16
        super().__init__(np.frombuffer((ctypes.c_char * size).from_address(self.base), np.uint8), unit)


class Memory:
    """The stretches of this process's memory that a kernel may touch. Holds no tensor: keep them alive."""

    def __init__(self):
        self._given: list[tuple[int, int, str, bool, int]] = []
        self._segments: list[_Segment] | None = None

    def add(self, tensor: torch.Tensor, name: str, writable: bool = False) -> None:
        """Register the elements of a tensor, and nothing between or behind them where it has strides."""
        size, address = tensor.element_size(), tensor.data_ptr()
        if not tensor.numel():
            return
        # Innermost dimensions that are dense make one stretch.
        dims = sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1 and s)
        length = 1
        while dims and dims[0][0] == length:
            length *= dims.pop(0)[1]
        offsets = np.zeros(1, np.int64)
        for stride, n in dims:
            offsets = (offsets[:, None] + stride * np.arange(n)).ravel()
        for offset in offsets.tolist():
            start = address + offset * size
            self._given.append((start, start + length * size, name, writable, size))
        self._segments = None

    def load(self, addresses, dtype: np.dtype, count: int, who: Who) -> list[np.ndarray]:
        """`count` neighbours of type `dtype` at each address."""
        results = None
        for segment, which in self.pieces(addresses, dtype.itemsize * count, False):
            offsets = (addresses[which] - np.uint64(segment.base)).astype(np.int64)
            found = segment.load(offsets, dtype, count, who.of(which), segment.name, not segment.writable)
            if isinstance(which, slice):
                return found
            results = results or [np.zeros(len(addresses), dtype) for _ in range(count)]
            for result, part in zip(results, found, strict=True):
                result[which] = part
        return results

    def store(self, addresses, values: list[np.ndarray], who: Who) -> None:
        """values: of each address and its neighbours, a list of arrays of one type."""
        for segment, which in self.pieces(addresses, values[0].itemsize * len(values), True):
            offsets = (addresses[which] - np.uint64(segment.base)).astype(np.int64)
            segment.store(offsets, [value[which] for value in values], who.of(which), segment.name)

    def update(self, addresses, values: np.ndarray, operation: np.ufunc) -> np.ndarray:
        """Atomic operations, one after another; what stood there before each. They race with nothing here."""
        old = np.empty_like(values)
        for segment, which in self.pieces(addresses, values.itemsize, True):
            view, lanes = segment.view(values.dtype), np.arange(len(addresses))[which]
            places = (addresses[which] - np.uint64(segment.base)).astype(np.int64) // values.itemsize
            for place, lane in zip(places, lanes, strict=True):
                old[lane] = view[place]
                view[place] = operation(view[place], values[lane])
        return old

    def pieces(self, addresses: np.ndarray, size: int, write: bool):
        """(segment, lanes) for aligned accesses of `size` bytes; lanes: slice or index array of `addresses`."""
        segments, starts, ends = self._sorted()
        wrong = addresses & np.uint64(size - 1)
        if wrong.any():
            lane = int(wrong.argmax())
            raise EmulationError(f"misaligned {size}-byte access to {self._described(int(addresses[lane]))}")
        low, high = int(addresses.min()), int(addresses.max()) + size
        k = int(np.searchsorted(starts, np.uint64(low), side="right")) - 1
        if k >= 0 and high <= segments[k].end:
            found = [(segments[k], slice(None))]
        else:
            index = np.searchsorted(starts, addresses, side="right") - 1
            outside = (index < 0) | (addresses + np.uint64(size) > ends[index])
            if outside.any():
                kind, lane = "store to" if write else "load from", int(outside.argmax())
                raise EmulationError(f"{size}-byte {kind} {self._described(int(addresses[lane]))} is out of bounds")
            found = [(segments[k], (index == k).nonzero()[0]) for k in np.unique(index).tolist()]
        for segment, _ in found:
            if write and not segment.writable:
                raise EmulationError(f"store to {segment.name}, which is read-only")
        return found

    def _sorted(self):
        """Disjoint segments; where registered stretches overlap, each part has the rights of all of them."""
        if self._segments is None:
            edges = sorted({edge for start, end, *_ in self._given for edge in (start, end)})
            covering = [[] for _ in edges]
            for item in self._given:
                for k in range(bisect.bisect_left(edges, item[0]), bisect.bisect_left(edges, item[1])):
                    covering[k].append(item)
            self._segments = []
            for start, end, items in zip(edges, edges[1:], covering, strict=False):
                if items:
                    name = "+".join(dict.fromkeys(item[2] for item in items))
                    writable, unit = any(item[3] for item in items), min(item[4] for item in items)
                    self._segments.append(_Segment(start, end, name, writable, unit))
            self._starts = np.array([segment.start for segment in self._segments], np.uint64)
            self._ends = np.array([segment.end for segment in self._segments], np.uint64)
        return self._segments, self._starts, self._ends

    def _described(self, address: int) -> str:
        near = sorted(self._segments, key=lambda s: max(s.start - address, address - s.end, 0))[:2]
        parts = [f"{s.name} = [{s.start:#x}, {s.end:#x}) at {address - s.start}" for s in near]
        return f"{address:#x} ({'; '.join(parts)})"


class Shared(_Stretch):
    """Shared memory of several programs, `size` bytes each. unit: bytes of the smallest access."""

    def __init__(self, programs: int, size: int, unit: int):
        self._size, self._each = size, -(-size // 16) * 16
        super().__init__(np.zeros(programs * self._each, np.uint8), unit)
        self._defined = np.zeros(-(-programs * self._each // unit), bool)

    def read(self, addresses, place, dtype: np.dtype, count: int, who: Who) -> list[np.ndarray]:
        """place: of each access, its program, counted from 0 among those that this holds the memory of."""
        offsets = self._offsets(addresses, place, dtype.itemsize * count)
        units, width = self.units(offsets, dtype.itemsize * count)
        undefined = ~self._defined[units]
        if undefined.any():
            lane = int(undefined.argmax()) // width
            raise EmulationError(f"shared memory at byte {int(offsets[lane])} is read before it is written")
        return self.load(offsets, dtype, count, who, "shared memory")

    def write(self, addresses, place, values: list[np.ndarray], who: Who) -> None:
        size = values[0].itemsize * len(values)
        offsets = self._offsets(addresses, place, size)
        self.store(offsets, values, who, "shared memory")
        self._defined[self.units(offsets, size)[0]] = True

    def begin(self, addresses, place, size: int, who: Who) -> None:
        """From now on something writes here; until `write` says what, nobody may read it."""
        offsets = self._offsets(addresses, place, size)
        units, width = self.units(offsets, size)
        changes = np.zeros(len(units), bool)
        wrong = self._shadow.on_write(units, who.of(np.arange(len(offsets)).repeat(width)), changes)
        _refuse_race("copy", wrong.reshape(-1, width).any(1), offsets, who, "shared memory")
        self._defined[units] = False

    def _offsets(self, addresses, place, size):
        wrong = addresses & np.uint64(size - 1)
        offsets = addresses.astype(np.int64) - SHARED_BASE
        if wrong.any():
            raise EmulationError(f"misaligned {size}-byte access to shared memory at {int(offsets[wrong.argmax()])}")
        if (offsets < 0).any() or (offsets + size > self._size).any():
            first, last = int(offsets.min()), int(offsets.max()) + size - 1
            raise EmulationError(f"shared memory out of bounds: bytes {first} .. {last} of {self._size}")
        return offsets + place * self._each
