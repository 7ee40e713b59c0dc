"""The compilers that some tests need."""

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch


def nvcc_home() -> Path | None:
    """The CUDA toolkit's folder, or None."""
    for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda-13.0", "/usr/local/cuda"):
        if home and Path(home, "bin/nvcc").is_file():
            return Path(home).resolve()
    return None


def lacking() -> str | None:
    """What a build of the extension cannot do without and does not find, or None."""
    if not shutil.which("g++"):
        return "no g++ on PATH"
    if not shutil.which("ninja", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"):
        return "no ninja"
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return "no Python.h"
    return None if importlib.util.find_spec("pybind11") else "no pybind11"


needs_compiler = pytest.mark.skipif(lacking() is not None, reason=str(lacking()))
needs_nvcc = pytest.mark.skipif(
    lacking() is not None or nvcc_home() is None, reason=lacking() or "no nvcc in CUDA_HOME or /usr/local/cuda"
)


def toolchain(*compilers) -> tuple:
    """What a build depends on beside sources and flags, for the fixture `compiled_once`."""
    told = [subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout for compiler in compilers]
    read = {k: v for k, v in os.environ.items() if re.search("NVCC|CUDA|CXX|CPATH|INCLUDE|LIBRARY|GROWKIT|FLAGS", k)}
    pybind11 = importlib.metadata.version("pybind11") if importlib.util.find_spec("pybind11") else None
    return told, read, sys.version, sys.prefix, torch.__version__, torch.__file__, pybind11
