"""Maps between a small space and its larger version.

A space is a named axis that many weights share: the residual stream, the query, key and value heads, the MLP's hidden
axis, the hidden axis of the head. It has up to four sides, each with a map of its own: *write* (of the weights that
produce it), *read* (of the weights that consume it), *gain* and *shift* (of norm weights and biases). A growth of a
linear path keeps the function where read^T write = I; LiGO as published ties all four sides to one map.
"""

import torch
from torch import nn


class Map(nn.Module):
    """new = scale * M old along one axis.

    kind, tensor(): M in the form that `growkit.ops.kron_expand` takes.
    scale: a number, or one per new coordinate.
    """

    kind = "dense"

    def __init__(self, scale=1.0):
        super().__init__()
        if isinstance(scale, float):
            self.scale = scale
        else:
            self.register_buffer("scale", torch.as_tensor(scale))

    def tensor(self):
        raise NotImplementedError

    def matrix(self):
        """scale * M written out, [large, small] (or [layers, large, small]); for inspection and tests."""
        raise NotImplementedError

    def _scaled(self, M):
        return M * (self.scale if isinstance(self.scale, float) else self.scale.unsqueeze(-1))


class Identity(Map):
    """The axis keeps its size; nothing is learned."""

    def __init__(self, size):
        super().__init__()
        self.size = size

    def tensor(self):
        return None

    def matrix(self):
        return torch.eye(self.size)


class IdentityTop(Map):
    """scale * [I; C]: old coordinates stay, C [large-small, small] (or [layers, ...]) is learned."""

    kind = "identity_top"

    def __init__(self, C, scale=1.0):
        super().__init__(scale)
        self.C = nn.Parameter(C)

    def tensor(self):
        return self.C

    def matrix(self):
        eye = torch.eye(self.C.shape[-1], dtype=self.C.dtype, device=self.C.device)
        return self._scaled(torch.cat([eye.expand(*self.C.shape[:-2], -1, -1), self.C], -2))


class Dense(Map):
    """Any M [large, small] (or [layers, large, small]), learned whole."""

    def __init__(self, M, scale=1.0):
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

    def __init__(self, index, small, scale=1.0):
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


class HeadStructured(Map):
    """scale * P (x) R: head map P [heads2, heads1] times map inside a head R [head_dim2, head_dim1], both learned.

    Where head_dim grows, [I; C] over the flat axis would put parts of two old heads in one new head; this does not.
    """

    def __init__(self, P, R, scale=1.0):
        super().__init__(scale)
        self.P, self.R = nn.Parameter(P), nn.Parameter(R)

    def tensor(self):
        M = torch.einsum("...ij,...kl->...ikjl", self.P, self.R)
        return M.flatten(-4, -3).flatten(-2)

    def matrix(self):
        return self._scaled(self.tensor())
