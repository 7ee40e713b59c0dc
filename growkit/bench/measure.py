"""How two things are timed against each other: in turn, in one process, with the noise beside the ratio."""

import statistics
import time


def paired(a, b, rounds=9):
    """Process CPU time of a and b in turn: {a, b: least seconds; ratio: median of a/b per round; noise}.

    noise: the spread of b/b in the same rounds, as (90th percentile - 10th) of the ratio of two calls of b.
    """
    a(), b()
    times = []
    for _ in range(rounds):
        times.append([_seconds(f) for f in (a, b, b)])
    ratios = [x / (y + z) * 2 for x, y, z in times]
    repeats = statistics.quantiles([y / z for _, y, z in times], n=10)
    least = {"a": min(x for x, _, _ in times), "b": min(min(y, z) for _, y, z in times)}
    return {**least, "ratio": statistics.median(ratios), "noise": repeats[-1] - repeats[0]}


def _seconds(f):
    start = time.process_time()
    f()
    return time.process_time() - start
