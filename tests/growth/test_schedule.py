"""Progressive training: nothing jumps where the model grows, and a run that was stopped or spread goes as one would."""

import copy

import pytest
import torch
import torch.distributed as dist

from growkit import SophiaG, SophiaH
from growkit.growth import Schedule

transformers = pytest.importorskip("transformers")

from growth.forks import in_processes  # noqa: E402
from growth.models import batches, gpt2, model  # noqa: E402
from growth.test_sharded import fully_sharded  # noqa: E402

STAGES = [(3, {"n_layer": 3}), (5, {"n_embd": 36, "n_head": 3})]
DETERMINISTIC = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def new_model(**options):
    return model(gpt2(24, 2, 2, **DETERMINISTIC | options)).train()


def adamw(net):
    return torch.optim.AdamW(net.parameters(), lr=1e-2)


def train(net, optimizer, schedule, steps=range(7), seen=lambda *_: None, rate=(), rank=0, world=1):
    """Losses; seen(step, before, after, optimizer) where the model has grown."""
    losses = []
    for step, batch in zip(range(steps.stop), batches(steps.stop), strict=True):
        if step not in steps:
            continue
        small = net
        net, optimizer = schedule.step(step, net, optimizer, *rate)
        batch = batch[rank::world]
        if net is not small:
            seen(step, small, net, optimizer)
        loss = net(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for each in rate:
            each.step()
        losses.append(float(loss.detach()))
    return losses, net, optimizer


OPTIMIZERS = {
    "adamw": adamw,
    "sophiag": lambda net: SophiaG(net.parameters(), lr=1e-3),
    "sophiah": lambda net: SophiaH(net.parameters(), lr=1e-3),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_loss_state_and_learning_rate_do_not_jump(kind):
    net = new_model(resid_pdrop=0.1)
    optimizer = OPTIMIZERS[kind](net)
    if kind != "adamw":
        optimizer.attach(net, every=2, phase="official")
    rate = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0, 1),
            torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
        ],
        [2],
    )
    first, schedule, grown = optimizer.param_groups[0]["lr"], Schedule(STAGES), []

    def seen(step, small, big, optimizer):
        assert big.training and small.training
        tokens = next(batches(1))
        losses = [float(each.eval()(input_ids=tokens, labels=tokens).loss.detach()) for each in (small, big)]
        big.train()
        assert losses[0] == pytest.approx(losses[1], abs=1e-9) and schedule.changes[step] < 1e-9
        # Adam counts in each parameter's state, Sophia in one tensor for all.
        assert all(int(optimizer.state[p]["step"]) == step for p in big.parameters())
        assert any(bool(optimizer.state[p]["exp_avg"].any()) for p in big.parameters())
        grown.append((step, sum(p.numel() for p in big.parameters())))

    _, net, optimizer = train(net, optimizer, schedule, seen=seen, rate=[rate])
    assert [step for step, _ in grown] == [3, 5] and net.config.n_layer == 3 and net.config.n_embd == 36
    assert optimizer.param_groups[0]["lr"] == pytest.approx(first * 0.9**5)
    if kind != "adamw":
        assert (optimizer.param_groups[0]["steps"], optimizer.param_groups[0]["refreshes"]) == (7, 3)


def _started(net):
    net = copy.deepcopy(net)
    return net, adamw(net)


@pytest.mark.parametrize("stopped", [2, 3, 4])
def test_a_run_goes_on_from_files_as_if_never_stopped(stopped, tmp_path):
    """Stopped before any growth, right before one, and after one."""
    net = new_model()
    losses, whole, _ = train(*_started(net), Schedule(STAGES))
    early, half, optimizer = train(*_started(net), Schedule(STAGES), range(stopped))
    torch.save((half.state_dict(), optimizer.state_dict()), tmp_path / "run.pt")
    weights, state = torch.load(tmp_path / "run.pt")
    schedule = Schedule(STAGES)
    again = type(net)(schedule.config_at(stopped - 1, net.config, type(net))).double()
    again.load_state_dict(weights)
    optimizer = adamw(again)
    optimizer.load_state_dict(state)
    late, again, _ = train(again, optimizer, schedule, range(stopped, 7))
    assert early + late == losses
    assert all(a.equal(b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


REFUSED = {
    "no stage": (lambda net: Schedule([]), ValueError, "stages: got steps \\[\\], expected one or more"),
    "falling": (lambda net: Schedule(STAGES[::-1]), ValueError, "got steps \\[5, 3\\], expected them to rise"),
    "start": (lambda net: Schedule(STAGES, start="best"), ValueError, "start: got 'best', expected one of"),
    "a later stage": (
        lambda net: Schedule([*STAGES, (9, {"n_layer": 1})]).step(0, net, adamw(net)),
        ValueError,
        "stages: at step 9: big_config.n_layer: got 1, expected at least 3",
    ),
    "optimizer": (
        lambda net: Schedule(STAGES).step(0, net, torch.optim.SGD(net.parameters(), 0.1)),
        TypeError,
        "optimizer: got SGD, expected one of Adam",
    ),
    "wrap": (
        lambda net: Schedule(STAGES).step(0, torch.compile(net, backend="eager"), adamw(net)),
        ValueError,
        "wrap: got None with a OptimizedModule",
    ),
}


@pytest.mark.parametrize(("attempt", "kind", "said"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused_at_the_first_step(attempt, kind, said):
    with pytest.raises(kind, match=said):
        attempt(new_model())


def test_waiting_gradients_are_not_lost():
    net = new_model()
    optimizer, schedule, tokens = adamw(net), Schedule(STAGES), next(batches(1))
    net(input_ids=tokens, labels=tokens).loss.backward()
    assert schedule.step(2, net, optimizer) == (net, optimizer)
    with pytest.raises(ValueError, match="gradients wait at step 3, expected the call after zero_grad"):
        schedule.step(3, net, optimizer)
    optimizer.zero_grad()
    big, _ = schedule.step(3, net, optimizer)
    assert big.config.n_layer == 3


def test_a_start_that_is_not_lossless_and_one_that_fails_to_be(monkeypatch, recwarn):
    net = new_model()
    schedule = Schedule([(0, {"n_layer": 4})], start="stack")
    schedule.step(0, net, adamw(net))
    assert schedule.changes[0] > 1e-2 and not [w for w in recwarn if "Schedule" in str(w.message)]
    monkeypatch.setattr("growkit.growth.schedule.output_change", lambda *_: 0.5)
    with pytest.warns(UserWarning, match="growing changed outputs by 0.5 relative, expected at most 0.0001"):
        Schedule(STAGES).step(3, net, adamw(net))


def test_a_count_that_passes_several_stages_takes_them_together():
    net = new_model()
    stages = [STAGES[0], (4, gpt2(36, 3, 4, **DETERMINISTIC)), (5, {"n_inner": 160})]
    big, _ = Schedule(stages).step(7, net, adamw(net))
    assert (big.config.n_layer, big.config.n_embd, big.config.n_inner) == (4, 36, 160)
    assert Schedule(STAGES).config_at(7, net.config, type(net)).n_layer == 3
    big, _ = Schedule(STAGES).step(7, net, adamw(net))
    assert (big.config.n_layer, big.config.n_embd) == (3, 36)


def test_what_is_frozen_stays_so():
    net = new_model()
    net.transformer.wpe.requires_grad_(False)
    net.transformer.h[1].mlp.requires_grad_(False)

    def seen(step, small, big, optimizer):
        kept.append((big, big.transformer.wpe.weight.clone()))

    kept = []
    _, net, _ = train(net, adamw(net), Schedule([(1, {"n_layer": 4})]), range(3), seen)
    assert net is kept[0][0] and net.transformer.wpe.weight.equal(kept[0][1])
    assert [block.mlp.c_fc.weight.requires_grad for block in net.transformer.h] == [True, True, False, False]


def test_what_wrapped_the_model_wraps_the_large_one():
    net = new_model()
    optimizer = SophiaG(net.parameters())
    optimizer.attach(net, every=4, phase="official")
    big, grown = Schedule(STAGES, wrap=torch.compile).step(3, torch.compile(net), optimizer)
    assert type(big) is type(torch.compile(net)) and big._orig_mod.config.n_layer == 3
    assert grown.param_groups[0]["every"] == 4 and grown.param_groups[0]["phase"] == "official"
    with pytest.raises(RuntimeError, match="attached already|already attached"):
        grown.attach(big)
    optimizer.attach(net)  # the old one is free


@pytest.mark.parametrize("way", ["DDP", "FSDP2"])
def test_ranks_grow_as_one_process_does(way, tmp_path):
    """AdamW against one process with all rows; attached SophiaG goes on with its refreshes."""
    in_processes(_rank, 2, tmp_path, tmp_path, way)
    (seen, weights), (other, _) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    losses, whole, _ = train(*_started(new_model()), Schedule(STAGES))
    assert [(a + b) / 2 for a, b in zip(seen, other, strict=True)] == pytest.approx(losses)
    for name, p in whole.named_parameters():
        torch.testing.assert_close(weights[name], p.detach(), rtol=1e-5, atol=1e-6, msg=name)


def _rank(rank, folder, way):
    for kind in ("sophiag", "adamw"):
        net = new_model()
        if way == "DDP":
            options = {"wrap": torch.nn.parallel.DistributedDataParallel}
            net = options["wrap"](net)
        else:
            options = {"shard": fully_sharded}
            fully_sharded(net)
        optimizer = OPTIMIZERS[kind](net)
        if kind != "adamw":
            optimizer.attach(net, every=2)
        losses, net, optimizer = train(net, optimizer, Schedule(STAGES, **options), rank=rank, world=2)
        assert kind == "adamw" or optimizer.param_groups[0]["refreshes"] == 4
    weights = {
        name.removeprefix("module."): p.full_tensor() if way == "FSDP2" else p.detach()
        for name, p in net.named_parameters()
    }
    torch.save((losses, weights), folder / f"{rank}.pt")
    dist.barrier()
