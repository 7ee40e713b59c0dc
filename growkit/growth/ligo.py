"""LiGO: learn a linear map from the weights of a small model to those of a larger one (arXiv:2303.00980)."""

import copy
import math
import warnings
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from growkit import ops
from growkit.growth.architectures import FAMILIES
from growkit.growth.spaces import HeadStructured, Identity, IdentityTop
from growkit.kron import plan

STARTS = ("lossless", "closest", "official")


class Flops(NamedTuple):
    forward: int
    backward: int


class LiGO(nn.Module):
    """Grow a model by a learned linear map of its weights: W_new[l2] = sum_l1 w[l2,l1] B W[l1] A^T.

    small_model: a Hugging Face GPT2LMHeadModel or BertForMaskedLM; it is read, never changed.
    big_config: config of the model to grow into, nowhere smaller, of the same vocabulary, positions and activation.
    start: "lossless"  the grown model computes what the small one does; ValueError where no such growth exists, which
                       is a post-LN model (BERT) whose hidden size is no multiple of the small one's
           "closest"   lossless where possible; elsewhere near, with a warning; `error` is the measured distance
           "official"  as the authors' code: random rows, noisy stacking, read side tied to write side
    sharing: which maps of attention heads and MLP are shared: "model" (one for all layers, Algorithm 1; default),
        "target" (one per large layer, the authors' code; default of "official") or "source" (one per small layer,
        Eq. 8). The residual stream is one axis through all layers and always has one map a side.
    seed: of everything random here; the global random stream is neither read nor advanced.

    config: a copy of big_config whose norm eps is the small one's times D1/D2 where the start pads the residual
        stream, as the variance over D2 coordinates shrinks by that factor; with "official" as given.
    maps, depth: the learned operators; `maps["ffn_read"]` may be replaced by another map of `growkit.growth.spaces`.
    ties: side -> side whose map it uses while it has none of its own in `maps`.
    exact, reason: whether the start (or what `fit` left) computes what the small model does, and if not, why.
    error: max |logit change| / max |logit| on random tokens, measured by "closest" where it is not exact; else None.
    Operators are promote_types(small dtype, float32). Memory: one copy of the small weights, stacked by module type.
    """

    def __init__(self, small_model, big_config, start="lossless", sharing=None, seed=0):
        super().__init__()
        if start not in STARTS:
            raise ValueError(f"start: got {start!r}, expected one of {', '.join(map(repr, STARTS))}")
        sharing = sharing or ("target" if start == "official" else "model")
        if sharing not in ("model", "target", "source"):
            raise ValueError(f"sharing: got {sharing!r}, expected 'model', 'target' or 'source'")
        family, small, big = _compare(small_model, big_config)
        weights = _weights(small_model)

        padded = small["hidden"] != big["hidden"] and not (family.post_norm and big["hidden"] % small["hidden"] == 0)
        self.reason = ""
        if start == "official":
            self.reason = "the published start mixes neurons and layers at random"
        elif padded and family.post_norm:
            nearest = max(1, round(big["hidden"] / small["hidden"])) * small["hidden"]
            self.reason = (
                f"a post-LN model keeps its function only if {family.hidden} is a multiple of {small['hidden']}: "
                f"got {big['hidden']}, nearest {nearest}"
            )
            if start == "lossless":
                raise ValueError(f'big_config.{family.hidden}: {self.reason}; start="closest" comes near')
        self.exact = not self.reason
        self.error = None
        self.sharing, self.seed = sharing, seed
        self.config = copy.deepcopy(big_config)
        self.config.architectures = [type(small_model).__name__]
        if start != "official":
            eps = getattr(small_model.config, family.eps)
            setattr(self.config, family.eps, eps * small["hidden"] / big["hidden"] if padded else eps)
        self._model_class, self._small_dtype = type(small_model), small_model.dtype

        # One row per module type: its small weights stacked, its maps, its depth vector.
        self.depth = nn.ParameterDict()
        self._rows = []
        random = _Random(seed, torch.promote_types(small_model.dtype, torch.float32))
        for name, axes in family.weights.items():
            names = [name.replace("*", str(layer)) for layer in range(small["layers"] if "*" in name else 1)]
            if names[0] in weights:
                stack = torch.stack([weights.pop(name).detach() for name in names])
                self._add_row(name, axes, stack, family, small, big, start, random)
        if weights:
            raise ValueError(
                f"small_model: {self._model_class.__name__} has weights that the {big_config.model_type} table does "
                f"not know: {', '.join(sorted(weights))}"
            )
        sides = {side for row in self._rows for part in row.parts for side in (part.B, part.A) if side}
        layers = {"model": (), "target": (big["layers"],), "source": (small["layers"],)}[sharing]
        tied = small_model.config.tie_word_embeddings
        if start == "official":
            self.ties = _official_ties(sides, tied)
            maps = _official_maps(sides - self.ties.keys(), small, big, layers, random)
        else:
            self.ties = {}
            maps = _near_maps(family, small, big, layers, tied, small_model.config, random)
        self.maps = nn.ModuleDict({side: maps[side] for side in sorted(sides - self.ties.keys())})
        self.to(small_model.device)

        if start == "closest" and not self.exact:
            self.error = _logit_change(small_model, self.grow(), random)
            warnings.warn(f"not lossless: {self.reason}; logits change by {self.error:.2g} relative", stacklevel=2)

    def _add_row(self, name, axes, stack, family, small, big, start, random):
        """Take up one line of the family's table: a buffer, a depth vector and two maps per part of a joined axis."""
        layered = "*" in name
        names = [name.replace("*", str(layer)) for layer in range(big["layers"])] if layered else [name]
        joined = next((axis for axis, entry in enumerate(axes) if isinstance(entry, tuple)), None)
        pieces = axes[joined] if joined is not None else (None,)
        stacks = stack.chunk(len(pieces), 1 + joined) if joined is not None else (stack,)
        parts = []
        for piece, W in zip(pieces, stacks, strict=True):
            sides = [piece if axis == joined else entry for axis, entry in enumerate(axes)]
            key = (name.rpartition("*.")[2] + (f".{piece.partition('_')[0]}" if piece else "")).replace(".", "_")
            if W.ndim == 2:  # a vector is a matrix of one column
                W, sides = W.unsqueeze(-1), [*sides, None]
            if layered and start == "official":
                self.depth[key] = nn.Parameter(_stack_noisy(small["layers"], big["layers"], random))
            elif layered:
                w = _depth_lossless(name, sides, family, small["layers"], big["layers"], self.config, random)
                self.depth[key] = nn.Parameter(w)
                if w.shape[1] > len(W):
                    W = torch.cat([W, torch.ones_like(W[:1])])
            self.register_buffer(f"small_{key}", W.contiguous(), persistent=False)
            parts.append(_Part(key, sides[0], sides[1], layered))
        self._rows.append(_Row(names, parts, joined, stack.ndim == 2))

    def _map(self, side):
        return self.maps[side] if side in self.maps else self.maps[self.ties[side]]

    def _arguments(self, part):
        """Arguments of `kron_expand` for one part, and what scales its rows and columns after it: vectors or None."""
        maps = [self._map(side) if side else None for side in (part.B, part.A)]
        W = self.get_buffer(f"small_{part.key}").to(next(self.parameters()).dtype)
        w = self.depth[part.key] if part.layered else None
        vectors = {}
        for name, scale in zip(("row_scale", "column_scale"), [m.scale if m else 1.0 for m in maps], strict=True):
            vectors[name] = scale.to(W.dtype) if isinstance(scale, torch.Tensor) else None
            if vectors[name] is None and scale != 1.0:  # a number goes into the smallest operand
                W, w = (W * scale, w) if w is None else (W, w * scale)
        B, A = (m.tensor() if m else None for m in maps)
        kinds = {f"{name}_kind": m.kind if m else "dense" for name, m in zip("BA", maps, strict=True)}
        return dict(W=W, B=B, A=A, w=w, **kinds, sharing=self.sharing), vectors

    def expand(self):
        """All weights of the large model, name -> tensor, differentiable in the operators."""
        arguments = [self._arguments(part) for row in self._rows for part in row.parts]
        pieces = iter(ops.kron_expand_many([part for part, _ in arguments]))
        scaled = ((next(pieces), scales) for _, scales in arguments)
        return dict(weight for row in self._rows for weight in self._assemble(row, scaled))

    def _assemble(self, row, scaled):
        """Names and weights of one row of the table, whose parts are the next of `scaled`."""
        pieces = []
        for _ in row.parts:
            piece, scales = next(scaled)
            if scales["row_scale"] is not None:
                piece = piece * scales["row_scale"][:, None]
            if scales["column_scale"] is not None:
                piece = piece * scales["column_scale"]
            pieces.append(piece)
        stack = pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1 + row.joined)
        return zip(row.names, (stack.squeeze(-1) if row.vector else stack).unbind(), strict=True)

    @property
    def flops_per_expansion(self):
        """Counted Flops(forward, backward) of one `expand` and its gradient (multiply and add are two)."""
        forward = backward = 0
        for part in (part for row in self._rows for part in row.parts):
            problem = ops.kron_axes(*self._arguments(part)[0].values())
            cost = plan.cost(plan.best_order(*problem), *problem)
            forward, backward = forward + cost.flops, backward + cost.backward_flops
        return Flops(forward, backward)

    def fit(self, batches, steps=100, lr=1e-3, warmup=0.1, loss=None, accumulate=1, progress=None):
        """Learn the operators on the large model's own loss; the small weights stay as they are. Returns the losses.

        batches: iterable of model inputs: mappings with labels, or token tensors (then labels = tokens, for causal
            models); steps * accumulate of them are taken.
        loss: loss(model, batch) -> scalar; default the model's own. It is in train or eval mode as this module is.
        lr: peak; linear warm-up over `warmup` * steps, then linear decay. AdamW without decay, gradients clipped at 1.
        progress: called with (step, loss) after each step.

        One expansion per step however many micro-batches are accumulated. Dropout is drawn from `seed`.
        """
        if steps < 1 or accumulate < 1:
            raise ValueError(f"steps, accumulate: got {steps}, {accumulate}, expected at least 1")
        if not lr > 0 or not 0 <= warmup <= 1:
            raise ValueError(f"lr, warmup: got {lr}, {warmup}, expected lr > 0 and warmup within [0, 1]")
        loss = loss or _model_loss
        feed = iter(batches)
        model = self._skeleton().train(self.training)
        devices = [model.device] if model.device.type == "cuda" else []
        parameters = dict(model.named_parameters())
        optimizer = torch.optim.AdamW(self.parameters(), lr=lr, weight_decay=0.0)
        rise = max(1, math.ceil(warmup * steps))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / rise, (steps - step) / max(1, steps - rise))
        )
        self.exact, self.reason = False, "the operator was trained"
        losses = []
        for step in range(steps):
            weights = self.expand()
            for name, parameter in parameters.items():  # leaves: the graph of the model ends here
                parameter.data = weights[name].detach().to(parameter.dtype)
                parameter.grad = None
            total = 0.0
            for micro in range(accumulate):
                taken = step * accumulate + micro
                try:
                    batch = next(feed)
                except StopIteration:
                    raise ValueError(
                        f"batches: ran out after {taken}, expected steps * accumulate = {steps * accumulate}"
                    ) from None
                with torch.random.fork_rng(devices):
                    torch.manual_seed(self.seed + taken)
                    value = loss(model, batch) / accumulate
                    value.backward()
                total = total + value.detach()
            grown = [name for name, p in parameters.items() if p.grad is not None and weights[name].requires_grad]
            torch.autograd.backward(
                [weights[name] for name in grown],
                [parameters[name].grad.to(weights[name].dtype) for name in grown],
            )
            nn.utils.clip_grad_norm_(self.parameters(), 1.0, error_if_nonfinite=True)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(float(total))
            if progress:
                progress(step, losses[-1])
        return losses

    @torch.no_grad()
    def grow(self):
        """The large model, of the small one's class and dtype, in eval mode.

        Its parameters are written in place, in panels: beside the model, memory for one small stack and about 64 MB, or
        256 MB where the stack of a row or column is so large that narrower panels would not pay (`plan.panels`).
        """
        model = self._skeleton().eval()
        parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
        ops.kron_expand_into(self._parts_into(parameters))
        return model

    def _parts_into(self, parameters):
        """What `kron_expand_into` takes, part by part: a small stack in the operators' dtype lives no longer."""
        for row in self._rows:
            targets = [parameters[name] for name in row.names]
            if row.joined is not None:
                targets = zip(*(target.chunk(len(row.parts), row.joined) for target in targets), strict=True)
            else:
                targets = [targets]
            for part, out in zip(row.parts, targets, strict=True):
                arguments, scales = self._arguments(part)
                yield dict(out=[y.unsqueeze(-1) for y in out] if row.vector else list(out), **arguments, **scales)

    def _skeleton(self):
        with torch.random.fork_rng([]):  # the constructor draws weights that are overwritten
            model = self._model_class(copy.deepcopy(self.config))
        return model.to(next(self.buffers()).device, self._small_dtype)


class _Part(NamedTuple):
    key: str
    B: str | None
    A: str | None
    layered: bool


class _Row(NamedTuple):
    names: list[str]
    parts: list[_Part]
    joined: int | None  # storage axis along which the parts are joined
    vector: bool


class _Random:
    """Initial values, all from one seeded generator."""

    def __init__(self, seed, dtype):
        self.generator, self.dtype = torch.Generator().manual_seed(seed), dtype

    def zeros(self, *shape):
        return torch.zeros(shape, dtype=self.dtype)

    def normal(self, *shape):
        """Rows that keep the scale of what they mix."""
        return torch.randn(shape, generator=self.generator, dtype=self.dtype) / math.sqrt(shape[-1])

    def uniform(self, *shape):
        return torch.rand(shape, generator=self.generator, dtype=self.dtype)

    def top(self, rows, columns):
        """[I; normal]."""
        return torch.cat([torch.eye(columns, dtype=self.dtype), self.normal(rows - columns, columns)])

    def padded(self, rows, columns):
        """[I; 0]."""
        return torch.eye(rows, columns, dtype=self.dtype)


def _compare(small_model, big_config):
    """Check that `small_model` can grow into `big_config`; returns the family and both tables of sizes."""
    config = getattr(small_model, "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type not in FAMILIES:
        raise ValueError(
            f"small_model: got {type(small_model).__name__} of model_type {model_type!r}, "
            f"expected a Hugging Face model of {', '.join(FAMILIES)}"
        )
    if getattr(big_config, "model_type", None) != model_type:
        got = getattr(big_config, "model_type", type(big_config).__name__)
        raise ValueError(f"big_config: got model_type {got!r}, expected {model_type!r} as the small model's")
    family = FAMILIES[model_type]
    for name in family.agree:
        got, expected = getattr(big_config, name, None), getattr(config, name, None)
        if got != expected:
            raise ValueError(f"big_config.{name}: got {got!r}, expected {expected!r} as in the small model")
    small, big = family.size(config), family.size(big_config)
    for name in ("layers", "hidden", "heads", "ffn"):
        if big[name] < small[name]:
            raise ValueError(
                f"big_config.{getattr(family, name)}: got {big[name]}, "
                f"expected at least {small[name]} as in the small model"
            )
    if big["head_dim"] < small["head_dim"]:
        raise ValueError(
            f"big_config.{family.heads}: got {big['heads']}, which makes heads of {big['head_dim']}, "
            f"expected at least {small['head_dim']} as in the small model"
        )
    return family, small, big


def _weights(model):
    """The model's parameters by name; ValueError where they are not those of its config, all of one dtype."""
    weights = dict(model.named_parameters())
    with torch.random.fork_rng([]), torch.device("meta"):
        expected = dict(type(model)(copy.deepcopy(model.config)).named_parameters())
    for name in sorted(weights.keys() | expected.keys()):
        got, wanted = (list(group[name].shape) if name in group else None for group in (weights, expected))
        if got != wanted:
            raise ValueError(f"small_model: {name} is {got}, expected {wanted} by the model's own config")
        if weights[name].dtype != model.dtype:
            raise ValueError(f"small_model: {name} is {weights[name].dtype}, expected {model.dtype} as the others")
    return weights


def _depth_lossless(name, sides, family, L1, L2, config, random):
    """w [L2, L1]: layer t copies layer s(t) = floor(t*L1/L2); of each run of copies only the first is not a no-op.

    Pre-LN: a copy whose residual-writing weights are zero does nothing. Post-LN: it does nothing if also its input is
    normalised already, so the affine of the norm that ends a layer moves to the end of the run and the norms it passes
    get gain 1 and shift 0. That 1 is a constant layer of ones behind the small ones: w is [L2, L1+1] for such gains.
    """
    source = [t * L1 // L2 for t in range(L2)]
    first = [t == 0 or source[t - 1] != s for t, s in enumerate(source)]
    last = [t == L2 - 1 or source[t + 1] != s for t, s in enumerate(source)]
    kinds = {side.partition("_")[2] for side in sides if side}
    norm = bool(family.post_norm and kinds & {"gain", "shift"} and L2 > L1)
    w = random.zeros(L2, L1 + (norm and "gain" in kinds))
    if norm:
        keep = last if family.post_norm == name.rpartition("*.")[2].rpartition(".")[0] else first
    else:
        keep = first if "residual_write" in sides else [True] * L2
    for t, s in enumerate(source):
        if keep[t]:
            w[t, s] = 1.0
        elif w.shape[1] > L1:
            w[t, L1] = 1.0
    if "query_write" in sides and getattr(config, family.layer_scaled_attention, False):
        w *= torch.tensor([[(t + 1) / (s + 1)] for t, s in enumerate(source)], dtype=w.dtype)
    return w


def _stack_noisy(L1, L2, random):
    """The published `stackbert_noisy`: U(0, 0.03), 1 at l2 mod L1, rows divided by their sum."""
    w = 0.03 * random.uniform(L2, L1)
    w[torch.arange(L2), torch.arange(L2) % L1] = 1.0
    return w / w.sum(1, keepdim=True)


def _official_ties(sides, tied):
    """A = B: what reads a space, or normalises it, uses the map of what writes it."""
    head = "head_write" if "head_write" in sides and not tied else "residual_write"
    writer = {"residual": "residual_write", "value": "value_write", "ffn": "ffn_write", "head": head}
    ties = {side: writer[side.partition("_")[0]] for side in sides if side.partition("_")[0] in writer}
    return {side: target for side, target in ties.items() if side != target}


def _official_maps(sides, small, big, layers, random):
    """The published `rand`: rows of U(0, 1) divided by their sum: a new coordinate is about the mean of the old."""
    maps = {}
    for side in sorted(sides):
        space = side.partition("_")[0]
        old, new = (sizes["ffn" if space == "ffn" else "hidden"] for sizes in (small, big))
        batch = layers if space in ("query", "key", "value", "ffn") else ()
        C = random.uniform(*batch, new - old, old)
        maps[side] = Identity(old) if new == old else IdentityTop(C / C.sum(-1, keepdim=True))
    return maps


def _near_maps(family, small, big, layers, tied, config, random):
    """Maps of the lossless start; for fractional growth of a post-LN model the nearest to it.

    New coordinates are unread at first, yet learn: what is written there gives the zero reads a gradient, and once the
    reads have moved all the rest has one too.
    """
    D1, D2, F1, F2 = small["hidden"], big["hidden"], small["ffn"], big["ffn"]
    maps = {}

    def add(side, C, scale=1.0):
        maps[side] = IdentityTop(C, scale) if C.shape[-2] else Identity(C.shape[-1])

    new = (D2 - D1, D1)
    zeros, mean = random.zeros(*new), torch.full(new, 1 / D1, dtype=random.dtype)
    if family.post_norm and D2 % D1 == 0:
        # Copies [I; I; ...], read in unequal parts that sum to 1: with equal parts the copies would get equal
        # gradients for ever. A tied head reads every copy whole, so its norm is divided instead.
        parts = torch.arange(D2 // D1, 0, -1, dtype=random.dtype)
        eye = torch.eye(D1, dtype=random.dtype)
        whole = eye.repeat(D2 // D1 - 1, 1)
        share = torch.cat([eye * part for part in parts[1:] / parts[0]] or [zeros])
        first = float(parts[0] / parts.sum())
        for side in ("residual_write", "residual_gain", "residual_shift", "head_write"):
            add(side, whole.clone())
        for side in ("residual_read", "head_read"):
            add(side, share.clone(), first)
        for side in ("head_gain", "head_shift"):
            add(side, *((share.clone(), first) if tied else (whole.clone(), 1.0)))
    else:
        # New coordinates carry the mean of the old ones (LEMON, arXiv:2310.07999): LayerNorm's mean stays, its variance
        # shrinks by D1/D2, and they come out as 0 times gain plus shift.
        scale = math.sqrt(D1 / D2)
        add("residual_write", mean.clone())
        add("residual_read", zeros.clone())
        add("residual_gain", random.normal(*new), scale)
        add("residual_shift", mean.clone() if family.post_norm else random.normal(*new))
        add("head_read", zeros.clone())
        if family.post_norm:  # an evenly spaced selection has about the mean and variance of the whole
            chosen = torch.eye(D1, dtype=random.dtype)[torch.arange(D2 - D1) * D1 // (D2 - D1) % D1]
            add("head_write", chosen)
            for side in ("head_gain", "head_shift"):
                add(side, zeros.clone() if tied else chosen.clone())
        else:
            add("head_gain", random.normal(*new), scale)
            add("head_shift", zeros.clone() if tied else random.normal(*new))

    add("ffn_write", random.normal(*layers, F2 - F1, F1))
    add("ffn_read", random.zeros(*layers, F2 - F1, F1))
    H1, H2, d1, d2 = small["heads"], big["heads"], small["head_dim"], big["head_dim"]
    if d1 == d2:
        for side in ("query_write", "key_write", "value_write"):
            add(side, random.normal(*layers, *new))
        add("value_read", random.zeros(*layers, *new))
    else:
        # Scores are divided by sqrt(head_dim). New query dimensions are zero, new key dimensions are not: both zero
        # would leave both without gradient.
        scale = math.sqrt(d2 / d1) if getattr(config, family.scaled_attention, True) else 1.0

        def heads(P, R, scale=1.0):
            return HeadStructured(*(M.expand(*layers, -1, -1).clone() for M in (P, R)), scale)

        maps["query_write"] = heads(random.top(H2, H1), random.padded(d2, d1), scale)
        maps["key_write"] = heads(random.top(H2, H1), random.top(d2, d1))
        maps["value_write"] = heads(random.top(H2, H1), random.top(d2, d1))
        maps["value_read"] = heads(random.padded(H2, H1), random.padded(d2, d1))
    return maps


def _model_loss(model, batch):
    inputs = batch if isinstance(batch, Mapping) else {"input_ids": batch, "labels": batch}
    loss = model(**inputs).loss
    if loss is None:
        raise ValueError("batches: the model returned no loss; expected 'labels' in every batch, or pass loss=")
    return loss


@torch.no_grad()
def _logit_change(small_model, big_model, random):
    """max |logits_big - logits_small| / max |logits_small| on random tokens."""
    config = small_model.config
    tokens = torch.randint(config.vocab_size, (2, min(64, config.max_position_embeddings)), generator=random.generator)
    tokens = tokens.to(small_model.device)
    modes = {module: module.training for module in small_model.modules()}
    try:
        small, big = small_model.eval()(tokens).logits, big_model(tokens).logits
    finally:
        for module, mode in modes.items():
            module.training = mode
    return float((big - small).abs().max() / small.abs().max())
