"""What this machine can do at most: copy, fill, matrix products; read beside every other figure of the run."""

import functools

import torch

from growkit.bench.measure import Case, Value, attempt, matmul_precision, paired
from growkit.bench.sophia import copy_pair

# name -> dtype, torch's precision of float32 products
PRODUCTS = {
    "float32": (torch.float32, "highest"),
    "tf32": (torch.float32, "high"),
    "bfloat16": (torch.bfloat16, "highest"),
}


def ceilings(device, tiny=False):
    """Copy of 4 GiB and fill of as much (256 MiB on a CPU); products of 8192 (512 on a CPU), and 12 of 1024 (256)."""
    cuda = torch.device(device).type == "cuda"
    copy, copied = copy_pair(device, tiny)
    filled = torch.empty(copied // 8, device=device)
    n, batched = (16, 8) if tiny else (8192, 1024) if cuda else (512, 256)

    def product(shape, kind):
        dtype, precision = PRODUCTS[kind]
        a, b = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)

        def call():
            with matmul_precision(precision):
                torch.matmul(a, b, out=out)

        return call

    def rows(rounds):
        found = {}
        bandwidth = paired({"copy": copy, "fill": lambda: filled.fill_(1.5)}, "gpu", rounds)
        for name, moved in (("copy", copied), ("fill", copied // 2)):
            found[name] = _rate(bandwidth, name, moved / 1e9)
        # Products on the CPU say little beyond float32, and bfloat16 may be emulated there.
        kinds = PRODUCTS if cuda or tiny else ("float32",)
        for group, shape in (("mm", (n, n)), ("bmm", (12, batched, batched))):
            flops = 2 * shape[-1] ** 3 * (12 if group == "bmm" else 1)
            calls = {kind: attempt(functools.partial(product, shape, kind)) for kind in kinds}
            pairs = paired(calls, "gpu", rounds)
            found |= {f"{group}.{kind}": _rate(pairs, kind, flops / 1e12) for kind in kinds}
        return found

    def check():
        copy()
        filled.fill_(1.5)
        if not (filled == 1.5).all():
            raise AssertionError("fill_ did not fill")

    return Case(copy, check, rows, bytes=copied)


def _rate(pairs, name, work):
    taken = pairs.seconds(name)
    if isinstance(taken, str):
        return taken
    return Value(work / taken.value, taken.noise, {"seconds": taken.value})
