"""CPU time of ten training steps with each optimizer, curvature refreshes included, over AdamW's; timed in turn.

python -m benchmarks.evidence.times [--out docs/results/data] [--size 2x64] [--rounds 9]
"""

import argparse
import json
import warnings
from pathlib import Path

import torch

from benchmarks.evidence import optimizers, runs, search, sophia
from growkit.bench.measure import paired
from growkit.demo import runs as demo


def ten_steps(name, size):
    """A function that takes ten steps, one of which refreshes a curvature."""
    config = search.changed(sophia.optimizer_config(name), size=size)
    stage, (data, _) = config["stages"][-1], runs.corpus(config["context"], config["batch"])
    run = demo.Run(runs.settings(config, stage), data, 0, "cpu")
    model = run.new_model(runs.shape(size))
    options = {option: stage[option] for option in runs.OPTIONS if option in stage}
    optimizer = optimizers.make(model, stage["optimizer"], seed=0, **options)

    def train():
        for step in range(10):
            model(**data.batch(0, step)).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return train


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence.times", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("docs/results/data"))
    parser.add_argument("--size", default=sophia.SIZE)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    timed = paired({name: ten_steps(name, options.size) for name in sophia.OPTIMIZERS}, "cpu", options.rounds)
    least = {name: min(samples) for name, samples in timed.samples.items()}
    found = {
        "size": options.size,
        "rounds": options.rounds,
        "noise": round(timed.noise, 3),
        "seconds": {name: round(value / 10, 5) for name, value in least.items()},
        "ratios": {name: round(value / least["adamw"], 3) for name, value in least.items()},
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "times.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
