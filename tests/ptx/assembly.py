"""Small kernels written in PTX, to test the emulator itself."""

import torch
from ptx.emulator import Compiled, Counts, Memory, run

HEAD = """
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 data
)
.reqntid {threads}
{{
	.reg .pred %p<8>;
	.reg .b16 %rs<16>;
	.reg .b32 %r<32>;
	.reg .b64 %rd<16>;
	ld.param.b64 %rd1, [data];
	mov.u32 %r1, %tid.x;
	mov.u32 %r2, %ctaid.x;
	mul.wide.u32 %rd2, %r1, 4;
	add.s64 %rd3, %rd1, %rd2;
"""


def execute(body: str, data: torch.Tensor, *, threads=32, programs=1, shared=0, writable=True, noise=None) -> Counts:
    """Run `body` on registered `data`: %rd1 its address, %r1 thread, %r2 program, %rd3 the address of 4 bytes a thread.

    Shared memory, of `shared` bytes, starts at `global_smem`.
    """
    head = (".extern .shared .align 16 .b8 global_smem[];\n" if shared else "") + HEAD.format(threads=threads)
    memory = Memory()
    memory.add(data, "data", writable)
    return run(Compiled("kernel", head + body + "\nret;\n}", shared), (programs,), [data], memory, noise)


def results(instruction: str, *operands: list[int], bits: int = 32) -> list[int]:
    """What an instruction makes of each tuple of operands: %a, %b, %c stand for them, %d for the result, all 32 bits.

    bits: of the result.
    """
    count = len(operands[0])
    table = torch.tensor([[*values, *[0] * (8 - len(values))] for values in zip(*operands, strict=True)])
    data = torch.cat((table, table[:1].expand(32 - count, -1))).flatten()
    loads = "".join(f"ld.global.b32 %r{10 + k}, [%rd5+{8 * k}];\n" for k in range(len(operands)))
    for k, name in enumerate("abc"):
        instruction = instruction.replace(f"%{name}", f"%r{10 + k}")
    target, store = {16: ("%rs1", "b16"), 32: ("%r20", "b32"), 64: ("%rd8", "b64")}[bits]
    body = f"""
        mul.wide.u32 %rd4, %r1, 64;
        add.s64 %rd5, %rd1, %rd4;
        {loads}
        {instruction.replace("%d", target)}
        st.global.{store} [%rd5+56], {target};
    """
    execute(body, data)
    return [value & (1 << bits) - 1 for value in data.view(32, 8)[:count, 7].tolist()]
