"""Between stored parameters and the matrices that maps act on: joined axes apart, any number of dimensions as two."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from growkit.growth.families.table import Joined, Stacked, size_of


class Piece(NamedTuple):
    """One of the parameters that a storage axis joins: a side or None per dimension, and which are rows and columns.

    name: of its space among the joined ones, else empty. stack: the dimension that numbers whole matrices, if any.
    """

    name: str
    sides: tuple[str | None, ...]
    stack: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @property
    def order(self) -> tuple[int, ...]:
        return self.stack + self.rows + self.columns

    @property
    def S(self) -> str | None:
        return next((self.sides[d] for d in self.stack), None)

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
    stack = tuple(d for d, entry in enumerate(entries) if isinstance(entry, Stacked))
    entries = [entry.side if isinstance(entry, Stacked) else entry for entry in entries]
    found = []
    for number, side in enumerate(joined or [None]):
        sides = entries if side is None else [*entries[:at], side, *entries[at + 1 :]]
        name = side.partition("_")[0] + str(number) * (joined.count(side) > 1) if side else ""
        grown = [d for d, side in enumerate(sides) if side and d not in stack]
        rest = [d for d, side in enumerate(sides) if not side and d not in stack]
        if len(grown) > 2:
            raise ValueError(f"family: {sides} name {len(grown)} grown dimensions, expected at most 2")
        if len(stack) > 1 or (stack and len(grown + rest) > 2):
            raise ValueError(f"family: {sides} stack what is no matrix, expected one stacked dimension of three")
        if len(grown) == 1 and grown[0] == len(sides) - 1 and rest:
            rows, columns = rest, grown
        else:
            rows, columns = (grown or rest)[:1], [*grown[1:], *(rest if grown else rest[1:])]
        found.append(Piece(name, tuple(sides), stack, tuple(rows), tuple(columns)))
    return found


def shape_of(entries: Sequence, sizes: Mapping[str, int], stored: Sequence[int]) -> list[int]:
    """Shape that the table expects of a parameter stored as `stored`."""
    shape = list(stored)
    for d, entry in enumerate(entries):
        if entry:
            sides = [entry] if isinstance(entry, str) else entry.sides
            shape[d] = sum(size_of(side, sizes) for side in sides)
    return shape


def matrices(stack: torch.Tensor, entries: Sequence, sizes: Mapping[str, int]) -> list[torch.Tensor]:
    """[L, rows, columns] of every piece of a stack [L, *shape], [L, stack, rows, columns] of a stacked one; views where
    its strides allow it."""
    parts, at = [stack], _joined(entries)
    if at is not None:
        turns, sections = entries[at].sections(sizes)
        parts = [part.flatten(1 + at, 2 + at) for part in stack.unflatten(1 + at, (turns, -1)).split(sections, 2 + at)]
    found = []
    for piece, part in zip(pieces(entries), parts, strict=True):
        lead, rows = ([part.shape[1 + d] for d in dimensions] for dimensions in (piece.stack, piece.rows))
        part = part.permute(0, *(1 + d for d in piece.order))
        found.append(part.reshape(len(part), *lead, math.prod(rows), -1))
    return found


def one_by_one(stacks: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """[L, rows, columns] of every matrix in what `matrices` gives."""
    return [W for stack in stacks for W in (stack.unbind(1) if stack.ndim == 4 else [stack])]


def assemble(parts: Sequence[torch.Tensor], entries: Sequence, sizes: Mapping[str, int], shape: Sequence[int]):
    """Inverse of `matrices`: the stack [L, *shape]."""
    found, at = [], _joined(entries)
    turns, sections = (1, [0]) if at is None else entries[at].sections(sizes)
    for piece, part, section in zip(pieces(entries), parts, sections, strict=True):
        order, own = piece.order, list(shape)
        if at is not None:
            own[at] = turns * section
        part = part.reshape(len(part), *(own[d] for d in order))
        part = part.permute(0, *(1 + order.index(d) for d in range(len(order))))
        found.append(part if at is None else part.unflatten(1 + at, (turns, section)))
    return found[0] if at is None else torch.cat(found, 2 + at).flatten(1 + at, 2 + at)


def _joined(entries):
    return next((d for d, entry in enumerate(entries) if isinstance(entry, Joined)), None)
