"""The parts of `kron_expand` that have kernels of our own on CUDA."""


def kron_mix_(out, X, w, scale):
    """Depth mix + assemble of many stacks: out[l2] = row_scale[:, None] * column_scale * sum_l1 w[l2,l1] X[l1].

    X: one stack [L1, rows, columns] per job, any strides
    w: one [L2, L1] per job, promote_types(dtype of X, float32); an empty vector leaves the layers as they are (L2 = L1)
    scale: two per job, of its rows and its columns, of the dtype of w; an empty vector is 1
    out: the targets of every job in turn: L2 matrices [rows, columns] of the same strides and dtype, or one tensor
        [L2, rows, columns] of any strides. Each is written whole, cast to its own dtype; they must not overlap.

    Sums in the dtype of w, in the order of the layers on CUDA; one rounding. Deterministic. Traffic: X once, out once.
    CUDA (float32, bfloat16, float16): one launch for 64 jobs and 2,800 targets; with more than 32 small or 256 large
    layers X is read again for every eight targets.
    """
    targets = iter(out)
    for j, (x, depth) in enumerate(zip(X, w, strict=True)):
        rows, columns = scale[2 * j : 2 * j + 2]
        Y = (depth @ x.to(depth.dtype).flatten(1)).view(len(depth), *x.shape[1:]) if depth.ndim == 2 else x
        if rows.numel():
            Y = Y * rows[:, None]
        if columns.numel():
            Y = Y * columns
        for l2, target in enumerate(targets):
            if target.ndim == 3:
                target.copy_(Y)
                break
            target.copy_(Y[l2])
            if l2 + 1 == len(Y):
                break


def kron_mix_backward_(mixed, dw, G, U, w):
    """Backward of the depth mix in one pass: mixed[l1] = sum_l2 w[l2,l1] G[l2] and dw[l2,l1] = <G[l2], U[l1]>.

    G: [L2, rows, columns]   U, mixed: [L1, rows, columns]   all contiguous, of one dtype
    w, dw: [L2, L1]          promote_types(that dtype, float32)
    mixed or dw may be None. Sums in the dtype of w; deterministic: dw is summed per block in fixed slots, then over the
    slots in order, and the number of blocks depends on the shape alone. CUDA: at most 64 layers on either side.
    """
    if mixed is not None:
        mixed.copy_((w.mT @ G.to(w.dtype).flatten(1)).view(mixed.shape))
    if dw is not None:
        dw.copy_(G.to(w.dtype).flatten(1) @ U.to(w.dtype).flatten(1).mT)


def kron_gather_(out, X, layers=None, rows=None, columns=None):
    """out[l, r, c] = X[layers[l], rows[r], columns[c]], bit for bit; an index that is None keeps its axis as it is.

    X, out: three axes, any strides, one dtype of at most 8 bytes   layers, rows, columns: int64 vectors
    Deterministic. Cost: one read and one write of `out`. An index out of range is an error; on CUDA it shows as a
    failed launch at the next synchronisation, as with torch's own indexing.
    """
    for axis, index in enumerate((layers, rows, columns)):
        if index is not None:
            X = X.index_select(axis, index)
    out.copy_(X)
