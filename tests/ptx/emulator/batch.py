"""Executes programs in step: one array per register over the threads of all of them.

Threads that branched apart go on by turns, those at the lowest address first, so that they meet again. Barriers wait
for all threads of a program, warp-wide instructions for those of a warp. Errors: a barrier or a warp-wide instruction
that some of its threads never reach, a register that is read before it is written, a program that does not end.
"""

import numpy as np

from .counts import Counts
from .errors import EmulationError, Unsupported
from .memory import Memory, Shared, Who
from .operands import PARAMETER_BASE
from .program import Instruction, Program
from .warp import WARP

MAX_STEPS = 5_000_000  # instructions of a batch, by which time it hangs


class Batch:
    """Programs `first` .. `first + count - 1` of a grid. arguments: the bytes of all, as the parameters lie."""

    def __init__(
        self,
        program: Program,
        memory: Memory,
        shared: int,
        arguments: bytes,
        grid: tuple[int, int, int],
        first: int,
        count: int,
        noise: int | None,
    ):
        self.program, self.memory, self.noise = program, memory, noise
        self._given = len(arguments)
        self._arguments = np.frombuffer(arguments + bytes(-len(arguments) % 16), np.uint8)
        self.count, self.threads = count, count * program.threads
        self.lanes = np.arange(self.threads)
        self.lane = self.lanes % WARP
        self._place = self.lanes // program.threads
        self._index = first + self._place
        self._warp = self.lanes // WARP + first * (program.threads // WARP)
        self._epoch = np.zeros(count, np.int64)
        self._shared = Shared(count, program.static + shared, program.shared_unit)
        self._copies: list[tuple] = []  # under way: lanes, addresses, values, and the groups that they belong to
        self._groups_ended = np.zeros(self.threads, np.int64)
        self.counts = Counts()
        self.r: list = [None] * len(program.names.widths)
        thread = self.lanes % program.threads
        constants = {"%laneid": self.lane, "%warpid": thread // WARP, "%tid.x": thread}
        constants |= {"%tid.y": 0, "%tid.z": 0, "%ntid.x": program.threads, "%ntid.y": 1, "%ntid.z": 1}
        below = 1
        for axis, size in zip("xyz", grid, strict=True):
            constants |= {f"%ctaid.{axis}": self._index // below % size, f"%nctaid.{axis}": size}
            below *= size
        for name, value in constants.items():
            values = np.broadcast_to(np.asarray(value, np.uint32), (self.threads,))
            self.r[program.names.index[name]] = values.copy()

    # --- what instructions call; lanes: the threads that take part ---

    def _who(self, lanes) -> Who:
        # Programs share no barrier, so each has stretches of time of its own.
        epoch = self._epoch[self._place[lanes]] * (1 << 32) + self._index[lanes]
        return Who(self._warp[lanes], self._index[lanes], epoch)

    def global_load(self, addresses, lanes, dtype: np.dtype, count: int) -> list[np.ndarray]:
        self.counts.access("load", addresses, self._warp[lanes], dtype.itemsize * count)
        return self.memory.load(addresses, dtype, count, self._who(lanes))

    def global_store(self, addresses, lanes, values: list[np.ndarray]) -> None:
        self.counts.access("store", addresses, self._warp[lanes], values[0].itemsize * len(values))
        self.memory.store(addresses, values, self._who(lanes))

    def param_load(self, addresses, lanes, dtype: np.dtype, count: int) -> list[np.ndarray]:
        size, offsets = dtype.itemsize * count, (addresses - np.uint64(PARAMETER_BASE)).astype(np.int64)
        if (offsets < 0).any() or (offsets + size > self._given).any() or (offsets % size).any():
            raise EmulationError(f"{size}-byte load of parameters is out of bounds or misaligned")
        return [self._arguments.view(dtype)[offsets // dtype.itemsize + k] for k in range(count)]

    def shared_load(self, addresses, lanes, dtype: np.dtype, count: int) -> list[np.ndarray]:
        self.counts.shared += dtype.itemsize * count * len(lanes)
        return self._shared.read(addresses, self._place[lanes], dtype, count, self._who(lanes))

    def shared_store(self, addresses, lanes, values: list[np.ndarray]) -> None:
        self.counts.shared += values[0].itemsize * len(values) * len(lanes)
        self._shared.write(addresses, self._place[lanes], values, self._who(lanes))

    def start_copy(self, to, source, lanes, count: int) -> None:
        """Copy `count` words per lane to shared memory, where they are when the lane has waited for its group."""
        values = self.global_load(source, lanes, np.dtype(np.uint32), count)
        self._shared.begin(to, self._place[lanes], 4 * count, self._who(lanes))
        self._copies.append((lanes, to, values, self._groups_ended[lanes]))

    def end_group(self, lanes) -> None:
        self._groups_ended[lanes] += 1

    def await_groups(self, lanes, last: int) -> None:
        """Copies of all groups but the `last` ended ones of each lane are there."""
        arrived = np.full(self.threads, -1)  # the groups before this one
        arrived[lanes] = self._groups_ended[lanes] - last
        copies, self._copies = self._copies, []
        for copying, to, values, groups in copies:
            there = groups < arrived[copying]
            if there.any():
                self.shared_store(to[there], copying[there], [value[there] for value in values])
            if not there.all():
                values = [value[~there] for value in values]
                self._copies.append((copying[~there], to[~there], values, groups[~there]))

    # --- scheduling ---

    def run(self) -> Counts:
        """Execute until all threads have returned."""
        code = self.program.code
        self._groups: dict[int, np.ndarray] = {0: np.ones(self.threads, bool)}  # ready, by address
        self._waiting: dict[int, np.ndarray] = {}  # for the rest of their program or warp, by address
        self._steps, self._returned = 0, 0
        while self._groups:
            at = min(self._groups)
            self._advance(at, self._groups.pop(at), min(self._groups, default=len(code)))
        if self._waiting:
            at, mask = next(iter(self._waiting.items()))
            raise self._error(code[at], EmulationError(
                f"deadlock: {int(mask.sum())} of {self.threads} threads wait here for others, of which "
                f"{self._returned} have returned and the rest wait elsewhere"
            ))  # fmt: skip
        self.counts.programs += self.count
        return self.counts

    def _ready(self, at: int, mask: np.ndarray) -> None:
        self._groups[at] = self._groups[at] | mask if at in self._groups else mask

    def _advance(self, at: int, mask: np.ndarray, meeting: int) -> None:
        """Execute from `at` with the threads of `mask` until they branch apart, wait, return or reach `meeting`."""
        code, size = self.program.code, int(np.count_nonzero(mask))
        while at < meeting:
            instruction = code[at]
            kind, active, taking = instruction.kind, mask, size
            if instruction.guard is not None:
                active = mask & self._guard(instruction)
                taking = int(np.count_nonzero(active))
            self._steps += 1
            if self._steps > MAX_STEPS:
                raise self._error(instruction, EmulationError(f"no end after {MAX_STEPS} instructions"))
            if kind == "plain":
                self._execute(instruction, active, taking)
                at += 1
            elif kind == "branch":
                self.counts.instruction(instruction.statement.opcode, size)
                if 0 < taking < size:
                    self.counts.divergent += self._split_programs(active, mask)
                    self._ready(instruction.target, active)
                    self._ready(at + 1, mask & ~active)
                    return
                at = instruction.target if taking else at + 1
            elif kind == "return":
                self._returned += taking
                mask, size, at = mask & ~active, size - taking, at + 1
                if not size:
                    return
            else:
                if kind == "barrier" and taking < size:
                    raise self._error(instruction, EmulationError("a predicated barrier that some threads skip"))
                group = self.program.threads if kind == "barrier" else WARP
                mask = self._complete(at, mask, group)
                size = int(np.count_nonzero(mask))
                if not size:
                    return
                if kind == "barrier":
                    self.counts.barriers += size // group
                    self._epoch[mask.reshape(self.count, -1).any(1)] += 1
                    self.counts.instruction(instruction.statement.opcode, size)
                else:
                    self._execute_by_warp(instruction, mask, size)
                at += 1
        self._ready(at, mask)

    def _guard(self, instruction: Instruction) -> np.ndarray:
        guard = self.r[instruction.guard]
        if guard is None:
            raise self._error(instruction, EmulationError("the predicate was never written"))
        return ~guard if instruction.statement.negated else guard

    def _split_programs(self, active, mask) -> int:
        """Number of programs in which some threads take a branch and others do not."""
        taken, stay = (x.reshape(self.count, -1).any(1) for x in (active, mask & ~active))
        return int((taken & stay).sum())

    def _complete(self, at: int, mask: np.ndarray, group: int) -> np.ndarray:
        """Threads at `at`, now or waiting, whose whole program or warp is there; the others wait."""
        arrived = mask | self._waiting.pop(at) if at in self._waiting else mask
        whole = np.repeat(arrived.reshape(-1, group).all(1), group)
        left = arrived & ~whole
        if left.any():
            self._waiting[at] = left
        return whole

    def _execute_by_warp(self, instruction, mask, size) -> None:
        if instruction.guard is not None:
            mask = mask & self._guard(instruction)
            by_warp = mask.reshape(-1, WARP)
            if (by_warp.any(1) & ~by_warp.all(1)).any():
                raise self._error(instruction, EmulationError("some threads of a warp skip what takes all"))
            size = int(np.count_nonzero(mask))
        self._execute(instruction, mask, size)

    def _execute(self, instruction: Instruction, mask: np.ndarray, size: int) -> None:
        if not size:
            return
        self.counts.instruction(instruction.statement.opcode, size)
        try:
            instruction.execute(self, None if size == self.threads else mask)
        except EmulationError as error:
            raise self._error(instruction, error) from None
        except (TypeError, AttributeError) as error:
            unwritten = [i for i in instruction.registers if self.r[i] is None]  # the one that is written first
            if not unwritten:
                raise
            name = next(name for name, i in self.program.names.index.items() if i == unwritten[-1])
            raise self._error(instruction, EmulationError(f"{name} may be read before it is written")) from error

    def _error(self, instruction: Instruction, error: EmulationError) -> EmulationError:
        kind = Unsupported if isinstance(error, Unsupported) else EmulationError
        return kind(f"{self.program.name}, {instruction}: {error}")
