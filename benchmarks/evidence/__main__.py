"""Run a study, or what is left of it: python -m benchmarks.evidence STUDY ... [--out docs/results/data] [--scale 1]

Several processes may work at one study. When all its runs are there, STUDY.json holds them; --pack, or where --seconds
were over before: those there are.
"""

import argparse
import importlib.metadata
import math
import os
import platform
import subprocess
import time
from pathlib import Path

import torch

from benchmarks.evidence import gpu, growth, runs, sophia
from benchmarks.evidence.store import Store, key

STUDIES = {study.__name__: study for study in (*sophia.STUDIES, *growth.STUDIES, *gpu.STUDIES)}


def wanted(study, store, scale=1.0):
    """The configs that a study asks for, given what the store has, in order."""
    asked = {}

    def ask(config):
        record = asked.setdefault(key(config), (config, store.get(config)))[1]
        if record is None:
            return None
        return float("inf") if record["bits"] is None else record["bits"]

    STUDIES[study](ask, scale)
    return list(asked.values())


def run(config, store, keep=False):
    """Run `config`, after the stages before its last; keep: what a longer run goes on from, too."""
    before = None
    if len(config["stages"]) > 1:
        first = config | {"stages": config["stages"][:-1]}
        file = store.runs / f"{key(first)}.pt"
        if not file.exists():
            run(first, store, keep=True)
        before = torch.load(file, weights_only=False)
    record, left = runs.TASKS[config["task"]](config, before)
    store.put(record)
    if keep:
        partial = store.runs / f"{key(config)}.{os.getpid()}.partial"
        torch.save(left, partial)
        os.replace(partial, store.runs / f"{key(config)}.pt")
    return record


def work(study, store, scale, until=math.inf):
    """Run what a study wants until nothing is left, other processes' runs included; begin none after `until`."""
    while time.monotonic() < until:
        missing = [config for config, record in wanted(study, store, scale) if record is None]
        if not missing:
            return
        for config in missing:
            with store.claim(config) as ours:
                if ours:
                    record, last = run(config, store), config["stages"][-1]
                    print(
                        study,
                        key(config),
                        config["seed"],
                        last,
                        record["bits"],
                        f"{record['seconds']:.0f} s",
                        flush=True,
                    )
                    break
        else:
            time.sleep(2)


def about():
    """Where the records come from."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    cpus = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "commit": commit.stdout.strip(),
        "python": platform.python_version(),
        **versions,
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
        "cpu": cpus[0].partition(": ")[2] if cpus else platform.processor(),
        "date": time.strftime("%Y-%m-%d"),
        "text": {"bytes": len(runs.text()), "sha256": runs.text_hash()},
    }


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=__doc__.partition("\n")[0])
    parser.add_argument("studies", nargs="+", choices=STUDIES, metavar="STUDY", help=", ".join(STUDIES))
    parser.add_argument("--out", type=Path, default=Path("docs/results/data"))
    parser.add_argument("--scale", type=float, default=1.0, help="of all numbers of steps")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no run after so many")
    parser.add_argument("--pack", action="store_true", help="run nothing: STUDY.json of what there is")
    options = parser.parse_args(arguments)
    store, until = Store(options.out), time.monotonic() + options.seconds
    for study in options.studies:
        if not options.pack:
            work(study, store, options.scale, until)
        store.pack(study, about(), [config for config, _ in wanted(study, store, options.scale)])


if __name__ == "__main__":
    main()
