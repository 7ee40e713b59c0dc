"""csrc's ops on CPU tensors: nvcc's code for the host as it is, its kernels executed by the emulator.

The entry points check the tensors of a call, plan and launch; host.cpp is CUDA's runtime to them and says that every
tensor is on a GPU. A launch names its kernel, whose PTX is executed on the memory of the call: tensors that the op's
schema says are written may be written, and what the op allocates; all others are read-only.
"""

import ctypes
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from ptx.emulator import Compiled, Counts, Memory, run
from ptx.emulator.program import program
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import growkit.ops  # noqa: F401, for the schemas

ROOT = Path(__file__).parents[3]
HOST = Path(__file__).with_name("host.cpp")
ARCHS = (80, 90, 100)
KERNELS = ("mix", "gather")  # files of csrc
_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint, ctypes.c_size_t, ctypes.c_void_p
)


def build(folder: Path, cuda: Path) -> None:
    """Compile csrc into `folder`: host.so, and <file>_<arch>.ptx. cuda: the toolkit's folder."""
    torch_home = Path(torch.__file__).parent
    target = re.search(r'TORCH_TARGET = "(\w+)"', (ROOT / "setup.py").read_text())[1]
    command = [cuda / "bin/nvcc", "-std=c++17", "-O3", f"-DTORCH_TARGET_VERSION={target}"]
    command += ["-isystem", torch_home / "include", "-isystem", cuda / "include"]
    command += ["-Xcompiler", "-fPIC -fvisibility=hidden -g0", "-c"]
    with tempfile.TemporaryDirectory() as work:
        sources = [*(ROOT / f"csrc/{name}.cu" for name in (*KERNELS, "expand")), HOST]
        for source in sources:
            archs = ARCHS if source.stem in KERNELS else ARCHS[:1]  # the others have nothing for the device
            codes = [f"-gencode=arch=compute_{arch},code=compute_{arch}" for arch in archs]
            _do(*command, *codes, "--keep", "--keep-dir", work, source, "-o", f"{work}/{source.stem}.o")
        objects = [f"{work}/{source.stem}.o" for source in sources]
        link = [f"-L{torch_home / 'lib'}", "-ltorch_cpu", "-lc10", "-Wl,--no-undefined,-Bsymbolic"]
        _do("g++", "-shared", *objects, *link, "-o", folder / "host.so")
        for name in KERNELS:
            for arch in ARCHS:
                shutil.copy(f"{work}/{name}.compute_{arch}.ptx", folder / f"{name}_{arch}.ptx")


def _do(*words) -> None:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


class _Allocations(TorchDispatchMode):
    """Within it, what an op allocates is added to `given`."""

    def __init__(self, given: list):
        super().__init__()
        self._given = given

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.new_empty.default:
            self._given.append((result, "workspace", True))
        return result


class Device:
    """What `build` made, loaded: once in a process, as torch knows one set of CUDA kernels.

    arch: whose PTX runs. mutate: changes it before. launches: kernels' names and counts, in order.
    """

    def __init__(self, folder: Path):
        self.arch = 90
        self.mutate: Callable[[str], str] = str
        self.launches: list[tuple[str, Counts]] = []
        self._ptx = {(name, arch): (folder / f"{name}_{arch}.ptx").read_text() for name in KERNELS for arch in ARCHS}
        self._given: list[tuple[torch.Tensor, str, bool]] = []
        self._error: Exception | None = None
        self._callback = _LAUNCH(self._launch)
        ctypes.CDLL(str(folder / "host.so")).emulate(self._callback)

    def __call__(self, op: str, *arguments) -> None:
        """torch.ops.growkit.<op>(*arguments). Raises what the emulator found, else what the op raises."""
        overload = getattr(torch.ops.growkit, op).default
        self._error = None
        self._given = [
            (tensor, schema.name, schema.alias_info is not None and schema.alias_info.is_write)
            for schema, value in zip(overload._schema.arguments, arguments, strict=False)
            for tensor in tree_leaves(value)
            if isinstance(tensor, torch.Tensor)
        ]
        try:
            with _Allocations(self._given):
                overload.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *arguments)
        except RuntimeError:
            if self._error is None:
                raise
            raise self._error from None

    def _launch(self, kernel, blocks, threads, shared, arguments):
        if self._error is not None:
            return 1
        try:
            name = kernel.decode()
            (ptx,) = (self._ptx[file, self.arch] for file in KERNELS if f".entry {name}(" in self._ptx[file, self.arch])
            ptx = self.mutate(ptx)
            parameters = program(ptx, name, threads).parameters
            pointers = (ctypes.c_void_p * len(parameters)).from_address(arguments)
            values = [ctypes.string_at(p, parameter.size) for p, parameter in zip(pointers, parameters, strict=True)]
            memory = Memory()
            for given in self._given:
                memory.add(*given)
            compiled = Compiled(name, ptx, shared, name, threads)
            self.launches.append((name, run(compiled, (blocks,), values, memory)))
        except Exception as error:  # which no C++ in between would pass on
            self._error = error
        return int(self._error is not None)
