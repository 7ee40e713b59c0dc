"""The update's launch parameters on this GPU: every point of a grid against a copy timed in turn with it.

    python benchmarks/tune.py OUT.jsonl

One line of JSON a point, as it is measured: model, parameters, fraction of copy bandwidth. The parameters are those of
`growkit.kernels`; the best ones go there by hand, and what was predicted and found into NOTES.md.
"""

import argparse
import contextlib
import itertools
import json

import torch

from growkit.bench.measure import hardware, paired
from growkit.bench.sophia import SCALARS, Lists, check_update, copy_pair
from growkit.kernels import multi_tensor, sophia

GRID = {
    "block": (1024, 2048),
    "warps": (8, 4),
    "chunk": (4096, 2048, 8192),
    "programs": (0, 2, 4, 8),  # one program a chunk; or as many a multiprocessor, each walking chunks
}


@contextlib.contextmanager
def launched_with(block, warps, chunk, programs, processors):
    """Inside, every update is launched with these parameters; the former ones afterwards."""
    was = sophia.BLOCK, sophia._warps, multi_tensor.CHUNK, sophia.PROGRAMS
    sophia.BLOCK, sophia._warps = block, lambda dtypes, drawn=False: warps
    multi_tensor.CHUNK, sophia.PROGRAMS = chunk, programs * processors or None
    try:
        yield
    finally:
        sophia.BLOCK, sophia._warps, multi_tensor.CHUNK, sophia.PROGRAMS = was


def points(grid):
    for values in itertools.product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", help="file that gets one line of JSON a point")
    out = parser.parse_args().out
    if not torch.cuda.is_available():
        parser.error("no CUDA device: there is nothing to tune")
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    with open(out, "w") as file:
        print(json.dumps(hardware()), file=file, flush=True)
        for model in ("gpt2-small", "gpt2-xl"):
            lists = Lists(model, "cuda")
            copy, copied = copy_pair("cuda")
            best = 0

            def run(lists=lists):
                sophia.sophia_step_(*lists.lists, eps=1e-15, **SCALARS)

            for point in points(GRID):
                with launched_with(**point, processors=processors):
                    found = paired({"step": run, "copy": copy}, "gpu", rounds=5)
                    found = found.ratio("copy", "step", lists.nbytes("pgmhpm") / copied)
                    if found.value > best:  # checked before it is believed
                        check_update(lists, run)
                        best = found.value
                        print(model, point, f"{best:.3f}", flush=True)
                line = {"model": model, **point, "of copy": found.value, "noise": found.noise}
                print(json.dumps(line), file=file, flush=True)
            del lists, copy
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
