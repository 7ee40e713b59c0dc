"""The contract: every operator of growkit with its schema, its fake, its autograd formula and who implements it.

Schemas live in Python so that the package is whole without any binary. `reference` serves every device; CUDA tensors
of at most 32 bits go to the kernel of the same name where triton is installed. Equations, shapes and dtypes stand in
the docstrings of `reference`. Eager code calls the Python functions of this module, which skip the dispatcher for ops
on long lists; `torch.ops.growkit.*` serves `torch.compile`, export and `opcheck`.
"""

import functools
import importlib

import torch

from growkit import expand, kernels, plan, reference

_library = torch.library.Library("growkit", "DEF")


def _define(schema, implementation, fake):
    """Register one op: its schema, the implementation that serves every device, and its shape rules."""
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    # Disabled, or a compiled program that calls the op would have the implementation traced in its turn.
    _library.impl(name, torch._disable_dynamo(implementation), "CompositeExplicitAutograd")
    torch.library.register_fake(f"growkit::{name}", fake, lib=_library)


# Which module of growkit.kernels serves an op on CUDA.
kernel_of: dict = {}


def _with_kernel(module, oracle):
    """`oracle`, or for CUDA tensors the function of the same name in growkit.kernels.`module`, by the first tensor."""
    kernel_of[oracle.__name__] = module

    @functools.wraps(oracle)
    def fastest(tensors, *args, **kwargs):
        first = tensors if isinstance(tensors, torch.Tensor) else tensors[0] if tensors else None
        if first is None or not first.is_cuda or first.dtype == torch.float64 or not kernels.available:
            return oracle(tensors, *args, **kwargs)
        kernel = getattr(importlib.import_module(f"growkit.kernels.{module}"), oracle.__name__)
        return kernel(tensors, *args, **kwargs)

    return fastest


def _on_lists(schema, implementation, fake):
    """`_define` for an op on lists of tensors, which autograd does not see. Returns the function to call."""
    _define(schema, implementation, fake)
    op = getattr(torch.ops.growkit, schema.partition("(")[0].partition(".")[0])

    @functools.wraps(implementation)
    def call(*args, **kwargs):
        # Dispatch of a few hundred tensors costs more than one launch: only a tracer pays for it.
        return (op if torch.compiler.is_compiling() else implementation)(*args, **kwargs)

    return call


def check_alike(op, like, **lists):
    """Raise unless each list has the length of `like`, and each tensor the shape and device of its partner there."""
    for name, tensors in lists.items():
        if len(tensors) != len(like):
            raise ValueError(f"{op}: {name} has {len(tensors)} tensors, expected {len(like)}")
        for i, (t, p) in enumerate(zip(tensors, like, strict=True)):
            if t.shape != p.shape or t.device != p.device:
                raise ValueError(
                    f"{op}: {name}[{i}] has shape {tuple(t.shape)} on {t.device}, "
                    f"expected {tuple(p.shape)} on {p.device}"
                )


# --- Sophia ----------------------------------------------------------------------------------------------------------


def _sophia_step_fake(p, g, m, h, master=None, unclipped=None, *, denominator="add", **scalars):
    check_alike("sophia_step_", p, g=g, m=m, h=h, **({"master": master} if master else {}))
    torch._check_value(
        denominator in ("add", "max"), lambda: f"sophia_step_: denominator is {denominator!r}, expected 'add' or 'max'"
    )


_SOPHIA_STEP = (
    "(Tensor(a!)[] p, Tensor[] g, Tensor(b!)[] m, Tensor[] h, Tensor(c!)[]? master=None, Tensor(d!)? unclipped=None, *,"
    " {scalar} lr, float beta1, {scalar} rho_bs, float eps, float weight_decay, str denominator='add',"
    " bool maximize=False, Tensor? scale=None, Tensor? skip=None, Tensor? step=None, int? seed=None,"
    " int[] parameter=[], int[] offset=[]) -> ()"
)
_sophia_step = _with_kernel("sophia", reference.sophia_step_)
_define("sophia_step_.tensor" + _SOPHIA_STEP.format(scalar="Tensor"), _sophia_step, _sophia_step_fake)
sophia_step_ = _on_lists("sophia_step_" + _SOPHIA_STEP.format(scalar="float"), _sophia_step, _sophia_step_fake)

squared_norm = _on_lists(
    "squared_norm(Tensor[] g) -> Tensor",
    _with_kernel("sophia", reference.squared_norm),
    lambda g: torch.empty((), dtype=torch.float64, device=g[0].device if g else None),
)
gnb_ema_ = _on_lists(
    "gnb_ema_(Tensor(a!)[] h, Tensor[] g, Tensor? scale=None, Tensor? skip=None, *, float beta2, int? seed=None,"
    " int refresh=0, int[] parameter=[], int[] offset=[]) -> ()",
    _with_kernel("sophia", reference.gnb_ema_),
    lambda h, g, scale=None, skip=None, **options: check_alike("gnb_ema_", h, g=g),
)


def _hutchinson_ema_fake(h, hu, u=None, scale=None, skip=None, *, parameter=(), **key):
    check_alike("hutchinson_ema_", h, hu=hu, **({} if u is None else {"u": u}))
    torch._check_value(
        u is not None or len(parameter) == len(h),
        lambda: f"hutchinson_ema_: without u, parameter needs {len(h)} indices, got {len(parameter)}",
    )


hutchinson_ema_ = _on_lists(
    "hutchinson_ema_(Tensor(a!)[] h, Tensor[] hu, Tensor[]? u=None, Tensor? scale=None, Tensor? skip=None, *,"
    " float beta2, int seed=0, int refresh=0, int[] parameter=[], int[] offset=[]) -> ()",
    _with_kernel("sophia", reference.hutchinson_ema_),
    _hutchinson_ema_fake,
)


def _rademacher_fake(u, *, seed, refresh, parameter, offset=()):
    torch._check_value(
        len(parameter) == len(u),
        lambda: f"rademacher_: parameter has {len(parameter)} indices, expected {len(u)}",
    )


rademacher_ = _on_lists(
    "rademacher_(Tensor(a!)[] u, *, int seed, int refresh, int[] parameter, int[] offset=[]) -> ()",
    _with_kernel("probe", reference.rademacher_),
    _rademacher_fake,
)


# 8-bit state


def check_coded(op, like, dtypes, **lists):
    """Raise unless codes and scales fit the tensors of `like`, as `reference.quantise_` writes them.

    lists: {name: (codes, scales)}; dtypes: {name: dtypes that the codes may have}.
    """
    for name, (codes, scales) in lists.items():
        check_alike(op, like, **{name: codes})
        if len(scales) != len(like):
            raise ValueError(f"{op}: {name}_scale has {len(scales)} tensors, expected {len(like)}")
        for i, (c, s) in enumerate(zip(codes, scales, strict=True)):
            if c.dtype not in dtypes[name] or not c.is_contiguous():
                raise TypeError(
                    f"{op}: {name}[{i}] is {c.dtype} with strides {c.stride()}, expected contiguous "
                    + " or ".join(map(str, dtypes[name]))
                )
            expected = (-(-c.numel() // reference.CODES_PER_SCALE), 2)
            if s.shape != expected or s.dtype != torch.float32 or s.device != c.device or not s.is_contiguous():
                raise ValueError(
                    f"{op}: {name}_scale[{i}] is {s.dtype} {tuple(s.shape)} on {s.device}, "
                    f"expected contiguous {torch.float32} {expected} on {c.device}"
                )


def _check_parameter(op, like, parameter):
    torch._check_value(
        len(parameter) == len(like), lambda: f"{op}: parameter has {len(parameter)} indices, expected {len(like)}"
    )


_CODES = {"m": (torch.int8,), "h": (torch.uint8, torch.int8)}


def _sophia_step_8bit_fake(
    p, g, m, h, m_scale, h_scale, master=None, unclipped=None, *, denominator="add", parameter, **others
):
    check_alike("sophia_step_8bit_", p, g=g, **({"master": master} if master else {}))
    check_coded("sophia_step_8bit_", p, _CODES, m=(m, m_scale), h=(h, h_scale))
    _check_parameter("sophia_step_8bit_", p, parameter)
    torch._check_value(
        denominator in ("add", "max"),
        lambda: f"sophia_step_8bit_: denominator is {denominator!r}, expected 'add' or 'max'",
    )


_SOPHIA_STEP_8BIT = (
    "(Tensor(a!)[] p, Tensor[] g, Tensor(b!)[] m, Tensor[] h, Tensor(c!)[] m_scale, Tensor[] h_scale,"
    " Tensor(d!)[]? master=None, Tensor(e!)? unclipped=None, *, {scalar} lr, float beta1, {scalar} rho_bs, float eps,"
    " float weight_decay, str denominator='add', bool maximize=False, Tensor? scale=None, Tensor? skip=None,"
    " Tensor step, int seed, int[] parameter, int[] offset=[], bool stochastic=False) -> ()"
)
_sophia_step_8bit = _with_kernel("sophia8bit", reference.sophia_step_8bit_)
_define(
    "sophia_step_8bit_.tensor" + _SOPHIA_STEP_8BIT.format(scalar="Tensor"), _sophia_step_8bit, _sophia_step_8bit_fake
)
sophia_step_8bit_ = _on_lists(
    "sophia_step_8bit_" + _SOPHIA_STEP_8BIT.format(scalar="float"), _sophia_step_8bit, _sophia_step_8bit_fake
)


def _gnb_8bit_fake(h, h_scale, g, scale=None, skip=None, *, parameter, **options):
    check_alike("gnb_ema_8bit_", h, g=g)
    check_coded("gnb_ema_8bit_", g, _CODES, h=(h, h_scale))
    _check_parameter("gnb_ema_8bit_", h, parameter)


gnb_ema_8bit_ = _on_lists(
    "gnb_ema_8bit_(Tensor(a!)[] h, Tensor(b!)[] h_scale, Tensor[] g, Tensor? scale=None, Tensor? skip=None, *,"
    " float beta2, int seed, int refresh, int[] parameter, int[] offset=[]) -> ()",
    _with_kernel("sophia8bit", reference.gnb_ema_8bit_),
    _gnb_8bit_fake,
)


def _hutchinson_8bit_fake(h, h_scale, hu, u=None, scale=None, skip=None, *, parameter, **options):
    check_alike("hutchinson_ema_8bit_", h, hu=hu, **({} if u is None else {"u": u}))
    check_coded("hutchinson_ema_8bit_", hu, {"h": (torch.int8,)}, h=(h, h_scale))
    _check_parameter("hutchinson_ema_8bit_", h, parameter)


hutchinson_ema_8bit_ = _on_lists(
    "hutchinson_ema_8bit_(Tensor(a!)[] h, Tensor(b!)[] h_scale, Tensor[] hu, Tensor[]? u=None, Tensor? scale=None,"
    " Tensor? skip=None, *, float beta2, int seed, int refresh, int[] parameter, int[] offset=[]) -> ()",
    _with_kernel("sophia8bit", reference.hutchinson_ema_8bit_),
    _hutchinson_8bit_fake,
)


def _sampled_nll_fake(logits, mask=None, *, seed, refresh, row=0, overwrite=False):
    torch._check_value(
        logits.dim() == 2 and logits.is_floating_point(),
        lambda: f"sampled_nll: logits have shape {tuple(logits.shape)} and {logits.dtype}, expected floats [rows, V]",
    )
    torch._check_value(
        mask is None or (mask.dtype == torch.bool and mask.shape == logits.shape[:1]),
        lambda: f"sampled_nll: mask has shape {tuple(mask.shape)} and {mask.dtype}, expected bool [{len(logits)}]",
    )
    lse = logits.new_empty(len(logits), dtype=torch.promote_types(logits.dtype, torch.float32))
    return lse.new_empty(()), lse.new_empty(len(logits), dtype=torch.int64), lse


_sample = _with_kernel("sampled_nll", reference.sampled_nll)
_sample_backward = _with_kernel("sampled_nll", reference.sampled_nll_backward)
_define(
    "sampled_nll(Tensor logits, Tensor? mask=None, *, int seed, int refresh, int row=0, bool overwrite=False)"
    " -> (Tensor, Tensor, Tensor)",
    lambda logits, mask=None, *, overwrite=False, **key: _sample(logits, mask, **key),
    _sampled_nll_fake,
)
_define(
    "sampled_nll_backward(Tensor grad, Tensor logits, Tensor labels, Tensor lse) -> Tensor",
    _sample_backward,
    lambda grad, logits, labels, lse: torch.empty_like(logits),
)


def _sample_backward_in_place(grad, logits, labels, lse):
    _sample_backward(grad, logits, labels, lse, out=logits)


_define(
    "sampled_nll_backward_(Tensor grad, Tensor(a!) logits, Tensor labels, Tensor lse) -> ()",
    _sample_backward_in_place,
    lambda grad, logits, labels, lse: None,
)


def _sampled_nll_setup(ctx, inputs, keyword_only_inputs, output):
    _, labels, lse = output
    ctx.overwrite = keyword_only_inputs["overwrite"]
    ctx.save_for_backward(inputs[0], labels, lse)
    ctx.mark_non_differentiable(labels, lse)


def _sampled_nll_gradient(ctx, grad, *_):
    logits, labels, lse = ctx.saved_tensors
    if not ctx.overwrite:
        return torch.ops.growkit.sampled_nll_backward(grad, logits, labels, lse), None
    logits = logits.detach()
    torch.ops.growkit.sampled_nll_backward_(grad, logits, labels, lse)
    return logits, None


torch.library.register_autograd(
    "growkit::sampled_nll", _sampled_nll_gradient, setup_context=_sampled_nll_setup, lib=_library
)


def sampled_nll(logits, mask=None, *, seed, refresh, row=0, overwrite=False):
    _sampled_nll_fake(logits, mask, seed=seed, refresh=refresh, row=row)
    return torch.ops.growkit.sampled_nll(logits, mask, seed=seed, refresh=refresh, row=row, overwrite=overwrite)


sampled_nll.__doc__ = f"""{reference.sampled_nll.__doc__.rstrip()}

    overwrite: let the backward write the gradient into the memory of the logits, where nothing else needs them any
    more; by default it allocates one tensor of that size. Autograd raises RuntimeError if a node had saved them.
    """


# kron_expand


def _kron_mix_fake(out, X, w, scale):
    jobs = len(X)
    torch._check_value(
        len(w) == jobs and len(scale) == 2 * jobs,
        lambda: f"kron_mix_: {jobs} stacks need as many w, got {len(w)}, and twice as many scale, got {len(scale)}",
    )


_define(
    "kron_mix_(Tensor(a!)[] out, Tensor[] X, Tensor[] w, Tensor[] scale) -> ()", reference.kron_mix_, _kron_mix_fake
)
_define(
    "kron_mix_backward_(Tensor(a!)? mixed, Tensor(b!)? dw, Tensor G, Tensor U, Tensor w) -> ()",
    reference.kron_mix_backward_,
    lambda mixed, dw, G, U, w: None,
)
_define(
    "kron_gather_(Tensor(a!) out, Tensor X, Tensor? layers=None, Tensor? rows=None, Tensor? columns=None) -> ()",
    reference.kron_gather_,
    lambda out, X, layers=None, rows=None, columns=None: None,
)
_define("tf32_split_(Tensor(a!) out, Tensor X, bool right) -> ()", reference.tf32_split_, lambda out, X, right: None)

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
       "highest"  float32 accuracy: cuBLAS on CUDA cores, or three TF32 products on operands split in two where
                  `growkit._C` is present and `growkit.plan` counts less time for them
       "high"     TF32   "medium"   operands rounded to bfloat16, sums in float32
    Returns [L2, o2, i2]. All floating point arguments have one dtype, which is the dtype of the result.

    Gradients for W, B, A and w (first derivatives only): G is mixed first, then every product runs on L1 layers.
    Cost: `growkit.plan` counts all legal orders and the cheapest one runs; the training forward keeps one
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
    from W. Memory beside W: those blocks, one panel of the first step (`plan.panels`) and what follows from it; so
    "highest" runs on CUDA cores here.
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


_define(
    "kron_expand(Tensor W, Tensor? B, Tensor? A, Tensor? w, str B_kind, str A_kind, str sharing, bool keep,"
    " str? precision=None) -> (Tensor, Tensor)",
    _kron_expand,
    _kron_expand_fake,
)
_define(
    "kron_expand_backward(Tensor G, Tensor W, Tensor? B, Tensor? A, Tensor? w, Tensor last, str B_kind, str A_kind,"
    " str sharing, bool[] needs, str? precision=None) -> Tensor[]",
    _kron_expand_backward,
    _kron_expand_backward_fake,
)
torch.library.register_autograd("growkit::kron_expand", _kron_gradients, setup_context=_kron_save, lib=_library)
