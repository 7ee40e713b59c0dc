"""GNB's loss on labels sampled from the model: one read of the logits forward; one read and one write backward.

A row of V logits is read as STREAMS equal runs side by side, WIDTH elements of each per step. A step is a full,
unmasked tile whose loads start at multiples of 16 bytes, whatever V, the row stride and the base address are: the few
elements in front (head) and those behind (tail) are read apart. Each run leaves its maximum and its sum of
exponentials. They give the log-sum-exp and, as cumulative probabilities, the run in which the sampled label lies; only
that run, 1/STREAMS of the row, is read again. Few long rows are read by PARTS programs each, through 128*PARTS bytes
of scratch per row.
"""

import torch
import triton
import triton.language as tl

from growkit.kernels.philox import key, philox
from growkit.reference import LABELS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WARPS = 8
STREAMS = tl.constexpr(16)
WIDTH = tl.constexpr(256)
TILE = tl.constexpr(4096)  # STREAMS * WIDTH: 16 elements per thread, so 32 or 64 bytes in flight
REST = tl.constexpr(1024)  # elements per masked step
LANES = tl.constexpr(64)  # of each of STREAMS groups, in the run that is read again
CHUNK = 4  # tiles per program of the backward
PARTS = 8
LOG2E = tl.constexpr(1.4426950408889634)
# What a maximum of -inf is taken for where it is subtracted: exp(-inf - LOWEST) is 0, -inf - -inf would be NaN.
LOWEST = tl.constexpr(-3.4028234663852886e38)
# No fusion: lanes that share a sum add its terms in different orders, and only where each product is rounded on its own
# do they find the same bits, of which Triton lets any lane store its own.
OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": False}

# --- device functions ---


@triton.jit
def _merge(m, s, axis: tl.constexpr):
    """Maximum and sum of exp(z - maximum) over one axis of partial ones."""
    top = tl.max(m, axis)
    s *= tl.exp2((m - tl.expand_dims(tl.maximum(top, LOWEST), axis)) * LOG2E)
    return top, tl.sum(s, axis)


@triton.jit
def _head(address, V, VEC: tl.constexpr):
    """Elements before the first whose address is a multiple of 16 bytes; address: counted in elements."""
    return tl.minimum((-address & (VEC - 1)).to(tl.int32), V)


@triton.jit
def _steps(V, VEC: tl.constexpr):
    """Full tiles of a row, the same for every row."""
    return tl.maximum(V - VEC + 1, 0) // TILE


@triton.jit
def _streams(z, run, first, last, VEC: tl.constexpr):
    """Maximum and sum of exponentials of each of STREAMS runs, over steps first .. last-1; z: 16-byte aligned."""
    lanes: tl.constexpr = WIDTH // VEC
    offset = (
        (tl.arange(0, STREAMS) * run)[:, None, None]
        + (tl.arange(0, lanes) * VEC)[None, :, None]
        + tl.arange(0, VEC)[None, None, :]
    )
    m = tl.full([STREAMS, lanes], float("-inf"), tl.float32)
    s = tl.full([STREAMS, lanes], 0.0, tl.float32)
    for i in range(first, last):
        x = tl.load(z + i * WIDTH + offset).to(tl.float32)
        top = tl.maximum(m, tl.max(x, 2))
        base = tl.maximum(top, LOWEST)
        s = s * tl.exp2((m - base) * LOG2E) + tl.sum(tl.exp2((x - base[:, :, None]) * LOG2E), 2)
        m = top
    return _merge(m, s, 1)


@triton.jit
def _choose(s, target):
    """Index of the first positive sum that takes the cumulative sum past target, and what of target is left there."""
    k = tl.arange(0, STREAMS)
    chosen = tl.min(tl.where((tl.cumsum(s, 0) > target) & (s > 0), k, STREAMS), 0)
    chosen = tl.minimum(chosen, tl.max(tl.where(s > 0, k, 0), 0))
    return chosen, target - tl.sum(tl.where(k < chosen, s, 0.0), 0)


@triton.jit
def _uniform(element, refresh, k0, k1):
    """24 bits of element `element` in [0, 1): the high ones of its 32, as in the reference."""
    block = element >> 2
    w0, w1, w2, w3 = philox(block, block >> 32, 0, refresh, k0, k1)
    word = (element & 3).to(tl.int32)
    w = tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3))
    return (w >> 8).to(tl.float32) * (1.0 / 16777216)


@triton.jit
def _search(z, first, end, base, target):
    """The element of first .. end-1 at which the running sum of exp(z - base) passes target.

    Where rounding keeps the sum below, the last element of positive probability. Two levels: sums of STREAMS groups,
    then running sums inside one, so that no thread holds more than a few elements.
    """
    length = tl.cdiv(end - first, STREAMS * LANES) * LANES
    y = first + (tl.arange(0, STREAMS) * length)[:, None] + tl.arange(0, LANES)[None, :]
    s = tl.full([STREAMS, LANES], 0.0, tl.float32)
    for j in range(0, length, LANES):
        x = tl.load(z + y + j, y + j < end, float("-inf")).to(tl.float32)
        s += tl.exp2((x - base) * LOG2E)
    group, target = _choose(tl.sum(s, 1), target)

    i = first + group * length
    end = tl.minimum(end, i + length)
    label, last = end, i
    while (label == end) & (i < end):
        y_group = i + tl.arange(0, WIDTH)
        x_group = tl.load(z + y_group, y_group < end, float("-inf")).to(tl.float32)
        p = tl.exp2((x_group - base) * LOG2E)
        label = tl.min(tl.where((tl.cumsum(p, 0) > target) & (p > 0), y_group, end), 0)
        last = tl.maximum(last, tl.max(tl.where(p > 0, y_group, 0), 0))
        target -= tl.sum(p, 0)
        i += WIDTH
    return tl.where(label == end, last, label)


# --- kernels ---


@triton.jit(do_not_specialize=["logits", "V", "stride", "phase"])
def partial_kernel(
    logits, maxima, sums, V: tl.int32, stride: tl.int64, phase: tl.int32, PARTS: tl.constexpr, VEC: tl.constexpr
):
    """Maximum and sum of exponentials of part p of the steps of row n, for program (n, p)."""
    n, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start = n * stride
    head, steps = _head(phase + start, V, VEC), _steps(V, VEC)
    z = tl.multiple_of(logits + start + head, 16)
    m, s = _streams(z, steps * WIDTH, steps * part // PARTS, steps * (part + 1) // PARTS, VEC)
    slot = (n * PARTS + part) * STREAMS + tl.arange(0, STREAMS)
    tl.store(maxima + slot, m)
    tl.store(sums + slot, s)


@triton.jit(do_not_specialize=["logits", "V", "stride", "phase", "row", "refresh", "k0", "k1"])
def sample_kernel(
    logits,
    mask,
    maxima,
    sums,
    labels,
    lse,
    nll,
    V: tl.int32,
    stride: tl.int64,
    phase: tl.int32,
    row: tl.int64,
    refresh: tl.uint32,
    k0: tl.uint32,
    k1: tl.uint32,
    PARTS: tl.constexpr,
    VEC: tl.constexpr,
):
    """Label, log-sum-exp and negative log-likelihood of row n; PARTS > 1: from what `partial_kernel` left."""
    n = tl.program_id(0).to(tl.int64)
    start = n * stride
    head, steps = _head(phase + start, V, VEC), _steps(V, VEC)
    run = steps * WIDTH
    z = logits + start

    k = tl.arange(0, STREAMS)
    if PARTS == 1:
        m, s = _streams(tl.multiple_of(z + head, 16), run, 0, steps, VEC)
    else:
        slot = (n * PARTS + tl.arange(0, PARTS)[:, None]) * STREAMS + k[None, :]
        m, s = _merge(tl.load(maxima + slot), tl.load(sums + slot), 0)

    lane = tl.arange(0, VEC)
    x = tl.load(z + lane, lane < head, float("-inf")).to(tl.float32)
    m_head = tl.max(x, 0)
    s_head = tl.sum(tl.exp2((x - tl.maximum(m_head, LOWEST)) * LOG2E), 0)

    lane = tl.arange(0, REST)
    m_rest = tl.full([REST], float("-inf"), tl.float32)
    s_rest = tl.full([REST], 0.0, tl.float32)
    for i in range(head + steps * TILE, V, REST):
        x_rest = tl.load(z + i + lane, lane < V - i, float("-inf")).to(tl.float32)
        top_rest = tl.maximum(m_rest, x_rest)
        base_rest = tl.maximum(top_rest, LOWEST)
        s_rest = s_rest * tl.exp2((m_rest - base_rest) * LOG2E) + tl.exp2((x_rest - base_rest) * LOG2E)
        m_rest = top_rest
    m_tail, s_tail = _merge(m_rest, s_rest, 0)

    # The head belongs to the first run and the tail to the last: runs are then consecutive and cover the row.
    top = tl.maximum(tl.max(m, 0), tl.maximum(m_head, m_tail))
    base = tl.maximum(top, LOWEST)
    s = s * tl.exp2((m - base) * LOG2E)
    s += tl.where(k == 0, s_head * tl.exp2((m_head - base) * LOG2E), 0.0)
    s += tl.where(k == STREAMS - 1, s_tail * tl.exp2((m_tail - base) * LOG2E), 0.0)
    total = tl.sum(s, 0)

    # A run with less than 2^-64 of the whole counts as empty (24 bits cannot tell it from that), so that the search
    # in a run which does not always finds an exponential that has not underflowed to 0.
    s = tl.where(s > 5.421010862427522e-20, s, 0.0)
    chosen, target = _choose(s, _uniform(row + n, refresh, k0, k1) * total)
    i = tl.where(chosen == 0, 0, head + chosen * run)
    end = tl.where(chosen == STREAMS - 1, V, head + (chosen + 1) * run)

    label = _search(z, i, end, base, target)
    label = tl.where(total > 0, label, V - 1)  # NaN, or no logit above -inf: as in the reference

    log = tl.log(total)
    value = (base - tl.load(z + label).to(tl.float32)) + log
    label = label.to(tl.int64)
    if mask is not None:
        counts = tl.load(mask + n)
        label, value = tl.where(counts, label, -100), tl.where(counts, value, 0.0)
    tl.store(labels + n, label)
    tl.store(lse + n, top + log)
    tl.store(nll + n, value)


@triton.jit
def _gradient(x, y, label, lse, weight):
    return weight * (tl.exp2((x.to(tl.float32) - lse) * LOG2E) - tl.where(y == label, 1.0, 0.0))


@triton.jit(do_not_specialize=["logits", "out", "V", "stride", "out_stride", "phase"])
def backward_kernel(
    logits,
    labels,
    lse,
    weight,
    out,
    V: tl.int32,
    stride: tl.int64,
    out_stride: tl.int64,
    phase: tl.int32,
    CHUNK: tl.constexpr,
    VEC: tl.constexpr,
    OUT_ALIGNED: tl.constexpr,
):
    """weight * (softmax(z_n) - onehot(y_n)) for tiles CHUNK*c .. CHUNK*(c+1)-1 of row n, for program (n, c)."""
    n, c = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start = n * stride
    head, steps = _head(phase + start, V, VEC), _steps(V, VEC)
    z, d = logits + start, out + n * out_stride
    label = tl.load(labels + n).to(tl.int32)
    normalizer, factor = tl.load(lse + n), tl.load(weight)

    z_full, d_full = tl.multiple_of(z + head, 16), d + head
    if OUT_ALIGNED:
        d_full = tl.multiple_of(d_full, 16)
    step: tl.constexpr = TILE // 8 * VEC  # a divisor of TILE: two words of 16 bytes per thread
    lane = tl.arange(0, step)
    first, last = c * CHUNK * TILE, tl.minimum((c + 1) * CHUNK, steps) * TILE
    if label < 0:
        for i in range(first, last, step):
            tl.store(d_full + i + lane, tl.full([step], 0.0, out.dtype.element_ty))
    else:
        for i in range(first, last, step):
            g = _gradient(tl.load(z_full + i + lane), head + i + lane, label, normalizer, factor)
            tl.store(d_full + i + lane, g.to(out.dtype.element_ty))

    if c == 0:
        end = tl.where(label < 0, 0, V)  # of what is read
        front = tl.arange(0, VEC)
        g = _gradient(tl.load(z + front, front < tl.minimum(head, end)), front, label, normalizer, factor)
        # All warps load the head and one of them stores it, perhaps to where it was loaded from.
        tl.debug_barrier()
        tl.store(d + front, tl.where(label < 0, 0.0, g).to(out.dtype.element_ty), front < head)
        rest = tl.arange(0, REST)
        for i in range(head + steps * TILE, V, REST):
            g_rest = _gradient(tl.load(z + i + rest, rest < end - i), i + rest, label, normalizer, factor)
            tl.store(d + i + rest, tl.where(label < 0, 0.0, g_rest).to(out.dtype.element_ty), rest < V - i)


# --- launchers ---


def _rows(op, logits):
    """logits with unit column stride, elements per 16 bytes, address of the first in elements."""
    if logits.dtype not in DTYPES:
        raise TypeError(f"{op}: logits have {logits.dtype}, expected one of {', '.join(map(str, DTYPES))}")
    if not 0 < logits.shape[1] < 2**31 - 2 * TILE.value:
        raise ValueError(f"{op}: logits have shape {tuple(logits.shape)}, expected [rows, V] with 0 < V < 2^31 - 8192")
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        logits = logits.contiguous()
    return logits, 16 // logits.element_size(), logits.data_ptr() // logits.element_size()


def parts(rows, V, device):
    """Programs per row: more than one where the rows are too few to fill the GPU, and long enough to be divided."""
    if device.type != "cuda" or V < 2 * PARTS * TILE.value:
        return 1
    return PARTS if rows < 2 * torch.cuda.get_device_properties(device).multi_processor_count else 1


def sampled_nll(logits, mask=None, *, seed, refresh, row=0):
    """`growkit.reference.sampled_nll` for logits in DTYPES; float64 is left to the reference.

    Computes in float32. A label may differ from the reference's where its uniform lies within rounding (1e-5) of a
    boundary of the cumulative distribution. It never has probability 0, except that a row with NaN, with +inf or with
    nothing above -inf gives label V-1 and a NaN likelihood.
    Reads the logits once and 1/16 of each row a second time. Temporaries: 4 bytes per row, or 1 KiB where rows are
    split. Rows may have any stride; a column stride other than 1 costs a copy. No host synchronisation. Deterministic.
    At most 48 registers per thread. Raises TypeError for other dtypes, ValueError for V = 0.
    """
    logits, VEC, address = _rows("sampled_nll", logits)
    rows, V = logits.shape
    labels = torch.empty(rows, dtype=torch.int64, device=logits.device)
    lse, nll = (torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(2))
    if rows:
        split, maxima, sums = parts(rows, V, logits.device), None, None
        layout = V, logits.stride(0), address % VEC
        options = {"PARTS": split, "VEC": VEC, **OPTIONS}
        with torch.cuda.device_of(logits):
            if split > 1:
                maxima, sums = torch.empty(2, rows, split, STREAMS.value, dtype=torch.float32, device=logits.device)
                partial_kernel[(rows, split)](logits, maxima, sums, *layout, **options)
            flags = None if mask is None else mask.contiguous()
            drawn = row, refresh, *key(seed, LABELS)
            sample_kernel[(rows,)](logits, flags, maxima, sums, labels, lse, nll, *layout, *drawn, **options)
    return nll.sum() / (rows if mask is None else mask.sum()), labels, lse


def sampled_nll_backward(grad, logits, labels, lse, *, out=None):
    """`growkit.reference.sampled_nll_backward` for logits in DTYPES; computes in float32, rounds to nearest once.

    out: where to write, like the logits in shape, dtype and device, with rows of unit stride that do not overlap. It
    may be the logits themselves, never a shifted view of them. The caller vouches that nothing needs the logits any
    more; the version counter of `out` is raised, so that autograd refuses to use logits that a node had saved.
    Reads the logits of unmasked rows once and writes the result once. Deterministic. At most 48 registers per thread.
    """
    op = "sampled_nll_backward"
    result = torch.empty_like(logits) if out is None else out
    if result.shape != logits.shape or result.dtype != logits.dtype or result.device != logits.device:
        raise ValueError(
            f"{op}: out is {result.dtype} {tuple(result.shape)} on {result.device}, "
            f"expected {logits.dtype} {tuple(logits.shape)} on {logits.device}"
        )
    logits, VEC, address = _rows(op, logits)
    rows, V = logits.shape
    if out is not None:
        if (V > 1 and out.stride(1) != 1) or (rows > 1 and out.stride(0) < V):
            raise ValueError(f"{op}: out has strides {out.stride()}, expected (at least {V}, 1)")
        torch.autograd.graph.increment_version(out)
    if not rows:
        return result
    row_major = result if V == 1 or result.stride(1) == 1 else logits.new_empty(rows, V)
    shift = row_major.data_ptr() // row_major.element_size() - address
    stride, out_stride = logits.stride(0), row_major.stride(0)
    with torch.cuda.device_of(logits):
        backward_kernel[rows, triton.cdiv(max(1, V // TILE.value), CHUNK)](
            logits,
            labels.contiguous(),
            lse.contiguous(),
            (grad / (labels != -100).sum()).float(),
            row_major,
            V,
            stride,
            out_stride,
            address % VEC,
            CHUNK=CHUNK,
            VEC=VEC,
            OUT_ALIGNED=shift % VEC == 0 and (out_stride - stride) % VEC == 0,
            **OPTIONS,
        )
    return result if row_major is result else result.copy_(row_major)


# --- for growkit.kernels.report ---


def _variant(kernel, dtype, executed, name="", *, hot=True, **constants):
    types = {
        **dict.fromkeys(("logits", "out"), f"*{dtype}"),
        **dict.fromkeys(("maxima", "sums", "lse", "nll", "weight"), "*fp32"),
        **{"labels": "*i64", "mask": "*u1", "V": "i32", "stride": "i64", "out_stride": "i64", "phase": "i32"},
        **{"row": "i64", "refresh": "u32", "k0": "u32", "k1": "u32"},
    }
    size = 4 if dtype == "fp32" else 2
    constants = {"VEC": 16 // size, **constants}
    return {
        "name": f"{dtype} {name}".strip(),
        "kernel": kernel,
        "types": {name: types[name] for name in kernel.arg_names if name in types and name not in constants},
        "constants": constants,
        "registers": 48,  # five programs of WARPS warps on a multiprocessor of 65,536 registers
        "reads": hot * size,
        "writes": hot * size if kernel is backward_kernel else 0,
        "instructions": 12,  # at 4.3 TB/s an H200 issues 13.7 per thread and 2-byte element read
        "options": OPTIONS,
        "executed": executed,
    }


WHOLE = {"PARTS": 1, "maxima": None, "sums": None}
VARIANTS = [
    _variant(sample_kernel, "bf16", (14, 1.1, 0.73, 1.08), **WHOLE, mask=None),
    _variant(sample_kernel, "fp16", (14, 1.1, 0.73, 1.08), **WHOLE, mask=None),
    _variant(sample_kernel, "fp32", (16, 1.5, 0.86, 1.08), **WHOLE, mask=None),
    _variant(sample_kernel, "bf16", (14, 1.1, 0.73, 1.08), "mask", **WHOLE),
    _variant(sample_kernel, "bf16", (), "split", PARTS=PARTS, mask=None, hot=False),
    _variant(partial_kernel, "bf16", (14, 1, 0.5), PARTS=PARTS),
    _variant(partial_kernel, "fp32", (19, 4.4, 1.2), PARTS=PARTS),
    *(
        _variant(backward_kernel, dtype, (14, 0, 0.03), CHUNK=CHUNK, OUT_ALIGNED=True)
        for dtype in ("bf16", "fp16", "fp32")
    ),
]
