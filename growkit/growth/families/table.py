"""The form of a family's table: spaces, their sizes as config fields, and which axis of which weight lives where.

A *side* names a space and what a weight does with it, as "residual_write": *write* (it produces the space), *read* (it
consumes it), *gain* and *shift* (of norms). Spaces:
  residual            the stream through all layers
  query, key, value   attention heads; "value_read" has the size of the queries, as their output is read; "query_gain"
                      and "key_gain" of a norm over head_dim, "query_gains" and "key_gains" of one over all heads
  head                what the output layer reads: the last norm's output, or a hidden space of its own
  embedded, branch    the stream's coordinates where it is written by embeddings that the model multiplies, and by a
                      branch that a norm scales before it is added
  expert              experts of which a router chooses: "expert_write" of what makes their units, and of the router's
                      rows, "expert_read" of what reads the units
  any other           hidden units (ffn, pooled, ...) or rows of a table (vocabulary, positions)
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple


class Size(NamedTuple):
    """A config field; `usual` computes the size from the config where the field is None; `more` is always added."""

    field: str
    usual: Callable[[Any], int] | None = None
    more: int = 0

    def of(self, config: Any) -> int:
        value = getattr(config, self.field, None)
        if value is None and self.usual:
            value = self.usual(config)
        if value is None:
            raise ValueError(f"{self.field}: the config does not say")
        return value + self.more


@dataclass(frozen=True)
class Residual:
    """The residual stream and its norms.

    norm: "layer" subtracts the mean and divides by the standard deviation, "rms" divides by the root mean square.
    post_norm: of a post-norm family, the module that ends a layer; empty where norms stand before what they feed.
    gain_offset: what the model adds to a stored gain.
    multiplier: what the model multiplies "embedded" coordinates by, from the stream's size.
    bare: whether blocks read the stream as it is, with no norm before them.
    """

    size: Size
    norm: Literal["layer", "rms"]
    eps: str
    post_norm: str = ""
    gain_offset: float = 0.0
    multiplier: Callable[[int], float] = lambda size: 1.0
    bare: bool = False


@dataclass(frozen=True)
class Attention:
    """heads, kv_heads, head_dim: config fields. Without kv_heads every head has its own key and value; without head_dim
    it is the residual size divided by heads.

    rotary: the part of head_dim that is rotated by position, paired half by half, as a number or from the config.
    normed: queries and keys pass a norm over "head_dim", or over all "heads" at once.
    scaled: whether scores are divided by sqrt(head_dim), or the config flag that says so; layer_scaled: the flag that
    divides them by the layer's number.
    """

    heads: Size
    kv_heads: Size | None = None
    head_dim: Size | None = None
    rotary: float | Callable[[Any], float] = 0.0
    normed: Literal["", "head_dim", "heads"] = ""
    scaled: bool | str = True
    layer_scaled: str = ""


@dataclass(frozen=True)
class Experts:
    """count, chosen: config fields, of experts and of those that work on one token.

    The router's softmax is over all of them, and its largest values weigh what they make, as they are or divided by
    their sum: either way copies of all experts, as many times as many of them chosen, make together what one made.
    """

    count: Size
    chosen: Size


@dataclass(frozen=True)
class Family:
    """What growth has to know of a model family.

    hidden: space -> size, of hidden units; "head" among them has a norm between its units and what reads them.
    tables: space -> size, of rows that are looked up: new ones do not change what the old ones give.
    modules: module (with "*" for the layer) -> parameter -> one entry per dimension; see `linear`, `norm` and the other
        functions here. Modules that a model does not have are skipped; a parameter that is not here is refused.
    expects: config field -> the value that the table holds for.
    """

    layers: Size
    residual: Residual
    attention: Attention
    hidden: Mapping[str, Size]
    tables: Mapping[str, Size]
    modules: Mapping[str, Mapping[str, tuple]] = field(repr=False)
    expects: Mapping[str, Any] = field(default_factory=dict)
    experts: Experts | None = None

    def fields(self) -> dict[str, Size]:
        """Our name of every size that is a config field of its own."""
        attention = {name: getattr(self.attention, name) for name in ("heads", "kv_heads", "head_dim")}
        experts = {"expert": self.experts.count, "chosen": self.experts.chosen} if self.experts else {}
        named = {"layers": self.layers, "residual": self.residual.size, **attention, **self.hidden, **experts}
        named |= self.tables
        return {name: size for name, size in named.items() if size}

    def sizes(self, config: Any) -> dict[str, int]:
        """All sizes of a config by our names; ValueError where heads do not divide what they share."""
        sizes = {name: size.of(config) for name, size in self.fields().items()}
        sizes.setdefault("kv_heads", sizes["heads"])
        if "head_dim" not in sizes:
            if sizes["residual"] % sizes["heads"]:
                raise ValueError(
                    f"{self.attention.heads.field}: got {sizes['heads']}, expected a divisor of "
                    f"{self.residual.size.field} = {sizes['residual']}"
                )
            sizes["head_dim"] = sizes["residual"] // sizes["heads"]
        if sizes["heads"] % sizes["kv_heads"]:
            raise ValueError(
                f"{self.attention.kv_heads.field}: got {sizes['kv_heads']}, expected a divisor of "
                f"{self.attention.heads.field} = {sizes['heads']}"
            )
        return sizes

    @property
    def branched(self) -> bool:
        """Whether a norm scales what a block adds to the stream."""
        return any("branch_gain" in entries for entries in self.parameters().values())

    def parameters(self) -> dict[str, tuple]:
        """Parameter pattern -> entries."""
        return {
            f"{module}.{leaf}".rstrip("."): axes
            for module, leaves in self.modules.items()
            for leaf, axes in leaves.items()
        }


def size_of(side: str, sizes: Mapping[str, int]) -> int:
    """Length of an axis that lives in this side."""
    space, _, role = side.partition("_")
    if space in ("query", "key", "value"):
        heads = "heads" if space == "query" or side == "value_read" else "kv_heads"
        return sizes["head_dim"] * (1 if role == "gain" else sizes[heads])
    return sizes[space if space in sizes or space not in ("head", "embedded", "branch") else "residual"]


class Joined(NamedTuple):
    """An axis that holds several sides: one "block" after the other, or anew for each key and value "head"."""

    sides: tuple[str, ...]
    unit: Literal["block", "head"] = "block"

    def sections(self, sizes: Mapping[str, int]) -> tuple[int, list[int]]:
        """How often the sides take turns along the axis, and the length of each in a turn."""
        turns = 1 if self.unit == "block" else sizes["kv_heads"]
        return turns, [size_of(side, sizes) // turns for side in self.sides]


class Stacked(NamedTuple):
    """An axis of whole matrices, grown one by one; the side's map copies or mixes them."""

    side: str

    @property
    def sides(self) -> tuple[str, ...]:
        return (self.side,)


class Either(NamedTuple):
    """The first of these sides whose space the model writes."""

    sides: tuple[str, ...]


def by_head(*spaces):
    """A joined space to write to: these spaces for the first key and value head, then for the second, ..."""
    return Joined(tuple(f"{space}_write" for space in spaces), "head")


def _side(space, role):
    if isinstance(space, Joined):
        return space
    if isinstance(space, tuple) and role == "write":
        return Joined(tuple(f"{s}_write" for s in space))
    if isinstance(space, tuple):
        return Either(tuple(f"{s}_{role}" for s in space))
    return space and f"{space}_{role}"


def linear(read, write):
    """nn.Linear from one space to another; None is a space that does not grow.

    read: a tuple is the first of these spaces that the model writes. write: a tuple is joined block by block.
    """
    return {"weight": (_side(write, "write"), _side(read, "read")), "bias": (_side(write, "write"),)}


def experts(read, write, role):
    """Linear layers of all experts in one parameter, [experts, out, in].

    role: "write" of layers that make the experts' units, "read" of those that read them.
    """
    return {"": (Stacked(f"expert_{role}"), _side(write, "write"), _side(read, "read"))}


def conv1d(read, write):
    """`linear`, stored (in, out)."""
    return {"weight": (_side(read, "read"), _side(write, "write")), "bias": (_side(write, "write"),)}


def embedding(table, write):
    return {"weight": (_side(table, "write"), _side(write, "write"))}


def norm(space):
    return {"weight": (_side(space, "gain"),), "bias": (_side(space, "shift"),)}


def tensor(*sides):
    """A parameter that is no module's: one side or None per dimension."""
    return {"": sides}


def match(family: Family, names, prefix: str):
    """Rows of the table that these parameters are: pattern -> (entries, names by layer), and the names of no row.

    prefix: of the backbone inside the model, as a base model has none.
    """
    table, rows, unknown = family.parameters(), {}, []
    for name in names:
        local = name.removeprefix(prefix + ".") if prefix else name
        number = re.search(r"(?<=\.)\d+(?=\.)", local)
        pattern = local if local in table or not number else local[: number.start()] + "*" + local[number.end() :]
        if pattern in table:
            layers = rows.setdefault(pattern, (table[pattern], {}))[1]
            layers[int(number[0]) if "*" in pattern else 0] = name
        else:
            unknown.append(name)
    written = {
        side.partition("_")[0]
        for entries, _ in rows.values()
        for entry in entries
        for side in (entry.sides if isinstance(entry, (Joined, Stacked)) else [entry])
        if isinstance(side, str) and side.endswith("_write")
    }

    def chosen(entry):
        if isinstance(entry, Either):
            return next((s for s in entry.sides if s.partition("_")[0] in written), entry.sides[-1])
        return entry

    return {pattern: (tuple(map(chosen, entries)), names) for pattern, (entries, names) in rows.items()}, unknown
