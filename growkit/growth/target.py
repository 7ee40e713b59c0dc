"""From a small config and wanted sizes to the config of the grown model: all that is not a size stays as it is."""

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from growkit.growth.families.table import Family

# Of how a model is trained or run, not of what it computes: taken from the wanted config where that sets them.
_FREE = (
    "dropout",
    "pdrop",
    "drop_path",
    "initializer_range",
    "use_cache",
    "dtype",
    "name_or_path",
    "output_",
    "return_dict",
)
_FREE_EXACTLY = ("transformers_version", "architectures", "auto_map")


def grown_config(
    family: Family, config: Any, wanted: Any, source: Sequence[int] | None = None
) -> tuple[dict[str, int], dict[str, int], Any]:
    """Sizes of the small config, sizes of the grown one by the same names, and the grown config.

    Sizes of heads stay unless the wanted config says otherwise.

    wanted: a config of the same class, of which only the sizes and the fields that differ from its class's defaults
        count; or config field -> size.
    source: small layer of every large one; lists with one entry per layer grow along.
    ValueError where a size shrinks or any other field differs: it names the field, what was given and expected.
    """
    small = family.sizes(config)
    grown = copy.deepcopy(config)
    fields = family.fields()
    if isinstance(wanted, Mapping):
        known = {size.field for size in fields.values()}
        for name, value in wanted.items():
            if name not in known:
                raise ValueError(f"big_config: got {name!r}, expected sizes: {', '.join(sorted(known))}")
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"big_config.{name}: got {value!r}, expected an integer")
            setattr(grown, name, value)
        asked = [name for name, size in fields.items() if size.field in wanted]
        for name, size in heads_that_follow(family, small, family.residual.size.of(grown), asked).items():
            setattr(grown, fields[name].field, size)
    else:
        _check_type(config, wanted)
        for size in fields.values():
            setattr(grown, size.field, getattr(wanted, size.field, None))
    head_dim = fields.get("head_dim")
    asked = not head_dim or (
        head_dim.field in wanted if isinstance(wanted, Mapping) else getattr(wanted, head_dim.field)
    )
    if not asked:
        setattr(grown, head_dim.field, small["head_dim"])
    try:
        big = family.sizes(grown)
    except ValueError as error:
        raise ValueError(f"big_config.{error}") from None
    for name, size in fields.items():
        if big[name] < small[name]:
            raise ValueError(
                f"big_config.{size.field}: got {big[name]}, expected at least {small[name]} as in the small model"
            )
    if big["head_dim"] < small["head_dim"]:
        raise ValueError(
            f"big_config.{family.attention.heads.field}: got {big['heads']}, which makes heads of {big['head_dim']}, "
            f"expected at least {small['head_dim']} as in the small model"
        )
    if not isinstance(wanted, Mapping):
        _carry(config, wanted, grown, {size.field for size in fields.values()}, small["layers"], big["layers"])
    if source is not None:
        for name, value in _fields(config).items():
            if _per_layer(value, small["layers"]) and big["layers"] != small["layers"]:
                setattr(grown, name, [value[layer] for layer in source])
    if hasattr(grown, "validate"):
        try:
            grown.validate()
        except Exception as error:  # of transformers or huggingface_hub, whose class is not a public name
            raise ValueError(f"big_config: {error.__cause__ or error}") from error
    return small, big, grown


def heads_that_follow(family: Family, small: Mapping[str, int], width: int, asked: Collection[str]) -> dict[str, int]:
    """Name of a size -> size: heads for a stream of this width, each as large as the small model's, and as many queries
    to a key. Nothing where heads are asked for, do not make up the small stream, or would not make up this one.
    """
    if {"heads", "kv_heads", "head_dim"} & set(asked) or small["heads"] * small["head_dim"] != small["residual"]:
        return {}
    heads, group = width // small["head_dim"], small["heads"] // small["kv_heads"]
    if width % small["head_dim"] or heads % group:
        return {}
    return {"heads": heads} | ({"kv_heads": heads // group} if "kv_heads" in family.fields() else {})


def _check_type(config, wanted):
    got, expected = (getattr(c, "model_type", type(c).__name__) for c in (wanted, config))
    if got != expected:
        raise ValueError(f"big_config: got model_type {got!r}, expected {expected!r} as the small model's")


def _carry(config, wanted, grown, sizes, small_layers, layers):
    """Take over what `wanted` sets of training; refuse what it sets otherwise than the small model does."""
    own, given = _fields(config), _fields(wanted)
    try:
        usual = _fields(type(wanted)())
    except Exception:  # a config that cannot be made without arguments has no defaults to compare with
        usual = {}
    for name, value in given.items():
        if name in sizes or name in _FREE_EXACTLY or value == own.get(name) or (name in usual and value == usual[name]):
            continue
        if any(part in name for part in _FREE):
            setattr(grown, name, copy.deepcopy(value))
        elif not (_per_layer(value, layers) and _per_layer(own.get(name), small_layers)):
            raise ValueError(f"big_config.{name}: got {value!r}, expected {own.get(name)!r} as in the small model")


def _per_layer(value, layers):
    return isinstance(value, list) and len(value) == layers


def _fields(config):
    return config.to_dict() if hasattr(config, "to_dict") else dict(vars(config))
