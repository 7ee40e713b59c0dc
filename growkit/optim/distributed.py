"""What several processes change: which wrappers are known, who speaks, and what of a parameter this process holds.

A run on many processes is the run on one whose batch is theirs put together in the order of ranks: random bits belong
to the row of that batch and to the element of the whole parameter, and sums go over all processes (`processes`). DDP,
FSDP2 (`fully_shard`, whose parameters are DTensors) and ZeroRedundancyOptimizer are known here; what would be wrong in
silence is refused by name.
"""

import functools
import gc
import sys

import torch
import torch.distributed as dist


def _instances(values, module, name):
    """Those values that are of a class of `module`: none, where nobody has imported it."""
    cls = getattr(sys.modules.get(module), name, None)
    return [] if cls is None else [value for value in values if isinstance(value, cls)]


def fsdp_modules(model):
    """The modules that were given to fully_shard."""
    return _instances(model.modules(), "torch.distributed.fsdp", "FSDPModule")


def fsdp_groups(model):
    """What FSDP2 keeps about its groups of parameters, for which it has no public accessor."""
    states = [module._get_fsdp_state() for module in fsdp_modules(model)]
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
    meshes = {p.sharded_param: group.mesh_info.mesh for group in fsdp_groups(model) for p in group.fsdp_params}
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
            value = sum_over(value, p.device_mesh.get_group(dim))
    return value


@functools.cache
def host_group(group):
    """Of the processes of `group`, one that takes the host's tensors: NCCL's takes none, and has the host wait."""
    if device_for(torch.device("cpu"), group).type == "cpu" or not dist.is_gloo_available():
        return group
    return dist.new_group(dist.get_process_group_ranks(group), backend="gloo", use_local_synchronization=True)


def sum_over(value, group):
    """Sum of a tensor over the processes of a group, by way of a device whose tensors it takes."""
    there = value.to(device_for(value.device, group), copy=True)
    dist.all_reduce(there, group=group)
    return there.to(value.device)


def device_for(device, group):
    """`device`, or another one if the group's backend takes no tensors there."""
    config = str(dist.get_backend_config(group))  # such as "cuda:nccl" or "cpu:gloo,cuda:nccl"
    return device if f"{device.type}:" in config else torch.device(config.partition(":")[0])
