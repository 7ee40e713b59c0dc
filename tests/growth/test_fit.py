"""Learning the operators: gradients, labels, masks, batches, what is refused and what is left behind."""

import copy

import pytest
import torch
from torch import nn

from growkit import LiGO
from growkit.growth.worth import doubt

transformers = pytest.importorskip("transformers")

from growth.forks import in_processes  # noqa: E402
from growth.models import batches, bert, gpt2, model  # noqa: E402

LEARNING = {
    "lossless": (gpt2(24, 3, 2, 50), gpt2(40, 5, 3, 70), "lossless"),
    "lossless-larger-heads": (gpt2(24, 3, 2, 50), gpt2(40, 4, 3, 70), "lossless"),
    "official": (gpt2(24, 3, 2, 50), gpt2(40, 5, 3, 70), "official"),
    "bert": (bert(24, 3, 2, 50), bert(48, 6, 3, 70), "lossless"),
}


@pytest.mark.parametrize(("small", "big", "start"), LEARNING.values(), ids=LEARNING)
def test_fit_lowers_the_loss_moves_every_operator_and_leaves_the_small_model(small, big, start):
    source = model(small, torch.float32).train()
    before = copy.deepcopy(source.state_dict())
    operator = LiGO(source, big, start=start)
    initial = copy.deepcopy(operator.state_dict())
    stream = torch.random.get_rng_state()
    seen = []
    losses = operator.fit(
        batches(24), steps=12, lr=1e-2, accumulate=2, mask_token=3,
        progress=lambda step, loss: seen.append((step, loss)),
    )  # fmt: skip
    assert min(losses[-3:]) < 0.95 * losses[0] and seen == list(enumerate(losses))
    assert not operator.exact
    for name, value in operator.named_parameters():
        assert not value.equal(initial[name]), name
    assert source.training and all(p.requires_grad and p.grad is None for p in source.parameters())
    assert all(value.equal(before[name]) for name, value in source.state_dict().items())
    assert torch.random.get_rng_state().equal(stream)


def test_fit_gives_the_operator_the_gradient_of_the_whole_map():
    """One step of fit against autograd straight through the grown model."""
    small, big = model(gpt2(24, 3, 2)), gpt2(32, 4, 3, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    operator, other = LiGO(small, big), LiGO(small, big)
    taken = list(batches(2))
    operator.fit(taken, steps=1, accumulate=2)

    weights = other.expand()
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    grown = other.grow()
    loss = sum(torch.func.functional_call(grown, weights, (b,), {"labels": b}).loss for b in taken) / 2
    loss.backward()
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-3, weight_decay=0.0)
    nn.utils.clip_grad_norm_(other.parameters(), 1.0)
    optimizer.step()
    for (name, a), b in zip(operator.named_parameters(), other.parameters(), strict=True):
        # A first step of Adam is lr*sign(gradient): compare where the gradient is not rounding noise.
        firm = b.grad.abs() > 1e-9
        torch.testing.assert_close(a[firm], b[firm], rtol=1e-6, atol=1e-9, msg=name)


def test_fit_takes_a_loss_of_its_own_and_repeats_itself():
    def loss(model, batch):
        return model(batch).logits.float().logsumexp(-1).mean()

    runs = []
    for _ in range(2):
        operator = LiGO(model(gpt2(24, 3, 2), torch.float32), gpt2(32, 4, 3), seed=3)
        runs.append(operator.fit(batches(4), steps=4, loss=loss))
        torch.rand(1)  # the global stream plays no part
    assert runs[0] == runs[1] and runs[0][-1] < runs[0][0]
    other = LiGO(model(gpt2(24, 3, 2), torch.float32), gpt2(32, 4, 3), seed=4)
    assert other.fit(batches(4), steps=4, loss=loss) != runs[0]


def test_bad_arguments_of_fit_are_refused_by_name():
    small, big = model(gpt2(24, 3, 2)), gpt2(32, 4, 3)
    operator = LiGO(small, big)
    with pytest.raises(ValueError, match="batches: ran out after 3, expected steps \\* accumulate = 8"):
        operator.fit(batches(3), steps=4, accumulate=2)
    with pytest.raises(ValueError, match="no loss; expected 'labels'"):
        operator.fit([{"input_ids": torch.zeros(1, 4, dtype=torch.int64)}], steps=1)
    with pytest.raises(ValueError, match="steps, accumulate: got 0, 1"):
        operator.fit(batches(1), steps=0)
    with pytest.raises(ValueError, match="lr, warmup: got 0.001, 3"):
        operator.fit(batches(1), steps=1, warmup=3)


def test_micro_batches_count_by_their_labels():
    """Two micro-batches of unequal labels give the step of one batch that holds both."""
    tokens = next(batches(1))[:2]
    labels = tokens.clone()
    labels[0, 4:] = -100
    both = {"input_ids": tokens, "labels": labels}
    parts = [{name: x[i : i + 1] for name, x in both.items()} for i in range(2)]
    together, apart = (LiGO(model(gpt2(24, 3, 2)), gpt2(32, 4, 3)).eval() for _ in range(2))
    first = together.fit([both], steps=1)
    assert apart.fit(parts, steps=1, accumulate=2) == pytest.approx(first)
    for a, b in zip(together.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("optimizer", ["adamw", "sophiag"])
def test_fit_goes_on_where_it_was_stopped(optimizer):
    def run(operator, **options):
        return operator.fit(batches(6), steps=6, optimizer=optimizer, **options)

    def stop(step, loss):
        if step == 2:
            raise KeyboardInterrupt

    whole, stopped, again = (LiGO(model(gpt2(24, 3, 2), torch.float32), gpt2(32, 4, 3)) for _ in range(3))
    losses = run(whole)
    state = {}
    with pytest.raises(KeyboardInterrupt):
        run(stopped, state=state, progress=stop)
    again.load_state_dict(stopped.state_dict())
    assert run(again, state=copy.deepcopy(state)) == losses and losses[-1] < losses[0]
    assert all(a.equal(b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


def test_a_masked_lm_is_masked_and_labels_are_never_its_own_input():
    operator = LiGO(model(bert(24, 3, 2, 50), torch.float32), bert(48, 6, 3, 70))
    tokens = next(batches(1))
    with pytest.raises(ValueError, match="mask_token: got None"):
        operator.fit([tokens], steps=1)
    with pytest.raises(ValueError, match="labels of a masked LM are its unmasked inputs"):
        operator.fit([(tokens, tokens)], steps=1)
    seen = {}

    class Spy(type(operator.skeleton())):
        def forward(self, **inputs):
            seen.update(inputs)
            return super().forward(**inputs)

    Spy.__name__ = "BertForMaskedLM"
    operator._model_class = Spy
    operator.fit([tokens], steps=1, mask_token=3, mask_rate=0.5)
    predicted = seen["labels"] != -100
    assert 0.3 < predicted.float().mean() < 0.7
    assert seen["labels"][predicted].equal(tokens[predicted])
    assert seen["input_ids"][~predicted].equal(tokens[~predicted])
    assert 0.6 < (seen["input_ids"][predicted] == 3).float().mean() < 1


NOT_FINITE = {
    "loss": ((lambda net, batch: net(batch, labels=batch).loss * float("nan")), "loss: got nan in step 1"),
    "gradient": (
        (lambda net, batch: (net(batch).logits.sum() * 0).sqrt()),
        "loss: its gradient is not finite in step 1",
    ),
}


@pytest.mark.parametrize(("loss", "message"), NOT_FINITE.values(), ids=NOT_FINITE)
def test_a_loss_that_is_not_finite_stops_before_the_step(loss, message):
    def second(net, batch):
        return net(batch, labels=batch).loss if not seen else loss(net, batch)

    operator = LiGO(model(gpt2(24, 3, 2), torch.float32), gpt2(32, 4, 3))
    seen = []
    with pytest.raises(FloatingPointError, match=message):
        operator.fit(
            batches(3), steps=3, loss=second,
            progress=lambda *_: seen.append({name: x.clone() for name, x in operator.state_dict().items()}),
        )  # fmt: skip
    assert len(seen) == 1 and all(x.equal(seen[0][name]) for name, x in operator.state_dict().items())
    assert all(p.grad is None for p in operator.parameters())


def test_a_batch_without_labels_stops_with_a_word():
    operator = LiGO(model(gpt2(24, 3, 2), torch.float32), gpt2(32, 4, 3))
    tokens = next(batches(1))
    with pytest.raises(FloatingPointError, match="loss: the batches of step 0 have no label"):
        operator.fit([{"input_ids": tokens, "labels": torch.full_like(tokens, -100)}], steps=1)


@pytest.mark.parametrize("known", [True, False], ids=["list", "iterator"])
def test_batches_that_run_out_leave_the_operator_as_it_was(known):
    operator = LiGO(model(gpt2(24, 3, 2), torch.float32), gpt2(32, 4, 3))
    before, state = copy.deepcopy(operator.state_dict()), {}
    with pytest.raises(ValueError, match="batches: ran out after 3, expected steps \\* accumulate = 4"):
        operator.fit(list(batches(3)) if known else batches(3), steps=2, accumulate=2, state=state)
    assert state == {} and operator.exact
    assert all(x.equal(before[name]) for name, x in operator.state_dict().items())


def _whole_blocks(net):
    """FSDP2 as torchtitan and accelerate lay it out: block by block, then what is left."""
    from torch.distributed.fsdp import fully_shard

    mesh = torch.distributed.init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for block in net.transformer.h:
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)


SPREAD = {"DDP": (None, "adamw"), "FSDP2": (_whole_blocks, "adamw"), "FSDP2-sophiag": (_whole_blocks, "sophiag")}


@pytest.mark.parametrize(("shard", "optimizer"), SPREAD.values(), ids=SPREAD)
def test_ranks_take_the_step_of_all_their_batches(shard, optimizer, tmp_path):
    """Two processes with a batch each end where one does that accumulates both; of sampled labels, where both ranks do
    that hold the whole model."""
    in_processes(_rank, 2, tmp_path, tmp_path, shard, optimizer)
    if optimizer == "adamw":
        alone = LiGO(model(gpt2(24, 3, 2)), gpt2(32, 4, 3)).eval()
        losses = alone.fit(batches(4), steps=2, accumulate=2)
        expected = alone.state_dict()
    else:
        (tmp_path / "whole").mkdir()
        in_processes(_rank, 2, tmp_path, tmp_path / "whole", None, optimizer)
        expected, losses = torch.load(tmp_path / "whole/0.pt")
    for rank in range(2):
        state, seen = torch.load(tmp_path / f"{rank}.pt")
        assert seen == pytest.approx(losses)
        for name, value in expected.items():
            # Sophia divides by h: where both gradients are rounding noise, so is the step, up to lr = 1e-3.
            torch.testing.assert_close(state[name], value, rtol=1e-6, atol=1e-9 if optimizer == "adamw" else 1e-6)


def _rank(rank, folder, shard, optimizer):
    operator = LiGO(model(gpt2(24, 3, 2)), gpt2(32, 4, 3)).eval()
    losses = operator.fit(list(batches(4))[rank::2], steps=2, shard=shard, optimizer=optimizer)
    torch.save((operator.state_dict(), losses), folder / f"{rank}.pt")


def test_a_shard_that_leaves_parameters_whole_is_refused(tmp_path):
    in_processes(_refused, 1, tmp_path)


def _refused(rank):
    from torch.distributed.fsdp import fully_shard

    operator = LiGO(model(gpt2(24, 3, 2)), gpt2(32, 4, 3))
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    for shard, said in (
        (lambda net: None, "shard: left a GPT2LMHeadModel that fully_shard was not called on"),
        (lambda net: fully_shard(net.transformer, mesh=mesh), "shard: left a GPT2LMHeadModel"),
        (
            lambda net: fully_shard(net, mesh=mesh, ignored_params={net.transformer.wpe.weight}),
            "shard: left transformer.wpe.weight whole on every process",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            operator.fit(batches(1), steps=1, shard=shard)


def test_images_and_pairs_of_a_data_loader_are_batches():
    from growth.models import CONFIGS
    from torch.utils.data import DataLoader, TensorDataset

    operator = LiGO(
        model(CONFIGS["vit"](24, 3, 2, 50), torch.float32), {"num_hidden_layers": 3, "intermediate_size": 70}
    )
    images = TensorDataset(torch.randn(8, 3, 8, 8), torch.arange(8) % 5)
    losses = operator.fit([*DataLoader(images, batch_size=8)] * 8, steps=8, lr=1e-2)
    assert losses[-1] < losses[0]
    with pytest.raises(ValueError, match="batches: got a str, expected a tensor"):
        operator.fit(["text"], steps=1)


def test_masked_images_count_by_their_patches():
    """Two micro-batches of unequally many masked patches give the step of one batch that holds both."""
    from growth.models import CONFIGS

    config = CONFIGS["vit"](24, 3, 2, 50, encoder_stride=4)
    sizes = {"num_hidden_layers": 3, "intermediate_size": 70}
    together, apart, own = (LiGO(model(config, name="ViTForMaskedImageModeling"), sizes).eval() for _ in range(3))
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    both = {"pixel_values": images, "bool_masked_pos": torch.tensor([[1, 1, 1, 0], [0, 0, 1, 0]]).bool()}
    parts = [{name: x[i : i + 1] for name, x in both.items()} for i in range(2)]
    assert apart.fit(parts, steps=1, accumulate=2) == pytest.approx(together.fit([both], steps=1), rel=1e-5)
    for a, b in zip(together.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-7)  # the model divides by patches + 1e-5
    losses = own.fit([images] * 8, steps=8, lr=1e-2, mask_rate=0.6)  # bare images are masked here
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(("optimizer", "accumulate"), [("adamw", 2), ("sophiag", 1)])
def test_a_fit_tells_its_cost_in_plain_steps(optimizer, accumulate):
    """Against 6 FLOPs per weight of a product and token, and attention; the expansion's as counted."""
    operator, state = LiGO(model(gpt2(24, 3, 2), torch.float32), gpt2(32, 4, 3)), {}
    operator.fit(batches(4), steps=4 // accumulate, accumulate=accumulate, optimizer=optimizer, state=state)
    big = operator.grow()
    weights = sum(p.numel() for name, p in big.named_parameters() if p.ndim == 2 and "wpe" not in name)
    plain = accumulate * 64 * (6 * weights + 12 * 3 * 32 * 16)  # batches of 4 x 16 tokens, 3 layers, 32 wide
    assert state["plain_flops"] == pytest.approx(plain, rel=0.02)  # some attention kernels make scores once more
    forward, backward = operator.flops_per_expansion
    expected = 4 / accumulate * (1 + (forward + backward) / state["plain_flops"])
    if optimizer == "sophiag":
        expected += 1 + backward / state["plain_flops"]
    assert state["plain_steps"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("losses", "doubted"),
    [
        ([3.0, 3.2, 2.9, 3.1, 3.0, 3.1, 2.9, 3.15], True),  # noise
        ([3.0, 3.0, 3.1, 3.1, 3.2, 3.2, 3.3, 3.3], True),  # rises
        ([3.0, 2.99, 2.98, 2.97, 2.96, 2.95, 2.94, 2.93], False),
        ([3.0, 3.2, 2.9, 3.1], False),  # too few to say
    ],
)
def test_losses_that_do_not_fall_are_doubted(losses, doubted):
    said = doubt(losses, 11.6)
    assert bool(said) == doubted
    assert not said or "no gain to be seen, at the FLOPs of 12 plain training steps" in said


def test_a_fit_without_gain_warns(recwarn):
    operator = LiGO(model(gpt2(24, 3, 2), torch.float32), gpt2(32, 4, 3))
    operator.fit(batches(8), steps=8, lr=1e-12)
    (said,) = [w for w in recwarn if "no gain to be seen" in str(w.message)]
    assert said.filename == __file__
    recwarn.clear()
    operator.fit([next(batches(1))] * 8, steps=8, lr=1e-2)
    assert not [w for w in recwarn if "no gain" in str(w.message)]
