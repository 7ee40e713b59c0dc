"""Where an operator starts: maps of every space and depth vectors of every module, from a family's table and sizes.

Widening adds coordinates that write what leaves the norm's statistics as they are and are read as nothing, or copies
that are read in parts summing to one. Deepening adds copies of layers that add nothing to the stream, or plain copies.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from growkit.growth.families.table import Family, size_of
from growkit.growth.spaces import Copy, Extension, HeadStructured, HeadTop, Identity, IdentityTop, Map


class Start(NamedTuple):
    """width: what new coordinates are: "new" (random where unread), "copies", "split" (copies read in random parts),
    "zeros" (as new, but the stream is padded with zeros whatever its norm), "mixed" (random rows, tied), "none".
    depth: what new layers are: "skip" (copies that add nothing), "stack", "interpolate", "overlap", "noisy".
    lossless: whether a growth that cannot keep the function is refused.
    """

    width: str
    depth: str
    lossless: bool = False


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
}


class Growth(NamedTuple):
    """One growth, as everything here needs it: what grows, from what to what, and how it starts.

    eps: of the norms. tied: whether the output layer is the embedding.
    """

    family: Family
    small: Mapping[str, int]
    big: Mapping[str, int]
    start: Start
    config: object
    tied: bool

    @property
    def copied(self) -> bool:
        """Whether the residual stream is widened by copies of itself."""
        return self.start.width == "copies" or bool(self.family.residual.post_norm)

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


def source_layers(depth: str, L1: int, L2: int) -> list[int]:
    """Small layer that every large one resembles."""
    if depth in ("stack", "noisy"):
        return [t % L1 for t in range(L2)]
    if depth == "overlap":  # SOLAR, arXiv:2312.15166: the bottom part, then the top part
        bottom = -(-L2 // 2)
        return [*range(bottom), *range(L1 - (L2 - bottom), L1)] if L1 < L2 else list(range(L1))
    return [t * L1 // L2 for t in range(L2)]


def obstacles(growth: Growth, tolerance: float) -> list[str]:
    """Why this growth cannot keep the function, each naming a field and the nearest size that would."""
    family, small, big, start, config, _ = growth
    fields, found = {name: size.field for name, size in family.fields().items()}, []
    if start.width == "none":
        widths = {field: (small[name], big[name]) for name, field in fields.items() if name not in family.tables}
        for field, (old, new) in widths.items():
            if field != fields["layers"] and new != old:
                found.append(f"{field}: this start grows in depth only: got {new}, nearest {old}")
    if growth.copied and big["residual"] % small["residual"]:
        nearest = max(1, round(growth.ratio)) * small["residual"]
        why = "a post-LN model" if family.residual.post_norm else "growth by copies"
        found.append(
            f"{fields['residual']}: {why} keeps its function only if {fields['residual']} is a multiple of "
            f"{small['residual']}: got {big['residual']}, nearest {nearest}"
        )
    if start.width == "zeros" and family.residual.norm == "layer" and growth.ratio > 1:
        found.append(
            f"{fields['residual']}: zeros shift the mean that LayerNorm subtracts, nearest {small['residual']}"
        )
    eps = getattr(config, family.residual.eps, 0.0)
    if family.residual.post_norm and big["layers"] > small["layers"] and eps > tolerance:
        found.append(
            f"{fields['layers']}: a new post-LN layer divides once more by sqrt(variance + {family.residual.eps}), "
            f"which at {eps:g} is above the {tolerance:g} that is asked of this dtype: got {big['layers']}, "
            f"nearest {small['layers']}"
        )
    if not _groups_fit(small["heads"] // small["kv_heads"], big["heads"], big["kv_heads"], small["kv_heads"]):
        found.append(_grouping_words(fields, small, big))
    if big["head_dim"] != small["head_dim"]:
        field = fields.get("head_dim", fields["heads"])
        got = f"got {big['head_dim']}, nearest {small['head_dim']}"
        if family.attention.normed:
            found.append(f"{field}: heads whose queries and keys are normed keep their size: {got}")
        elif rotated := _rotated(growth, small["head_dim"]):
            grown = _rotated(growth, big["head_dim"])
            if grown % rotated or grown // rotated * small["head_dim"] != big["head_dim"]:
                nearest = max(1, round(big["head_dim"] / small["head_dim"])) * small["head_dim"]
                found.append(
                    f"{field}: rotary frequencies stay only in heads of a multiple of {small['head_dim']}: "
                    f"got {big['head_dim']}, nearest {nearest}"
                )
    if start.depth == "overlap" and big["layers"] > 2 * small["layers"]:
        raise ValueError(
            f"big_config.{fields['layers']}: two overlapping copies of {small['layers']} layers make at most "
            f"{2 * small['layers']}: got {big['layers']}"
        )
    return found


def width_maps(
    growth: Growth, sides: set[str], layers: Sequence[int], layered: set[str], random: Random
) -> dict[str, Map]:
    """A map for every side.

    layers: leading dimensions of maps that layers do not share, for heads and the spaces in `layered`.
    """
    mixing = {side for side in sides if side.partition("_")[0] not in growth.family.tables}
    build = _mixed if growth.start.width == "mixed" else _structured
    maps = build(growth, mixing, layers, layered, random)
    for space in growth.family.tables:  # new rows leave the old ones alone, whatever the start
        old, new = growth.small[space], growth.big[space]
        if new != old:
            copied = Copy(torch.arange(new) % old, old) if space == "positions" else Extension(old, new)
            maps[f"{space}_write"] = copied
    return {side: maps[side] for side in sides if side in maps}


def ties(growth: Growth, sides: set[str]) -> dict[str, str]:
    """Of the published start, A = B: what reads a space, or normalises it, uses the map of what writes it."""
    if growth.start.width != "mixed":
        return {}
    head = "head_write" if "head_write" in sides and not growth.tied else "residual_write"
    found = {}
    for side in sides:
        space, _, role = side.partition("_")
        writer = head if space == "head" else f"{space}_write"
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
    maps = _residual(growth, random)
    for space in growth.family.hidden:
        if space != "head":
            maps |= _hidden(growth, space, layers if space in layered else (), space in layered, random)
    if "head_write" in sides:
        maps |= _normed_head(growth, random)
    return maps | _attention(growth, layers, random)


def _top(C, scale=1.0):
    """scale * [I; C]"""
    return (
        IdentityTop(C, scale) if C.shape[-2] or not isinstance(scale, float) or scale != 1.0 else Identity(C.shape[-1])
    )


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


def _residual(growth, random):
    D1, D2 = growth.small["residual"], growth.big["residual"]
    new, dtype = (D2 - D1, D1), random.dtype
    zeros, mean = torch.zeros(new, dtype=dtype), torch.full(new, 1 / D1, dtype=dtype)
    if growth.copied and D2 % D1 == 0:
        # A tied head reads every copy whole, so its norm is divided instead.
        index = torch.arange(D2) % D1
        whole, shares = torch.eye(D1, dtype=dtype)[index[D1:]], _shares(index, D1).to(dtype)
        maps = {f"residual_{role}": _top(whole.clone()) for role in ("write", "gain", "shift")}
        maps["residual_read"] = _top(whole.clone(), _scale(shares))
        maps["head_read"] = _top(whole.clone(), _scale(shares))
        for role in ("gain", "shift"):
            maps[f"head_{role}"] = _top(whole.clone(), _scale(shares) if growth.tied else 1.0)
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
    maps = {
        "residual_write": _top(mean.clone() if centred else zeros.clone(), k),
        "residual_read": _top(read.clone()),
        "residual_gain": _top(random.normal(*new), 1 / k),
        "residual_shift": _top(random.normal(*new)),
        "head_read": _top(zeros.clone() if unread else random.normal(*new)),
        # The tied head is the embedding, k times longer.
        "head_gain": _top(random.normal(*new), 1 / k**2 if growth.tied else 1 / k),
        "head_shift": _top(zeros.clone(), 1 / k) if growth.tied else _top(random.normal(*new)),
    }
    return maps


def _scale(shares):
    """One number where all parts are equal, as without copies."""
    return float(shares[0]) if bool((shares == shares[0]).all()) else shares


def _layered_scale(growth, index, shares):
    """[L2, large] `shares` in layers that stay; in layers that skip, parts that sum to 0.

    There nothing would tell copies apart that are read as zero.
    """
    source = source_layers(growth.start.depth, growth.small["layers"], growth.big["layers"])
    skips = torch.tensor([t > 0 and source[t - 1] == s for t, s in enumerate(source)])
    if not skips.any():
        return _scale(shares)
    return torch.where(skips[:, None], shares - 1 / torch.bincount(index)[index].to(shares.dtype), shares)


def _hidden(growth, space, layers, layered, random):
    """Units that act one by one: any new ones will do that nothing reads, or copies read in parts."""
    F1, F2 = growth.small[space], growth.big[space]
    if growth.start.width in ("copies", "split"):
        index = torch.arange(F2) % F1
        C = torch.eye(F1, dtype=random.dtype)[index[F1:]].expand(*layers, -1, -1)
        shares = _shares(index, F1, random if growth.start.width == "split" else None).to(random.dtype)
        scale = _layered_scale(growth, index, shares) if layered else _scale(shares)
        return {f"{space}_write": _top(C.clone()), f"{space}_read": _top(C.clone(), scale)}
    zeros = torch.zeros(*layers, F2 - F1, F1, dtype=random.dtype)
    return {f"{space}_write": _top(random.normal(*layers, F2 - F1, F1)), f"{space}_read": _top(zeros)}


def _normed_head(growth, random):
    """The MLM head's own units have a norm: copies keep its statistics, an even selection nearly does."""
    H1, H2, dtype = growth.small["head"], growth.big["head"], random.dtype
    eye = torch.eye(H1, dtype=dtype)
    if H2 % H1:
        chosen = eye[torch.arange(H2 - H1) * H1 // (H2 - H1) % H1]
        zeros = torch.zeros_like(chosen)
        maps = {f"head_{role}": _top(zeros.clone() if growth.tied else chosen.clone()) for role in ("gain", "shift")}
        return maps | {"head_write": _top(chosen.clone()), "head_read": _top(zeros.clone())}
    index = torch.arange(H2) % H1
    whole, shares = eye[index[H1:]], _scale(_shares(index, H1).to(dtype))
    maps = {f"head_{role}": _top(whole.clone(), shares if growth.tied else 1.0) for role in ("gain", "shift")}
    return maps | {"head_write": _top(whole.clone()), "head_read": _top(whole.clone(), shares)}


def _rotated(growth, head_dim):
    """Dimensions of a head that are rotated."""
    rotary = growth.family.attention.rotary
    return int(head_dim * (rotary(growth.config) if callable(rotary) else rotary))


def _groups_fit(g1, H2, K2, K1):
    """Whether every old group of g1 queries finds a place with a key and value of its own."""
    return K1 * -(-g1 // (H2 // K2)) <= K2


def _grouping_words(fields, small, big):
    g1, heads = small["heads"] // small["kv_heads"], big["heads"]
    fit = [K for K in range(1, heads + 1) if heads % K == 0 and _groups_fit(g1, heads, K, small["kv_heads"])]
    nearest = min(fit, key=lambda K: abs(K - big["kv_heads"]), default=None)
    return (
        f"{fields['kv_heads']}: {small['kv_heads']} groups of {g1} queries find no place in {big['kv_heads']} groups "
        f"of {heads // big['kv_heads']}: got {big['kv_heads']}, nearest {nearest}"
    )


def _placed(growth):
    """For every new key and value head, and for every new query head, the old one it holds; -1 is none.

    A query finds its key and value by its group: old groups come first, cut in several where new ones are smaller.
    """
    H1, K1, H2, K2 = (sizes[name] for sizes in (growth.small, growth.big) for name in ("heads", "kv_heads"))
    g1, g2 = H1 // K1, H2 // K2
    if not _groups_fit(g1, H2, K2, K1):  # nearest: every head by its number
        return [k if k < K1 else -1 for k in range(K2)], [h if h < H1 else -1 for h in range(H2)]
    cuts = -(-g1 // g2)
    keys = [k // cuts if k < K1 * cuts else -1 for k in range(K2)]
    queries = []
    for h in range(H2):
        k, r = h // g2, h % g2
        r += (k % cuts) * g2
        queries.append(keys[k] * g1 + r if keys[k] >= 0 and r < g1 else -1)
    return keys, queries


def _attention(growth, layers, random):
    family, small, big = growth.family, growth.small, growth.big
    H1, H2, K1, d1, d2 = small["heads"], big["heads"], small["kv_heads"], small["head_dim"], big["head_dim"]
    (keys, queries), read_scale = _placed(growth), 1.0
    if growth.start.width in ("copies", "split"):
        g1, g2 = H1 // K1, H2 // big["kv_heads"]
        firsts = sum(k >= 0 for k in keys)
        keys = [k if k >= 0 else keys[j % firsts] for j, k in enumerate(keys)]
        queries = [q if q >= 0 else keys[h // g2] * g1 + h % g2 % g1 for h, q in enumerate(queries)]
        index = torch.tensor(queries)
        shares = _shares(index, H1, random if growth.start.width == "split" else None).to(random.dtype)
        read_scale = _layered_scale(growth, index, shares)
        if isinstance(read_scale, torch.Tensor):
            read_scale = read_scale.repeat_interleave(d2, -1)
    slots = _slots(growth, d1, d2)
    same = torch.eye(d1, dtype=random.dtype)[slots] * (slots >= 0)[:, None]  # [d2, d1], new dimensions zero
    fresh = same + (slots < 0)[:, None] * random.normal(d2, d1)
    # Scores are divided by sqrt(head_dim). New query dimensions are zero, new key dimensions are not: both zero would
    # leave both without gradient.
    scaled = getattr(growth.config, family.attention.scaled, True) if family.attention.scaled else True
    scale = math.sqrt(d2 / d1) if scaled else 1.0
    rotary = bool(_rotated(growth, d1))

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
    for side in ("query_gain", "key_gain"):
        maps[side] = Identity(d1) if d1 == d2 else IdentityTop(random.normal(d2 - d1, d1))
    return maps


def _slots(growth, d1, d2):
    """For every dimension of a new head the old one it holds, -1 for none.

    Rotated dimensions are pairs (j, j + half) of one frequency, theta^(-j / half): in a head m times as large the
    frequency stands at m j.
    """
    slots = torch.full((d2,), -1)
    rotated, grown = _rotated(growth, d1), _rotated(growth, d2)
    for j in range(rotated // 2):
        new = round(j * grown / rotated) if rotated else j
        slots[new], slots[new + grown // 2] = j, j + rotated // 2
    for j in range(rotated, d1):
        slots[grown + j - rotated] = j
    return slots


def depth_map(growth: Growth, pattern: str, sides: Sequence[str | None], random: Random) -> torch.Tensor:
    """w [L2, L1] of one layered parameter; [L2, L1+1] where the last column is for a layer of ones.

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
        copies = reads and growth.start.width in ("copies", "split")
        keep = first if skip and "residual_write" in sides and not copies else [True] * L2
    for t, s in enumerate(source):
        if keep[t]:
            w[t, s] = 1.0
        elif w.shape[1] > L1:
            w[t, L1] = 1.0
    if "query_write" in sides and getattr(growth.config, family.attention.layer_scaled or "", False):
        w *= torch.tensor([[(t + 1) / (s + 1)] for t, s in enumerate(source)], dtype=w.dtype)
    return w


def _stack_noisy(L1, L2, random):
    """The published `stackbert_noisy`: U(0, 0.03), 1 at l2 mod L1, rows divided by their sum."""
    w = 0.03 * random.uniform(L2, L1)
    w[torch.arange(L2), torch.arange(L2) % L1] = 1.0
    return w / w.sum(1, keepdim=True)
