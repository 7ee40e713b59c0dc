"""What the emulator refuses: accesses, races and waiting that no kernel may do, each in a kernel of a few lines."""

import pytest
import torch

pytest.importorskip("triton")

from ptx.assembly import execute
from ptx.emulator import Compiled, EmulationError, Memory, run

FEW = "setp.lt.u32 %p1, %r1, 8;"
STORE = "st.global.b32 [%rd3], %r1;"
SHARED = """
    mov.b32 %r5, global_smem;
    mad.lo.s32 %r6, %r1, 4, %r5;
    xor.b32 %r7, %r1, 32;
    mad.lo.s32 %r7, %r7, 4, %r5;  // of the other warp
"""
WARPS = {"threads": 64, "shared": 256}
COPY = "cp.async.ca.shared.global [%s], [%%rd3], 4;"
FAULTS = {
    "4-byte store to .* is out of bounds": ("add.s64 %rd3, %rd3, 4;" + STORE, {}),
    "4-byte load from .* is out of bounds": ("ld.global.b32 %r4, [%rd3+4];", {}),
    "misaligned 4-byte access": ("add.s64 %rd3, %rd1, 2; ld.global.b32 %r4, [%rd3];", {}),
    "misaligned 16-byte access": ("ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%rd1+8];", {}),
    "store to data, which is read-only": (STORE, {"writable": False}),
    "store different values to one address": ("st.global.b32 [%rd1], %r1;", {}),
    "race in data: store": ("shr.u32 %r3, %r1, 5; st.global.b32 [%rd1], %r3;", {"threads": 64}),
    "race in data: load": (FEW + "@%p1 st.global.b32 [%rd1], 1; @!%p1 ld.global.b32 %r4, [%rd1];", {"threads": 64}),
    "race in data: store of byte 0 by": (STORE, {"programs": 2}),
    "read before it is written": (SHARED + "ld.shared.b32 %r4, [%r6];", {"shared": 256}),
    "race in shared memory: load": (SHARED + "st.shared.b32 [%r6], %r1; ld.shared.b32 %r4, [%r7];", WARPS),
    "shared memory out of bounds: bytes 0 .. 127 of 124": (SHARED + "st.shared.b32 [%r6], %r1;", {"shared": 124}),
    "misaligned 4-byte access to shared memory": (SHARED + "st.shared.b32 [%r6+2], %r1;", {"shared": 256}),
    "misaligned 16-byte access to shared memory at 8": (
        "mov.b32 %r5, global_smem; ld.shared.v4.b32 {%r6, %r7, %r8, %r9}, [%r5+8];",
        {"shared": 256},
    ),
    "race in shared memory: copy": (SHARED + "st.shared.b32 [%r6], %r1;" + COPY % "%r7", WARPS),
    "shared memory at byte 0 is read before it is written": (
        SHARED + COPY % "%r6" + "cp.async.commit_group; cp.async.wait_group 1; ld.shared.b32 %r4, [%r6];",
        {"shared": 256},
    ),
    "race in shared memory: load of byte 128": (
        SHARED + COPY % "%r6" + "cp.async.commit_group; cp.async.wait_group 0; ld.shared.b32 %r4, [%r7];",
        WARPS,
    ),
    "a predicated barrier that some threads skip": (FEW + "@%p1 bar.sync 0;", {}),
    "deadlock: 8 of 32 threads wait": (FEW + "@%p1 bra $wait; ret; $wait: bar.sync 0;", {}),
    "some threads of a warp skip what takes all": (FEW + "@%p1 shfl.sync.bfly.b32 %r4, %r1, 8, 31, -1;", {}),
    "%r9 may be read before it is written": ("add.s32 %r4, %r9, 1;", {}),
    "the predicate was never written": ("@%p5 mov.b32 %r4, 0;", {}),
    "trap": (FEW + "@%p1 trap;", {}),
    "no end after": ("$again: bra $again;", {}),
}


@pytest.mark.parametrize("words", FAULTS)
def test_refused(words, monkeypatch):
    monkeypatch.setattr("ptx.emulator.batch.MAX_STEPS", 1000)
    body, options = FAULTS[words]
    body = body.replace("$wait: ", "\n$wait:\n").replace("$again: ", "\n$again:\n")
    with pytest.raises(EmulationError, match=words):
        execute(body, torch.zeros(options.get("threads", 32), dtype=torch.int32), **options)


def test_a_barrier_orders_what_two_warps_do():
    data = torch.zeros(64, dtype=torch.int32)
    body = SHARED + "st.shared.b32 [%r6], %r1; bar.sync 0; ld.shared.b32 %r4, [%r7]; st.global.b32 [%rd3], %r4;"
    counts = execute(body, data, threads=64, shared=256)
    assert data.tolist() == [i ^ 32 for i in range(64)]
    assert (counts.barriers, counts.shared, counts.divergent) == (1, 2 * 64 * 4, 0)


def test_copies_are_there_group_by_group():
    """Each thread copies its number, then the other warp's to another place; the first is there when one is awaited."""
    data = torch.arange(64, dtype=torch.int32)
    body = f"""{SHARED}
        {COPY % "%r6"} cp.async.commit_group;
        {COPY % "%r7+256"} cp.async.commit_group;
        cp.async.wait_group 1;
        ld.shared.b32 %r4, [%r6];
        cp.async.wait_group 0;
        bar.sync 0;
        ld.shared.b32 %r8, [%r6+256];
        mad.lo.s32 %r4, %r4, 100, %r8;
        st.global.b32 [%rd3], %r4;
    """
    execute(body, data, threads=64, shared=512)
    assert data.tolist() == [100 * i + (i ^ 32) for i in range(64)]


def test_the_same_value_to_one_address_is_no_race():
    data = torch.zeros(64, dtype=torch.int32)
    execute("st.global.b32 [%rd1], 7;", data, threads=64)
    assert data.tolist() == [7] + [0] * 63


def test_programs_have_shared_memory_of_their_own():
    data = torch.zeros(96, dtype=torch.int32)
    body = """
        mov.b32 %r5, global_smem;
        st.shared.b32 [%r5], %r2;
        bar.sync 0;
        ld.shared.b32 %r4, [%r5];
        mad.lo.s32 %r6, %r2, 32, %r1;
        mul.wide.u32 %rd2, %r6, 4;
        add.s64 %rd3, %rd1, %rd2;
        st.global.b32 [%rd3], %r4;
    """
    counts = execute(body, data, programs=3, shared=4)
    assert data.view(3, 32).tolist() == [[k] * 32 for k in range(3)] and counts.barriers == 3


def test_atomics_of_programs_add_up():
    data = torch.zeros(1, dtype=torch.int64)
    execute("cvt.u64.u32 %rd4, %r1; red.global.add.u64 [%rd1], %rd4;", data, programs=5)
    assert data.item() == 5 * sum(range(32))


def test_diverged_threads_meet_again():
    """Even threads count to 3, odd ones to 5; both then store, in one instruction."""
    body = """
        and.b32 %r3, %r1, 1;
        shl.b32 %r3, %r3, 1;
        add.s32 %r3, %r3, 3;
        mov.b32 %r4, 0;
    $again:
        add.s32 %r4, %r4, 1;
        setp.lt.s32 %p1, %r4, %r3;
        @%p1 bra $again;
        st.global.b32 [%rd3], %r4;
    """
    data = torch.zeros(32, dtype=torch.int32)
    counts = execute(body, data)
    assert data.tolist() == [3, 5] * 16
    assert counts.divergent == 1 and counts.requests == {"load": 0, "store": 1}


@pytest.mark.parametrize(("stride", "size", "sectors"), [(1, 4, 4), (2, 4, 8), (8, 4, 32), (1, 16, 16), (2, 16, 32)])
def test_sectors_tell_how_well_a_warp_coalesces(stride, size, sectors):
    words = ", ".join(f"%r{10 + k}" for k in range(size // 4))
    vector = f".v{size // 4}" if size > 4 else ""
    body = f"""
        mul.wide.u32 %rd4, %r1, {stride * size};
        add.s64 %rd5, %rd1, %rd4;
        ld.global{vector}.b32 {{{words}}}, [%rd5];
    """
    data = torch.zeros(32 * stride * size // 4 + 8, dtype=torch.int32)
    start = -data.data_ptr() % 32 // 4
    counts = execute(body, data[start : start + 32 * stride * size // 4], writable=False)
    assert counts.sectors["load"] == sectors and counts.accesses == {("load", size): 32}
    assert counts.wide("load") == (32 * size if size >= 16 else 0)


def test_nothing_between_the_elements_of_a_strided_tensor_may_be_touched():
    data = torch.zeros(32, 2, dtype=torch.int32)
    execute("shl.b64 %rd4, %rd2, 1; add.s64 %rd3, %rd1, %rd4; st.global.b32 [%rd3], 1;", data[:, 0])
    assert data.tolist() == [[1, 0]] * 32
    with pytest.raises(EmulationError, match="out of bounds"):
        execute(STORE, data[:, 0])


def test_overlapping_stretches_have_the_rights_of_all():
    data = torch.zeros(8, dtype=torch.int32)
    memory = Memory()
    memory.add(data, "whole")
    memory.add(data[2:4], "part", writable=True)
    at = lambda i: torch.tensor([data.data_ptr() + 4 * i]).numpy().astype("uint64")  # noqa: E731
    assert [s.name for s, _ in memory.pieces(at(2), 8, True)] == ["whole+part"]
    with pytest.raises(EmulationError, match="store to whole, which is read-only"):
        memory.pieces(at(4), 4, True)


MODULE = """
.entry other(.param .u64 data)
{ret;}
.entry kernel(
	.param .u64 data,
	.param .align 8 .b8 table[24],
	.param .u8 small
)
.maxntid 64, 1, 1
{
	.reg .b16 %rs<4>;
	.reg .b32 %r<8>;
	.reg .b64 %rd<8>;
	.shared .align 4 .b8 sums[256];
	ld.param.u64 %rd1, [data];
	mov.b64 %rd2, table;
	mov.u32 %r1, %tid.x;
	and.b32 %r2, %r1, 1;
	mul.wide.u32 %rd3, %r2, 8;
	add.s64 %rd4, %rd2, %rd3;
	ld.param.v2.u32 {%r3, %r4}, [%rd4+8];
	ld.param.s8 %rs1, [small];
	cvt.s32.s16 %r5, %rs1;
	add.s32 %r3, %r3, %r5;
	mov.u32 %r6, sums;
	mad.lo.s32 %r6, %r1, 4, %r6;
	st.shared.u32 [%r6], %r3;
	ld.shared.u32 %r3, [%r6];
	mad.lo.s32 %r3, %r4, %r3, 0;
	mul.wide.u32 %rd5, %r1, 4;
	add.s64 %rd6, %rd1, %rd5;
	st.u32 [%rd6], %r3;
	ret;
}
"""


def test_a_kernel_of_several_with_a_structure_and_shared_memory_of_its_own():
    data = torch.zeros(64, dtype=torch.int32)
    memory = Memory()
    memory.add(data, "data", writable=True)
    table = torch.tensor([9, 9, 10, 2, 20, 3], dtype=torch.int32).numpy().tobytes()
    compiled = Compiled("kernel", MODULE, 0, "kernel", 64)
    run(compiled, (1,), [data, table, -1], memory)
    assert data.tolist() == [2 * 9, 3 * 19] * 32
    with pytest.raises(EmulationError, match="table takes 24 bytes, got 20"):
        run(compiled, (1,), [data, table[4:], -1], memory)
    beyond = compiled._replace(ptx=MODULE.replace("[%rd4+8]", "[%rd4+24]"))
    with pytest.raises(EmulationError, match="load of parameters is out of bounds"):
        run(beyond, (1,), [data, table, -1], memory)
