"""Expansion of stacks of matrices, and the parts of it that have kernels of our own."""

import torch

from growkit import reference
from growkit.kron import expand, plan
from growkit.ops.registry import define, library


def _kron_mix_fake(out, X, w, scale):
    jobs = len(X)
    torch._check_value(
        len(w) == jobs and len(scale) == 2 * jobs,
        lambda: f"kron_mix_: {jobs} stacks need as many w, got {len(w)}, and twice as many scale, got {len(scale)}",
    )


define("kron_mix_(Tensor(a!)[] out, Tensor[] X, Tensor[] w, Tensor[] scale) -> ()", reference.kron_mix_, _kron_mix_fake)
define(
    "kron_mix_backward_(Tensor(a!)? mixed, Tensor(b!)? dw, Tensor G, Tensor U, Tensor w) -> ()",
    reference.kron_mix_backward_,
    lambda mixed, dw, G, U, w: None,
)
define(
    "kron_gather_(Tensor(a!) out, Tensor X, Tensor? layers=None, Tensor? rows=None, Tensor? columns=None) -> ()",
    reference.kron_gather_,
    lambda out, X, layers=None, rows=None, columns=None: None,
)

PRECISIONS = ("highest", "high", "medium")


def kron_expand(W, B=None, A=None, w=None, *, B_kind="dense", A_kind="dense", sharing="model", precision=None):
    """Grow a stack of matrices: W_new[l2] = sum_l1 w[l2,l1] B W[l1] A^T      (LiGO, arXiv:2303.00980, eq. 8, Alg. 1)

    Equal to w (x) (B (x) A) applied to the row-major W, without forming that matrix.

    W: [L1, o1, i1]      small weights, floating point
    B: row map; None is the identity. A: column map, the same with i for o. By `B_kind` (`A_kind`):
       "dense"           [o2, o1]
       "identity_top"    [o2-o1, o1], the C of [I; C]
       "copy"            [o2] int64: new row j is old row B[j]; no gradient, exact to the bit
    w: [L2, L1] or None  depth map; None leaves the layers alone
    sharing: "model"; or maps with a leading axis, one per large layer ("target", applied after the mix) or one per
       small layer ("source", before it). Two-dimensional maps are always shared.
    precision: of float32 products on CUDA, by the names of `torch.set_float32_matmul_precision`; None is what is set.
       "highest"  float32   "high"   TF32   "medium"   operands rounded to bfloat16, sums in float32
    Returns [L2, o2, i2]. All floating point arguments have one dtype, which is the dtype of the result.

    Gradients for W, B, A and w (first derivatives only): G is mixed first, then every product runs on L1 layers.
    Cost: `growkit.kron.plan` counts all legal orders and the cheapest one runs; the training forward keeps one
    intermediate. Deterministic on CPU, and on CUDA as far as cuBLAS is. Raises ValueError where shapes do not chain or
    dtypes, devices, kinds or names are wrong.
    """
    kron_axes(W, B, A, w, B_kind, A_kind, sharing)
    _check_precision(precision)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (W, B, A, w))
    return torch.ops.growkit.kron_expand(W, B, A, w, B_kind, A_kind, sharing, keep, precision)[0]


def kron_expand_many(parts):
    """`kron_expand` of several modules, as a list. parts: dicts of its arguments.

    On CUDA, modules of one shape whose planned first step is the same map (queries, keys and values all read the
    residual stream) take that step as further layers of one stack: one product instead of several, where a single one
    would leave multiprocessors idle (`plan.stack_pays`). That copies their W once. Results and gradients are those of
    `kron_expand`.
    """
    parts = [dict(part) for part in parts]
    groups = {}
    for part in parts:
        problem = {"B": None, "A": None, "w": None, "B_kind": "dense", "A_kind": "dense", "sharing": "model"} | part
        order = _kron_order(*(problem[name] for name in ("W", "B", "A", "w", "B_kind", "A_kind", "sharing")))
        M, W = problem.get(order[:1]), part["W"]
        if len(order) < 2 or M is None or M.ndim != 2 or not _stacks(W, M, order[0]):
            continue
        kind = problem[f"{order[0]}_kind"]
        same = (order[0], kind, id(M), W.shape[1:], W.dtype, W.device, part.get("precision"))
        groups.setdefault(same, []).append(part)
    for (step, kind, *_, precision), group in groups.items():
        if len(group) > 1:
            stack = torch.cat([part["W"] for part in group])
            first = {step: group[0][step], f"{step}_kind": kind, "precision": precision}
            widened = kron_expand(stack, **first).split([len(part["W"]) for part in group])
            for part, W in zip(group, widened, strict=True):
                part |= {"W": W, step: None, f"{step}_kind": "dense"}
    return [kron_expand(**part) for part in parts]


def _stacks(W, M, step):
    L1, o1, i1 = W.shape
    return W.is_cuda and plan.stack_pays(*((L1 * o1, len(M)) if step == "A" else (len(M), L1 * i1)))


def kron_expand_into(parts):
    """`kron_expand` straight into tensors that exist, such as the parameters of the large model. No gradients.

    parts: iterable of dicts with the arguments of `kron_expand` and
       out: L2 matrices [o2, i2] of one dtype and the same strides, any strides: views of rows, columns or transposed
            storage will do. A vector is a matrix of one column.
       row_scale, column_scale: optional vectors [o2], [i2], of the dtype of W: what is written is multiplied by them
    A list is checked as a whole before anything is written, another iterable part by part as it is taken.

    With `growkit._C`, CUDA tensors and float32, bfloat16 or float16, the depth mix, the scales, the cast and the write
    are one launch for as many parts as fit in `plan.PENDING_BYTES` of widened blocks, and the top of [I; C] is read
    from W. Memory beside W: those blocks, one panel of the first step, as large, and what follows from it.
    """
    checked = (_into_part(**part) for part in parts)
    with torch.no_grad():
        expand.into(list(checked) if isinstance(parts, (list, tuple)) else checked)


def _into_part(
    out, W, B=None, A=None, w=None, *, B_kind="dense", A_kind="dense", sharing="model", precision=None, row_scale=None,
    column_scale=None,
):  # fmt: skip
    L1, L2, rows, columns = kron_axes(W, B, A, w, B_kind, A_kind, sharing)
    _check_precision(precision)
    L2 = L1 if L2 is None else L2
    shape = (rows.large, columns.large)
    if len(out) != L2:
        raise ValueError(f"kron_expand_into: out has {len(out)} tensors, expected {L2}")
    for i, y in enumerate(out):
        if y.shape != shape or y.device != W.device or y.dtype != out[0].dtype or y.stride() != out[0].stride():
            raise ValueError(
                f"kron_expand_into: out[{i}] is {y.dtype} {list(y.shape)} with strides {y.stride()} on {y.device}, "
                f"expected {out[0].dtype} {list(shape)} with strides {out[0].stride()} on {W.device}"
            )
    for name, scale, size in (("row_scale", row_scale, shape[0]), ("column_scale", column_scale, shape[1])):
        if scale is not None and (scale.shape != (size,) or scale.dtype != W.dtype or scale.device != W.device):
            raise ValueError(
                f"kron_expand_into: {name} is {scale.dtype} {list(scale.shape)} on {scale.device}, "
                f"expected {W.dtype} [{size}] on {W.device}"
            )
    order = _kron_order(W, B, A, w, B_kind, A_kind, sharing)
    return out, W, B, A, w, B_kind, A_kind, order, (row_scale, column_scale), precision


def _check_precision(precision):
    if precision is not None and precision not in PRECISIONS:
        raise ValueError(f"kron_expand: precision must be one of {', '.join(PRECISIONS)} or None, got {precision!r}")


def kron_axes(W, B, A, w, B_kind, A_kind, sharing):
    """Check the arguments of `kron_expand` and return what the planner takes: L1, L2 or None, axis B, axis A."""
    if W.ndim != 3 or not W.is_floating_point():
        raise ValueError(f"kron_expand: W must be floating point [L1, o1, i1], got {W.dtype} {list(W.shape)}")
    if sharing not in ("model", "target", "source"):
        raise ValueError(f"kron_expand: sharing must be 'model', 'target' or 'source', got {sharing!r}")
    L1, L2 = W.shape[0], None if w is None else w.shape[0]
    if w is not None and (w.ndim != 2 or w.shape[1] != L1):
        raise ValueError(f"kron_expand: w must be [L2, {L1}] for W {list(W.shape)}, got {list(w.shape)}")

    def axis(name, M, kind, small):
        if M is None:
            return plan.Axis("identity", small, small)
        if kind not in ("dense", "identity_top", "copy"):
            raise ValueError(f"kron_expand: {name}_kind must be 'dense', 'identity_top' or 'copy', got {kind!r}")
        layers = L1 if sharing == "source" or L2 is None else L2
        shapes = [["new"]] if kind == "copy" else [["new", small]] + [[layers, "new", small]] * (sharing != "model")
        if not any(M.ndim == len(s) and all(b in ("new", a) for a, b in zip(M.shape, s, strict=True)) for s in shapes):
            wanted = " or ".join(str(s).replace("'", "") for s in shapes)
            raise ValueError(
                f"kron_expand: {name} ({kind}, sharing {sharing!r}) must be {wanted} for W {list(W.shape)}, "
                f"got {list(M.shape)}"
            )
        large = M.shape[0] if kind == "copy" else M.shape[-2] + (small if kind == "identity_top" else 0)
        return plan.Axis(kind, small, large, sharing if M.ndim == 3 else "model")

    result = L1, L2, axis("B", B, B_kind, W.shape[1]), axis("A", A, A_kind, W.shape[2])
    for name, x, kind in (("B", B, B_kind), ("A", A, A_kind), ("w", w, "")):
        dtype = torch.int64 if kind == "copy" else W.dtype
        if x is not None and (x.dtype != dtype or x.device != W.device):
            raise ValueError(f"kron_expand: {name} must be {dtype} on {W.device} as W is, got {x.dtype} on {x.device}")
    return result


def _kron_order(*arguments):
    L1, L2, B, A = kron_axes(*arguments)
    return plan.best_order(
        int(L1),
        None if L2 is None else int(L2),
        B._replace(small=int(B.small), large=int(B.large)),
        A._replace(small=int(A.small), large=int(A.large)),
    )


def _kron_expand(W, B, A, w, B_kind, A_kind, sharing, keep, precision=None):
    order = _kron_order(W, B, A, w, B_kind, A_kind, sharing)
    W_new, last = expand.forward(W, B, A, w, B_kind, A_kind, order, keep, precision)
    if not order:  # an op returns no alias of its input
        W_new = W.clone(memory_format=torch.contiguous_format)
    return W_new, last if keep and len(order) > 1 else W.new_empty(0)


def _kron_expand_fake(W, B, A, w, B_kind, A_kind, sharing, keep, precision=None):
    L1, L2, rows, columns = kron_axes(W, B, A, w, B_kind, A_kind, sharing)
    order = _kron_order(W, B, A, w, B_kind, A_kind, sharing)
    small = {"D": L1, "B": rows.small, "A": columns.small}
    large = {"D": L1 if L2 is None else L2, "B": rows.large, "A": columns.large}
    if keep and len(order) > 1:
        last = W.new_empty([(small if step == order[-1] else large)[step] for step in "DBA"])
    else:
        last = W.new_empty(0)
    return W.new_empty([large[step] for step in "DBA"]), last


def _kron_expand_backward(G, W, B, A, w, last, B_kind, A_kind, sharing, needs, precision=None):
    order = _kron_order(W, B, A, w, B_kind, A_kind, sharing)
    if not order:
        return [G.clone(memory_format=torch.contiguous_format)]
    return expand.backward(G, W, B, A, w, last, B_kind, A_kind, order, needs, precision)


def _kron_expand_backward_fake(G, W, B, A, w, last, B_kind, A_kind, sharing, needs, precision=None):
    return [x.new_empty(x.shape) for x, needed in zip((W, B, A, w), needs, strict=True) if needed]


def _kron_save(ctx, inputs, output):
    W, B, A, w, *options, _, ctx.precision = inputs
    ctx.options = options
    ctx.save_for_backward(W, B, A, w, output[1])
    ctx.mark_non_differentiable(output[1])


def _kron_gradients(ctx, G, _):
    if torch.is_grad_enabled():
        raise RuntimeError("kron_expand: second derivatives are not implemented (create_graph=True)")
    W, B, A, w, last = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:4])
    found = iter(torch.ops.growkit.kron_expand_backward(G, W, B, A, w, last, *ctx.options, needs, ctx.precision))
    return *(next(found) if needed else None for needed in needs), None, None, None, None, None


define(
    "kron_expand(Tensor W, Tensor? B, Tensor? A, Tensor? w, str B_kind, str A_kind, str sharing, bool keep,"
    " str? precision=None) -> (Tensor, Tensor)",
    _kron_expand,
    _kron_expand_fake,
)
define(
    "kron_expand_backward(Tensor G, Tensor W, Tensor? B, Tensor? A, Tensor? w, Tensor last, str B_kind, str A_kind,"
    " str sharing, bool[] needs, str? precision=None) -> Tensor[]",
    _kron_expand_backward,
    _kron_expand_backward_fake,
)
torch.library.register_autograd("growkit::kron_expand", _kron_gradients, setup_context=_kron_save, lib=library)
