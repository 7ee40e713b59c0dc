"""Shards, reductions, refusals and checkpoints of several processes, against one process."""

import functools
import warnings
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from growkit.bench import loops
from growkit.optim import SophiaG, SophiaH, distributed, processes, telemetry
from growkit.optim.processes import Processes

# --- what runs on the processes ---


def sharded(world, tensors, dim=0):
    """Copies of tensors as DTensors, cut along one dimension."""
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = dist.init_device_mesh("cpu", (world,))
    return [distribute_tensor(t, mesh, [Shard(dim)]) for t in tensors]


def drive(cls, dtype, options, shard=None):
    """Six steps with two refreshes by hand, from fixed gradients; `shard` makes DTensors of lists of tensors."""
    make = torch.Generator().manual_seed(1)
    shapes = ((5, 3), (2,), (4, 2, 3), (7,), *([(17, 256)] if options.get("state_dtype") == "8bit" else []))
    shard = shard or (lambda tensors: tensors)
    ps = [nn.Parameter(p) for p in shard([torch.randn(s, generator=make).to(dtype) for s in shapes])]
    optimizer = cls(ps, 1e-2, rho=30.0, **({"bs": 1} if cls is SophiaG else {}), **options)
    with mock.patch.object(telemetry, "SAMPLE", 1000):
        for step in range(6):
            for p, g in zip(ps, shard([torch.randn(s, generator=make).to(dtype) for s in shapes]), strict=True):
                p.grad = g
            optimizer.step()
            if step % 3 == 0:
                optimizer.update_hessian()
    values = [loops.whole(p) for p in ps]
    for p in ps:
        values += [
            loops.whole(optimizer.state[p][k]) for k in ("exp_avg", "hessian", "master") if k in optimizer.state[p]
        ]
    return values, optimizer.stats(), optimizer.metrics()


def driven(rank, world, cls, dtype, options):
    return drive(cls, dtype, options, functools.partial(sharded, world))


KINDS = {
    "float32": (torch.float32, {}),
    "bfloat16, rounded stochastically": (torch.bfloat16, {}),
    "bfloat16 with masters": (torch.bfloat16, {"bf16_update": "master"}),
    "bfloat16 state": (torch.float32, {"state_dtype": torch.bfloat16}),
    "8-bit state": (torch.float32, {"state_dtype": "8bit"}),
    "complex64": (torch.complex64, {}),
    "clipped": (torch.float32, {"clip_grad_norm": 0.1}),
}


def rows_cut_blocks(rank, world):
    """8-bit state whose blocks of 256 elements would not end where a row does."""
    whole = torch.ones(50, 100)
    p, g = (nn.Parameter(t) for t in sharded(world, [whole, whole]))
    p.grad = g.detach()
    return messages(SophiaG([p], 1e-2, state_dtype="8bit").step)[0]


def in_columns(rank, world, dtype):
    """A step on shards that are no run of the whole."""
    whole = torch.arange(12.0).view(2, 6).to(dtype)
    p, g = (nn.Parameter(t) for t in sharded(world, [whole, whole], dim=1))
    p.grad = g.detach()
    optimizer = SophiaG([p], 1e-2)
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error), torch.equal(loops.whole(p), whole), len(optimizer.state)
    return loops.whole(p)


def messages(*attempts):
    """The errors of calls, in words."""
    found = []
    for attempt in attempts:
        try:
            found.append(f"{attempt()}")
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


def refused(rank, world):
    """Ways of spreading a model that are not known here."""
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    def tensor_parallel():
        model = parallelize_module(
            loops.new_model(), dist.init_device_mesh("cpu", (world,)), {"head": ColwiseParallel()}
        )
        SophiaG(model.parameters()).attach(model)

    def flattened():
        model = FullyShardedDataParallel(loops.new_model(), device_id=torch.device("cpu"))
        SophiaG(model.parameters()).attach(model)

    def part_of_sharded():
        model = loops.new_model()
        fully_shard(model)
        SophiaG(model.parameters()).attach(model.blocks)

    def megatron():
        model = loops.new_model()
        model.head.tp_group = dist.group.WORLD
        alone = dist.new_group([rank], use_local_synchronization=True)
        SophiaG(model.parameters()).refresh(model, loops.batches(0, rank, world), process_group=alone)

    return messages(tensor_parallel, flattened, part_of_sharded, megatron)


def refreshed(model, optimizer, batch, **options):
    optimizer.refresh(model, [batch], **options)
    return [loops.whole(optimizer.state[p]["hessian"]) for p in model.parameters()]


def replicas_differ(rank, world):
    """Experts and stages of one's own, or nothing that ties the processes' models together."""
    model = loops.new_model()
    with torch.no_grad():
        model.head.weight += rank
    batch = loops.batches(0, rank, world)[0]
    fewer = nn.Linear(3, 4, bias=rank > 0).double()
    return messages(
        lambda: refreshed(model, SophiaG(model.parameters()), batch),
        lambda: SophiaG(fewer.parameters()).refresh(fewer, [torch.ones(2, 3, dtype=torch.float64)]),
    )


def one_process_fails(rank, world):
    """An error of process 1 alone stops all, changes nothing, and what follows is as if it had not been."""
    model = loops.new_model()
    optimizer = SophiaG(model.parameters(), **loops.SETTINGS[SophiaG])
    batch = loops.batches(0, rank, world)[0]
    wrong = {"mask": lambda args, kwargs: torch.ones(3, dtype=torch.bool)} if rank == 1 else {}
    error = messages(lambda: refreshed(model, optimizer, batch, **wrong))[0]
    return error, optimizer.stats()["refreshes"], refreshed(model, optimizer, batch)


def unequal_batches(rank, world):
    model = loops.new_model()
    optimizer = SophiaG(model.parameters())
    batches = loops.batches(0, rank, world)
    return messages(lambda: optimizer.refresh(model, batches[: 1 + (rank == 0)]))[0]


def two_batches(rank, world, cls):
    """refresh() on a list: labels of each batch are keyed by the rows of all processes' batches."""
    model = loops.fsdp2_model() if world > 1 else loops.new_model()
    optimizer = cls(model.parameters(), **loops.SETTINGS[cls])
    optimizer.refresh(model, loops.batches(0, rank, world))
    return loops.result(model, optimizer) | {"metrics": torch.tensor(optimizer.metrics()["refresh_grad_norm"])}


def overflowing(rank, world):
    """A GradScaler's step for gradients that overflow in one process's shard alone."""
    model = loops.fsdp2_model().float()
    optimizer = SophiaG(model.parameters(), lr=0.02)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(model(**loops.batches(0, rank, world)[0]).loss).backward()
    if rank == 1:
        model.head.weight.grad.to_local()[0, 0] = float("inf")
    before = loops.whole(model.head.weight)
    scaler.step(optimizer)
    scaler.update()
    return torch.equal(loops.whole(model.head.weight), before), optimizer.stats()["skipped_steps"], scaler.get_scale()


def in_backward(rank, world):
    """A step from a hook under DDP."""
    model = nn.Linear(3, 4)
    ddp = nn.parallel.DistributedDataParallel(model)
    optimizer = SophiaG([model.weight])
    before = model.weight.detach().clone()
    model.weight.register_post_accumulate_grad_hook(lambda p: optimizer.step())
    error = messages(lambda: ddp(torch.ones(2, 3)).sum().backward())[0]
    return error, torch.equal(model.weight, before)


def compiled_step(rank, world):
    """torch.compile(optimizer.step) on shards: the same steps, run eagerly."""
    model, optimizer = new_fsdp2(SophiaG)
    step = torch.compile(optimizer.step, backend="aot_eager")
    loops.train(model, step, rank=rank, world=world)
    return loops.result(model, optimizer)


def ddp():
    return nn.parallel.DistributedDataParallel(loops.new_model())


WRAPPED = {"plain": loops.new_model, "DDP": ddp, "FSDP2": loops.fsdp2_model}


class AllReduces(TorchDispatchMode):
    """Counts the all-reduces of torch.distributed, whoever calls them."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.c10d.allreduce_.default
        return func(*args, **(kwargs or {}))


def collectives(rank, world, wrapped):
    """{what: all-reduces that it takes}"""
    counts = {}
    model = WRAPPED[wrapped]()
    optimizer = SophiaG(model.parameters(), rho="auto")
    clipping = SophiaG(model.parameters(), clip_grad_norm=1.0)
    batch = loops.batches(0, rank, world)[0]
    optimizer.refresh(model, [batch])  # the first one compares the processes' parameters
    model(**batch).loss.backward()
    for name, call in (
        ("step", optimizer.step),
        ("step that clips", clipping.step),
        ("refresh", lambda: optimizer.refresh(model, [batch])),
    ):
        with AllReduces() as taken:
            call()
        counts[name] = taken.count
    return counts


def summed(rank, world):
    """(all-reduces, whether each tensor became its sum, or was overwritten by it) of buckets of 80 bytes."""
    make = torch.Generator().manual_seed(0)
    whole = torch.randn(6, 4, generator=make)
    tensors = [
        torch.randn(5, generator=make),  # 20 bytes
        torch.randn(3, generator=make, dtype=torch.float64),  # of another dtype: a bucket beside
        torch.randn(2, 3, 2, generator=make).transpose(0, 2),  # 48 bytes: fits
        torch.randn(30, generator=make),  # larger than a bucket: alone
        torch.randn((), generator=make).expand(4),  # no memory of its own for each element
        whole,
        whole[2:],  # as autograd gives to what was put together
        whole,  # as autograd gives to both terms of a sum
        torch.randn(0),
        torch.randn(2, generator=make, dtype=torch.complex64),
    ]
    expected = [t * world for t in tensors]
    both = Processes(SophiaG([nn.Parameter(torch.ones(1))]), None, nn.Module())
    found = list(tensors)
    with mock.patch.object(processes, "BUCKET", 80), AllReduces() as taken:
        both.sums_(found)
    same = all(torch.equal(t, e) and t.shape == e.shape for t, e in zip(found, expected, strict=True))
    return taken.count, same, [i for i, t in enumerate(found) if t is tensors[i]]


class Odd(nn.Module):
    """A sparse gradient, and two parameters that autograd gives one and the same."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(7, 5, sparse=True)
        self.a, self.b = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(5, 3))

    def forward(self, tokens):
        return self.embedding(tokens) @ (self.a + self.b)


def odd_gradients(rank, world, cls):
    """h of a refresh on this process's rows of 6."""
    model = Odd().double()
    told = {"loss": lambda z: z.pow(3).sum() * world} if cls is SophiaH else {"likelihood": "categorical"}
    tokens = torch.arange(6)[slice(0, 6) if world == 1 else slice(2, 6) if rank else slice(0, 2)]
    return refreshed(model, cls(model.parameters()), tokens, **told)


def only_devices(rank, world):
    """What a group exchanges whose backend takes no tensors of the host, as NCCL."""
    model = nn.Linear(3, 4)
    group = dist.new_group(backend="cuda:gloo")
    return Processes(SophiaG(model.parameters()), None, model, group).rows(5 + rank, 1)


def told(rank, world, wrapped):
    """(metrics, rho) after three refreshes, of few elements of all."""
    model = WRAPPED[wrapped]()
    optimizer = SophiaG(model.parameters(), lr=0.02, rho="auto", bs=1)
    optimizer.attach(model, every=loops.EVERY)
    with mock.patch.object(telemetry, "SAMPLE", 100):
        loops.train(model, optimizer.step, rank=rank, world=world)
    return optimizer.metrics(), float(optimizer.param_groups[0]["rho"])


def independent(rank, world, cls):
    """A model of its own on each process, trained as on one process."""
    alone = dist.new_group([rank], use_local_synchronization=True)
    model = loops.new_model()
    optimizer = cls(model.parameters(), **loops.SETTINGS[cls])
    optimizer.attach(model, every=loops.EVERY, process_group=alone)
    if rank == 0:
        loops.train(model, optimizer.step)
    else:  # the other one's calls are not waited for
        optimizer.refresh(model, loops.batches(0, 0, 1))
    return loops.result(model, optimizer)


def wrong_groups(rank, world):
    alone = dist.new_group([rank], use_local_synchronization=True)
    other = dist.new_group([0])  # which the second process is not in
    models = [WRAPPED[each]() for each in ("DDP", "FSDP2")]
    plain = loops.new_model()
    return messages(
        *(lambda model=model: SophiaG(model.parameters()).attach(model, process_group=alone) for model in models),
        lambda: SophiaG(plain.parameters()).attach(plain, process_group=other),
        lambda: SophiaG(plain.parameters()).refresh(plain, [1], process_group="gloo"),
    )


def warned(rank, world):
    """(messages of a refresh that is skipped on process 1 alone, stats)."""
    model = nn.Linear(3, 4)
    ddp = nn.parallel.DistributedDataParallel(model)
    optimizer = SophiaG(ddp.parameters())
    x = torch.full((2, 3), float("nan") if rank == 1 else 1.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            optimizer.refresh(ddp, [x], likelihood="categorical")
    return [str(w.message) for w in caught if "skipped a curvature" in str(w.message)], optimizer.stats()


def new_fsdp2(cls):
    model = loops.fsdp2_model()
    optimizer = cls(model.parameters(), **loops.SETTINGS[cls])
    optimizer.attach(model, every=loops.EVERY)
    return model, optimizer


HALF = range(3), range(3, loops.STEPS)


def saved(rank, world, folder, cls):
    """An uninterrupted run that saves half-way, in shards and as whole tensors."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    model, optimizer = new_fsdp2(cls)
    loops.train(model, optimizer.step, steps=HALF[0], rank=rank, world=world)
    names = "model", "optimizer"
    dcp.save(dict(zip(names, get_state_dict(model, optimizer), strict=True)), checkpoint_id=f"{folder}/{cls.__name__}")
    whole = get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        torch.save(dict(zip(names, whole, strict=True)), f"{folder}/{cls.__name__}.pt")
    loops.train(model, optimizer.step, steps=HALF[1], rank=rank, world=world)
    return loops.result(model, optimizer)


def resumed(rank, world, folder, cls):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model, optimizer = new_fsdp2(cls)
    own, state = get_state_dict(model, optimizer)  # takes a step with gradients of 0, which is none of the schedule
    dcp.load({"model": own, "optimizer": state}, checkpoint_id=f"{folder}/{cls.__name__}")
    set_state_dict(model, optimizer, model_state_dict=own, optim_state_dict=state)
    loops.train(model, optimizer.step, steps=HALF[1], rank=rank, world=world)
    return loops.result(model, optimizer)


def loaded_whole(rank, world, folder, cls):
    """The files of one process, loaded by load_state_dict() into shards."""
    model, optimizer = new_fsdp2(cls)
    state = torch.load(f"{folder}/float.pt", weights_only=True)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(distributed.shard_of(state["model"][name], p))
    optimizer.load_state_dict(state["optimizer"])
    loops.train(model, optimizer.step, steps=HALF[1], rank=rank, world=world)
    return loops.result(model, optimizer)


def eight_bits(rank, world, folder, steps, to=None, of=None):
    """Steps with 8-bit state, gone on with from checkpoint `of`, saved to `to`; one of whole tensors ends in .pt."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_tensor

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 17), nn.Linear(17, 5))
    if world > 1:
        fully_shard(model, mesh=dist.init_device_mesh("cpu", (world,)))
    optimizer = SophiaG(model.parameters(), 1e-2, state_dtype="8bit")
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    if of is not None:
        if of.endswith(".pt"):
            state, options = torch.load(f"{folder}/{of}", weights_only=True), whole
        else:
            state, options = get_state_dict(model, optimizer), StateDictOptions()
            dcp.load(dict(enumerate(state)), checkpoint_id=f"{folder}/{of}")
        own, states = state
        set_state_dict(model, optimizer, model_state_dict=own, optim_state_dict=states, options=options)
    for step in steps:
        make = torch.Generator().manual_seed(step)
        for p in model.parameters():
            g = torch.randn(p.shape, generator=make)
            p.grad = distribute_tensor(g, p.device_mesh, p.placements) if world > 1 else g
        optimizer.step()
        if step % 2 == 0:
            optimizer.update_hessian()
    if to is not None:
        dcp.save(dict(enumerate(get_state_dict(model, optimizer))), checkpoint_id=f"{folder}/{to}")
        state = get_state_dict(model, optimizer, options=whole)
        if rank == 0:
            torch.save(state, f"{folder}/{to}.pt")
    return [loops.whole(p) for p in model.parameters()]


# By how many processes, what saved state is gone on with: of 2 processes ("shards"), or of one.
EIGHT = {1: ["shards", "shards.pt", "plain"], 2: ["shards", "plain", "plain.pt"], 3: ["shards", "plain"]}


def zero_resumed(rank, world, cls):
    """ZeroRedundancyOptimizer, consolidated and loaded half-way."""
    ddp, zero = loops.new_zero(cls)
    loops.train(ddp, zero.step, steps=HALF[0], rank=rank, world=world)
    zero.consolidate_state_dict(0)
    box = [zero.state_dict() if rank == 0 else None]
    dist.broadcast_object_list(box)
    again, resumed = loops.new_zero(cls)
    again.load_state_dict(ddp.state_dict())
    resumed.load_state_dict(box[0])
    loops.train(again, resumed.step, steps=HALF[1], rank=rank, world=world)
    return loops.parts(again, resumed.optim, world)


def zero_rounds(rank, world):
    """Parameters in bfloat16 and two groups, clipped, whose bits are drawn by their place among all parameters."""
    return zero_in_bfloat16(world)


def zero_in_bfloat16(world=1):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    make = torch.Generator().manual_seed(1)
    ps = [nn.Parameter(torch.randn(n, generator=make).bfloat16()) for n in (300, 200, 5, 400)]
    groups = [{"params": ps[:2], "weight_decay": 0.5}, {"params": ps[2:]}]
    options = {"lr": 1e-2, "clip_grad_norm": 0.1}
    optimizer = ZeroRedundancyOptimizer(groups, SophiaG, **options) if world > 1 else SophiaG(groups, **options)
    for _ in range(4):
        for p in ps:
            p.grad = torch.randn(p.shape, generator=make).bfloat16()
        optimizer.step()
    return [p.detach() for p in ps]


JOBS = {
    2: [
        *(("driven", cls, *kind) for cls in (SophiaG, SophiaH) for kind in KINDS.values()),
        *(("in_columns", dtype) for dtype in (torch.float32, torch.bfloat16)),
        ("refused",), ("replicas_differ",), ("one_process_fails",), ("unequal_batches",), ("warned",),
        ("collectives", "FSDP2"), ("collectives", "DDP"), ("summed",), ("only_devices",),
        ("odd_gradients", SophiaG), ("odd_gradients", SophiaH), ("overflowing",),
        ("told", "FSDP2"), ("told", "DDP"), ("independent", SophiaG), ("independent", SophiaH),
        ("wrong_groups",),
        ("rows_cut_blocks",), ("zero_rounds",),
        *((job, cls) for cls in (SophiaG, SophiaH) for job in ("two_batches", "saved", "resumed")),
        ("zero_resumed", SophiaG), ("loaded_whole", SophiaG),
        ("eight_bits", HALF[0], "shards"), *(("eight_bits", HALF[1], None, of) for of in EIGHT[2]),
        ("compiled_step",),  # after ZeRO: torch 2.10 cannot import that once it has compiled something
        ("in_backward",),  # last: it leaves DDP in the middle of a backward
    ],
    3: [
        ("told", "FSDP2"),
        *(("driven", SophiaG, *KINDS[kind]) for kind in ("bfloat16, rounded stochastically", "8-bit state")),
        ("two_batches", SophiaG), ("resumed", SophiaG), ("resumed", SophiaH),
        *(("eight_bits", HALF[1], None, of) for of in EIGHT[3]),
    ],
}  # fmt: skip


# --- what they must give ---


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """result(world, *job): what the processes returned, in the order of ranks; an error of theirs is raised here."""
    folder = str(tmp_path_factory.mktemp("checkpoints"))
    model = loops.new_model()
    optimizer = SophiaG(model.parameters(), **loops.SETTINGS[SophiaG])
    optimizer.attach(model, every=loops.EVERY)
    loops.train(model, optimizer.step, steps=HALF[0])
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, f"{folder}/float.pt")
    eight_bits(0, 1, folder, HALF[0], "plain")

    @functools.cache
    def found(world):
        if world == 3:
            found(2)  # saves what 3 processes go on from
        filed = "saved", "resumed", "loaded_whole", "eight_bits"
        jobs = [(__file__, job[0], *([folder] if job[0] in filed else []), *job[1:]) for job in JOBS[world]]
        return loops.spawn(jobs, world)

    def of(world, *job):
        results = found(world)[JOBS[world].index(job)]
        for each in results:
            if isinstance(each, Exception):
                raise each
        return results

    return of


DRIVEN = [
    pytest.param(world, cls, kind, id=f"{cls.__name__}-{kind}-{world}")
    for world in JOBS
    for cls in (SophiaG, SophiaH)
    for kind in KINDS
    if ("driven", cls, *KINDS[kind]) in JOBS[world]
]


@pytest.mark.parametrize("world, cls, kind", DRIVEN)
def test_a_shard_gets_the_bits_of_the_whole(world, cls, kind, result):
    dtype, options = KINDS[kind]
    expected, stats, metrics = drive(cls, dtype, options)
    for values, own, seen in result(world, "driven", cls, dtype, options):
        assert len(values) == len(expected)
        for value, e in zip(values, expected, strict=True):
            if kind == "clipped":  # by a norm that is summed in another order
                torch.testing.assert_close(value, e, rtol=1e-6, atol=1e-8)
            else:
                assert torch.equal(value, e)
        assert own == stats
        assert seen == pytest.approx(metrics, rel=1e-6)


def test_shards_that_are_no_run_are_right_or_refused_before_anything_moves(result):
    whole = torch.arange(12.0).view(2, 6)
    plain = nn.Parameter(whole.clone())
    plain.grad = whole.clone()
    SophiaG([plain], 1e-2).step()
    assert all(torch.equal(p, plain) for p in result(2, "in_columns", torch.float32))
    for message, unchanged, states in result(2, "in_columns", torch.bfloat16):
        assert "parameter 0 is a DTensor (Shard(dim=1),)" in message and "expected Shard(0)" in message
        assert unchanged and states == 0


def test_what_cannot_be_seen_is_refused_by_name(result):
    for tensor_parallel, flattened, part, megatron in result(2, "refused"):
        assert "parameter head.weight is a DTensor (Shard(dim=0),)" in tensor_parallel
        assert "parallelize_module" in tensor_parallel
        assert "FSDP1 (FullyShardedDataParallel)" in flattened and "fully_shard" in flattened
        assert "attach to the module that was given to fully_shard" in part
        assert "head, a Linear, is spread over its tp_group of 2 processes" in megatron


def test_models_that_are_no_copies_of_one_are_refused(result):
    for values, numbers in result(2, "replicas_differ"):
        assert "not the same on all processes" in values and "[" in values
        assert "parameters here, but" in numbers


def test_an_error_in_one_process_stops_all_and_changes_nothing(result):
    model = loops.new_model()
    optimizer = SophiaG(model.parameters(), **loops.SETTINGS[SophiaG])
    expected = refreshed(model, optimizer, loops.batches(0, 0, 1)[0])
    messages = []
    for message, refreshes, h in result(2, "one_process_fails"):
        messages.append(message)
        assert refreshes == 0
        for value, e in zip(h, expected, strict=True):
            torch.testing.assert_close(value, e, rtol=1e-10, atol=0)
    assert "process 1 raised an error" in messages[0]
    assert "the mask of labels has shape (3,)" in messages[1]


def test_unequal_numbers_of_batches_are_an_error_everywhere(result):
    for message in result(2, "unequal_batches"):
        assert "processes have [2, 1] batches left" in message


@pytest.mark.parametrize("world, cls", [(2, SophiaG), (2, SophiaH), (3, SophiaG)])
def test_a_refresh_on_several_batches_is_that_of_one_process(world, cls, result):
    expected = two_batches(0, 1, cls)
    for each in result(world, "two_batches", cls):
        assert loops.difference(each, expected) < loops.TOLERANCE


def test_a_step_waits_for_nobody_and_a_refresh_takes_two_reductions_beside_its_gradients(result):
    for counts in result(2, "collectives", "FSDP2"):
        assert counts == {"step": 0, "step that clips": 1, "refresh": 2}
    for counts in result(2, "collectives", "DDP"):
        assert counts == {"step": 0, "step that clips": 0, "refresh": 1 + 2}


def test_gradients_are_summed_in_buckets_of_a_dtype(result):
    # [0, 2], [1], [3], [4, 6, 8], [5], [7], [9]; others read the memory of 5 and 7
    for count, same, overwritten in result(2, "summed"):
        assert same and count == 7 and overwritten == [1, 3, 9]


@pytest.mark.parametrize("cls", [SophiaG, SophiaH])
def test_sparse_gradients_and_one_that_two_parameters_have_are_summed(cls, result):
    expected = odd_gradients(0, 1, cls)
    for h in result(2, "odd_gradients", cls):
        for value, e in zip(h, expected, strict=True):
            torch.testing.assert_close(value, e, rtol=1e-10, atol=0)


def test_rows_are_exchanged_by_the_hosts(result):
    assert result(2, "only_devices") == [(0, 11), (5, 11)]


@pytest.mark.parametrize("world, wrapped", [(2, "FSDP2"), (3, "FSDP2"), (2, "DDP")])
def test_metrics_and_rho_speak_for_all_processes(world, wrapped, result):
    metrics, rho = told(0, 1, "plain")
    assert metrics.keys() >= {"update_grad_cosine", "unclipped", "refresh_grad_norm", *telemetry.QUANTILES}
    for seen, own in result(world, "told", wrapped):
        assert seen == pytest.approx(metrics, rel=1e-6) and own == pytest.approx(rho, rel=1e-6)
    assert rho != 0.04


@pytest.mark.parametrize("cls", [SophiaG, SophiaH])
def test_independent_models_each_have_a_process_group_of_their_own(cls, result):
    trained, refreshed = result(2, "independent", cls)
    assert loops.difference(trained, loops.plain(cls)) == 0
    model = loops.new_model()
    optimizer = cls(model.parameters(), **loops.SETTINGS[cls])
    optimizer.refresh(model, loops.batches(0, 0, 1))
    assert loops.difference(refreshed, loops.result(model, optimizer)) == 0


def test_a_process_group_beside_that_of_a_wrapper_is_refused(result):
    for rank, (of_ddp, of_fsdp, outside, text) in enumerate(result(2, "wrong_groups")):
        assert "process_group is given for a model that DDP or fully_shard spreads" in of_ddp and of_ddp == of_fsdp
        expected = "expected a torch.distributed.ProcessGroup with this process"
        assert rank == 0 or expected in outside
        assert "process_group is str" in text and expected in text


def test_a_refresh_is_skipped_by_all_and_told_by_one(result):
    (told, stats), (silent, other) = result(2, "warned")
    assert len(told) == 1 and not silent
    assert stats == other and stats["skipped"] == 2


def test_a_step_that_overflows_in_one_shard_is_skipped_by_all(result):
    assert result(2, "overflowing") == [(True, 1, 512.0)] * 2


def test_a_step_within_the_backward_is_refused_under_ddp(result):
    for error, unchanged in result(2, "in_backward"):
        assert "DDP reduces gradients after the hooks" in error and unchanged


def test_an_optimizer_for_each_parameter_may_step_within_the_backward():
    """On one process: every third backward is one of curvature, in which the hooks fold instead of stepping."""

    def gradients(model, step):
        torch.manual_seed(step)
        return (model(torch.randn(4, 3)) * torch.randn(4, 2)).sum()

    def train(hooked):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
        each = {p: SophiaG([p], 1e-2, rho=1.0) for p in model.parameters()} if hooked else {}
        optimizer = SophiaG(model.parameters(), 1e-2, rho=1.0)
        for step in range(6):
            what = "update_hessian" if step % 3 == 0 else "step"

            def hook(p, what=what):
                getattr(each[p], what)()
                p.grad = None

            hooks = [p.register_post_accumulate_grad_hook(hook) for p in each]
            gradients(model, step).backward()
            for handle in hooks:
                handle.remove()
            if not hooked:
                getattr(optimizer, what)()
                optimizer.zero_grad()
        return [p.detach() for p in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(train(True), train(False), strict=True))


def test_an_attached_optimizer_refuses_to_step_within_the_backward():
    model = nn.Linear(3, 4)
    optimizer = SophiaG(model.parameters())
    optimizer.attach(model)
    model.weight.register_post_accumulate_grad_hook(lambda p: optimizer.step())
    with pytest.raises(RuntimeError, match="within the backward of an attached model"):
        nn.functional.cross_entropy(model(torch.ones(2, 3)), torch.tensor([0, 1])).backward()


def test_a_compiled_step_on_shards_is_the_step(result):
    for run in result(2, "compiled_step"):
        assert loops.difference(run, loops.plain(SophiaG)) < loops.TOLERANCE


def test_8bit_blocks_that_shards_would_cut_are_refused(result):
    for message in result(2, "rows_cut_blocks"):
        assert "a parameter of shape (50, 100) is sharded" in message and "multiple of 256" in message


def test_a_part_of_a_zero_optimizer_draws_and_clips_as_the_whole(result):
    expected = zero_in_bfloat16()
    for ps in result(2, "zero_rounds"):
        assert all(torch.equal(p, e) for p, e in zip(ps, expected, strict=True))


@pytest.mark.parametrize("cls", [SophiaG, SophiaH])
def test_a_run_resumed_from_a_distributed_checkpoint_is_the_uninterrupted_one(cls, result):
    uninterrupted = result(2, "saved", cls)
    for run, own in zip(result(2, "resumed", cls), uninterrupted, strict=True):
        assert run.keys() == own.keys() and all(torch.equal(run[k], own[k]) for k in own)
    for run in result(3, "resumed", cls):
        assert loops.difference(run, loops.plain(cls)) < loops.TOLERANCE


@pytest.mark.parametrize("job", ["zero_resumed", "loaded_whole"])
def test_whole_files_go_into_parts_and_shards(job, result):
    for run in result(2, job, SophiaG):
        assert loops.difference(run, loops.plain(SophiaG)) < loops.TOLERANCE


def test_a_whole_file_of_shards_goes_on_in_one_process(result, tmp_path_factory):
    from torch.distributed.checkpoint.state_dict import set_state_dict

    result(2, "saved", SophiaG)
    file = next(tmp_path_factory.getbasetemp().glob("checkpoints*/SophiaG.pt"))
    state = torch.load(file, weights_only=True)
    model = loops.new_model()
    optimizer = SophiaG(model.parameters(), **loops.SETTINGS[SophiaG])
    optimizer.attach(model, every=loops.EVERY)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    loops.train(model, optimizer.step, steps=HALF[1])
    assert loops.difference(loops.result(model, optimizer), loops.plain(SophiaG)) < loops.TOLERANCE


@pytest.mark.parametrize("world, of", [(world, of) for world in EIGHT for of in EIGHT[world]])
def test_8bit_state_goes_bit_for_bit_between_shards_and_plain_tensors(world, of, result, tmp_path_factory):
    result(2, "eight_bits", HALF[0], "shards")
    folder = next(tmp_path_factory.getbasetemp().glob("checkpoints*"))
    expected = eight_bits(0, 1, folder, range(loops.STEPS))
    job = HALF[1], None, of
    for run in [eight_bits(0, 1, folder, *job)] if world == 1 else result(world, "eight_bits", *job):
        assert all(map(torch.equal, run, expected))
