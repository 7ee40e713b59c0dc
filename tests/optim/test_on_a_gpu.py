"""Several processes and mixed precision on one GPU: the loops of growkit.bench.loops in float32, so on the kernels."""

import functools

import pytest
import torch
import torch.distributed as dist

from growkit import SophiaG, SophiaH
from growkit.bench import loops

pytestmark = pytest.mark.gpu
CASES = [("ddp", 2), ("fsdp2", 1)]  # NCCL takes no two processes on one GPU, and gloo no scattered sums on any


@pytest.fixture(scope="module")
def results():
    """{(loop, class): what each process found}, the processes started once for each number of them."""
    found = {}
    for world in {world for _, world in CASES}:
        keys = [(name, cls) for name, n in CASES if n == world for cls in (SophiaG, SophiaH)]
        jobs = [(__file__, "run", name, cls) for name, cls in keys]
        found |= zip(keys, loops.spawn(jobs, world), strict=True)
    return found


def run(rank, world, name, cls):
    model = loops.new_model().float().cuda()
    if name == "ddp":
        model = torch.nn.parallel.DistributedDataParallel(model)
    elif name == "fsdp2":
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.fsdp import fully_shard

        mesh = DeviceMesh.from_group(dist.new_group(backend="nccl"), "cuda")
        for module in (*model.blocks, model):
            fully_shard(module, mesh=mesh)
    optimizer = cls(model.parameters(), **loops.SETTINGS[cls])
    optimizer.attach(model, every=loops.EVERY)
    for step in range(loops.STEPS):
        for batch in loops.batches(step, rank, world):
            model(**{k: v.cuda() if torch.is_tensor(v) else v for k, v in batch.items()}).loss.backward()
        optimizer.step()
        model.zero_grad()
    return {key: t.cpu() for key, t in loops.result(model, optimizer).items()}


@functools.cache
def plain(cls):
    return run(0, 1, "plain", cls)


@pytest.mark.parametrize("cls", [SophiaG, SophiaH])
@pytest.mark.parametrize(("name", "world"), CASES)
def test_loops_of_several_processes_are_the_plain_one(name, world, cls, results):
    for found in results[name, cls]:
        assert loops.difference(found, plain(cls)) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_mixed_precision_learns(dtype):
    torch.manual_seed(0)
    parts = torch.nn.Embedding(32, 64), torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 32)
    model = torch.nn.Sequential(*parts)
    model, scaler = model.cuda(), torch.amp.GradScaler(enabled=dtype == torch.float16)
    optimizer = SophiaG(model.parameters(), 1e-2, betas=(0.9, 0.99), rho=0.05)
    optimizer.attach(model, every=5)
    losses = []
    for _ in range(40):
        x = torch.randint(32, (256,), device="cuda")
        with torch.autocast("cuda", dtype):
            loss = torch.nn.functional.cross_entropy(model(x), (3 * x + 1) % 32)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4 and optimizer.stats()["refreshes"] == 8


def _trained(graphed, cls=SophiaG):
    """Weights after 8 steps, refreshes at each second, of a model whose calls `graphed` makes CUDA graphs of."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.GELU(), torch.nn.Linear(64, 8)).cuda()
    optimizer = cls(model.parameters(), 1e-2, betas=(0.9, 0.99), rho=0.05)
    if graphed == "make_graphed_callables":
        torch.cuda.make_graphed_callables(model, (torch.randn(32, 16, device="cuda"),))
    elif graphed == "compile":
        model.compile(mode="reduce-overhead")
    optimizer.attach(model, every=2)
    for step in range(8):
        x = torch.randn(32, 16, generator=torch.Generator().manual_seed(step)).cuda()
        torch.nn.functional.cross_entropy(model(x), x[:, :8].argmax(1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("graphed", ["make_graphed_callables", "compile"])
def test_a_refresh_leaves_the_gradients_of_cuda_graphs(graphed):
    torch.testing.assert_close(_trained(graphed), _trained(None), rtol=1e-4, atol=1e-5)
