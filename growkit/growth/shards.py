"""Parameters in shards, of FSDP2's `fully_shard` or in DCP files: read whole one by one, written shard by shard."""

import sys
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import distributed, nn

from growkit.optim.distributed import is_sharded, local, shard_of


def unsharded_class(model: nn.Module) -> type:
    """The class that `fully_shard` has put one of its own in place of."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return next(cls for cls in type(model).__mro__ if fsdp is None or not issubclass(cls, fsdp.FSDPModule))


def check_fully_sharded(model: nn.Module) -> None:
    """ValueError unless each parameter is cut once, over all processes, by a `fully_shard` that includes the model."""
    if not hasattr(model, "set_gradient_divide_factor"):
        raise ValueError(f"shard: left a {type(model).__name__} that fully_shard was not called on, expected it to be")
    for name, p in model.named_parameters():
        if not is_sharded(p):
            raise ValueError(f"shard: left {name} whole on every process, expected shards")
        cuts = sum(not placement.is_replicate() for placement in p.placements)
        if cuts != 1 or p.device_mesh.size() != distributed.get_world_size():
            raise ValueError(
                f"shard: left {name} as {p.placements} on {p.device_mesh}, expected it cut once, over all "
                f"{distributed.get_world_size()} processes: tensor parallel models are not supported"
            )


class Whole(Mapping):
    """name -> tensor of a model's parameters as they are now, each gathered from its shards when it is asked for.

    All processes ask in the same order.
    """

    def __init__(self, parameters: Mapping[str, torch.Tensor]):
        self._held = {name: p.detach().clone() for name, p in parameters.items()}

    def __getitem__(self, name):
        return self._held[name].full_tensor() if is_sharded(self._held[name]) else self._held[name]

    def __iter__(self):
        return iter(self._held)

    def __len__(self):
        return len(self._held)


class ShardedFiles(Mapping):
    """name -> tensor of the files that `torch.distributed.checkpoint` has saved, read whole when it is asked for.

        LiGO(config, sizes, weights=ShardedFiles(folder, "model."))

    folder: as given to `dcp.save`. prefix: of the names there, as of dcp.save({"model": model.state_dict()}).
    Every process reads for itself, whichever number of them wrote. ValueError where nothing has that prefix.
    """

    def __init__(self, folder: str | Path, prefix: str = ""):
        from torch.distributed import checkpoint

        self._load, self._reader, self._prefix = checkpoint.load, checkpoint.FileSystemReader(folder), prefix
        found = self._reader.read_metadata().state_dict_metadata
        self._held = {name.removeprefix(prefix): held for name, held in found.items() if name.startswith(prefix)}
        if not self._held:
            raise ValueError(f"prefix: nothing in {folder} begins with {prefix!r}, only {', '.join(sorted(found))}")

    def __getitem__(self, name):
        held = self._held[name]
        tensor = torch.empty(held.size, dtype=held.properties.dtype, device="cpu")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a process reads by itself
            self._load({self._prefix + name: tensor}, storage_reader=self._reader, no_dist=True)
        return tensor

    def __iter__(self):
        return iter(self._held)

    def __len__(self):
        return len(self._held)


@torch.no_grad()
def write(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Copy a whole tensor into a parameter, or what this process holds of it."""
    local(parameter).copy_(local(shard_of(value, parameter)))
