"""Four growths that expansion is judged by, and what the planner counts for each: `python -m growkit.bench.pairs`.

Counts are of the weights of the blocks; embeddings are one plain product each. No figure here is a measurement.
"""

from typing import NamedTuple

from growkit.bench.scale import H200
from growkit.kron import plan


class Pair(NamedTuple):
    """Sizes of the small and the large model; gated: gate, up and down in the MLP instead of two weights.

    tokens: rows of all the tables that grow along the residual stream only (embeddings, positions, an untied head).
    """

    L1: int
    d1: int
    f1: int
    L2: int
    d2: int
    f2: int
    gated: bool
    tokens: int

    def modules(self, kind):
        """(axis B, axis A) of every weight of one layer, both axes grown by maps of this kind."""
        D, F = plan.Axis(kind, self.d1, self.d2), plan.Axis(kind, self.f1, self.f2)
        return [(D, D)] * 4 + [(F, D)] * (1 + self.gated) + [(D, F)]


PAIRS = {
    "bert-small-base": Pair(6, 512, 2048, 12, 768, 3072, False, 30522 + 512 + 2),
    "gpt2-base-medium": Pair(12, 768, 3072, 24, 1024, 4096, False, 50257 + 1024),
    "gpt2-medium-xl": Pair(24, 1024, 4096, 48, 1600, 6400, False, 50257 + 1024),
    "llama-1b-7b": Pair(22, 2048, 5632, 32, 4096, 11008, True, 2 * 32000),
}


class Counts(NamedTuple):
    """FLOPs of one expansion by several ways, elements of the small and large weights, floats of the largest stack.

    literal: B (W A^T) for each pair of layers. mix_first: depth mixed first, then A, then B, as published code does.
    dense, identity_top: the planned order with such maps; *_backward: gradients of B, A and w with W frozen.
    """

    small: int
    large: int
    literal: int
    mix_first: int
    dense: int
    identity_top: int
    dense_backward: int
    identity_top_backward: int
    embeddings: int
    largest_stack: int


def count(pair):
    """Counts of one pair."""

    def planned(kind):
        orders = [(plan.best_order(pair.L1, pair.L2, B, A), B, A) for B, A in pair.modules(kind)]
        return [plan.cost(order, pair.L1, pair.L2, B, A) for order, B, A in orders]

    dense, top = planned("dense"), planned("identity_top")
    modules = pair.modules("dense")
    return Counts(
        small=pair.L1 * sum(B.small * A.small for B, A in modules),
        large=pair.L2 * sum(B.large * A.large for B, A in modules),
        literal=pair.L1 * pair.L2 * sum(plan.cost("AB", 1, None, B, A).flops for B, A in modules),
        mix_first=sum(plan.cost("DAB", pair.L1, pair.L2, B, A).flops for B, A in modules),
        dense=sum(cost.flops for cost in dense),
        identity_top=sum(cost.flops for cost in top),
        dense_backward=sum(cost.backward_flops for cost in dense),
        identity_top_backward=sum(cost.backward_flops for cost in top),
        embeddings=2 * pair.tokens * pair.d1 * pair.d2,
        largest_stack=pair.L1 * max(B.large * A.large for B, A in modules),
    )


def floor_seconds(counts, itemsize=4):
    """Least time to read the small weights and write the large ones at an H200's bandwidth."""
    return itemsize * (counts.small + counts.large) / H200["copy"]


def _short(number):
    """Three digits: 1.74e12 -> "1.74 T"."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.{max(0, 2 - len(str(int(number / size))) + 1)}f} {unit}"
    return f"{number:.0f}"


def main():
    head = ("pair", "small", "large", "literal", "mix first", "dense", "[I;C]", "dense bwd", "[I;C] bwd", "embeddings",
            "floor ms")  # fmt: skip
    rows = [head]
    for name, pair in PAIRS.items():
        counts = count(pair)
        rows.append((name, *map(_short, counts[:-1]), f"{1e3 * floor_seconds(counts):.3g}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    bandwidth = f"{H200['copy'] / 1e12:.2f} TB/s"
    print(f"\nweights, then FLOPs of one expansion; floor: the weights read and written once in fp32 at {bandwidth}")


if __name__ == "__main__":
    main()
