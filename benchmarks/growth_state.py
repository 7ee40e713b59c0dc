"""How near the grown state of an optimizer is to what the large model's own gradients would have left, as a table.

    python benchmarks/growth_state.py [--families gpt2 llama bert ...] [--starts lossless hypercloning ...]

Small models with random parameters, grown in every direction at once, in float64 (RMSNorm too, which transformers
computes in float32). Small and large model see the same batches with weights that stay, so that the means of their
gradients can be compared element by element; then both take one step. Columns:
    m same      elements of the grown m that are the large model's to 1e-10 of the weight's largest
    m off       |m_grown - m_own| / |m_own| over the elements where the grown m is not 0
    m untold    the part of |m_own|^2 in elements where the grown m is 0
    v, h same   of AdamW's v and SophiaG's h, in elements where the grown m is not 0
    next step   max |logit_large - logit_small| after one step of both, by how far that step moved the small model's
                logits: where only elements with a grown m step, where all do, and with a new optimizer. 0: growth and
                step commute
Needs `pip install 'growkit[hf]'`, half a minute of one CPU core and no download.
"""

import argparse
import warnings

import torch
import transformers
from growth_table import FAMILIES, batch, random_model, sizes

from growkit import LiGO, SophiaG

STARTS = ("lossless", "zero_blocks", "hypercloning", "lemon", "zero_pad")
KINDS = {torch.optim.AdamW: "exp_avg_sq", SophiaG: "hessian"}


def rms_norm(self, x):
    return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)


def train(model, optimizer, steps, refresh=True):
    for step in range(steps):
        inputs = batch(model, step)
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if refresh and isinstance(optimizer, SophiaG):
            optimizer.refresh(model, [inputs])
    return optimizer


def close(a, b):
    return (a - b).abs() <= 1e-10 * b.abs().max() + 1e-14


def states(big, grown, own, key):
    """Same and told elements, squared norms of the difference where told, and of the large model's where not."""
    same = told = count = 0
    off = told_norm = untold_norm = 0.0
    for p in big.parameters():
        m, other = grown.state[p]["exp_avg"], own.state[p]["exp_avg"]
        has = m != 0
        a, b = grown.state[p][key], own.state[p][key]
        same += int((close(a, b) & (has | (key == "exp_avg"))).sum())
        told, count = told + int(has.sum()), count + p.numel()
        off += float((m - other)[has].square().sum())
        told_norm += float(other[has].square().sum())
        untold_norm += float(other[~has].square().sum())
    share = same / (count if key == "exp_avg" else told)
    return share, (off / told_norm) ** 0.5, untold_norm / (told_norm + untold_norm)


@torch.no_grad()
def logits(model):
    inputs = {name: x for name, x in batch(model, 99).items() if name != "labels"}
    return model(**inputs).logits


def step_apart(operator, state, kind, lr=1e-4):
    """The column "next step", for told elements alone, all, and a new optimizer."""
    found = []
    for elements in ("told", "all", "new"):
        small, large = operator.small_model(), operator.grow()
        optimizer = kind(small.named_parameters(), lr=lr, weight_decay=0.0)
        optimizer.load_state_dict(state)
        grown = operator.grow_optimizer(optimizer, large)
        for group in (*optimizer.param_groups, *grown.param_groups):
            group["lr"] = lr
        if elements == "new":
            grown = kind(large.parameters(), lr=lr, weight_decay=0.0)
        untold = [grown.state[p]["exp_avg"] == 0 for p in large.parameters()] if elements == "told" else []
        start, before = [p.detach().clone() for p in large.parameters()], logits(small)
        train(small, optimizer, 1, refresh=False)
        train(large, grown, 1, refresh=False)
        with torch.no_grad():
            for p, old, held in zip(large.parameters(), start, untold, strict=False):
                p.copy_(torch.where(held, old, p))
        after, other = logits(small), logits(large)
        found.append(float((other - after).abs().max() / (after - before).abs().max()))
    return found


def run(family, start, steps):
    name, config, _ = FAMILIES[family]
    small_size, big_size = sizes(family, start)
    configs = config(*small_size), config(*big_size)
    for each in configs:
        if hasattr(each, "layer_norm_eps"):  # so that new layers of a post-norm family add nothing to rounding
            each.layer_norm_eps = 1e-14
    small = random_model(name, configs[0], torch.float64)
    operator = LiGO(small, configs[1], start=start)
    cells, step_cells = [], []
    for kind, second in KINDS.items():
        big = operator.grow()
        optimizer = train(small, kind(small.named_parameters(), lr=0.0, weight_decay=0.0), steps)
        grown = operator.grow_optimizer(optimizer, big)
        own = train(big, kind(big.parameters(), lr=0.0, weight_decay=0.0), steps)
        share, off, untold = states(big, grown, own, "exp_avg")
        if not cells:
            cells += [f"{share:.0%}", f"{off:.0e}", f"{untold:.0%}"]
        cells.append(f"{states(big, grown, own, second)[0]:.0%}")
        step_cells.append(" ".join(f"{apart:.2g}" for apart in step_apart(operator, optimizer.state_dict(), kind)))
    return cells + step_cells


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=["gpt2", "bert", "llama"], choices=FAMILIES)
    parser.add_argument("--starts", nargs="+", default=STARTS, choices=STARTS)
    parser.add_argument("--steps", type=int, default=5, help="batches behind the state")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    transformers.models.llama.modeling_llama.LlamaRMSNorm.forward = rms_norm
    print("| family | start | m same | m off | m untold | v same | h same | next step AdamW | next step SophiaG |")
    print("|---|---|---|---|---|---|---|---|---|")
    for family in options.families:
        for start in options.starts:
            if start == "zero_pad" and family == "gpt2":  # changes the function
                continue
            print(f"| {family} | {start} | " + " | ".join(run(family, start, options.steps)) + " |", flush=True)


if __name__ == "__main__":
    main()
