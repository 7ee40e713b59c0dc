"""Instructions that the 32 threads of a warp execute together: shuffles, reductions, votes, moves of matrices.

The scheduler has made sure that all threads of each warp that takes part are there.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .arithmetic import INTEGER, only
from .errors import Unsupported
from .operands import Operands, parts, spread
from .values import NAN32

if TYPE_CHECKING:
    from .batch import Batch

WARP = 32

# (modifiers, operands, names) -> what a batch does
WARP_WIDE: dict[str, Callable[[list[str], list[str], Operands], Callable[["Batch", Any], None]]] = {}


def _instruction(name: str):
    def register(function):
        WARP_WIDE[name] = function
        return function

    return register


def _full_mask(names, text):
    read = names.reader(text, "b32")

    def check(batch, active):
        mask = read(batch.r)
        mask = mask if len(mask) == 1 or active is None else mask[active]
        if (mask != np.uint32(0xFFFFFFFF)).any():
            raise Unsupported("a member mask other than the whole warp")

    return check


def _by_warp(batch, value):
    return (value if len(value) > 1 else np.repeat(value, batch.threads)).reshape(-1, WARP)


@_instruction("shfl")
def _shfl(modifiers, operands, names):
    _, mode, kind = modifiers
    destination, *sources = operands
    targets = destination.split("|")
    write, also = names.writer(targets[0]), names.writer(targets[1]) if len(targets) > 1 else None
    value, b, c = names.reader(sources[0], kind), *(names.reader(s, "u32") for s in sources[1:3])
    check = _full_mask(names, sources[3])

    def execute(batch, active):
        check(batch, active)
        lane = batch.lane
        amount, bound = b(batch.r).astype(np.int64) & 31, c(batch.r).astype(np.int64)
        clamp, segment = bound & 31, bound >> 8 & 31
        first, last = lane & segment, lane & segment | clamp & ~segment
        source = {
            "up": lane - amount,
            "down": lane + amount,
            "bfly": lane ^ amount,
            "idx": first | amount & ~segment,
        }[mode]
        valid = source >= last if mode == "up" else source <= last
        source = np.where(valid, source, lane)
        values = spread(value(batch.r), batch.lanes)
        write(batch, values[batch.lanes - lane + source], active)
        if also:
            also(batch, np.broadcast_to(valid, (batch.threads,)).copy(), active)

    return execute


@_instruction("redux")
def _redux(modifiers, operands, names):
    _, operation, *more, kind = modifiers
    only(more, *(("abs", "NaN") if kind == "f32" else ()))
    if kind == "f32" and operation not in ("min", "max"):
        raise Unsupported("sum of floats")
    write, read = names.writer(operands[0]), names.reader(operands[1], kind)
    check = _full_mask(names, operands[2])

    def extreme(x):
        x = np.abs(x) if "abs" in more else x
        nan = np.isnan(x).any(1) if "NaN" in more else np.isnan(x).all(1)
        order = np.where(np.isnan(x), np.float32(np.inf if operation == "min" else -np.inf), x)
        signed = order.view(np.int32)
        key = np.where(signed < 0, signed ^ np.int32(0x7FFFFFFF), signed)  # -0 below +0
        at = key.argmin(1) if operation == "min" else key.argmax(1)
        return np.where(nan, NAN32, order[np.arange(len(x)), at])

    def execute(batch, active):
        check(batch, active)
        x = _by_warp(batch, read(batch.r))
        result = extreme(x) if kind == "f32" else INTEGER[operation].reduce(x, axis=1, dtype=x.dtype)
        write(batch, np.repeat(result.astype(x.dtype), WARP), active)

    return execute


@_instruction("vote")
def _vote(modifiers, operands, names):
    _, mode, _ = modifiers
    write, read = names.writer(operands[0]), names.reader(operands[1].lstrip("!"), "pred")
    negated, check = operands[1].startswith("!"), _full_mask(names, operands[2])

    def execute(batch, active):
        check(batch, active)
        x = _by_warp(batch, read(batch.r)) ^ negated
        if mode == "ballot":
            result = (x.astype(np.uint64) << np.arange(WARP, dtype=np.uint64)).sum(1).astype(np.uint32)
        else:
            result = {"all": x.all(1), "any": x.any(1), "uni": x.all(1) | ~x.any(1)}[mode]
        write(batch, np.repeat(result, WARP), active)

    return execute


def _matrix(modifiers):
    """Number of 8 x 8 matrices of 16-bit elements, and whether they are transposed."""
    if "m8n8" not in modifiers or modifiers[-1] != "b16" or not {"shared", "shared::cta"} & set(modifiers):
        raise Unsupported("matrix shape")
    only(modifiers[:-1], "sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared", "shared::cta")
    return next(int(m[1:]) for m in modifiers if m in ("x1", "x2", "x4")), "trans" in modifiers


# Thread i holds of each matrix row i/4, columns 2*(i%4) and the next; thread 8*k + j gives the address of row j of the
# k-th matrix, 16 bytes.


def _rows(batch, active, count):
    """Warps that take part, and the threads whose addresses count."""
    warps = np.arange(batch.threads // WARP) if active is None else np.unique(active.nonzero()[0] // WARP)
    return warps, (warps[:, None] * WARP + np.arange(8 * count)).ravel()


@_instruction("ldmatrix")
def _ldmatrix(modifiers, operands, names):
    count, transposed = _matrix(modifiers)
    address, writes = names.address(operands[1]), [names.writer(x) for x in parts(operands[0])]

    def execute(batch, active):
        warps, lanes = _rows(batch, active, count)
        rows = batch.shared_load(spread(address(batch.r), lanes), lanes, np.dtype(np.uint64), 2)
        cells = np.stack(rows, 1).view(np.uint16).reshape(len(warps), count, 8, 8)
        cells = cells.swapaxes(2, 3) if transposed else cells
        words = np.ascontiguousarray(cells).view(np.uint32).reshape(len(warps), count, WARP)
        for k, write in enumerate(writes):
            value = np.zeros((batch.threads // WARP, WARP), np.uint32)
            value[warps] = words[:, k]
            write(batch, value.ravel(), active)

    return execute


@_instruction("stmatrix")
def _stmatrix(modifiers, operands, names):
    count, transposed = _matrix(modifiers)
    address, reads = names.address(operands[0]), [names.reader(x, "b32") for x in parts(operands[1])]

    def execute(batch, active):
        warps, lanes = _rows(batch, active, count)
        words = np.stack([_by_warp(batch, read(batch.r))[warps] for read in reads], 1)
        cells = np.ascontiguousarray(words).view(np.uint16).reshape(len(warps), count, 8, 8)
        cells = np.ascontiguousarray(cells.swapaxes(2, 3) if transposed else cells)
        rows = cells.view(np.uint64).reshape(-1, 2)
        batch.shared_store(spread(address(batch.r), lanes), lanes, [rows[:, 0], rows[:, 1]])

    return execute
