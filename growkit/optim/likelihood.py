"""What a training loss scores: which output of the model, which of its rows, and by what likelihood.

Nothing is guessed from names or shapes. The gradient g of the training loss at an output z tells: rows that the loss
does not read have none; that of a cross-entropy is a*(softmax(z) - onehot), that of a binary one a*(sigmoid(z) - y).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, get_args

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

from growkit import ops

_SAMPLE = 64  # rows that are looked at to tell the likelihood


@dataclasses.dataclass(frozen=True)
class gaussian:
    """y ~ N(z, sigma^2), for regression: sigma = 0.5**0.5 makes its mean negative log-likelihood `nn.MSELoss`."""

    sigma: float

    def __post_init__(self):
        if (
            isinstance(self.sigma, bool)
            or not isinstance(self.sigma, (int, float))
            or not 0 < self.sigma < float("inf")
        ):
            raise ValueError(f"gaussian: sigma={self.sigma!r}, expected a finite number > 0")


Named = Literal["categorical", "bernoulli"]
Likelihood = Named | gaussian | Callable[[Any], tuple[torch.Tensor, Any]]


def check(likelihood: Likelihood | None) -> None:
    known = likelihood is None or isinstance(likelihood, str) and likelihood in get_args(Named)
    if (
        not known
        and not isinstance(likelihood, gaussian)
        and (isinstance(likelihood, type) or not callable(likelihood))
    ):
        raise ValueError(
            f"likelihood={likelihood!r}, expected 'categorical', 'bernoulli', growkit.optim.gaussian(sigma), or a "
            "callable(output) that returns (mean NLL of labels drawn from the model, number of labels)"
        )


@dataclasses.dataclass
class Scored:
    """What the gradient at an output says. likelihood None: neither cross-entropy nor binary cross-entropy.

    rows: bool, True where the loss reads the output: shaped as it without `axis`, that of the classes; elementwise
    where axis is None. None: all. certain: whether g is that of one label a row. silent: g is zero or not finite, where
    nothing was known before.
    gradient: g itself where it tells no likelihood, to find the rows once the user has said which.
    """

    likelihood: Likelihood | None = None
    axis: int | None = None
    rows: torch.Tensor | None = None
    certain: bool = True
    silent: bool = False
    gradient: torch.Tensor | None = None

    def empty(self) -> bool:
        """Whether no row counts. The host waits for the device."""
        return self.silent or self.rows is not None and not self.rows.any()


def read(z: torch.Tensor, g: torch.Tensor, known: Scored | None = None) -> Scored:
    """What g, the gradient of the training loss at z, says. known: what is known already, so that only rows are new.

    Only where nothing is known does the host wait for the device.
    """
    if known is None:
        if not g.sum().isfinite() or not g.any():
            return Scored(silent=True)
        known = _told(z, g)
    if known.likelihood is None:
        return dataclasses.replace(known, gradient=g)
    return dataclasses.replace(known, rows=nonzero(g, known.axis) & g.sum().isfinite())


def _told(z, g):
    # Losses are often formed in float32 whatever z is.
    tolerance = max(1e-4, 2 * torch.finfo(g.dtype).eps)
    found = {axis: _categorical(z, g, axis, tolerance) for axis in range(z.dim()) if z.shape[axis] > 1}
    for kind in ("one label", "sums to zero"):
        axes = [axis for axis, each in found.items() if each == kind]
        if axes:  # of several, as with two rows of two classes, the usual one
            return Scored("categorical", axes[-1], certain=kind == "one label")
    return Scored("bernoulli") if _bernoulli(z, g, tolerance) else Scored()


def nonzero(g, axis):
    # The norm needs no temporary of the size of g. A row keeps a gradient however sure the model is: that of the
    # other classes is tiny, but not zero.
    return g != 0 if axis is None else torch.linalg.vector_norm(g, float("inf"), dim=axis) != 0


def _categorical(z, g, axis, tolerance):
    """'one label' where g is a*(softmax - onehot) in each row, 'sums to zero' where it only has that in common."""
    rows = nonzero(g, axis).nonzero()[:_SAMPLE].unbind(1)
    g, z = (t.detach().movedim(axis, -1)[rows].reshape(-1, t.shape[axis]).double() for t in (g, z))
    total = g.sum(-1).abs().sum() / g.abs().sum()
    p = z.softmax(-1)
    # A policy gradient with a negative advantage pushes the label down: its sign is the other one.
    g = torch.where((g.amax(-1) > -g.amin(-1) * (1 + tolerance))[:, None], -g, g)
    others = torch.ones_like(g, dtype=torch.bool).scatter_(-1, g.argmin(-1, keepdim=True), False)
    g, p = g * others, p * others
    a = (g * p).sum(-1, keepdim=True) / p.square().sum(-1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)
    if g.shape[-1] == 2:  # one other class always has the ratio a: it must be that of the other rows, too
        a = a.mean()
    error = ((g - a * p).square().sum() / g.square().sum()).sqrt()
    if (total < tolerance or g.shape[-1] > 2 and total < 0.2) and error < tolerance and (a > 0).any():
        return "one label"
    return "sums to zero" if total < tolerance else None


def _bernoulli(z, g, tolerance):
    """Whether g is a*sigmoid(z) where y is 0 and -b*(1 - sigmoid(z)) where it is 1."""
    where = g.flatten().nonzero()[: _SAMPLE * _SAMPLE, 0]
    z, g = (t.detach().flatten()[where].double() for t in (z, g))
    informed = False
    for sign in (1, -1):
        own = g * sign > 0
        value, s = (g * sign)[own], (z * sign)[own].sigmoid()
        if len(s):
            a = (value * s).sum() / s.square().sum()
            if (value - a * s).square().sum().sqrt() > tolerance * value.square().sum().sqrt():
                return False
            informed |= bool(len(s) > 1 and s.std() > 10 * tolerance * s.mean())
    return informed


def leaves(output: Any, path: tuple = ()) -> Iterator[tuple[tuple, torch.Tensor]]:
    """(path, tensor) of each tensor in a model's output: mappings, sequences and objects with attributes."""
    if isinstance(output, torch.Tensor):
        yield path, output
    elif len(path) < 4 and not isinstance(output, (str, bytes, torch.nn.Module)):
        if isinstance(output, Mapping):
            items = output.items()
        elif isinstance(output, (list, tuple)):
            items = enumerate(output)
        else:
            items = getattr(output, "__dict__", {}).items()
        for key, value in items:
            yield from leaves(value, (*path, key))


def edge_of(z: torch.Tensor) -> GradientEdge:
    """Where the gradient of z arrives: before a mere change of dtype, for the loss may have been formed before it."""
    edge = get_gradient_edge(z)
    while edge.node.name() == "ToCopyBackward0":
        edge = GradientEdge(*edge.node.next_functions[0])
    return edge


def differentiable(output: Any) -> dict[tuple, torch.Tensor]:
    return {path: t for path, t in leaves(output) if t.requires_grad and t.is_floating_point()}


def loss_of(output: Any) -> torch.Tensor | None:
    """The scalar called loss in a model's output, or else its only scalar."""
    scalars = {path: t for path, t in differentiable(output).items() if t.dim() == 0}
    named = [t for path, t in scalars.items() if path[-1:] == ("loss",)]
    found = named or list(scalars.values())
    return found[0] if len(found) == 1 else None


def candidates(output: Any) -> dict[tuple, torch.Tensor]:
    """The outputs that a loss may read: the one called logits, or all that are not on the way to another of them."""
    found = {path: t for path, t in differentiable(output).items() if t.dim() > 0}
    if named := {path: t for path, t in found.items() if path[-1:] == ("logits",)}:
        return dict([min(named.items(), key=lambda item: len(item[0]))])
    if len(found) > 1:
        nodes = {path: get_gradient_edge(t).node for path, t in found.items()}
        earlier = set().union(*map(behind, nodes.values()))
        found = {path: t for path, t in found.items() if nodes[path] not in earlier}
    return found


def behind(node):
    seen, todo = set(), [node]
    while todo:
        for each, _ in todo.pop().next_functions:
            if each is not None and each not in seen:
                seen.add(each)
                todo.append(each)
    return seen


def keys(z: torch.Tensor, scored: Scored) -> int:
    """How many keys of random bits `sampled` uses: rows of logits, or elements."""
    return z.numel() if scored.axis is None else z.numel() // z.shape[scored.axis]


def sampled(z: torch.Tensor, scored: Scored, *, seed: int, refresh: int, row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(summed NLL of labels drawn from the likelihood, their number); row: the first key of random bits."""
    if scored.silent:  # backward all the same, where several processes go together
        return z.sum() * 0, torch.zeros((), dtype=torch.int64, device=z.device)
    key = {"seed": seed, "refresh": refresh}
    rows = None if scored.rows is None else scored.rows.flatten()
    if isinstance(scored.likelihood, gaussian):
        # The NLL's gradient is (z - y)/sigma^2. Of the noise only its variance counts: signs have that of a normal.
        u = torch.empty(z.numel(), dtype=z.dtype, device=z.device)
        ops.rademacher_([u], parameter=[0], offset=[row], **key)
        u = u if rows is None else u * rows
        return (z.flatten() * u).sum() / scored.likelihood.sigma, u.count_nonzero()
    if scored.likelihood == "bernoulli":  # two classes, with logits 0 and z
        z = torch.stack([torch.zeros_like(z), z], -1)
    else:
        z = z.movedim(scored.axis, -1)
    z = z.reshape(-1, z.shape[-1])
    nll, labels, _ = ops.sampled_nll(z, rows, row=row, **key)
    n = (labels != -100).sum()
    return nll * n, n
