"""Does a loop train the same model? Every loop on one task in float64, against the plain loop on one process.

    python -m growkit.bench.loops                                  print the table
    python -m growkit.bench.loops --write docs/integrations.md     and write the page that holds it

A loop is a function of the rank, the number of processes and the optimizer's class, which trains `Model` on the task
below and returns `result(...)`. Adding one is adding a function under `@loop`: the table, the page and
tests/optim/test_loops.py find it there.
"""

import argparse
import contextlib
import datetime
import functools
import importlib.util
import inspect
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from growkit.optim import SophiaG, SophiaH

# The task: STEPS optimizer steps on MICRO micro-batches each of ROWS sequences, refreshes after steps 1, 1+EVERY, ...
STEPS, EVERY, MICRO, ROWS, LENGTH, VOCABULARY = 5, 2, 2, 6, 4, 11
SHARES = {1: [6], 2: [4, 2], 3: [3, 1, 2], 4: [2, 1, 2, 1]}  # sequences of each process, unequal on purpose
SETTINGS = {SophiaG: {"lr": 0.02, "rho": 5.0, "bs": 1}, SophiaH: {"lr": 0.02, "rho": 2.0}}
TOLERANCE = 1e-10  # of parameters and h, in float64: only the order of sums may differ


class Output(NamedTuple):
    logits: torch.Tensor
    loss: torch.Tensor | None


class Block(nn.Module):
    def __init__(self, width=6, heads=2, inner=7):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x):
        heads = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).movedim(-3, 0).transpose(2, 3)
        x = x + self.out(scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(-2))
        return x + self.down(self.up(x).tanh())


class Model(nn.Module):
    """A language model with axes that no number of processes divides; 3 processes find an empty shard in `gain`."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 6)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(6, VOCABULARY, bias=False)
        self.gain = nn.Parameter(torch.ones(2))

    def forward(self, tokens, labels=None, weight=1.0):
        """labels: -100 where no label counts. The loss is weight times the sum over labels."""
        logits = self.head(self.blocks(self.embedding(tokens))) * self.gain.sum()
        if labels is None:
            return Output(logits, None)
        return Output(logits, weight * cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))


def new_model():
    torch.manual_seed(0)
    return Model().double()


def batches(step, rank, world):
    """The micro-batches of a step, as keywords of the model: this process's rows of those of all.

    Weights are such that the mean over processes of the summed loss is the mean over all labels of the step.
    """
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCABULARY, (MICRO, ROWS, LENGTH), generator=generator)
    labels = torch.randint(VOCABULARY, (MICRO, ROWS, LENGTH), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = -100
    weight = world / int((labels != -100).sum())
    first = sum(SHARES[world][:rank])
    rows = slice(first, first + SHARES[world][rank])
    return [{"tokens": t[rows], "labels": y[rows], "weight": weight} for t, y in zip(tokens, labels, strict=True)]


def whole(t):
    """A tensor of which this process may hold a shard only."""
    t = t.detach()
    return t.full_tensor() if hasattr(t, "full_tensor") else t.clone()


def result(model, optimizer):
    """{name: value} of all parameters and all of h, whole on every process."""
    named = [(name.replace("module.", "").replace("_orig_mod.", ""), p) for name, p in model.named_parameters()]
    h = {f"h of {name}": whole(optimizer.state[p]["hessian"]) for name, p in named if p in optimizer.state}
    return {name: whole(p) for name, p in named} | h


class Loop(NamedTuple):
    name: str
    processes: tuple
    classes: tuple
    run: Callable  # (rank, world, class of the optimizer) -> result()
    note: str


LOOPS: list[Loop] = []


def loop(name, processes=(2, 3), classes=(SophiaG, SophiaH), note=""):
    """Register a loop. note: what to write beside it in docs/integrations.md."""

    def add(run):
        LOOPS.append(Loop(name, processes, classes, run, note))
        return run

    return add


def train(model, step, micro=None, steps=range(STEPS), rank=0, world=1):
    """The loop itself: a backward of each micro-batch, each within micro(is_last) if given, then step()."""
    for t in steps:
        for i, batch in enumerate(batches(t, rank, world)):
            with micro(i == MICRO - 1) if micro else contextlib.nullcontext():
                model(**batch).loss.backward()
        step()
        model.zero_grad()


@functools.cache
def plain(cls):
    """The plain loop on one process, which the others are compared with."""
    model = new_model()
    optimizer = cls(model.parameters(), **SETTINGS[cls])
    optimizer.attach(model, every=EVERY)
    train(model, optimizer.step)
    return result(model, optimizer)


def _ddp(rank, world, cls, *, inner=False, sync=True):
    model = new_model()
    ddp = nn.parallel.DistributedDataParallel(model)
    optimizer = cls(ddp.parameters(), **SETTINGS[cls])
    optimizer.attach(model if inner else ddp, every=EVERY)
    micro = None if sync else lambda last: contextlib.nullcontext() if last else ddp.no_sync()
    train(ddp, optimizer.step, micro, rank=rank, world=world)
    return result(ddp, optimizer)


@loop("DDP", note="attach to the wrapper or to the model inside")
def ddp(rank, world, cls):
    return _ddp(rank, world, cls)


@loop("DDP, attached to the inner model, accumulating under no_sync()")
def ddp_inner(rank, world, cls):
    return _ddp(rank, world, cls, inner=True, sync=False)


@loop("DDP of torch.compile(model)", (2,), (SophiaG,))
def ddp_compiled(rank, world, cls):
    model = new_model()
    ddp = nn.parallel.DistributedDataParallel(torch.compile(model, backend="aot_eager"))
    optimizer = cls(model.parameters(), **SETTINGS[cls])
    optimizer.attach(ddp, every=EVERY)
    train(ddp, optimizer.step, rank=rank, world=world)
    return result(model, optimizer)


def fsdp2_model(mesh=None, compiled=False, **options):
    from torch.distributed.fsdp import fully_shard

    model = new_model()
    for block in model.blocks if compiled else ():
        block.compile(backend="aot_eager")
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh, **options)
    return model


def _fsdp2(rank, world, cls, mesh=None, sync=True, **options):
    model = fsdp2_model(mesh, **options)
    optimizer = cls(model.parameters(), **SETTINGS[cls])
    optimizer.attach(model, every=EVERY)

    @contextlib.contextmanager
    def micro(last):
        model.set_requires_gradient_sync(sync or last)
        yield

    train(model, optimizer.step, micro, rank=rank, world=world)
    return result(model, optimizer)


@loop("FSDP2", note="state is sharded as the parameters are; nothing is gathered but numbers")
def fsdp2(rank, world, cls):
    return _fsdp2(rank, world, cls)


@loop("FSDP2, accumulating without reduction")
def fsdp2_accumulating(rank, world, cls):
    return _fsdp2(rank, world, cls, sync=False)


@loop("FSDP2 of compiled blocks", (2,), (SophiaG,))
def fsdp2_compiled(rank, world, cls):
    return _fsdp2(rank, world, cls, compiled=True)


@loop("FSDP2 with CPUOffloadPolicy", note="parameters and state stay on the CPU, where the reference runs the step")
def fsdp2_offloaded(rank, world, cls):
    from torch.distributed.fsdp import CPUOffloadPolicy

    return _fsdp2(rank, world, cls, offload_policy=CPUOffloadPolicy(pin_memory=False))


@loop("FSDP2 on a mesh of two dimensions (HSDP)", (2, 4), note="2 copies of the model, on 4 processes in 2 shards each")
def hsdp(rank, world, cls):
    mesh = dist.init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
    return _fsdp2(rank, world, cls, mesh)


def new_zero(cls):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    ddp = nn.parallel.DistributedDataParallel(new_model())
    optimizer = ZeroRedundancyOptimizer(ddp.parameters(), cls, **SETTINGS[cls])
    optimizer.optim.attach(ddp, every=EVERY)
    return ddp, optimizer


@loop("ZeroRedundancyOptimizer", note="attach the part: `zero.optim.attach(model)`")
def zero(rank, world, cls):
    ddp, optimizer = new_zero(cls)
    train(ddp, optimizer.step, rank=rank, world=world)
    return parts(ddp, optimizer.optim, world)


def parts(model, optimizer, world):
    """`result`, where each process has the state of some parameters."""
    values = [None] * world
    dist.all_gather_object(values, result(model, optimizer))
    return {key: value for each in values for key, value in each.items()}


# --- running them ---


def job(loop, cls):
    """What `spawn` is to run for a loop."""
    return inspect.getfile(loop.run), loop.run.__name__, cls


def spawn(jobs, world, seconds=300):
    """Run jobs one after another on `world` gloo processes of one thread each; of each, the results of all ranks.

    jobs: tuples (file, function, *arguments): `function(rank, world, *arguments)` of the module in that file. An error
    takes the place of a result. All jobs share one start of the processes, which costs more than they do.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.save(jobs, f"{folder}/jobs")
        command = [sys.executable, "-c", "from growkit.bench.loops import _work; _work()"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world), "GROWKIT_JOBS": folder}
        started = [subprocess.Popen(command, env=environment | {"RANK": str(rank)}) for rank in range(world)]
        try:
            for process in started:
                process.wait(seconds)
        finally:
            for process in started:
                process.kill()
        found = [torch.load(f"{folder}/{rank}", weights_only=False) for rank in range(world)]
    return [list(results) for results in zip(*found, strict=True)]


def _work():
    folder, rank, world = os.environ["GROWKIT_JOBS"], int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", f"file://{folder}/store", timeout, world, rank)
    results = []
    for file, function, *arguments in torch.load(f"{folder}/jobs", weights_only=False):
        try:
            results.append(getattr(_module(file), function)(rank, world, *arguments))
        except Exception:
            results.append(RuntimeError(traceback.format_exc()))  # not every error can be sent
    torch.save(results, f"{folder}/{rank}")
    dist.destroy_process_group()


@functools.cache
def _module(file):
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def difference(found, expected):
    """Largest difference of any tensor, relative to the largest element of it."""
    if isinstance(found, Exception):
        raise found
    if found.keys() != expected.keys():
        raise ValueError(f"found {sorted(found)}, expected {sorted(expected)}")
    return max(float((found[k] - e).abs().max() / e.abs().max()) for k, e in expected.items())


# --- the table ---


def compare(loops, seconds=600):
    """[(loop, processes, largest difference from the plain loop, or the error in words)], for each of `loops`."""
    rows = []
    for world in sorted({n for loop in loops for n in loop.processes}):
        cases = [(each, cls) for each in loops if world in each.processes for cls in each.classes]
        found = {}
        for (each, cls), results in zip(cases, spawn([job(*case) for case in cases], world, seconds), strict=True):
            found.setdefault(each, []).extend((cls, result) for result in results)
        rows += [(each, world, _worst(results)) for each, results in found.items()]
    return rows


def _worst(found):
    try:
        return max(difference(result, plain(cls)) for cls, result in found)
    except Exception as error:
        return str(error).splitlines()[-1]


def table(rows):
    """The table in Markdown."""
    lines = ["| loop | processes | optimizers | largest difference from the plain loop | |", "|---|---|---|---|---|"]
    for name in dict.fromkeys(each.name for each, _, _ in rows):
        own = [row for row in rows if row[0].name == name]
        worst = [found if isinstance(found, str) else f"{found:.0e}" for _, _, found in own]
        counts = ", ".join(str(world) for _, world, _ in own)
        classes = ", ".join(cls.__name__ for cls in own[0][0].classes)
        lines.append(f"| {name} | {counts} | {classes} | {', '.join(worst)} | {own[0][0].note} |")
    return "\n".join(lines)


# What no row shows, and what happens there.
OTHERS = {
    "tensor parallel (`parallelize_module`)": "`attach` raises, naming the parameter",
    "FSDP1 (`FullyShardedDataParallel`)": "`attach` raises",
    "a model of its own on each process (ensembles, actors)": "right with `attach(model, process_group=...)`, the "
    "process's own: `torch.distributed.new_group([rank], use_local_synchronization=True)`",
    "experts, stages or slices of a model on each process, as plain tensors": "the first refresh raises: it compares "
    "the processes' parameters bit for bit, which was tried with such tensors",
    "shards that are no run of rows (`Shard(1)`)": "right in float32; refused by name where bits are drawn at random: "
    "bfloat16 rounding, 8-bit state, SophiaH",
    '`state_dtype="8bit"` on shards': "right where a row has a multiple of 256 elements, refused by name elsewhere. "
    "Distributed checkpoints go bit for bit from 2 processes to 1 and 3, and from 1 to 2 and 3",
    "`torch.amp.GradScaler`": "right with DDP and FSDP2: an overflow in one process skips the step of all",
    "an optimizer for each parameter, stepping within the backward": "right on one process with `update_hessian()` in "
    "the hooks; refused where attached, and on several processes unless all parameters are shards, for DDP reduces "
    "gradients after the hooks",
    "distributed checkpoints": "right: saved by 2 processes and gone on with by 3; whole files go into shards and back",
    "DeepSpeed 0.19.8, tried by hand on 2 CPU processes": "ZeRO stages 1 to 3 are refused by name: by `attach`, or by "
    "the first refresh where `initialize` came after it, for they put flat copies in the place of parameters. Stage 0 "
    "is right (7e-7 in float32)",
    "Megatron-core 0.16.1, tried by hand on 1 and 2 processes, CPUs in the place of GPUs": "its "
    "`get_megatron_optimizer` takes no optimizer of one's own. Refused by name are its DistributedDataParallel, whose "
    "gradients are in `main_grad`, layers over a tensor parallel group, and its 16-bit and distributed optimizers, "
    "which train copies of the parameters: by `attach`, or by the first refresh where they came after it. Its GPTModel "
    "in torch's DDP is right, with activation recompute, too (`h` to 4e-15 in float64). Pipelines were not tried",
    "CUDA graphs of a model's forward and backward: `torch.cuda.make_graphed_callables` before `attach`, "
    '`torch.compile(mode="reduce-overhead")`': "right, tried on one H200. Their gradients lie in a graph's memory, "
    "which a refresh would write anew: it copies them first",
    "CUDA: DDP of 2 processes on one GPU, FSDP2 over NCCL with one": "right, tried on one H200",
    "NCCL between GPUs, several machines": "not tried",
}

PAGE = """# Loops and frameworks

What `optimizer.attach(model, every=k)` was tried in. Each loop trains the same small language model in float64 for
{steps} steps, accumulating {micro} micro-batches, with unequal numbers of labels on the processes, and is compared
with the plain loop on one process: parameters and `h`, as the largest difference of any tensor relative to its largest
element. {tolerance:.0e} is what the tests allow; only the order in which sums are formed may differ.

{table}

Over several processes a refresh takes two reductions beside those of its gradients, which go in buckets of 25 MB of one
dtype, a larger one by itself, and with FSDP2 as it groups them. Before the backward the hosts exchange how many rows
each has, for labels are drawn by row of the whole batch, and whether one has raised an error; where the model's process
group takes no tensors of the host, as NCCL alone, a gloo group is made for it. After the backward one reduction on the
device, for which no host waits, sums the number of labels, the gradient's squared norm, by which a refresh is skipped,
and what `metrics()` and `rho="auto"` are formed from: 30 kB. A step takes none, but for the norm of `clip_grad_norm`.
What a loss scores is read from the device at the first refresh only, unless a model returns several outputs that a loss
may read. SophiaH's refresh holds the whole model on every process while it lasts.

Not in the table:

{others}

Written by `python -m growkit.bench.loops --write docs/integrations.md`, with torch {torch} on CPU and gloo, and
{versions}.
A framework's row is there where it is installed; `make test-integrations` has them all.

## What a framework needs

- **Hugging Face Trainer**, and TRL's trainers: `optimizer_cls_and_kwargs=(growkit.integrations.huggingface.Sophia,
  {{"rho": 0.05}})`. It makes the groups of `growkit.param_groups`, takes `learning_rate` and `weight_decay` of the
  training arguments, attaches, and adds `metrics()` to what the Trainer logs. On an optimizer of your own, call
  `attach` and `growkit.integrations.huggingface.log_metrics(trainer)`.
- **Accelerate**: nothing; `optimizer.optimizer` is the growkit one after `prepare()`.
- **Lightning**: `attach` in `configure_optimizers`; `growkit.integrations.lightning.Metrics()` among the callbacks.
- **torchtitan**: `growkit.integrations.torchtitan.SophiaContainer`. Its container was tried, its own Trainer was not.
- **litgpt**: `growkit.integrations.litgpt.SophiaG` by dotted name; `litgpt.pretrain` is compared with the plain loop in
  float32 (1e-6).

Each is a file in `examples/`, which a test compares with the plain loop.
"""


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="loops whose name contains one of these; default all")
    parser.add_argument("--write", metavar="FILE", help="write the page to this file, such as docs/integrations.md")
    options = parser.parse_args(arguments)
    from growkit.bench import frameworks  # which imports this module

    chosen = [each for each in [*LOOPS, *frameworks.LOOPS] if any(name in each.name for name in options.names or [""])]
    rows = compare(chosen)
    print(table(rows))
    if options.write:
        others = "\n".join(["| | what happens |", "|---|---|", *(f"| {k} | {v} |" for k, v in OTHERS.items())])
        facts = {"others": others, "steps": STEPS, "micro": MICRO, "tolerance": TOLERANCE, "torch": torch.__version__}
        facts["versions"] = frameworks.versions()
        Path(options.write).write_text(PAGE.format(table=table(rows), **facts))
    return any(isinstance(found, str) or found > TOLERANCE for _, _, found in rows)


if __name__ == "__main__":
    from growkit.bench import loops  # not this copy of it, to which nobody else adds loops

    sys.exit(loops.main())
