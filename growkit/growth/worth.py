"""What a fit costs, in plain training steps of the grown model, and whether its losses show that it gained anything."""

import math
import statistics
from collections.abc import Sequence

FEWEST = 8  # losses of which a first and a last quarter say something


def plain_steps(steps: int, plain: float, expansion: Sequence[int], refreshes: int, accumulate: int) -> float:
    """FLOPs of `steps` operator steps over those of one step that trains the grown model on the same batches.

    plain: FLOPs of that one, forward and backward of all micro-batches. expansion: (forward, backward) of
    `LiGO.flops_per_expansion`. refreshes: of SophiaG's curvature, one more micro-batch and backward each.
    """
    spent = steps * (plain + sum(expansion)) + refreshes * (plain / accumulate + expansion[1])
    return spent / plain


def doubt(losses: Sequence[float], cost: float) -> str | None:
    """Why a fit may not have been worth its FLOPs, or None: its last losses are not below its first.

    Compared are means of the first and of the last quarter; a drop below its own standard error is none, as batches
    differ by more. Of fewer than `FEWEST` losses nothing is said.
    """
    if len(losses) < FEWEST:
        return None
    count = len(losses) // 4
    first, last = losses[:count], losses[-count:]
    drop = statistics.fmean(first) - statistics.fmean(last)
    noise = math.sqrt((statistics.variance(first) + statistics.variance(last)) / count)
    if drop > noise:
        return None
    return (
        f"fit: the loss fell by {drop:.2g} from the first to the last quarter of {len(losses)} steps, its standard "
        f"error is {noise:.2g}: no gain to be seen, at the FLOPs of {cost:.0f} plain training steps of the grown model"
    )
