"""The small optimizer's state, grown, against the state that the large model's own gradients leave."""

import copy

import pytest
import torch

from growkit import LiGO, SophiaG, SophiaH, param_groups
from growkit.growth.duals import duals
from growkit.growth.layout import matrices, pieces
from growkit.growth.state import acts

pytest.importorskip("transformers")

from growth.models import CONFIGS, batches, gpt2, model  # noqa: E402

WIDE, SMALL = (40, 5, 5, 77), (24, 3, 3, 50)
GROUPED = (24, 6, 3, 50, 3)
BERT = {"layer_norm_eps": 1e-14}  # its depth is lossless up to the norm's eps
CASES = {
    "gpt2-lossless": ("gpt2", "lossless", SMALL, WIDE, {}),
    "gpt2-lossless-untied": ("gpt2", "lossless", SMALL, WIDE, {"tie_word_embeddings": False}),
    "gpt2-layer-scaled": ("gpt2", "lossless", SMALL, (24, 3, 5, 77), {"scale_attn_by_inverse_layer_idx": True}),
    "gpt2-larger-heads": ("gpt2", "lossless", (24, 3, 2, None), (36, 3, 3, None), {}),
    "gpt2-lemon": ("gpt2", "lemon", SMALL, WIDE, {}),
    "gpt2-hypercloning": ("gpt2", "hypercloning", SMALL, (48, 6, 5, 77), {}),
    "bert-lossless": ("bert", "lossless", SMALL, (48, 6, 5, 77), BERT),
    "bert-zero-blocks": ("bert", "zero_blocks", SMALL, (24, 3, 5, 50), BERT),
    "llama-lossless": ("llama", "lossless", GROUPED, (40, 10, 5, 77, 5), {}),
    "llama-hypercloning": ("llama", "hypercloning", GROUPED, (48, 12, 5, 77, 6), {}),
    "llama-staged": ("llama", "staged", GROUPED, (48, 12, 5, 100, 6), {}),
    "llama-zero-pad-tied": ("llama", "zero_pad", GROUPED, (40, 10, 5, 77, 5), {"tie_word_embeddings": True}),
    "llama-zero-blocks": ("llama", "zero_blocks", GROUPED, (24, 6, 5, 50, 3), {}),
    "olmo2-lossless": ("olmo2", "lossless", GROUPED, (60, 12, 5, 77, 6), {}),
    "llama-larger-heads": ("llama", "lossless", (24, 3, 2, 50, 3), (24, 3, 2, 50, 3, 16), {}),
}


@pytest.fixture(autouse=True)
def _rms_norm_in_float64(monkeypatch):
    """transformers computes it in float32 whatever the model's dtype."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)

    for norm in (LlamaRMSNorm, Olmo2RMSNorm):
        monkeypatch.setattr(norm, "forward", forward)


def _config(family, sizes, options):
    if len(sizes) == 6:
        options = options | {"head_dim": sizes[5]}
    return CONFIGS[family](*sizes[:5], **options)


def _grown(family, start, small_size, big_size, options):
    small = model(_config(family, small_size, options))
    operator = LiGO(small, _config(family, big_size, options), start=start)
    return small, operator, operator.grow()


def _gather(model, optimizer, count=2):
    """Moments of the gradients of one set of weights."""
    for tokens in batches(count):
        batch = {"input_ids": tokens, "labels": tokens}
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if isinstance(optimizer, SophiaG):
            optimizer.refresh(model, [batch])
    return optimizer


def _frozen(params, kind=torch.optim.AdamW):
    return kind(params, lr=0.0, weight_decay=0.0)


def _told(operator, row, t, copied=False):
    """Elements of one large weight whose gradient follows from the small one's, as the pieces' matrices.

    copied: whose gradient is a multiple of that of one small element.
    """
    found = duals(operator, operator._source[t] if row.layered else 0)
    shapes = [M.shape for M in matrices(torch.empty(1, *row.shape), row.entries, operator._big)]
    for piece, (_, rows, columns) in zip(pieces(row.entries), shapes, strict=True):
        known, zero = torch.ones(rows, columns, dtype=torch.bool), torch.zeros(rows, columns, dtype=torch.bool)
        for side, view in ((piece.B, (-1, 1)), (piece.A, (1, -1))):
            dual = found.get(side)
            if dual is None:
                continue
            own = dual.known
            if hasattr(dual, "matrix"):
                nothing = (dual.matrix == 0).all(1)
                zero |= (own & nothing).view(view)
                own = own & ((dual.matrix != 0).sum(1) == 1) if copied else own
            known &= own.view(view)
        yield known if copied else known | zero


def _compare(operator, big, grown, own, key, near, copied):
    """Largest difference, relative to the largest element of the weight, of elements that are told."""
    parameters, worst, told = dict(big.named_parameters()), 0.0, 0
    scale = max(float(own.state[p][key].abs().max()) for p in parameters.values())
    for row in operator.rows:
        if near & {side for piece in pieces(row.entries) for side in piece.sides}:
            continue
        for t, name in enumerate(row.names):
            p = parameters[name]
            values = [matrices(o.state[p][key][None], row.entries, operator._big) for o in (grown, own)]
            if not acts(operator, row, t):
                assert key != "exp_avg" or not grown.state[p][key].any()
                assert key == "exp_avg" or (grown.state[p][key] != 0).any()
                continue
            for known, a, b in zip(_told(operator, row, t, copied), *values, strict=True):
                worst = max(worst, float(((a - b)[0].abs() * known).max()) / max(float(b.abs().max()), 1e-6 * scale))
                told += int(known.sum())
    assert told
    return worst


@pytest.mark.parametrize("case", CASES)
def test_grown_moments_are_those_of_the_large_models_own_gradients(case):
    small, operator, big = _grown(*CASES[case])
    kind = SophiaG if case == "gpt2-layer-scaled" else torch.optim.AdamW
    optimizer = _gather(small, _frozen(small.parameters(), kind))
    grown = operator.grow_optimizer(optimizer, big)
    own = _gather(big, _frozen(big.parameters(), kind))
    # What writes to a norm whose input is widened gets the norm's projections, too: near, not exact, but where new
    # coordinates are zero and no mean is subtracted.
    near, growth = set(), operator._growth
    if growth.ratio > 1 and (growth.copied or growth.family.residual.norm == "layer"):
        near = {"residual_write", "head_write"}
        if growth.family.residual.post_norm:
            near |= {"residual_gain", "residual_shift"}
    if growth.start.width == "doubled":  # each half reads its own half, so that those projections are in every gradient
        near = operator.maps.keys() - {"head_gain", "head_read"}
    assert _compare(operator, big, grown, own, "exp_avg", near, copied=False) < 1e-10
    second = "hessian" if kind is SophiaG else "exp_avg_sq"
    assert _compare(operator, big, grown, own, second, near, copied=True) < 1e-10
    assert _pulled_back(operator, big, grown, optimizer, small) < 1e-12


def _pulled_back(operator, big, grown, optimizer, small):
    """Of the chain rule: the small gradient is the large one through the derivative of the growth, near or exact."""
    parameters, worst = dict(small.named_parameters()), 0.0
    for row in operator.rows:
        for key in row.keys:
            operator.get_buffer(f"small_{key}").requires_grad_()
    expanded = operator.expand()
    total = sum((grown.state[p]["exp_avg"] * expanded[name]).sum() for name, p in big.named_parameters())
    total.backward()
    for row in operator.rows:
        stack = torch.stack([optimizer.state[parameters[name]]["exp_avg"] for name in row.small_names])
        for key, m in zip(row.keys, matrices(stack, row.entries, operator._small), strict=True):
            got = operator.get_buffer(f"small_{key}").grad[: len(m)]
            worst = max(worst, float((got - m).abs().max() / stack.abs().max()))
    return worst


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, SophiaG, SophiaH])
def test_where_nothing_grows_the_next_step_is_the_same(kind):
    small, operator, big = _grown("gpt2", "lossless", SMALL, SMALL, {})
    optimizer = _gather(small, kind(small.parameters(), lr=1e-3))
    big.load_state_dict(small.state_dict())
    grown = operator.grow_optimizer(optimizer, big)
    assert type(grown) is kind
    for trained, by in ((small, optimizer), (big, grown)):
        _gather(trained, by, 1)
    assert all(p.equal(q) for p, q in zip(small.parameters(), big.parameters(), strict=True))


def test_hutchinson_curvature_of_a_scaled_gain_follows_its_square():
    """The exact diagonal of the Hessian, so that no probe stands between."""
    small, operator, big = _grown("gpt2", "lossless", (8, 1, 1, 12), (16, 2, 1, 20), {})
    name, diagonals = "transformer.h.0.ln_2.weight", []
    tokens = next(batches(1))
    for each in (small, big):
        p = dict(each.named_parameters())[name]

        def loss(value, each=each):
            logits = torch.func.functional_call(each, {name: value}, (tokens,)).logits  # the model's loss is float32
            return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            diagonals.append(torch.func.hessian(loss)(p.detach()).diagonal())
    optimizer = _gather(small, _frozen(small.parameters(), SophiaH), 1)
    parameter = dict(small.named_parameters())[name]
    optimizer.state[parameter]["hessian"].copy_(diagonals[0])
    grown = operator.grow_optimizer(optimizer, big)
    h = grown.state[dict(big.named_parameters())[name]]["hessian"]
    torch.testing.assert_close(h[:8], diagonals[1][:8], rtol=1e-9, atol=0)
    assert not diagonals[1][8:].any() and h[8:].all()


def test_groups_options_and_counts_are_kept_by_name():
    small, operator, big = _grown("gpt2", "lossless", SMALL, WIDE, {})
    optimizer = SophiaG(param_groups(small, 0.3), lr=2e-3, betas=(0.9, 0.95), rho=0.1, seed=7, clip_grad_norm=1.0)
    optimizer.attach(small, every=2)
    for tokens in batches(3):
        small(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    before = copy.deepcopy(optimizer.state_dict())
    grown = operator.grow_optimizer(optimizer, big)
    expected = [[name for name, _ in group["params"]] for group in param_groups(big, 0.3)]
    assert [group["param_names"] for group in grown.param_groups] == expected
    for own, group in zip(optimizer.param_groups, grown.param_groups, strict=True):
        for key in own.keys() - {"params", "param_names"}:
            assert own[key] == group[key], key
            assert not isinstance(own[key], torch.Tensor) or own[key] is not group[key]
    assert grown.defaults == optimizer.defaults
    for group in grown.param_groups:
        steps = {id(grown.state[p]["step"]) for p in group["params"]}
        assert len(steps) == 1 and float(grown.state[group["params"][0]]["step"]) == 3
    optimizer.detach()
    after = optimizer.state_dict()
    assert all(torch.equal(x, after["state"][i][k]) for i, s in before["state"].items() for k, x in s.items())
    grown.attach(big, every=2)
    _train_once(big, grown)
    assert int(grown.param_groups[0]["steps"]) == 4


def _train_once(model, optimizer):
    tokens = next(batches(1))
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()


def test_a_part_of_the_parameters_and_those_without_state():
    small, operator, big = _grown("gpt2", "lossless", SMALL, WIDE, {})
    named = dict(small.named_parameters())
    chosen = [named[f"transformer.h.{layer}.mlp.c_fc.weight"] for layer in (0, 2)]
    optimizer = torch.optim.AdamW(chosen, lr=torch.tensor(1e-3), amsgrad=True)
    chosen[0].grad = torch.ones_like(chosen[0])
    optimizer.step()
    grown = operator.grow_optimizer(optimizer, big)
    names = {p: name for name, p in big.named_parameters()}
    layers = [int(names[p].split(".")[2]) for p in grown.param_groups[0]["params"]]
    assert layers == [t for t, source in enumerate(operator._source) if source in (0, 2)]
    assert [operator._source[int(names[p].split(".")[2])] for p in grown.state] == [0] * operator._source.count(0)
    assert grown.state[grown.param_groups[0]["params"][0]]["max_exp_avg_sq"].shape == (40, 77)
    assert grown.param_groups[0]["lr"] == 1e-3 and grown.param_groups[0]["lr"] is not optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.bfloat16, {"state_dtype": torch.bfloat16}),
        (torch.bfloat16, {"bf16_update": "master"}),
        (torch.float32, {"state_dtype": "8bit"}),
    ],
    ids=["bf16-state", "master", "8bit"],
)
def test_other_forms_of_state_are_converted(dtype, options):
    sizes = (64, 2, 1, 128), (96, 3, 2, 192)
    small = model(gpt2(*sizes[0]), dtype)
    operator = LiGO(small, gpt2(*sizes[1]))
    big = operator.grow()
    optimizer = _gather(small, SophiaG(small.parameters(), lr=1e-3, **options))
    plain = copy.deepcopy(optimizer)
    grown = operator.grow_optimizer(optimizer, big)
    name = "transformer.h.0.mlp.c_fc.weight"
    p, old = dict(big.named_parameters())[name], dict(small.named_parameters())[name]
    state, own = grown.state[p], optimizer.state[old]
    if "exp_avg_scale" not in state:
        torch.testing.assert_close(state["exp_avg"][:64, :128], own["exp_avg"])
    before = p.detach().clone()
    _train_once(big, grown)
    assert p.isfinite().all() and not p.equal(before)
    assert {k: t.dtype for k, t in state.items()} == {k: t.dtype for k, t in own.items()}
    assert all(torch.equal(a, b) for s, t in zip(plain.state.values(), optimizer.state.values(), strict=True)
               for a, b in zip(s.values(), t.values(), strict=True))  # fmt: skip


def test_what_cannot_be_grown_is_refused_by_name():
    small, operator, big = _grown("gpt2", "lossless", SMALL, WIDE, {})
    adam = torch.optim.AdamW(small.parameters())
    with pytest.raises(TypeError, match="optimizer: got SGD, expected one of Adam, AdamW, SophiaG, SophiaH"):
        operator.grow_optimizer(torch.optim.SGD(small.parameters()), big)
    other = model(gpt2(*SMALL))
    with pytest.raises(ValueError, match="optimizer: parameter 0 of group 0.* is none of the small model"):
        operator.grow_optimizer(torch.optim.AdamW(other.parameters()), big)
    named = operator.grow_optimizer(torch.optim.AdamW(other.named_parameters(), lr=0.5), big)  # the same, by name
    assert named.param_groups[0]["lr"] == 0.5 and not named.state
    with pytest.raises(ValueError, match="optimizer: has parameters of two models"):
        operator.grow_optimizer(torch.optim.AdamW([*other.named_parameters(), *_renamed(small)]), big)
    with pytest.raises(ValueError, match=r"big_model: transformer.h.0.attn.c_attn.bias is \[72\], expected \[120\]"):
        operator.grow_optimizer(adam, small)
    small.config.architectures = ["GPT2LMHeadModel"]
    of_weights = LiGO(small.config, gpt2(*WIDE), weights=dict(small.named_parameters()))
    with pytest.raises(ValueError, match="optimizer: this operator was made of a config and weights"):
        of_weights.grow_optimizer(adam, big)


def _renamed(small):
    return [(f"module.{name}", p) for name, p in small.named_parameters()]
