"""Instructions that `SophiaG.step()` takes on the host, all but the launch: a count, where clocks are too noisy.

Counted by valgrind's callgrind in a process of its own, on CPU tensors, in which the kernel's function makes its table
of chunks and launches nothing: checks, buckets, schedule and table are the same on every device. Repeatable to about
1e-3 for one build of Python and torch.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version

import torch

from growkit import kernels, ops
from growkit.bench.measure import Case, Value
from growkit.bench.sophia import SCALARS, gpt2_shapes
from growkit.optim import SophiaG

STEPS = 2


def why_not():
    """In words why this machine cannot count instructions; None where it can."""
    if not shutil.which("valgrind"):
        return "valgrind is not installed"
    if not kernels.available:
        return "triton is not installed"
    if not torch._C._valgrind_supported_platform():
        return "this torch was built without valgrind's marks"


def count():
    """Instructions of one step with 148 parameters. Raises RuntimeError if the counted process fails."""
    environment = os.environ | {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as folder:
        words = ["valgrind", "--tool=callgrind", "--instr-atstart=no", "--collect-atstart=no"]
        words += [f"--callgrind-out-file={folder}/out", sys.executable, "-m", "growkit.bench.instructions"]
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    found = re.search(r"Collected : (\d+)", done.stderr)
    if done.returncode or not found or not int(found[1]):
        raise RuntimeError(f"valgrind exited with {done.returncode}: {done.stderr.strip()[-300:]}")
    return int(found[1]) // STEPS


def key():
    """What a count depends on beside growkit: the builds of Python, torch and triton, and the architecture."""
    python = f"{platform.python_implementation()} {platform.python_version()} {' '.join(platform.python_build())}"
    return f"{platform.machine()}, {python}, torch {torch.__version__}, triton {version('triton')}"


def step_instructions(device, tiny=False):
    optimizer = _optimizer(4 if tiny else 148)

    def rows(rounds):
        if tiny:
            return {"S10.instructions": "counted at full size only"}
        return {"S10.instructions": why_not() or Value(float(count()))}

    def check():
        steps = optimizer.stats()["steps"]
        optimizer.step()
        if optimizer.stats()["steps"] != steps + 1:
            raise AssertionError("step() did not count itself")

    return Case(optimizer.step, check, rows)


def _optimizer(tensors):
    parameters = [torch.nn.Parameter(torch.ones(1)) for _ in gpt2_shapes()[:tensors]]
    for p in parameters:
        p.grad = torch.ones(1)
    optimizer = SophiaG(parameters, lr=SCALARS["lr"])
    optimizer.update_hessian()
    return optimizer


def _counted():
    """What runs under callgrind."""
    optimizer = _optimizer(148)
    from growkit.kernels import sophia  # here, because it imports Triton

    sophia._launch = lambda *arguments, **options: None
    ops.sophia_step_ = sophia.sophia_step_
    for _ in range(3):
        optimizer.step()
    done = subprocess.run(["callgrind_control", "-i", "on", str(os.getpid())], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    torch._C._valgrind_toggle()
    for _ in range(STEPS):
        optimizer.step()
    torch._C._valgrind_toggle()


if __name__ == "__main__":
    _counted()
