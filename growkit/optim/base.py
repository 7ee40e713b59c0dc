"""What SophiaG and SophiaH share: groups, files, and what a step and a refresh do in which order.

The update and the refreshes are `growkit.ops`, called once per bucket (`buckets`) on state (`state`). When to refresh,
and on what, is `attach`; how, `curvature`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any

import torch
from torch.optim import Optimizer

from growkit import ops
from growkit.optim import distributed
from growkit.optim.attach import Attachment, after_step, before_step, estimate, is_due
from growkit.optim.buckets import Buckets, as_real
from growkit.optim.options import Checked, check_bs, check_new, check_values
from growkit.optim.processes import Processes
from growkit.optim.replay import Call
from growkit.optim.state import check_file, complete_groups, convert, of_file, share_steps
from growkit.optim.telemetry import LARGEST, SMALLEST, START, TARGET, Telemetry, move
from growkit.warn import warn


class SophiaBase(Optimizer):
    """Everything but the denominator and the curvature estimate.

    step() takes the gradient scale and the overflow flag of a `GradScaler` itself, as torch's fused optimizers do.
    A group's `steps` counts its step() calls and `refreshes` its curvature refreshes: together with `every`, `phase`
    and `seed` they are the whole schedule, and survive state_dict, pickling and distributed checkpoints as group keys.
    Both are tensors: a number that changes would have torch.compile compile step() again.
    """

    _step_supports_amp_scaling = True

    def __init__(self, params, **defaults):
        zero = torch.zeros((), dtype=torch.int64)
        schedule = {"every": 0, "phase": "paper", "steps": zero, "refreshes": zero.clone()}
        schedule["curvature"] = self._estimate.__name__  # a file of the other class is refused
        schedule["rho_solved"] = torch.zeros((), dtype=torch.float64)  # what rho="auto" goes by, 0: not known yet
        self._reset_runtime()
        super().__init__(params, {**defaults, **schedule})

    def _reset_runtime(self):
        """What belongs to this process and is not saved: the attached model, counts, warnings given."""
        self._attachment = None
        self._unreached = None, 0  # parameters that no refresh has reached, and the number of refreshes
        self._since_refresh = 0
        self._unclipped = {}  # device -> (elements not clipped in the last counted step, a tensor; elements counted)
        self._skipped = 0
        self._skipped_steps = {}  # device -> count, a tensor; a dict, for torch 2.10 traces no assignment to attributes
        self._taken = {"scale": None, "skip": None}  # how the last step took its gradients, as `_scale_and_skip` tells
        self._buckets = Buckets(type(self).__name__, self._curvature_codes)
        self._telemetry = Telemetry()
        self._compared = False  # whether several processes were found to hold the same parameters
        self._warned = set()
        self._checked = Checked()

    def _owner(self):
        """The ZeroRedundancyOptimizer of which this one is a part, or None; its parameters are numbered as a whole."""
        if "_known_owner" not in self.__dict__:
            self._known_owner = owner = distributed.find_owner(self)
            if owner is not None:
                params = (p for group in owner.param_groups for p in group["params"])
                self._buckets.numbers = {p: i for i, p in enumerate(params)}
        return self._known_owner

    def _tell_owner(self):
        """Its groups overwrite those of its parts in every step."""
        for own, group in zip(self.param_groups, self._owner().param_groups if self._owner() else (), strict=False):
            keys = ("every", "phase", "steps", "refreshes", "rho", "rho_solved")
            group.update({key: own[key] for key in keys})

    def add_param_group(self, param_group):
        if self.param_groups:  # one schedule for all groups
            keys = ("every", "phase", "steps", "refreshes", "rho_solved")
            schedule = {key: self.param_groups[0][key] for key in keys}
            param_group = {**schedule, **param_group} if isinstance(param_group, dict) else param_group
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            if isinstance(group["rho"], str):
                if group["rho"] != "auto":
                    raise ValueError(f"Invalid rho: {group['rho']!r}, expected a finite number >= 0 or 'auto'")
                target = group["target_unclipped"]
                group |= {"rho": START, "target_unclipped": TARGET if target is None else target}
            check_new(type(self).__name__, group, self.param_groups[0])
            if group["bf16_update"] == "nearest" and any(p.dtype == torch.bfloat16 for p in group["params"]):
                self._warn_once(
                    "nearest",
                    "bf16_update='nearest' loses updates below half a bf16 step of the parameter, weight decay among "
                    "them; 'stochastic' and 'master' keep them",
                )
            if group["target_unclipped"] is not None:  # a tensor, as `steps` is
                group["rho"] = torch.tensor(float(group["rho"]), dtype=torch.float64)
        except Exception:
            self.param_groups.pop()
            raise

    def _warn_once(self, key, message):
        if key not in self._warned and distributed.speaks(self._attachment and self._attachment.process_group):
            self._warned.add(key)
            warn(message)

    # --- files ---

    def load_state_dict(self, state_dict):
        """Load a state dict of this class or of the official Sophia, old files with `gamma` included.

        State keeps its own dtype (float32 for bfloat16 parameters), which `Optimizer.load_state_dict` would cast; where
        this optimizer was made with a `state_dtype`, the file's state is converted to it, rounded to nearest. Group
        keys that the file lacks, and the schedule of an attached optimizer if the file has none, keep the values
        of this optimizer; only `nesterov` is off without a key, for such a file's steps were taken without. Raises
        ValueError, with nothing changed, if the state does not fit the parameters.
        """
        loaded, converted = {}, {}

        def complete(_, state_dict):
            check_file(type(self).__name__, self.param_groups, state_dict, self._estimate.__name__)
            groups = complete_groups(self.param_groups, state_dict["param_groups"], self.defaults)
            for group in groups:
                check_values(type(self).__name__, group)
            loaded.update(state_dict, param_groups=groups)
            group_of = {i: group for group in groups for i in group["params"]}
            for i, (p, own) in of_file(self.param_groups, loaded).items():
                converted[p] = convert(p, group_of[i], own, self._curvature_codes)
            return loaded

        def put(_):
            for p, own in converted.items():
                others = {key: value for key, value in self.state[p].items() if not key.endswith("_scale")}
                self.state[p] = {**others, **own}

        # Of the user's own hooks, those before it are seen by `complete`, and those after it see what `put` leaves.
        hooks = [
            self.register_load_state_dict_pre_hook(complete),
            self.register_load_state_dict_post_hook(put, prepend=True),
        ]
        before = {key: getattr(self, key) for key in ("state", "param_groups", "_telemetry")}
        try:
            super().load_state_dict(state_dict)
        except BaseException:
            vars(self).update(before)  # which torch and `complete` replace, but do not write to
            self._buckets.clear()
            raise
        finally:
            for hook in hooks:
                hook.remove()
        if self._attachment is not None:
            self._attachment.units = [group["bs"] for group in self.param_groups]

    def __setstate__(self, state):
        super().__setstate__(state)
        if "_attachment" not in self.__dict__:
            self._reset_runtime()
        self.defaults.setdefault("nesterov", False)  # pickled before there was one
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
        self._buckets.clear()
        self._telemetry = Telemetry()
        share_steps(self.param_groups, self.state)

    # --- update ---

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, bs: float | None = None) -> Any:
        """Update every parameter that has a gradient; on an attached optimizer, refresh the curvature when it is due.

        closure: recomputes the loss, returned. bs: overrides the group's `bs` for this step, as in the official code;
        on an attached optimizer, whose `h` is stored in units of the group's, another value raises ValueError.
        Sparse gradients raise RuntimeError, gradients or state of another shape or device ValueError; nothing has
        changed then.
        """
        if bs is not None:
            check_bs(bs)
            for group in self.param_groups if self._attachment else ():
                if bs != group["bs"]:
                    raise ValueError(f"step(bs={bs}) on an optimizer attached with bs={group['bs']}: expected no bs")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_capture()
        refresh = self._before_step()
        if not (torch.compiler.is_compiling() and self._update_shards(bs)):
            self._update(bs)
        self._after_step(refresh)
        return loss

    @torch._disable_dynamo
    def _before_step(self):
        """Whatever may fail comes first; returns the estimate of a refresh that is due, or None."""
        self._checked.check(type(self).__name__, self.param_groups)
        self._owner()
        return before_step(self)

    @torch._disable_dynamo
    def _update_shards(self, bs):
        """Update if parameters are shards, and tell so: tracing what finds each shard's place takes minutes."""
        sharded = any(distributed.is_sharded(p) for group in self.param_groups for p in group["params"])
        if sharded:
            self._update(bs)
        return sharded

    @torch._disable_dynamo
    def _after_step(self, refresh):
        after_step(self, refresh)

    def _observe(self, due):
        """Keep what a refresh that is due, or may be asked for, has to know of the step just taken."""
        asked = _solves_by_hand(self.param_groups[0]) and any(group["nesterov"] for group in self.param_groups)
        if (due or asked) and not _capturing():
            prepared = self._buckets.prepare(self.param_groups, self.state)
            self._telemetry.after_step(prepared, self._denominator, self._starts(), **self._taken)

    def _starts(self):
        """How many elements come before each parameter, those that other processes hold as well, and in all."""
        params = [p for group in (self._owner() or self).param_groups for p in group["params"]]
        return list(accumulate((p.numel() * (1 + p.is_complex()) * p.requires_grad for p in params), initial=0))

    def _check_capture(self):
        name = "_accelerator_graph_capture_health_check"  # under torch 2.10 with another first word
        getattr(self, name, getattr(self, "_cuda_graph_capture_health_check", None))()
        if self._attachment is not None and _capturing():
            raise RuntimeError(
                f"{type(self).__name__} is attached to a model, and a CUDA graph cannot hold its refreshes: "
                "detach() before the capture, and call refresh(model, batches) outside of the graph"
            )

    def _update(self, bs):
        prepared = self._buckets.prepare(self.param_groups, self.state)
        scale, skip = self._scale_and_skip(prepared)
        self._taken.update(scale=scale, skip=skip)
        # A graph counts whenever it runs: which of its runs comes before a refresh is not known here, nor where
        # update_hessian() is called by hand.
        first = self.param_groups[0]
        counting = torch.compiler.is_compiling() or _capturing() or _solves_by_hand(first) or is_due(first)
        if counting:
            self._unclipped.clear()
            if not any(buckets for _, buckets in prepared):  # all the same told at a refresh of several processes
                self._unclipped[torch.device("cpu")] = torch.zeros((), dtype=torch.int64), 0
        for group, buckets in prepared:
            lr, rho_bs = group["lr"], group["rho"] * (group["bs"] if bs is None else bs)
            if torch.compiler.is_compiling() and any(isinstance(each, torch.Tensor) for each in (lr, rho_bs)):
                # The op takes two tensors or two numbers.
                lr, rho_bs = (torch.as_tensor(each, dtype=torch.float64) for each in (lr, rho_bs))
            elif group["target_unclipped"] is not None:
                rho_bs = float(rho_bs)
            if buckets:
                step = buckets[0]["step"]
                # A skipped step counts only where asking would make the host wait for the device.
                step += 1 if skip is None or skip.device != step.device else skip == 0
            for bucket in buckets:
                p, count = bucket["p"], None
                if counting:
                    zero = torch.zeros((), dtype=torch.int64, device=p[0].device)
                    count, counted = self._unclipped.get(p[0].device, (zero, 0))
                    self._unclipped[p[0].device] = count, counted + sum(t.numel() for t in p)
                stochastic = p[0].dtype == torch.bfloat16 and group["bf16_update"] == "stochastic"
                lists = [p, bucket["g"], bucket["exp_avg"], bucket["hessian"]]
                options = {
                    "lr": lr,
                    "beta1": group["betas"][0],
                    "rho_bs": rho_bs,
                    "eps": group["eps"],
                    "weight_decay": group["weight_decay"],
                    "denominator": self._denominator,
                    "maximize": group["maximize"],
                    "nesterov": group["nesterov"],
                    "scale": scale,
                    "skip": skip,
                    "step": bucket["step"],
                }
                if "exp_avg_scale" in bucket:
                    lists += [bucket["exp_avg_scale"], bucket["hessian_scale"]]
                    options |= {"seed": group["seed"], **bucket["key"], "stochastic": stochastic}
                    ops.sophia_step_8bit_(*lists, bucket.get("master"), count, **options)
                else:
                    if stochastic:
                        options |= {"seed": group["seed"], **bucket["key"]}
                    ops.sophia_step_(*lists, bucket.get("master"), count, **options)

    def _scale_and_skip(self, prepared):
        """Factor of every gradient and flag that skips the step, as 0-d tensors on the device, or None."""
        grad_scale, skip = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        scale = None if grad_scale is None else 1 / grad_scale
        limit = self.param_groups[0]["clip_grad_norm"]
        squares = [] if limit is None else self._squared_norms(prepared)
        if squares:
            home = squares[0].device
            norm = sum(square.to(home) for square in squares).sqrt()
            norm = norm if scale is None else norm * scale.to(home)
            coefficient = (limit / (norm + 1e-6)).clamp(max=1)  # as torch.nn.utils.clip_grad_norm_ forms it
            scale = coefficient if scale is None else scale.to(home) * coefficient
            skip = ~norm.isfinite() if skip is None else (skip.to(home) != 0) | ~norm.isfinite()
        if skip is not None:
            self._skipped_steps[skip.device] = self._skipped_steps.get(skip.device, 0) + (skip != 0)
        return scale, skip

    def _squared_norms(self, prepared):
        """Of all gradients, those of other processes' shards and of the other parts of a ZeRO optimizer included."""
        if self._owner() is None:
            buckets = [bucket for _, buckets in prepared for bucket in buckets]
            return [distributed.sum_over_shards(ops.squared_norm(b["g"]), b["whole"]) for b in buckets]
        alike = defaultdict(list)
        for group in self._owner().param_groups:
            for g in [p.grad for p in group["params"] if p.grad is not None]:
                alike[g.device, g.dtype].append(as_real(g))
        return [ops.squared_norm(gradients) for gradients in alike.values()]

    # --- curvature ---

    def _attach(self, model, every, phase, process_group, options):
        if self._attachment is not None:
            raise RuntimeError("attach: this optimizer is attached already, call detach() first")
        self._attachment = Attachment(self, model, every, phase, process_group, options)
        self._tell_owner()

    def detach(self):
        """Undo `attach`: step() refreshes no more."""
        if self._attachment is not None:
            self._attachment.remove()
            self._attachment = None
            for group in self.param_groups:
                group["every"] = 0
            self._tell_owner()

    def _refresh(self, model, batches, process_group, options):
        if isinstance(batches, (torch.Tensor, Mapping, str)):
            raise TypeError(
                f"refresh: batches is {type(batches).__name__}, expected an iterable of batches; one batch is [batch]"
            )
        calls = [Call.of(batch) for batch in batches]
        if not calls:
            raise ValueError("refresh: batches is empty, expected at least one batch")
        attached, known = self._attachment, {}
        if attached is not None:
            known = attached.known
            process_group = attached.process_group if process_group is None else process_group
        self._telemetry.warn(self)
        self._take(**estimate(self, model, calls, distributed.group_of(model, process_group), options, known))

    def _take(self, processes, grads, count, reached):
        """Fold an estimate into h."""
        training = [p.grad for p in processes.params]
        try:
            for p, g in zip(processes.params, grads, strict=True):
                p.grad = g
            self._fold(count, processes=processes)
        finally:
            for p, g in zip(processes.params, training, strict=True):
                p.grad = g

    def _named_parameters(self):
        """(parameter, name) of all: that of named_parameters(), or of the attached model, or its index."""
        params = [p for group in self.param_groups for p in group["params"]]
        model = self._attachment.model if self._attachment is not None else None
        names = {} if model is None else {p: name for name, p in model.named_parameters()}
        own = [name for group in self.param_groups for name in group.get("param_names", group["params"])]
        for i, (p, name) in enumerate(zip(params, own, strict=True)):
            yield p, name if isinstance(name, str) else names.get(p, str(i))

    @torch.no_grad()
    def _fold(self, count=None, probes=None, processes=None):
        """Fold what `.grad` holds into h, unless it is not finite.

        count: labels behind the gradient on this process, a 0-d tensor. probes: {parameter: u}, if they are not those
        of the key. processes: those of a refresh, by default those that hold shards of the same parameters.
        """
        self._checked.check(type(self).__name__, self.param_groups)
        processes = processes or Processes(self, self._owner())
        prepared = self._buckets.prepare(self.param_groups, self.state)
        found = [bucket for _, buckets in prepared for bucket in buckets]
        if not found and processes.size == 1:
            return
        zero = torch.zeros((), dtype=torch.float64, device=found[0]["p"][0].device if found else "cpu")
        square = sum((ops.squared_norm(b["g"]).to(zero.device) * processes.share(b["whole"]) for b in found), zero)
        unclipped = sum((each.to(zero.device) for each, _ in self._unclipped.values()), zero)
        counted = zero + sum(each for _, each in self._unclipped.values())
        numbers = torch.stack([square, zero if count is None else count.to(zero), unclipped, counted])
        sums = self._telemetry.sums(prepared, self._starts(), processes.share, zero.device)
        numbers, sums = processes.agree(torch.cat([numbers, sums])).split([len(numbers), len(sums)])
        square, n, unclipped, counted = numbers.unbind()
        count = None if count is None else n
        if self._unclipped and processes.size > 1:
            self._unclipped = {zero.device: (unclipped, counted)}
        norm = square.sqrt()
        skip = ~square.float().isfinite()  # in float32 h would hold inf from now on
        if count is not None:
            skip = skip | (count == 0)
        self._skipped = self._skipped + skip
        params = [p for group in self.param_groups for p in group["params"]]
        for group, buckets in prepared:
            for bucket in buckets:
                u = None
                if probes is not None:
                    u = [as_real(distributed.local(probes[params[i]])) for i in bucket["number"]]
                self._fold_bucket(group, bucket, count, skip, u)
        self._since_refresh = 0
        # Before the first refresh h is 0, and what is clipped says nothing about rho.
        known = self._unclipped and self.param_groups[0]["refreshes"] > 0
        self._tell(sums, norm if count is None else norm / count, unclipped / counted if known else None)
        for group in self.param_groups:
            group["refreshes"] = group["refreshes"] + 1
        self._tell_owner()

    def _refresh_key(self):
        """What the random bits of the next refresh are keyed by: of the first group, for all of them."""
        return {"seed": self.param_groups[0]["seed"], "refresh": int(self.param_groups[0]["refreshes"])}

    def _tell(self, sums, norm, fraction):
        """Send what this refresh has to say, and set a rho that is "auto"."""
        first = self.param_groups[0]
        auto = first["target_unclipped"] is not None
        earlier = self._telemetry.receive(wait=True) if auto else None
        solved = self._telemetry.after_refresh(sums, norm, fraction, torch.as_tensor(self._skipped), first)
        if auto:
            factor = move(first, earlier, solved)
            for group in self.param_groups:
                rho = torch.as_tensor(group["rho"], dtype=torch.float64) * factor
                group |= {"rho": rho.clamp(SMALLEST, LARGEST), "rho_solved": solved}

    def metrics(self) -> dict[str, float]:
        """{name: number} for a logger, as of the last refresh whose numbers have arrived: the host never waits.

        unclipped: fraction of elements with |m| < d, or with `nesterov` |mbar| < d, in the step before it. rho: of the
        first group. rho_solved: what rho="auto" moves to. refresh_grad_norm: 2-norm of the gradient of the sampled
        labels (SophiaG) or of Hu (SophiaH). h_q10, h_q50, h_q90: quantiles of the `h` of that step, to within 9 % (they
        come from counts in bins 2^(1/8) apart, from 2^-128 to 2^64). update_grad_cosine: of the update, apart from
        decay, and the gradient of that step; 1 is plain descent. refreshes, skipped: how many, and how many of them
        were not finite. All speak for all processes, quantiles and cosine by some 65,536 elements spread evenly over
        all parameters. What is not finite or not known is left out; empty before the first refresh.
        """
        told = self._telemetry.receive()
        told = {"rho": float(self.param_groups[0]["rho"]), **told} if told else {}
        return {name: value for name, value in told.items() if math.isfinite(value)}

    def stats(self) -> dict[str, float | None]:
        """How the optimizer fares: {steps, refreshes, skipped, skipped_steps, unclipped}. May wait for the device.

        unclipped: as in `metrics`, the official `win_rate`, in the last step before a refresh was due; None before the
        first such step. skipped, skipped_steps: refreshes and steps of this process that were not finite: steps
        where a `GradScaler` found an overflow, or where `clip_grad_norm` found no finite norm.
        """
        group = self.param_groups[0]
        elements = int(sum(counted for _, counted in self._unclipped.values()))
        unclipped = sum(int(count) for count, _ in self._unclipped.values()) / elements if elements else None
        return {
            "steps": int(group["steps"]),
            "refreshes": int(group["refreshes"]),
            "skipped": int(self._skipped),
            "skipped_steps": sum(map(int, self._skipped_steps.values())),
            "unclipped": unclipped,
        }


def _solves_by_hand(group):
    """Whether a refresh that solves for rho may follow any step."""
    return group["target_unclipped"] is not None and not group["every"]


def _capturing():
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
