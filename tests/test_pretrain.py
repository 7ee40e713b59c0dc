"""examples/pretrain.py: what it logs, and that a stopped run goes on to the bit, on another number of processes too."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

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


def run(folder, out, *command, check=True, optimizer="sophiag"):
    options = f"--steps {STEPS} --save-every 2 --context 16 --batch 4 --warmup 2 --every 2 --optimizer {optimizer}"
    command = [sys.executable, *command, folder / "text.txt", folder / "config.json", folder / out, *options.split()]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stdout + done.stderr


def weights(folder, out):
    dcp_to_torch_save(folder / out / f"step-{STEPS}", folder / "weights.pt")
    return torch.load(folder / "weights.pt")["model"]


def last(folder, out):
    return json.loads((folder / out / "log.jsonl").read_text().splitlines()[-1])


@pytest.fixture(scope="module")
def whole(folder):
    run(folder, "whole", EXAMPLE)
    return weights(folder, "whole")


def test_log(folder, whole):
    lines = [json.loads(line) for line in (folder / "whole/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert lines[-1]["stats"]["refreshes"] == 3
    assert all(0 < line["validation"] < 6 for line in lines)


@pytest.mark.parametrize("processes", [1, 2])
def test_stopped_run_goes_on(processes, folder, whole):
    out = f"stopped-{processes}"
    run(folder, out, "-c", STOPPED, check=False)
    assert [path.name for path in (folder / out).glob("step-*")] == [f"step-{STOP}"]
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes)
    run(folder, out, *(torchrun if processes > 1 else ()), EXAMPLE)
    if processes == 1:
        for name, value in weights(folder, out).items():
            assert torch.equal(value, whole[name]), name
    # Sums over processes round otherwise, and gradients that are nothing but rounding, of key biases, move them too.
    assert abs(last(folder, out)["validation"] - last(folder, "whole")["validation"]) < 1e-4
