"""Why a growth cannot be lossless, known from sizes alone."""

from collections.abc import Mapping
from typing import Any

from growkit.growth.families.table import Family
from growkit.growth.heads import groups_fit, rotary_dims
from growkit.growth.starts import Growth, Start


def refuse_layers(family: Family, L1: int, L2: int, start: Start) -> None:
    """ValueError where the start has no layers enough; before each large layer is given a small one."""
    if start.depth == "overlap" and L2 > 2 * L1:
        raise ValueError(
            f"big_config.{family.layers.field}: two overlapping copies of {L1} layers make at most {2 * L1}: got {L2}"
        )


def refuse(family: Family, small: Mapping[str, int], big: Mapping[str, int], config: Any) -> None:
    """ValueError, naming a field and the nearest size, for what there is no growth of any kind to."""
    fields = {name: size.field for name, size in family.fields().items()}
    if big["head_dim"] != small["head_dim"] and "longrope" in _scalings(config):
        field = fields.get("head_dim", fields["heads"])
        raise ValueError(
            f"big_config.{field}: rope_type 'longrope' has a factor for each frequency of a head: "
            f"got {big['head_dim']}, nearest {small['head_dim']}"
        )


def obstacles(growth: Growth, tolerance: float) -> list[str]:
    """Why this growth cannot keep the function, each naming a field and the nearest size that would."""
    family, small, big, start, config, *_ = growth
    fields, found = {name: size.field for name, size in family.fields().items()}, []
    if start.width == "mixed":
        found.append("the published start mixes neurons and layers at random")
    if start.width == "next" and any(growth.from_next(side) for side in ("residual_write", "query_write", "ffn_write")):
        found.append("new coordinates are written by the next layer's weights, and read as copies of this one's")
    if start.depth in ("stack", "interpolate", "overlap") and big["layers"] > small["layers"]:
        found.append(
            f"{fields['layers']}: layers that are there twice add to the stream twice: nearest {small['layers']}"
        )
    if start.width == "none":
        widths = {field: (small[name], big[name]) for name, field in fields.items() if name not in family.tables}
        for field, (old, new) in widths.items():
            if field != fields["layers"] and new != old:
                found.append(f"{field}: this start grows in depth only: got {new}, nearest {old}")
    if start.width == "doubled":
        found += _doubling_words(family, fields, small, big)
    elif growth.copied and big["residual"] % small["residual"]:
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
    if not groups_fit(small["heads"] // small["kv_heads"], big["heads"], big["kv_heads"], small["kv_heads"]):
        found.append(_grouping_words(fields, small, big))
    if family.attention.normed == "heads":
        found += [
            f"{fields[name]}: a norm over all heads keeps what it finds only of whole copies: got {big[name]}, nearest "
            f"{max(1, round(big[name] / small[name])) * small[name]}"
            for name in ("heads", "kv_heads")
            if big[name] % small[name]
        ]
    if big["head_dim"] != small["head_dim"]:
        field = fields.get("head_dim", fields["heads"])
        got = f"got {big['head_dim']}, nearest {small['head_dim']}"
        rotated, grown = (rotary_dims(growth, sizes["head_dim"]) for sizes in (small, big))
        times = big["head_dim"] // small["head_dim"]
        if family.attention.normed == "heads":
            found.append(f"{field}: heads whose queries and keys are normed together keep their size: {got}")
        elif (rotated or family.attention.normed) and (
            big["head_dim"] != times * small["head_dim"] or grown != times * rotated
        ):
            nearest = max(1, round(big["head_dim"] / small["head_dim"])) * small["head_dim"]
            found.append(
                f"{field}: rotary frequencies, and norms of queries and keys, stay only in heads of a multiple of "
                f"{small['head_dim']}: got {big['head_dim']}, nearest {nearest}"
            )
        if rotated:
            found += _frequency_words(field, got, config)
    if family.experts:
        found += _expert_words(fields, small, big)
    return found


def _expert_words(fields, small, big):
    """A router chooses among copies as it did among experts only if there are as many of all, and all are chosen."""
    old, new = small["expert"], big["expert"]
    if new % old:
        nearest = max(1, round(new / old)) * old
        return [f"{fields['expert']}: experts are copied all alike: got {new}, nearest {nearest}"]
    if big["chosen"] * old != small["chosen"] * new:
        return [
            f"{fields['chosen']}: of {old} experts {small['chosen']} are chosen, so of {new // old} copies of each as "
            f"many times more: got {big['chosen']}, nearest {small['chosen'] * new // old}"
        ]
    return []


def _doubling_words(family, fields, small, big):
    """Two copies side by side have twice of everything but what is looked up, and heads of the same size."""
    apart = {"layers", "head_dim", "expert", "chosen", *family.tables}
    widths = {field: (small[name], big[name]) for name, field in fields.items() if name not in apart}
    if all(old == new for old, new in widths.values()):
        return []
    return [
        f"{field}: two copies side by side are twice as wide in everything: got {new}, nearest {2 * old}"
        for field, (old, new) in widths.items()
        if new != 2 * old
    ]


def _frequency_words(field, got, config):
    """Frequencies theta^(-j / half) stay in larger heads, and so does what a scaling makes of each by itself."""
    kinds = _scalings(config) - {"default", "linear", "llama3"}
    return [f"{field}: rope_type {kind!r} scales frequencies by the size of a head: {got}" for kind in sorted(kinds)]


def _scalings(config):
    rope = getattr(config, "rope_parameters", None) or {}
    return {each.get("rope_type", "default") for each in rope.values() if isinstance(each, dict)} or {
        rope.get("rope_type", "default")
    }


def _grouping_words(fields, small, big):
    g1, heads = small["heads"] // small["kv_heads"], big["heads"]
    fit = [K for K in range(1, heads + 1) if heads % K == 0 and groups_fit(g1, heads, K, small["kv_heads"])]
    nearest = min(fit, key=lambda K: abs(K - big["kv_heads"]), default=None)
    return (
        f"{fields['kv_heads']}: {small['kv_heads']} groups of {g1} queries find no place in {big['kv_heads']} groups "
        f"of {heads // big['kv_heads']}: got {big['kv_heads']}, nearest {nearest}"
    )
