"""Maps between a small space and its larger version.

A space is a named axis that many weights share: the residual stream, the query, key and value heads, the MLP's hidden
axis, the hidden axis of the head. It has up to four sides, each with a map of its own: *write* (of the weights that
produce it), *read* (of the weights that consume it), *gain* and *shift* (of norm weights and biases). A growth of a
linear path keeps the function where read^T write = I; LiGO as published ties all four sides to one map.
"""

from collections.abc import Sequence

import torch
from torch import nn


class Map(nn.Module):
    """new = scale * M old along one axis.

    kind, tensor(): M in the form that `growkit.ops.kron_expand` takes.
    scale: a number, or one per new coordinate, or those of every large layer, [L2, large].
    """

    kind = "dense"

    def __init__(self, scale: float | torch.Tensor = 1.0):
        super().__init__()
        if isinstance(scale, float):
            self.scale = scale
        else:
            self.register_buffer("scale", torch.as_tensor(scale))

    def tensor(self) -> torch.Tensor | None:
        raise NotImplementedError

    def matrix(self) -> torch.Tensor:
        """scale * M written out, [large, small] (or [layers, large, small]); for inspection and tests."""
        raise NotImplementedError

    def prepare(self, W: torch.Tensor, dim: int) -> torch.Tensor:
        """What `tensor()` multiplies along `dim` of a stack of small weights."""
        return W

    def _scaled(self, M):
        return M * (self.scale if isinstance(self.scale, float) else self.scale.unsqueeze(-1))


class Identity(Map):
    """The axis keeps its size; nothing is learned."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def tensor(self):
        return None

    def matrix(self):
        return torch.eye(self.size)


class IdentityTop(Map):
    """scale * [I; C]: old coordinates stay, C [large-small, small] (or [layers, ...]) is learned."""

    kind = "identity_top"

    def __init__(self, C: torch.Tensor, scale: float | torch.Tensor = 1.0):
        super().__init__(scale)
        self.C = nn.Parameter(C)

    def tensor(self):
        return self.C

    def matrix(self):
        eye = torch.eye(self.C.shape[-1], dtype=self.C.dtype, device=self.C.device)
        return self._scaled(torch.cat([eye.expand(*self.C.shape[:-2], -1, -1), self.C], -2))


class Dense(Map):
    """Any M [large, small] (or [layers, large, small]), learned whole."""

    def __init__(self, M: torch.Tensor, scale: float | torch.Tensor = 1.0):
        super().__init__(scale)
        self.M = nn.Parameter(M)

    def tensor(self):
        return self.M

    def matrix(self):
        return self._scaled(self.M)


class Copy(Map):
    """new[j] = scale[j] * old[index[j]]; nothing is learned, exact to the bit where scale is 1.

    Net2Net width: a write side with scale 1, and a read side with the same index and scale 1 / (number of copies).
    """

    kind = "copy"

    def __init__(self, index: Sequence[int] | torch.Tensor, small: int, scale: float | torch.Tensor = 1.0):
        super().__init__(scale)
        index = torch.as_tensor(index)
        if index.ndim != 1 or index.dtype != torch.int64 or index.min() < 0 or index.max() >= small:
            raise ValueError(f"index: expected a list of integers in [0, {small}), got {index.dtype} {index.tolist()}")
        self.small = small
        self.register_buffer("index", index)

    def tensor(self):
        return self.index

    def matrix(self):
        return self._scaled(torch.eye(self.small, device=self.index.device)[self.index])


class Extension(Map):
    """Old coordinates stay, new ones are the mean of the old: rows of a table that nothing has looked up yet."""

    kind = "copy"

    def __init__(self, small: int, large: int):
        super().__init__()
        self.small = small
        self.register_buffer("index", torch.arange(large).clamp(max=small))

    def tensor(self):
        return self.index

    def prepare(self, W, dim):
        return torch.cat([W, W.mean(dim, keepdim=True)], dim)

    def matrix(self):
        return self.prepare(torch.eye(self.small, device=self.index.device), 0)[self.index]


class Noise(Dense):
    """What tells copies apart that are read alike: N with N^T M = 0 for the map M that writes them, so that it adds
    nothing to what is computed."""


class Terms(Map):
    """A sum of maps.

    A weight between two such sides is a sum of Kronecker terms, W_new = sum_r B[r] W A[r]^T, which no single pair of
    maps makes; a side that is no sum is in every term. Where a depth map is [R, L2, L1], each term mixes layers its own
    way. Noise is a term beside the whole of the other side.
    alone: in place of the sum, where the other side is none.
    """

    def __init__(self, *terms: Map, alone: Map | None = None):
        super().__init__()
        self.terms, self.alone = nn.ModuleList(terms), alone

    @property
    def quiet(self) -> list[Map]:
        """The terms but for noise."""
        return [term for term in self.terms if not isinstance(term, Noise)]

    def matrix(self):
        return sum(term.matrix() for term in self.terms)


class _Whole(Map):
    def __init__(self, terms):
        super().__init__()
        self.M = sum(term.matrix() for term in terms)

    def tensor(self):
        return self.M


def stacked(S: Map | None, W: torch.Tensor, w: torch.Tensor):
    """(small matrices [L1, rows, columns], depth map) for each large one of a stack W [L1, stack, rows, columns] whose
    axis has this map: a copy, or a mixture."""
    if S is None or S.tensor() is None:
        return [(one, w) for one in W.unbind(1)]
    if S.kind == "copy":
        scale = S.scale if isinstance(S.scale, torch.Tensor) else torch.full((len(S.index),), S.scale)
        scale = scale.to(w).expand(w.shape[-2], -1).unsqueeze(-1)
        return [(W[:, i], w * scale[:, e]) for e, i in enumerate(S.index.tolist())]
    return [(one, w) for one in torch.einsum("fe,leij->lfij", S.matrix().to(W), W).unbind(1)]


def kronecker_terms(B: Map | None, A: Map | None, w: torch.Tensor | None) -> list[tuple]:
    """(B, A, w) of every term of a weight between these maps; one where none of them is a sum."""
    sides = [M.quiet if isinstance(M, Terms) else [M] for M in (B, A)]
    for side, other, M in ((0, 1, B), (1, 0, A)):
        if isinstance(M, Terms) and M.alone is not None and len(sides[other]) == 1:
            sides[side] = [M.alone]
    layers = list(w) if w is not None and w.ndim == 3 else [w]
    counts = {len(terms) for terms in (*sides, layers)} - {1}
    if len(counts) > 1:
        raise ValueError(f"maps: a weight is between sums of {' and '.join(map(str, sorted(counts)))} terms")
    count = max(counts, default=1)
    found = list(zip(*(terms * (count // len(terms)) for terms in (*sides, layers)), strict=True))
    noise = [[N for N in M.terms if isinstance(N, Noise)] if isinstance(M, Terms) else [] for M in (B, A)]
    whole = [terms[0] if len(terms) == 1 else _Whole(terms) for terms in sides]
    return found + [(N, whole[1], w) for N in noise[0]] + [(whole[0], N, w) for N in noise[1]]


class HeadTop(Map):
    """scale * [I; C (x) I]: old heads stay, new ones mix them as a whole: C [heads2-heads1, heads1] is learned.

    It commutes with what happens inside every head alike, as rotary positions do.
    """

    kind = "identity_top"

    def __init__(self, C: torch.Tensor, head_dim: int, scale: float | torch.Tensor = 1.0):
        super().__init__(scale)
        self.C, self.head_dim = nn.Parameter(C), head_dim

    def tensor(self):
        return _kron(self.C, torch.eye(self.head_dim, dtype=self.C.dtype, device=self.C.device))

    def matrix(self):
        C = self.tensor()
        eye = torch.eye(C.shape[-1], dtype=C.dtype, device=C.device)
        return self._scaled(torch.cat([eye.expand(*C.shape[:-2], -1, -1), C], -2))


class HeadStructured(Map):
    """scale * P (x) R: head map P [heads2, heads1] times map inside a head R [head_dim2, head_dim1], both learned.

    R: or head_dim, for the identity. Where head_dim grows, [I; C] over the flat axis would put parts of two old heads
    in one new head; this does not.
    """

    def __init__(self, P: torch.Tensor, R: torch.Tensor | int, scale: float | torch.Tensor = 1.0):
        super().__init__(scale)
        self.P, self.R = nn.Parameter(P), R if isinstance(R, int) else nn.Parameter(R)

    def tensor(self):
        R = self.R
        return _kron(self.P, torch.eye(R, dtype=self.P.dtype, device=self.P.device) if isinstance(R, int) else R)

    def matrix(self):
        return self._scaled(self.tensor())


def _kron(P, R):
    """P (x) R, with or without leading dimensions."""
    return torch.einsum("...ij,...kl->...ikjl", P, R).flatten(-4, -3).flatten(-2)
