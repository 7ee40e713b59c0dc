"""Lists of tensors for Sophia's ops, in memory of their own."""

import math
from typing import NamedTuple

import numpy as np
import torch

from growkit import reference

F32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
UNSIGNED, SIGNED = torch.uint8, torch.int8
GUARD = 1 << 14  # bytes around every tensor that belong to no other
LISTS = ("p", "g", "m", "h", "master", "u", "m_scale", "h_scale")


class Layout(NamedTuple):
    sizes: tuple[int, ...]
    aligned: bool = True  # all tensors start at multiples of 16 bytes
    offsets: tuple[int, ...] = ()  # of shards


# Full chunks only: what they take per element is what large tensors take.
ALIGNED = Layout((8192,))
# Nothing, less than a warp, tails, full chunks; starts of shards: whole words of random bits, within a word, beyond 32
# bits, beyond 32 bits of words.
AWKWARD = Layout(
    (0, 1, 63, 1024, 4095, 4096, 4097, 5003, 4096, 8192, 4096, 9001),
    False,
    (0, 1, 32, 8, 2**33 + 24, 2**40 + 7, 128, 5, 64, 2**33 + 32, 0, 3),
)


def place(values: torch.Tensor, name: str, layout: Layout = ALIGNED, i: int = 0) -> torch.Tensor:
    """`values` between guards, at a multiple of 16 bytes or, where the layout is not aligned, next to one."""
    size = values.element_size()
    buffer = torch.empty(values.numel() * size + 2 * GUARD + 64, dtype=torch.uint8)
    start = GUARD + -(buffer.data_ptr() + GUARD) % 16
    if not layout.aligned and i % 2:  # every other tensor; of these a single list or several lie apart
        start += size * int(np.random.default_rng((LISTS.index(name), i, len(layout.sizes))).integers(0, 4))
    placed = buffer[start : start + values.numel() * size].view(values.dtype).view(values.shape)
    return placed.copy_(values)


def random(n: int, make: torch.Generator, decades: float = 0.0) -> torch.Tensor:
    """Normal numbers, their sizes spread over so many decades."""
    return torch.randn(n, generator=make) * 10 ** (-decades * torch.rand(n, generator=make))


Lists = dict[str, list[torch.Tensor]]


def operands(layout: Layout, p=F32, g=F32, state=F32, master=None, dtype=None, given=False) -> Lists:
    """Lists p, g, m, h [, master] [, u] of the given dtypes, or all of `dtype` with the same values."""
    make = torch.Generator().manual_seed(1)

    def tensors(name, scale, own, signed=True):
        made = [random(n, make) * scale for n in layout.sizes]
        made = [(t if signed else t.abs()).to(own).to(dtype or own) for t in made]
        return [place(t, name, layout, i) for i, t in enumerate(made)]

    lists = {"p": tensors("p", 0.02, p), "g": tensors("g", 1e-3, g), "m": tensors("m", 1e-3, state)}
    lists["h"] = tensors("h", 1e-5, state, False)
    if master:
        lists["master"] = [place(t.to(dtype or master), "master", layout, i) for i, t in enumerate(lists["p"])]
    if given:
        lists["u"] = tensors("u", 1.0, g)
    return lists


def coded_operands(layout: Layout, p=F32, g=F32, h=UNSIGNED, master=False, given=False) -> Lists:
    """The same with m and h in 8-bit codes, and the lists of their scales."""
    make = torch.Generator().manual_seed(1)
    lists = {"p": [0.02 * random(n, make) for n in layout.sizes]}
    lists["g"] = [1e-3 * random(n, make, 3).to(g) for n in layout.sizes]
    if given:
        lists["u"] = [random(n, make).to(g) for n in layout.sizes]
    if master:
        lists["master"] = [t.clone() for t in lists["p"]]
    lists["p"] = [t.to(p) for t in lists["p"]]
    for name, size, decades, dtype in (("m", 1e-3, 3, SIGNED), ("h", 1e-5, 8, h)):
        lists[name], lists[f"{name}_scale"] = [], []
        for n in layout.sizes:
            codes, scale = torch.full((n,), 99, dtype=dtype), torch.full((-(-n // 256), 2), math.nan)
            reference.quantise_(codes, scale, size * random(n, make, decades))
            lists[name].append(codes), lists[f"{name}_scale"].append(scale)
    return {name: [place(t, name, layout, i) for i, t in enumerate(tensors)] for name, tensors in lists.items()}


def key(layout: Layout) -> dict:
    """What the random bits of the lists are drawn by."""
    parameters = list(range(3, 3 + len(layout.sizes)))
    return {"seed": 0x1234_5678_9ABC_DEF1, "parameter": parameters, "offset": list(layout.offsets)}
