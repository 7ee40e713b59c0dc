"""What m and h lose in bfloat16 and in 8 bits, beside the same state in float32.

First, gradients drawn at random, of curvatures that spread over 1, 4 and 10 decades within every 256 elements: 1,000
steps and 100 refreshes. Then a small model under the official loop (official_loop.py): every kind of state
follows the gradients of the float32 run, which gives the errors, and then trains the model by itself, which gives the
loss.

    python benchmarks/state_dtypes.py [steps] [seeds]
"""

import sys

import torch
from official_loop import BS, EVERY, SOPHIA, sampled_loss, start

import growkit
from growkit import reference
from growkit.demo import runs

KINDS = {"float32": None, "bfloat16": torch.bfloat16, "8-bit": "8bit"}


def floats(optimizer, key):
    """m ("exp_avg") or h ("hessian") of all parameters as one float32 tensor."""
    values = []
    for state in optimizer.state.values():
        scale = state.get(key + "_scale")
        values.append(state[key] if scale is None else reference.dequantise(state[key], scale))
    return torch.cat([x.float().flatten() for x in values])


def percentiles(x, *fractions):
    x = x.sort().values
    return " | ".join(f"{x[min(int(len(x) * fraction), len(x) - 1)]:.4f}" for fraction in fractions)


def report(name, optimizers):
    """Relative errors of h and m where they are not 0, and the fraction of the signs of m that are the same."""
    m, h = (floats(optimizers["float32"], key) for key in ("exp_avg", "hessian"))
    known, moves = h != 0, m != 0
    for kind, optimizer in list(optimizers.items())[1:]:
        h_error = (floats(optimizer, "hessian") / h - 1)[known]
        m_k = floats(optimizer, "exp_avg")
        m_error = (m_k / m - 1).abs()[moves]
        print(
            f"{name} | {kind} | {percentiles(h_error.abs(), 0.5, 0.99)} | {h_error.mean():+.4f} "
            f"| {percentiles(m_error, 0.5, 0.9)} | {(m_k.sign() == m.sign())[moves].float().mean():.4f}",
            flush=True,
        )


def drawn(steps, decades):
    """Errors after `steps` steps with gradients of independent elements, a refresh every 10."""
    make = torch.Generator().manual_seed(0)
    curvature = 10 ** (-6 - decades * torch.rand(256, 256, generator=make))
    start = torch.zeros(256, 256)
    optimizers = {k: growkit.SophiaG([torch.nn.Parameter(start.clone())], state_dtype=d) for k, d in KINDS.items()}
    for step in range(steps):
        for refreshing in (False, True)[: 1 + (step % 10 == 9)]:
            g = curvature.sqrt() * torch.randn(256, 256, generator=make)
            for optimizer in optimizers.values():
                optimizer.param_groups[0]["params"][0].grad = g
                optimizer.update_hessian() if refreshing else optimizer.step(bs=1)
    report(f"drawn, {decades} decades", optimizers)


def trained(kind, followers, steps, seed):
    """Train by the official loop; optimizers of the kinds in `followers` see the same gradients on other parameters."""
    run, model, groups = start(seed)
    params = [p for group in groups for _, p in group["params"]]
    optimizers = {kind: growkit.SophiaG(groups, **SOPHIA, seed=seed, state_dtype=KINDS[kind])}
    for each in followers:
        copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
        optimizers[each] = growkit.SophiaG(copies, **SOPHIA, seed=seed, state_dtype=KINDS[each])

    def every(method, **options):
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        for optimizer in optimizers.values():
            own = [p for group in optimizer.param_groups for p in group["params"]]
            for p, q in zip(params, own, strict=True):
                q.grad = p.grad
            getattr(optimizer, method)(**options)
        for optimizer in optimizers.values():
            optimizer.zero_grad()

    generator = torch.Generator().manual_seed(seed)
    for step in range(1, steps + 1):
        model(**run.corpus.batch(seed, step)).loss.backward()
        every("step", bs=BS)
        if step % EVERY == 0:
            sampled_loss(model, run.corpus.batch(seed, steps + step), generator).backward()
            every("update_hessian")
    if followers:
        report(f"GPT-2, seed {seed}", optimizers)
    bytes_of_state = sum(t.nbytes for s in optimizers[kind].state.values() for k, t in s.items() if k != "step")
    return runs.bits_per_byte(model, run.corpus), bytes_of_state


def main(steps, seeds):
    print(
        "gradients | state | h: median error | 99th percentile | mean | m: median error | 99th percentile | signs kept"
    )
    for decades in (1, 4, 10):
        drawn(steps, decades)
    results = []
    for seed in range(seeds):
        for kind in KINDS:
            followers = [k for k in KINDS if k != kind] if kind == "float32" else []
            results.append((kind, seed, *trained(kind, followers, steps, seed)))
    print("\nstate | seed | bits per byte | bytes of state")
    for kind, seed, bits, size in results:
        print(f"{kind} | {seed} | {bits:.4f} | {size:,}")


if __name__ == "__main__":
    main(*[int(word) for word in sys.argv[1:3]] + [1000, 2][len(sys.argv[1:3]) :])
