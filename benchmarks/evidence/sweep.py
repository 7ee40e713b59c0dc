"""examples/pretrain.py at 30 million parameters: each optimizer at the same number of learning rates, side by side.

    python -m benchmarks.evidence.sweep OUT.jsonl [--steps 1000] [--at-once 8]

One line of JSON first, of the hardware and the text, then one a run, as it ends: its options, [step, held-out bits a
byte, tokens/s] at each validation, and how far from clipped SophiaG was. tokens/s of runs that share a GPU say nothing;
`growkit bench N2` measures what a step costs.
"""

import argparse
import concurrent.futures
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.evidence.runs import text, text_hash
from growkit.bench.measure import hardware

ROOT = Path(__file__).parents[2]
# 31.8 M parameters; no dropout, for no run sees much of the text twice.
CONFIG = {"n_layer": 10, "n_embd": 512, "n_head": 8, "n_positions": 256, "vocab_size": 256}
CONFIG |= {"model_type": "gpt2", "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
ARMS = {"AdamW": ["--adamw"], "SophiaG": []}
RATES = {"AdamW": (5e-4, 1e-3, 2e-3, 4e-3), "SophiaG": (1.25e-4, 2.5e-4, 5e-4, 1e-3)}
LINE = re.compile(r"step +(\d+)  validation ([\d.na]+) bits a token  ([\d,]+) tokens/s (.*)")
UNCLIPPED = re.compile(r"'[^']*unclipped[^']*': ([\d.]+)")


def train(folder, arm, lr, steps, save_every, name, options):
    words = [*ARMS[arm], "--lr", lr, "--steps", steps, "--save-every", save_every, *options]
    command = [sys.executable, ROOT / "examples/pretrain.py", folder / "text", folder / "config.json", folder / name]
    done = subprocess.run(list(map(str, [*command, *words])), capture_output=True, text=True)
    lines = LINE.findall(done.stdout)
    points = [[int(step), float(bits), int(pace.replace(",", ""))] for step, bits, pace, _ in lines]
    unclipped = [float(each) for *_, metrics in lines for each in UNCLIPPED.findall(metrics)[:1]]
    record = {"arm": arm, "lr": lr, "options": list(map(str, words)), "points": points, "unclipped": unclipped}
    return record | ({} if done.returncode == 0 else {"error": done.stderr[-2000:]})


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="file that gets the lines of JSON")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--at-once", type=int, default=8)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--trials", type=int, default=4, help="learning rates of each")
    parser.add_argument("--tiny", action="store_true", help="a model of 2 x 32: to see that all of it runs")
    asked = parser.parse_args()
    config = CONFIG | ({"n_layer": 2, "n_embd": 32, "n_head": 2} if asked.tiny else {})
    options = ["--bf16", "--beta1", 0.9, "--batch", asked.batch, "--context", config["n_positions"]]
    with tempfile.TemporaryDirectory() as folder, asked.out.open("w") as out:
        folder = Path(folder)
        held = text()[: 2**17] if asked.tiny else text()
        (folder / "text").write_bytes(held)
        (folder / "config.json").write_text(json.dumps(config))

        def tell(line):
            print(json.dumps(line), file=out, flush=True)

        tell({**hardware(), "config": config, "text": text_hash(), "bytes": len(held)})
        every = max(1, asked.steps // 2)
        with concurrent.futures.ThreadPoolExecutor(asked.at_once) as pool:
            # Middle rates first: they say most if time runs out.
            jobs = [(arm, RATES[arm][i]) for i in (1, 2, 0, 3)[: asked.trials] for arm in asked.arms]
            runs = [pool.submit(train, folder, *job, asked.steps, every, f"{job[0]} {job[1]}", options) for job in jobs]
            for run in concurrent.futures.as_completed(runs):
                record = run.result()
                tell(record)
                print(record["arm"], record["lr"], record["points"], record.get("error", ""), flush=True)


if __name__ == "__main__":
    main()
