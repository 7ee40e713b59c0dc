"""Maps of every space, from a family's table, its sizes and the kind of growth.

Widening adds coordinates that write what leaves the norm's statistics as they are and are read as nothing, or copies
that are read in parts summing to one.
"""

import math
from collections.abc import Sequence

import torch

from growkit.growth.copies import copy_index, layered_scale, scale_of, shares_of, skipping, told_apart, top
from growkit.growth.families.table import size_of
from growkit.growth.heads import attention_maps
from growkit.growth.spaces import Copy, Dense, Extension, Identity, IdentityTop, Map, Noise, Terms
from growkit.growth.starts import Growth, Random


def width_maps(
    growth: Growth, sides: set[str], layers: Sequence[int], layered: set[str], random: Random
) -> dict[str, Map]:
    """A map for every side.

    layers: leading dimensions of maps that layers do not share, for heads and the spaces in `layered`.
    ValueError where noise is asked for and nothing that the model reads is a copy.
    """
    mixing = {side for side in sides if side.partition("_")[0] not in growth.family.tables}
    build = _mixed if growth.start.width == "mixed" else _structured
    maps = build(growth, mixing, layers, layered, random)
    for space in growth.family.tables:  # new rows leave the old ones alone, whatever the start
        old, new = growth.small[space], growth.big[space]
        if new != old:
            copied = Copy(torch.arange(new) % old, old) if space == "positions" else Extension(old, new)
            maps[f"{space}_write"] = copied
    maps = {side: maps[side] for side in sides if side in maps}
    sums = [made for made in maps.values() if isinstance(made, Terms)]
    if growth.noise and all(len(made.quiet) == len(made.terms) for made in sums):
        raise ValueError(f"noise: got {growth.noise}, but this start has no copies that it could tell apart")
    return maps


def ties(growth: Growth, sides: set[str]) -> dict[str, str]:
    """Of the published start, A = B: what reads a space, or normalises it, uses the map of what writes it."""
    if growth.start.width != "mixed":
        return {}
    head = "head_write" if "head_write" in sides and not growth.tied else "residual_write"
    writers = {"head": head, "embedded": "residual_write", "branch": "residual_write"}
    found = {}
    for side in sides:
        space = side.partition("_")[0]
        writer = writers.get(space, f"{space}_write")
        alike = writer in sides and size_of(side, growth.small) == size_of(writer, growth.small)
        if side != writer and alike and size_of(side, growth.big) == size_of(writer, growth.big):
            found[side] = writer
    return found


def _mixed(growth, sides, layers, layered, random):
    """The published `rand`: rows of U(0, 1) divided by their sum: a new coordinate is about the mean of the old."""
    maps = {}
    for side in sorted(sides):
        space = side.partition("_")[0]
        old, new = (size_of(side, sizes) for sizes in (growth.small, growth.big))
        C = random.uniform(*(layers if space in layered else ()), new - old, old)
        maps[side] = top(C / C.sum(-1, keepdim=True))
    return maps


def _structured(growth, sides, layers, layered, random):
    stream = copy_index(growth, growth.small["residual"], growth.big["residual"], random)
    maps = _residual(growth, stream, random)
    for space in growth.family.hidden:
        if space != "head":
            maps |= _hidden(growth, space, layers if space in layered else (), space in layered, random)
    if "head_write" in sides:
        maps |= _normed_head(growth, stream, random)
    if growth.family.experts:
        maps |= _experts(growth, random)
    maps |= attention_maps(growth, layers, random)
    if growth.start.width == "doubled" and growth.ratio == 2:
        mixing = {*layered, "query", "key", "value", "residual", "branch"}
        sides = {f"{space}_{role}" for space in mixing for role in ("write", "read")}
        return {side: _doubled(growth, side, made) if side in sides else made for side, made in maps.items()}
    return {side: _from_next(made) if growth.from_next(side) else made for side, made in maps.items()}


def _doubled(growth, side, copied):
    """[I; 0] and [0; I] as two terms, so that a weight between doubled sides is [[W, 0], [0, W]].

    Staged training (arXiv:2203.06211): two copies of the model that meet in the output layer alone, which reads them in
    parts that sum to one. copied: the map of plain copies, for what reads or writes both halves together.
    """
    terms = [copied]
    if isinstance(copied, Terms):
        copied, *terms = copied.terms
    eye = torch.eye(size_of(side, growth.small), dtype=copied.C.dtype)
    halves = IdentityTop(torch.zeros_like(eye)), Dense(torch.cat([torch.zeros_like(eye), eye]))
    return Terms(*halves, *(term for term in terms if isinstance(term, Noise)), alone=copied)


def _from_next(made):
    """A map of copies as two terms: what writes the first of each old coordinate, and what writes the copies.

    bert2BERT's AKI (arXiv:2110.07143): W_new[l][j, :] = W~[l][j, :] for j <= old, else W~[l+1][g(j), :], where ~ is the
    growth of what is read. The terms' depth maps say which layer is whose.
    """
    M = made.matrix().detach()
    first = ((M != 0).cumsum(-2) == 1) & (M != 0)
    return Terms(Dense(M * first), Dense(M * ~first))


def _residual(growth, index, random):
    """index: old coordinate of each new one, where they are copies."""
    D1, D2 = growth.small["residual"], growth.big["residual"]
    new, dtype = (D2 - D1, D1), random.dtype
    zeros, mean = torch.zeros(new, dtype=dtype), torch.full(new, 1 / D1, dtype=dtype)
    multiplied = growth.family.residual.multiplier(D1) / growth.family.residual.multiplier(D2)
    if growth.copied and (D2 % D1 == 0 or growth.start.width == "next"):
        # A tied head reads every copy whole, so its norm is divided instead.
        whole, shares = torch.eye(D1, dtype=dtype)[index[D1:]], shares_of(index, D1).to(dtype)
        sides = ("residual_write", "residual_gain", "residual_shift", "branch_write")
        maps = {side: top(whole.clone()) for side in sides}
        maps["embedded_write"] = top(whole.clone(), multiplied)
        maps["branch_gain"] = top(whole.clone(), _branch_scale(growth, D2, random))
        for side in ("residual_read", "head_read"):
            maps[side] = told_apart(growth, top(whole.clone(), scale_of(shares)), index, D1, random)
        for role in ("gain", "shift"):
            maps[f"head_{role}"] = top(whole.clone(), scale_of(shares / multiplied) if growth.tied else 1.0)
        return maps
    if growth.family.residual.post_norm:  # near: the mean is kept, the variance is not
        maps = {f"residual_{role}": top(mean.clone()) for role in ("write", "shift")}
        maps["residual_gain"] = top(random.normal(*new), math.sqrt(D1 / D2))
        maps["residual_read"] = top(zeros.clone())
        return maps | {f"head_{role}": top(zeros.clone()) for role in ("read", "gain", "shift")}
    # LayerNorm: new coordinates carry the mean of the old ones (LEMON, arXiv:2310.07999), RMSNorm: zero. Either way
    # they leave the norm as 0 times the gain, and a stream that is longer by k has the statistics it had.
    k = math.sqrt(D2 / D1)
    centred = growth.family.residual.norm == "layer" and growth.start.width != "zeros"
    unread = growth.family.residual.norm == "layer"  # where the shift reaches new coordinates, nothing may read them
    read = zeros if unread else random.normal(*new)
    written = mean if centred else zeros
    tied = k * k * multiplied if growth.tied else k  # the tied head is the embedding, longer by itself
    maps = {
        "residual_write": top(written.clone(), k),
        "embedded_write": top(written.clone(), k * multiplied),
        "branch_write": top(written.clone(), k),
        "branch_gain": top(random.normal(*new), _branch_scale(growth, D1, random)),  # k times as long already
        "residual_read": top(read.clone(), 1 / k if growth.family.residual.bare else 1.0),
        "residual_gain": top(random.normal(*new), 1 / k),
        "residual_shift": top(random.normal(*new)),
        "head_read": top(zeros.clone() if unread else random.normal(*new)),
        "head_gain": top(random.normal(*new), 1 / tied),
        "head_shift": top(zeros.clone(), k / tied) if growth.tied else top(random.normal(*new)),
    }
    return maps


def _branch_scale(growth, zeros, random):
    """In layers that skip, the norm of what they add has no gain in the first `zeros` coordinates; others have nothing
    to scale yet, and need a gain to learn."""
    skips = skipping(growth)
    if not skips.any():
        return 1.0
    scale = torch.ones(len(skips), growth.big["residual"], dtype=random.dtype)
    scale[skips, :zeros] = 0.0
    return scale


def _hidden(growth, space, layers, layered, random):
    """Units that act one by one: any new ones will do that nothing reads, or copies read in parts."""
    F1, F2 = growth.small[space], growth.big[space]
    if growth.start.copies:
        index = copy_index(growth, F1, F2, random)
        C = torch.eye(F1, dtype=random.dtype)[index[F1:]].expand(*layers, -1, -1)
        shares = shares_of(index, F1, random if growth.start.width == "split" else None).to(random.dtype)
        scale = layered_scale(growth, index, shares) if layered and growth.start.cancels else scale_of(shares)
        read = told_apart(growth, top(C.clone(), scale), index, F1, random)
        return {f"{space}_write": top(C.clone()), f"{space}_read": read}
    zeros = torch.zeros(*layers, F2 - F1, F1, dtype=random.dtype)
    return {f"{space}_write": top(random.normal(*layers, F2 - F1, F1)), f"{space}_read": top(zeros)}


def _experts(growth, random):
    """Copies of experts and of their router's rows. Each gets 1/c of the weight that one of c copies had, if the router
    chooses c times as many, so that what the copies make is made c times as large, in unequal parts."""
    E1, E2 = growth.small["expert"], growth.big["expert"]
    if E1 == E2:
        return {"expert_write": Identity(E1), "expert_read": Identity(E1)}
    index = copy_index(growth, E1, E2, random)
    count = torch.bincount(index)[index]
    shares = shares_of(index, E1, random if growth.start.width == "split" else None).to(random.dtype)
    parts = count * torch.as_tensor(layered_scale(growth, index, shares), dtype=random.dtype)
    return {"expert_write": Copy(index, E1), "expert_read": Copy(index, E1, parts)}


def _normed_head(growth, stream, random):
    """The MLM head's own units have a norm: copies keep its statistics, an even selection nearly does.

    stream: what the residual coordinates are copies of, for a tied head reads by what writes them.
    """
    H1, H2, dtype = growth.small["head"], growth.big["head"], random.dtype
    eye = torch.eye(H1, dtype=dtype)
    if H2 % H1:
        chosen = eye[torch.arange(H2 - H1) * H1 // (H2 - H1) % H1]
        zeros = torch.zeros_like(chosen)
        maps = {f"head_{role}": top(zeros.clone() if growth.tied else chosen.clone()) for role in ("gain", "shift")}
        return maps | {"head_write": top(chosen.clone()), "head_read": top(zeros.clone())}
    index = stream if growth.tied else copy_index(growth, H1, H2, random)
    whole, shares = eye[index[H1:]], scale_of(shares_of(index, H1).to(dtype))
    maps = {f"head_{role}": top(whole.clone(), shares if growth.tied else 1.0) for role in ("gain", "shift")}
    read = told_apart(growth, top(whole.clone(), shares), index, H1, random)
    return maps | {"head_write": top(whole.clone()), "head_read": read}
