"""Sizes of a model to grow into: asked for by the words of the command line, or proposed for a number of parameters."""

import itertools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from growkit.growth.families.table import Family
from growkit.growth.target import heads_that_follow

# Word of the command line -> our name of the size.
WORDS = {
    "layers": "layers",
    "hidden_size": "residual",
    "heads": "heads",
    "kv_heads": "kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "ffn",
    "experts": "expert",
    "experts_per_token": "chosen",
    "vocab_size": "vocabulary",
    "positions": "positions",
}


def wanted_fields(family: Family, config: Any, words: Mapping[str, int]) -> dict[str, int]:
    """Config field -> size, from word -> size.

    What is not asked for stays, but heads follow the hidden size as in `LiGO`, the MLP keeps its ratio to it, and
    chosen experts theirs to all. ValueError for a size that the family does not have.
    """
    fields, small = family.fields(), family.sizes(config)
    asked = {}
    for word, size in words.items():
        name = WORDS[word]
        if name not in fields:
            has = ", ".join(sorted(word for word, name in WORDS.items() if name in fields))
            raise ValueError(f"--{word.replace('_', '-')}: {config.model_type} has no such size, expected {has}")
        asked[name] = size
    hidden = asked.get("residual", small["residual"])
    asked |= heads_that_follow(family, small, hidden, asked)
    if "heads" in asked and "kv_heads" in fields and "kv_heads" not in asked:
        group = small["heads"] // small["kv_heads"]
        asked["kv_heads"] = asked["heads"] // group if asked["heads"] % group == 0 else small["kv_heads"]
    for space in ("ffn", "shared"):
        if space in fields and space not in asked and hidden != small["residual"]:
            asked[space] = _rounded(hidden * small[space] / small["residual"], small[space])
    if "expert" in asked and "chosen" not in asked and asked["expert"] % small["expert"] == 0:
        asked["chosen"] = small["chosen"] * asked["expert"] // small["expert"]
    return {fields[name].field: size for name, size in asked.items()}


def _rounded(size, like):
    """A multiple of the largest power of two, up to 256, that `like` is a multiple of."""
    unit = math.gcd(like, 256)
    return max(like, round(size / unit) * unit)


def count_of(text: str) -> int:
    """1.3B, 350M, 20k or a plain number, as a number of parameters."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMbB]?)", text)
    if not match or not float(match[1]):
        raise ValueError(f"got {text!r}, expected a number of parameters such as 350M or 1.3B")
    return round(float(match[1]) * {"": 1, "k": 1e3, "m": 1e6, "b": 1e9}[match[2].lower()])


def propose(family: Family, config: Any, parameters: int, count: Callable[[Mapping[str, int]], int]) -> dict[str, int]:
    """Word -> size of a model of about this many parameters, in the small one's proportions.

    Heads are added whole, in the small model's groups, and the hidden size and MLP keep their ratio to them; layers
    grow with the width. Where `big_config` must be a multiple (post-LN), only multiples are proposed.
    count: word -> size to number of parameters. ValueError where even the small model has more.
    """
    small = family.sizes(config)
    own = {word: small[name] for word, name in WORDS.items() if name in small}
    if count({}) > parameters:
        raise ValueError(f"--params: got {parameters:,}, expected more than the {count({}):,} of the small model")
    group = small["heads"] // small["kv_heads"]
    step = small["heads"] if family.residual.post_norm else group
    best = None
    for heads in itertools.count(small["heads"], step):
        width = heads / small["heads"]
        words = {"heads": heads, "hidden_size": round(small["residual"] * width)}
        if "kv_heads" in family.fields():
            words["kv_heads"] = heads // group
        if words["hidden_size"] * small["heads"] != small["residual"] * heads:
            continue
        one, two = (count(words | {"layers": small["layers"] + extra}) for extra in (0, 1))
        if one > parameters and best is not None:
            break
        layers = small["layers"] + max(0, round((parameters - one) / (two - one)))
        miss = abs(math.log(count(words | {"layers": layers}) / parameters))
        shape = abs(math.log(layers / small["layers"]) - math.log(width))
        if best is None or miss + 0.1 * shape < best[0]:
            best = miss + 0.1 * shape, words | {"layers": layers}
        if one > parameters:
            break
    return {word: size for word, size in best[1].items() if size != own[word]}
