"""SophiaG and SophiaH: their equations and arguments, and how each folds an estimate into its `h`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.optim.optimizer import ParamsT

from growkit import ops
from growkit.optim import curvature
from growkit.optim.base import SophiaBase
from growkit.optim.likelihood import Likelihood, check
from growkit.optim.options import Phase, Rounding, StateDtype, check_callable

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup  # missing where torch is built without


class SophiaG(SophiaBase):
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
        starts at 0.04 and holds the fraction of elements that are not clipped at `target_unclipped`.
    weight_decay: decoupled, applied before the step.
    nesterov: clip mbar = beta1*m + (1-beta1)*g, the average as it would be after a second step along g, in place of m,
        whose own equation and state stay as they are: Nesterov's momentum as NAdam has it (Dozat, "Incorporating
        Nesterov Momentum into Adam", ICLR 2016 workshop), without the correction of its start. At h = 0 this is Lion's
        update (arXiv:2302.06675) with its betas (b^2, b) for b = beta1. What is said here of |m|, and of unclipped
        elements everywhere, is then of |mbar|.
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
    target_unclipped: a fraction between 0 and 1, 0.1 with rho="auto". Each refresh solves for the rho that leaves this
        fraction of the elements with a gradient unclipped (at most 0.9 of those with h > 0), a quantile of
        |m|/(bs*h). The first one that finds an h sets it; the others take rho half-way, on a logarithmic scale, to
        what the refresh before them solved. With a number for rho it starts there; None leaves rho as it is. Groups
        keep the ratios of their rho. Group keys hold all of it.
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
        params: ParamsT,
        lr: float | torch.Tensor = 1e-4,
        betas: tuple[float, float] = (0.965, 0.99),
        rho: float | Literal["auto"] = 0.04,
        weight_decay: float = 1e-1,
        *,
        maximize: bool = False,
        nesterov: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        bs: float = 5120,
        eps: float = 1e-15,
        clip_grad_norm: float | None = None,
        target_unclipped: float | None = None,
        bf16_update: Rounding = "stochastic",
        state_dtype: StateDtype | None = None,
        seed: int = 0,
    ) -> None:
        flags = {"foreach": foreach, "fused": fused, "capturable": capturable, "differentiable": differentiable}
        common = {"maximize": maximize, "nesterov": nesterov, "eps": eps, "seed": seed, **flags}
        common |= {"clip_grad_norm": clip_grad_norm, "target_unclipped": target_unclipped}
        common |= {"bf16_update": bf16_update, "state_dtype": state_dtype}
        super().__init__(params, lr=lr, betas=betas, rho=rho, weight_decay=weight_decay, bs=bs, **common)

    def attach(
        self,
        model: torch.nn.Module,
        every: int = 10,
        *,
        phase: Phase = "paper",
        process_group: ProcessGroup | None = None,
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
        process_group: the processes that train this model together, by default those of DDP or fully_shard, or else
        all. For models that are independent (ensembles, actors), `torch.distributed.new_group([rank],
        use_local_synchronization=True)` of each process alone, or of those that share one.

        The refresh is one more forward and backward of that batch, at the weights it was trained at; h is folded in
        after the step. It is kept so that rho*bs*h = rho*EMA(N*g^2) for N labels, whatever `bs` is, which therefore has
        to stay as it is. Inputs are copied where a refresh is due, without their graph.
        Raises RuntimeError if already attached (`detach` undoes it), ValueError for a model with none of the parameters
        of this optimizer, or whose wrapper has a process group of its own beside the one that is given. The first
        step() raises TypeError, with nothing changed, where likelihood= is needed.
        """
        self._attach(model, every, phase, process_group, self._options(logits, mask, likelihood))

    def refresh(
        self,
        model: torch.nn.Module,
        batches: Iterable,
        *,
        process_group: ProcessGroup | None = None,
        logits: Callable[[Any], torch.Tensor] | None = None,
        mask: Callable[[tuple, dict], torch.Tensor] | None = None,
        likelihood: Likelihood | None = None,
    ) -> None:
        """Refresh the curvature now, on all of `batches` (an iterable of model inputs), as one estimate.

        A mapping is passed to the model by keyword, a tuple or list by position. process_group: as for `attach`, by
        default that which the optimizer is attached with. Whatever else the refresh touches is
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
        self._refresh(model, batches, process_group, self._options(logits, mask, likelihood))

    def _options(self, logits, mask, likelihood):
        check_callable(logits=logits, mask=mask)
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


class SophiaH(SophiaBase):
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
        params: ParamsT,
        lr: float | torch.Tensor = 1e-4,
        betas: tuple[float, float] = (0.96, 0.99),
        rho: float | Literal["auto"] = 0.01,
        weight_decay: float = 1e-1,
        *,
        maximize: bool = False,
        nesterov: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        eps: float = 1e-12,
        clip_grad_norm: float | None = None,
        target_unclipped: float | None = None,
        bf16_update: Rounding = "stochastic",
        state_dtype: StateDtype | None = None,
        seed: int = 0,
    ) -> None:
        flags = {"foreach": foreach, "fused": fused, "capturable": capturable, "differentiable": differentiable}
        common = {"maximize": maximize, "nesterov": nesterov, "eps": eps, "seed": seed, **flags}
        common |= {"clip_grad_norm": clip_grad_norm, "target_unclipped": target_unclipped}
        common |= {"bf16_update": bf16_update, "state_dtype": state_dtype}
        super().__init__(params, lr=lr, betas=betas, rho=rho, weight_decay=weight_decay, bs=1, **common)

    def attach(
        self,
        model: torch.nn.Module,
        every: int = 10,
        *,
        phase: Phase = "paper",
        process_group: ProcessGroup | None = None,
        loss: Callable[[Any], torch.Tensor] | None = None,
    ) -> None:
        """Let step() refresh the curvature by itself, on the model's last training batch, with no change to the loop.

        model, every, phase, process_group: as for SophiaG. loss(output): the training loss, by default the model
        output's `loss`. The refresh is one more forward and two backwards of that batch, at the weights it was trained
        at; h is folded in after the step. Raises as SophiaG's.
        """
        self._attach(model, every, phase, process_group, self._options(loss))

    def refresh(
        self,
        model: torch.nn.Module,
        batches: Iterable,
        *,
        process_group: ProcessGroup | None = None,
        loss: Callable[[Any], torch.Tensor] | None = None,
    ) -> None:
        """Refresh the curvature now, on all of `batches`, as one estimate of the mean loss over them.

        batches, process_group: as for SophiaG. loss(output): the training loss, by default the model output's `loss`,
        or its only scalar. Raises TypeError where there is none, ValueError where it has no second derivative.
        """
        self._refresh(model, batches, process_group, self._options(loss))

    def _options(self, loss):
        check_callable(loss=loss)
        return {"loss": loss}

    def update_hessian(self, u: Iterable[torch.Tensor] | None = None) -> None:
        """h <- beta2*h + (1-beta2)*u*(Hu), with Hu in `.grad` and u a list of probes, one per parameter with a `.grad`.

        Without u, the probe is the Rademacher one that `growkit.ops.rademacher_` writes for the optimizer's seed,
        its number of refreshes and each parameter's index.
        """
        params = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        if u is not None:
            ops.check_alike("update_hessian", params, u=u)
            for i, (p, each) in enumerate(zip(params, u, strict=True)):
                if each.is_complex() != p.is_complex():
                    raise TypeError(f"update_hessian: u[{i}] is {each.dtype}, expected the kind of {p.dtype}")
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
