"""What a parameter's state is: dtypes, 8-bit codes, master copies; and how state from a file becomes that.

`codes` is the integer dtype of an 8-bit `hessian`: uint8 where h is a mean of squares, int8 where it has a sign.
"""

import torch

from growkit import ops, reference
from growkit.optim import distributed
from growkit.warn import warn

# Smaller tensors keep float32 state beside 8-bit state, as in bitsandbytes: norms and biases, which would save nothing.
_CODED_FROM = 4096


def dtype_of(p, group):
    wide = torch.promote_types(p.dtype, torch.float32)
    return wide if wide != torch.float32 or group["state_dtype"] in (None, "8bit") else group["state_dtype"]


def is_coded(p, group):
    narrow = torch.promote_types(p.dtype, torch.float32) == torch.float32
    coded = group["state_dtype"] == "8bit" and narrow and p.numel() >= _CODED_FROM
    if coded and distributed.is_sharded(p) and p.shape[1:].numel() % reference.CODES_PER_SCALE:
        raise RuntimeError(
            f"state_dtype='8bit': a parameter of shape {tuple(p.shape)} is sharded, and its blocks of "
            f"{reference.CODES_PER_SCALE} elements would depend on where; expected rows of a multiple of "
            f"{reference.CODES_PER_SCALE} elements, or a group with another state_dtype for it"
        )
    return coded


def has_master(p, group):
    return p.dtype == torch.float16 or p.dtype == torch.bfloat16 and group["bf16_update"] == "master"


def ensure(group, states, codes):
    """Make the state of each parameter that has a gradient. `step` is one tensor, shared by the whole group."""
    known = [states[p]["step"] for p in group["params"] if "step" in states.get(p, ())]
    present = [p for p in group["params"] if p.grad is not None]
    if not known and present:
        known = [torch.zeros((), device=present[0].device if group["capturable"] else "cpu")]
    for p in present:
        state = states[p]
        if not state:
            state["step"] = known[0]
            if is_coded(p, group):
                state |= coded({"exp_avg": torch.zeros_like(p), "hessian": torch.zeros_like(p)}, codes)
            else:
                dtype = {"dtype": dtype_of(p, group), "memory_format": torch.preserve_format}
                state["exp_avg"], state["hessian"] = torch.zeros_like(p, **dtype), torch.zeros_like(p, **dtype)
        if has_master(p, group) and "master" not in state:
            state["master"] = p.detach().to(torch.float32, copy=True)


def coded(values, codes):
    """{"exp_avg": codes, "exp_avg_scale": scales, ...} for {"exp_avg": floats, ...}, to nearest."""
    result = {}
    for key, x in values.items():
        dtype = torch.int8 if key == "exp_avg" else codes
        own = distributed.local(x)
        q = torch.zeros(own.shape, dtype=dtype, device=own.device)
        scale = torch.zeros(-(-own.numel() // reference.CODES_PER_SCALE), 2, device=own.device)
        reference.quantise_(q, scale, own.float())
        result[key] = distributed.like(x, q)
        result[key + "_scale"] = distributed.like(x, scale.view(-1, *_scale_shape(x)[1:]), _scale_shape(x))
    return result


def _scale_shape(x):
    """Of the scales of 8-bit codes x: [rows, blocks, 2] where no block spans rows, so that x may be cut into shards
    between them, of a file or of processes, and its scales with it; else [blocks, 2]."""
    if x.dim() and not x.shape[1:].numel() % reference.CODES_PER_SCALE:
        return x.shape[0], x.shape[1:].numel() // reference.CODES_PER_SCALE, 2
    return -(-x.numel() // reference.CODES_PER_SCALE), 2


def held(state):
    """The tensors of a parameter's state that an op takes: what this process holds of them, scales as [blocks, 2]."""
    own = {k: distributed.local(t) for k, t in state.items() if k != "step"}
    # Detached, for a view keeps what it is a view of.
    return {k: t.detach().view(-1, 2) if k.endswith("_scale") else t for k, t in own.items()}


def check_updatable(name, i, p, state):
    """Raise for what an op could not write to: parameter i, or its state, as this process holds them."""
    state = {k: distributed.local(t) for k, t in state.items()}
    if state and (missing := {"step", "exp_avg", "hessian"} - state.keys()):
        raise ValueError(f"{name}: state of parameter {i} has {sorted(state)}, expected {sorted(missing)} as well")
    for key, t in {"parameter": p, **state}.items():
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{name}: {key} of parameter {i} is {type(t).__name__}, expected a tensor")
        told = f"{name}: {key} of parameter {i}, {t.dtype} {tuple(t.shape)}, "
        if t.is_inference():
            raise RuntimeError(f"{told}was made in torch.inference_mode(), expected a tensor that can be written to")
        if t.layout != torch.strided or any(
            n > 1 and stride == 0 for n, stride in zip(t.shape, t.stride(), strict=True)
        ):
            raise ValueError(f"{told}is {t.layout} or expanded, expected memory of its own for each element")
        if key == "step" and t.numel() != 1:
            raise ValueError(f"{told}expected 1 element")
        floating = t.is_floating_point() or t.is_complex()
        if key != "step" and key + "_scale" not in state and (not floating or t.is_complex() != p.is_complex()):
            raise TypeError(f"{told}expected the kind of the parameter, {p.dtype}")


def check_coded(name, p, state):
    dtypes = {"exp_avg": (torch.int8,), "hessian": (torch.uint8, torch.int8)}
    pairs = {key: ([state[key]], [state[key + "_scale"]]) for key in dtypes}
    ops.check_coded(name, [p], dtypes, **pairs)


def of_file(param_groups, state_dict):
    """{index in the file: (parameter, its state in the file)}, of those that have state."""
    indices = [i for group in state_dict["param_groups"] for i in group["params"]]
    params = [p for group in param_groups for p in group["params"]]
    state = state_dict["state"]
    return {i: (p, state[i]) for i, p in zip(indices, params, strict=False) if state.get(i)}


def check_file(name, param_groups, state_dict, curvature):
    """Raise ValueError where the state of a file does not fit the parameters."""
    for group in state_dict["param_groups"]:
        # Files without the key are the official SophiaG's, or from before it: SophiaH's have bs=1.
        found = group.get("curvature", "gnb" if group.get("bs") != 1 else curvature)
        if found != curvature:
            raise ValueError(
                f"the file's curvature is that of {found}, expected {curvature}: {name} takes no state of the other "
                "class, whose h has another unit"
            )
    for i, (p, state) in of_file(param_groups, state_dict).items():
        needed = {"step", "exp_avg", "hessian"}
        scales = {key for key in state if key.endswith("_scale")}
        if missing := (needed | {"exp_avg_scale", "hessian_scale"} if scales else needed) - state.keys():
            raise ValueError(f"state of parameter {i} has {sorted(state)}, expected {sorted(missing)} as well")
        if scales:
            check_coded(name, distributed.local(state["exp_avg"]), held(state))
        for key in needed - {"step"}:
            if not torch.is_tensor(state[key]):
                raise ValueError(f"state {key} of parameter {i} is {type(state[key]).__name__}, expected a tensor")
        for key, value in state.items():
            if key in {"step", *scales} or not torch.is_tensor(value):
                continue
            if value.shape != p.shape:
                raise ValueError(
                    f"state {key} of parameter {i} has shape {tuple(value.shape)}, expected {tuple(p.shape)}"
                )
            if distributed.is_sharded(value) and distributed.layout(value) != distributed.layout(p):
                raise ValueError(
                    f"state {key} of parameter {i} is a DTensor {value.placements} on {value.device_mesh}, expected a "
                    "whole tensor, or one that is laid out as the parameter is"
                )


def complete_groups(param_groups, groups, defaults):
    """The groups of a file with what they lack taken from `param_groups`, those of the optimizer."""
    groups = [dict(group) for group in groups]
    for own, group in zip(param_groups, groups, strict=False):
        for key in ("bs", "rho"):
            if key not in group and not (key == "rho" and "gamma" in group):
                warn(f"the loaded file has no {key}: keeping {key}={own[key]}")
        if not group.get("every"):
            group |= {"every": own["every"], "phase": own["phase"]}
        group.setdefault("nesterov", False)
        for key in defaults:
            group.setdefault(key, own[key])
        group["state_dtype"] = own["state_dtype"] or group["state_dtype"]
        for key in ("steps", "refreshes"):
            group[key] = torch.as_tensor(group[key]).clone()
        if "gamma" in group:
            group["rho"] = group.pop("gamma") / group["bs"]
        if group["target_unclipped"] is not None:
            group["rho"] = torch.as_tensor(group["rho"], dtype=torch.float64).clone()
    return groups


def convert(p, group, state, codes):
    """The tensors of a loaded state as copies on the parameter's device, in the form that the optimizer keeps."""
    state = {k: _placed(k, t, p) for k, t in state.items() if k != "step" and torch.is_tensor(t)}
    scales = {k: state.pop(k + "_scale", None) for k in ("exp_avg", "hessian")}
    for (key, scale), dtype in zip(scales.items(), (torch.int8, codes), strict=True):
        x = state[key]
        if is_coded(p, group) and scale is not None and x.dtype == dtype:
            state[key + "_scale"] = scale
            continue
        if scale is not None:
            own = held({"codes": x, "codes_scale": scale})
            x = distributed.like(x, reference.dequantise(own["codes"], own["codes_scale"]))
        state |= coded({key: x}, codes) if is_coded(p, group) else {key: x.to(dtype_of(p, group))}
    return {k: t.float() if k == "master" else t for k, t in state.items()}


def _placed(key, t, p):
    """A copy of one tensor of a file where the parameter lies, and of a whole tensor the shard."""
    if key.endswith("_scale") and not distributed.is_sharded(t):
        t = t.view(_scale_shape(p))
    return (
        distributed.shard_of(t, p)
        if distributed.is_sharded(p) > distributed.is_sharded(t)
        else t.to(p.device, copy=True)
    )


def share_steps(param_groups, states):
    """Make `step` one tensor for each group again, after a copy or a file gave every parameter its own."""
    for group in param_groups:
        own = [states[p] for p in group["params"] if "step" in states.get(p, ())]
        if own:
            place = group["params"][0].device if group["capturable"] else "cpu"
            step = torch.tensor(max(float(s["step"]) for s in own), device=place)
            for s in own:
                s["step"] = step
