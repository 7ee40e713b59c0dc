"""How a run fares, told without making the host wait: warnings, metrics, and what rho="auto" goes by.

Everything is formed on the device at a refresh and copied to pinned memory behind an event. Warnings and metrics take
what has arrived; only rho="auto" would wait, at the next refresh, for a copy that was sent at the last one.
"""

import math

import torch
from torch.nn.functional import cosine_similarity

from growkit import reference
from growkit.reference.sophia8bit import CODES_PER_SCALE

# Elements that quantiles and the cosine are taken of, evenly spread over all parameters.
SAMPLE = 1 << 16
QUANTILES = {"h_q10": 0.1, "h_q50": 0.5, "h_q90": 0.9}

# rho="auto": what it stands for, the middle of the official range and of what the authors call healthy; how far one
# refresh moves rho; and how far all of them, for where h stays 0 no rho is large enough.
START, TARGET = 0.04, 0.2
GAIN, LIMIT = 0.5, math.log(2)
SMALLEST, LARGEST = START / 1e5, START * 1e5


class Telemetry:
    """What belongs to one optimizer in one process."""

    def __init__(self):
        self._sent = None  # (events, {name: copy on the host}) of the last refresh
        self._arrived = {}  # {name: number} of the last refresh whose copies are known to be there
        self._cosine = None
        self._all_clipped = False

    def after_due_step(self, prepared, denominator):
        """Keep the cosine of the update just taken, apart from decay, and the gradient it was taken for."""
        updates, gradients = [], []
        for group, (m, h, g) in _samples(prepared, "exp_avg", "hessian", "g"):
            d = float(group["rho"]) * float(group["bs"]) * h
            d = d + group["eps"] if denominator == "add" else d.clamp(min=group["eps"])
            updates.append((m / d).clamp(-1, 1))
            gradients.append(-g if group["maximize"] else g)
        home = updates[0].device if updates else None
        u, g = (torch.cat([t.to(home) for t in each]) if each else None for each in (updates, gradients))
        # Two units, so that no square of a small gradient is lost.
        self._cosine = None if u is None else cosine_similarity(_unit(u), _unit(g), dim=0, eps=0.0)

    def after_refresh(self, prepared, gradient_norm, fraction, skipped, refreshes):
        """Send the metrics of a refresh on their way to the host.

        gradient_norm, fraction (of elements not clipped, or None), skipped: 0-d tensors.
        """
        h = [h for _, (h,) in _samples(prepared, "hessian")]
        if h:
            h = torch.cat([t.to(h[0].device) for t in h])
            h = h.quantile(torch.tensor(list(QUANTILES.values()), dtype=h.dtype).to(h.device))
        values = {"skipped": skipped, "refresh_grad_norm": gradient_norm, **dict(zip(QUANTILES, h, strict=False))}
        values |= {"unclipped": fraction, "update_grad_cosine": self._cosine}
        values = {name: value for name, value in values.items() if value is not None}
        copies = {name: _on_its_way(value) for name, value in values.items()}
        streams = {torch.cuda.current_stream(value.device) for value in values.values() if value.is_cuda}
        self._sent = [stream.record_event() for stream in streams], {"refreshes": refreshes, **copies}

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

    def control(self, group):
        """The rho of the steps to come: rho * (target/unclipped)^GAIN, by at most a factor of 2.

        It goes by the step before the last refresh: how the present one fares is told at the next.
        """
        told = self.receive(wait=True)
        seen = told.get("unclipped", -1.0) if told else float(group["unclipped"])  # of a file
        rho = torch.as_tensor(group["rho"], dtype=torch.float64)  # or a number that a schedule set
        if seen < 0:
            return rho
        move = GAIN * math.log(group["target_unclipped"] / seen) if seen else LIMIT
        return (rho * math.exp(max(-LIMIT, min(LIMIT, move)))).clamp(SMALLEST, LARGEST)


def _unit(x):
    return x / x.abs().amax().clamp(min=torch.finfo(x.dtype).tiny)


def _samples(prepared, *names):
    """(group, [elements of each list]) for each bucket: the same elements of every list, about SAMPLE in all."""
    total = sum(t.numel() for _, buckets in prepared for bucket in buckets for t in bucket["p"])
    every = max(1, total // SAMPLE)
    for group, buckets in prepared:
        for bucket in buckets:
            # Codes go by whole blocks, so everything beside them does.
            blocks = "exp_avg_scale" in bucket
            yield group, [torch.cat(list(_picked(bucket, name, every, blocks))) for name in names]


def _picked(bucket, name, every, blocks):
    scales = bucket.get(name + "_scale", [None] * len(bucket[name]))
    for t, scale in zip(bucket[name], scales, strict=True):
        t = t.reshape(-1)
        if blocks:
            whole = t[: len(t) // CODES_PER_SCALE * CODES_PER_SCALE].view(-1, CODES_PER_SCALE)[::every]
            t = whole if scale is None else reference.dequantise(whole, scale[: len(t) // CODES_PER_SCALE][::every])
            yield t.reshape(-1).float()
        else:
            yield t[::every].float()


def _on_its_way(value):
    """A copy on the host of a 0-d tensor, which arrives when its stream gets there."""
    if not value.is_cuda:
        return value.clone()
    return torch.empty_like(value, device="cpu", pin_memory=True).copy_(value, non_blocking=True)
