"""PTX types as numpy's, and arithmetic that numpy does not round as the PTX manual does."""

import re

import numpy as np

from .errors import Unsupported

UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOAT = {16: np.float16, 32: np.float32, 64: np.float64}
NAN32 = np.uint32(0x7FFFFFFF).view(np.float32)  # the one pattern in which arithmetic results are NaN


def bits_of(kind: str) -> int:
    """Width in bits of a PTX type such as "u32", "bf16", "f32x2"."""
    match = re.fullmatch(r"(?:bf|[busf])(\d+)(?:x(\d))?", kind)
    if not match:
        raise Unsupported(f"type .{kind}")
    return int(match[1]) * int(match[2] or 1)


def dtype_of(kind: str) -> np.dtype:
    """numpy's type for the values of a PTX type; bfloat16 and packed types are kept as bits."""
    if kind == "pred":
        return np.dtype(bool)
    table = UNSIGNED
    if "x" not in kind and not kind.startswith("bf"):
        table = {"s": SIGNED, "f": FLOAT}.get(kind[0], UNSIGNED)
    return np.dtype(table[bits_of(kind)])


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bfloat16(x: np.ndarray, mode: str = "rn") -> np.ndarray:
    """Bits of the nearest bfloat16 (ties to even) or, "rz", of the next towards zero."""
    b = x.view(np.uint32)
    rounded = b if mode == "rz" else b + np.uint32(0x7FFF) + ((b >> np.uint32(16)) & np.uint32(1))
    rounded = rounded >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def to_float16(x: np.ndarray) -> np.ndarray:
    """Bits of the nearest float16, ties to even."""
    return np.where(np.isnan(x), np.uint16(0x7FFF), x.astype(np.float16).view(np.uint16))


def flush(x: np.ndarray) -> np.ndarray:
    """Subnormal float32 become zeros of their sign."""
    tiny = np.abs(x) < np.float32(2**-126)
    return np.where(tiny, np.copysign(np.float32(0), x), x) if tiny.any() else x


def canonical(x: np.ndarray, ftz: bool = False) -> np.ndarray:
    """A float result as the hardware writes it."""
    nan = np.isnan(x)
    if nan.any():
        x = np.where(nan, NAN32 if x.dtype == np.float32 else x.dtype.type(np.nan), x)
    return flush(x) if ftz else x


def fma32(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a*b + c of float32, rounded once.

    The product is exact in float64. The sum is rounded to odd there (by the error that Knuth's two-sum finds), so that
    the second rounding, to float32, gives what a single one would have given.
    """
    product, c = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = product + c
    back = total - product
    error = (product - (total - back)) + (c - back)
    bits = np.ascontiguousarray(total).view(np.int64)
    odd = (error != 0) & (error == error) & (bits & 1 == 0) & np.isfinite(total)
    if odd.any():
        bits = bits + np.where(odd, np.where((error > 0) == (total > 0), 1, -1), 0)
    return bits.view(np.float64).astype(np.float32)
