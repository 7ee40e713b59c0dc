"""Mixtures of experts: weights grow expert by expert, more experts are copies that share what the router gave one."""

import pytest
import torch

from growkit import LiGO
from growkit.__main__ import main

transformers = pytest.importorskip("transformers")

from growth.models import CONFIGS, batches, change, model  # noqa: E402

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe")


@pytest.mark.parametrize(("family", "start"), [*zip(FAMILIES, ("lossless", "net2net", "fpi"), strict=True)])
@pytest.mark.parametrize("times", [2, 3])
def test_copies_of_all_experts_make_together_what_one_made(family, start, times):
    small = model(CONFIGS[family](24, 6, 2, 20, 3, norm_topk_prob=times == 2))
    more = {"experts": 4 * times, "chosen": 2 * times}
    big = CONFIGS[family](48, 12, 3, 31, 6, norm_topk_prob=times == 2, **more)
    operator = LiGO(small, big, start=start)
    grown = operator.grow()
    assert change(small, grown) < 1e-5 and operator.exact
    for name, weight in operator.expand().items():
        torch.testing.assert_close(weight, grown.get_parameter(name).detach(), rtol=1e-12, atol=1e-13)


def test_a_trained_router_and_its_copies_go_on_learning():
    small = model(CONFIGS["mixtral"](24, 6, 2, 20, 3))
    operator = LiGO(small, {"num_local_experts": 8, "num_experts_per_tok": 4, "num_hidden_layers": 3})
    losses = operator.fit(batches(3), steps=3, lr=1e-2)
    assert losses[-1] < losses[0]
    grown = operator.grow()
    optimizer = torch.optim.AdamW(grown.parameters(), lr=1e-3)
    for tokens in batches(4):
        grown(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for layer in grown.model.layers:
        for weight in (layer.mlp.gate.weight, layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
            assert not weight[:4].eq(weight[4:]).flatten(1).all(1).any()


BAD = {
    "odd": ({"num_local_experts": 6}, "num_local_experts: experts are copied all alike: got 6, nearest 8"),
    "chosen": ({"num_local_experts": 8}, "num_experts_per_tok: of 4 .* 2 copies of each .*: got 2, nearest 4"),
    "more": ({"num_experts_per_tok": 3}, "num_experts_per_tok: .*: got 3, nearest 2"),
    "fewer": ({"num_local_experts": 2}, "num_local_experts: got 2, expected at least 4"),
}


@pytest.mark.parametrize(("sizes", "message"), BAD.values(), ids=BAD)
def test_a_choice_that_cannot_stay_is_refused_by_name(sizes, message):
    with pytest.raises(ValueError, match=message):
        LiGO(model(CONFIGS["mixtral"](24, 6, 2, 20, 3)), sizes)


def test_layers_without_experts_among_others_are_refused_by_name():
    with pytest.raises(ValueError, match=r"config.mlp_only_layers is \[0\], the family's table is for \[\]"):
        LiGO(model(CONFIGS["qwen3_moe"](24, 6, 2, 20, 3, mlp_only_layers=[0])), {"num_hidden_layers": 3})


def test_the_state_of_an_optimizer_follows_experts_but_not_their_copies():
    small = model(CONFIGS["qwen2_moe"](24, 6, 2, 20, 3))
    optimizer = torch.optim.AdamW(small.parameters())
    for tokens in batches(2):
        small(tokens, labels=tokens).loss.backward()
        optimizer.step()
    operator = LiGO(small, {"num_hidden_layers": 4, "moe_intermediate_size": 31}, start="lemon")
    big = operator.grow()
    grown = operator.grow_optimizer(optimizer, big)
    old, new = (m.get_parameter("model.layers.0.mlp.experts.down_proj") for m in (small, big))
    moments = optimizer.state[old]["exp_avg"], grown.state[new]["exp_avg"]
    torch.testing.assert_close(moments[1][..., :20], moments[0])
    operator = LiGO(small, {"num_experts": 8, "num_experts_per_tok": 4})
    with pytest.raises(ValueError, match="optimizer: .* more experts"):
        operator.grow_optimizer(optimizer, operator.grow())


def test_files_of_experts_grow_by_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model(CONFIGS["mixtral"](24, 6, 2, 32, 3), torch.float32).save_pretrained("small")
    assert main(["grow", "small", "big", *"--experts 8 --hidden-size 40 --heads 10 --layers 3".split()]) == 0
    out = capsys.readouterr().out
    assert "expert 4 to 8, chosen 2 to 4" in out and "outputs change by" in out
    config = transformers.AutoConfig.from_pretrained("big")
    assert (config.num_local_experts, config.num_experts_per_tok, config.intermediate_size) == (8, 4, 64)
    assert main(["inspect", "big"]) == 0
    assert "expert_read, residual_write, ffn_read" in capsys.readouterr().out
