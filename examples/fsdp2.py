"""FSDP2: shard the model, then build and attach the optimizer as on one process; its state is sharded alike.

torchrun --nproc-per-node 2 examples/fsdp2.py
"""

import os

import tiny
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

import growkit


def main(steps=30, batch=tiny.BATCH):
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    dist.init_process_group()
    model = tiny.new_model().to(device)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = growkit.SophiaG(growkit.param_groups(model, 0.1), **growkit.presets["short-run"])
    optimizer.attach(model, every=5)

    world, rank = dist.get_world_size(), dist.get_rank()
    windows = tiny.windows(steps * batch * world)
    for inputs in torch.utils.data.DataLoader(windows, batch_size=batch * world):
        model(**{name: tensor.chunk(world)[rank].to(device) for name, tensor in inputs.items()}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    # Collective, so on every process; examples/pretrain.py saves and loads shards.
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    metrics = optimizer.metrics()
    whole = tiny.new_model()
    whole.load_state_dict(state)
    if rank == 0:
        print(f"FSDP2 on {world} processes: loss {tiny.loss_of(whole):.4f}, {metrics}")
    return whole


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
