"""Which tensors go into one op call: buckets of equal device, dtypes and kind of state, kept from step to step.

Of sharded tensors an op gets what this process holds, with its place in the whole.
"""

import contextlib
import operator
import weakref
from collections import defaultdict
from itertools import accumulate

import torch

from growkit import ops
from growkit.kernels.lists import WITHOUT_ADDRESS, TensorList, describe, identities, referents
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
        self.clear()

    def clear(self):
        self._kept.clear()
        self._states = None  # which objects the state was

    def prepare(self, param_groups, states):
        """[(group, its buckets)], all state made. Raises for whatever a step could not use, before anything changes."""
        keeping = not torch.compiler.is_compiling()
        if keeping and identities(states) != self._states:
            self._kept.clear()
            self._states = identities(states)
        firsts = list(accumulate((len(group["params"]) for group in param_groups[:-1]), initial=0))
        groups = list(zip(firsts, param_groups, strict=True))
        prepared = [(group, self._of(first, group, states, keeping)) for first, group in groups]
        for i, (first, group) in enumerate(groups):
            if not all(bucket["complete"] for bucket in prepared[i][1]):
                ensure(group, states, self._codes)
                prepared[i] = group, self._of(first, group, states, keeping)
                if keeping:
                    self._states = identities(states)
        return prepared

    def _of(self, first, group, states, keeping):
        """Lists {"p", "g", "exp_avg", "hessian", "master", ...} of those parameters that have a gradient.

        8-bit state has the lists "exp_avg_scale" and "hessian_scale", too. "index" holds indices in the group, "number"
        those among all parameters, of which `first` is the group's first; "key" is what the ops draw random bits by.
        One bucket per device, dtype, gradient dtype, kind of state and mesh, complex tensors as real. What was found is
        kept from call to call; no gradient is, and no tensor of the state.
        """
        kept = self._kept.get(first) if keeping else None
        buckets = kept and kept.with_gradients(group)
        if buckets is None:
            params, grads = distributed.local_pairs(group["params"])
            sorted_ = self._sort(first, group, grads, [states.get(p) for p in group["params"]])
            buckets = [{**bucket, "g": _gradients(bucket, grads)} for bucket in sorted_]
            if keeping and all(bucket["complete"] for bucket in buckets):
                with contextlib.suppress(*WITHOUT_ADDRESS):
                    self._kept[first] = _Kept(group, params, grads, sorted_, self._forget())
        return buckets

    def _forget(self):
        """What clears all that is kept when a weak reference dies, without keeping this."""
        mine = weakref.ref(self)

        def forget(_):
            if (buckets := mine()) is not None:
                buckets.clear()

        return forget

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
        return list(buckets.values())

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


_STATE = ("exp_avg", "hessian", "exp_avg_scale", "hessian_scale", "master")


class _Kept:
    """The buckets of a group, for as long as all that they were made of, state apart, is what it was."""

    def __init__(self, group, params, grads, buckets, forget):
        self._params, self._objects = identities(group["params"]), [*group["params"]]
        self._options = _options(group)
        self._sharded = params is not group["params"]
        self._idle = [i for i, g in enumerate(grads) if g is None]
        self._buckets = []
        for bucket in buckets:
            own = {name: _State(bucket["states"], name, bucket[name], forget) for name in _STATE if name in bucket}
            facts = {k: v for k, v in bucket.items() if k not in own and k not in ("p", "states")}
            kept = facts, own, {}
            self._buckets.append((kept, _look(*kept, params, grads)[0]))

    def with_gradients(self, group):
        """The buckets with the gradients of now as "g"; None where they have to be made anew."""
        if self._options != _options(group) or self._params != identities(group["params"]):
            return None
        if self._sharded:
            params, grads = distributed.local_pairs(group["params"])
        else:
            params, grads = group["params"], [p.grad for p in group["params"]]
        if any(grads[i] is not None for i in self._idle):
            return None
        result = []
        for kept, seen in self._buckets:
            try:
                now, lists = _look(*kept, params, grads)
            except WITHOUT_ADDRESS:
                return None
            if now != seen:
                return None
            result.append({**kept[0], **lists})
        return result


class _State:
    """A list of tensors of the state, without holding them: what moves elsewhere, to the host say, is freed at once.

    states: of its parameters; tensors: what ops take of `name` there. Of views, which do hold the memory, `forget` is
    called when a tensor of the state goes.
    """

    def __init__(self, states, name, tensors, forget):
        own = [state[name] for state in states]
        self._views = None if all(map(operator.is_, own, tensors)) else tensors
        self._own = [weakref.ref(t, self._views and forget) for t in own]
        self._known = {}

    def now(self):
        return TensorList(referents(self._own) if self._views is None else self._views, self._known)


def _look(bucket, state, known, params, grads):
    """(what a bucket is good for, its lists), as of now. The lists are told what they are, for the ops to read."""
    p, g = _pick(params, bucket["index"]), _pick(grads, bucket["index"])
    if bucket["whole"].is_complex():
        p, g = map(as_real, p), map(as_real, g)
    lists = {"p": TensorList(p, known), "g": TensorList(g)} | {name: each.now() for name, each in state.items()}
    for each in lists.values():
        each.told = describe(each)
    return [each.told[1] for each in lists.values()], lists


def _options(group):
    return group["capturable"], group["bf16_update"]


def _pick(tensors, indices):
    return tensors if len(indices) == len(tensors) else [tensors[i] for i in indices]


def _gradients(bucket, grads):
    return list(map(as_real, _pick(grads, bucket["index"])))


def as_real(t):
    """Detached first, for a view keeps what it is a view of."""
    return torch.view_as_real(t.detach()) if t.is_complex() else t
