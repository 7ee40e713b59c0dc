"""The arithmetic of docs/scale.md: the page shows what the functions compute, and they agree with what runs."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import growkit
from growkit.bench import kron, scale, sophia

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("table", [scale.state_table, scale.step_table, scale.growth_table], ids=lambda f: f.__name__)
def test_page_shows_the_computed_table(table):
    assert table() in (ROOT / "docs" / "scale.md").read_text()


@pytest.mark.parametrize(
    ("form", "dtype", "options"),
    [
        ("float32", torch.float32, {}),
        ("bfloat16, stochastic", torch.bfloat16, {"bf16_update": "stochastic"}),
        ("bfloat16, master", torch.bfloat16, {"bf16_update": "master"}),
    ],
)
def test_memory_is_that_of_a_real_optimizer(form, dtype, options):
    shapes = sophia.gpt2_shapes(2, 16, 41, 8)
    params = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer = growkit.SophiaG(params, **options)
    optimizer.step()
    held = sum(t.nbytes for state in optimizer.state.values() for key, t in state.items() if key != "step")
    both = sum(p.nbytes + p.grad.nbytes for p in params)
    assert scale.memory(shapes, 1, form) == (held, held + both)


def test_bytes_of_a_step_are_those_of_its_workload():
    assert scale.FORMATS["float32"][3] == sophia.update("gpt2-small", "cpu", tiny=True).bytes / _elements("gpt2-small")
    for form, name in (("bfloat16", "bfloat16, stochastic"), ("bfloat16-master", "bfloat16, master")):
        case = sophia.update_mixed(form, "gpt2-xl", "cpu", tiny=True)
        assert scale.FORMATS[name][3] == case.bytes / _elements("gpt2-xl")
    assert scale.REFRESH == sophia.refresh_gnb("gpt2-small", "cpu", tiny=True).bytes / _elements("gpt2-small")


def _elements(model):
    return scale.elements(sophia.MODELS[model][1]())


SHARD = """
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from growkit.bench import scale
dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
model = torch.nn.Sequential(torch.nn.Linear(20, 13), torch.nn.LayerNorm(13), torch.nn.Linear(13, 3))
shapes = [tuple(p.shape) for p in model.parameters()]
fully_shard(model, mesh=init_device_mesh("cpu", (8,)))
print(sum(p.to_local().numel() for p in model.parameters()), scale.shard_elements(shapes, 8))
"""


def test_shards_are_those_of_fsdp2():
    """In a process of its own, for a process group is global. Rank 0 is the fullest."""
    done = subprocess.run([sys.executable, "-c", SHARD], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sharded, computed = map(int, done.stdout.split())
    assert sharded == computed


@pytest.mark.parametrize("every", [10, 5])
def test_refreshes_take_their_share_of_flops(every):
    transformers = pytest.importorskip("transformers")
    from torch.utils.flop_counter import FlopCounterMode

    shape = {"vocab_size": 64, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 0}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=2, n_embd=32, n_head=2, **shape))
    tokens = torch.randint(64, (2, 16))

    def flops(attached):
        optimizer = growkit.SophiaG(model.parameters())
        if attached:
            optimizer.attach(model, every=every)
        with FlopCounterMode(display=False) as counter:
            for _ in range(10):
                model(tokens, labels=tokens).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        optimizer.detach()
        return counter.get_total_flops()

    assert flops(True) == pytest.approx(flops(False) * (1 + scale.refresh_flops(every)), rel=1e-12)


@pytest.mark.parametrize(
    ("growth", "pair"),
    [("GPT-2 small to medium", "gpt2-medium"), ("GPT-2 medium to XL", "gpt2-xl"), ("LLaMA 1B to 7B", "llama-7b")],
)
def test_growth_is_counted_as_the_workloads_count(growth, pair):
    counted, problem = scale.growth(*scale.GROWTH[growth]), kron.Problem(pair, "top", "meta")
    assert (counted.flops, counted.backward_flops) == (problem.flops, problem.backward_flops)
    operators = sum(t.nbytes for t in problem.operators)
    assert counted.bytes == problem.nbytes - operators
