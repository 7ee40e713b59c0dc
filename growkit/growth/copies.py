"""Copies: what is copied, the parts in which copies are read, and what tells them apart."""

import torch

from growkit.growth.spaces import Identity, IdentityTop, Map, Noise, Terms
from growkit.growth.starts import Growth, Random, source_layers


def top(C: torch.Tensor, scale: float | torch.Tensor = 1.0) -> Map:
    """scale * [I; C]"""
    plain = isinstance(scale, float) and scale == 1.0
    return Identity(C.shape[-1]) if plain and not C.shape[-2] else IdentityTop(C, scale)


def copy_index(growth: Growth, old: int, new: int, random: Random) -> torch.Tensor:
    """g, the old unit of each new one: the old ones, then copies, in turn or drawn.

    Net2WiderNet (arXiv:1511.05641), and bert2BERT's FPI (arXiv:2110.07143) with one g for all that shares a space:
        g(j) = j for j <= old, else drawn;   W_new[j, :] = W[g(j), :];   V_new[:, j] = s_j V[:, g(j)]
    for W that writes the units and V that reads them. Both papers take s_j = 1 / (copies of g(j)); here the parts of a
    unit's copies differ and sum to 1, for equal ones would get equal gradients. Both draw each copy by itself; here no
    unit is copied twice more than another, so that a norm sees whole copies at whole multiples.
    """
    if growth.start.drawn:
        return torch.cat([torch.arange(old), random.drawn(new - old, old)])[:new]
    return torch.arange(new) % old


def shares_of(index: torch.Tensor, small: int, random: Random | None = None) -> torch.Tensor:
    """Parts that sum to 1 over the copies of each old coordinate.

    Never equal ones: copies with equal parts would get equal gradients for ever. random: drawn, else in proportion
    n, n-1, ..., 1 for n copies.
    """
    count = torch.bincount(index, minlength=small)[index]
    seen = torch.zeros(small, dtype=torch.int64)
    rank = torch.empty_like(index)
    for new, old in enumerate(index.tolist()):
        rank[new] = seen[old]
        seen[old] += 1
    part = (count - rank).double()
    if random is not None:
        part = 0.5 + random.uniform(len(index)).double()
    return part / torch.zeros(small, dtype=torch.float64).index_add(0, index, part)[index]


def told_apart(
    growth: Growth, read: Map, index: torch.Tensor, old: int, random: Random, inside: torch.Tensor | None = None
) -> Map:
    """The map that reads copies, and with noise a second term that reads what they differ in: nothing, at first.

    N = noise * (X - mean of X over the copies of each old unit), X of independent normal rows; so copies get gradients
    of other directions from the first step on. HyperCloning's noise (arXiv:2409.12903) is the case of two copies.
    inside: of heads, [head_dim2, head_dim1]: N mixes whole heads.
    """
    if not growth.noise or growth.start.width == "next" or len(index) == old:
        return read
    X = random.normal(len(index), old)
    count = torch.bincount(index, minlength=old).to(X.dtype)
    N = growth.noise * (X - (torch.zeros(old, old, dtype=X.dtype).index_add_(0, index, X) / count[:, None])[index])
    return Terms(read, Noise(N if inside is None else torch.kron(N, inside)))


def scale_of(shares: torch.Tensor) -> float | torch.Tensor:
    """One number where all parts are equal, as without copies."""
    return float(shares[0]) if bool((shares == shares[0]).all()) else shares


def layered_scale(growth: Growth, index: torch.Tensor, shares: torch.Tensor) -> float | torch.Tensor:
    """[L2, large] `shares` in layers that stay; in layers that skip, parts that sum to 0.

    There nothing would tell copies apart that are read as zero.
    """
    skips = skipping(growth)
    if not skips.any() or growth.family.branched:
        return scale_of(shares)
    return torch.where(skips[:, None], shares - 1 / torch.bincount(index)[index].to(shares.dtype), shares)


def skipping(growth: Growth) -> torch.Tensor:
    """Which large layers add nothing at first."""
    if growth.start.depth != "skip":
        return torch.zeros(growth.big["layers"], dtype=torch.bool)
    source = source_layers(growth.start.depth, growth.small["layers"], growth.big["layers"])
    return torch.tensor([t > 0 and source[t - 1] == s for t, s in enumerate(source)])
