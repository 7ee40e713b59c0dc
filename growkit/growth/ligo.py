"""LiGO: learn a linear map from the weights of a small model to those of a larger one (arXiv:2303.00980)."""

import copy
import itertools
import math
import weakref
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from torch import nn

from growkit import ops
from growkit.growth.build import Shard, build
from growkit.growth.check import TOLERANCE, output_change
from growkit.growth.families.table import Family
from growkit.growth.fit import fit
from growkit.growth.layout import assemble, matrices, one_by_one, pieces
from growkit.growth.outline import family_of, outline
from growkit.growth.shards import Whole, unsharded_class, write
from growkit.growth.source import Row, buffers, check_names, class_of, read_row, table_rows, unwrapped
from growkit.growth.spaces import Map, kronecker_terms, stacked
from growkit.growth.starts import STARTS, Random, depth_map
from growkit.growth.state import grow_optimizer
from growkit.growth.widths import ties, width_maps
from growkit.kron import plan
from growkit.optim.distributed import is_sharded
from growkit.warn import warn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig  # the only use of transformers here, and no run needs it

StartName = Literal[
    "lossless",
    "closest",
    "official",
    "stack",
    "interpolate",
    "overlap",
    "zero_blocks",
    "hypercloning",
    "lemon",
    "zero_pad",
    "net2net",
    "fpi",
    "aki",
    "staged",
]
Sharing = Literal["model", "target", "source"]


class Flops(NamedTuple):
    forward: int
    backward: int


class LiGO(nn.Module):
    """Grow a model by a learned linear map of its weights: W_new[l2] = sum_l1 w[l2,l1] B W[l1] A^T.

    small_model: a Hugging Face model of a family in `growkit.growth.families`, with any of its heads; it is read, never
        changed. Or its config, with `weights`. Of parameters that are sharded (DTensors) every process keeps its shards
        and gathers those of one module type when they are needed, all processes together.
    big_config: config to grow into, nowhere smaller, or config field -> size for those that grow. What is not a size
        stays as the small model has it; a config that sets it otherwise is refused.
    start: "lossless"      the grown model computes what the small one does; ValueError where no such growth exists
           "closest"       lossless where possible; elsewhere near, with a warning that tells the measured change
           "official"      as the authors' code: random rows, noisy stacking, read side tied to write side
           "stack"         layers 012012 (StackBERT, G_stack); "interpolate" 001122; "overlap" the bottom and the top
                           part (SOLAR). None of them keeps the function; widths grow as in "lossless"
           "zero_blocks"   LLaMA-Pro: depth only, new layers add nothing. Lossless
           "hypercloning"  everything widened by copies, read in unequal parts so that they can part ways. Lossless
           "lemon"         as "lossless", but new heads and hidden units are copies read in random parts. Lossless
           "zero_pad"      the stream padded with zeros: lossless under RMSNorm, not under LayerNorm
           "net2net"       as "lossless", but new heads and hidden units are copies of drawn ones. Lossless
           "fpi"           bert2BERT: everything widened by copies of drawn coordinates. Lossless at whole multiples
           "aki"           bert2BERT: as "fpi", but what copies write is the next layer's, and layers are stacked. It
                           does not keep the function
           "staged"        staged training: twice as wide in everything, as two copies that meet in the output layer.
                           Lossless
    sharing: which maps of attention heads and MLP are shared: "model" (one for all layers, Algorithm 1; default),
        "target" (one per large layer, the authors' code; default of "official") or "source" (one per small layer,
        Eq. 8). The residual stream is one axis through all layers and always has one map a side.
    seed: of everything random here; the global random stream is neither read nor advanced.
    family: a table of your own for a model whose `config.model_type` has none; the model is then built as
        type(small_model)(config).
    weights: name -> tensor, read one module type at a time whenever it is needed; by default the small model's
        parameters, which are copied, stacked by module type.
    noise: of a start that copies: what is read of each copy gets random differences of about `noise` times its size,
        which sum to zero over copies, so that the output stays and copies part ways from the first step. A tied output
        layer reads by the embedding, and gets none.

    config: the grown model's.
    rows: what the table says of this model, as `Row`s.
    maps, depth: the learned operators; `maps["ffn_read"]` may be replaced by another map of `growkit.growth.spaces`.
    kept_buffers: name -> value, of the large model's saved buffers: as the small layer has them that a layer resembles.
    ties: side -> side whose map it uses while it has none of its own in `maps`.
    reason: why the start cannot be lossless; empty where it is meant to be. `exact` and `check()` measure.
    Operators are promote_types(small dtype, float32).
    """

    fit = fit
    grow_optimizer = grow_optimizer

    def __init__(
        self,
        small_model: "nn.Module | PreTrainedConfig",
        big_config: "PreTrainedConfig | Mapping[str, Any]",
        start: StartName = "lossless",
        sharing: Sharing | None = None,
        seed: int = 0,
        *,
        family: Family | None = None,
        weights: Mapping[str, torch.Tensor] | None = None,
        noise: float = 0.0,
    ):
        super().__init__()
        if start not in STARTS:
            raise ValueError(f"start: got {start!r}, expected one of {', '.join(map(repr, STARTS))}")
        sharing = sharing or ("target" if start == "official" else "model")
        if sharing not in get_args(Sharing):
            raise ValueError(f"sharing: got {sharing!r}, expected 'model', 'target' or 'source'")
        if not 0 <= noise < math.inf:
            raise ValueError(f"noise: got {noise}, expected a number from 0 up")
        self.sharing, self.seed = sharing, seed
        with torch.device("cpu"):  # a default device must not decide where maps are made
            self._begin(unwrapped(small_model), big_config, STARTS[start], family, weights, noise)
        self.to(self._first_device)
        if start == "closest" and self.reason:
            held = self._weights is None
            told = f"outputs change by {self.check():.2g} relative" if held else "check() measures by how much"
            warn(f"not lossless: {self.reason}; {told}")

    def _begin(self, small_model, big_config, start, family, weights, noise):
        model = small_model if isinstance(small_model, nn.Module) else None
        self.small_config = copy.deepcopy(small_model if model is None else getattr(model, "config", None))
        if self.small_config is not None:
            vars(self.small_config).pop("quantization_config", None)  # its weights are floating point by now
        family = family_of(self.small_config, family, small_model)
        if model is None and weights is None:
            raise ValueError("weights: got None with a config, expected a mapping of name to tensor")
        self._model_class = unsharded_class(model) if model is not None else class_of(self.small_config)
        growth, self.config, self._source, skeletons = found = outline(
            family, self._model_class, self.small_config, big_config, start, noise
        )
        self._growth, self._small, self._big = growth, growth.small, growth.big
        self._generation_config = copy.deepcopy(getattr(model, "generation_config", None))
        expected = dict(skeletons[0].named_parameters())
        named = [] if model is None else model.named_parameters()
        self._parameters_of_small = {name: weakref.ref(p) for name, p in named}
        parameters = weights
        if weights is None:
            parameters = dict(model.named_parameters())
            check_names(parameters, expected)
            sharded = any(map(is_sharded, parameters.values()))
            weights = Whole(parameters) if sharded else parameters
        first = parameters[next(iter(expected))]
        self._dtype, self._first_device = first.dtype, first.device
        if model is not None:
            self._dtype = getattr(model, "dtype", self._dtype)
        if not self._dtype.is_floating_point:
            raise ValueError(f"small_model: weights are {self._dtype}, expected floating point; dequantize it first")

        self.rows = table_rows(family, skeletons, self._small, self._big, self._model_class)
        self._buffers_of_small, self.kept_buffers = buffers(model, weights, skeletons, self._source)
        random = Random(self.seed, torch.promote_types(self._dtype, torch.float32))
        self.reason = found.reason(self._dtype)
        self._rms = family.residual.norm == "rms"
        self.depth, self._weights = nn.ParameterDict(), weights
        for row in self.rows:
            for key, piece in zip(row.keys, pieces(row.entries), strict=True):
                if row.layered:
                    self.depth[key] = nn.Parameter(depth_map(growth, row.pattern, piece.sides, random))
        if weights is parameters and model is not None:
            for row in self.rows:
                for key, W in zip(row.keys, self._load(row), strict=True):
                    self.register_buffer(f"small_{key}", W, persistent=False)
            self._weights = None
        sides = {
            side: row.layered for row in self.rows for piece in pieces(row.entries) for side in piece.sides if side
        }
        layered = {side.partition("_")[0] for side, inside in sides.items() if inside} - {"residual", "head", "expert"}
        layers = {"model": (), "target": (self._big["layers"],), "source": (self._small["layers"],)}[self.sharing]
        self.ties = ties(growth, set(sides))
        maps = width_maps(growth, sides.keys() - self.ties.keys(), layers, layered, random)
        self.maps = nn.ModuleDict({side: maps[side] for side in sorted(maps)})

    def _load(self, row):
        """The small weights of one row: a stack [L1, rows, columns] per piece, maybe with a layer of ones."""
        stack = read_row(row, self._weights, self._dtype)
        stacks = []
        for key, W in zip(
            row.keys, matrices(stack + row.offset if row.offset else stack, row.entries, self._small), strict=True
        ):
            if row.layered and self.depth[key].shape[-1] > len(W):
                W = torch.cat([W, torch.ones_like(W[:1])])
            stacks.append(W.contiguous())
        return stacks

    def _stacks(self, row):
        return self._load(row) if self._weights is not None else [self.get_buffer(f"small_{key}") for key in row.keys]

    def _map(self, side: str | None) -> Map | None:
        side = self.ties.get(side, side) if side not in self.maps else side
        return self.maps[side] if side in self.maps else None

    def _arguments(self, row):
        """For every matrix (a piece, or of a stacked one several) its Kronecker terms, mostly one: arguments of
        `kron_expand`, and what scales its rows and columns then, vectors or None."""
        found = []
        for key, piece, W in zip(row.keys, pieces(row.entries), self._stacks(row), strict=True):
            w, W = self.depth[key] if row.layered else None, W.to(self._operator_dtype)
            for one, own in stacked(self._map(piece.S), W, w) if piece.S else [(W, w)]:
                terms = kronecker_terms(self._map(piece.B), self._map(piece.A), own)
                found.append([self._term(one, maps, w) for *maps, w in terms])
        return found

    def _term(self, W, maps, w):
        vectors = {}
        for dim, (name, new) in enumerate(zip(("row_scale", "column_scale"), maps, strict=True), 1):
            W, scale = (new.prepare(W, dim), new.scale) if new else (W, 1.0)
            vectors[name] = scale.to(W.dtype) if isinstance(scale, torch.Tensor) else None
            if vectors[name] is None and scale != 1.0:  # a number goes into the smallest operand
                W, w = (W * scale, w) if w is None else (W, w * scale)
        B, A = (m.tensor() if m else None for m in maps)
        kinds = {f"{name}_kind": m.kind if m else "dense" for name, m in zip("BA", maps, strict=True)}
        return dict(W=W, B=B, A=A, w=w, **kinds, sharing=self.sharing), vectors

    @property
    def _device(self):
        return next((t.device for t in (*self.parameters(), *self.buffers())), self._first_device)

    @property
    def _operator_dtype(self):
        return next(self.parameters()).dtype if len(self.depth) else torch.promote_types(self._dtype, torch.float32)

    def expand(self) -> dict[str, torch.Tensor]:
        """All weights of the large model, name -> tensor, differentiable in the operators."""
        arguments = [self._arguments(row) for row in self.rows]
        grown = iter(ops.kron_expand_many([part for parts in arguments for terms in parts for part, _ in terms]))
        weights = {}
        for row, parts in zip(self.rows, arguments, strict=True):
            stack = self._assemble(row, [[(next(grown), vectors) for _, vectors in terms] for terms in parts])
            weights |= zip(row.names, stack.unbind(), strict=True)
        return weights

    def expand_row(self, row: Row) -> torch.Tensor:
        """`expand` of one of `rows`: a stack of the parameters `row.names`."""
        grown = [[(ops.kron_expand(**part), vectors) for part, vectors in terms] for terms in self._arguments(row)]
        return self._assemble(row, grown)

    def _assemble(self, row, scaled):
        """Large weights of one row as a stack, from what `kron_expand` gave for each term of a matrix, and scales."""
        parts = []
        for terms in scaled:
            total = None
            for part, vectors in terms:
                if vectors["row_scale"] is not None:
                    part = part * vectors["row_scale"].unsqueeze(-1)
                if vectors["column_scale"] is not None:
                    part = part * vectors["column_scale"].unsqueeze(-2)
                total = part if total is None else total + part
            parts.append(total)
        if sum(part[0].numel() for part in parts) != math.prod(row.shape):
            made = " and ".join(str(list(part.shape[1:])) for part in parts)
            raise ValueError(f"maps: of {row.pattern} they make {made}, expected {row.shape} in all")
        each = len(parts) // len(row.keys)
        if each > 1:
            parts = [torch.stack(parts[at : at + each], 1) for at in range(0, len(parts), each)]
        stack = assemble(parts, row.entries, self._big, row.shape)
        return stack - row.offset if row.offset else stack

    @torch.no_grad()
    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and value of every parameter of the large model, in the small dtype, one at a time; then saved buffers.

        Held at once: the small stack of one module type, the same widened, and one large tensor.
        """
        for row in self.rows:
            for name, value in self._grown(row):
                yield name, value.to(self._dtype)
        yield from self.kept_buffers.items()

    def _grown(self, row):
        """`tensors()` of one row, in the dtype of the operators."""
        parts = self._arguments(row)
        if self.sharing != "target" or not row.layered:
            parts = [
                [
                    (part | {"W": ops.kron_expand(**(part | {"w": None})), "B": None, "A": None}, vectors)
                    for part, vectors in terms
                ]
                for terms in parts
            ]
        for layer, name in enumerate(row.names):
            layers = [[_layer(part, vectors, layer) for part, vectors in terms] for terms in parts]
            yield name, self._assemble(row, layers)[0]

    @property
    def flops_per_expansion(self) -> Flops:
        """Counted Flops(forward, backward) of one `expand` and its gradient (multiply and add are two)."""
        forward = backward = 0
        for row in self.rows:
            for part, _ in itertools.chain.from_iterable(self._arguments(row)):
                problem = ops.kron_axes(*part.values())
                cost = plan.cost(plan.best_order(*problem), *problem)
                forward, backward = forward + cost.flops, backward + cost.backward_flops
        return Flops(forward, backward)

    @torch.no_grad()
    def grow(self, dtype: torch.dtype | None = None, *, shard: Shard | None = None) -> nn.Module:
        """The large model, of the small one's class, in eval mode, with its generation config and buffers.

        dtype: default the small model's.
        Its parameters are written in place, in panels: beside the model, memory for one small stack and three blocks
        of at most 64 MiB (`plan.PENDING_BYTES`).
        shard: is given the model with its parameters on the meta device, and shards it (`fully_shard`). Every process
            makes every large tensor, one at a time, and keeps its own shard of it: what `tensors()` gives, to the bit.
        """
        model = self.skeleton(dtype, shard).eval()
        parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
        others = list(self.rows) if shard else []
        if not shard:
            ops.kron_expand_into(self._parts_into(parameters, others))
        for row in others:
            for name, value in self._grown(row):
                write(parameters[name], value)
        return model

    def _parts_into(self, parameters, others):
        """What `kron_expand_into` takes, part by part: a small stack in the operators' dtype lives no longer.

        others: gets the rows that it cannot take: pieces that are no matrices inside their parameters, are scaled
            otherwise in every layer, or are sums of terms.
        """
        for row in self.rows:
            arguments = self._arguments(row)
            targets = [one_by_one(matrices(parameters[name][None], row.entries, self._big)) for name in row.names]
            start = parameters[row.names[0]].untyped_storage().data_ptr()
            scattered = any(out.untyped_storage().data_ptr() != start for out in targets[0])
            scales = [v for terms in arguments for _, vectors in terms for v in vectors.values() if v is not None]
            if row.offset or scattered or any(v.ndim > 1 for v in scales) or any(len(terms) > 1 for terms in arguments):
                others.append(row)
                continue
            for [(part, vectors)], *out in zip(arguments, *targets, strict=True):
                yield dict(out=[y[0] for y in out], **part, **vectors)

    def skeleton(self, dtype: torch.dtype | None = None, shard: Shard | None = None) -> nn.Module:
        """A model of the large config on the small one's device, its parameters of no meaning yet."""
        model = build(self._model_class, self.config, dtype or self._dtype, self._device, shard)
        buffers = dict(model.named_buffers())
        for name, value in self.kept_buffers.items():
            buffers[name].copy_(value)
        if self._generation_config is not None:
            model.generation_config = copy.deepcopy(self._generation_config)
        return model

    @torch.no_grad()
    def small_model(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The small model as this operator holds it, in eval mode."""
        model = build(self._model_class, self.small_config, dtype or self._dtype, self._device).eval()
        parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
        for row in self.rows:
            stacks = [W[: len(row.small_names)] for W in self._stacks(row)]
            stack = assemble(stacks, row.entries, self._small, row.small_shape)
            for name, value in zip(row.small_names, stack - row.offset if row.offset else stack, strict=True):
                parameters[name].copy_(value)
        buffers = dict(model.named_buffers())
        for name, value in self._buffers_of_small.items():
            buffers[name].copy_(value)
        return model

    def check(self, inputs: Mapping[str, torch.Tensor] | torch.Tensor | None = None) -> float:
        """`growth.check.output_change` of the present operators, on `inputs` or random ones from `seed`.

        Both models are built, and whole, in the dtype of the operators: what rounding to a narrower one does is not
        counted.
        """
        dtype = self._operator_dtype
        return output_change(self.small_model(dtype), self.grow(dtype), inputs, self.seed)

    @property
    def exact(self) -> bool:
        """Whether `check()` finds a change that rounding explains: 1e-9 in float64, else 1e-4, as with any RMSNorm,
        which transformers computes in float32. Measured again whenever an operator has changed."""
        present = [(id(t), t._version) for t in (*self.parameters(), *self.buffers())]
        if getattr(self, "_measured", (None,))[0] != present:
            dtype = torch.float32 if self._rms else self._operator_dtype
            self._measured = present, self.check() <= TOLERANCE[dtype]
        return self._measured[1]


def _layer(part, vectors, layer):
    """One large layer of a part, [1, rows, columns], and its scales."""
    vectors = {name: v[layer] if v is not None and v.ndim > 1 else v for name, v in vectors.items()}
    if part["w"] is None:
        return part["W"], vectors
    part = part | {"w": part["w"][layer : layer + 1]}
    for name in "BA":
        if part[name] is not None and part[name].ndim == 3:
            part[name] = part[name][layer : layer + 1]
    return ops.kron_expand(**part), vectors
