"""kron_expand against torch.kron, finite differences and itself in every order; the planner against counted costs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import growkit
from growkit import ops
from growkit.kron import expand, plan
from growkit.ops import kron

KINDS = (None, "dense", "identity_top", "copy")


def _map(kind, new, old, layers=None):
    if kind is None:
        return None
    if kind == "copy":
        return torch.randint(old, (new,))
    shape = (new - old if kind == "identity_top" else new, old)
    return torch.randn(*shape if layers is None else (layers, *shape), dtype=torch.float64)


def _matrix(M, kind, old):
    """The plain matrix (or stack of matrices) behind a map."""
    if M is None:
        return torch.eye(old, dtype=torch.float64)
    if kind == "copy":
        return torch.eye(old, dtype=torch.float64)[M]
    top = torch.eye(old, dtype=torch.float64).expand(*M.shape[:-2], old, old)
    return torch.cat([top, M], -2) if kind == "identity_top" else M


def _case(B_kind, A_kind, depth=True, sharing="model", L1=3, L2=5, o=(4, 6), i=(3, 7)):
    torch.manual_seed(0)
    layers = {"model": None, "target": L2 if depth else L1, "source": L1}[sharing]
    W = torch.randn(L1, o[0], i[0], dtype=torch.float64)
    w = torch.randn(L2, L1, dtype=torch.float64) if depth else None
    B, A = _map(B_kind, o[1], o[0], layers), _map(A_kind, i[1], i[0], layers)
    return W, B, A, w, {"B_kind": B_kind or "dense", "A_kind": A_kind or "dense", "sharing": sharing}


def _differentiable(*tensors):
    return [x.requires_grad_() if x is not None and x.is_floating_point() else x for x in tensors]


every_case = pytest.mark.parametrize(
    ("B_kind", "A_kind", "depth", "sharing"),
    [(B, A, depth, "model") for B in KINDS for A in KINDS for depth in (True, False)]
    + [(B, A, True, s) for B in KINDS for A in ("dense", "identity_top", None) for s in ("target", "source")],
)


@every_case
def test_kron_expand_is_the_kronecker_operator(B_kind, A_kind, depth, sharing):
    W, B, A, w, options = _case(B_kind, A_kind, depth, sharing)
    L1, (o1, i1) = W.shape[0], W.shape[1:]
    W_new = ops.kron_expand(W, B, A, w, **options)
    mix = torch.eye(L1, dtype=torch.float64) if w is None else w
    rows, columns = _matrix(B, B_kind, o1), _matrix(A, A_kind, i1)
    for l2 in range(len(mix)):
        expected = 0
        for l1 in range(L1):
            layer = l2 if sharing == "target" else l1
            b = rows[layer] if rows.ndim == 3 else rows
            a = columns[layer] if columns.ndim == 3 else columns
            expected = expected + mix[l2, l1] * (torch.kron(b, a) @ W[l1].reshape(-1))
        torch.testing.assert_close(W_new[l2].reshape(-1), expected, rtol=1e-12, atol=1e-12)


@every_case
def test_kron_expand_gradients_match_finite_differences(B_kind, A_kind, depth, sharing):
    W, B, A, w, options = _case(B_kind, A_kind, depth, sharing, L1=2, L2=3, o=(2, 4), i=(3, 5))
    inputs = _differentiable(W, B, A, w)
    torch.autograd.gradcheck(lambda *x: ops.kron_expand(*x, **options), inputs)
    W.requires_grad_(False)  # as in training, where the small weights are frozen
    if any(x is not None and x.requires_grad for x in inputs):
        torch.autograd.gradcheck(lambda *x: ops.kron_expand(*x, **options), inputs)


@pytest.mark.parametrize("alone", ["W", "B", "A", "w"])
def test_kron_expand_gives_the_one_gradient_that_is_asked_for(alone):
    W, B, A, w, options = _case("identity_top", "dense")
    arguments = dict(W=W, B=B, A=A, w=w)
    arguments[alone].requires_grad_()
    torch.autograd.gradcheck(lambda x: ops.kron_expand(**{**arguments, alone: x}, **options), [arguments[alone]])


@pytest.mark.parametrize(("B_kind", "A_kind", "depth", "sharing"), [
    ("dense", "identity_top", True, "model"), ("identity_top", "identity_top", True, "target"),
    ("copy", None, False, "model"), (None, None, False, "model"), ("dense", "dense", True, "source"),
])  # fmt: skip
@pytest.mark.parametrize("keep", [True, False])
def test_kron_expand_passes_opcheck(B_kind, A_kind, depth, sharing, keep):
    W, B, A, w, options = _case(B_kind, A_kind, depth, sharing)
    arguments = (W, B, A, w, *options.values(), keep)
    if keep:
        _differentiable(W, B, A, w)
    torch.library.opcheck(torch.ops.growkit.kron_expand.default, arguments)
    if keep:
        W_new, last = (x.detach() for x in torch.ops.growkit.kron_expand(*arguments))
        frozen = [x if x is None else x.detach() for x in (W, B, A, w)]
        needs = [x is not None and x.requires_grad for x in (W, B, A, w)]
        torch.library.opcheck(
            torch.ops.growkit.kron_expand_backward.default, (W_new, *frozen, last, *options.values(), needs)
        )


@pytest.mark.parametrize(("o", "i"), [((1, 1), (1, 5)), ((4, 4), (3, 3)), ((63, 65), (0, 0)), ((5, 9), (1, 1))])
@pytest.mark.parametrize("kind", ["dense", "identity_top"])
def test_kron_expand_takes_sizes_of_zero_and_one_and_views(kind, o, i):
    W, B, A, w, options = _case(kind, kind, L1=1, L2=1, o=o, i=i)
    W = W.mT.contiguous().mT
    expected = w[0, 0] * _matrix(B, kind, o[0]) @ W[0] @ _matrix(A, kind, i[0]).mT
    inputs = _differentiable(W, B, A, w)
    W_new = ops.kron_expand(*inputs, **options)
    torch.testing.assert_close(W_new[0], expected)
    W_new.sum().backward()
    assert all(x.grad.isfinite().all() for x in inputs)


def test_copying_maps_are_exact_to_the_bit():
    W = torch.randn(2, 5, 4)
    rows, columns = torch.randint(5, (9,)), torch.randint(4, (7,))
    W_new = ops.kron_expand(W, rows, columns, B_kind="copy", A_kind="copy")
    assert W_new.equal(W[:, rows][:, :, columns])


def test_kron_expand_gives_the_same_under_compile():
    W, B, A, w, options = _case("identity_top", "dense")
    inputs = _differentiable(W, B, A, w)

    def loss(*x):
        return ops.kron_expand(*x, **options).square().sum()

    eager = torch.autograd.grad(loss(*inputs), inputs)
    compiled = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(*inputs), inputs)
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_does_not_reach_inside():
    W, B, A, w, options = _case("identity_top", "dense")
    inputs = [x.float() for x in (W, B, A, w)]
    _differentiable(*inputs)
    runs = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            W_new = ops.kron_expand(*inputs, **options)
            runs.append((W_new, *torch.autograd.grad(W_new.square().sum(), inputs)))
    assert all(x.equal(y) for x, y in zip(*runs, strict=True))


def test_second_derivatives_are_refused():
    W, B, A, w, options = _case("dense", "dense")
    B.requires_grad_()
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(ops.kron_expand(W, B, A, w, **options).sum(), B, create_graph=True)


@pytest.mark.parametrize(("change", "message"), [
    ({"W": torch.zeros(3, 4)}, r"W must be .* \[3, 4\]"),
    ({"B": torch.zeros(6, 5)}, r"B \(dense.*\[new, 4\] for W \[3, 4, 3\], got \[6, 5\]"),
    ({"A": torch.zeros(2, 7, 3), "sharing": "target"}, r"\[5, new, 3\].*got \[2, 7, 3\]"),
    ({"w": torch.zeros(5, 2)}, r"w must be \[L2, 3\].*got \[5, 2\]"),
    ({"B": torch.zeros(6, 4, dtype=torch.float64)}, "B must be torch.float32"),
    ({"A": torch.zeros(7), "A_kind": "copy"}, "A must be torch.int64"),
    ({"B_kind": "diagonal"}, "B_kind must be .* got 'diagonal'"),
    ({"sharing": "layer"}, "sharing must be .* got 'layer'"),
])  # fmt: skip
def test_kron_expand_names_what_is_wrong(change, message):
    arguments = dict(W=torch.zeros(3, 4, 3), B=torch.zeros(6, 4), A=torch.zeros(7, 3), w=torch.zeros(5, 3))
    with pytest.raises(ValueError, match=message):
        ops.kron_expand(**{**arguments, **change})


sizes = st.integers(1, 5)
axes = st.builds(
    lambda kind, small, more: plan.Axis(kind, small, small + (0 if kind == "identity" else more)),
    st.sampled_from(("identity", "dense", "identity_top", "copy")), sizes, sizes,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(L1=sizes, L2=st.none() | sizes, B=axes, A=axes, sharing=st.sampled_from(("model", "target", "source")))
def test_all_legal_orders_agree_and_none_costs_less_than_the_planned_one(L1, L2, B, A, sharing):
    kinds = [None if x.kind == "identity" else x.kind for x in (B, A)]
    case = _case(*kinds, L2 is not None, sharing, L1, L2, (B.small, B.large), (A.small, A.large))
    W, rows, columns, w, options = case
    B, A = (
        x._replace(sharing=sharing if M is not None and M.ndim == 3 else "model") for x, M in ((B, rows), (A, columns))
    )
    orders = plan.legal_orders(L1, L2, B, A)
    best = plan.best_order(L1, L2, B, A)
    assert best in orders
    assert all(plan.cost(best, L1, L2, B, A).flops <= plan.cost(order, L1, L2, B, A).flops for order in orders)
    results = [expand.forward(W, rows, columns, w, *list(options.values())[:2], order)[0] for order in orders]
    for result in results:
        torch.testing.assert_close(result, results[0], rtol=1e-12, atol=1e-12)


def _modules(L1, d1, f1, L2, d2, f2, kind, ffn):
    D, F = plan.Axis(kind, d1, d2), plan.Axis(kind, f1, f2)
    modules = [(D, D)] * 4 + [(F, D)] * ffn + [(D, F)]
    return sum(plan.cost(plan.best_order(L1, L2, B, A), L1, L2, B, A).flops for B, A in modules)


@pytest.mark.parametrize(("sizes", "gated", "dense", "identity_top"), [
    ((6, 512, 2048, 12, 768, 3072), False, 131e9, 45e9),
    ((12, 768, 3072, 24, 1024, 4096), False, 761e9, 196e9),
    ((24, 1024, 4096, 48, 1600, 6400), False, 4.48e12, 1.66e12),
    ((22, 2048, 5632, 32, 4096, 11008), True, 38.3e12, 19.1e12),
], ids=["bert-small-base", "gpt2-base-medium", "gpt2-medium-xl", "llama-1b-7b"])  # fmt: skip
def test_planned_flops_of_known_pairs(sizes, gated, dense, identity_top):
    assert _modules(*sizes, "dense", 1 + gated) == pytest.approx(dense, rel=0.012)
    assert _modules(*sizes, "identity_top", 1 + gated) == pytest.approx(identity_top, rel=0.012)


def test_the_order_follows_the_sharing_and_the_shape():
    square, tall = plan.Axis("dense", 8, 12), plan.Axis("dense", 32, 48)
    assert plan.best_order(6, 12, tall, square) == "BAD"  # the larger axis first, the mix last
    assert plan.best_order(6, 12, square, tall) == "ABD"
    assert plan.best_order(12, 6, square, square)[0] == "D"  # fewer layers than before: mix first
    target, source = square._replace(sharing="target"), square._replace(sharing="source")
    assert all(o.index("D") < o.index("B") for o in plan.legal_orders(6, 12, target, square))
    assert plan.legal_orders(6, 12, target, source) == ["ADB"]
    assert plan.legal_orders(1, None, square, plan.Axis("identity", 4, 4)) == ["B"]


def test_backward_counts_what_is_computed():
    D = plan.Axis("identity_top", 512, 768)
    forward, _, backward = plan.cost("ABD", 6, 12, D, D)
    A_step, mix = 2 * 6 * 512 * 512 * 256, 2 * 6 * 12 * 768 * 768
    assert backward == 2 * forward - A_step
    assert forward == A_step + 2 * 6 * 512 * 256 * 768 + mix
    dense = plan.Axis("dense", 512, 768)
    assert plan.cost("ABD", 6, 12, dense, dense).backward_flops == 2 * plan.cost("ABD", 6, 12, dense, dense).flops


# --- the way of the CUDA kernels, walked with their references on CPU ---


@pytest.fixture
def own_way(monkeypatch):
    """Send CPU tensors the way that CUDA tensors take beside growkit._C, in panels of a few columns."""
    monkeypatch.setattr(expand, "_own", lambda x: x.dtype in (torch.float32, torch.float64))
    monkeypatch.setattr(expand, "MAX_LAYERS_BACKWARD", 64)
    monkeypatch.setattr(expand, "mix_", lambda *x: torch.ops.growkit.kron_mix_(*x))
    monkeypatch.setattr(expand, "gather_", lambda out, X, *x: torch.ops.growkit.kron_gather_(out, X, None, *x))
    monkeypatch.setattr(plan, "PANEL_BYTES", 8000)
    monkeypatch.setattr(plan, "PENDING_BYTES", 8000)


# Mix first, rows first, columns first, by counted cost where all maps are learned.
SHAPES = {
    "mix": dict(o=(4, 9), i=(3, 8)),
    "tall": dict(o=(32, 48), i=(8, 12), L2=12),
    "wide": dict(o=(8, 12), i=(32, 48), L2=12),
}


def test_shapes_have_the_orders_that_they_are_for():
    orders = []
    for shape in SHAPES.values():
        W, B, A, w, options = _case("identity_top", "identity_top", **shape)
        orders.append(kron._kron_order(W, B, A, w, *options.values()))
    assert orders == ["DBA", "BAD", "ABD"]


@pytest.mark.parametrize("shape", SHAPES)
@every_case
def test_both_ways_give_the_same(B_kind, A_kind, depth, sharing, shape, monkeypatch, request):
    W, B, A, w, options = _case(B_kind, A_kind, depth, sharing, **SHAPES[shape])
    inputs = _differentiable(W, B, A, w)
    leaves = [x for x in inputs if x is not None and x.requires_grad]
    G = torch.randn_like(ops.kron_expand(*inputs, **options))
    plain = [ops.kron_expand(*inputs, **options)]
    plain += torch.autograd.grad(plain[0], leaves, G)
    request.getfixturevalue("own_way")
    own = [ops.kron_expand(*inputs, **options)]
    own += torch.autograd.grad(own[0], leaves, G)
    for x, y in zip(plain, own, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
    with torch.no_grad():  # nothing is kept: other blocks are made
        torch.testing.assert_close(plain[0], ops.kron_expand(*inputs, **options), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("way", ["own_way", "seed"])  # seed: the plain way
@pytest.mark.parametrize("shape", SHAPES)
@every_case
def test_expansion_into_tensors_that_exist(B_kind, A_kind, depth, sharing, shape, way, request):
    request.getfixturevalue(way)
    W, B, A, w, options = _case(B_kind, A_kind, depth, sharing, **SHAPES[shape])
    expected = ops.kron_expand(W, B, A, w, **options)
    L, o, i = expected.shape
    scales = torch.rand(o, dtype=W.dtype), torch.rand(i, dtype=W.dtype)
    plain = torch.full_like(expected, torch.nan)
    joined = torch.full((L, i, 2 * o), torch.nan, dtype=W.dtype)  # transposed storage, two parts side by side
    narrow = torch.full((L, o, i + 3), torch.nan)  # another dtype, padded rows
    part = dict(W=W, B=B, A=A, w=w, **options)
    ops.kron_expand_into(
        [
            dict(out=list(plain), **part),
            dict(out=[y[:, :o].mT for y in joined], row_scale=scales[0], **part),
            dict(out=[y[:, o:].mT for y in joined], column_scale=scales[1], **part),
            dict(out=list(narrow[..., :i]), row_scale=scales[0], column_scale=scales[1], **part),
        ]
    )
    torch.testing.assert_close(plain, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(joined[..., :o].mT, expected * scales[0][:, None], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(joined[..., o:].mT, expected * scales[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(narrow[..., :i], (expected * scales[0][:, None] * scales[1]).float())
    assert narrow[..., i:].isnan().all()  # nothing beside the targets is touched


def test_expansion_into_vectors_and_nothing():
    W, B, _, w, options = _case("identity_top", None, i=(1, 1))
    out = torch.empty(5, 6, dtype=W.dtype)
    ops.kron_expand_into([dict(out=[y.unsqueeze(-1) for y in out], W=W, B=B, w=w, B_kind="identity_top")])
    torch.testing.assert_close(out, ops.kron_expand(W, B, w=w, **options).squeeze(-1))
    ops.kron_expand_into([])
    ops.kron_expand_into([dict(out=[], W=W, w=w[:0]), dict(out=list(torch.empty(3, 4, 1, dtype=W.dtype)), W=W)])
    assert not ops.kron_expand(W[:0], w=w[:, :0]).any()  # a sum over no layers


@pytest.mark.parametrize(("change", "message"), [
    ({"out": [torch.zeros(6, 7)] * 4}, "out has 4 tensors, expected 5"),
    ({"out": [torch.zeros(6, 7)] * 4 + [torch.zeros(6, 8)]}, r"out\[4\] is .*\[6, 8\].*expected .*\[6, 7\]"),
    ({"out": [torch.zeros(6, 7)] * 4 + [torch.zeros(7, 6).mT]}, r"out\[4\] .*strides \(1, 6\).*expected .*\(7, 1\)"),
    ({"row_scale": torch.ones(7)}, r"row_scale is torch.float32 \[7\].*expected torch.float32 \[6\]"),
    ({"column_scale": torch.ones(7).double()}, r"column_scale is torch.float64"),
    ({"precision": "best"}, "precision must be one of highest, high, medium or None, got 'best'"),
])  # fmt: skip
def test_expansion_into_checks_everything_before_it_writes(change, message):
    good = dict(
        out=list(torch.zeros(5, 6, 7)),
        W=torch.ones(3, 4, 3),
        B=torch.ones(6, 4),
        A=torch.ones(7, 3),
        w=torch.ones(5, 3),
    )
    with pytest.raises(ValueError, match=message):
        ops.kron_expand_into([good, {**good, **change}])
    assert not any(y.any() for y in good["out"])


def test_modules_that_share_a_map_are_one_stack(monkeypatch):
    monkeypatch.setattr(kron, "_stacks", lambda W, M, step: True)
    calls = []
    expand_one = ops.kron_expand
    monkeypatch.setattr(kron, "kron_expand", lambda W, *x, **y: calls.append(W.shape) or expand_one(W, *x, **y))
    parts = []
    A = torch.randn(8, 16, dtype=torch.float64, requires_grad=True)
    for kind in ("identity_top", "identity_top", "dense", "copy", None):
        W, B, _, w, _ = _case(kind, None, L2=9, o=(16, 24), i=(16, 16))
        parts.append(dict(W=W, B=B, A=A, w=w, B_kind=kind or "dense", A_kind="identity_top"))
        _differentiable(W, B, w)
    parts.append({**parts[0], "A": A.detach().clone(), "sharing": "target"})  # equal, but not the same map
    leaves = [A, *(part[name] for part in parts[:3] for name in ("W", "B", "w"))]
    together = ops.kron_expand_many(parts)
    assert len(calls) == len(parts) + 1 and calls[0][0] > 3  # one stack of several modules came first
    alone = [expand_one(**part) for part in parts]
    gradients = [torch.autograd.grad(sum(x.square().sum() for x in xs), leaves) for xs in (together, alone)]
    for x, y in zip((*together, *gradients[0]), (*alone, *gradients[1]), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-11)


def test_widened_blocks_wait_for_one_launch(monkeypatch):
    launches = []
    monkeypatch.setattr(expand, "mix_", lambda out, X, w, scale: launches.append(len(X)))
    W, B, A, w, options = _case("identity_top", "identity_top", L2=9, o=(16, 24), i=(16, 24))
    parts = [dict(out=list(torch.zeros(9, 24, 24)), W=W, B=B, A=A, w=w, **options) for _ in range(6)]
    ops.kron_expand_into(parts)
    assert launches == [6 * 4]  # four corners: W itself, the new columns, the new rows below either
    monkeypatch.setattr(plan, "PENDING_BYTES", 2 * 3 * 24 * 24 * 8)  # the blocks of two parts
    launches.clear()
    ops.kron_expand_into(parts)
    assert launches == [8, 8, 8]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_grown_models_are_written_by_the_kernels_way(dtype, own_way, monkeypatch):
    transformers = pytest.importorskip("transformers")
    shape = {"vocab_size": 31, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 0}
    small = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, **shape)).to(dtype)
    operator = growkit.LiGO(small, transformers.GPT2Config(n_layer=3, n_embd=24, n_head=3, **shape))
    monkeypatch.setattr(plan, "PENDING_BYTES", 64 << 20)
    launches = []
    mix = expand.mix_
    monkeypatch.setattr(expand, "mix_", lambda *jobs: launches.append(len(jobs[0])) or mix(*jobs))
    grown = dict(operator.grow().named_parameters())
    assert len(launches) == 1  # a model this small is one launch: matrices, biases, norms, q|k|v and embeddings
    for name, weight in operator.expand().items():
        torch.testing.assert_close(
            grown[name], weight.to(dtype), rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6
        )


# --- the small operators ---

KERNEL_CALLS = {
    "kron_mix_": lambda: (
        [torch.empty(5, 3, 4), *torch.empty(2, 6, 1)], [torch.randn(2, 3, 4), torch.randn(2, 6, 1)],
        [torch.randn(5, 2), torch.empty(0)], [torch.rand(3), torch.empty(0), torch.empty(0), torch.rand(1)],
    ),
    "kron_mix_backward_": lambda: (
        torch.empty(2, 3, 4), torch.empty(5, 2), torch.randn(5, 3, 4), torch.randn(2, 3, 4), torch.randn(5, 2),
    ),
    "kron_gather_": lambda: (
        torch.empty(3, 5, 4), torch.randn(2, 3, 4), torch.tensor([1, 0, 1]), torch.tensor([2, 2, 0, 1, 1]), None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", KERNEL_CALLS)
def test_small_operators_pass_opcheck(name):
    torch.library.opcheck(getattr(torch.ops.growkit, name).default, KERNEL_CALLS[name]())


def test_small_operators_compute_what_they_say():
    (whole, *vectors), X, w, scale = arguments = KERNEL_CALLS["kron_mix_"]()
    torch.ops.growkit.kron_mix_(*arguments)
    torch.testing.assert_close(whole, torch.einsum("ab,bij->aij", w[0], X[0]) * scale[0][:, None])
    torch.testing.assert_close(torch.stack(vectors), X[1] * scale[3])
    mixed, dw, G, U, w = arguments = KERNEL_CALLS["kron_mix_backward_"]()
    torch.ops.growkit.kron_mix_backward_(*arguments)
    torch.testing.assert_close(mixed, torch.einsum("ab,aij->bij", w, G))
    torch.testing.assert_close(dw, torch.einsum("aij,bij->ab", G, U))
    out, X, layers, rows, _ = arguments = KERNEL_CALLS["kron_gather_"]()
    torch.ops.growkit.kron_gather_(*arguments)
    assert out.equal(X[layers][:, rows])
