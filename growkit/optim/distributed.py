"""What several processes change: shards of parameters, whose rows come first, and the few reductions.

A run on many processes is the run on one whose batch is theirs put together in the order of ranks: random bits belong
to the row of that batch and to the element of the whole parameter, and sums go over all processes. Nothing is gathered
but numbers. DDP, FSDP2 (`fully_shard`, whose parameters are DTensors) and ZeroRedundancyOptimizer are known here; what
would be wrong in silence is refused by name.
"""

import contextlib
import functools
import gc
import math
import sys
from collections import Counter

import torch
import torch.distributed as dist


def _instances(values, module, name):
    """Those values that are of a class of `module`: none, where nobody has imported it."""
    cls = getattr(sys.modules.get(module), name, None)
    return [] if cls is None else [value for value in values if isinstance(value, cls)]


def _fsdp_modules(model):
    return _instances(model.modules(), "torch.distributed.fsdp", "FSDPModule")


def _fsdp_groups(model):
    """What FSDP2 keeps about its groups of parameters, for which it has no public accessor."""
    states = [module._get_fsdp_state() for module in _fsdp_modules(model)]
    single = [[s._fsdp_param_group] for s in states if not hasattr(s, "_fsdp_param_groups")]  # torch 2.10
    groups = [s._fsdp_param_groups for s in states if hasattr(s, "_fsdp_param_groups")]
    return [group for each in [*single, *groups] for group in each if group is not None]


def without_ddp(model):
    """(the module whose gradients stay this process's own, DDP's process group or None)."""
    inner = getattr(model, "_orig_mod", model)  # of torch.compile
    if _instances([inner], "torch.nn.parallel.distributed", "DistributedDataParallel"):
        return inner.module, inner.process_group
    return model, None


def group_of(model, given):
    """The process group of those that train copies or shards of the model, None for all. given: what the user says."""
    _, group = without_ddp(model)
    if given is None:
        return group
    if not dist.is_available() or not isinstance(given, dist.ProcessGroup):
        raise TypeError(
            f"process_group is {type(given).__name__}, expected a torch.distributed.ProcessGroup with this process"
        )
    if group not in (None, given) or any(map(is_sharded, model.parameters())):
        raise ValueError(
            "process_group is given for a model that DDP or fully_shard spreads over processes, expected None: the "
            "wrapper's is taken"
        )
    return given


def world_size(group=None):
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def speaks(group=None):
    """Whether this is the process that warns for all of the group."""
    return world_size(group) == 1 or dist.get_rank(group) == 0


def in_backward():
    """Whether this is called by a hook, from within a backward."""
    return torch._C._current_graph_task_id() != -1


def check(model):
    """Raise RuntimeError, which names it, for a way of spreading the model over processes that a refresh cannot see."""
    expected = "expected FSDP2 (torch.distributed.fsdp.fully_shard), DDP or a plain module"
    for name, p in model.named_parameters():
        if hasattr(p, "ds_id"):
            raise RuntimeError(
                f"curvature refresh: parameter {name} is empty between calls, as DeepSpeed's ZeRO stage 3 makes it, "
                f"which is not supported; {expected}"
            )
        if getattr(p, "main_grad", None) is not None:
            raise RuntimeError(
                f"curvature refresh: parameter {name} has its gradient in main_grad, where Megatron's "
                "DistributedDataParallel and fused layers add to that of training behind autograd's back, which is not "
                f"supported; {expected}"
            )
    if world_size() == 1:
        return
    if _instances(model.modules(), "torch.distributed.fsdp", "FullyShardedDataParallel"):
        raise RuntimeError(
            "curvature refresh: the model is wrapped in FSDP1 (FullyShardedDataParallel), which flattens parameters "
            f"and leaves no gradient of each; {expected}"
        )
    for name, module in model.named_modules():
        group = vars(module).get("tp_group")  # of Megatron's and Transformer Engine's layers
        if isinstance(group, dist.ProcessGroup) and group.size() > 1:
            raise RuntimeError(
                f"curvature refresh: {name or 'the model'}, a {type(module).__name__}, is spread over its tp_group of "
                f"{group.size()} processes: labels would be drawn from parts of the logits, and tensor parallel models "
                f"are not supported; {expected}"
            )
    meshes = {p.sharded_param: group.mesh_info.mesh for group in _fsdp_groups(model) for p in group.fsdp_params}
    for name, p in model.named_parameters():
        if is_sharded(p) and meshes.get(p) != p.device_mesh:
            raise RuntimeError(
                f"curvature refresh: parameter {name} is a DTensor {p.placements} on {p.device_mesh}, which "
                "fully_shard within this model did not make: tensor and expert parallel models (parallelize_module) "
                "are not supported; attach to the module that was given to fully_shard"
            )


def find_owner(optimizer):
    """The ZeroRedundancyOptimizer that `optimizer` updates a part of the parameters for, or None."""
    cls = getattr(sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer"), "ZeroRedundancyOptimizer", None)
    if cls is None or world_size() == 1:
        return None
    known = (each for each in gc.get_objects() if issubclass(type(each), cls))  # the part does not know its whole
    return next((each for each in known if each.__dict__.get("optim") is optimizer), None)


# --- shards ---


def is_sharded(t):
    tensor = sys.modules.get("torch.distributed.tensor")
    return tensor is not None and isinstance(t, tensor.DTensor)


def local(t):
    """What this process holds of a tensor."""
    return t.to_local() if is_sharded(t) else t


def layout(p):
    """(mesh, placements) of a sharded tensor, None of a plain one."""
    return (p.device_mesh, p.placements) if is_sharded(p) else None


def local_pairs(params):
    """(what this process holds of the parameters, of their gradients). Raises where the two are laid out apart."""
    grads = [p.grad for p in params]
    tensor = sys.modules.get("torch.distributed.tensor")
    if tensor is None or not any(issubclass(each, tensor.DTensor) for each in {*map(type, params), *map(type, grads)}):
        return params, grads
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        if g is not None and layout(g) != layout(p):
            given, expected = (
                f"a DTensor {t.placements} on {t.device_mesh}" if is_sharded(t) else "a plain tensor" for t in (g, p)
            )
            raise RuntimeError(f"the gradient of parameter {i} is {given}, expected {expected}, as the parameter")
    return list(map(local, params)), [None if g is None else local(g) for g in grads]


def first_element(p):
    """Row-major index, in the whole parameter, of the first element that this process holds of it.

    None if what it holds is not one run of the whole, such as a block of columns.
    """
    if not is_sharded(p) or not local(p).numel():
        return 0
    shape, start = _shape_and_start(p.shape, p)
    if shape is None:
        return None
    first = next((d for d, n in enumerate(shape) if n > 1), len(shape))
    if shape[first + 1 :] != tuple(p.shape[first + 1 :]):
        return None
    index = 0
    for n, at in zip(p.shape, start, strict=True):
        index = index * n + at
    return index


def _shape_and_start(shape, p):
    """Of a tensor of this shape laid out as p is: the shape of this process's shard, and where it starts."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
    from torch.distributed.tensor.placement_types import _StridedShard

    if any(isinstance(placement, _StridedShard) for placement in p.placements):
        return None, None
    return compute_local_shape_and_global_offset(shape, p.device_mesh, p.placements)


def like(p, part, shape=None):
    """A tensor of this shape, by default p's, laid out as p is, of which this process holds `part`."""
    if not is_sharded(p):
        return part
    shape = torch.Size(p.shape if shape is None else shape)
    stride = tuple(shape[d + 1 :].numel() for d in range(len(shape)))
    tensor = sys.modules["torch.distributed.tensor"].DTensor
    return tensor.from_local(part, p.device_mesh, p.placements, run_check=False, shape=shape, stride=stride)


def shard_of(whole, p):
    """Of a tensor that every process holds as a whole, what p's layout leaves to this one, as a copy."""
    if not is_sharded(p):
        return whole
    shape, start = _shape_and_start(whole.shape, p)
    if shape is None:
        raise RuntimeError(f"shards {p.placements} are not supported, expected Shard or Replicate")
    part = whole[tuple(slice(at, at + n) for at, n in zip(start, shape, strict=True))]
    return like(p, part.to(p.device, copy=True, memory_format=torch.contiguous_format), whole.shape)


def sum_over_shards(value, p):
    """Sum of a tensor over the processes that hold the other shards of p."""
    for dim, placement in enumerate(p.placements if is_sharded(p) else ()):
        if not placement.is_replicate():
            value = _sum(value, p.device_mesh.get_group(dim))
    return value


@functools.cache
def _host_group(group):
    """Of the processes of `group`, one that takes the host's tensors: NCCL's takes none, and has the host wait."""
    if _device_for(torch.device("cpu"), group).type == "cpu" or not dist.is_gloo_available():
        return group
    return dist.new_group(dist.get_process_group_ranks(group), backend="gloo", use_local_synchronization=True)


def _sum(value, group):
    there = value.to(_device_for(value.device, group), copy=True)
    dist.all_reduce(there, group=group)
    return there.to(value.device)


def _device_for(device, group):
    """`device`, or another one if the group's backend takes no tensors there."""
    config = str(dist.get_backend_config(group))  # such as "cuda:nccl" or "cpu:gloo,cuda:nccl"
    return device if f"{device.type}:" in config else torch.device(config.partition(":")[0])


# --- a refresh ---

BUCKET = 25 * 2**20  # bytes of gradients that one reduction sums, as in DDP


class Processes:
    """The processes that take part in one refresh, each with batches of its own.

    module: what to call; size: number of processes; params: of the optimizer, or of the ZeroRedundancyOptimizer that
    it is a part of. A refresh enters `ready`, computes what may fail within `guarded` and calls `rows` once per batch,
    then `sum_` on what it leaves in `.grad`, and `agree`: nothing else waits for another process.
    """

    def __init__(self, optimizer, owner, model=None, process_group=None):
        self.module, _ = (None, None) if model is None else without_ddp(model)
        self._group = process_group
        self._owner = owner
        self.params = [p for group in (owner or optimizer).param_groups for p in group["params"]]
        self.size = 1 if model is None else world_size(process_group)
        meshes = {p.device_mesh for p in self.params if is_sharded(p)}
        if meshes:
            mesh = meshes.pop()
            if meshes or (mesh.ndim > 1 and mesh.size() != world_size()):
                raise RuntimeError(
                    f"curvature refresh: parameters lie on {[mesh, *meshes]}, expected one mesh, of one dimension or "
                    "of all processes"
                )
            self.size, self._group = mesh.size(), mesh.get_group() if mesh.ndim == 1 else None
        self._rank = dist.get_rank(self._group) if self.size > 1 else 0
        trained = [p for p in self.params if p.requires_grad]
        self._reached = [p for p in trained if p.grad is not None] or trained

    @contextlib.contextmanager
    def ready(self):
        """Have FSDP2 reduce gradients in every backward, whatever is left of an accumulation."""
        modules, groups = _fsdp_modules(self.module), _fsdp_groups(self.module)
        contexts = [module._get_fsdp_state()._state_ctx for module in modules]
        with _restored(groups, "reduce_grads", "all_reduce_grads"), _restored(contexts, "is_last_backward"):
            for module in modules:
                module.set_requires_gradient_sync(True, recurse=False)
                module.set_is_last_backward(True)
            yield

    @property
    def weight(self):
        """What FSDP2 divides the sum of gradients by: a loss multiplied by it leaves the sum in `.grad`."""
        factors = {group.gradient_divide_factor or group.mesh_info.mesh.size() for group in _fsdp_groups(self.module)}
        if len(factors) > 1:
            raise RuntimeError(f"curvature refresh: FSDP2 divides gradients by {factors}, expected one factor for all")
        return factors.pop() if factors else 1

    @contextlib.contextmanager
    def guarded(self):
        """What raises in one process here raises in all of them at their next `rows`, so that none waits for ever."""
        try:
            yield
        except Exception:
            self._exchange(-1, 0)
            raise

    def rows(self, own, batches):
        """(rows that come before this process's in the whole batch, rows of the whole batch).

        own: rows of this process's batch; batches: how many it has left. Hosts wait for each other, not for a device.
        """
        rows, left = self._exchange(own, batches)
        if min(rows) < 0:
            raise RuntimeError(f"curvature refresh: process {rows.index(-1)} raised an error, so all processes stop")
        if min(left) != max(left):
            raise ValueError(f"refresh: processes have {left} batches left, expected equally many")
        return sum(rows[: self._rank]), sum(rows)

    def _exchange(self, *numbers):
        """Each number's values on all processes."""
        if self.size == 1:
            return [[n] for n in numbers]
        table = torch.zeros(len(numbers), self.size, dtype=torch.int64)
        table[:, self._rank] = torch.tensor(numbers)
        return _sum(table, _host_group(self._group or dist.group.WORLD)).tolist()

    def sum_(self):
        """Make `.grad` the sum over the processes; of DTensors, FSDP2 has summed it already.

        What counts is which parameters the training reached: a gradient that is missing here is 0 for the others, and
        one that none of them expects is dropped.
        """
        if self.size == 1:
            return
        plain = [p for p in self._reached if not is_sharded(p)]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in plain]
        for p in set(self.params).difference(filter(is_sharded, self._reached)):
            p.grad = None  # `grads` alone holds it
        self.sums_(grads)
        for p, grad in zip(plain, grads, strict=True):
            p.grad = grad if self.weight == 1 else grad / self.weight

    def sums_(self, tensors):
        """Put in place of each plain tensor of a list its sum over the processes, by one reduction for each bucket.

        What leaves the list is freed bucket by bucket; a contiguous tensor that fills a bucket is overwritten.
        """
        if self.size == 1:
            return
        # Autograd gives both terms of a sum the same gradient, and slices of one to what was put together.
        users = Counter(t.untyped_storage().data_ptr() for t in tensors)
        for bucket in _reduced_together(tensors):
            parts = [tensors[i] for i in bucket]
            if len(parts) == 1 and parts[0].is_contiguous() and users[parts[0].untyped_storage().data_ptr()] == 1:
                dist.all_reduce(parts[0], group=self._group)
                continue
            flat = torch.cat([t.flatten() for t in parts])
            dist.all_reduce(flat, group=self._group)
            for i, total in zip(bucket, flat.split([t.numel() for t in parts]), strict=True):
                tensors[i] = total.view(tensors[i].shape)

    def share(self, p):
        """What a sum over p's elements on this process counts for in the sum over all processes."""
        if is_sharded(p):
            copies = [p.device_mesh.size(dim) for dim, each in enumerate(p.placements) if each.is_replicate()]
            return 1 / math.prod(copies)
        return 1 if self._owner else 1 / self.size

    def agree(self, own):
        """The sum over the processes of a tensor: the one reduction of a refresh beside that of gradients."""
        return own if self.size == 1 else _sum(own, self._group)

    def check_replicas(self):
        """Raise unless all processes hold the same parameters, bit for bit, where they do not hold shards of one.

        Experts, stages or models of its own on each process would otherwise be taken for copies of one. Reads every
        parameter once, and waits for the result.
        """
        if self.size == 1:
            return
        device = _device_for(torch.device("cpu"), self._group)
        sums = torch.stack([_checksum(p).to(device) for p in self.params])
        length = torch.tensor([len(sums), -len(sums)], device=device)
        dist.all_reduce(length, dist.ReduceOp.MAX, group=self._group)
        if length[0] != -length[1]:
            raise RuntimeError(
                f"curvature refresh: the optimizer has {len(sums)} parameters here, but up to {int(length[0])} on "
                "other processes; expected the same on all: pipeline and expert parallel models are not supported"
            )
        ends = torch.cat((sums, -sums))
        dist.all_reduce(ends, dist.ReduceOp.MAX, group=self._group)
        if different := (ends[: len(sums)] != -ends[len(sums) :]).nonzero().flatten().tolist():
            raise RuntimeError(
                f"curvature refresh: parameters {different[:5]} of the optimizer are not the same on all processes; "
                "expected copies that train in step (DDP) or shards (fully_shard): tensor, expert and pipeline "
                "parallel models are not supported; models that are independent are attached with process_group="
            )

    @contextlib.contextmanager
    def unsharded(self):
        """Yield plain tensors in place of the optimizer's parameters, whole on every process, as FSDP2 gathers them.

        autograd.grad takes no shards. While this lasts, every process holds the whole model.
        """
        modules, groups = _fsdp_modules(self.module), _fsdp_groups(self.module)
        names = {p: name for name, p in self.module.named_parameters()}
        states = [module._get_fsdp_state() for module in modules]
        with (
            _restored(groups, "post_forward_mesh_info", "reshard_after_backward"),
            _restored(states, "_auto_reshard_after_forward"),
        ):
            try:
                for module in modules:
                    module.set_reshard_after_forward(False, recurse=False)
                    module.set_reshard_after_backward(False, recurse=False)
                    module.unshard()
                whole = dict(self.module.named_parameters())
                yield [whole[names[p]] if is_sharded(p) else p for p in self.params]
            finally:
                for module in modules:
                    module.reshard()


def _reduced_together(tensors):
    """Lists of indices of tensors of one dtype on one device: of BUCKET bytes at most, or one tensor."""
    full, filling = [], {}
    for i, t in enumerate(tensors):
        kind = t.dtype, t.device
        bucket, size = filling.get(kind, ([], 0))
        if t.nbytes > BUCKET:
            full.append([i])
        elif size + t.nbytes > BUCKET:
            full.append(bucket)
            filling[kind] = [i], t.nbytes
        else:
            filling[kind] = [*bucket, i], size + t.nbytes
    return full + [bucket for bucket, _ in filling.values()]


@contextlib.contextmanager
def _restored(objects, *names):
    """Give attributes that have setters for modules, but no getters, their values back afterwards."""
    kept = [(each, name, getattr(each, name)) for each in objects for name in names]
    try:
        yield
    finally:
        for each, name, value in kept:
            setattr(each, name, value)


def _checksum(p):
    """The sum of a parameter's bits as integers, equal for equal ones and in any order of summing; 0 for shards."""
    if is_sharded(p):
        return torch.zeros((), dtype=torch.int64)
    real = torch.view_as_real(p.detach()) if p.is_complex() else p.detach()
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[p.element_size() // (1 + p.is_complex())]
    return real.contiguous().view(integer).sum(dtype=torch.int64)
