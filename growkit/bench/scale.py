"""Memory and time by arithmetic, for models that are not run here: the tables of docs/scale.md.

    python -m growkit.bench.scale

Times are floors: bytes over a copy's bandwidth, FLOPs over a peak rate. H200 holds the figures they are divided by.
"""

import math
from typing import NamedTuple

from growkit.bench import sophia
from growkit.kron import plan

# Measured on one H200: a copy of 4 GiB (read and write, bytes/s), products of 8192 x 8192 matrices by torch (FLOP/s).
H200 = {"copy": 4.28e12, "fp32": 51e12, "tf32": 413e12}

# name of a format -> bytes of parameter, gradient, state; bytes that a step reads and writes, for each parameter
FORMATS = {
    "float32": (4, 4, 8, 24),
    "bfloat16, stochastic": (2, 2, 8, 18),
    "bfloat16, master": (2, 2, 12, 24),
}
REFRESH = 12  # bytes a float32 refresh reads and writes for each parameter: g, h, h

# name -> shapes, GPUs to shard over
MODELS = {
    "GPT-2 small": (sophia.gpt2_shapes(12, 768), 1),
    "GPT-2 medium": (sophia.gpt2_shapes(24, 1024), 1),
    "GPT-2 XL": (sophia.gpt2_shapes(48, 1600), 1),
    "LLaMA 7B": (sophia.llama_shapes(32, 4096, 11008), 8),
    "LLaMA 8B": (sophia.llama_shapes(32, 4096, 14336, 128256, 1024), 8),
    "LLaMA 70B": (sophia.llama_shapes(80, 8192, 28672, 128256, 1024), 64),
}


def elements(shapes):
    return sum(math.prod(shape) for shape in shapes)


def shard_elements(shapes, gpus):
    """Elements that the fullest GPU holds under FSDP2, which splits each parameter along its first axis, rounded up."""
    return sum(-(-shape[0] // gpus) * math.prod(shape[1:]) for shape in shapes)


def memory(shapes, gpus, form):
    """Bytes per GPU of (state, parameters and gradients and state), all sharded."""
    p, g, state, _ = FORMATS[form]
    held = shard_elements(shapes, gpus)
    return held * state, held * (p + g + state)


def step_floor(shapes, gpus, form):
    """Seconds of one update: what the fullest GPU reads and writes, over copy bandwidth."""
    return shard_elements(shapes, gpus) * FORMATS[form][3] / H200["copy"]


def refresh_floor(shapes, gpus):
    """Seconds of folding one refresh's float32 gradient into h."""
    return shard_elements(shapes, gpus) * REFRESH / H200["copy"]


def refresh_flops(every, accumulate=1):
    """Training FLOPs of a GNB refresh as a fraction of those between two: it repeats one micro-batch of
    every * accumulate."""
    return 1 / (every * accumulate)


class Blocks(NamedTuple):
    """The blocks of a model: layers, width, MLP width, width of keys and values, matrices of the MLP."""

    layers: int
    d: int
    f: int
    k: int
    mlp: int

    def matrices(self):
        d, f, k = self.d, self.f, self.k
        return [(d, d), (k, d), (k, d), (d, d), *([(f, d)] * (self.mlp - 1)), (d, f)]


# small, large
GROWTH = {
    "GPT-2 small to medium": (Blocks(12, 768, 3072, 768, 2), Blocks(24, 1024, 4096, 1024, 2)),
    "GPT-2 medium to XL": (Blocks(24, 1024, 4096, 1024, 2), Blocks(48, 1600, 6400, 1600, 2)),
    "LLaMA 1B to 7B": (Blocks(22, 2048, 5632, 2048, 3), Blocks(32, 4096, 11008, 4096, 3)),
    "LLaMA 8B to 70B": (Blocks(32, 4096, 14336, 1024, 3), Blocks(80, 8192, 28672, 1024, 3)),
}


class Growth(NamedTuple):
    """Counted for all blocks with [I; C] maps, one set for all layers. bytes: small read and large written, float32.

    small, large: parameters. stack: elements of the small weights of the largest module type, all layers.
    """

    flops: int
    backward_flops: int
    bytes: int
    small: int
    large: int
    stack: int


def growth(small, large):
    def axis(old, new):
        return plan.Axis("identity" if old == new else "identity_top", old, new)

    flops = backward = read = written = stack = 0
    for (o1, i1), (o2, i2) in zip(small.matrices(), large.matrices(), strict=True):
        problem = small.layers, large.layers, axis(o1, o2), axis(i1, i2)
        cost = plan.cost(plan.best_order(*problem), *problem)
        flops, backward = flops + cost.flops, backward + cost.backward_flops
        read += small.layers * o1 * i1
        written += large.layers * o2 * i2
        stack = max(stack, small.layers * o1 * i1)
    return Growth(flops, backward, 4 * (read + written), read, written, stack)


def growth_floor(counted, rate):
    """Seconds of one expansion: the longer of its FLOPs at a peak rate and its bytes at copy bandwidth."""
    return max(counted.flops / H200[rate], counted.bytes / H200["copy"])


def fit_floor(counted, steps, rate):
    """Seconds that `fit` spends in expansions and their gradients, the large model's own training left out."""
    backward = max(counted.backward_flops / H200[rate], counted.bytes / H200["copy"])
    return steps * (growth_floor(counted, rate) + backward)


def grow_memory(counted, nbytes=2):
    """Bytes that `LiGO.grow` holds at once for the blocks, at most: small model and its stacked copy, large model, the
    float32 stack of one module type if the copy is narrower, and intermediates, which go in panels.

    nbytes: of an element of both models.
    """
    panels = 3 * plan.PENDING_BYTES  # blocks that wait for the mix; an intermediate and the next
    return 2 * nbytes * counted.small + nbytes * counted.large + (4 * counted.stack if nbytes < 4 else 0) + panels


def state_table():
    rows = [["model", "parameters", "GPUs", *(f"{form}: state, all" for form in FORMATS)]]
    for name, (shapes, gpus) in MODELS.items():
        sizes = (memory(shapes, gpus, form) for form in FORMATS)
        cells = (f"{state / 1e9:.2f}, {total / 1e9:.2f} GB" for state, total in sizes)
        rows.append([name, f"{elements(shapes) / 1e9:.3f} B", str(gpus), *cells])
    return _markdown(rows)


def step_table():
    rows = [["model", "GPUs", *(f"{form} step" for form in FORMATS), "refresh, float32"]]
    for name, (shapes, gpus) in MODELS.items():
        floors = [step_floor(shapes, gpus, form) for form in FORMATS] + [refresh_floor(shapes, gpus)]
        rows.append([name, str(gpus), *(f"{1e3 * floor:.3f} ms" for floor in floors)])
    return _markdown(rows)


def growth_table():
    rows = [
        [
            "growth of the blocks",
            "parameters",
            "TFLOP, backward",
            "GB",
            "fp32, TF32 floor",
            "100 steps, TF32",
            "`grow()` holds",
        ]
    ]
    for name, pair in GROWTH.items():
        counted = growth(*pair)
        rows.append(
            [
                name,
                f"{counted.small / 1e9:.3f} to {counted.large / 1e9:.3f} B",
                f"{counted.flops / 1e12:.3g}, {counted.backward_flops / 1e12:.3g}",
                f"{counted.bytes / 1e9:.3g}",
                ", ".join(f"{1e3 * growth_floor(counted, rate):.4g} ms" for rate in ("fp32", "tf32")),
                f"{fit_floor(counted, 100, 'tf32'):.3g} s",
                f"{grow_memory(counted) / 1e9:.3g} GB",
            ]
        )
    return _markdown(rows)


def _markdown(rows):
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


if __name__ == "__main__":
    print("\n\n".join(table() for table in (state_table, step_table, growth_table)))
