"""What instructions compute that concern each thread alone: moves, arithmetic, comparisons, conversions.

An entry of SEMANTICS takes an instruction's modifiers and its number of sources and returns an Operation. A new
instruction is a new entry, written from the PTX manual.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .errors import Unsupported
from .values import (
    NAN32,
    bits_of,
    canonical,
    dtype_of,
    flush,
    fma32,
    from_bfloat16,
    to_bfloat16,
    to_float16,
)


class Operation(NamedTuple):
    result: str  # type
    sources: list[str]  # types
    function: Callable[..., np.ndarray]
    # Of approximate float32 instructions: the error that the manual allows, in 2^-23 of the result; `function` is then
    # exact, of float64. ftz: whether they flush subnormal numbers.
    ulp: float | None = None
    ftz: bool = False


SEMANTICS: dict[str, Callable[[list[str], int], Operation]] = {}


def _semantics(*names: str):
    def register(function):
        for name in names:
            SEMANTICS[name] = functools.partial(function, name)
        return function

    return register


def only(modifiers: list[str], *allowed: str) -> None:
    for modifier in modifiers:
        if modifier not in allowed:
            raise Unsupported(f"modifier .{modifier}")


def approximate(operation: Operation, values: list[np.ndarray], noise: int | None) -> np.ndarray:
    """Result of an approximate instruction: correctly rounded, or (noise: any number) moved within its error."""
    values = [flush(v) for v in values] if operation.ftz else values
    exact = operation.function(*[v.astype(np.float64) for v in values])
    if noise is not None:
        # A function of the operands: on hardware, too, threads that hold the same values find the same result.
        mixed = np.uint32(noise * 2 + 1)
        for v in values:
            mixed = (mixed ^ v.view(np.uint32)) * np.uint32(0x9E3779B1)
            mixed = mixed ^ mixed >> np.uint32(15)
        moved = exact * (1 + (mixed * 2.0**-31 - 1) * operation.ulp * 2.0**-23)
        exact = np.where(exact == 1, exact, moved)  # the manual promises ex2(0) = 1
    return canonical(exact.astype(np.float32), operation.ftz)


# --- moves and logic ---


@_semantics("mov", "cvta")
def _mov(name, modifiers, count):
    kind = modifiers[-1]
    if name == "mov":
        only(modifiers[:-1])
    return Operation(kind, [kind], lambda a: a)


INTEGER = {
    "add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip


@_semantics("and", "or", "xor")
def _logic(name, modifiers, count):
    (kind,) = modifiers
    return Operation(kind, [kind] * 2, INTEGER[name])


@_semantics("not")
def _not(name, modifiers, count):
    (kind,) = modifiers
    return Operation(kind, [kind], np.logical_not if kind == "pred" else np.invert)


@_semantics("shl", "shr")
def _shift(name, modifiers, count):
    (kind,) = modifiers
    bits, dtype = bits_of(kind), dtype_of(kind)
    operation = np.left_shift if name == "shl" else np.right_shift

    def shift(a, amount):
        if kind[0] == "s":
            return operation(a, np.minimum(amount, bits - 1).astype(dtype))
        if (amount < bits).all():
            return operation(a, amount.astype(dtype))
        return np.where(amount < bits, operation(a, np.minimum(amount, bits - 1).astype(dtype)), dtype.type(0))

    return Operation(kind, [kind, "u32"], shift)


@_semantics("lop3")
def _lop3(name, modifiers, count):
    (kind,) = modifiers

    def combine(a, b, c, table):
        result = np.uint32(0)
        for k in range(8):
            if int(table[0]) >> k & 1:
                result = result | (a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c)
        return np.broadcast_to(result, np.broadcast_shapes(a.shape, b.shape, c.shape))

    return Operation(kind, [kind] * 3 + ["u32"], combine)


@_semantics("prmt")
def _prmt(name, modifiers, count):
    (kind,) = modifiers  # generic mode

    def permute(a, b, selectors):
        source = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
        result = np.uint64(0)
        for k in range(4):
            selector = (selectors.astype(np.uint64) >> np.uint64(4 * k)) & np.uint64(15)
            byte = source >> ((selector & np.uint64(7)) * np.uint64(8)) & np.uint64(255)
            sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
            result = result | np.where(selector & np.uint64(8), sign, byte) << np.uint64(8 * k)
        return result.astype(np.uint32)

    return Operation(kind, [kind] * 3, permute)


@_semantics("bfe")
def _bfe(name, modifiers, count):
    (kind,) = modifiers
    if bits_of(kind) != 32:
        raise Unsupported(f"type .{kind}")

    def extract(a, position, length):
        position, length = position.astype(np.int64) & 255, length.astype(np.int64) & 255
        width, x = np.minimum(length, 32), a.astype(np.int64)
        if kind == "u32":
            return np.where(position > 31, 0, x >> np.minimum(position, 32)) & ((1 << width) - 1)
        # Filled with the field's highest bit, or with bit 31 where the field reaches beyond.
        sign = x >> np.minimum(position + length - 1, 31) & 1
        ones = (1 << np.minimum(width, np.clip(32 - position, 0, 32))) - 1
        low = (x & 0xFFFFFFFF) >> np.minimum(position, 32) & ones
        return np.where(length == 0, 0, low | np.where(sign == 1, ~ones, 0))

    return Operation(kind, [kind, "u32", "u32"], extract)


@_semantics("bfi")
def _bfi(name, modifiers, count):
    (kind,) = modifiers
    if bits_of(kind) != 32:
        raise Unsupported(f"type .{kind}")

    def insert(a, b, position, length):
        position = np.minimum(position.astype(np.uint64) & np.uint64(255), np.uint64(32))
        length = np.minimum(length.astype(np.uint64) & np.uint64(255), np.uint64(32))
        mask = ((np.uint64(1) << length) - np.uint64(1)) << position
        return b.astype(np.uint64) & ~mask | a.astype(np.uint64) << position & mask

    return Operation(kind, [kind, kind, "u32", "u32"], insert)


@_semantics("popc", "clz", "brev")
def _count(name, modifiers, count):
    (kind,) = modifiers
    bits = bits_of(kind)
    if name == "popc":
        return Operation("u32", [kind], np.bitwise_count)
    if name == "clz":
        return Operation("u32", [kind], lambda a: np.array([bits - int(x).bit_length() for x in a]))
    return Operation(kind, [kind], lambda a: np.array([int(f"{int(x):0{bits}b}"[::-1], 2) for x in a], dtype_of(kind)))


@_semantics("selp")
def _selp(name, modifiers, count):
    (kind,) = modifiers
    return Operation(kind, [kind, kind, "pred"], lambda a, b, p: np.where(p, a, b))


# --- arithmetic ---

_FLOATING = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "fma": fma32}


def _f32(function, ftz):
    """`function` of float32 with what .ftz asks for."""
    if ftz:
        return lambda *values: canonical(function(*[flush(v) for v in values]), True)
    return lambda *values: canonical(function(*values))


def _f32x2(function, ftz):
    function = _f32(function, ftz)

    def halves(*values):
        pairs = np.broadcast_arrays(*[np.ascontiguousarray(v).view(np.float32).reshape(-1, 2) for v in values])
        return np.ascontiguousarray(function(*pairs)).reshape(-1).view(np.uint64)

    return halves


@_semantics("add", "sub", "mul", "fma")
def _arithmetic(name, modifiers, count):
    *modifiers, kind = modifiers
    if kind in ("f32", "f32x2"):
        only(modifiers, "rn", "ftz")
        function = (_f32 if kind == "f32" else _f32x2)(_FLOATING[name], "ftz" in modifiers)
        return Operation(kind, [kind] * (3 if name == "fma" else 2), function)
    if kind in ("bf16", "f16") and "f32" in modifiers:  # a narrow operand in a float32 operation
        only(modifiers, "rn", "f32")
        if name not in ("add", "sub"):
            raise Unsupported("mixed precision")
        wide = from_bfloat16 if kind == "bf16" else lambda x: x.astype(np.float32)
        return Operation("f32", [kind, "f32"], _f32(lambda a, b: _FLOATING[name](wide(a), b), False))
    if kind[0] not in "us":
        raise Unsupported(f"type .{kind}")
    if name == "mul":
        return _product(modifiers, kind)
    only(modifiers)
    unsigned = "u" + kind[1:]
    return Operation(unsigned, [unsigned] * 2, INTEGER[name])


def _product(modifiers, kind):
    (part,) = modifiers
    bits = bits_of(kind)
    if part == "lo":
        return Operation(f"u{bits}", [f"u{bits}"] * 2, np.multiply)
    if bits == 64:  # the high half of 64 x 64, by Python's integers

        def high(a, b):
            pairs = zip(*np.broadcast_arrays(a, b), strict=True)
            return np.array([int(x) * int(y) >> 64 & (1 << 64) - 1 for x, y in pairs], np.uint64)

        return Operation("u64", [kind] * 2, high)
    wide = kind[0] + str(2 * bits)
    dtype = dtype_of(wide)
    if part == "wide":
        return Operation(wide, [kind] * 2, lambda a, b: a.astype(dtype) * b.astype(dtype))
    return Operation(kind, [kind] * 2, lambda a, b: (a.astype(dtype) * b.astype(dtype)) >> dtype.type(bits))


@_semantics("mad")
def _mad(name, modifiers, count):
    *modifiers, kind = modifiers
    product = _product(modifiers, kind)
    dtype = dtype_of(product.result)
    sources = [*product.sources, product.result]
    return Operation(product.result, sources, lambda a, b, c: product.function(a, b).astype(dtype) + c)


def _ordered(pick, a, b):
    """Minimum or maximum of float32, NaN only where both are, +0 above -0."""
    result = np.fmin(a, b) if pick == "min" else np.fmax(a, b)
    equal = a == b
    if equal.any():
        x, y = a.view(np.uint32), b.view(np.uint32)
        both = (x | y) if pick == "min" else (x & y)  # differ in the sign of a zero at most
        result = np.where(equal, both.view(np.float32), result)
    return canonical(result)


@_semantics("min", "max")
def _extreme(name, modifiers, count):
    *modifiers, kind = modifiers
    if kind != "f32":
        only(modifiers)
        if kind[0] not in "us":
            raise Unsupported(f"type .{kind}")
        return Operation(kind, [kind] * 2, INTEGER[name])
    only(modifiers, "ftz", "NaN", "xorsign", "abs")

    def extreme(a, b):
        a, b = (np.ascontiguousarray(x) for x in np.broadcast_arrays(a, b))
        if "ftz" in modifiers:
            a, b = flush(a), flush(b)
        nan = np.isnan(a) | np.isnan(b) if "NaN" in modifiers else None
        if "xorsign" in modifiers:
            sign = (a.view(np.uint32) ^ b.view(np.uint32)) & np.uint32(1 << 31)
            magnitude = _ordered(name, np.abs(a), np.abs(b)).view(np.uint32)
            result = canonical((magnitude | sign).view(np.float32))
        else:
            result = _ordered(name, a, b)
        return result if nan is None or not nan.any() else np.where(nan, NAN32, result)

    # sm_100 takes three operands.
    function = extreme if count == 2 else lambda a, b, c: extreme(extreme(a, b), c)
    return Operation(kind, [kind] * count, function)


@_semantics("abs", "neg")
def _sign(name, modifiers, count):
    *modifiers, kind = modifiers
    only(modifiers, "ftz")
    if kind == "f32":
        mask = np.uint32(1 << 31)

        def change(a):
            b = a.view(np.uint32)
            result = ((b & ~mask) if name == "abs" else (b ^ mask)).view(np.float32)
            return flush(result) if "ftz" in modifiers else result

        return Operation(kind, [kind], change)
    if kind[0] != "s":
        raise Unsupported(f"type .{kind}")
    return Operation(kind, [kind], np.abs if name == "abs" else np.negative)


# Exact function and largest relative error in 2^-23, of the manual.
_APPROXIMATE = {
    "div": (np.divide, 2), "rcp": (np.reciprocal, 1), "sqrt": (np.sqrt, 1), "rsqrt": (lambda a: 1 / np.sqrt(a), 2),
    "ex2": (np.exp2, 2), "lg2": (np.log2, 2), "sin": (np.sin, 4), "cos": (np.cos, 4), "tanh": (np.tanh, 4096),
}  # fmt: skip
_ROUNDED = {"div": np.divide, "sqrt": np.sqrt, "rcp": lambda a: np.float32(1) / a}


def _quotient(a, b):
    """Of integers, rounded towards zero; of 0 as divisor, which threads that take no part may hold, something."""
    b = np.where(b == 0, b.dtype.type(1), b)
    down = a // b
    return down + ((a - down * b != 0) & ((a < 0) != (b < 0))).astype(down.dtype)


@_semantics("rem")
def _remainder(name, modifiers, count):
    (kind,) = modifiers
    return Operation(kind, [kind] * 2, lambda a, b: a - _quotient(a, b) * np.where(b == 0, b.dtype.type(1), b))


@_semantics(*_APPROXIMATE)
def _function(name, modifiers, count):
    *modifiers, kind = modifiers
    sources = [kind] * (2 if name == "div" else 1)
    if name == "div" and kind in ("s32", "u32", "s64", "u64"):
        only(modifiers)
        return Operation(kind, sources, _quotient)
    if kind != "f32":
        raise Unsupported(f"type .{kind}")
    ftz = "ftz" in modifiers
    if "rn" in modifiers and name in _ROUNDED:
        only(modifiers, "rn", "ftz")
        return Operation(kind, sources, _f32(_ROUNDED[name], ftz))
    only(modifiers, "approx", "full", "ftz")
    return Operation(kind, sources, *_APPROXIMATE[name], ftz)


# --- comparisons and conversions ---

_COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
_JOIN = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


@_semantics("setp")
def _setp(name, modifiers, count):
    compare, *combine, kind = modifiers
    ftz, combine = "ftz" in combine, [c for c in combine if c != "ftz"]
    if kind[0] == "f":
        if kind != "f32":
            raise Unsupported(f"type .{kind}")
        unordered = len(compare) == 3 and compare not in ("nan", "num")

        def test(a, b):
            if ftz:
                a, b = flush(a), flush(b)
            nan = np.isnan(a) | np.isnan(b)
            if compare in ("num", "nan"):
                return nan if compare == "nan" else ~nan
            result = _COMPARE[compare[:2]](a, b)
            return result | nan if unordered else result & ~nan
    else:
        test = _COMPARE[compare]
        if kind[0] == "b" and compare not in ("eq", "ne"):
            raise Unsupported(f"comparison of .{kind}")
    if not combine:
        return Operation("pred", [kind] * 2, test)
    (word,) = combine
    return Operation("pred", [kind, kind, "pred"], lambda a, b, c: _JOIN[word](test(a, b), c))


@_semantics("cvt")
def _cvt(name, modifiers, count):
    *modifiers, to, source = modifiers
    if source == "f32" and to.startswith(("bf16", "f16")):
        return _narrowed(modifiers, to)
    if (to, source) == ("tf32", "f32"):
        only(modifiers, "rna")
        rounded = lambda b: np.where(b & 0x7FFFFFFF > 0x7F800000, 0x7FFFFFFF, b + 0x1000 & 0xFFFFE000)  # noqa: E731
        return Operation("b32", ["b32"], lambda a: rounded(a.astype(np.int64)))
    if to == "f32" and source in ("bf16", "f16"):
        only(modifiers)
        wide = from_bfloat16 if source == "bf16" else lambda x: x.astype(np.float32)
        return Operation("f32", [source], lambda a: canonical(wide(a)))
    if {source, to} == {"f32", "f64"}:
        only(modifiers, *(["rn"] if to == "f32" else []))
        return Operation(to, [source], lambda a: canonical(a.astype(dtype_of(to))))
    if source[0] in "us" and to == "f32":
        if modifiers != ["rn"]:
            raise Unsupported("rounding")
        return Operation(to, [source], lambda a: a.astype(np.float32))
    if source == "f32" and to[0] in "us":
        return _whole(modifiers, to)
    if source[0] in "us" and to[0] in "us":
        only(modifiers)
        return Operation(to, [source], lambda a: a.astype(dtype_of(to)))
    raise Unsupported("conversion")


def _narrowed(modifiers, to):
    """float32 to bfloat16 or float16, or two of them into one register, the second in its low half."""
    if to.startswith("bf16"):
        only(modifiers, "rn", "rz")
        narrow = functools.partial(to_bfloat16, mode="rz" if "rz" in modifiers else "rn")
    else:
        only(modifiers, "rn")
        narrow = to_float16
    if to.endswith("x2"):
        join = lambda a, b: narrow(a).astype(np.uint32) << np.uint32(16) | narrow(b)  # noqa: E731
        return Operation(to, ["f32", "f32"], join)
    return Operation(f"b{bits_of(to)}", ["f32"], narrow)


def _whole(modifiers, to):
    """float32 to the integers, which saturate; NaN is 0."""
    only(modifiers, "rzi", "rni", "rmi", "rpi", "ftz")
    mode = next(m for m in modifiers if m != "ftz")
    rounded = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[mode]
    limits = np.iinfo(dtype_of(to))

    def integer(a):
        x = rounded((flush(a) if "ftz" in modifiers else a).astype(np.float64))
        x = np.where(np.isnan(x), 0, x)
        low, high = x <= float(limits.min), x >= float(limits.max)
        inside = np.where(low | high, 0, x).astype(np.int64).astype(dtype_of(to))
        return np.where(low, limits.min, np.where(high, limits.max, inside)).astype(dtype_of(to))

    return Operation(to, ["f32"], integer)
