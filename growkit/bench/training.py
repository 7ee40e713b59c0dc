"""The workload of training itself: what a step costs with SophiaG, refreshes included, where fused AdamW was."""

import copy

import torch

from growkit.bench.measure import Case, paired
from growkit.optim import SophiaG
from growkit.optim.groups import param_groups

EVERY = 10  # steps between refreshes, and of one sample


def step(device, tiny=False):
    """Ten steps of GPT-2 small on random tokens under bfloat16 autocast, on the wall's clock: SophiaG and AdamW."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 8, "vocab_size": 41} if tiny else {}
    config = GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    device = torch.device(device)
    first = GPT2LMHeadModel(config).to(device)
    models = {"SophiaG": first} | {name: copy.deepcopy(first) for name in ("SophiaG, no refresh", "fused AdamW")}
    optimizers = {name: SophiaG(param_groups(model, 0.1), 3e-4) for name, model in models.items()}
    optimizers["fused AdamW"] = torch.optim.AdamW(param_groups(models["fused AdamW"], 0.1), 6e-4, fused=True)
    optimizers["SophiaG"].attach(first, every=EVERY)
    optimizers["SophiaG, no refresh"].attach(models["SophiaG, no refresh"], every=10**9)
    losses = []

    def train(name):
        def steps():
            losses.clear()
            for _ in range(EVERY):
                tokens = torch.randint(config.vocab_size, (8, config.n_positions), device=device)
                with torch.autocast(device.type, torch.bfloat16):
                    loss = models[name](input_ids=tokens, labels=tokens).loss
                loss.backward()
                optimizers[name].step()
                optimizers[name].zero_grad()
                losses.append(loss.detach())

        return steps

    def check():
        """Ten steps take one refresh and move every parameter; their losses are numbers."""
        before = [p.detach().clone() for p in first.parameters()]
        refreshes = optimizers["SophiaG"].stats()["refreshes"]
        train("SophiaG")()
        if optimizers["SophiaG"].stats()["refreshes"] != refreshes + 1:
            raise AssertionError("ten steps did not refresh the curvature once")
        if not torch.stack(losses).isfinite().all() or any(map(torch.equal, before, first.parameters())):
            raise AssertionError("ten steps left a parameter as it was, or the loss is not a number")

    def rows(rounds):
        pairs = paired({name: train(name) for name in models}, "wall", min(rounds, 5), sample=0)
        return {
            "N2.refreshed": pairs.ratio("SophiaG", "fused AdamW"),
            "N2.update": pairs.ratio("SophiaG, no refresh", "fused AdamW"),
        }

    return Case(train("SophiaG"), check, rows)
