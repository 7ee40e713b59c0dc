"""How a growth starts: the kinds by name, and the depth vector of every module.

Deepening adds copies of layers that add nothing to the residual stream, or plain copies; widening is `widths`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from growkit.growth.families.table import Family, size_of


class Start(NamedTuple):
    """width: what new coordinates are: "new" (random where unread), "copies", "split" (copies read in random parts),
    "drawn" (copies of drawn units and heads, the stream as in new), "drawn_copies" (copies of drawn coordinates
    everywhere), "next" (the same, of the next layer), "doubled" (two copies that do not mix), "zeros" (as new, but the
    stream is padded with zeros whatever its norm), "mixed" (random rows, tied), "none".
    depth: what new layers are: "skip" (copies that add nothing), "stack", "interpolate", "overlap", "noisy".
    lossless: whether a growth that cannot keep the function is refused.
    """

    width: str
    depth: str
    lossless: bool = False

    @property
    def copies(self) -> bool:
        """Whether new heads and hidden units are copies, read in parts."""
        return self.width in ("copies", "split", "drawn", "drawn_copies", "next", "doubled")

    @property
    def cancels(self) -> bool:
        """Whether layers that add nothing read copies in parts that sum to zero; else what they write is zero."""
        return self.copies and self.width != "doubled"

    @property
    def drawn(self) -> bool:
        """Whether what is copied is drawn at random."""
        return self.width in ("drawn", "drawn_copies", "next")


STARTS = {
    "lossless": Start("new", "skip", True),
    "closest": Start("new", "skip"),
    "official": Start("mixed", "noisy"),
    "stack": Start("new", "stack"),
    "interpolate": Start("new", "interpolate"),
    "overlap": Start("new", "overlap"),
    "zero_blocks": Start("none", "skip", True),
    "hypercloning": Start("copies", "skip", True),
    "lemon": Start("split", "skip", True),
    "zero_pad": Start("zeros", "skip"),
    "net2net": Start("drawn", "skip", True),
    "fpi": Start("drawn_copies", "skip", True),
    "aki": Start("next", "stack"),
    "staged": Start("doubled", "skip", True),
}


class Growth(NamedTuple):
    """One growth, as everything here needs it: what grows, from what to what, and how it starts.

    tied: whether the output layer is the embedding. noise: of what is read of copies, in units of the weights.
    """

    family: Family
    small: Mapping[str, int]
    big: Mapping[str, int]
    start: Start
    config: object
    tied: bool
    noise: float = 0.0

    @property
    def copied(self) -> bool:
        """Whether the residual stream is widened by copies of itself."""
        copied = self.start.width in ("copies", "drawn_copies", "next", "doubled")
        return copied or bool(self.family.residual.post_norm)

    @property
    def copied_heads(self) -> bool:
        """Whether new heads are copies: of the start, or because a norm over all heads must find what it found."""
        return self.start.copies or self.family.attention.normed == "heads"

    @property
    def more_experts(self) -> bool:
        return "expert" in self.big and self.big["expert"] > self.small["expert"]

    def from_next(self, side: str) -> bool:
        """Whether new coordinates of this side are those of the next layer: bert2BERT's AKI, of what is written."""
        space, _, role = side.partition("_")
        grown = size_of(side, self.big) > size_of(side, self.small)
        last = space in ("head", "expert") or space in self.family.tables
        return self.start.width == "next" and role != "read" and not last and grown

    @property
    def ratio(self) -> float:
        return self.big["residual"] / self.small["residual"]


class Random:
    """Initial values, all from one seeded generator, on the CPU."""

    def __init__(self, seed: int, dtype: torch.dtype):
        self.generator, self.dtype = torch.Generator("cpu").manual_seed(seed), dtype

    def normal(self, *shape):
        """Rows that keep the scale of what they mix."""
        return torch.randn(shape, generator=self.generator, dtype=self.dtype) / math.sqrt(shape[-1])

    def uniform(self, *shape):
        return torch.rand(shape, generator=self.generator, dtype=self.dtype)

    def drawn(self, count: int, of: int) -> torch.Tensor:
        """count of the numbers below `of`, each as often as any other, give or take one."""
        turns = [torch.randperm(of, generator=self.generator) for _ in range(-(-count // of))]
        return torch.cat([torch.arange(0), *turns])[: max(0, count)]


def source_layers(depth: str, L1: int, L2: int) -> list[int]:
    """Small layer that every large one resembles."""
    if depth in ("stack", "noisy"):
        return [t % L1 for t in range(L2)]
    if depth == "overlap":  # SOLAR, arXiv:2312.15166: the bottom part, then the top part
        bottom = -(-L2 // 2)
        return [*range(bottom), *range(L1 - (L2 - bottom), L1)] if L1 < L2 else list(range(L1))
    return [t * L1 // L2 for t in range(L2)]


def depth_map(growth: Growth, pattern: str, sides: Sequence[str | None], random: Random) -> torch.Tensor:
    """w [L2, L1] of one layered parameter; [L2, L1+1] where the last column is for a layer of ones; [2, L2, L1] where
    new coordinates are the next layer's, one w for each term of its map.

    Skipping layers: of each run of copies only the first is not a no-op. Before-norm: a copy whose residual-writing
    weights are zero does nothing. Post-norm: it does nothing if also its input is normalised already, so the affine of
    the norm that ends a layer moves to the end of the run and the norms it passes get gain 1 and shift 0.
    """
    family, L1, L2 = growth.family, growth.small["layers"], growth.big["layers"]
    source = source_layers(growth.start.depth, L1, L2)
    if growth.start.depth == "noisy":
        return _stack_noisy(L1, L2, random)
    first = [t == 0 or source[t - 1] != s for t, s in enumerate(source)]
    last = [t == L2 - 1 or source[t + 1] != s for t, s in enumerate(source)]
    module = pattern.rpartition("*.")[2].rpartition(".")[0]
    skip = growth.start.depth == "skip" and L2 > L1
    norm = bool(skip and family.residual.post_norm and {"residual_gain", "residual_shift"} & set(sides))
    w = torch.zeros(L2, L1 + (norm and "residual_gain" in sides), dtype=random.dtype)
    if norm:
        keep = last if family.residual.post_norm == module else first
    else:
        # Of units that are copies the map makes what is read add up to nothing.
        reads = {s for s in sides if s and s.endswith("_read")} - {"residual_read", "head_read"}
        copies = reads and (growth.start.cancels or ("expert_read" in reads and growth.more_experts))
        keep = first if skip and "residual_write" in sides and not copies else [True] * L2
    for t, s in enumerate(source):
        if keep[t]:
            w[t, s] = 1.0
        elif w.shape[1] > L1:
            w[t, L1] = 1.0
    if "query_write" in sides and getattr(growth.config, family.attention.layer_scaled or "", False):
        w *= torch.tensor([[(t + 1) / (s + 1)] for t, s in enumerate(source)], dtype=w.dtype)
    if any(side and growth.from_next(side) for side in sides):
        following = torch.arange(1, L1 + 1).clamp(max=L1 - 1)
        w = torch.stack([w, torch.zeros_like(w).index_add_(1, following, w)])
    return w


def _stack_noisy(L1, L2, random):
    """The published `stackbert_noisy`: U(0, 0.03), 1 at l2 mod L1, rows divided by their sum."""
    w = 0.03 * random.uniform(L2, L1)
    w[torch.arange(L2), torch.arange(L2) % L1] = 1.0
    return w / w.sum(1, keepdim=True)
