"""The update's launch parameters on this GPU: every point of a grid against a copy timed in turn with it.

    python benchmarks/tune.py OUT.jsonl

One line of JSON a point, as it is measured: model, parameters, fraction of copy bandwidth. The kernel here is the
one-launch update over a table of chunks with each choice left open; it is for choosing, growkit does not run it.
"""

import argparse
import itertools
import json

import torch
import triton
import triton.language as tl

from growkit.bench.measure import hardware, paired
from growkit.bench.sophia import SCALARS, Lists, check_update, copy_pair

GRID = {
    "tail": ("branch", "mask"),  # full chunks in a branch without mask; or one mask, its bound a multiple of 8
    "block": (1024, 2048),
    "warps": (8, 4),
    "chunk": (4096, 2048, 8192),
    "programs": (0, 2, 4, 8),  # one program a chunk; or as many a multiprocessor, each walking chunks
}


@triton.jit
def _block(p, g, m, h, at, inside, lr, decay, beta1, gain, rho_bs, eps, MASKED: tl.constexpr):
    mask = inside if MASKED else None
    g_b = tl.load(g + at, mask=mask)
    m_b = tl.load(m + at, mask=mask)
    h_b = tl.load(h + at, mask=mask)
    p_b = tl.load(p + at, mask=mask)
    m_b = m_b * beta1 + g_b * gain
    u = tl.minimum(tl.maximum(m_b / (h_b * rho_bs + eps), -1.0), 1.0)
    tl.store(p + at, p_b * decay - lr * u, mask=mask)
    tl.store(m + at, m_b, mask=mask)


@triton.jit
def _step(
    pointers,
    numel,
    tensor_of,
    chunk_of,
    chunks,
    tensors,
    lr,
    decay,
    beta1,
    gain,
    rho_bs,
    eps,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    BRANCH: tl.constexpr,
):
    for i in range(tl.program_id(0), chunks, tl.num_programs(0)):
        t = tl.load(tensor_of + i)
        start = tl.load(chunk_of + i).to(tl.int64) * CHUNK
        n = tl.load(numel + t)
        kind = tl.pointer_type(tl.float32)
        p = tl.multiple_of(tl.load(pointers + t).to(kind), 16)
        g = tl.multiple_of(tl.load(pointers + tensors + t).to(kind), 16)
        m = tl.multiple_of(tl.load(pointers + 2 * tensors + t).to(kind), 16)
        h = tl.multiple_of(tl.load(pointers + 3 * tensors + t).to(kind), 16)
        if BRANCH:
            if start + CHUNK <= n:
                for b in tl.static_range(0, CHUNK, BLOCK):
                    at = start + b + tl.arange(0, BLOCK)
                    _block(p, g, m, h, at, at < n, lr, decay, beta1, gain, rho_bs, eps, False)
            else:
                for b in tl.static_range(0, CHUNK, BLOCK):
                    at = start + b + tl.arange(0, BLOCK)
                    _block(p, g, m, h, at, at < n, lr, decay, beta1, gain, rho_bs, eps, True)
        else:
            bound = tl.multiple_of(n, 8)
            for b in tl.static_range(0, CHUNK, BLOCK):
                at = start + b + tl.arange(0, BLOCK)
                _block(p, g, m, h, at, at < bound, lr, decay, beta1, gain, rho_bs, eps, True)


def tables(lists, chunk):
    """Device tables of `_step`: addresses [4, tensors], lengths, and for each chunk its tensor and its number there."""
    sizes = [p.numel() for p in lists.p]
    counts = [-(-size // chunk) for size in sizes]
    place = {"device": lists.device}
    pointers = torch.tensor([[t.data_ptr() for t in tensors] for tensors in lists.lists], **place)
    tensor_of = torch.repeat_interleave(torch.arange(len(sizes), dtype=torch.int32), torch.tensor(counts)).to(**place)
    chunk_of = torch.cat([torch.arange(count, dtype=torch.int32) for count in counts]).to(**place)
    return pointers, torch.tensor(sizes, **place), tensor_of, chunk_of


def step(lists, *, tail, block, warps, chunk, programs):
    """The update of `lists` as a callable with these parameters."""
    if tail == "mask" and any(p.numel() % 8 for p in lists.p):
        raise ValueError("tail='mask' promises the compiler lengths that are multiples of 8, and these are not")
    table = tables(lists, chunk)
    chunks = len(table[3])
    processors = (
        torch.cuda.get_device_properties(lists.device).multi_processor_count if lists.device.type == "cuda" else 1
    )
    grid = (min(chunks, programs * processors) if programs else chunks,)
    lr, beta1 = SCALARS["lr"], SCALARS["beta1"]
    scalars = lr, 1 - lr * SCALARS["weight_decay"], beta1, 1 - beta1, SCALARS["rho_bs"], 1e-15
    constants = {"CHUNK": chunk, "BLOCK": block, "BRANCH": tail == "branch", "num_warps": warps}
    return lambda: _step[grid](*table, chunks, len(lists.p), *scalars, **constants)


def points(grid):
    for values in itertools.product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", help="file that gets one line of JSON a point")
    out = parser.parse_args().out
    if not torch.cuda.is_available():
        parser.error("no CUDA device: there is nothing to tune")
    with open(out, "w") as file:
        print(json.dumps(hardware()), file=file, flush=True)
        for model in ("gpt2-small", "gpt2-xl"):
            lists = Lists(model, "cuda")
            copy, copied = copy_pair("cuda")
            best = 0
            for point in points(GRID):
                run = step(lists, **point)
                pairs = paired({"step": run, "copy": copy}, "gpu", rounds=5)
                found = pairs.ratio("copy", "step", lists.nbytes("pgmhpm") / copied)
                line = {"model": model, **point, "of copy": found.value, "noise": found.noise}
                print(json.dumps(line), file=file, flush=True)
                if found.value > best:  # checked before it is believed
                    check_update(lists, run)
                    best = found.value
                    print(line, flush=True)
            del lists, copy
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
