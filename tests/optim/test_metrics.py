"""metrics() without a sync, and rho="auto"."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from growkit.optim import SophiaG, SophiaH, telemetry

BOTH = pytest.mark.parametrize("cls", [SophiaG, SophiaH])


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def train(net, optimizer, steps, first=0):
    for step in range(first, first + steps):
        make = torch.Generator().manual_seed(step)
        x = torch.randn(32, 6, generator=make)
        y = (x[:, :4] + 0.3 * torch.randn(32, 4, generator=make)).argmax(-1)
        optimizer.zero_grad()
        loss = cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
    return loss


def attached(cls, net, **options):
    optimizer = cls(net.parameters(), **options)
    extra = {} if cls is SophiaG else {"loss": lambda z: cross_entropy(z, torch.arange(len(z)) % 4)}
    optimizer.attach(net, every=5, **extra)
    return optimizer


@BOTH
def test_metrics_are_those_of_the_last_refresh(cls):
    net = model()
    optimizer = attached(cls, net, lr=1e-2)
    assert optimizer.metrics() == {}
    train(net, optimizer, 5)
    assert not optimizer.metrics().keys() & telemetry.QUANTILES.keys()  # h was 0 before the only refresh
    # The step before the refresh: its update is what it moved, apart from decay. h was that of the refresh before.
    net = model()
    optimizer = attached(cls, net, lr=1e-2, weight_decay=0.0)
    train(net, optimizer, 5)
    old = [p.detach().clone() for p in net.parameters()]
    old_h = [optimizer.state[p]["hessian"].clone() for p in net.parameters()]
    train(net, optimizer, 1, first=5)
    found = before = optimizer.metrics()
    update = torch.cat([(o - p.detach()).flatten() for o, p in zip(old, net.parameters(), strict=True)])
    gradient = torch.cat([p.grad.flatten() for p in net.parameters()])
    assert found["update_grad_cosine"] == pytest.approx(
        float(torch.cosine_similarity(update, gradient, dim=0)), abs=1e-3
    )
    group, h = optimizer.param_groups[0], torch.cat([t.flatten() for t in old_h])
    for name, level in telemetry.QUANTILES.items():
        assert found[name] == pytest.approx(float(h.quantile(level)), rel=2**0.125 - 1)
    d = group["rho"] * group["bs"] * h
    m = torch.cat([optimizer.state[p]["exp_avg"].flatten() for p in net.parameters()])
    assert found["unclipped"] == pytest.approx(float((m.abs() < d).double().mean()))
    assert {"refreshes": 2, "skipped": 0, "rho": group["rho"]}.items() <= found.items()
    assert optimizer.metrics() == before and all(isinstance(value, float) for value in found.values())


def test_refresh_gradient_norm_is_that_of_the_mean_loss():
    net = model()
    optimizer = SophiaG(net.parameters(), bs=1)
    x = torch.randn(16, 6)

    def loss(z):  # labels in sight, in place of sampled ones
        return cross_entropy(z, torch.zeros(len(z), dtype=torch.int64)), len(z)

    optimizer.refresh(net, [x[:10], x[10:]], likelihood=loss)
    gradients = torch.autograd.grad(cross_entropy(net(x), torch.zeros(16, dtype=torch.int64)), net.parameters())
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    assert optimizer.metrics()["refresh_grad_norm"] == pytest.approx(float(norm))


def test_metrics_of_eight_bit_and_sixteen_bit_state_are_those_of_float32_state():
    found = []
    for state_dtype in (None, torch.bfloat16, "8bit"):
        p = nn.Parameter(torch.randn(80, 80, generator=torch.Generator().manual_seed(0)))
        optimizer = SophiaG([p], bs=1, state_dtype=state_dtype)
        for step in range(21):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step)) * 1e-2
            optimizer.step()
            if step % 10 == 0:
                optimizer.update_hessian()
        found.append(optimizer.metrics())
    for other in found[1:]:
        for name in found[0]:
            assert other[name] == pytest.approx(found[0][name], rel=0.05, abs=0.02 if name == "unclipped" else 1e-9)


def test_a_sample_has_the_same_elements_of_every_list_and_few_of_a_large_tensor(monkeypatch):
    monkeypatch.setattr(telemetry, "SAMPLE", 1000)
    ps = [nn.Parameter(torch.zeros(*shape)) for shape in ((100, 50), (40, 100), (3,))]
    for state_dtype in (None, "8bit"):
        optimizer = SophiaG(ps, state_dtype=state_dtype)
        for p in ps:
            p.grad = torch.arange(p.numel()).view(p.shape).float()
        optimizer.step()
        prepared = optimizer._buckets.prepare(optimizer.param_groups, optimizer.state)
        sizes = 0
        for _, _, (g, m) in telemetry._samples(prepared, optimizer._starts(), "g", "exp_avg"):
            torch.testing.assert_close(m, g * (1 - 0.965), rtol=0.02, atol=1.0)
            sizes += len(g)
        assert 900 < sizes < 1500


class Unmet:
    """A CUDA event that the device has not reached."""

    waited = False

    def query(self):
        return self.waited

    def synchronize(self):
        self.waited = True


def test_what_has_not_arrived_is_neither_waited_for_nor_told_but_by_auto():
    net = model()
    optimizer = attached(SophiaG, net, lr=1e-2)
    train(net, optimizer, 6)
    first, event = optimizer.metrics(), Unmet()
    train(net, optimizer, 5, first=6)
    optimizer._telemetry._sent = [event], optimizer._telemetry._sent[1]
    assert optimizer.metrics() == first and first["refreshes"] == 2 and not event.waited
    event.waited = True
    assert optimizer.metrics()["refreshes"] == 3

    optimizer = attached(SophiaG, net := model(), lr=1e-2, rho="auto")
    train(net, optimizer, 11)
    optimizer._telemetry._sent = [event := Unmet()], optimizer._telemetry._sent[1]
    train(net, optimizer, 5, first=11)
    assert event.waited


# --- rho="auto" ---


@BOTH
@pytest.mark.parametrize("factor", [0.01, 1, 100])
def test_auto_brings_the_unclipped_fraction_to_its_target(cls, factor):
    """From 100 times too small and too large: at once at the first refresh that finds an h, slowly after it."""
    net = model()
    optimizer = attached(cls, net, lr=1e-2, betas=(0.9, 0.9), rho=0.04 * factor, target_unclipped=0.3)
    rhos, seen = [], []
    for step in range(0, 300, 5):
        loss = train(net, optimizer, 5, first=step)
        rhos.append(float(optimizer.param_groups[0]["rho"]))
        seen.append(optimizer.metrics().get("unclipped"))
    assert abs(sum(seen[-30:]) / 30 - 0.3) < 0.08
    assert loss < 1.0
    assert rhos[1] == rhos[2] and 1.5 < rhos[1] < 2.5
    assert all(abs(math.log(b / a)) < 0.7 for a, b in zip(rhos[1:], rhos[2:], strict=False))


@pytest.mark.parametrize("stop", [7, 11])
def test_auto_goes_on_from_a_file_bit_for_bit(stop):
    whole = model()
    optimizer = attached(SophiaG, whole, lr=1e-2, rho="auto")
    assert (
        optimizer.param_groups[0]["rho"] == 0.04 and optimizer.param_groups[0]["target_unclipped"] == telemetry.TARGET
    )
    train(whole, optimizer, 30)
    net = model()
    optimizer = attached(SophiaG, net, lr=1e-2, rho="auto")
    train(net, optimizer, stop)
    file = copy.deepcopy(optimizer.state_dict())
    resumed = attached(SophiaG, net := copy.deepcopy(net), lr=1e-2, rho="auto")
    train(net, resumed, 3)  # what it saw itself before it loads must not count
    net.load_state_dict(dict(copied(model(), stop)))
    resumed.load_state_dict(file)
    train(net, resumed, 30 - stop, first=stop)
    assert all(map(torch.equal, net.parameters(), whole.parameters()))


def copied(net, stop):
    train(net, attached(SophiaG, net, lr=1e-2, rho="auto"), stop)
    return net.state_dict()


def test_a_file_with_a_number_for_rho_goes_on_under_auto():
    net = model()
    optimizer = SophiaG(net.parameters(), rho=0.1)
    train(net, optimizer, 1)
    file = optimizer.state_dict()
    for group in file["param_groups"]:
        del group["target_unclipped"], group["rho_solved"]
    loaded = SophiaG(net.parameters(), rho="auto")
    loaded.load_state_dict(file)
    assert torch.is_tensor(loaded.param_groups[0]["rho"]) and loaded.param_groups[0]["rho"] == 0.1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rho": "high"}, "Invalid rho: 'high', expected a finite number >= 0 or 'auto'"),
        ({"target_unclipped": 1.0}, "Invalid target_unclipped: 1.0"),
        ({"rho": 0.0, "target_unclipped": 0.2}, r"target_unclipped: 0.2 with rho=0.0, expected None or a fraction"),
    ],
)
def test_bad_targets_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        SophiaG(model().parameters(), **options)


def test_groups_have_one_target():
    weight, bias = nn.Linear(2, 2).parameters()
    SophiaG([{"params": [weight]}, {"params": [bias], "rho": 0.1}], target_unclipped=0.2)
    with pytest.raises(ValueError, match="target_unclipped: None, expected 0.1 as in the first group"):
        SophiaG([{"params": [weight], "rho": "auto"}, {"params": [bias]}])


def test_one_compiled_graph_serves_every_rho():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        p = nn.Parameter(torch.ones(5))
        optimizer = SophiaG([p], lr=1e-2, rho="auto")
        graphs = CompileCounterWithBackend("aot_eager")
        step = torch.compile(optimizer.step, backend=graphs) if compiled else optimizer.step
        for i in range(12):
            p.grad = torch.full((5,), 0.1 + i)
            (step if i else optimizer.step)()
            if i % 2 == 0:
                optimizer.update_hessian()
        results.append((p.detach(), float(optimizer.param_groups[0]["rho"])))
    assert len([g for g in graphs.graphs if any("growkit" in str(node.target) for node in g.graph.nodes)]) == 1
    torch.testing.assert_close(results[0], results[1])
    assert results[0][1] != 0.04
