"""Maps of every space, from a family's table, its sizes and the kind of growth.

Widening adds coordinates that write what leaves the norm's statistics as they are and are read as nothing, or copies
that are read in parts summing to one.
"""

import math
from collections.abc import Sequence

import torch

from growkit.growth.families.table import size_of
from growkit.growth.spaces import (
    Copy,
    Dense,
    Extension,
    HeadStructured,
    HeadTop,
    Identity,
    IdentityTop,
    Map,
    Noise,
    Terms,
)
from growkit.growth.starts import Growth, Random, source_layers


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
        maps[side] = _top(C / C.sum(-1, keepdim=True))
    return maps


def _structured(growth, sides, layers, layered, random):
    stream = _copied(growth, growth.small["residual"], growth.big["residual"], random)
    maps = _residual(growth, stream, random)
    for space in growth.family.hidden:
        if space != "head":
            maps |= _hidden(growth, space, layers if space in layered else (), space in layered, random)
    if "head_write" in sides:
        maps |= _normed_head(growth, stream, random)
    if growth.family.experts:
        maps |= _experts(growth, random)
    maps |= _attention(growth, layers, random)
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


def _copied(growth, old, new, random):
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


def _top(C, scale=1.0):
    """scale * [I; C]"""
    plain = isinstance(scale, float) and scale == 1.0
    return Identity(C.shape[-1]) if plain and not C.shape[-2] else IdentityTop(C, scale)


def _shares(index, small, random=None):
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


def _told_apart(growth, read, index, old, random, inside=None):
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


def _residual(growth, index, random):
    """index: old coordinate of each new one, where they are copies."""
    D1, D2 = growth.small["residual"], growth.big["residual"]
    new, dtype = (D2 - D1, D1), random.dtype
    zeros, mean = torch.zeros(new, dtype=dtype), torch.full(new, 1 / D1, dtype=dtype)
    multiplied = growth.family.residual.multiplier(D1) / growth.family.residual.multiplier(D2)
    if growth.copied and (D2 % D1 == 0 or growth.start.width == "next"):
        # A tied head reads every copy whole, so its norm is divided instead.
        whole, shares = torch.eye(D1, dtype=dtype)[index[D1:]], _shares(index, D1).to(dtype)
        sides = ("residual_write", "residual_gain", "residual_shift", "branch_write")
        maps = {side: _top(whole.clone()) for side in sides}
        maps["embedded_write"] = _top(whole.clone(), multiplied)
        maps["branch_gain"] = _top(whole.clone(), _branch_scale(growth, D2, random))
        for side in ("residual_read", "head_read"):
            maps[side] = _told_apart(growth, _top(whole.clone(), _scale(shares)), index, D1, random)
        for role in ("gain", "shift"):
            maps[f"head_{role}"] = _top(whole.clone(), _scale(shares / multiplied) if growth.tied else 1.0)
        return maps
    if growth.family.residual.post_norm:  # near: the mean is kept, the variance is not
        maps = {f"residual_{role}": _top(mean.clone()) for role in ("write", "shift")}
        maps["residual_gain"] = _top(random.normal(*new), math.sqrt(D1 / D2))
        maps["residual_read"] = _top(zeros.clone())
        return maps | {f"head_{role}": _top(zeros.clone()) for role in ("read", "gain", "shift")}
    # LayerNorm: new coordinates carry the mean of the old ones (LEMON, arXiv:2310.07999), RMSNorm: zero. Either way
    # they leave the norm as 0 times the gain, and a stream that is longer by k has the statistics it had.
    k = math.sqrt(D2 / D1)
    centred = growth.family.residual.norm == "layer" and growth.start.width != "zeros"
    unread = growth.family.residual.norm == "layer"  # where the shift reaches new coordinates, nothing may read them
    read = zeros if unread else random.normal(*new)
    written = mean if centred else zeros
    tied = k * k * multiplied if growth.tied else k  # the tied head is the embedding, longer by itself
    maps = {
        "residual_write": _top(written.clone(), k),
        "embedded_write": _top(written.clone(), k * multiplied),
        "branch_write": _top(written.clone(), k),
        "branch_gain": _top(random.normal(*new), _branch_scale(growth, D1, random)),  # k times as long already
        "residual_read": _top(read.clone(), 1 / k if growth.family.residual.bare else 1.0),
        "residual_gain": _top(random.normal(*new), 1 / k),
        "residual_shift": _top(random.normal(*new)),
        "head_read": _top(zeros.clone() if unread else random.normal(*new)),
        "head_gain": _top(random.normal(*new), 1 / tied),
        "head_shift": _top(zeros.clone(), k / tied) if growth.tied else _top(random.normal(*new)),
    }
    return maps


def _scale(shares):
    """One number where all parts are equal, as without copies."""
    return float(shares[0]) if bool((shares == shares[0]).all()) else shares


def _layered_scale(growth, index, shares):
    """[L2, large] `shares` in layers that stay; in layers that skip, parts that sum to 0.

    There nothing would tell copies apart that are read as zero.
    """
    skips = _skips(growth)
    if not skips.any() or growth.family.branched:
        return _scale(shares)
    return torch.where(skips[:, None], shares - 1 / torch.bincount(index)[index].to(shares.dtype), shares)


def _branch_scale(growth, zeros, random):
    """In layers that skip, the norm of what they add has no gain in the first `zeros` coordinates; others have nothing
    to scale yet, and need a gain to learn."""
    skips = _skips(growth)
    if not skips.any():
        return 1.0
    scale = torch.ones(len(skips), growth.big["residual"], dtype=random.dtype)
    scale[skips, :zeros] = 0.0
    return scale


def _skips(growth):
    """Which large layers add nothing at first."""
    if growth.start.depth != "skip":
        return torch.zeros(growth.big["layers"], dtype=torch.bool)
    source = source_layers(growth.start.depth, growth.small["layers"], growth.big["layers"])
    return torch.tensor([t > 0 and source[t - 1] == s for t, s in enumerate(source)])


def _hidden(growth, space, layers, layered, random):
    """Units that act one by one: any new ones will do that nothing reads, or copies read in parts."""
    F1, F2 = growth.small[space], growth.big[space]
    if growth.start.copies:
        index = _copied(growth, F1, F2, random)
        C = torch.eye(F1, dtype=random.dtype)[index[F1:]].expand(*layers, -1, -1)
        shares = _shares(index, F1, random if growth.start.width == "split" else None).to(random.dtype)
        scale = _layered_scale(growth, index, shares) if layered and growth.start.cancels else _scale(shares)
        read = _told_apart(growth, _top(C.clone(), scale), index, F1, random)
        return {f"{space}_write": _top(C.clone()), f"{space}_read": read}
    zeros = torch.zeros(*layers, F2 - F1, F1, dtype=random.dtype)
    return {f"{space}_write": _top(random.normal(*layers, F2 - F1, F1)), f"{space}_read": _top(zeros)}


def _experts(growth, random):
    """Copies of experts and of their router's rows. Each gets 1/c of the weight that one of c copies had, if the router
    chooses c times as many, so that what the copies make is made c times as large, in unequal parts."""
    E1, E2 = growth.small["expert"], growth.big["expert"]
    if E1 == E2:
        return {"expert_write": Identity(E1), "expert_read": Identity(E1)}
    index = _copied(growth, E1, E2, random)
    count = torch.bincount(index)[index]
    shares = _shares(index, E1, random if growth.start.width == "split" else None).to(random.dtype)
    parts = count * torch.as_tensor(_layered_scale(growth, index, shares), dtype=random.dtype)
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
        maps = {f"head_{role}": _top(zeros.clone() if growth.tied else chosen.clone()) for role in ("gain", "shift")}
        return maps | {"head_write": _top(chosen.clone()), "head_read": _top(zeros.clone())}
    index = stream if growth.tied else _copied(growth, H1, H2, random)
    whole, shares = eye[index[H1:]], _scale(_shares(index, H1).to(dtype))
    maps = {f"head_{role}": _top(whole.clone(), shares if growth.tied else 1.0) for role in ("gain", "shift")}
    read = _told_apart(growth, _top(whole.clone(), shares), index, H1, random)
    return maps | {"head_write": _top(whole.clone()), "head_read": read}


def rotary_dims(growth: Growth, head_dim: int) -> int:
    """Dimensions of a head that are rotated."""
    rotary = growth.family.attention.rotary
    return int(head_dim * (rotary(growth.config) if callable(rotary) else rotary))


def groups_fit(g1: int, H2: int, K2: int, K1: int) -> bool:
    """Whether every old group of g1 queries finds a place with a key and value of its own."""
    return K1 * -(-g1 // (H2 // K2)) <= K2


def _placed(growth):
    """For every new key and value head, and for every new query head, the old one it holds; -1 is none.

    A query finds its key and value by its group: old groups come first, cut in several where new ones are smaller. The
    last queries of a group are lost where there are too few new ones.
    """
    H1, K1, H2, K2 = (sizes[name] for sizes in (growth.small, growth.big) for name in ("heads", "kv_heads"))
    g1, g2 = H1 // K1, H2 // K2
    cuts = [min(-(-g1 // g2), -(-(K2 - k) // K1)) for k in range(K1)]
    keys = [k for k in range(K1) for _ in range(cuts[k])]
    cut = [c for k in range(K1) for c in range(cuts[k])]
    queries = []
    for h in range(H2):
        k, r = h // g2, h % g2
        r += cut[k] * g2 if k < len(keys) else 0
        queries.append(keys[k] * g1 + r if k < len(keys) and r < g1 else -1)
    return keys + [-1] * (K2 - len(keys)), queries


def _attention(growth, layers, random):
    family, small, big = growth.family, growth.small, growth.big
    H1, H2, K1, d1, d2 = small["heads"], big["heads"], small["kv_heads"], small["head_dim"], big["head_dim"]
    (keys, queries), read_scale = _placed(growth), 1.0
    if growth.copied_heads:
        g1, g2 = H1 // K1, H2 // big["kv_heads"]
        keys = [keys[j] for j in _copied(growth, sum(k >= 0 for k in keys), len(keys), random).tolist()]
        within = _copied(growth, g1, g2, random).tolist()
        queries = [q if q >= 0 else keys[h // g2] * g1 + within[h % g2] for h, q in enumerate(queries)]
        index = torch.tensor(queries)
        shares = _shares(index, H1, random if growth.start.width == "split" else None).to(random.dtype)
        read_scale = _layered_scale(growth, index, shares) if growth.start.cancels else _scale(shares)
        if isinstance(read_scale, torch.Tensor):
            read_scale = read_scale.repeat_interleave(d2, -1)
    slots = _slots(growth, d1, d2)
    same = torch.eye(d1, dtype=random.dtype)[slots] * (slots >= 0)[:, None]  # [d2, d1], new dimensions zero
    fresh = same + (slots < 0)[:, None] * random.normal(d2, d1)
    # Scores are divided by sqrt(head_dim). New query dimensions are zero, new key dimensions are not: both zero would
    # leave both without gradient.
    scaled = family.attention.scaled
    if isinstance(scaled, str):
        scaled = getattr(growth.config, scaled, True)
    scale = math.sqrt(d2 / d1) if scaled else 1.0
    rotary = bool(rotary_dims(growth, d1))

    def heads(placed, old, R, scale=1.0, unread=False):
        """Old heads where they are placed; others are random, or nothing."""
        first = placed[:old] == list(range(old)) and d1 == d2
        if first and not rotary and -1 in placed[old:] and not unread:  # new heads mix all old coordinates
            return _top(random.normal(*layers, (len(placed) - old) * d1, old * d1), scale)
        P = torch.zeros(len(placed), old, dtype=random.dtype)
        for new, source in enumerate(placed):
            if source >= 0:
                P[new, source] = 1.0
            elif not unread:
                P[new] = random.normal(old)
        if first:
            if not rotary:
                return _top(torch.kron(P[old:], torch.eye(d1, dtype=P.dtype)).expand(*layers, -1, -1).clone(), scale)
            C = P[old:].expand(*layers, -1, -1).clone()
            return HeadTop(C, d1, scale) if len(placed) > old else _top(P.new_empty(0, old * d1), scale)
        if d1 == d2:
            return HeadStructured(P.expand(*layers, -1, -1).clone(), d1, scale)
        return HeadStructured(*(M.expand(*layers, -1, -1).clone() for M in (P, R)), scale)

    maps = {
        "query_write": heads(queries, H1, same, scale),
        "key_write": heads(keys, K1, fresh),
        "value_write": heads(keys, K1, fresh),
        "value_read": heads(queries, H1, same, read_scale, unread=True),
    }
    for space, placed, old in (("query", queries, H1), ("key", keys, K1)):
        maps[f"{space}_gains"] = heads(placed, old, same)
    if growth.copied_heads:
        maps["value_read"] = _told_apart(growth, maps["value_read"], index, H1, random, same)
    for side in ("query_gain", "key_gain"):
        maps[side] = Identity(d1) if d1 == d2 else IdentityTop(random.normal(d2 - d1, d1))
    return maps


def _slots(growth, d1, d2):
    """For every dimension of a new head the old one it holds, -1 for none.

    Rotated dimensions are pairs (j, j + half) of one frequency, theta^(-j / half): in a head m times as large the
    frequency stands at m j.
    """
    slots = torch.full((d2,), -1)
    rotated, grown = rotary_dims(growth, d1), rotary_dims(growth, d2)
    for j in range(rotated // 2):
        new = round(j * grown / rotated) if rotated else j
        slots[new], slots[new + grown // 2] = j, j + rotated // 2
    for j in range(rotated, d1):
        slots[grown + j - rotated] = j
    return slots
