"""SophiaG and SophiaH as torch optimizers: their equations and arguments, and what a step does.

The update and the refreshes are `growkit.ops`, called once per bucket (`buckets`) on state (`state`). When to refresh,
and on what, is `attach`; how, `curvature`.
"""

from __future__ import annotations

import math
import numbers
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from growkit import kernels, ops
from growkit.optim import curvature, distributed
from growkit.optim.attach import Attachment, after_step, before_step, estimate, is_due
from growkit.optim.buckets import Buckets, as_real
from growkit.optim.likelihood import Likelihood, check
from growkit.optim.replay import Call
from growkit.optim.state import check_file, complete_groups, convert, of_file, share_steps
from growkit.optim.telemetry import START, TARGET, Telemetry
from growkit.warn import warn

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128)

_NUMBERS = {"lr": "learning rate", "rho": "rho", "weight_decay": "weight_decay", "eps": "eps"}
_LABELS = "a finite number of labels > 0"


class _Sophia(Optimizer):
    """What SophiaG and SophiaH share: everything but the denominator and the curvature estimate.

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
        schedule["unclipped"] = torch.tensor(-1.0, dtype=torch.float64)  # what rho="auto" goes by, not known yet
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
        self._buckets = Buckets(type(self).__name__, self._curvature_codes)
        self._telemetry = Telemetry()
        self._compared = False  # whether several processes were found to hold the same parameters
        self._warned = set()

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
            keys = ("every", "phase", "steps", "refreshes", "rho", "unclipped")
            group.update({key: own[key] for key in keys})

    def add_param_group(self, param_group):
        if self.param_groups:  # one schedule for all groups
            keys = ("every", "phase", "steps", "refreshes", "unclipped")
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
            self._check_group(group)
            if group["target_unclipped"] is not None:  # a tensor, as `steps` is
                group["rho"] = torch.tensor(float(group["rho"]), dtype=torch.float64)
        except Exception:
            self.param_groups.pop()
            raise

    def _check_group(self, group):
        if group["differentiable"]:
            raise RuntimeError(f"differentiable=True is not supported by {type(self).__name__} in this version")
        for i, p in enumerate(group["params"]):
            if group["fused"] and not (p.is_cuda and kernels.available):
                raise RuntimeError(
                    f"fused=True needs triton and CUDA parameters, parameter {i} is on {p.device} "
                    f"and triton is {'installed' if kernels.available else 'missing'}"
                )
        lr = group["lr"]
        if isinstance(lr, torch.Tensor):
            if lr.numel() != 1:
                raise ValueError(f"Tensor lr must be 1-element, got shape {tuple(lr.shape)}")
            _check_number("learning rate", float(lr))
        self._check_numbers(group)
        target = group["target_unclipped"]
        if target is not None:
            _check_number("target_unclipped", target, "None or a fraction between 0 and 1")
        if target is not None and not (0 < target < 1 and group["rho"] > 0):
            raise ValueError(
                f"Invalid target_unclipped: {target} with rho={group['rho']}, expected None or a fraction between 0 "
                "and 1 with rho > 0"
            )
        if target != self.param_groups[0]["target_unclipped"]:
            raise ValueError(
                f"Invalid target_unclipped: {target}, expected {self.param_groups[0]['target_unclipped']} as in the "
                "first group: the fraction is that of all parameters together"
            )
        if not isinstance(group["seed"], int):
            raise TypeError(f"Invalid seed: {group['seed']!r}, expected an integer")
        if group["state_dtype"] not in (None, torch.float32, torch.bfloat16, "8bit"):
            raise ValueError(
                f"Invalid state_dtype: {group['state_dtype']}, expected None, torch.float32, torch.bfloat16 or '8bit'"
            )
        limit = group["clip_grad_norm"]
        if limit != self.param_groups[0]["clip_grad_norm"]:
            raise ValueError(
                f"Invalid clip_grad_norm: {limit}, expected {self.param_groups[0]['clip_grad_norm']} as in the first "
                "group: the norm is that of all gradients together"
            )
        if group["bf16_update"] not in ("stochastic", "master", "nearest"):
            raise ValueError(
                f"Invalid bf16_update: {group['bf16_update']!r}, expected 'stochastic', 'master' or 'nearest'"
            )
        for i, p in enumerate(group["params"]):
            if p.requires_grad and p.dtype not in _FLOATS:  # quantized base weights beside what is trained
                raise TypeError(f"parameter {i} has dtype {p.dtype}, expected one of {', '.join(map(str, _FLOATS))}")
            if p.dtype == torch.bfloat16 and group["bf16_update"] == "nearest":
                self._warn_once(
                    "nearest",
                    "bf16_update='nearest' loses updates below half a bf16 step of the parameter, weight decay among "
                    "them; 'stochastic' and 'master' keep them",
                )

    def _check_numbers(self, group):
        """What a schedule may set at any time; tensors are left unread, for they may be on a device."""
        for name, called in _NUMBERS.items():
            _check_number(called, group[name])
        _check_number("bs", group["bs"], _LABELS)
        betas = group["betas"]
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise ValueError(f"Invalid betas: {betas}, expected two numbers")
        for i, beta in enumerate(betas):
            _check_number(f"beta parameter at index {i}", beta, "0 <= beta < 1")
        if group["clip_grad_norm"] is not None:
            _check_number("clip_grad_norm", group["clip_grad_norm"], "None or a finite number > 0")

    def _warn_once(self, key, message):
        if key not in self._warned and distributed.speaks():
            self._warned.add(key)
            warn(message)

    # --- files ---

    def load_state_dict(self, state_dict):
        """Load a state dict of this class or of the official Sophia, old files with `gamma` included.

        State keeps its own dtype (float32 for bfloat16 parameters), which `Optimizer.load_state_dict` would cast; where
        this optimizer was made with a `state_dtype`, the file's state is converted to it, rounded to nearest. Group
        keys that the file lacks, and the schedule of an attached optimizer if the file has none, keep the values
        of this optimizer. Raises ValueError, with nothing changed, if the state does not fit the parameters.
        """
        loaded, converted = {}, {}

        def complete(_, state_dict):
            check_file(type(self).__name__, self.param_groups, state_dict, self._estimate.__name__)
            groups = complete_groups(self.param_groups, state_dict["param_groups"], self.defaults)
            for group in groups:
                self._check_numbers(group)
            loaded.update(state_dict, param_groups=groups)
            group_of = {i: group for group in groups for i in group["params"]}
            for i, (p, own) in of_file(self.param_groups, loaded).items():
                converted[p] = convert(p, group_of[i], own, self._curvature_codes)
            return loaded

        # Registered last, so that it sees what the user's own hooks make of the file.
        hook = self.register_load_state_dict_pre_hook(complete)
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        for p, own in converted.items():
            others = {key: value for key, value in self.state[p].items() if not key.endswith("_scale")}
            self.state[p] = {**others, **own}
        if self._attachment is not None:
            self._attachment.units = [group["bs"] for group in self.param_groups]

    def __setstate__(self, state):
        super().__setstate__(state)
        if "_attachment" not in self.__dict__:
            self._reset_runtime()
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
        self._buckets.clear()
        self._telemetry = Telemetry()
        share_steps(self.param_groups, self.state)

    # --- update ---

    @torch.no_grad()
    def step(self, closure=None, bs=None):
        """Update every parameter that has a gradient; on an attached optimizer, refresh the curvature when it is due.

        closure: recomputes the loss, returned. bs: overrides the group's `bs` for this step, as in the official code;
        on an attached optimizer, whose `h` is stored in units of the group's, another value raises ValueError.
        Sparse gradients raise RuntimeError, gradients or state of another shape or device ValueError; nothing has
        changed then.
        """
        if bs is not None:
            _check_number("bs", bs, _LABELS)
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
        for group in self.param_groups:
            self._check_numbers(group)
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

    def _observe(self):
        if not _capturing():
            self._telemetry.after_due_step(self._buckets.prepare(self.param_groups, self.state), self._denominator)

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
        # A graph counts whenever it runs: which of its runs comes before a refresh is not known here, nor where
        # update_hessian() is called by hand.
        first = self.param_groups[0]
        by_hand = first["target_unclipped"] is not None and not first["every"]
        counting = torch.compiler.is_compiling() or _capturing() or by_hand or is_due(first)
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

    def _attach(self, model, every, phase, options):
        if self._attachment is not None:
            raise RuntimeError("attach: this optimizer is attached already, call detach() first")
        self._attachment = Attachment(self, model, every, phase, options)
        self._tell_owner()

    def detach(self):
        """Undo `attach`: step() refreshes no more."""
        if self._attachment is not None:
            self._attachment.remove()
            self._attachment = None
            for group in self.param_groups:
                group["every"] = 0
            self._tell_owner()

    def _refresh(self, model, batches, options):
        if isinstance(batches, (torch.Tensor, Mapping, str)):
            raise TypeError(
                f"refresh: batches is {type(batches).__name__}, expected an iterable of batches; one batch is [batch]"
            )
        calls = [Call.of(batch) for batch in batches]
        if not calls:
            raise ValueError("refresh: batches is empty, expected at least one batch")
        known = self._attachment.known if self._attachment is not None else {}
        self._telemetry.warn(self)
        self._take(**estimate(self, model, calls, options, known))

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
        processes = processes or distributed.Processes(self, self._owner())
        prepared = self._buckets.prepare(self.param_groups, self.state)
        found = [bucket for _, buckets in prepared for bucket in buckets]
        if not found and processes.size == 1:
            return
        zero = torch.zeros((), dtype=torch.float64, device=found[0]["p"][0].device if found else "cpu")
        square = sum((ops.squared_norm(b["g"]).to(zero.device) * processes.share(b["whole"]) for b in found), zero)
        if processes.size > 1:
            unclipped = sum((each.to(zero.device) for each, _ in self._unclipped.values()), zero)
            counted = zero + sum(each for _, each in self._unclipped.values())
            square, n, *told = processes.agree(square, zero if count is None else count, unclipped, counted)
            count = None if count is None else n
            if self._unclipped:
                self._unclipped = {zero.device: tuple(told)}
        norm = square.sqrt()
        skip = ~norm.isfinite()
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
        self._tell(prepared, norm if count is None else norm / count)
        for group in self.param_groups:
            group["refreshes"] = group["refreshes"] + 1
        self._tell_owner()

    def _refresh_key(self):
        """What the random bits of the next refresh are keyed by: of the first group, for all of them."""
        return {"seed": self.param_groups[0]["seed"], "refresh": int(self.param_groups[0]["refreshes"])}

    def _tell(self, prepared, norm):
        """Set a rho that is "auto" by what earlier refreshes sent, and send what this one has to say."""
        elements = sum(counted for _, counted in self._unclipped.values())
        fraction = None
        if (
            self._unclipped and self.param_groups[0]["refreshes"] > 0
        ):  # before the first h is 0: that says nothing about rho
            home = next(iter(self._unclipped))
            fraction = sum(count.to(home) for count, _ in self._unclipped.values()).double() / elements
        for group in self.param_groups:
            if group["target_unclipped"] is not None:
                group["rho"] = self._telemetry.control(group)
                group["unclipped"] = group["unclipped"] if fraction is None else fraction
        skipped = torch.as_tensor(self._skipped)
        self._telemetry.after_refresh(prepared, norm, fraction, skipped, int(self.param_groups[0]["refreshes"]) + 1)

    def metrics(self):
        """{name: number} for a logger, as of the last refresh whose numbers have arrived: the host never waits.

        unclipped: fraction of elements with |m| < d in the step before it. rho: of the first group. refresh_grad_norm:
        2-norm of the gradient of the sampled labels (SophiaG) or of Hu (SophiaH). h_q10, h_q50, h_q90: quantiles of
        `h`. update_grad_cosine: of the update, apart from decay, and the gradient of that step; 1 is plain descent.
        refreshes, skipped: how many, and how many of them were not finite. Quantiles and cosine are of some 65,536
        elements spread evenly over all parameters; where these are sharded, over this process's part of them. What is
        not finite or not known is left out; empty before the first refresh.
        """
        told = self._telemetry.receive()
        told = {"rho": float(self.param_groups[0]["rho"]), **told} if told else {}
        return {name: value for name, value in told.items() if math.isfinite(value)}

    def stats(self):
        """How the optimizer fares: {steps, refreshes, skipped, skipped_steps, unclipped}. May wait for the device.

        unclipped: fraction of elements with |m| < d, the official `win_rate`, in the last step before a refresh was
        due; None before the first such step. skipped, skipped_steps: refreshes and steps of this process that were not
        finite: steps where a `GradScaler` found an overflow, or where `clip_grad_norm` found no finite norm.
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


def _check_number(name, value, expected="a finite number >= 0"):
    if isinstance(value, torch.Tensor):
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"Invalid {name}: {value!r}, expected {expected}")
    if not 0 <= value < (1 if expected.endswith("< 1") else float("inf")) or expected.endswith("> 0") and value == 0:
        raise ValueError(f"Invalid {name}: {value}, expected {expected}")


def _check_callable(**options):
    for name, value in options.items():
        if value is not None and not callable(value):
            raise TypeError(f"{name} is {type(value).__name__}, expected a callable")


def _capturing():
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class SophiaG(_Sophia):
    """Sophia with the Gauss-Newton-Bartlett curvature estimate; drop-in for the official SophiaG and for torch.optim.

        m <- beta1*m + (1-beta1)*g
        p <- p*(1 - lr*weight_decay) - lr*clip(m / (rho*bs*h + eps), -1, 1)
        every k steps: h <- beta2*h + (1-beta2)*ghat^2, ghat the gradient of the mean NLL of sampled labels

    Source: Liu et al., arXiv:2305.14342, Algorithms 2 and 3, in the order and scaling of the official code, to which
    fp32 results on CPU are equal bit for bit. Call `attach(model)` once and train as with AdamW; or call
    `refresh(model, batches)`, or fill `.grad` with sampled-label gradients and call `update_hessian()`.

    params: iterable of tensors, named tensors or groups; a group may override every option below.
    lr: float or 1-element tensor; the largest change of an element per step, apart from decay. With a tensor, which
        torch's schedulers change in place, torch.compile(optimizer.step) is one graph for all values; take the first
        step, which makes the state, before compiling.
    betas: EMA factors of the gradient, per step, and of the curvature, per refresh.
    rho: dimensionless; larger rho clips fewer elements. About 0.03 to 0.2; watch `metrics()["unclipped"]`. "auto"
        starts at 0.04 and brings that fraction to `target_unclipped`.
    weight_decay: decoupled, applied before the step.
    bs: labels per optimizer step in the official code, which multiplies h by it at use. `attach` and `refresh` count
        labels themselves and store h so that bs cancels; with bare `update_hessian()` it must be the number of labels.
    foreach: without effect, for every step is one call on lists of tensors anyway.
    fused: on CUDA parameters the kernels run whenever triton is installed; True raises RuntimeError where they cannot.
    capturable: keep `step` on the device, so that a CUDA graph can capture step(): with a CUDA tensor lr (and rho or
        bs), replays use its present value. Run a step before each capture. An attached optimizer refuses capture.
    differentiable: not supported, True raises RuntimeError.
    clip_grad_norm: clip the 2-norm of all gradients together to this, in place of torch.nn.utils.clip_grad_norm_:
        `.grad` stays as it is, and the step reads it once less. A step whose norm is not finite is skipped, counted
        in stats()["skipped_steps"]. Refreshes are not clipped.
    target_unclipped: a fraction between 0 and 1, 0.2 with rho="auto": each refresh multiplies rho by
        sqrt(target_unclipped/unclipped), at most by 2 either way, going by what the refresh before it told. With a
        number for rho it starts there; None leaves rho as it is. Group keys hold all of it.
    bf16_update: how bfloat16 parameters take a float32 result: "stochastic" rounding (unbiased, default), a float32
        "master" copy in the state, or "nearest" (small updates vanish). float16 parameters always keep a master copy.
    state_dtype: of m and h: None is float32, or wider for wider parameters; torch.bfloat16 halves the memory of both:
        m is then rounded to nearest, h stochastically. "8bit" quarters it: codes with scales for each 256 elements, as
        `growkit.reference.quantise_` explains, both rounded stochastically; tensors of fewer than 4096 elements, and
        those wider than float32, keep the state they have under None.
    seed: keys sampled labels, probes and rounding bits; the global random state is never used.
    State per parameter: `step`, `exp_avg` (m), `hessian` (h); 8 bytes per float32 parameter. With "8bit" these are
        int8 and uint8 (SophiaH: int8) beside `exp_avg_scale` and `hessian_scale`, 2.06 bytes per parameter in all.
    """

    _denominator = "add"
    _curvature_codes = torch.uint8
    _estimate = staticmethod(curvature.gnb)

    def __init__(
        self,
        params,
        lr=1e-4,
        betas=(0.965, 0.99),
        rho=0.04,
        weight_decay=1e-1,
        *,
        maximize=False,
        foreach=None,
        fused=None,
        capturable=False,
        differentiable=False,
        bs=5120,
        eps=1e-15,
        clip_grad_norm=None,
        target_unclipped=None,
        bf16_update="stochastic",
        state_dtype=None,
        seed=0,
    ):
        flags = {"foreach": foreach, "fused": fused, "capturable": capturable, "differentiable": differentiable}
        common = {"maximize": maximize, "eps": eps, "clip_grad_norm": clip_grad_norm, "seed": seed, **flags}
        common |= {"bf16_update": bf16_update, "state_dtype": state_dtype, "target_unclipped": target_unclipped}
        super().__init__(params, lr=lr, betas=betas, rho=rho, weight_decay=weight_decay, bs=bs, **common)

    def attach(
        self,
        model: torch.nn.Module,
        every: int = 10,
        *,
        phase: str = "paper",
        logits: Callable[[Any], torch.Tensor] | None = None,
        mask: Callable[[tuple, dict], torch.Tensor] | None = None,
        likelihood: Likelihood | None = None,
    ) -> None:
        """Let step() refresh the curvature by itself, on the model's last training batch, with no change to the loop.

        model: the module whose forward is called in training, compiled or not, and whose output the loss reads. every:
        steps between refreshes. phase: "paper" refreshes at steps 1, 1+every, ...; "official" at every, 2*every, ....
        logits, mask, likelihood: as for `refresh`; none is needed where the loss is a cross-entropy or binary
        cross-entropy with logits of one output, in the model or outside: the gradient that training sends to the
        output says which of its rows count, and along which axis the classes lie.

        The refresh is one more forward and backward of that batch, at the weights it was trained at; h is folded in
        after the step. It is kept so that rho*bs*h = rho*EMA(N*g^2) for N labels, whatever `bs` is, which therefore has
        to stay as it is. Inputs are copied where a refresh is due, without their graph.
        Raises RuntimeError if already attached (`detach` undoes it), ValueError for a model with none of the parameters
        of this optimizer. The first step() raises TypeError, with nothing changed, where likelihood= is needed.
        """
        self._attach(model, every, phase, self._options(logits, mask, likelihood))

    def refresh(
        self,
        model: torch.nn.Module,
        batches: Iterable,
        *,
        logits: Callable[[Any], torch.Tensor] | None = None,
        mask: Callable[[tuple, dict], torch.Tensor] | None = None,
        likelihood: Likelihood | None = None,
    ) -> None:
        """Refresh the curvature now, on all of `batches` (an iterable of model inputs), as one estimate.

        A mapping is passed to the model by keyword, a tuple or list by position. Whatever else the refresh touches is
        as before afterwards: gradients, hooks of parameters, buffers and attributes of modules, random states, inputs.
        A refresh that is not finite or has no labels is skipped and counted in `stats()`. The gradient of the sampled
        labels is not clipped.

        logits(output) -> [..., V]: the output that the loss reads, by default the one called logits, or the only one.
        mask(args, kwargs) -> bool, shaped as logits without V: which labels count. By default those with a gradient of
            the loss that the model returns (as with `labels` in the batch), and all if it returns none.
        likelihood: "categorical", labels drawn from softmax(logits); "bernoulli", from sigmoid(logits), elementwise;
            `growkit.optim.gaussian(sigma)`, for squared errors; or a callable(output) that returns (mean NLL of labels
            drawn from the model, number of labels). By default what the gradient of the model's own loss says, or an
            earlier training step of an attached model; TypeError where neither does.
        N counts rows for "categorical", elements for the others. Label smoothing, weights, auxiliary losses are no part
        of the likelihood, and of the estimate.
        """
        self._refresh(model, batches, self._options(logits, mask, likelihood))

    def _options(self, logits, mask, likelihood):
        _check_callable(logits=logits, mask=mask)
        check(likelihood)
        return {"logits": logits, "mask": mask, "likelihood": likelihood}

    def update_hessian(self) -> None:
        """h <- beta2*h + (1-beta2)*g^2 with the gradients that `.grad` holds, as in the official code."""
        self._telemetry.warn(self)
        self._fold()

    def _fold_bucket(self, group, bucket, count, skip, u):
        # The gradient of a sum over N labels is N*ghat, so (N/bs)*ghat^2 = grad^2 / (N*bs).
        scale = None if count is None else 1 / (count.double() * group["bs"])
        options = {"beta2": group["betas"][1], **self._refresh_key()}
        if "hessian_scale" in bucket:
            h = bucket["hessian"], bucket["hessian_scale"]
            ops.gnb_ema_8bit_(*h, bucket["g"], scale, skip, **options, **bucket["key"])
            return
        rounds = bucket["hessian"][0].dtype == torch.bfloat16
        ops.gnb_ema_(bucket["hessian"], bucket["g"], scale, skip, **options, **(bucket["key"] if rounds else {}))


class SophiaH(_Sophia):
    """Sophia with Hutchinson's curvature estimate.

        m <- beta1*m + (1-beta1)*g
        p <- p*(1 - lr*weight_decay) - lr*clip(m / max(rho*h, eps), -1, 1)
        every k steps: h <- beta2*h + (1-beta2)*u*(Hu), u random signs, H the Hessian of the mean loss

    Source: Liu et al., arXiv:2305.14342, Algorithms 1 and 3 (`rho` is the paper's gamma). Where h <= 0 the step is
    lr*sign(m), never against m. The loss is the model output's `.loss`, or `attach(model, loss=callable(output))`; it
    must be twice differentiable, so fused attention and compiled modules are left aside during a refresh.
    Parameters as for SophiaG; there is no bs, because the estimate does not depend on the number of labels.
    """

    _denominator = "max"
    _curvature_codes = torch.int8
    _estimate = staticmethod(curvature.hutchinson)

    def __init__(
        self,
        params,
        lr=1e-4,
        betas=(0.96, 0.99),
        rho=0.01,
        weight_decay=1e-1,
        *,
        maximize=False,
        foreach=None,
        fused=None,
        capturable=False,
        differentiable=False,
        eps=1e-12,
        clip_grad_norm=None,
        target_unclipped=None,
        bf16_update="stochastic",
        state_dtype=None,
        seed=0,
    ):
        flags = {"foreach": foreach, "fused": fused, "capturable": capturable, "differentiable": differentiable}
        common = {"maximize": maximize, "eps": eps, "clip_grad_norm": clip_grad_norm, "seed": seed, **flags}
        common |= {"bf16_update": bf16_update, "state_dtype": state_dtype, "target_unclipped": target_unclipped}
        super().__init__(params, lr=lr, betas=betas, rho=rho, weight_decay=weight_decay, bs=1, **common)

    def attach(
        self,
        model: torch.nn.Module,
        every: int = 10,
        *,
        phase: str = "paper",
        loss: Callable[[Any], torch.Tensor] | None = None,
    ) -> None:
        """Let step() refresh the curvature by itself, on the model's last training batch, with no change to the loop.

        model, every, phase: as for SophiaG. loss(output): the training loss, by default the model output's `loss`.
        The refresh is one more forward and two backwards of that batch, at the weights it was trained at; h is folded
        in after the step. Raises as SophiaG's.
        """
        self._attach(model, every, phase, self._options(loss))

    def refresh(
        self, model: torch.nn.Module, batches: Iterable, *, loss: Callable[[Any], torch.Tensor] | None = None
    ) -> None:
        """Refresh the curvature now, on all of `batches`, as one estimate of the mean loss over them.

        Batches as for SophiaG. loss(output): the training loss, by default the model output's `loss`, or its only
        scalar. Raises TypeError where there is none, ValueError where it has no second derivative.
        """
        self._refresh(model, batches, self._options(loss))

    def _options(self, loss):
        _check_callable(loss=loss)
        return {"loss": loss}

    def update_hessian(self, u: Iterable[torch.Tensor] | None = None) -> None:
        """h <- beta2*h + (1-beta2)*u*(Hu), with Hu in `.grad` and u a list of probes, one per parameter with a `.grad`.

        Without u, the probe is the Rademacher one that `growkit.ops.rademacher_` writes for the optimizer's seed,
        its number of refreshes and each parameter's index.
        """
        params = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        if u is not None:
            ops.check_alike("update_hessian", params, u=u)
            u = dict(zip(params, u, strict=True))
        self._telemetry.warn(self)
        self._fold(probes=u)

    def _fold_bucket(self, group, bucket, count, skip, u):
        sign = torch.tensor(-1.0) if group["maximize"] else None
        options = {"beta2": group["betas"][1], **self._refresh_key(), **bucket["key"]}
        if "hessian_scale" in bucket:
            h = bucket["hessian"], bucket["hessian_scale"]
            ops.hutchinson_ema_8bit_(*h, bucket["g"], u, sign, skip, **options)
        else:
            ops.hutchinson_ema_(bucket["hessian"], bucket["g"], u, sign, skip, **options)
