"""Contraction order of the expansion by counted cost. Pure Python: the same choice on every device.

W_new[l2] = sum_l1 w[l2,l1] B W[l1] A^T is up to three contractions of a (layers, rows, columns) block: A (columns),
B (rows) and D (layers). An order is a string of those steps; a step whose map is the identity is left out.
"""

from functools import lru_cache
from itertools import permutations
from typing import NamedTuple


class Axis(NamedTuple):
    """How one axis grows from `small` to `large`.

    kind: "identity", "identity_top" ([I; C], only C is multiplied), "dense" or "copy" (gather, no arithmetic).
    sharing: "model" (one map), "target" (one per large layer, after the mix), "source" (per small layer, before).
    """

    kind: str
    small: int
    large: int
    sharing: str = "model"


class Cost(NamedTuple):
    """flops of the forward, elements read and written by it, flops of the backward with W frozen."""

    flops: int
    elements: int
    backward_flops: int


def legal_orders(L1, L2, B, A):
    """Orders that the sharing allows. L2 is None where the weight has no layer axis to mix."""
    axes = {"B": B, "A": A}
    steps = [name for name, axis in axes.items() if axis.kind != "identity"] + ["D"] * (L2 is not None)

    def legal(order):
        for position, step in enumerate(order):
            if step != "D" and L2 is not None and axes[step].sharing != "model":
                after_mix = "D" in order[:position]
                if after_mix != (axes[step].sharing == "target"):
                    return False
        return True

    return ["".join(order) for order in permutations(steps) if legal(order)]


def cost(order, L1, L2, B, A):
    """Counted cost of one order. A step costs 2*n*r*i1*i2 (i2-i1 for "identity_top"), the mix 2*L1*L2*r*c."""
    axes = {"B": B, "A": A}
    size = {"D": L1, "B": B.small, "A": A.small}
    grown = {"D": L2, "B": B.large, "A": A.large}
    flops, elements = [], 0
    for step in order:
        before = size["D"] * size["B"] * size["A"]
        kind = "dense" if step == "D" else axes[step].kind
        rows = {"dense": grown[step], "identity_top": grown[step] - size[step], "copy": 0}[kind]
        maps = size["D"] if step != "D" and axes[step].sharing != "model" else 1
        flops.append(2 * before * rows)
        elements += before + before // max(size[step], 1) * grown[step] + maps * rows * size[step]
        size[step] = grown[step]
    # Each step gives the gradient of its map and hands one on; W is frozen, so the first hands nothing on. The first
    # intermediate is a block of the second under [I; C], otherwise it is computed again.
    again = len(order) == 3 and (order[1] == "D" or axes[order[1]].kind != "identity_top")
    backward = 2 * sum(flops) - (flops[0] if flops and not again else 0)
    return Cost(sum(flops), elements, backward)


@lru_cache(maxsize=4096)
def best_order(L1, L2, B, A):
    """The legal order of least flops; least traffic breaks ties."""
    return min(legal_orders(L1, L2, B, A), key=lambda order: (*cost(order, L1, L2, B, A)[:2], order))


# An intermediate is made and used in panels of at most so many bytes. That bounds memory; panels that stay in an H200's
# cache make products so narrow that they take 8 to 62 % longer (benchmarks/NOTES.md).
PANEL_BYTES = 256 << 20
# The same for growth into tensors that exist, which gathers blocks of so many bytes before it mixes them in one launch.
PENDING_BYTES = 64 << 20


def panels(size, bytes_each, limit):
    """Cut `size` rows or columns, each of `bytes_each` in the intermediate, into ranges (start, stop) of even width.

    A range is of at most `limit` bytes, or of one row or column.
    """
    if size < 1:
        return []
    width = max(1, limit // max(bytes_each, 1))
    tile = 64 if width >= 64 else 1  # whole tiles for the products
    count = -(-size // (width // tile * tile))
    width = -(-size // (count * tile)) * tile
    return [(start, min(start + width, size)) for start in range(0, size, width)]


# A product is cut into tiles of 128 x 128 results, one for each of an H200's 132 multiprocessors at a time.
TILE, MULTIPROCESSORS = 128, 132


def stack_pays(m, n):
    """Whether a product of m x n results leaves multiprocessors idle, so that one with more rows would fill them."""
    return -(-m // TILE) * -(-n // TILE) < MULTIPROCESSORS
