"""growkit's own launchers, their kernels executed by the emulator.

The launchers run on CPU tensors: they build tables and arguments and choose grids. In place of Triton's launch each
kernel is specialised and compiled, and its PTX is executed. Every tensor of a call is registered with its exact bounds,
and as read-only unless the op documents that it is written.
"""

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from ptx.emulator import Compiled, Counts, Memory, compile, run, specialise
from ptx.emulator.launch import Specialised
from triton.runtime.jit import JITFunction

from growkit.kernels import multi_tensor

# Tensors that kernels take as arguments and write; those of lists are named by the launcher.
WRITTEN = {
    "_sophia_step": {"unclipped"},
    "_sophia_step_8bit": {"unclipped"},
    "_squares": {"partial"},
    "partial_kernel": {"maxima", "sums"},
    "sample_kernel": {"labels", "lse", "nll"},
    "backward_kernel": {"out"},
}


class OnDevice(torch.Tensor):
    """A CPU tensor that launchers take for one on a GPU, so that kernels read it."""

    is_cuda = True


def on_device(value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(value, dtype=dtype).as_subclass(OnDevice)


class Launch(NamedTuple):
    call: Specialised
    counts: Counts


class Emulation(contextlib.AbstractContextManager):
    """Within it, kernels run on the emulator. launches: what they did, in order.

    mutate: changes compiled kernels before they run. options: of the compiler, in place of those that launchers give.
    """

    def __init__(
        self,
        arch: int = 90,
        noise: int | None = None,
        mutate: Callable[[Compiled], Compiled] | None = None,
        **options: bool,
    ):
        self.arch, self.noise, self.mutate, self.options = arch, noise, mutate, options
        self.launches: list[Launch] = []
        self._lists: tuple[dict, tuple] = {}, ()

    def __enter__(self):
        self._saved = JITFunction.run, multi_tensor.Lists.__init__
        init = multi_tensor.Lists.__init__

        def remember(lists, op, given, *, written=(), **options):
            init(lists, op, given, written=written, **options)
            tensors = given.values() if lists._tensors is None else lists._tensors
            self._lists = dict(zip(given, tensors, strict=True)), written

        JITFunction.run = lambda kernel, *args, grid, warmup, **kwargs: self._run(kernel, grid, args, kwargs)
        multi_tensor.Lists.__init__ = remember
        return self

    def __exit__(self, *_):
        JITFunction.run, multi_tensor.Lists.__init__ = self._saved

    def _run(self, kernel, grid, args, kwargs):
        call = specialise(kernel, args, kwargs | self.options, self.arch)
        compiled = compile(call, self.arch)
        if self.mutate:
            compiled = self.mutate(compiled)
        self.launches.append(Launch(call, run(compiled, grid, call.values, self._memory(kernel, args), self.noise)))

    def _memory(self, kernel, args):
        memory, writes = Memory(), WRITTEN.get(kernel.__name__, ())
        for name, value in zip(kernel.arg_names, args, strict=False):
            if isinstance(value, torch.Tensor):
                memory.add(value, name, name in writes)
        if kernel.arg_names[0] == "addresses":
            lists, written = self._lists
            for name, tensors in lists.items():
                for i, t in enumerate(tensors):
                    memory.add(t, f"{name}[{i}]", name in written)
        return memory


class Record(Emulation):
    """Within it, nothing is compiled or run: launches are noted, and what kernels should write is zero."""

    def _run(self, kernel, grid, args, kwargs):
        for name, value in zip(kernel.arg_names, args, strict=False):
            if value is not None and name in WRITTEN.get(kernel.__name__, ()):
                value.zero_()
        self.launches.append(Launch(specialise(kernel, args, kwargs, self.arch), Counts()))
