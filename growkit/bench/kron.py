"""LiGO's workloads: the expansion of all blocks of a model, what it is compared with, and checks in float64.

W_new[l2] = sum_l1 w[l2,l1] B W[l1] A^T for every module of a block. Baselines get the same operators, dtype and
precision, and the best order where they have a choice.
"""

import functools
from typing import NamedTuple

import torch

from growkit import ops
from growkit.bench.measure import Case, Value, attempt, matmul_precision, paired, poisoned, temporaries, with_detail
from growkit.bench.pairs import PAIRS as SIZES
from growkit.bench.pairs import Pair
from growkit.bench.sophia import copy_pair
from growkit.growth import LiGO
from growkit.kron import plan


class Module(NamedTuple):
    """One weight of a block: axes ("d" or "f") and spaces of its rows and columns."""

    rows: str
    columns: str
    B: str
    A: str


_ATTENTION = {
    "query": Module("d", "d", "query", "residual"),
    "key": Module("d", "d", "key", "residual"),
    "value": Module("d", "d", "value", "residual"),
    "out": Module("d", "d", "residual", "value"),
}
_GPT = _ATTENTION | {"fc": Module("f", "d", "ffn", "residual"), "proj": Module("d", "f", "residual", "ffn")}
_LLAMA = _ATTENTION | {
    "gate": Module("f", "d", "ffn", "residual"),
    "up": Module("f", "d", "ffn", "residual"),
    "down": Module("d", "f", "residual", "ffn"),
}
# name of the large model -> sizes, modules of a block
PAIRS = {
    "bert-base": (SIZES["bert-small-base"], _GPT),
    "gpt2-medium": (SIZES["gpt2-base-medium"], _GPT),
    "gpt2-xl": (SIZES["gpt2-medium-xl"], _GPT),
    "llama-7b": (SIZES["llama-1b-7b"], _LLAMA),
}
TINY = Pair(2, 8, 16, 4, 12, 24, gated=False, tokens=0)
KINDS = {"dense": "dense", "top": "identity_top"}
# name -> dtype of all operands, torch's precision of float32 products, largest error against float64 (relative to the
# largest element)
PRECISIONS = {
    "highest": (torch.float32, "highest", 1e-6),
    "high": (torch.float32, "high", 2e-3),
    "medium": (torch.bfloat16, "highest", 3e-2),
}
CUBLAS_ERROR = 4e-6  # of "highest" on CUDA: cuBLAS's own float32 is up to 2.3e-6 off at these sizes, seen on an H200


class Problem:
    """Random small weights and operators of one pair: W, w by module, maps by space. All blocks, no embeddings.

    kind: "dense" maps, or "top" for [I; C]. renew() writes new values into the same memory.
    """

    def __init__(self, pair, kind, device, tiny=False, dtype=torch.float32, modules=None):
        size, table = PAIRS[pair]
        self.size = size = TINY if tiny else size
        self.modules = {name: table[name] for name in modules or table}
        self.kind, self.device, self.dtype, self.draws = KINDS[kind], torch.device(device), dtype, 0
        small, large = {"d": size.d1, "f": size.f1}, {"d": size.d2, "f": size.f2}
        axes = {}
        for m in self.modules.values():
            axes |= {m.B: m.rows, m.A: m.columns}
        make = functools.partial(torch.empty, dtype=dtype, device=device)
        top = {axis: small[axis] if kind == "top" else 0 for axis in small}
        self.maps = {space: make(large[axis] - top[axis], small[axis]) for space, axis in axes.items()}
        self.W = {name: make(size.L1, small[m.rows], small[m.columns]) for name, m in self.modules.items()}
        self.w = {name: make(size.L2, size.L1) for name in self.modules}
        self.axes = {
            name: tuple(plan.Axis(self.kind, small[axis], large[axis]) for axis in (m.rows, m.columns))
            for name, m in self.modules.items()
        }
        self.orders = {name: plan.best_order(size.L1, size.L2, *self.axes[name]) for name in self.modules}
        self.renew()

    def renew(self):
        self.draws += 1
        if self.device.type == "meta":  # only counted on
            return
        generator = torch.Generator(self.device).manual_seed(self.draws)
        for group in (self.W, self.maps, self.w):
            for t in group.values():
                with torch.no_grad():
                    t.normal_(0, t.shape[-1] ** -0.5, generator=generator)

    def arguments(self, name):
        m = self.modules[name]
        return self.W[name], self.maps[m.B], self.maps[m.A], self.w[name]

    def named_arguments(self, name):
        """Those of `growkit.ops.kron_expand`."""
        W, B, A, w = self.arguments(name)
        return {"W": W, "B": B, "A": A, "w": w, "B_kind": self.kind, "A_kind": self.kind}

    def cost(self, name):
        return plan.cost(self.orders[name], self.size.L1, self.size.L2, *self.axes[name])

    @property
    def operators(self):
        return [*self.maps.values(), *self.w.values()]

    def _sum(self, what):
        return sum(what(name) for name in self.modules)

    @property
    def flops(self):
        """Floating point operations of the best order; multiply and add are two."""
        return self._sum(lambda name: self.cost(name).flops)

    @property
    def backward_flops(self):
        return self._sum(lambda name: self.cost(name).backward_flops)

    @property
    def nbytes(self):
        """Bytes of small weights and operators, read once, and of large weights, written once: the floor."""
        small = sum(t.nbytes for t in [*self.W.values(), *self.operators])
        return small + self.dtype.itemsize * self._sum(self._new_elements)

    def _new_elements(self, name):
        B, A = self.axes[name]
        return self.size.L2 * B.large * A.large

    @property
    def intermediate(self):
        """Bytes of the input of the mix, L1 large layers, of the largest module."""
        per_layer = max(self._new_elements(name) // self.size.L2 for name in self.modules)
        return self.dtype.itemsize * self.size.L1 * per_layer


# --- growkit and the baselines: Problem -> {module: [L2, o2, i2]} -----------------------------------------------------


def growkit_expand(problem):
    parts = [problem.named_arguments(name) for name in problem.modules]
    return dict(zip(problem.modules, ops.kron_expand_many(parts), strict=True))


def literal_loop(problem):
    """The formula as it stands: a sum over small layers for each large one."""
    large = {}
    for name in problem.modules:
        W, B, A, w = problem.arguments(name)
        B, A = (_whole(M, problem.kind) for M in (B, A))
        layers = []
        for l2 in range(len(w)):
            total = 0
            for l1 in range(len(W)):
                total = total + w[l2, l1] * (B @ W[l1] @ A.T)
            layers.append(total)
        large[name] = torch.stack(layers)
    return large


def _whole(M, kind):
    if kind == "dense":
        return M
    return torch.cat([torch.eye(M.shape[1], dtype=M.dtype, device=M.device), M])


def official_style(problem, stacks=None):
    """As the authors' `FusedLinear` goes about it: the mix first, on a stack whose last axis is the layer, then each
    large layer's own two products, the identity block put on top by cat."""
    stacks = layers_last(problem) if stacks is None else stacks
    large = {}
    for name in problem.modules:
        _, B, A, w = problem.arguments(name)
        large[name] = [_fused_linear(stacks[name], B, A, row, problem.kind) for row in w]
    return large


def layers_last(problem):
    return {name: W.permute(1, 2, 0).contiguous() for name, W in problem.W.items()}


def _fused_linear(stack, B, A, row, kind):
    X = (stack * row).sum(-1)
    if kind == "dense":
        return B @ (X @ A.T)
    X = torch.cat([X, X @ A.T], 1)
    return torch.cat([X, B @ X], 0)


def einsum(problem):
    """One einsum of four operands for each module."""
    large = {}
    for name in problem.modules:
        W, B, A, w = problem.arguments(name)
        B, A = (_whole(M, problem.kind) for M in (B, A))
        large[name] = torch.einsum("kl,ro,loi,ci->krc", w, B, W, A)
    return large


def best_order_bmm(problem):
    """What a careful user writes in torch: each module's cheapest order, one product where modules share their columns'
    map and it comes first, batched products elsewhere, the mix as one more product; no cat, no copy of an input."""
    large, shared = {}, _share_first_products(problem)
    for name in problem.modules:
        W, B, A, w = problem.arguments(name)
        X = W
        for step in problem.orders[name]:
            if step == "D":
                X = (w @ X.reshape(len(X), -1)).view(len(w), *X.shape[1:])
            elif step == "A" and X is W and name in shared:
                X = shared[name]
            else:
                X = _product(X, B if step == "B" else A, problem.kind, step)
        large[name] = X
    return large


def _share_first_products(problem):
    """{module: W A^T} of modules whose order begins with A: those with one A and one shape in one product."""
    groups = {}
    for name, m in problem.modules.items():
        if problem.orders[name].startswith("A"):
            groups.setdefault((m.A, m.rows), []).append(name)
    first = {}
    for (space, _), names in groups.items():
        stack = torch.cat([problem.W[name] for name in names])
        first |= zip(names, _product(stack, problem.maps[space], problem.kind, "A").split(problem.size.L1), strict=True)
    return first


def _product(X, M, kind, step):
    if kind == "dense":
        return X @ M.T if step == "A" else M @ X
    if torch.is_grad_enabled() and (X.requires_grad or M.requires_grad):
        return torch.cat([X, X @ M.T if step == "A" else M @ X], 2 if step == "A" else 1)
    shape = list(X.shape)
    axis = 2 if step == "A" else 1
    shape[axis] += len(M)
    Y = X.new_empty(shape)
    old, new = Y.split([X.shape[axis], len(M)], axis)
    old.copy_(X)
    if step == "A":
        torch.matmul(X, M.T, out=new)
    else:
        torch.bmm(M.expand(len(X), -1, -1), X, out=new)
    return Y


def per_layer(problem):
    """The mix first and then, for each large layer, B M A^T."""
    large = {}
    for name in problem.modules:
        W, B, A, w = problem.arguments(name)
        B, A = (_whole(M, problem.kind) for M in (B, A))
        large[name] = [B @ (row @ W.flatten(1)).view(W.shape[1:]) @ A.T for row in w]
    return large


# --- checks ----------------------------------------------------------------------------------------------------------


def error(problem, expand):
    """Largest |W_new - float64| of any element, relative to the largest element of its module."""
    large, worst = expand(problem), 0.0
    for name in list(large):
        W, B, A, w = (t.detach().double() for t in problem.arguments(name))
        B, A = (_whole(M, problem.kind) for M in (B, A))
        wide = (B @ (W @ A.T)).flatten(1)
        for got, row in zip(large.pop(name), w, strict=True):  # layer by layer: all in float64 may not fit
            expected = (row @ wide).view(got.shape)
            distance = float((got.double() - expected).abs().max() / expected.abs().max())
            worst = max(worst, distance) if distance == distance else distance
            if distance != distance:
                return distance
    return worst


def check_expansion(problem, precision, expand=growkit_expand):
    """Raise AssertionError unless fresh small weights are expanded as in float64, every element of it written."""
    _, mode, allowed = PRECISIONS[precision]
    if precision == "highest" and problem.device.type == "cuda":
        allowed = CUBLAS_ERROR
    problem.renew()
    with torch.no_grad(), poisoned(), matmul_precision(mode):
        found = error(problem, expand)
    if not found <= allowed:
        raise AssertionError(f"{expand.__name__} is off by {found:.1e} of the largest element, allowed {allowed:.0e}")


# --- workloads -------------------------------------------------------------------------------------------------------


def forward(pair, kind, precision, device, tiny=False):
    """Expansion of all blocks of a model, without gradients."""
    dtype, mode, _ = PRECISIONS[precision]
    problem = Problem(pair, kind, device, tiny, dtype)

    def timed(expand, *arguments):
        def call():
            with torch.no_grad(), matmul_precision(mode):
                expand(problem, *arguments)

        return call

    def rows(rounds):
        contenders = {"growkit": timed(growkit_expand), "best order": timed(best_order_bmm)}
        if pair != "llama-7b" and kind == "top":
            contenders["official style"] = attempt(lambda: _at_highest(official_style, problem, layers_last(problem)))
        if pair == "bert-base" and precision == "highest":
            contenders["literal"] = timed(literal_loop)
            for enabled in (False, True):
                contenders[f"einsum, opt_einsum {'on' if enabled else 'off'}"] = attempt(
                    lambda enabled=enabled: _einsum_call(timed(einsum), enabled)
                )
        pairs = paired(contenders, "gpu", rounds, before=lambda _: problem.renew())
        with torch.no_grad(), matmul_precision(mode):
            errors = {expand.__name__: error(problem, expand) for expand in (growkit_expand, best_order_bmm)}
        label = f"{pair}.{kind}.{precision}"
        found = {f"L{1 if precision == 'highest' else 2}.{label}": pairs.ratio("best order", "growkit")}
        for id, name in (("L3.", "official style"), ("L4.literal.", "literal")):
            if name in contenders:
                found[id + label] = pairs.ratio(name, "growkit")
        return {id: with_detail(value, {"errors": errors}) for id, value in found.items()}

    run = timed(growkit_expand)
    check = functools.partial(check_expansion, problem, precision)
    return Case(run, check, rows, problem.nbytes, problem.flops)


def _at_highest(expand, problem, *arguments):
    """`expand` as a call whose products are in full float32, whatever precision is compared with it."""

    def call():
        with torch.no_grad(), matmul_precision("highest"):
            expand(problem, *arguments)

    return call


def _einsum_call(call, enabled):
    if enabled and not torch.backends.opt_einsum.is_available():
        raise RuntimeError("opt_einsum is not installed")

    def with_setting():
        was = torch.backends.opt_einsum.enabled
        torch.backends.opt_einsum.enabled = enabled
        try:
            call()
        finally:
            torch.backends.opt_einsum.enabled = was

    return with_setting


def forward_compiled(pair, device, tiny=False):
    """The same expansion, [I; C] in float32, against baselines under torch.compile (on a CPU only traced)."""
    problem = Problem(pair, "top", device, tiny)
    compile = functools.partial(torch.compile, backend="inductor" if problem.device.type == "cuda" else "eager")
    stacks = layers_last(problem)

    def module(stack, B, A, w, kind):  # three shapes of module, so three compilations
        return [_fused_linear(stack, B, A, row, kind) for row in w.unbind()]

    compiled_module = compile(module)

    def official(problem):
        for name in problem.modules:
            _, B, A, w = problem.arguments(name)
            compiled_module(stacks[name], B, A, w, problem.kind)

    run = _at_highest(growkit_expand, problem)

    def rows(rounds):
        contenders = {
            "growkit": run,
            "official style, compiled": attempt(lambda: _at_highest(official, problem)),
            "best order, compiled": attempt(lambda: _at_highest(compile(best_order_bmm), problem)),
        }
        pairs = paired(contenders, "gpu", rounds)
        return {f"L4.compiled.{pair}": pairs.ratio("official style, compiled", "growkit")}

    check = functools.partial(check_expansion, problem, "highest")
    return Case(run, check, rows, problem.nbytes, problem.flops)


def backward(pair, kind, device, tiny=False):
    """Gradients of all operators, the small weights frozen, apart from the forward; both on the GPU's clock."""
    problem = Problem(pair, kind, device, tiny)
    names = list(problem.modules)

    def through(expand):
        """The backward of one expansion, kept and run again and again."""
        large = expand(problem)
        new = [t for name in names for t in (large[name] if isinstance(large[name], list) else [large[name]])]
        into = [torch.randn_like(t) for t in new]
        return lambda: torch.autograd.grad(new, problem.operators, into, retain_graph=True)

    def forward():
        return growkit_expand(problem)

    def run():
        return torch.autograd.grad(list(forward().values()), problem.operators, grads)

    def rows(rounds):
        ours = through(growkit_expand)
        found = {}
        # One baseline at a time: each graph keeps its intermediates.
        for id, name, expand in (
            ("official", "official style", official_style),
            ("strong", "best order", best_order_bmm),
        ):
            pairs = paired(
                {"growkit": ours, name: attempt(lambda e=expand: through(e)), "forward": forward}, "gpu", rounds
            )
            found[f"L5.{id}.{pair}"] = pairs.ratio(name, "growkit")
            found[f"L5.forward.{pair}"] = pairs.ratio("growkit", "forward")
        return found

    for t in problem.operators:
        t.requires_grad_()
    grads = [torch.randn_like(t) for t in forward().values()]

    def check():
        """Gradients agree with those of the formula in float64, through every element of it."""
        problem.renew()
        for i, name in enumerate(names):
            W, B, A, w = problem.arguments(name)
            wide = [t.detach().double().requires_grad_(t.requires_grad) for t in (W, B, A, w)]
            new = wide[1] if kind == "dense" else _whole(wide[1], problem.kind)
            old = wide[2] if kind == "dense" else _whole(wide[2], problem.kind)
            expected = torch.einsum("kl,lrc->krc", wide[3], new @ (wide[0] @ old.T))
            wanted = torch.autograd.grad(expected, wide[1:], grads[i].double())
            kinds = {"B_kind": problem.kind, "A_kind": problem.kind}
            got = torch.autograd.grad(ops.kron_expand(W, B, A, w, **kinds), (B, A, w), grads[i])
            for map_name, g, r in zip("BAw", got, wanted, strict=True):
                distance = float((g.double() - r).abs().max() / r.abs().max())
                if not distance <= 1e-4:
                    raise AssertionError(f"gradient of {map_name} for {name} is off by {distance:.1e}")

    return Case(run, check, rows, problem.nbytes, problem.flops + problem.backward_flops)


def mix(pair, device, tiny=False):
    """The depth mix alone, the gather alone, and the mix's backward, in bytes a second against a copy's."""
    problem = Problem(pair, "dense", device, tiny, modules=["fc"])
    B, A = problem.axes["fc"]
    L1, L2 = problem.size.L1, problem.size.L2
    X = torch.empty(L1, B.large, A.large, device=device)
    w = torch.empty(L2, L1, device=device)
    W, rows_of, columns_of = problem.W["fc"], torch.arange(B.large) % B.small, torch.arange(A.large) % A.small
    rows_of, columns_of = rows_of.to(device), columns_of.to(device)
    kinds = {"B_kind": "copy", "A_kind": "copy"}

    def renew(_=None):
        problem.renew()
        X.normal_()
        w.normal_()

    def run():
        return ops.kron_expand(X, w=w)

    def gather():
        return ops.kron_expand(W, rows_of, columns_of, **kinds)

    def rows(rounds):
        copy, copied = copy_pair(device, tiny)
        leaves = X.clone().requires_grad_(), w.clone().requires_grad_()  # renewing X and w would spoil a kept graph
        new = ops.kron_expand(leaves[0], w=leaves[1])
        G = torch.randn_like(new)

        def back():
            torch.autograd.grad(new, leaves, G, retain_graph=True)

        contenders = {"growkit": run, "gather": gather, "backward": back, "copy": copy}
        pairs = paired(contenders, "gpu", rounds, before=renew)
        per_layer = X[0].nbytes
        return {
            "L6.mix": pairs.ratio("copy", "growkit", (L1 + L2) * per_layer / copied),
            "L6.gather": pairs.ratio("copy", "gather", (W.nbytes + L1 * per_layer) / copied),
            "L6.backward": pairs.ratio("copy", "backward", (2 * L1 + L2) * per_layer / copied),
        }

    def check():
        renew()
        with poisoned():
            mixed, gathered = run(), gather()
        expected = torch.einsum("kl,lrc->krc", w.double(), X.double())
        distance = float((mixed.double() - expected).abs().max() / expected.abs().max())
        if not distance <= 1e-6:
            raise AssertionError(f"the mix is off by {distance:.1e}")
        if not torch.equal(gathered, W[:, rows_of][:, :, columns_of]):
            raise AssertionError("the gather is not exact")

    return Case(run, check, rows, (L1 + L2) * X[0].nbytes, 2 * L1 * L2 * X[0].numel())


def memory(pair, device, tiny=False):
    """Peak memory beyond inputs and result: of growing a GPT-2, or one module type of a LLaMA into its parameters."""
    size, _ = PAIRS[pair]
    size = TINY if tiny else size
    if pair == "llama-7b":
        problem = Problem(pair, "top", device, tiny, modules=["gate"])
        B, A = problem.axes["gate"]
        out = torch.empty(size.L2, B.large, A.large, device=device)

        def run():
            ops.kron_expand_into([problem.named_arguments("gate") | {"out": list(out)}])

        def written(problem):
            out.fill_(torch.nan)
            run()
            return {"gate": out}

        def rows(rounds):
            if not torch.cuda.is_available():
                return {f"L7.{pair}": "GPU memory is what is measured"}
            return {f"L7.{pair}": Value(temporaries(run) / 2**30)}

        check = functools.partial(check_expansion, problem, "highest", written)
        return Case(run, check, rows, problem.nbytes, problem.flops)

    from transformers import GPT2Config, GPT2LMHeadModel

    common = {"vocab_size": 41 if tiny else 50257, "n_positions": 8 if tiny else 1024}
    heads = {"n_head": 2} if tiny else {"n_head": size.d1 // 64}, {"n_head": 3} if tiny else {"n_head": size.d2 // 64}
    configs = [
        GPT2Config(n_layer=layers, n_embd=width, n_inner=ffn, bos_token_id=0, eos_token_id=0, **head, **common)
        for (layers, width, ffn), head in zip((size[:3], size[3:6]), heads, strict=True)
    ]
    small = GPT2LMHeadModel(configs[0]).to(device).eval()
    operator = LiGO(small, configs[1])

    def rows(rounds):
        if not torch.cuda.is_available():
            return {f"L7.{pair}": "GPU memory is what is measured"}
        with torch.device("meta"):
            result = sum(p.nbytes for p in GPT2LMHeadModel(configs[1]).parameters())
        beyond = temporaries(operator.grow) - result - Problem(pair, "top", "meta").intermediate
        return {f"L7.{pair}": Value(beyond / 2**20)}

    def check():
        """A lossless start computes what the small model does."""
        tokens = torch.randint(common["vocab_size"], (1, 8), device=device)
        with torch.no_grad():
            a, b = small(tokens).logits, operator.grow()(tokens).logits
        if not (a - b).abs().max() <= 1e-4 * a.abs().max():
            raise AssertionError("the grown model computes something else")

    flops = operator.flops_per_expansion.forward
    return Case(operator.grow, check, rows, sum(p.nbytes for p in small.parameters()), flops)


def cpu_expand(module, device="cpu", tiny=False):
    """One module type, BERT-small to BERT-base, on one CPU thread: forward, and forward with backward."""
    top = Problem("bert-base", "top", device, tiny, modules=[module])
    dense = Problem("bert-base", "dense", device, tiny, modules=[module])
    for t in dense.operators:
        t.requires_grad_()
    stacks = layers_last(top)
    grad = torch.randn(top.size.L2, *(axis.large for axis in top.axes[module]), device=device)

    def run():
        with torch.no_grad():
            return growkit_expand(top)

    def official():
        with torch.no_grad():
            official_style(top, stacks)

    def four_operands():
        with torch.no_grad():
            einsum(top)

    def both_ways(expand):
        (new,) = expand(dense).values()
        new = torch.stack(new) if isinstance(new, list) else new
        torch.autograd.grad(new, dense.operators, grad)

    def rows(rounds):
        contenders = {"growkit": run, "official style": official}
        if module == "query":  # for the MLP's matrix it takes seconds and gigabytes
            contenders["einsum"] = _einsum_call(four_operands, False)
        pairs = paired(contenders, "cpu", rounds, before=lambda _: top.renew())
        trained = {"growkit": lambda: both_ways(growkit_expand), "per layer": lambda: both_ways(per_layer)}
        training = paired(trained, "cpu", max(1, rounds // 2), before=lambda _: dense.renew())
        found = {
            f"C2.official.{module}": pairs.ratio("official style", "growkit"),
            f"C2.backward.{module}": training.ratio("per layer", "growkit"),
        }
        if "einsum" in contenders:
            found[f"C2.einsum.{module}"] = pairs.ratio("einsum", "growkit")
        return found

    def check():
        for expand in (growkit_expand, official_style, per_layer):
            check_expansion(top, "highest", expand)
        if module == "query":
            check_expansion(top, "highest", einsum)

    return Case(run, check, rows, top.nbytes, top.flops)
