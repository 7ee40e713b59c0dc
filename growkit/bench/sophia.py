"""Sophia's workloads: lists of tensors shaped as real models, what a step is compared with, and checks in float64."""

import json
import os
import subprocess
import sys
import tempfile
import time

import torch

from growkit import ops, reference
from growkit.bench.measure import Case, Value, attempt, graphed, launches, paired, reason, temporaries, with_detail
from growkit.kernels import cpu
from growkit.optim import SophiaG

BETA2 = 0.99

# --- baselines -------------------------------------------------------------------------------------------------------


def official_step(p, g, m, h, *, lr, beta1, rho_bs, weight_decay, maximize=False):
    """The operations of the official SophiaG (Liu et al., arXiv:2305.14342), one by one and in its order."""
    g = -g if maximize else g
    p.mul_(1 - lr * weight_decay)
    m.mul_(beta1).add_(g, alpha=1 - beta1)
    ratio = (m.abs() / (rho_bs * h + 1e-15)).clamp(None, 1)
    p.addcmul_(m.sign(), ratio, value=-lr)


def official_refresh(h, g, *, beta2):
    """The operations of the official `update_hessian`."""
    h.mul_(beta2).addcmul_(g, g, value=1 - beta2)


class OfficialSophia(torch.optim.Optimizer):
    """The official SophiaG, operation by operation: step(bs=) and update_hessian() on the gradients in `.grad`."""

    def __init__(self, params, lr, betas, rho, weight_decay):
        super().__init__(params, {"lr": lr, "betas": betas, "rho": rho, "weight_decay": weight_decay})
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = {"exp_avg": torch.zeros_like(p), "hessian": torch.zeros_like(p)}

    @torch.no_grad()
    def step(self, closure=None, bs=5120):
        for group in self.param_groups:
            scalars = {"lr": group["lr"], "beta1": group["betas"][0], "rho_bs": group["rho"] * bs}
            for p in group["params"]:
                m, h = self.state[p]["exp_avg"], self.state[p]["hessian"]
                official_step(p, p.grad, m, h, **scalars, weight_decay=group["weight_decay"])

    @torch.no_grad()
    def update_hessian(self):
        for group in self.param_groups:
            for p in group["params"]:
                official_refresh(self.state[p]["hessian"], p.grad, beta2=group["betas"][1])


def foreach_step(p, g, m, h, *, lr, beta1, rho_bs, weight_decay):
    """The update in as few `torch._foreach_*` calls as it takes. lr may be a 0-d tensor."""
    torch._foreach_mul_(p, 1 - lr * weight_decay)
    torch._foreach_lerp_(m, g, 1 - beta1)
    d = torch._foreach_mul(h, rho_bs)
    torch._foreach_add_(d, 1e-15)
    u = torch._foreach_div(m, d)
    torch._foreach_clamp_min_(u, -1.0)
    torch._foreach_clamp_max_(u, 1.0)
    torch._foreach_mul_(u, lr)
    torch._foreach_sub_(p, u)


def _compiled_step(lists):
    """`foreach_step` under torch.compile, with lr a tensor; on a CPU only traced, for it is a baseline on GPUs."""
    lr = torch.tensor(SCALARS["lr"], device=lists.device)
    step = torch.compile(foreach_step, backend="inductor" if lists.device.type == "cuda" else "eager")
    return lambda: step(*lists.lists, **SCALARS | {"lr": lr})


def _triton_step(*lists):
    from growkit.bench.triton_step import per_tensor_step_  # here, because Triton may be missing

    return lambda: per_tensor_step_(*lists, **SCALARS)


# --- lists of tensors ------------------------------------------------------------------------------------------------


def gpt2_shapes(layers=12, width=384, vocabulary=50257, positions=1024):
    """Shapes of the parameters of a GPT-2, biases and norms included."""
    d = width
    block = [(d,), (d,), (d, 3 * d), (3 * d,), (d, d), (d,), (d,), (d,), (d, 4 * d), (4 * d,), (4 * d, d), (d,)]
    return [(vocabulary, d), (positions, d), *(block * layers), (d,), (d,)]


def nanogpt_shapes(layers=12, width=768, vocabulary=50304, positions=1024):
    """Shapes of the parameters of a nanoGPT without biases: 6 tensors a layer."""
    d = width
    block = [(d,), (3 * d, d), (d, d), (d,), (4 * d, d), (d, 4 * d)]
    return [(vocabulary, d), (positions, d), *(block * layers), (d,)]


def llama_shapes(layers=22, width=2048, ffn=5632, vocabulary=32000, keys=None):
    """Shapes of the parameters of a LLaMA, head untied. keys: width of keys and of values, by default the queries'."""
    d, k = width, keys or width
    block = [(d, d), (k, d), (k, d), (d, d), (ffn, d), (ffn, d), (d, ffn), (d,), (d,)]
    return [(vocabulary, d), *(block * layers), (d,), (vocabulary, d)]


PRIMES = (1, 2, 61, 251, 1021, 4093, 16381, 65537, 262139)

# name -> shapes at full size, and small ones with the same structure
MODELS = {
    "gpt2-small": (lambda: gpt2_shapes(12, 768), lambda: gpt2_shapes(2, 16, 41, 8)),
    "gpt2-medium": (lambda: gpt2_shapes(24, 1024), lambda: gpt2_shapes(3, 16, 41, 8)),
    "gpt2-xl": (lambda: gpt2_shapes(48, 1600), lambda: gpt2_shapes(4, 16, 41, 8)),
    "nanogpt": (nanogpt_shapes, lambda: nanogpt_shapes(2, 16, 41, 8)),
    "llama-1b": (llama_shapes, lambda: llama_shapes(2, 16, 24, 41)),
    "many-small": (lambda: [(1000,)] * 1000, lambda: [(100,)] * 50),
    "ragged": (lambda: [(n,) for n in PRIMES] * 16, lambda: [(n,) for n in PRIMES[:5]] * 2),
    "gpt2-xl-coded": (
        lambda: gpt2_shapes(48, 1600),
        lambda: [(70, 64), (16, 512), (40,)],
    ),  # codes from 4,096 elements on
    "gpt2-41m": (gpt2_shapes, lambda: gpt2_shapes(2, 16, 41, 8)),
}
UNALIGNED = ("ragged",)  # tensors that follow each other with no gap, as views of a bucket do
SCALARS = {"lr": 6e-4, "beta1": 0.965, "rho_bs": 0.05 * 5120, "weight_decay": 0.2}
SCALE = {"p": 0.02, "g": 1e-3, "m": 1e-3, "h": 1e-5}


class Lists:
    """Lists p, g, m, h of random tensors of given shapes, each list in one flat buffer, renewed as a whole.

    wide: dtype of m and h. aligned: every tensor starts at a multiple of 512 bytes, as torch's allocator would give.
    """

    def __init__(self, model, device, tiny=False, dtype=torch.float32, wide=torch.float32):
        self.device = torch.device(device)
        shapes = MODELS[model][tiny]()
        sizes = [torch.Size(shape).numel() for shape in shapes]
        step = 1 if model in UNALIGNED else 512 // min(dtype.itemsize, wide.itemsize)
        starts = [0]
        for size in sizes:
            starts.append(starts[-1] + -(-size // step) * step)
        self.elements = sum(sizes)
        self.flat, self.draws = {}, 0
        for name in SCALE:
            kind = dtype if name in "pg" else wide
            self.flat[name] = torch.zeros(starts[-1], dtype=kind, device=self.device)
            places = zip(starts[:-1], sizes, shapes, strict=True)
            setattr(self, name, [self.flat[name][start : start + size].view(shape) for start, size, shape in places])
        self.renew()

    @property
    def lists(self):
        return self.p, self.g, self.m, self.h

    def renew(self, names="pgmh"):
        """New random values for some of the lists, never seen before."""
        for name in names:
            self.draws += 1
            generator = torch.Generator(self.device).manual_seed(self.draws)
            self.flat[name].normal_(0, SCALE[name], generator=generator)
            if name == "h":
                self.flat[name].abs_()

    def nbytes(self, names):
        """Bytes of the elements of the lists named, once for each mention."""
        return sum(self.elements * self.flat[name].dtype.itemsize for name in names)

    def parameters(self):
        """The tensors of p as parameters whose gradients are those of g, sharing memory with both."""
        parameters = [torch.nn.Parameter(p) for p in self.p]
        for p, g in zip(parameters, self.g, strict=True):
            p.grad = g
        return parameters


def copy_pair(device, tiny=False):
    """A copy between two buffers of 4 GiB (on a CPU 256 MiB), and the bytes that it reads and writes."""
    size = 2**12 if tiny else 2**32 if torch.device(device).type == "cuda" else 2**28
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2 * size


# --- checks ----------------------------------------------------------------------------------------------------------


def check_update(lists, step):
    """Raise AssertionError unless `step()` updates fresh lists as float64 does, to rounding.

    m may differ by 4 eps of its two terms, and p by 4 eps and by what that error of m does to m/d, which the clip
    bounds; a p narrower than m also by one of its own steps.
    """
    lists.renew()
    before = [[t.clone() for t in tensors] for tensors in lists.lists]
    step()
    eps = torch.finfo(lists.m[0].dtype).eps
    lr = SCALARS["lr"]
    for i, (p, g, m, h) in enumerate(zip(*before, strict=True)):
        p64, g64, m64, h64 = (t.double() for t in (p, g, m, h))
        terms = eps * (m64.abs() + g64.abs())
        reference.sophia_step_([p64], [g64], [m64], [h64], eps=1e-15, **SCALARS)
        d = h64 * SCALARS["rho_bs"] + 1e-15
        slack = 4 * eps * p64.abs() + lr * (8 * eps + 8 * terms / d).clamp(max=2)
        if p.dtype != m.dtype:
            slack += torch.finfo(p.dtype).eps * p64.abs()
        within(f"m[{i}]", lists.m[i], m64, 4 * terms)
        within(f"p[{i}]", lists.p[i], p64, slack)
        if torch.equal(lists.p[i], p):
            raise AssertionError(f"p[{i}] was not updated")


def check_refresh(lists, refresh, expected):
    """Raise AssertionError unless `refresh()` folds fresh lists into h as `expected(i, h, g)` does in float64."""
    lists.renew()
    h = [t.clone() for t in lists.h]
    refresh()
    for i, (h_i, g_i) in enumerate(zip(h, lists.g, strict=True)):
        h64, g64 = h_i.double(), g_i.double()
        wanted = expected(i, h64, g64)
        within(f"h[{i}]", lists.h[i], wanted, 4 * torch.finfo(h_i.dtype).eps * (h64.abs() + (wanted - h64).abs()))
        if torch.equal(lists.h[i], h_i):
            raise AssertionError(f"h[{i}] was not refreshed")


def within(name, got, expected, slack):
    """Raise AssertionError where an element of `got` is further than `slack` from the float64 `expected`, or NaN."""
    wrong = ~((got.double() - expected).abs() <= slack)  # a NaN is wrong, too
    if wrong.any():
        at = int(wrong.flatten().nonzero()[0])
        pair = float(got.flatten()[at]), float(expected.flatten()[at])
        raise AssertionError(f"{name}[{at}] is {pair[0]!r}, expected {pair[1]!r} within {float(slack.flatten()[at])!r}")


# --- workloads -------------------------------------------------------------------------------------------------------


def with_state(parameters, **options):
    """A SophiaG with state, and with a refresh behind it, so that it does not warn of having none."""
    scalars = {"lr": SCALARS["lr"], "betas": (SCALARS["beta1"], 0.99), "rho": 0.05, "weight_decay": 0.2}
    optimizer = SophiaG(parameters, **scalars, **options)
    optimizer.update_hessian()
    return optimizer


def _adamw(parameters):
    return torch.optim.AdamW(parameters, lr=SCALARS["lr"], weight_decay=0.2, fused=True)


def update(model, device, tiny=False):
    """The float32 update of a whole model against what else computes it, on the GPU's clock and on the wall's."""
    lists = Lists(model, device, tiny)
    parameters = lists.parameters()

    def run():
        ops.sophia_step_(*lists.lists, eps=1e-15, **SCALARS)

    def official():
        for tensors in zip(*lists.lists, strict=True):
            official_step(*tensors, **SCALARS)

    def rows(rounds):
        copy, copied = copy_pair(device, tiny)
        adamw = attempt(lambda: _adamw(parameters).step)
        contenders = {
            "growkit": run,
            "copy": copy,
            "fused AdamW": adamw,
            "official": official,
            "foreach": lambda: foreach_step(*lists.lists, **SCALARS),
            "Triton per tensor": attempt(lambda: _triton_step(*lists.lists)),
            "Triton flat": attempt(lambda: _triton_step(*([lists.flat[name]] for name in SCALE))),
        }
        gpu = paired(contenders, "gpu", rounds, before=lambda _: lists.renew("g"))
        moved = lists.nbytes("pgmhpm")
        found = {
            f"S1.{model}": gpu.ratio("copy", "growkit", moved / copied),
            f"S2.{model}": gpu.ratio("growkit", "fused AdamW"),
            f"S5.{model}": gpu.ratio("Triton flat", "growkit"),
            f"S8.launches.{model}": Value(launches(run)),
            f"S8.gpu.{model}": gpu.seconds("growkit", 1e-6),
        }
        theirs = OfficialSophia(parameters, SCALARS["lr"], (SCALARS["beta1"], 0.99), 0.05, 0.2)
        wall = {"growkit": with_state(parameters).step, "official": theirs.step, "fused AdamW": adamw}
        pairs = paired(wall, "wall", rounds, before=lambda _: lists.renew("g"))
        found[f"S4.{model}"] = pairs.ratio("official", "growkit")
        found[f"S8.wall.{model}"] = pairs.ratio("official", "growkit")
        return found

    return Case(run, lambda: check_update(lists, run), rows, bytes=lists.nbytes("pgmhpm"))


def update_compiled(model, device, tiny=False):
    """The float32 update against `torch.compile` of the foreach one: both as CUDA graphs, and as they are, on the wall.

    The time to compile the other, and the kernels it became, are in the details.
    """
    lists = Lists(model, device, tiny)

    def run():
        ops.sophia_step_(*lists.lists, eps=1e-15, **SCALARS)

    def rows(rounds):
        start = time.perf_counter()
        compiled = attempt(lambda: _compiled_step(lists))
        detail = {"compile seconds": time.perf_counter() - start}
        if isinstance(compiled, str):
            return dict.fromkeys(("S3.graph", "S3.wall"), f"compiled: {compiled}")
        detail["kernels"] = launches(compiled)
        wall = paired({"growkit": with_state(lists.parameters()).step, "compiled": compiled}, "wall", rounds)
        found = {"S3.wall": wall.ratio("growkit", "compiled")}
        graphs = {name: attempt(lambda f=f: graphed(f)) for name, f in (("compiled", compiled), ("growkit", run))}
        if isinstance(graphs["compiled"], str):
            found["S3.graph"] = f"compiled: {graphs['compiled']}"
        else:
            found["S3.graph"] = paired(graphs, "gpu", rounds).ratio("growkit", "compiled")
        return {id: with_detail(value, detail) for id, value in found.items()}

    return Case(run, lambda: check_update(lists, run), rows, bytes=lists.nbytes("pgmhpm"))


# dtype of p and g, of m and h, options of SophiaG, lists that a step reads and writes (w: the float32 master)
FORMATS = {
    "bfloat16": (torch.bfloat16, torch.float32, {"bf16_update": "stochastic"}, "pgmhpm"),
    "bfloat16-master": (torch.bfloat16, torch.float32, {"bf16_update": "master"}, "gmhwpmw"),
    "bfloat16-state": (torch.bfloat16, torch.bfloat16, {"state_dtype": torch.bfloat16}, "pgmhpm"),
}


def update_mixed(form, model, device, tiny=False):
    """`SophiaG.step()` on bfloat16 parameters, on the GPU's clock, against copy bandwidth."""
    dtype, wide, options, moved = FORMATS[form]
    lists = Lists(model, device, tiny, dtype, wide)
    optimizer = with_state(lists.parameters(), **options)
    parameters = optimizer.param_groups[0]["params"]
    for p, m, h in zip(parameters, lists.m, lists.h, strict=True):
        optimizer.state[p].update(exp_avg=m, hessian=h)

    def check():
        def step():
            for p in parameters:
                if "master" in optimizer.state[p]:
                    optimizer.state[p]["master"].copy_(p)
            optimizer.step()

        check_update(lists, step)

    def rows(rounds):
        copy, copied = copy_pair(device, tiny)
        pairs = paired({"growkit": optimizer.step, "copy": copy}, "gpu", rounds, before=lambda _: lists.renew("g"))
        return {f"S9.{form}.{model}": pairs.ratio("copy", "growkit", nbytes / copied)}

    optimizer.step()
    nbytes = lists.nbytes(moved.replace("w", "m"))
    return Case(optimizer.step, check, rows, bytes=nbytes)


def clip(model, device, tiny=False):
    """A step that clips the gradient's norm as it reads it, against `clip_grad_norm_` and a step."""
    lists = Lists(model, device, tiny)
    parameters = lists.parameters()
    optimizers = {"folded": with_state(parameters, clip_grad_norm=1.0), "separate": with_state(parameters)}
    run = optimizers["folded"].step

    def separate():
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizers["separate"].step()

    def rows(rounds):
        pairs = paired({"folded": run, "separate": separate}, "gpu", rounds, before=lambda _: lists.renew("g"))
        return {f"S11.{model}": pairs.ratio("folded", "separate")}

    def check():
        """Both leave the same parameters, to the rounding of the norm, of a gradient that is clipped."""
        results, drawn = [], lists.draws
        for name, step in (("folded", run), ("separate", separate)):
            lists.draws = drawn
            lists.renew()
            lists.flat["g"].mul_(1e3)
            for state in optimizers[name].state.values():
                state["exp_avg"].zero_()
                state["hessian"].fill_(SCALE["h"])
            step()
            results.append(lists.flat["p"].clone())
        torch.testing.assert_close(*results, rtol=1e-6, atol=1e-4 * SCALARS["lr"])

    return Case(run, check, rows, bytes=lists.nbytes("pgmhpm") + lists.nbytes("g"))


def refresh_gnb(model, device, tiny=False):
    """The Gauss-Newton-Bartlett refresh of a model against copy bandwidth and the official `update_hessian`."""
    lists = Lists(model, device, tiny)

    def run():
        ops.gnb_ema_(lists.h, lists.g, beta2=BETA2)

    def official():
        for h, g in zip(lists.h, lists.g, strict=True):
            official_refresh(h, g, beta2=BETA2)

    def rows(rounds):
        copy, copied = copy_pair(device, tiny)
        contenders = {"growkit": run, "copy": copy, "official": official}
        gpu = paired(contenders, "gpu", rounds, before=lambda _: lists.renew("gh"))
        wall = paired({"growkit": run, "official": official}, "wall", rounds, before=lambda _: lists.renew("gh"))
        return {
            f"S6.copy.{model}": gpu.ratio("copy", "growkit", lists.nbytes("hgh") / copied),
            f"S6.official.{model}": gpu.ratio("growkit", "official"),
            f"S6.wall.{model}": wall.ratio("official", "growkit"),
        }

    def check():
        check_refresh(lists, run, lambda i, h, g: BETA2 * h + (1 - BETA2) * g * g)

    return Case(run, check, rows, bytes=lists.nbytes("hgh"))


def refresh_hutchinson(model, device, tiny=False):
    """Hutchinson's refresh with the probe regenerated, against one that reads it; and the probe's own making."""
    lists = Lists(model, device, tiny)
    u = [torch.zeros_like(t) for t in lists.h]
    key = {"seed": 1, "refresh": 0, "parameter": list(range(len(u)))}

    def run():
        ops.hutchinson_ema_(lists.h, lists.g, beta2=BETA2, **key)

    def write():
        ops.rademacher_(u, **key)

    def rows(rounds):
        write()
        stored = lists.nbytes("h")
        filled = torch.empty(max(1, stored // 4), device=device)
        contenders = {
            "growkit": run,
            "u read": lambda: ops.hutchinson_ema_(lists.h, lists.g, u, beta2=BETA2),
            "probe": write,
            "fill": lambda: filled.fill_(1.5),
        }
        pairs = paired(contenders, "gpu", rounds, before=lambda _: lists.renew("gh"))
        return {
            f"S7.regenerated.{model}": pairs.ratio("growkit", "u read"),
            f"S7.probe.{model}": pairs.ratio("fill", "probe"),
        }

    def check():
        """The probe that is read and the one that is regenerated are the same signs, new ones for a new key."""
        key["refresh"] += 1
        last = [t.clone() for t in u]
        for t in u:
            t.fill_(torch.nan)
        write()
        for t, former in zip(u, last, strict=True):
            if not (t.abs() == 1).all() or (t.numel() > 200 and torch.equal(t, former)):
                raise AssertionError("the probe is not one of fresh signs")
        check_refresh(lists, run, lambda i, h, g: BETA2 * h + (1 - BETA2) * u[i].double() * g)

    return Case(run, check, rows, bytes=lists.nbytes("hgh"))


def host(model, device, tiny=False):
    """What a step costs the host, at the model's number of tensors, all small: the device has next to nothing to do."""
    layers = {"gpt2-small": 12, "gpt2-xl": 48}[model]
    shapes = gpt2_shapes(2 if tiny else layers, 16, 41, 8)
    parameters = [torch.nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
    for p in parameters:
        p.grad = torch.randn_like(p)
    optimizer = with_state(parameters)

    def rows(rounds):
        pairs = paired({"growkit": optimizer.step}, "host", rounds, sample=0)
        found = {f"S10.host.{model}": pairs.seconds("growkit", 1e-6)}
        if model == "gpt2-small":
            found["S10.graph"] = _replays(parameters)
            found["S3.compile"] = _first_step(device)
            found["S3.recompiles"] = _recompiles(optimizer)
            if torch.cuda.is_available():
                found["S10.temporaries"] = Value(temporaries(optimizer.step))
        return found

    def check():
        """Steps are counted and change every parameter."""
        before, steps = [p.detach().clone() for p in parameters], optimizer.stats()["steps"]
        optimizer.step()
        if optimizer.stats()["steps"] != steps + 1 or any(map(torch.equal, before, parameters)):
            raise AssertionError("step() left parameters or its own count as they were")

    return Case(optimizer.step, check, rows)


def _replays(parameters):
    """1 if a captured step, replayed with another lr, changes parameters as an eager step with it does; else 0."""
    results = []
    start = [p.detach().clone() for p in parameters]
    for capture in (graphed, lambda f: f):
        lr = torch.tensor(SCALARS["lr"], device=parameters[0].device)
        try:
            optimizer = with_state(parameters, capturable=True)
            optimizer.param_groups[0]["lr"] = lr
            step = capture(optimizer.step)
        except Exception as error:
            return reason(error)
        lr.fill_(10 * SCALARS["lr"])
        with torch.no_grad():
            for p, value in zip(parameters, start, strict=True):
                p.copy_(value)
                optimizer.state[p]["exp_avg"].fill_(1e-3)
        step()
        results.append([p.detach().clone() for p in parameters])
    return Value(float(all(map(torch.equal, *results))))


def _first_step(device):
    """Seconds of the first update in a new process with nothing compiled."""
    program = (
        "import time; from growkit.bench import sophia, measure; "
        f"case = sophia.update('gpt2-41m', {str(device)!r}, tiny=True); "
        "print(measure.seconds(case.run, 'wall'))"
    )
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"TRITON_CACHE_DIR": folder}
        words = [sys.executable, "-c", program]
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        return f"exit code {done.returncode}: {done.stderr.strip()[-160:]}"
    return Value(float(done.stdout))


def _recompiles(optimizer):
    """Kernels that Triton compiles during steps with 100 values of lr, seen as new entries of a cache of its own."""
    group = optimizer.param_groups[0]
    former, cache = group["lr"], os.environ.get("TRITON_CACHE_DIR")
    optimizer.step()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        try:
            for i in range(100):
                group["lr"] = 1e-3 * (i + 1) / 100
                optimizer.step()
        finally:
            group["lr"] = former
            os.environ.pop("TRITON_CACHE_DIR")
            if cache is not None:
                os.environ["TRITON_CACHE_DIR"] = cache
        return Value(float(len(os.listdir(folder))))


def cpu_step(model="gpt2-41m", device="cpu", tiny=False, label=""):
    """The reference step on one CPU thread against the official sequence, to which it must be equal bit for bit."""
    ours, theirs, renew = _two_alike(model, device, tiny)

    def run():
        reference.sophia_step_(*ours.lists, eps=1e-15, **SCALARS)

    def official():
        for tensors in zip(*theirs.lists, strict=True):
            official_step(*tensors, **SCALARS)

    def rows(rounds):
        contenders = {"growkit": run, "official": official, "fused AdamW": attempt(lambda: _adamw(adamw).step)}
        pairs = paired(contenders, "cpu", rounds, before=lambda _: renew("g"))
        return {
            f"C1.{label}official": pairs.ratio("official", "growkit"),
            f"C1.{label}adamw": pairs.ratio("growkit", "fused AdamW"),
        }

    def check():
        renew("pgmh")
        run()
        official()
        _same_bits(ours, theirs, "sophia_step_ and the official step")
        check_update(ours, run)

    adamw = theirs.parameters()
    return Case(run, check, rows, bytes=ours.nbytes("pgmhpm"))


def cpu_step_compiled(model="gpt2-small", device="cpu", tiny=False):
    """The compiled step against the reference, whose bits it has, and fused AdamW: one thread, and two by the wall."""
    ours, theirs, renew = _two_alike(model, device, tiny)
    adamw = theirs.parameters()

    def run():
        ops.sophia_step_(*ours.lists, eps=1e-15, **SCALARS)

    def oracle():
        reference.sophia_step_(*theirs.lists, eps=1e-15, **SCALARS)

    def rows(rounds):
        names, threads = ("reference", "adamw", "adamw.2-threads"), torch.get_num_threads()
        if cpu.implementation("sophia_step_") is None:
            return {f"C1.compiled.{name}": "growkit._C is not built here" for name in names}
        contenders = {"growkit": run, "fused AdamW": attempt(lambda: _adamw(adamw).step)}
        try:
            torch.set_num_threads(1)
            one = paired(contenders | {"reference": oracle}, "cpu", rounds, before=lambda _: renew("g"))
            torch.set_num_threads(2)
            two = paired(contenders, "wall", rounds, before=lambda _: renew("g"))
        finally:
            torch.set_num_threads(threads)
        values = one.ratio("reference", "growkit"), *(pairs.ratio("growkit", "fused AdamW") for pairs in (one, two))
        return {f"C1.compiled.{name}": value for name, value in zip(names, values, strict=True)}

    def check():
        renew("pgmh")
        run()
        oracle()
        _same_bits(ours, theirs, "the compiled step and the reference")

    return Case(run, check, rows, bytes=ours.nbytes("pgmhpm"))


def _two_alike(model, device, tiny):
    """Two `Lists`, and a function that renews lists of both with the same values."""
    ours, theirs = (Lists(model, device, tiny) for _ in range(2))

    def renew(names):
        ours.renew(names)
        theirs.draws = ours.draws - len(names)
        theirs.renew(names)

    return ours, theirs, renew


def _same_bits(ours, theirs, what):
    for name in "pm":
        for i, (a, b) in enumerate(zip(getattr(ours, name), getattr(theirs, name), strict=True)):
            if not torch.equal(a, b):
                raise AssertionError(f"{what} differ in {name}[{i}]")


KEEP_PAGES = {
    "MALLOC_TOP_PAD_": "1000000000",
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "MALLOC_TRIM_THRESHOLD_": "4000000000",
}


def cpu_step_pages_kept(device="cpu", tiny=False):
    """`cpu_step` in a process whose malloc (glibc's) keeps freed pages: what is left when page faults are gone."""
    case = cpu_step(device=device, tiny=tiny)

    def rows(rounds):
        program = (
            "import json; from growkit.bench import sophia; import torch; torch.set_num_threads(1); "
            f"case = sophia.cpu_step(tiny={tiny}, label='pages-kept.'); case.check(); "
            f"print(json.dumps(case.rows({rounds})))"
        )
        words = [sys.executable, "-c", program]
        done = subprocess.run(words, env=os.environ | KEEP_PAGES, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr.strip()[-160:])
        return {id: Value(*fields) for id, fields in json.loads(done.stdout).items()}

    return case._replace(rows=rows)
