"""The only build logic: the version, what the compiled extension holds, and how it is compiled.

growkit._C has kernels for CPUs and what a step asks of its tensors, for which a C++ compiler, pybind11 and ninja are
all it takes, and CUDA kernels where there are torch and nvcc, too. Those use only torch's stable ABI, so nvcc is driven
here directly, which works beside any torch, one without CUDA included; torch's own build helper refuses that. Read from
the environment:
GROWKIT_LOCAL_VERSION=x        the version ends in +x
GROWKIT_SKIP_BUILD=1           never build the extension
GROWKIT_SKIP_CUDA_BUILD=1      never build its CUDA kernels
GROWKIT_FORCE_CUDA=1           build them beside any torch, and fail where they cannot be built
CXX                            the C++ compiler; else g++
CUDA_HOME                      the toolkit; else the folder of nvcc on PATH, else /usr/local/cuda
TORCH_CUDA_ARCH_LIST, MAX_JOBS, NVCC_APPEND_FLAGS    as everywhere
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ARCHS = "8.0;9.0;10.0;12.0+PTX"
TORCH_TARGET = "0x020a000000000000"  # the oldest torch that the built extension runs with: 2.10
SOURCES = ["csrc/bindings.cpp", "csrc/cpu.cpp", "csrc/lists.cpp"]
CUDA_SOURCES = ["csrc/expand.cu", "csrc/mix.cu", "csrc/gather.cu"]
CXX = shlex.split(os.environ.get("CXX") or "g++")
INCLUDE = Path(sysconfig.get_paths()["include"])


def ninja():
    """The program, also where its environment is not activated; or None."""
    return shutil.which("ninja") or shutil.which("ninja", path=Path(sys.executable).parent)


def toolkit():
    """Folder of the CUDA toolkit, or None. A script named nvcc says nothing of where its toolkit is: ask it."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = Path(named, "bin/nvcc") if named else shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not Path(nvcc).is_file():
        return None
    dry = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", dry, re.MULTILINE)
    return Path(top[1].strip()).resolve() if top else Path(nvcc).resolve().parents[1]


def refusal():
    """Why there will be no extension, or None."""
    if os.environ.get("GROWKIT_SKIP_BUILD") == "1":
        return "GROWKIT_SKIP_BUILD=1"
    if sys.platform != "linux":
        return f"it is built on Linux only, this is {sys.platform}"
    if not shutil.which(CXX[0]):
        return f"{CXX[0]} is not on PATH"
    if not importlib.util.find_spec("pybind11"):
        return "pybind11 is not installed here"
    if not ninja():
        return "ninja is not on PATH"
    if not (INCLUDE / "Python.h").exists():
        return f"no Python.h in {INCLUDE}; on Debian and Ubuntu it comes with python3-dev"
    return None


def cuda_refusal():
    """Why there will be no CUDA kernels in the extension, or None."""
    if os.environ.get("GROWKIT_SKIP_CUDA_BUILD") == "1":
        return "GROWKIT_SKIP_CUDA_BUILD=1"
    if not importlib.util.find_spec("torch"):
        return "torch is not installed here (an isolated build does not see it: --no-build-isolation)"
    if not toolkit():
        return "no nvcc in CUDA_HOME, on PATH or in /usr/local/cuda"
    if os.environ.get("GROWKIT_FORCE_CUDA") == "1":
        return None
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA; GROWKIT_FORCE_CUDA=1 builds them all the same"
    nvcc = subprocess.run([toolkit() / "bin/nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+)", nvcc)[1]
    if release != torch.version.cuda.split(".")[0]:
        return f"nvcc is of CUDA {release}, torch {torch.__version__} of CUDA {torch.version.cuda}"
    return None


def code_flags(archs):
    """nvcc's flags for a list such as "8.0;9.0+PTX"; an empty list is refused."""
    flags = []
    for arch in archs.replace(" ", ";").split(";"):
        if not arch:
            continue
        number = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", arch)
        if not number:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: got {arch!r}, expected numbers such as 9.0 or 12.0+PTX")
        code = number[1] + number[2] + number[3]
        flags.append(f"-gencode=arch=compute_{code},code=sm_{code}")
        if number[4]:
            flags.append(f"-gencode=arch=compute_{code},code=compute_{code}")
    if not flags:
        raise SystemExit(f"TORCH_CUDA_ARCH_LIST: got {archs!r}, expected at least one number such as 9.0")
    return " ".join(flags)


class NinjaBuild(build_ext):
    """Compiles and links through ninja, which also sees what is up to date."""

    def build_extension(self, ext):
        import pybind11

        root = Path.cwd()
        target = (root / self.get_ext_fullpath(ext.name)).resolve()
        work = (root / self.build_temp).resolve()
        for folder in (target.parent, work):
            folder.mkdir(parents=True, exist_ok=True)
        # No folder of this machine ends up in the library's messages.
        named = {root: "growkit", Path(pybind11.get_include()): "pybind11", INCLUDE: "python"}
        libraries, nvcc = "-ldl", "false"
        if not set(CUDA_SOURCES).isdisjoint(ext.sources):
            named |= {(torch := self._torch()): "torch", (cuda := toolkit()): "cuda"}
            runtime = next(path for path in (cuda / "lib64", cuda / "lib") if (path / "libcudart_static.a").exists())
            codes = code_flags(os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHS)
            nvcc = (
                f"{cuda}/bin/nvcc -std=c++17 -O3 {codes} -DTORCH_TARGET_VERSION={TORCH_TARGET} "
                f"-isystem {torch}/include -isystem {cuda}/include"
            )
            # --no-as-needed -ltorch: nothing here refers to libtorch.so, but with it libtorch_cuda.so comes along where
            # there is one, and the weak stream function of expand.cu is found.
            libraries = (
                f"-L{torch}/lib -Wl,--no-as-needed -ltorch -Wl,--as-needed -ltorch_cpu -lc10 "
                f"{runtime}/libcudart_static.a -Wl,--exclude-libs,ALL -ldl -lrt -lpthread"
            )
        maps = " ".join(f"-ffile-prefix-map={folder}={name}" for folder, name in named.items())
        host = f"-fPIC -fvisibility=hidden -g0 -Wall {maps}"
        # cpu.cpp says itself where a*b + c is rounded once. No result depends on errno or on floating-point traps, and
        # loops with a choice in them become vector code only where those are known not to matter.
        cxx = f"{shlex.join(CXX)} -std=c++17 -O3 -ffp-contract=off -fno-math-errno -fno-trapping-math"
        rules = f"""
rule cpp
  command = {cxx} {host} -isystem {pybind11.get_include()} -isystem {INCLUDE} -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule cuda
  command = {nvcc} -Xcompiler '{host}' -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = {shlex.join(CXX)} -shared $in -o $out {libraries}
"""
        objects = []
        for source in ext.sources:
            objects.append(work / f"{Path(source).name}.o")
            rules += f"build {objects[-1]}: {'cuda' if source.endswith('.cu') else 'cpp'} {source}\n"
        rules += f"build {target}: link {' '.join(map(str, objects))}\n"
        (work / "build.ninja").write_text(f"builddir = {work}\n{rules}")
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        # From here, so that the sources' own paths are relative.
        subprocess.run([ninja(), "-f", str(work / "build.ninja"), *jobs], check=True, stdout=sys.stderr)

    @staticmethod
    def _torch():
        import torch

        return Path(torch.__file__).parent


version = re.search(r'^__version__ = "([^"]+)"', Path("growkit/__init__.py").read_text(), re.MULTILINE)[1]
local = os.environ.get("GROWKIT_LOCAL_VERSION")
reason, cuda_reason = refusal(), cuda_refusal()
if (reason or cuda_reason) and os.environ.get("GROWKIT_FORCE_CUDA") == "1":
    raise SystemExit(f"GROWKIT_FORCE_CUDA=1, but: {reason or cuda_reason}")
if reason:
    print(f"growkit: no compiled extension: {reason}", file=sys.stderr)
elif cuda_reason:
    print(f"growkit: no CUDA kernels in the compiled extension: {cuda_reason}", file=sys.stderr)
setup(
    version=f"{version}+{local}" if local else version,
    ext_modules=[] if reason else [Extension("growkit._C", SOURCES if cuda_reason else SOURCES + CUDA_SOURCES)],
    cmdclass={"build_ext": NinjaBuild},
)
