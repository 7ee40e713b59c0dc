"""The optimizers on Sophia's kernels: on a GPU where there is one, else in Triton's interpreter.

What only a GPU can show of a step: graphs, streams, launches, allocations, and that the host never waits.
"""

import pytest
import torch

pytest.importorskip("triton")

from growkit import SophiaG, SophiaH, ops, reference
from growkit.kernels import probe, sophia

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def model_and_batches(seed=0):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Embedding(11, 24), torch.nn.Linear(24, 11)).to(DEVICE)
    return model, [torch.randint(11, (4, 6), device=DEVICE) for _ in range(12)]


@pytest.mark.parametrize("cls", [SophiaG, SophiaH])
@pytest.mark.parametrize("options", [{}, {"clip_grad_norm": 0.5, "nesterov": True}, {"state_dtype": BF16}], ids=str)
def test_training_on_the_kernels_is_training_on_the_reference(cls, options, monkeypatch):
    """attach(), refreshes, clipping and all: once through the kernels, whatever the device, once through the oracle."""
    runs = []
    for module in ((sophia, probe), (reference, reference)):
        for name in ("sophia_step_", "gnb_ema_", "hutchinson_ema_", "squared_norm"):
            monkeypatch.setattr(ops, name, getattr(module[0], name))
        monkeypatch.setattr(ops, "rademacher_", module[1].rademacher_)
        model, batches = model_and_batches()
        optimizer = cls(model.parameters(), 1e-2, rho=0.05, **options)
        loss = (lambda z: z.flatten(0, 1).square().mean()) if cls is SophiaH else None
        optimizer.attach(model, every=3, **({"loss": loss} if loss else {}))
        for batch in batches:
            z = model(batch)
            (loss(z) if loss else torch.nn.functional.cross_entropy(z.flatten(0, 1), batch.flatten())).backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append((list(model.parameters()), optimizer.stats()))
    (ours, stats), (theirs, expected) = runs
    for p, q in zip(ours, theirs, strict=True):
        # The interpreter truncates a bfloat16 m, up to a whole step of the format each time.
        torch.testing.assert_close(p, q, rtol=0, atol=2e-2 if "state_dtype" in options else 1e-5)
    assert stats["refreshes"] == expected["refreshes"] == 4 and stats["unclipped"] == pytest.approx(
        expected["unclipped"], abs=0.05
    )


# --- what only a GPU can show ---


def cuda_parameters(*shapes, dtype=F32):
    make = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(s, generator=make).to("cuda", dtype)) for s in shapes]


def fill(ps, seed):
    """Gradients of their own memory, at the same addresses from call to call."""
    make = torch.Generator().manual_seed(seed)
    for p in ps:
        g = (torch.randn(p.shape, generator=make) * 1e-2).to("cuda", p.dtype)
        p.grad = g if p.grad is None else p.grad.copy_(g)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"clip_grad_norm": 0.05, "nesterov": True}], ids=str)
def test_a_cuda_graph_replays_with_the_lr_of_the_moment(options):
    def make():
        ps = [*cuda_parameters((70, 50), (5000,)), *cuda_parameters((64, 64), dtype=BF16)]
        return ps, SophiaG(ps, torch.tensor(1e-2, device="cuda"), capturable=True, bs=64, **options)

    (eager, a), (replayed, b) = make(), make()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # warm up, as torch.cuda.graph asks
        fill(replayed, 0)
        b.step()
    torch.cuda.current_stream().wait_stream(side)
    fill(eager, 0)
    a.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        b.step()
    for i in range(1, 20):
        for ps, optimizer in ((eager, a), (replayed, b)):
            optimizer.param_groups[0]["lr"].fill_(1e-2 / i)
            fill(ps, i)
        a.step()
        graph.replay()
        if i % 5 == 0:  # outside of the graph, which reads the new h
            fill(eager, 100 + i), fill(replayed, 100 + i)
            a.update_hessian(), b.update_hessian()
    assert all(map(torch.equal, eager, replayed))
    assert b.state[replayed[0]]["step"] == 20
    fill(replayed, 50), fill(eager, 50)
    a.step(), b.step()  # an eager step after replays finds its own addresses
    assert all(map(torch.equal, eager, replayed))


@pytest.mark.gpu
def test_what_a_cuda_graph_cannot_hold_is_refused():
    model, batches = model_and_batches()
    optimizer = SophiaG(model.parameters(), 1e-3, capturable=True)
    optimizer.attach(model)
    torch.nn.functional.cross_entropy(model(batches[0]).flatten(0, 1), batches[0].flatten()).backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="refresh"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()
    fresh = cuda_parameters((5, 7))
    fill(fresh, 0)
    with pytest.raises(RuntimeError, match="capturable"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        SophiaG(fresh, 1e-3).step()


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"clip_grad_norm": 0.05}, {"bf16_update": "master"}], ids=str)
def test_steps_and_refreshes_never_wait_for_the_device(options):
    ps = [*cuda_parameters((70, 50), (5000,)), *cuda_parameters((64, 64), dtype=BF16)]
    optimizer = SophiaG(ps, 1e-2, **options)
    gradients = [[torch.randn_like(p) for p in ps] for _ in range(12)]
    torch.cuda.synchronize()
    for i, grads in enumerate(gradients):
        if i == 2:
            torch.cuda.set_sync_debug_mode("error")
        try:
            for p, g in zip(ps, grads, strict=True):
                p.grad = g
            optimizer.step()
            if i % 3 == 0:
                optimizer.update_hessian()
        finally:
            if i == len(gradients) - 1:
                torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_step_allocates_nothing():
    ps = cuda_parameters((700, 500), (5000,), ())
    optimizer = SophiaG(ps, 1e-2)
    for i in range(3):
        fill(ps, i)
        optimizer.step()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    optimizer.step()
    assert torch.cuda.max_memory_allocated() == before


@pytest.mark.gpu
def test_a_step_is_one_launch():
    ps = cuda_parameters(*[(50, 30)] * 200)
    optimizer = SophiaG(ps, 1e-2)
    for i in range(3):
        fill(ps, i)
        optimizer.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        optimizer.step()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    if not names:
        pytest.skip("the profiler reports nothing of the device on this machine")
    assert [n for n in names if not n.startswith(("Memcpy", "Memset", "Optimizer"))] == ["_sophia_step"]


@pytest.mark.gpu
def test_steps_on_two_streams_at_once_do_not_share_addresses():
    runs = []
    for concurrent in (False, True):
        own = [cuda_parameters((300, 300), (77,)) for _ in range(2)]
        optimizers = [SophiaG(ps, 1e-2) for ps in own]
        streams = [torch.cuda.Stream() if concurrent else torch.cuda.current_stream() for _ in own]
        for i in range(30):
            for k, (ps, optimizer, stream) in enumerate(zip(own, optimizers, streams, strict=True)):
                with torch.cuda.stream(stream):
                    make = torch.Generator("cuda").manual_seed(100 * k + i)
                    for p in ps:
                        p.grad = torch.randn(p.shape, device="cuda", generator=make)
                    optimizer.step()
        torch.cuda.synchronize()
        runs.append([p for ps in own for p in ps])
    assert all(map(torch.equal, *runs))


@pytest.mark.gpu
@pytest.mark.parametrize("capturable", [False, True])
def test_one_compiled_graph_serves_a_whole_schedule_on_cuda(capturable):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    eager, compiled = ([*cuda_parameters((70, 50)), *cuda_parameters((64,), dtype=BF16)] for _ in range(2))
    where = "cuda" if capturable else "cpu"
    a, b = (SophiaG(ps, torch.tensor(1e-2, device=where), capturable=capturable) for ps in (eager, compiled))
    graphs = CompileCounterWithBackend("inductor")
    step = torch.compile(b.step, backend=graphs)
    for i in range(100):
        fill(eager, i), fill(compiled, i)
        for optimizer in (a, b):
            optimizer.param_groups[0]["lr"].fill_(1e-2 / (i + 1))
        a.step(), (step if i else b.step)()
    ours = [g for g in graphs.graphs if any("growkit" in str(node.target) for node in g.graph.nodes)]
    assert len(ours) == 1
    for p, q in zip(eager, compiled, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@pytest.mark.gpu
def test_grad_scaler_on_cuda_with_float16_parameters():
    ps = cuda_parameters((70, 50), (77,), dtype=FP16)
    optimizer = SophiaG(ps, 1e-2, fused=True)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    scaler.scale(torch.ones((), device="cuda"))
    fill(ps, 0)
    scaler.step(optimizer)
    scaler.update()
    before = [p.clone() for p in ps]
    ps[0].grad[0, 0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    assert all(map(torch.equal, before, ps)) and scaler.get_scale() == 512
    assert optimizer.stats()["skipped_steps"] == 1
