"""What the emulator's instructions compute, against Python's exact arithmetic and the PTX manual."""

import math
import struct
from fractions import Fraction

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from ptx.assembly import execute, results
from ptx.emulator import Unsupported

INF, NAN = 0x7F800000, 0x7FC00001


def bits(*values):
    return [struct.unpack("<I", struct.pack("<f", value))[0] for value in values]


def values(found):
    return [struct.unpack("<f", struct.pack("<I", value))[0] for value in found]


def rounded(exact):
    """The float32 nearest to a fraction, ties to even; finite and not subnormal."""
    low = np.float32(float(exact))
    near = (low, np.nextafter(low, np.float32(-np.inf)), np.nextafter(low, np.float32(np.inf)))
    distance = {x: abs(Fraction(float(x)) - exact) for x in near}
    return min(near, key=lambda x: (distance[x], int(x.view(np.uint32)) & 1))


def test_fma_rounds_once():
    make = np.random.default_rng(0)
    a, b, c = (make.standard_normal(32).astype(np.float32) for _ in range(3))
    c[:16] = -(a * b)[:16]  # what is left is the product's rounding, which two roundings lose
    c[16:20] = a[16:20] * b[16:20] * np.float32(2.0**24)  # and where the product decides a tie
    found = values(results("fma.rn.f32 %d, %a, %b, %c;", bits(*a), bits(*b), bits(*c)))
    exact = [Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)) for x, y, z in zip(a, b, c, strict=True)]
    assert found == [float(rounded(e)) for e in exact]
    assert found != [float(np.float32(x * y) + z) for x, y, z in zip(a, b, c, strict=True)]


ONE, TINY = 0x3F800000, 1  # the smallest subnormal number
UNARY = [
    # Halves between two bfloat16 go to the even one, what is above it up; towards zero cuts off.
    (
        "cvt.rn.bf16.f32 %d, %a;",
        16,
        [ONE | 0x8000, ONE | 0x18000, ONE | 0x8001, INF, NAN],
        [0x3F80, 0x3F82, 0x3F81, 0x7F80, 0x7FFF],
    ),
    ("cvt.rz.bf16.f32 %d, %a;", 16, [ONE | 0x8001, 0xBF80FFFF], [0x3F80, 0xBF80]),
    ("cvt.rn.f16.f32 %d, %a;", 16, bits(1 + 2**-11, 1 + 3 * 2**-11, 65520.0), [0x3C00, 0x3C02, 0x7C00]),
    # Halves go away from zero.
    (
        "cvt.rna.tf32.f32 %d, %a;",
        32,
        [ONE | 0x1000, 0xBF801000, ONE | 0xFFF, INF, NAN],
        [ONE | 0x2000, 0xBF802000, ONE, INF, 0x7FFFFFFF],
    ),
    ("cvt.rzi.s32.f32 %d, %a;", 32, [*bits(-1.9, 3e9, -3e9), NAN], [2**32 - 1, 2**31 - 1, 2**31, 0]),
    ("cvt.rni.s32.f32 %d, %a;", 32, bits(0.5, 1.5, 2.5), [0, 2, 2]),
    ("cvt.rn.f32.s32 %d, %a;", 32, [2**24 + 1, 2**32 - 1], bits(2.0**24, -1)),
    ("add.rn.ftz.f32 %d, %a, 0f00000000;", 32, [TINY, 0x80000001, ONE], [0, 0, ONE]),
    ("add.rn.f32 %d, %a, 0f00000000;", 32, [TINY, NAN, 0xFFC00000], [TINY, 0x7FFFFFFF, 0x7FFFFFFF]),
    ("neg.f32 %d, %a;", 32, [0, ONE], [1 << 31, ONE | 1 << 31]),
    ("popc.b32 %d, %a;", 32, [0, 0xF0F0], [0, 8]),
    ("clz.b32 %d, %a;", 32, [0, 1, 2**31], [32, 31, 0]),
    ("brev.b32 %d, %a;", 32, [1, 0x80000001], [2**31, 0x80000001]),
    ("bfe.u32 %d, %a, 4, 8;", 32, [0xABCD, 0xFFFF], [0xBC, 0xFF]),
    ("bfe.s32 %d, %a, 4, 8;", 32, [0xABCD, 0x0770], [0xFFFFFFBC, 0x77]),
    ("not.b32 %d, %a;", 32, [0, 0xFF], [0xFFFFFFFF, 0xFFFFFF00]),
]
BINARY = [
    ("min.f32 %d, %a, %b;", [0, NAN, ONE, NAN], [1 << 31, ONE, INF, NAN], [1 << 31, ONE, ONE, 0x7FFFFFFF]),
    ("max.f32 %d, %a, %b;", [0, NAN, ONE], [1 << 31, ONE, INF], [0, ONE, INF]),
    ("min.NaN.f32 %d, %a, %b;", [NAN, ONE], [ONE, INF], [0x7FFFFFFF, ONE]),
    ("div.rn.f32 %d, %a, %b;", bits(1, 1, 0), bits(3, 0, 0), [0x3EAAAAAB, INF, 0x7FFFFFFF]),
    ("mul.hi.u32 %d, %a, %b;", [0xFFFFFFFF], [0xFFFFFFFF], [0xFFFFFFFE]),
    ("mul.hi.s32 %d, %a, %b;", [0xFFFFFFFF], [5], [0xFFFFFFFF]),
    ("mul.lo.s32 %d, %a, %b;", [0xFFFFFFFF], [5], [2**32 - 5]),
    ("div.s32 %d, %a, %b;", [2**32 - 7, 7, 7], [2, 2, 2**32 - 2], [2**32 - 3, 3, 2**32 - 3]),
    ("div.u32 %d, %a, %b;", [2**32 - 7, 7], [2, 2**32 - 2], [2**31 - 4, 0]),
    ("rem.s32 %d, %a, %b;", [2**32 - 7, 7, 8], [2, 2**32 - 2, 4], [2**32 - 1, 1, 0]),
    ("shl.b32 %d, %a, %b;", [1, 1, 1], [31, 32, 40], [2**31, 0, 0]),
    ("shr.s32 %d, %a, %b;", [2**31, 2**31], [4, 77], [0xF8000000, 0xFFFFFFFF]),
    ("shr.u32 %d, %a, %b;", [2**31, 2**31], [4, 77], [0x08000000, 0]),
    ("bfi.b32 %d, %a, %b, 8, 4;", [0xF5], [0xFFFFFFFF], [0xFFFFF5FF]),
    ("prmt.b32 %d, %a, %b, 0x7054;", [0x03020100], [0x07060584], [0x07000584]),
    ("prmt.b32 %d, %a, %b, 0x0008;", [0x03020180], [0], [0x808080FF]),
    ("lop3.b32 %d, %a, %b, 0, 0x3c;", [0b1100], [0b1010], [0b0110]),
    ("cvt.rn.bf16x2.f32 %d, %a, %b;", bits(1.0), bits(2.0), [0x3F804000]),
    ("setp.lt.f32 %p1, %a, %b; selp.b32 %d, 1, 0, %p1;", [*bits(1, 2), NAN], [*bits(2, 1), ONE], [1, 0, 0]),
    ("setp.ltu.f32 %p1, %a, %b; selp.b32 %d, 1, 0, %p1;", [NAN], [ONE], [1]),
    ("setp.nan.f32 %p1, %a, %b; selp.b32 %d, 1, 0, %p1;", [NAN, ONE], [ONE, ONE], [1, 0]),
    ("setp.gt.s32 %p1, %a, %b; selp.b32 %d, 1, 0, %p1;", [2**32 - 1, 1], [0, 0], [0, 1]),
    ("setp.gt.u32 %p1, %a, %b; selp.b32 %d, 1, 0, %p1;", [2**32 - 1, 1], [0, 1], [1, 0]),
]


@pytest.mark.parametrize(("instruction", "width", "operand", "expected"), UNARY, ids=[u[0] for u in UNARY])
def test_of_one_operand(instruction, width, operand, expected):
    assert results(instruction, operand, bits=width) == expected


@pytest.mark.parametrize(("instruction", "a", "b", "expected"), BINARY, ids=[b[0] for b in BINARY])
def test_of_two_operands(instruction, a, b, expected):
    assert results(instruction, a, b) == expected


def test_products_of_64_bits():
    a, b, c = [2**32 - 1, 7], [2**32 - 3, 2**31], [5, 9]
    assert results("mul.wide.u32 %d, %a, %b;", a, b, bits=64) == [x * y for x, y in zip(a, b, strict=True)]
    assert results("mul.wide.s32 %d, %a, %b;", a, b, bits=64) == [3, 2**64 - 7 * 2**31]
    wide = "cvt.u64.u32 %rd6, %c; mad.wide.u32 %d, %a, %b, %rd6;"
    assert results(wide, a, b, c, bits=64) == [x * y + z for x, y, z in zip(a, b, c, strict=True)]
    packed = "mov.b64 %rd6, {%a, %b}; mul.rn.f32x2 %rd7, %rd6, %rd6; mov.b64 {%r25, %d}, %rd7;"
    assert values(results(packed, bits(1, 2), bits(3, -4))) == [9, 16]


@pytest.mark.parametrize(("name", "exact"), [("ex2", lambda x: 2.0**x), ("lg2", math.log2), ("rcp", lambda x: 1 / x)])
def test_approximate_instructions_err_within_their_bound_and_alike_for_like_operands(name, exact):
    x = torch.rand(32).add(0.5)
    x[16:] = x[:16]
    body = f"ld.global.b32 %r3, [%rd3]; {name}.approx.f32 %r4, %r3; st.global.b32 [%rd3], %r4;"
    found = []
    for noise in (None, 1, 2):
        data = x.clone()
        execute(body, data, noise=noise)
        assert torch.equal(data[16:], data[:16])
        wanted = torch.tensor([exact(v) for v in x.double().tolist()], dtype=torch.float64)
        assert ((data - wanted).abs() <= (2**-22 + 2**-24) * wanted.abs()).all()
        found.append(data)
    assert torch.equal(found[0], wanted.float()) and not torch.equal(found[1], found[2])


def test_warps_shuffle_reduce_and_vote():
    lane = list(range(32))
    body = "ld.global.b32 %r3, [%rd3]; {} st.global.b32 [%rd3], %r4;"

    def by(instruction, start=lane):
        data = torch.tensor(start, dtype=torch.int32)
        execute(body.format(instruction), data)
        return data.tolist()

    assert by("shfl.sync.bfly.b32 %r4, %r3, 8, 31, -1;") == [i ^ 8 for i in lane]
    assert by("shfl.sync.down.b32 %r4, %r3, 4, 31, -1;") == [min(i + 4, i if i > 27 else 99) for i in lane]
    assert by("shfl.sync.up.b32 %r4, %r3, 4, 0, -1;") == [i if i < 4 else i - 4 for i in lane]
    assert by("shfl.sync.idx.b32 %r4, %r3, 5, 31, -1;") == [5] * 32
    assert by("shfl.sync.idx.b32 %r4, %r3, 5, 6175, -1;") == [i // 8 * 8 + 5 for i in lane]  # in groups of 8
    assert by("redux.sync.add.s32 %r4, %r3, -1;") == [sum(lane)] * 32
    assert by("redux.sync.min.s32 %r4, %r3, -1;", [i - 9 for i in lane]) == [-9] * 32
    vote = "setp.lt.s32 %p1, %r3, 3; vote.sync.ballot.b32 %r4, %p1, -1;"
    assert by(vote) == [0b111] * 32
    with pytest.raises(Unsupported, match="a member mask other than the whole warp"):
        by("shfl.sync.bfly.b32 %r4, %r3, 8, 31, 255;")


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_a_matrix_goes_through_shared_memory(trans):
    """Row i/4, columns 2*(i%4) and the next of thread i: transposed once it is the transpose, twice itself."""
    body = f"""
        mov.b32 %r5, global_smem;
        shl.b32 %r6, %r1, 4;
        and.b32 %r6, %r6, 127;
        add.s32 %r6, %r6, %r5;
        ld.global.b32 %r3, [%rd3];
        stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r6], {{%r3}};
        bar.sync 0;
        ldmatrix.sync.aligned.m8n8.x1{trans}.shared.b16 {{%r4}}, [%r6];
        st.global.b32 [%rd3], %r4;
    """
    matrix = torch.arange(64, dtype=torch.int16).view(8, 8)
    data = matrix.clone().view(torch.int32).flatten()
    execute(body, data, shared=128)
    assert torch.equal(data.view(torch.int16).view(8, 8), matrix.mT if trans else matrix)


@pytest.mark.parametrize(
    "line", ["foo.b32 %r4, %r1;", "add.f64 %rd4, %rd1, %rd1;", "cvt.rp.bf16.f32 %rs1, %r1;", "bar.sync 1;"]
)
def test_what_is_not_known_is_refused_with_its_line(line):
    with pytest.raises(Unsupported, match=r"PTX line \d+ \(\?\): " + line.partition(" ")[0]):
        execute(line, torch.zeros(32))
