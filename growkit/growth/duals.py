"""How gradients of the large model follow from those of the small one: the duals of an operator's maps.

A weight's gradient is dy (x) x, so along its rows it follows what the large model's dy is of the small one's, along its
columns what x is. Where nothing stands between the write and the read side of a space, dy of what writes it follows the
read side, and x of what reads it the write side. What stands between decides the rest: what acts on each coordinate by
itself lets through plain copies; a norm multiplies by its gain (and, on the way back, subtracts two projections that
the small gradient does not tell: see `grow_optimizer`); attention sums over the queries of a group.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch

from growkit.growth.families.table import size_of
from growkit.growth.heads import rotary_dims
from growkit.growth.layout import pieces
from growkit.growth.spaces import Terms


class Dual(NamedTuple):
    """Gradients along one axis: new = matrix @ old, [large, small].

    known: bool [large]; a row of zeros that is known says that there is no gradient yet, one that is not that the small
    model's moments do not tell.
    """

    matrix: torch.Tensor
    known: torch.Tensor

    def of(self, x: torch.Tensor, dim: int, squares: bool = False) -> torch.Tensor:
        """x [..., small, ...] along `dim` of its two last dimensions, -2 or -1.

        squares: x is a mean of squares, and so is what is returned; rows of zeros become the mean of the others, for no
        step may be divided by nothing.
        """
        M = self.matrix.to(x)
        if squares:
            M, empty = M.square(), (M == 0).all(1)
            if empty.any() and not empty.all():
                M[empty] = M[~empty].mean(0)
        return M @ x if dim == -2 else x @ M.T


class Rows(NamedTuple):
    """Gradients of a table of which the new rows were never looked up."""

    small: int
    large: int

    @property
    def known(self):
        return torch.arange(self.large) < self.small

    def of(self, x, dim, squares=False):
        new = x.mean(dim, keepdim=True) if squares else torch.zeros_like(x.narrow(dim, 0, 1))
        shape = list(new.shape)
        shape[dim] = self.large - self.small
        return torch.cat([x, new.expand(shape)], dim)


def duals(operator, layer: int) -> Mapping[str, Dual | Rows]:
    """Side -> dual of its map, for the large layer that does what this small layer does."""
    maps = _Maps(operator, layer)
    growth = operator._growth
    if growth.more_experts:
        raise ValueError("optimizer: what copies of experts get of the router's weight is not known for more experts")
    found = _residual(maps, growth) | _attention(maps, growth)
    for space in growth.family.hidden:
        if space != "head":
            found |= _hidden(maps, space)
    if "head_gain" in maps.sides:
        found |= _head(maps, growth)
    for space in growth.family.tables:
        if growth.big[space] > growth.small[space]:
            found[f"{space}_write"] = Rows(growth.small[space], growth.big[space])
    return {side: dual for side, dual in found.items() if side in maps.sides}


class _Maps:
    """Maps of an operator written out for one layer, [large, small], without noise. A side that the model lacks keeps
    old coordinates and adds nothing."""

    def __init__(self, operator, layer):
        self.operator, self.small = operator, layer
        self.large = operator._source.index(layer)
        self.sides = {side for row in operator.rows for piece in pieces(row.entries) for side in piece.sides if side}

    def __call__(self, side):
        operator = self.operator
        large, small = (size_of(side, sizes) for sizes in (operator._big, operator._small))
        own = operator._map(side) if side in self.sides else None
        terms = [own]
        if isinstance(own, Terms):
            terms = own.quiet if own.alone is None else [own.alone]
        return sum(self._written_out(term, large, small) for term in terms)

    def _written_out(self, own, large, small):
        operator = self.operator
        M = own.tensor() if own else None
        if M is None:
            M = torch.eye(large, small, dtype=operator._operator_dtype, device=operator._device)
        elif own.kind == "copy":
            M = torch.eye(small, dtype=operator._operator_dtype, device=M.device)[M]
        else:
            M = M.detach()
            if M.ndim == 3:
                M = M[self.large if operator.sharing == "target" else self.small]
            if own.kind == "identity_top":
                M = torch.cat([torch.eye(small, dtype=M.dtype, device=M.device), M])
        scale = own.scale if own else 1.0
        if isinstance(scale, torch.Tensor):
            scale = (scale[self.large] if scale.ndim > 1 else scale).to(M).unsqueeze(-1)
        return M * scale


def _entry(M):
    """Of every row the column of its only entry, and the entry: 0 for a row of zeros, nan where there are several."""
    count, index = (M != 0).sum(1), M.abs().argmax(1)
    entry = M.gather(1, index[:, None])[:, 0]
    return index, torch.where(count > 1, torch.nan, entry)


def _times(*factors):
    """Dual of a product coordinate by coordinate: known where all factors copy the same one, or one is zero."""
    index, entry = _entry(factors[0])
    for M in factors[1:]:
        column, other = _entry(M)
        zero = (entry == 0) | (other == 0)
        index = torch.where(entry == 0, column, index)
        entry = torch.where(zero, 0.0, torch.where(index == column, entry * other, torch.nan))
    matrix = torch.zeros_like(factors[0])
    matrix[torch.arange(len(matrix)), index] = entry.nan_to_num(0.0)
    return Dual(matrix, ~entry.isnan())


def _whole(M):
    return Dual(M, torch.ones(len(M), dtype=torch.bool, device=M.device))


def _norm(maps, space, written, read, layer_norm):
    """Duals of gain and shift, of what reads the norm's output, and of what writes its input."""
    gain, shift = maps(f"{space}_gain"), maps(f"{space}_shift")
    normed = written
    if layer_norm:  # what is the mean leaves as zero
        normed = torch.where((written == written[:, :1]).all(1, keepdim=True), 0.0, written)
    out = _times(gain, normed)
    if f"{space}_shift" in maps.sides:
        same = torch.isclose(out.matrix, shift).all(1)
        out = Dual(out.matrix * same[:, None], out.known & same)
    return _times(read, normed), _whole(read), out, _times(gain, read)


def _residual(maps, growth):
    written, layer_norm = maps("residual_write"), growth.family.residual.norm == "layer"
    gain, shift, out, back = _norm(maps, "residual", written, maps("residual_read"), layer_norm)
    if growth.family.residual.bare:  # what blocks read has no gain
        back = _times(maps("residual_read"))
    found = {"residual_gain": gain, "residual_shift": shift, "residual_read": out, "residual_write": back}
    longer = written.norm() / maps("embedded_write").norm()
    found["embedded_write"] = Dual(back.matrix * longer, back.known)
    through = {"branch_write": _times(maps("branch_gain"), back.matrix)}
    through["branch_gain"] = _times(maps("branch_write"), back.matrix)
    return found | {side: Dual(dual.matrix, dual.known & back.known) for side, dual in through.items()}


def _head(maps, growth):
    """The last norm, and what is before it where the head has units of its own. A tied head reads by what embeds."""
    own = "head_write" in maps.sides
    written = maps("head_write" if own else "residual_write")
    read = maps("head_read")
    if growth.tied:
        read = maps("embedded_write" if "embedded_write" in maps.sides else "residual_write")
    gain, shift, out, back = _norm(maps, "head", written, read, own or growth.family.residual.norm == "layer")
    found = {"head_gain": gain, "head_shift": shift, "head_read": out}
    return found | ({"head_write": back} if own else {})


def _hidden(maps, space):
    """Units that act one by one: of a copy all is known, of another unit that nothing is read."""
    written, read = maps(f"{space}_write"), maps(f"{space}_read")
    _, entry = _entry(written)
    copies = entry == 1
    out = Dual(written * copies[:, None], copies)
    back = _times(read, out.matrix)
    return {f"{space}_read": out, f"{space}_write": Dual(back.matrix, back.known & (copies | (read == 0).all(1)))}


def _attention(maps, growth):
    """Heads: a copy has the scores of its original, and gradients of the part that is read of it.

    With a v_big . dout_big = a v . dout and q_big . k_big = s q . k of a copied head: dq_big = a/s R_k dq and, summed
    over the queries of its group, dk_big = a/s R_q dk and dv_big = R_o dv.
    """
    H1, H2, K1, K2, d1, d2 = (
        sizes[name] for name in ("heads", "kv_heads", "head_dim") for sizes in (growth.small, growth.big)
    )
    g1, g2 = H1 // K1, H2 // K2
    sides = ("query_write", "key_write", "value_write", "value_read")
    blocks = [maps(side) for side in sides]
    blocks = [M.view(M.shape[0] // d2, d2, M.shape[1] // d1, d1).transpose(1, 2) for M in blocks]
    Q, K, V, O = blocks  # noqa: E741
    new = [torch.zeros_like(M) for M in blocks]
    known = [torch.ones(M.shape[0], d2, dtype=torch.bool, device=M.device) for M in blocks]
    rotary = bool(rotary_dims(growth, d1))
    parts = torch.zeros(2, K2, H1, d2, d1, dtype=Q.dtype, device=Q.device)  # of every query in dk and dv
    read = torch.zeros(H1, dtype=Q.dtype, device=Q.device)
    alike = True
    for h in range(H2):
        k = h // g2
        copied = _copied(Q[h], K[k], V[k], O[h], g1)
        if copied is None:
            known[3][h] = False
            if O[h].any():
                known[0][h], known[1][k], known[2][k], alike = False, False, False, False
            continue
        source, a, s = copied
        new[0][h, source] = a / s * K[k, source // g1]
        if rotary and a:  # new dimensions turn at frequencies of their own
            known[0][h] = (K[k, source // g1] != 0).sum(1) <= 1
            new[0][h, source] *= known[0][h][:, None]
        new[3][h, source] = V[k, source // g1]
        parts[0, k, source] += a / s * Q[h, source]
        parts[1, k, source] += O[h, source]
        read[source] += a
    for which, found in enumerate(parts, 1):
        for k in range(K2):
            groups = found[k].view(K1, g1, d2, d1)
            same = bool(torch.isclose(groups, groups[:, :1]).all())
            known[which][k] &= same
            new[which][k] = groups[:, 0] * known[which][k][:, None]
    found = {
        side: Dual(M.transpose(1, 2).reshape(len(M) * d2, -1), rows.flatten())
        for side, M, rows in zip(sides, new, known, strict=True)
    }
    eye = torch.eye(d2, d1, dtype=Q.dtype, device=Q.device)
    told = (torch.arange(d2, device=Q.device) < d1) & (alike and d1 == d2 and bool(torch.isclose(read, read[:1]).all()))
    gains = Dual(eye * read[0] * told[:, None], told)
    found |= {"query_gain": gains, "key_gain": gains}
    for space in ("query", "key"):
        written = found[f"{space}_write"]
        found[f"{space}_gains"] = written
        normed = growth.family.attention.normed
        if (normed == "heads" and H2 > H1) or (normed and d2 > d1):  # behind the norm's two projections
            found[f"{space}_write"] = Dual(written.matrix, torch.zeros_like(written.known))
    return found


def _copied(q, k, v, o, g1):
    """(old head, a, s) where a head is a copy of an old one with its key and value; None where it is not."""
    sources = [{int(i) for i in M.flatten(1).any(1).nonzero()} for M in (q, k, v, o)]
    if len(sources[0]) != 1 or not sources[3] <= sources[0]:
        return None
    source = next(iter(sources[0]))
    if sources[1] != {source // g1} or sources[2] != {source // g1}:
        return None
    found = []
    for left, right in ((o[source], v[source // g1]), (q[source], k[source // g1])):
        product = left.T @ right
        scale = product.diagonal().mean()
        if not torch.allclose(product, scale * torch.eye(len(product), dtype=product.dtype, device=product.device)):
            return None
        found.append(float(scale))
    return (source, *found) if found[1] else None
