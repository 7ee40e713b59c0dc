"""Between stored parameters and the matrices that maps act on: joined axes apart, any number of dimensions as two."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from growkit.growth.families.table import Joined, size_of


class Piece(NamedTuple):
    """One of the parameters that a storage axis joins: a side or None per dimension, and which are rows and columns.

    name: of its space among the joined ones, else empty.
    """

    name: str
    sides: tuple[str | None, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @property
    def B(self) -> str | None:
        return next((self.sides[d] for d in self.rows if self.sides[d]), None)

    @property
    def A(self) -> str | None:
        return next((self.sides[d] for d in self.columns if self.sides[d]), None)


def pieces(entries: Sequence) -> list[Piece]:
    """The pieces of a row of a family's table."""
    at = _joined(entries)
    joined = [] if at is None else list(entries[at].sides)
    found = []
    for number, side in enumerate(joined or [None]):
        sides = entries if side is None else [*entries[:at], side, *entries[at + 1 :]]
        name = side.partition("_")[0] + str(number) * (joined.count(side) > 1) if side else ""
        grown = [d for d, side in enumerate(sides) if side]
        rest = [d for d, side in enumerate(sides) if not side]
        if len(grown) > 2:
            raise ValueError(f"family: {sides} name {len(grown)} grown dimensions, expected at most 2")
        if len(grown) == 1 and grown[0] == len(sides) - 1 and rest:
            rows, columns = rest, grown
        else:
            rows, columns = (grown or rest)[:1], [*grown[1:], *(rest if grown else rest[1:])]
        found.append(Piece(name, tuple(sides), tuple(rows), tuple(columns)))
    return found


def shape_of(entries: Sequence, sizes: Mapping[str, int], stored: Sequence[int]) -> list[int]:
    """Shape that the table expects of a parameter stored as `stored`."""
    shape = list(stored)
    for d, entry in enumerate(entries):
        if entry:
            sides = entry.sides if isinstance(entry, Joined) else [entry]
            shape[d] = sum(size_of(side, sizes) for side in sides)
    return shape


def matrices(stack: torch.Tensor, entries: Sequence, sizes: Mapping[str, int]) -> list[torch.Tensor]:
    """[L, rows, columns] of every piece of a stack [L, *shape]; views where its strides allow it."""
    parts, at = [stack], _joined(entries)
    if at is not None:
        turns, sections = entries[at].sections(sizes)
        parts = [part.flatten(1 + at, 2 + at) for part in stack.unflatten(1 + at, (turns, -1)).split(sections, 2 + at)]
    found = []
    for piece, part in zip(pieces(entries), parts, strict=True):
        order, (rows, _) = [0, *(1 + d for d in piece.rows + piece.columns)], _lengths(piece, part.shape[1:])
        found.append(part.permute(order).reshape(len(part), rows, -1))
    return found


def assemble(parts: Sequence[torch.Tensor], entries: Sequence, sizes: Mapping[str, int], shape: Sequence[int]):
    """Inverse of `matrices`: the stack [L, *shape]."""
    found, at = [], _joined(entries)
    turns, sections = (1, [0]) if at is None else entries[at].sections(sizes)
    for piece, part, section in zip(pieces(entries), parts, sections, strict=True):
        order, own = piece.rows + piece.columns, list(shape)
        if at is not None:
            own[at] = turns * section
        part = part.reshape(len(part), *(own[d] for d in order))
        part = part.permute(0, *(1 + order.index(d) for d in range(len(order))))
        found.append(part if at is None else part.unflatten(1 + at, (turns, section)))
    return found[0] if at is None else torch.cat(found, 2 + at).flatten(1 + at, 2 + at)


def _joined(entries):
    return next((d for d, entry in enumerate(entries) if isinstance(entry, Joined)), None)


def _lengths(piece, shape):
    return (math.prod(shape[d] for d in dimensions) for dimensions in (piece.rows, piece.columns))
