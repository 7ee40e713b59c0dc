"""Models whose parameters are sharded over several processes, grown into such models: bit for bit as on one."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from growkit import LiGO
from growkit.growth import ShardedFiles

pytest.importorskip("transformers")

from growth.forks import in_processes  # noqa: E402
from growth.models import CONFIGS, FIRST, batches, model  # noqa: E402

GROWTHS = {
    "gpt2": (CONFIGS["gpt2"](24, 3, 2, 50), {"n_layer": 3, "n_embd": 40, "n_head": 5, "n_inner": 77}),
    "llama": (
        CONFIGS["llama"](24, 4, 2, 50, 2),
        {"num_hidden_layers": 3, "hidden_size": 42, "num_attention_heads": 6, "num_key_value_heads": 3},
    ),
    "bert": (CONFIGS["bert"](24, 3, 2, 50), {"hidden_size": 48, "num_attention_heads": 6}),
}


def fully_sharded(net):
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    blocks = next(m for m in net.modules() if isinstance(m, torch.nn.ModuleList))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)
    return net


@pytest.mark.parametrize(("world", "families"), [(2, ["llama", "bert"]), (3, ["gpt2"])], ids=["2", "3"])
def test_growth_of_shards_is_growth(world, families, tmp_path):
    """Of a sharded model in memory, and of one in files that as many processes have saved."""
    whole = {}
    for family in families:
        config, sizes = GROWTHS[family]
        small = model(config, torch.float32)
        whole[family] = dict(LiGO(small, sizes).tensors())
    torch.save(whole, tmp_path / "whole.pt")
    in_processes(_grow, world, tmp_path, tmp_path, families)
    for family in families:
        grown = ShardedFiles(tmp_path / f"{family}-grown", "model.")
        assert all(grown[name].equal(value) for name, value in whole[family].items())
    with pytest.raises(ValueError, match="prefix: nothing in .* begins with 'net.', only model."):
        ShardedFiles(tmp_path / f"{families[0]}-grown", "net.")


def _grow(rank, folder, families):
    world = dist.get_world_size()
    for family, whole in torch.load(folder / "whole.pt").items():
        config, sizes = GROWTHS[family]
        small = fully_sharded(model(config, torch.float32))
        operator = LiGO(small, sizes)
        big = operator.grow(shard=fully_sharded)
        assert not big.training and isinstance(big, operator.skeleton().__class__)
        for name, p in big.named_parameters():
            assert p.to_local().numel() <= -(-len(p) // world) * p[0].numel()
            assert p.full_tensor().equal(whole[name]), (family, name)
        tokens = next(batches(1))
        with torch.no_grad():
            change = (big(tokens).logits - small(tokens).logits).abs().max()
        assert change < 1e-4
        dcp.save({"model": small.state_dict()}, checkpoint_id=folder / family)
        config.architectures = [FIRST[family]]
        operator = LiGO(config, sizes, weights=ShardedFiles(folder / family, "model."))
        dcp.save({"model": operator.grow(shard=fully_sharded).state_dict()}, checkpoint_id=folder / f"{family}-grown")
