"""Maps of attention heads: where old ones go, so that queries find their keys, and dimensions their frequencies."""

import math
from collections.abc import Sequence

import torch

from growkit.growth.copies import copy_index, layered_scale, scale_of, shares_of, told_apart, top
from growkit.growth.spaces import Dense, HeadStructured, HeadTop, Identity, Map
from growkit.growth.starts import Growth, Random


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


def attention_maps(growth: Growth, layers: Sequence[int], random: Random) -> dict[str, Map]:
    """Maps of queries, keys and values; layers: leading dimensions of maps that layers do not share."""
    family, small, big = growth.family, growth.small, growth.big
    H1, H2, K1, d1, d2 = small["heads"], big["heads"], small["kv_heads"], small["head_dim"], big["head_dim"]
    (keys, queries), read_scale = _placed(growth), 1.0
    if growth.copied_heads:
        g1, g2 = H1 // K1, H2 // big["kv_heads"]
        keys = [keys[j] for j in copy_index(growth, sum(k >= 0 for k in keys), len(keys), random).tolist()]
        within = copy_index(growth, g1, g2, random).tolist()
        queries = [q if q >= 0 else keys[h // g2] * g1 + within[h % g2] for h, q in enumerate(queries)]
        index = torch.tensor(queries)
        shares = shares_of(index, H1, random if growth.start.width == "split" else None).to(random.dtype)
        read_scale = layered_scale(growth, index, shares) if growth.start.cancels else scale_of(shares)
        if isinstance(read_scale, torch.Tensor):
            read_scale = read_scale.repeat_interleave(d2, -1)
    slots = _slots(growth, d1, d2)
    same = torch.eye(d1, dtype=random.dtype)[slots] * (slots >= 0)[:, None]  # [d2, d1], new dimensions zero
    fresh = same + (slots < 0)[:, None] * random.normal(d2, d1)
    normed = family.attention.normed == "head_dim" and d2 > d1
    every = torch.eye(d1, dtype=random.dtype)[_copies(growth, d1, d2)] if normed and d2 % d1 == 0 else fresh
    # Scores are divided by sqrt(head_dim). New query dimensions are zero, new key dimensions are not: both zero would
    # leave both without gradient.
    scaled = family.attention.scaled
    if isinstance(scaled, str):
        scaled = getattr(growth.config, scaled, True)
    longer = math.sqrt(d2 / d1)
    scale = longer if scaled or normed else 1.0
    rotary = bool(rotary_dims(growth, d1))

    def heads(placed, old, R, scale=1.0, unread=False):
        """Old heads where they are placed; others are random, or nothing."""
        first = placed[:old] == list(range(old)) and d1 == d2
        if first and not rotary and -1 in placed[old:] and not unread:  # new heads mix all old coordinates
            return top(random.normal(*layers, (len(placed) - old) * d1, old * d1), scale)
        P = torch.zeros(len(placed), old, dtype=random.dtype)
        for new, source in enumerate(placed):
            if source >= 0:
                P[new, source] = 1.0
            elif not unread:
                P[new] = random.normal(old)
        if first:
            if not rotary:
                return top(torch.kron(P[old:], torch.eye(d1, dtype=P.dtype)).expand(*layers, -1, -1).clone(), scale)
            C = P[old:].expand(*layers, -1, -1).clone()
            return HeadTop(C, d1, scale) if len(placed) > old else top(P.new_empty(0, old * d1), scale)
        if d1 == d2:
            return HeadStructured(P.expand(*layers, -1, -1).clone(), d1, scale)
        return HeadStructured(*(M.expand(*layers, -1, -1).clone() for M in (P, R)), scale)

    maps = {
        "query_write": heads(queries, H1, same, scale),
        "key_write": heads(keys, K1, every),
        "value_write": heads(keys, K1, fresh),
        "value_read": heads(queries, H1, same, read_scale, unread=True),
    }
    for space, placed, old in (("query", queries, H1), ("key", keys, K1)):
        maps[f"{space}_gains"] = heads(placed, old, same)
    if growth.copied_heads:
        maps["value_read"] = told_apart(growth, maps["value_read"], index, H1, random, same)
    maps["key_gain"] = Dense(every.clone()) if normed else Identity(d1)
    maps["query_gain"] = Dense(every.clone(), 1.0 if scaled else 1 / longer) if normed else Identity(d1)
    return maps


def _copies(growth, d1, d2):
    """For every dimension of a new head the old one that a normed key holds there, each as often as any other.

    The mean square over a head is then what it was; of queries, which are zero but in the slots of old frequencies and
    longer by sqrt(d2/d1), too.
    """
    index = _slots(growth, d1, d2)
    grown, times = rotary_dims(growth, d2), d2 // d1
    half = grown // 2
    pairs = torch.arange(half) // times * times  # the old frequency at or before each
    index[:grown] = torch.cat([index[pairs], index[half + pairs]])
    index[grown:] = index[grown : grown + (d2 - grown) // times].repeat(times)
    return index


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
