"""Which tensors go into one op call: buckets of equal device, dtypes and kind of state, kept from step to step.

Of sharded tensors an op gets what this process holds, with its place in the whole.
"""

from collections import defaultdict
from itertools import accumulate, repeat
from operator import attrgetter, is_, is_not, itemgetter

import torch

from growkit import kernels, ops
from growkit.optim import distributed
from growkit.optim.state import check_coded, check_updatable, dtype_of, ensure, has_master, held, is_coded


class Buckets:
    """The buckets of an optimizer's groups. name: of the optimizer, for errors; codes: dtype of an 8-bit `hessian`.

    numbers: {parameter: index} to key random bits by, where the optimizer holds but a part of all parameters.
    """

    def __init__(self, name, codes):
        self._name, self._codes = name, codes
        self._kept = {}  # index of a group's first parameter -> _Kept
        self.numbers = {}

    def clear(self):
        self._kept.clear()

    def prepare(self, param_groups, states):
        """[(group, its buckets)], all state made. Raises for whatever a step could not use, before anything changes."""
        firsts = accumulate((len(group["params"]) for group in param_groups), initial=0)
        groups = list(zip(firsts, param_groups, strict=False))
        prepared = [(group, self._of(first, group, states)) for first, group in groups]
        for i, (first, group) in enumerate(groups):
            if not all(bucket["complete"] for bucket in prepared[i][1]):
                ensure(group, states, self._codes)
                prepared[i] = group, self._of(first, group, states)
        return prepared

    def _of(self, first, group, states):
        """Lists {"p", "g", "exp_avg", "hessian", "master", ...} of those parameters that have a gradient.

        8-bit state has the lists "exp_avg_scale" and "hessian_scale", too. "index" holds indices in the group, "number"
        those among all parameters, of which `first` is the group's first; "key" is what the ops draw random bits by.
        One bucket per device, dtype, gradient dtype, kind of state and mesh, complex tensors as real. Everything but
        gradients is kept from call to call, and checked again only when a parameter's address, a gradient's shape or
        dtype, or a state tensor is another.
        """
        params, grads = distributed.local_pairs(group["params"])
        if torch.compiler.is_compiling():
            buckets = self._sort(first, group, grads, [states.get(p) for p in group["params"]])
        else:
            there = grads if all(map(is_not, grads, repeat(None))) else [g for g in grads if g is not None]
            kinds = (
                len(there) if there is grads else [g is None for g in grads],
                list(map(attrgetter("shape"), there)),
                list(map(attrgetter("dtype"), there)),
                list(map(attrgetter("layout"), there)),
                list(map(torch.Tensor.data_ptr, params)),
                (group["capturable"], group["bf16_update"]),
            )
            kept = self._kept.get(first)
            if kept is None or kept.kinds != kinds or not kept.holds(states):
                own = [states.get(p) for p in group["params"]]
                self._kept[first] = kept = _Kept(kinds, states, self._sort(first, group, grads, own))
            buckets = kept.buckets
        return [{**bucket, "g": _gradients(bucket, grads)} for bucket in buckets]

    def _sort(self, first, group, grads, own):
        buckets = defaultdict(lambda: defaultdict(list))
        for index, (whole, g, state) in enumerate(zip(group["params"], grads, own, strict=True)):
            if g is None:
                continue
            i, p, layout = first + index, distributed.local(whole), distributed.layout(whole)
            if g.layout != torch.strided:
                raise RuntimeError(f"{self._name} does not support sparse gradients")
            # While it traces, torch.compile sets capturable itself.
            if group["capturable"] and not p.is_cuda and not torch.compiler.is_compiling():
                raise RuntimeError(f"capturable=True: parameter {i} is on {p.device}, expected a CUDA device")
            if not torch.compiler.is_compiling():
                check_updatable(self._name, i, p, state or {})
            tensors = held(state or {})
            elementwise = {k: [t] for k, t in tensors.items() if not k.endswith("_scale")}
            ops.check_alike(self._name, [p], grad=[g], **elementwise)
            coded = "exp_avg_scale" in tensors if tensors else is_coded(whole, group)
            needed = ["exp_avg", "hessian"]
            if coded:
                needed += ["exp_avg_scale", "hessian_scale"]
                if tensors:
                    check_coded(self._name, p, tensors)
            if has_master(p, group):
                needed += ["master"]
            bucket = buckets[p.device, p.dtype, g.dtype, coded, layout]
            bucket["whole"] = whole
            bucket["states"].append(state)
            bucket["index"].append(index)
            bucket["number"].append(i)
            bucket["p"].append(as_real(p))
            key = bucket["key"] = bucket.get("key", {"parameter": []})
            key["parameter"].append(self.numbers.get(whole, i))
            if layout is not None:
                offset = self._offset(whole, i, group)
                key.setdefault("offset", []).append(offset * (1 + p.is_complex()))
            bucket["step"] = (state or {}).get("step")
            bucket["complete"] = bucket.get("complete", True) and all(name in tensors for name in needed)
            for name in needed:
                if name in tensors:
                    bucket[name].append(as_real(tensors[name]))
        return buckets.values()

    def _offset(self, p, i, group):
        """Index, in the whole of parameter i, of the first element of this process's shard."""
        offset = distributed.first_element(p)
        rounded = p.dtype == torch.bfloat16 and group["bf16_update"] == "stochastic"
        drawn = rounded or dtype_of(p, group) == torch.bfloat16 or is_coded(p, group)
        drawn = drawn or self._codes == torch.int8  # SophiaH, which draws probes
        if offset is None and drawn:
            raise RuntimeError(
                f"{self._name}: parameter {i} is a DTensor {p.placements}, of which this process holds no single run "
                "of elements, so that its random bits would be those of other ones; expected Shard(0)"
            )
        return offset or 0


class _Kept:
    """The buckets of a group, with what they were made of."""

    def __init__(self, kinds, states, buckets):
        lists = ("exp_avg", "hessian", "exp_avg_scale", "hessian_scale", "master")
        self.kinds = kinds
        self.buckets = [{k: kernels.TensorList(v) if k in ("p", *lists) else v for k, v in b.items()} for b in buckets]
        self._complete = all(bucket["complete"] for bucket in buckets)
        self._states = list(states.values())
        self._tensors = [
            (bucket["states"], name, [state[name] for state in bucket["states"]])
            for bucket in buckets
            for name in ("step", *lists)
            if self._complete and (name == "step" or name in bucket)
        ]

    def holds(self, states):
        """Whether the state of the optimizer still is the same objects."""
        if not self._complete or len(states) != len(self._states) or not all(map(is_, states.values(), self._states)):
            return False
        try:
            return all(all(map(is_, map(itemgetter(k), own), kept)) for own, k, kept in self._tensors)
        except KeyError:
            return False


def _gradients(bucket, grads):
    indices = bucket["index"]
    grads = grads if len(indices) == len(grads) else [grads[i] for i in indices]
    return list(map(as_real, grads)) if bucket["p"][0].dtype != grads[0].dtype else grads


def as_real(t):
    return torch.view_as_real(t) if t.is_complex() else t
