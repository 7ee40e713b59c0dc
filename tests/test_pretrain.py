"""examples/pretrain.py: a stopped run goes on to the bit, on another number of processes too; what it saves grows."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

AutoModelForCausalLM = pytest.importorskip("transformers").AutoModelForCausalLM

from growkit.growth import recipe as growth  # noqa: E402

EXAMPLE = Path(__file__).parents[1] / "examples/pretrain.py"
STEPS, STOP = 6, 4
STOPPED = f"""
import runpy, sys, torch
script = runpy.run_path({str(EXAMPLE)!r})
count, step = 0, torch.optim.Optimizer.zero_grad
def stop(*args, **kwargs):
    global count
    count += 1
    if count == {STOP + 1}:
        raise KeyboardInterrupt
    return step(*args, **kwargs)
torch.optim.Optimizer.zero_grad = stop
sys.argv[0] = {str(EXAMPLE)!r}
script["typer"].run(script["pretrain"])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrain")
    (folder / "text.txt").write_bytes(bytes(torch.randint(97, 110, (2000,), dtype=torch.uint8)))
    # No dropout, which every process draws for its own rows.
    sizes = {
        "vocab_size": 256,
        "n_positions": 16,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "attn_pdrop": 0,
        "embd_pdrop": 0,
        "resid_pdrop": 0,
    }
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", **sizes}))
    return folder


def run(folder, out, *command, check=True, model="config.json", options=()):
    words = f"--steps {STEPS} --save-every 2 --context 16 --batch 4 --every 2".split()
    command = [sys.executable, *command, folder / "text.txt", folder / model, folder / out, *words, *options]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return [float(bits) for bits in re.findall(r"validation ([\d.]+) bits", done.stdout)]


def weights(folder, out):
    return AutoModelForCausalLM.from_pretrained(folder / out / "model").state_dict()


@pytest.fixture(scope="module")
def whole(folder):
    """(validation at each checkpoint, weights) of a run that nothing stops."""
    return run(folder, "whole", EXAMPLE), weights(folder, "whole")


@pytest.fixture(scope="module")
def stopped(folder):
    run(folder, "stopped", "-c", STOPPED, check=False)
    assert [path.name for path in (folder / "stopped").iterdir()] == [f"step-{STOP}"]
    return folder / "stopped"


@pytest.mark.parametrize("processes", [1, 2])
def test_stopped_run_goes_on(processes, folder, whole, stopped):
    out = f"stopped-{processes}"
    shutil.copytree(stopped, folder / out)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes)
    bits = run(folder, out, *(torchrun if processes > 1 else ()), EXAMPLE)
    assert len(whole[0]) == 3 and len(bits) == 1
    found = weights(folder, out)
    if processes == 1:
        assert all(torch.equal(value, whole[1][name]) for name, value in found.items())
    # Sums over processes round otherwise, and gradients that are nothing but rounding, of key biases, move them too.
    assert bits[0] == pytest.approx(whole[0][-1], abs=2e-4)


def test_what_it_saved_is_grown_and_trained_on(folder, whole):
    growth.run(growth.plan(growth.Recipe(str(folder / "whole/model"), {"hidden_size": 32})), folder / "grown")
    (start, *_) = run(folder, "on", EXAMPLE, model="grown", options=["--adamw", "--lr", "0"])
    assert start == pytest.approx(whole[0][-1], abs=2e-4)
