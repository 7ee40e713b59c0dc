"""The processes of a refresh: whose rows come first, the few reductions, and how an error in one of them stops all.

Nothing is gathered but numbers.
"""

import contextlib
import math
from collections import Counter

import torch
import torch.distributed as dist

from growkit.optim.distributed import (
    device_for,
    fsdp_groups,
    fsdp_modules,
    host_group,
    is_sharded,
    sum_over,
    without_ddp,
    world_size,
)

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
        modules, groups = fsdp_modules(self.module), fsdp_groups(self.module)
        contexts = [module._get_fsdp_state()._state_ctx for module in modules]
        with _restored(groups, "reduce_grads", "all_reduce_grads"), _restored(contexts, "is_last_backward"):
            for module in modules:
                module.set_requires_gradient_sync(True, recurse=False)
                module.set_is_last_backward(True)
            yield

    @property
    def weight(self):
        """What FSDP2 divides the sum of gradients by: a loss multiplied by it leaves the sum in `.grad`."""
        factors = {group.gradient_divide_factor or group.mesh_info.mesh.size() for group in fsdp_groups(self.module)}
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
        return sum_over(table, host_group(self._group or dist.group.WORLD)).tolist()

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
        return own if self.size == 1 else sum_over(own, self._group)

    def check_replicas(self):
        """Raise unless all processes hold the same parameters, bit for bit, where they do not hold shards of one.

        Experts, stages or models of its own on each process would otherwise be taken for copies of one. Reads every
        parameter once, and waits for the result.
        """
        if self.size == 1:
            return
        device = device_for(torch.device("cpu"), self._group)
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
        modules, groups = fsdp_modules(self.module), fsdp_groups(self.module)
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
