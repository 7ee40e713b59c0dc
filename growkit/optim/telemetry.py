"""How a run fares, told without making the host wait: warnings, metrics, and the rho of rho="auto".

Counts and sums are formed on the device, added up over the processes in a refresh's one reduction, and copied to pinned
memory behind an event. Warnings and metrics take what has arrived; rho="auto" goes by what was sent a refresh ago, and
waits for the device only when it is solved for the first time.
"""

import functools
import itertools

import torch

from growkit import reference
from growkit.reference.sophia8bit import CODES_PER_SCALE

# Elements that quantiles and the cosine are taken of, evenly spread over all parameters.
SAMPLE = 1 << 16
QUANTILES = {"h_q10": 0.1, "h_q50": 0.5, "h_q90": 0.9}

# rho="auto": what it starts from, the middle of the official range; the fraction of elements that it is to leave
# unclipped, the lower end of what the authors call healthy; at most how many of those with curvature that may take; how
# far a refresh takes log(rho) towards what the one before it solved; and how far rho may get.
START, TARGET, MOST, GAIN = 0.04, 0.1, 0.9, 0.5
SMALLEST, LARGEST = START / 1e5, START * 1e5

# Quantiles come from counts of the elements up to each of these edges, 2^(1/8) apart: of h, and of |m|/(rho*bs*h), with
# mbar for m where that is what a step clips.
_PER_OCTAVE = 8
_H_OCTAVES, _FACTOR_OCTAVES = (-128, 64), (-32, 32)
_COSINE = 3  # sums: u.g, u.u, g.g


class Telemetry:
    """What belongs to one optimizer in one process."""

    def __init__(self):
        self._sent = None  # (events, {name: copy on the host}) of the last refresh
        self._arrived = {}  # {name: number} of the last refresh whose copies are known to be there
        self._products = []  # (a parameter of the bucket, u.g, u.u and g.g) for each bucket of the last due step
        self._ahead = []  # (group, a parameter of the bucket, mbar, h) for each bucket with `nesterov` of that step
        self._all_clipped = False

    def after_step(self, prepared, denominator, starts, scale, skip):
        """Keep what the cosine of the update u just taken, apart from decay, and the gradient g is formed from.

        So is what only this step's gradients tell, mbar of groups with `nesterov`. starts: how many elements come
        before each parameter, whole and of all processes, and at last how many there are. scale, skip: of this step, as
        the ops take them.
        """
        self._products, self._ahead = [], []
        for group, bucket, (m, h, g) in _samples(prepared, starts, "exp_avg", "hessian", "g"):
            if group["nesterov"]:
                m = _mbar(m, g, group, scale, skip)
                self._ahead.append((group, bucket["whole"], m, h))
            d = float(group["rho"]) * float(group["bs"]) * h
            d = d + group["eps"] if denominator == "add" else d.clamp(min=group["eps"])
            # In double, for squares of small gradients vanish in float32.
            u, g = (m / d).clamp(-1, 1).double(), g.double() * (-1 if group["maximize"] else 1)
            self._products.append((bucket["whole"], torch.stack([u @ g, u @ u, g @ g])))

    def sums(self, prepared, starts, share, device):
        """What metrics and rho are formed from, as a vector to be summed over the processes.

        It is made before the estimate is folded in, so it speaks of the h that the last steps went by. share(p): what
        a sum over a parameter's elements on this process counts for in the sum over all.
        """
        h_edges, factor_edges = _edges(device)
        products = torch.zeros(_COSINE, dtype=torch.float64, device=device)
        for p, own in self._products:
            products += share(p) * own.to(device)
        spread = torch.zeros(1 + len(h_edges), dtype=torch.float64, device=device)
        counts = torch.zeros(2 + len(factor_edges), dtype=torch.float64, device=device)
        now = []
        for group, bucket, (m, h) in _samples(prepared, starts, "exp_avg", "hessian"):
            h = h.to(device).double()
            spread += share(bucket["whole"]) * torch.cat([h.new_full((1,), len(h)), _up_to(h_edges, h)])
            if all(group is not other for other, *_ in self._ahead):  # or no step has been seen: m is what is known
                now.append((group, bucket["whole"], m, h))
        for group, whole, m, h in (*now, *self._ahead):
            m, h = m.to(device).abs().double(), h.to(device).double()
            moved, curved = m != 0, (m != 0) & (h > 0)
            factor = torch.where(curved, m / (h * (float(group["rho"]) * float(group["bs"]))), float("inf"))
            numbers = torch.stack([moved.sum(), curved.sum()])
            counts += share(whole) * torch.cat([numbers, _up_to(factor_edges, factor)])
        return torch.cat([products, spread, counts])

    def after_refresh(self, sums, gradient_norm, fraction, skipped, group):
        """Send the metrics of a refresh on their way to the host. Returns the rho that its sums solve for, or 0.

        sums: `self.sums` of all processes. gradient_norm, fraction (of elements not clipped, or None), skipped: 0-d
        tensors. group: the first one, as it was in the step before.
        """
        h_edges, factor_edges = _edges(sums.device)
        (ug, uu, gg), (n,), up_to_h, (moved, curved), up_to_factor = sums.split(
            [_COSINE, 1, len(h_edges), 2, len(factor_edges)]
        )
        levels = torch.stack([level * n for level in QUANTILES.values()])
        found = dict(zip(QUANTILES, _at(levels, up_to_h, h_edges).unbind(), strict=True))
        values = {"skipped": skipped, "refresh_grad_norm": gradient_norm, "unclipped": fraction}
        values |= {"update_grad_cosine": ug / (uu * gg).sqrt()}
        refreshes = int(group["refreshes"])
        values |= found if refreshes else {}  # h is 0 before the first
        if group["target_unclipped"] is not None:
            # What has no gradient is unclipped under any rho, and what has no curvature under none.
            level = torch.minimum(group["target_unclipped"] * moved, MOST * curved)
            rho = float(group["rho"]) * _at(level[None], up_to_factor, factor_edges)[0]
            values["rho_solved"] = torch.where(curved > 0, rho.clamp(SMALLEST, LARGEST), 0.0)
        copies = {name: _on_its_way(value) for name, value in values.items() if value is not None}
        streams = {torch.cuda.current_stream(v.device) for v in values.values() if v is not None and v.is_cuda}
        self._sent = [stream.record_event() for stream in streams], {"refreshes": refreshes + 1, **copies}
        return values.get("rho_solved")

    def receive(self, wait=False):
        """{name: number} of the last refresh whose numbers have arrived, or with `wait` of the last one."""
        if self._sent is not None:
            events, copies = self._sent
            for event in events if wait else ():
                event.synchronize()
            if all(event.query() for event in events):
                self._arrived = {name: float(value) for name, value in copies.items()}
                self._sent = None
        return self._arrived

    def warn(self, optimizer):
        """Warn of what an earlier refresh told."""
        if self._sent is None:
            return
        name, told = type(optimizer).__name__, self.receive()
        if self._sent is not None:
            return
        if told["skipped"]:
            optimizer._warn_once(
                "skipped",
                f"{name} skipped a curvature refresh that was not finite or had no labels; "
                "stats()['skipped'] counts them",
            )
        all_clipped = told["refreshes"] > 3 and told.get("unclipped") == 0
        if all_clipped and self._all_clipped:  # twice running, for a single step may have been skipped
            optimizer._warn_once(
                "all clipped",
                f"{name} clips every element, so h has no effect: raise rho, or check bs and the loss that the refresh "
                "differentiates",
            )
        self._all_clipped = all_clipped


def move(group, told, solved):
    """The factor of rho for the steps to come: (aim/rho)^GAIN, the aim being what the refresh before this one solved.

    told: by that refresh, empty where it belongs to a file. solved: what this one found, 0 while h is 0: the first that
    is not is taken as it is, and waited for.
    """
    aim, gain = told.get("rho_solved", 0.0) if told else float(group["rho_solved"]), GAIN
    if aim == 0:
        aim, gain = float(solved), 1.0
    rho = max(float(group["rho"]), SMALLEST)  # a schedule may have set it
    return (aim / rho) ** gain if aim > 0 else 1.0


def _mbar(m, g, group, scale, skip):
    """mbar of the step that left m, of samples of m and g; of a step that was skipped m."""
    beta1 = group["betas"][0]
    gain = beta1 - 1 if group["maximize"] else 1 - beta1
    mbar = beta1 * m + gain * (g if scale is None else g * scale.to(g.device))
    return mbar if skip is None else torch.where(skip.to(m.device) != 0, m, mbar)


def _samples(prepared, starts, *names):
    """(group, bucket, [elements of each list]) for each bucket: the same of every list, SAMPLE of all or a few more.

    Which ones are taken does not depend on how they are spread over processes.
    """
    every = max(1, starts[-1] // SAMPLE)
    for group, buckets in prepared:
        for bucket in buckets:
            # Codes go by whole blocks, so everything beside them does.
            unit = CODES_PER_SCALE if "exp_avg_scale" in bucket else 1
            places = list(_places(bucket, starts, every, unit))
            yield group, bucket, [_sample(bucket, name, every, unit, places) for name in names]


def _places(bucket, starts, every, unit):
    """(index in the bucket, first of the sample's units in it, how many), of the tensors that have any."""
    offsets = bucket["key"].get("offset") or itertools.repeat(0)
    for i, (t, parameter, offset) in enumerate(zip(bucket["p"], bucket["key"]["parameter"], offsets, strict=False)):
        first = -((starts[parameter] + offset) // unit) % every
        size = len(range(first, t.numel() // unit, every))
        if size:
            yield i, first, size


def _sample(bucket, name, every, unit, places):
    """The elements of one list, as float32, in few operations for each tensor."""
    tensors, scales = bucket[name], bucket.get(name + "_scale")
    rows, beside = [tensors[0].new_empty(0, unit)], scales and [scales[0].new_empty(0, 2)]
    for i, first, size in places:
        t = tensors[i].contiguous()
        rows.append(t.as_strided((size, unit), (every * unit, 1), t.storage_offset() + first * unit))
        if scales is not None:
            beside.append(scales[i][first::every][:size])
    rows = torch.cat(rows)
    return (rows if scales is None else reference.dequantise(rows, torch.cat(beside))).reshape(-1).float()


@functools.cache
def _edges(device):
    """Of the bins that h is counted in, whose sign may be either, and of those of |m|/(rho*bs*h)."""
    h, factor = (
        torch.arange(low * _PER_OCTAVE, high * _PER_OCTAVE + 1, dtype=torch.float64).div(_PER_OCTAVE).exp2()
        for low, high in (_H_OCTAVES, _FACTOR_OCTAVES)
    )
    return torch.cat([-h.flip(0), h.new_zeros(1), h]).to(device), factor.to(device)


def _up_to(edges, x):
    """How many elements of x are at most each of the edges."""
    return torch.searchsorted(x.sort().values, edges, right=True).double()


def _at(levels, up_to, edges):
    """Where the count `up_to` of elements reaches each of the levels: within a bin, as if they were spread evenly."""
    j = torch.searchsorted(up_to, levels).clamp(1, len(edges) - 1)
    below, above, low, high = up_to[j - 1], up_to[j], edges[j - 1], edges[j]
    part = ((levels - below) / (above - below).clamp(min=torch.finfo(levels.dtype).tiny)).clamp(0, 1)
    return torch.where(high == 0, 0.0, low + part * (high - low))


def _on_its_way(value):
    """A copy on the host of a 0-d tensor, which arrives when its stream gets there."""
    if not value.is_cuda:
        return value.clone()
    return torch.empty_like(value, device="cpu", pin_memory=True).copy_(value, non_blocking=True)
