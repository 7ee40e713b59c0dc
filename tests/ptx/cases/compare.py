"""Results of a kernel beside those of the reference."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from ptx.emulator.values import fma32

Test = Callable[[torch.Tensor, torch.Tensor, int], bool]  # found, expected, their place in the lists


class Comparison(NamedTuple):
    name: str
    elements: int
    differ: int
    ulps: int  # at most, of the stored format
    most: float  # absolute difference
    allowed: str
    ok: bool

    def __str__(self):
        found = f"{self.differ}/{self.elements} differ, at most {self.ulps} ulps, {self.most:.1e}"
        return f"{self.name}: {found if self.differ else 'bits'}{'' if self.ok else f' NOT {self.allowed}'}"


def worst(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """One for each name, which all of that name are part of."""
    found: dict[str, Comparison] = {}
    for c in comparisons:
        old = found.setdefault(c.name, c._replace(elements=0, differ=0))
        counts = {"elements": c.elements + old.elements, "differ": c.differ + old.differ}
        found[c.name] = old._replace(
            **counts, ulps=max(c.ulps, old.ulps), most=max(c.most, old.most), ok=c.ok and old.ok
        )
    return list(found.values())


def _ordered(t: torch.Tensor) -> torch.Tensor:
    """Bit patterns as integers in the order of the values."""
    if not t.is_floating_point():
        return t.to(torch.int64)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    i = t.view(bits).to(torch.int64)
    return torch.where(i < 0, -(i & (1 << 8 * t.element_size() - 1) - 1), i)


def compare(
    name: str,
    found: Sequence[torch.Tensor],
    expected: Sequence[torch.Tensor],
    allowed: str = "bits",
    test: Test | None = None,
) -> Comparison:
    """Differences over two lists. test: what must hold of each pair, in words: `allowed`; None: equal bits."""
    result = Comparison(name, 0, 0, 0, 0.0, allowed, True)
    for i, (f, e) in enumerate(zip(found, expected, strict=True)):
        f, e = f.detach().contiguous().reshape(-1), e.detach().contiguous().reshape(-1)
        distance = (_ordered(f) - _ordered(e)).abs()
        if f.is_floating_point():
            distance[f.isnan() & e.isnan()] = 0
        differ, ulps, most = int((distance > 0).sum()), 0, 0.0
        if differ:
            ulps = int(distance.max())
            most = float((f.double() - e.double()).abs().nan_to_num(nan=math.inf).max())
        ok = bool(test(f, e, i)) if test else not differ
        result = worst([result, Comparison(name, f.numel(), differ, ulps, most, allowed, ok)])[0]
    return result


def near(exact: Sequence[torch.Tensor], step: float = 0.0) -> Test:
    """|found - exact| <= 2*|expected - exact| + rounding. step: relative spacing of a coarser stored format."""

    def test(found, expected, i):
        x = exact[i].double().reshape(-1)
        allowed = 2 * (expected.double() - x).abs() + x.abs() * max(step, 2**-23)
        allowed += (x.abs().max() if x.numel() else 0) * 2**-24
        return not ((found.double() - x).abs() > allowed).any()

    return test


def few(share: float) -> Test:
    """At most `share` of a tensor's elements differ, one allowed at least."""
    return lambda found, expected, i: int((found != expected).sum()) <= max(1, share * len(found))


def relative(rtol: float, atol: float = 0.0) -> Test:
    return lambda found, expected, i: torch.allclose(found.double(), expected.double(), rtol=rtol, atol=atol)


def within(exact: Sequence[torch.Tensor], allowed: Sequence[torch.Tensor]) -> Test:
    """|found - exact| <= allowed, for each element of each tensor."""
    return lambda found, expected, i: not ((found.double() - exact[i].reshape(-1)).abs() > allowed[i]).any()


def spacing(dtype: torch.dtype) -> float:
    """Relative distance of two neighbours, where a store may round to the other one; 0 for float32."""
    return {torch.float32: 0.0, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]


@contextlib.contextmanager
def fused_addcmul() -> Iterator[None]:
    """Within it, addcmul_ of float32 is fma(a*b, value, self), as torch's CUDA kernel rounds it and growkit's do."""
    plain = torch.Tensor.addcmul_

    def addcmul_(self, a, b, *, value=1):
        if self.dtype != torch.float32:
            return plain(self, a, b, value=value)
        with np.errstate(all="ignore"):
            result = fma32((a * b).numpy(), np.full(1, value, np.float32), self.numpy())
        return self.copy_(torch.from_numpy(result))

    torch.Tensor.addcmul_ = addcmul_
    try:
        yield
    finally:
        torch.Tensor.addcmul_ = plain
