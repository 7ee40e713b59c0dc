"""How an expansion runs, on every device: the planned steps as GEMMs by torch, the rest by four small operators.

Those have kernels of our own in `growkit._C`, for CUDA tensors; elsewhere, and where the extension is absent, torch
does the same work. A stack is laid out [layers, rows, columns]: step A is one GEMM for all layers, step B a batched one
that reads its map once, and modules that share a map are further layers of one stack.
"""

import contextlib
import functools

import torch

from growkit import reference
from growkit.kron import plan

try:
    import growkit._C as _C
except ImportError as error:
    _C, MAX_LAYERS_BACKWARD = None, 0
    extension = f"none, expansion runs on torch alone ({error})"
else:
    _facts, MAX_LAYERS_BACKWARD = _C.build_info(), _C.MAX_LAYERS_BACKWARD
    if not _facts["kernels"]:
        extension = "none, expansion runs on torch alone (growkit._C was built for CPUs only)"
    else:
        extension = (
            f"built by CUDA {_facts['cuda']} for sm {' '.join(_facts['archs'])}, torch {_facts['torch']} and newer"
            + ("" if _facts["stream_found"] else "; not used, as torch's CUDA library was not found")
        )

_NARROW = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def _has_kernels(device):
    """Whether `growkit._C` has kernels that this CUDA device can run."""
    if _C is None or not _facts.get("stream_found"):
        return False
    here = torch.cuda.get_device_capability(device)
    archs = [tuple(map(int, name.split("."))) for name in _facts["archs"]]
    return here >= max(archs) or any(arch[0] == here[0] and arch <= here for arch in archs)


def _own(x, dtypes=_NARROW):
    return x.is_cuda and x.dtype in dtypes and _has_kernels(x.device)


@functools.cache
def _mixes_in_registers(L2, L1):
    """Whether the mix kernel reads a stack of L1 layers once; where it does not, cuBLAS is left to mix."""
    return _C is None or not _C.mix_plan(L1, L2, 1, 1, [1, 1, 1], [1, 1])["deep"]


def _wide(x):
    """The dtype of sums, depth maps and scales."""
    return torch.promote_types(x.dtype, torch.float32)


def mix_(out, X, w, scale):
    own = all(_own(x) for x in X) and all(y.dtype in _NARROW for y in out)
    (torch.ops.growkit.kron_mix_ if own else reference.kron_mix_)(out, X, w, scale)


def gather_(out, X, rows=None, columns=None):
    own = X.is_cuda and X.element_size() <= 8 and _has_kernels(X.device)
    (torch.ops.growkit.kron_gather_ if own else reference.kron_gather_)(out, X, None, rows, columns)


def _in_its_own_dtypes(run):
    """Autocast reaches into the implementation of an operator: products here must not become bfloat16."""

    @functools.wraps(run)
    def call(*arguments, **options):
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            return run(*arguments, **options)

    return call


@_in_its_own_dtypes
def forward(W, B, A, w, B_kind, A_kind, order, keep=False, precision=None):
    """W_new[l2] = sum_l1 w[l2,l1] B W[l1] A^T, contracted in `order`; arguments as `growkit.ops.kron_expand` has them.

    Returns W_new and, with keep, the input of the last step, which the backward needs (else None).
    """
    maps, precision = {"B": (B, B_kind), "A": (A, A_kind)}, _resolve(precision, W)
    X, last = W.contiguous(), None
    if order[-1:] == "D" and _own(X) and _mixes_in_registers(*w.shape):
        shape = [len(w), *_grown(X, maps, order[:-1])[1:]]
        last = X.new_empty([len(X), *shape[1:]]) if keep and len(order) > 1 else None
        W_new, depth = X.new_empty(shape), w.to(_wide(w)).contiguous()
        for row, column, block in _blocks(X, maps, order[:-1], precision, last, plan.PANEL_BYTES):
            place = W_new.narrow(1, row, block.shape[1]).narrow(2, column, block.shape[2])
            mix_([place], [block], [depth], [depth.new_empty(0)] * 2)
        return W_new, last if len(order) > 1 else X
    for step in _steps(order, maps, whole=not keep):
        last = X
        X = _mix(w, X, precision) if step == "D" else _widen(X, maps, step, precision)
    return X, last


@_in_its_own_dtypes
def into(parts):
    """Expand each part straight into tensors that exist. See `growkit.ops.kron_expand_into`.

    parts: (out, W, B, A, w, B_kind, A_kind, order, scales, precision). Widened blocks wait for one launch together
    until they hold plan.PENDING_BYTES.
    """
    jobs, pending = ([], [], [], []), 0

    def launch():
        if jobs[1]:
            mix_(*jobs)
        for job in jobs:
            job.clear()

    for out, W, B, A, w, B_kind, A_kind, order, scales, precision in parts:
        if not out:
            continue
        maps, precision = {"B": (B, B_kind), "A": (A, A_kind)}, _resolve(precision, W)
        X, wide = W.contiguous(), _wide(W)
        none = W.new_empty(0, dtype=wide)
        before, mixed, after = order.partition("D")
        if mixed and after:
            for step in before + mixed:
                X = _mix(w, X, precision) if step == "D" else _widen(X, maps, step, precision)
            before, mixed = after, ""
        depth = w.to(wide).contiguous() if mixed else none
        scales = [none if scale is None else scale.to(wide).contiguous() for scale in scales]
        for row, column, block in _blocks(X, maps, before, precision, limit=plan.PENDING_BYTES):
            if jobs[1] and jobs[1][-1].device != block.device:
                launch()
            ranges = ((row, block.shape[1]), (column, block.shape[2]))
            jobs[0].extend(y.narrow(0, *ranges[0]).narrow(1, *ranges[1]) for y in out)
            jobs[1].append(block)
            jobs[2].append(depth)
            jobs[3].extend(s.narrow(0, *r) if s.numel() else s for s, r in zip(scales, ranges, strict=True))
            pending += block.nbytes
            if pending >= plan.PENDING_BYTES:
                launch()
                pending = 0
    launch()


@_in_its_own_dtypes
def backward(G, W, B, A, w, last, B_kind, A_kind, order, needs, precision=None):
    """Gradients of `forward` with respect to those of (W, B, A, w) whose flag in `needs` is set, as a list.

    The steps in reverse: with the mix last, G is mixed first (w^T G) and every product runs on L1 layers, not L2.
    """
    maps, precision = {"B": (B, B_kind), "A": (A, A_kind)}, _resolve(precision, W)
    needed = dict(zip(("W", "B", "A", "D"), needs, strict=True))
    inputs = [W.contiguous(), last][: len(order)]
    if len(order) == 3:
        inputs.insert(1, _second_input(inputs[0], last, maps, w, order, precision))
    G = G.contiguous()
    gradients = {}
    for position in reversed(range(len(order))):
        step, X = order[position], inputs[position]
        more = needed["W"] or any(needed[earlier] for earlier in order[:position])
        if step == "D":
            gradients["D"], G = _mix_backward(G, X, w, needed["D"], more, precision)
        else:
            if needed[step]:
                gradients[step] = _map_gradient(G, X, *maps[step], step, precision)
            if more:
                G = _narrow(G, *maps[step], step, X.shape, precision)
        if not more:
            break
    gradients["W"] = G
    return [gradients[name] for name, flag in needed.items() if flag]


def _resolve(precision, W):
    """The precision of float32 products on CUDA: the one asked for, else torch's own setting. None elsewhere."""
    if not W.is_cuda or W.dtype != torch.float32:
        return None
    if precision is None:
        precision = torch.get_float32_matmul_precision()
        if precision == "highest" and torch.backends.cuda.matmul.fp32_precision == "tf32":
            precision = "high"
    return precision


def _steps(order, maps, whole):
    """The steps to run; two copies with no mix are one gather."""
    if whole and sorted(order) == ["A", "B"] and all(maps[step][1] == "copy" for step in order):
        return [order]
    return order


def _grown(X, maps, steps):
    """Shape of X after these steps."""
    shape = list(X.shape)
    for step in steps:
        M, kind = maps[step]
        axis = _axis(step)
        shape[axis] = len(M) if kind == "copy" else M.shape[-2] + (shape[axis] if kind == "identity_top" else 0)
    return shape


def _axis(step):
    return 1 if step == "B" else 2


def _widen(X, maps, steps, precision):
    """X after these steps, as one tensor."""
    Y = X.new_empty(_grown(X, maps, steps))
    for _ in _blocks(X, maps, steps, precision, Y):
        pass
    return Y


def _blocks(X, maps, steps, precision, whole=None, limit=None, row=0, column=0):
    """X after these steps, in blocks (row, column, block) that cover it once; `whole`, if given, gets them all too.

    The top of [I; C] is X itself, not a copy. limit: the new rows or columns of the first step come in panels of at
    most so many bytes.
    """
    if not steps:
        if whole is not None:
            _region(whole, row, column, X.shape).copy_(X)
        yield row, column, X
        return
    (step, *later), (M, kind) = steps, maps[steps[0]]
    axis, shape = _axis(step), _grown(X, maps, steps)
    both = kind == "copy" and len(later) == 1 and maps[later[0]][1] == "copy"
    top = X.shape[axis] if kind == "identity_top" else 0
    if top:
        yield from _blocks(X, maps, later, precision, whole, None, row, column)
    others = X.nbytes // max(1, X.shape[1] * X.shape[2]) * shape[3 - axis]
    size = shape[axis] - top
    for start, stop in plan.panels(size, others, limit) if limit else [(0, size)]:
        piece = M[start:stop] if kind == "copy" else M[..., start:stop, :]
        at = (row + top + start, column) if axis == 1 else (row, column + top + start)
        small = list(X.shape)
        small[axis] = stop - start
        if both:
            small[3 - axis] = shape[3 - axis]
        last = both or not later
        Y = _region(whole, *at, small) if last and whole is not None else X.new_empty(small)
        if kind == "copy":
            index = {axis: piece, 3 - axis: maps[later[0]][0] if both else None}
            gather_(Y, X, index[1], index[2])
        else:
            _apply(Y, X, piece, step, precision)
        if last:
            yield *at, Y
        else:
            yield from _blocks(Y, maps, later, precision, whole, None, *at)


def _region(whole, row, column, shape):
    return whole.narrow(1, row, shape[1]).narrow(2, column, shape[2])


def _apply(Y, X, M, step, precision):
    """Y = M X[n] (step "B") or X[n] M^T (step "A"), written in place: no cat."""
    if step == "B":
        _product(Y, M.expand(len(X), -1, -1), X, precision)
    elif M.ndim == 2 and Y.stride(0) == Y.shape[1] * Y.stride(1):
        _product(_rows(Y), X.flatten(0, 1), M.mT, precision)
    else:  # Y is some rows of every layer, or there is a map per layer
        _product(Y, X, M.mT.expand(len(X), -1, -1), precision)


def _rows(Y):
    """All rows of a stack as one matrix to be written: a view, where flatten might copy."""
    return Y.view(Y.shape[0] * Y.shape[1], Y.shape[2])


def _second_input(W, last, maps, w, order, precision):
    """Input of the second of three steps: the top block of its output where its map is [I; C], else computed again."""
    if order[1] == "B" and maps["B"][1] == "identity_top":
        return last[:, : W.shape[1]]
    if order[1] == "A" and maps["A"][1] == "identity_top":
        return last[..., : W.shape[2]]
    return _mix(w, W, precision) if order[0] == "D" else _widen(W, maps, order[0], precision)


def _mix(w, X, precision):
    with _tf32(False, precision):  # bound by memory: a lower precision would gain nothing
        return (w @ X.flatten(1)).view(w.shape[0], *X.shape[1:])


def _mix_backward(G, X, w, needs_w, needs_X, precision):
    """dw and w^T G, each None where it is not needed."""
    if _own(G) and max(w.shape) <= MAX_LAYERS_BACKWARD:
        mixed = torch.empty_like(X, memory_format=torch.contiguous_format) if needs_X else None
        depth = w.to(_wide(w)).contiguous()
        dw = torch.empty_like(depth) if needs_w else None
        torch.ops.growkit.kron_mix_backward_(mixed, dw, G, X.contiguous(), depth)
        return dw if dw is None else dw.to(w.dtype), mixed
    with _tf32(False, precision):
        dw = G.flatten(1) @ X.flatten(1).mT if needs_w else None
    return dw, _mix(w.mT, G, precision) if needs_X else None


def _map_gradient(G, X, M, kind, step, precision):
    axis = _axis(step)
    G = G.narrow(axis, X.shape[axis] if kind == "identity_top" else 0, M.shape[-2])
    if step == "A" and M.ndim == 2:
        dM = M.new_empty(M.shape)
        _product(dM, G.flatten(0, 1).mT, X.flatten(0, 1), precision)
        return dM
    left, right = (G, X.mT) if step == "B" else (G.mT, X)
    if M.ndim == 2 and not G.is_cuda:
        return torch.addbmm(M.new_zeros(M.shape), left, right)
    dM = M.new_empty(len(X), *M.shape[-2:])  # on CUDA addbmm is one small product per layer
    _product(dM, left, right, precision)
    return dM if M.ndim == 3 else dM.sum(0)


def _narrow(G, M, kind, step, shape, precision):
    """Transpose of a step; shape: of its input."""
    axis = _axis(step)
    if kind == "copy":
        X = G.new_zeros(shape)
        if G.is_cuda:  # sorts, where index_add_ would add in any order
            X.movedim(axis, 0).index_put_((M,), G.movedim(axis, 0), accumulate=True)
            return X
        return X.index_add_(axis, M, G)
    top = shape[axis] if kind == "identity_top" else 0
    head, G = G.narrow(axis, 0, top), G.narrow(axis, top, M.shape[-2])
    X = G.new_empty(shape)
    if step == "A" and M.ndim == 2 and G.is_cuda:
        _product(_rows(X), G.flatten(0, 1), M, precision, head.flatten(0, 1) if top else None)
    else:
        M = M.expand(shape[0], -1, -1)
        left, right = (M.mT, G) if step == "B" else (G, M)
        _product(X, left, right, precision, head if top else None)
    return X


def _product(out, left, right, precision, add=None):
    """out = left @ right (+ add), matrices or stacks of them. precision: of float32 on CUDA, else None."""
    multiply, add_product = (torch.bmm, torch.baddbmm) if out.ndim == 3 else (torch.mm, torch.addmm)
    if precision == "medium":
        multiply(_bfloat16(left), _bfloat16(right), out_dtype=torch.float32, out=out)
        return out if add is None else out.add_(add)
    with _tf32(precision == "high", precision):
        return multiply(left, right, out=out) if add is None else add_product(add, left, right, out=out)


def _bfloat16(x):
    repeated = x.ndim == 3 and x.stride(0) == 0
    return x[0].bfloat16().expand(x.shape) if repeated else x.bfloat16()


@contextlib.contextmanager
def _tf32(allowed, precision):
    """Whether cuBLAS may use TF32 for float32 inside; with no precision given, nothing changes."""
    if precision is None:
        yield
        return
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before
