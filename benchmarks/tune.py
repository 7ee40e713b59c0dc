"""What is still to be decided by time on this GPU: every choice against a copy, or the best of plain torch, in turn.

    python benchmarks/tune.py OUT.jsonl [grid mixed panels host ...]

One line of JSON a point, as it is measured. What is best goes into growkit by hand, and what was predicted and found
into NOTES.md. grid: the float32 update's launch parameters. mixed: chunk and warps of the other updates and of the
refreshes. panels: how much of an intermediate an expansion makes at a time. host: where the host's time of a step goes.
"""

import argparse
import contextlib
import cProfile
import functools
import itertools
import json
import pstats

import torch

from growkit.bench import kron, sophia8bit
from growkit.bench import sophia as workloads
from growkit.bench.measure import hardware, matmul_precision, paired
from growkit.bench.sophia import SCALARS, Lists, check_update, copy_pair
from growkit.kernels import multi_tensor, sophia
from growkit.kron import plan

GRID = {
    "block": (1024, 2048),
    "warps": (8, 4),
    "chunk": (4096, 2048, 8192),
    "programs": (0, 2, 4, 8),  # one program a chunk; or as many a multiprocessor, each walking chunks
}


@contextlib.contextmanager
def launched_with(block=sophia.BLOCK, warps=None, chunk=multi_tensor.CHUNK, programs=0, processors=1):
    """Inside, updates and refreshes are launched so (warps None: with their own); afterwards as before."""
    was = sophia.BLOCK, sophia._warps, multi_tensor.CHUNK, sophia.PROGRAMS
    sophia.BLOCK, sophia._warps = block, (lambda dtypes, drawn=False: warps) if warps else was[1]
    multi_tensor.CHUNK, sophia.PROGRAMS = chunk, programs * processors or None
    try:
        yield
    finally:
        sophia.BLOCK, sophia._warps, multi_tensor.CHUNK, sophia.PROGRAMS = was


def points(grid):
    for values in itertools.product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


def grid(device="cuda", tiny=False):
    processors = torch.cuda.get_device_properties(0).multi_processor_count if device == "cuda" else 1
    for model in ("gpt2-small", "gpt2-xl"):
        lists = Lists(model, device, tiny)
        copy, copied = copy_pair(device, tiny)
        best = 0

        def run(lists=lists):
            sophia.sophia_step_(*lists.lists, eps=1e-15, **SCALARS)

        for point in points(GRID):
            with launched_with(**point, processors=processors):
                found = paired({"step": run, "copy": copy}, "gpu", 1 if tiny else 5)
                found = found.ratio("copy", "step", lists.nbytes("pgmhpm") / copied)
                if found.value > best:  # checked before it is believed
                    check_update(lists, run)
                    best = found.value
            yield {"model": model, **point, "of copy": found.value, "noise": found.noise}


def mixed(device="cuda", tiny=False):
    def choice(run, **parameters):
        def call():
            with launched_with(**parameters):
                run()

        return call

    builds = {form: functools.partial(workloads.update_mixed, form, "gpt2-xl") for form in workloads.FORMATS}
    builds["8bit"] = functools.partial(sophia8bit.update, "gpt2-xl-coded")
    builds["gnb"] = functools.partial(workloads.refresh_gnb, "gpt2-xl")
    builds["hutchinson"] = functools.partial(workloads.refresh_hutchinson, "gpt2-xl")
    for name, build in builds.items():
        case, (copy, copied) = build(device=device, tiny=tiny), copy_pair(device, tiny)
        choices = {"as it is": choice(case.run), "chunk 2048": choice(case.run, chunk=2048)}
        if name in workloads.FORMATS:
            choices["8 warps"] = choice(case.run, warps=8)
        found = paired(choices | {"copy": copy}, "gpu", 1 if tiny else 9)
        ratios = {each: found.ratio("copy", each, case.bytes / copied).value for each in choices}
        yield {"kernel": name, "of copy": ratios, "noise": found.noise}


def panels(device="cuda", tiny=False):
    was = plan.PANEL_BYTES
    for kind, precision in itertools.product(("dense", "top"), ("highest", "high", "medium")):
        dtype, mode, _ = kron.PRECISIONS[precision]
        problem = kron.Problem("gpt2-medium", kind, device, tiny, dtype)

        def expansion(expand, size=was, problem=problem, mode=mode):
            def call():
                plan.PANEL_BYTES = size
                with torch.no_grad(), matmul_precision(mode):
                    expand(problem)
                plan.PANEL_BYTES = was

            return call

        sizes = {f"{size >> 20} MiB": size for size in (was >> 4, was >> 2, was, 1 << 40)}
        choices = {name: expansion(kron.growkit_expand, size) for name, size in sizes.items()}
        choices["best order"] = expansion(kron.best_order_bmm)
        found = paired(choices, "gpu", 1 if tiny else 9)
        times = {name: found.ratio(name, "best order").value for name in sizes}
        yield {"expansion": f"{kind}, {precision}", "time / best torch's": times, "noise": found.noise}


def host(device="cuda", tiny=False):
    for layers in (2,) if tiny else (12, 48):
        parameters = [
            torch.nn.Parameter(torch.randn(s, device=device)) for s in workloads.gpt2_shapes(layers, 16, 41, 8)
        ]
        for p in parameters:
            p.grad = torch.randn_like(p)
        optimizers = {"growkit": workloads.with_state(parameters), "AdamW": torch.optim.AdamW(parameters, fused=True)}
        found = paired({name: o.step for name, o in optimizers.items()}, "host", 1 if tiny else 100, sample=0)
        times = {name: 1e6 * seconds for name, seconds in found.medians().items()}
        yield {"tensors": len(parameters), "us": times, "noise": found.noise}
        profile = cProfile.Profile()
        profile.runcall(lambda o=optimizers["growkit"]: [o.step() for _ in range(2 if tiny else 100)])
        pstats.Stats(profile).sort_stats("tottime").print_stats(25)


STUDIES = {study.__name__: study for study in (grid, mixed, panels, host)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", help="file that gets one line of JSON a point")
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=f"of {', '.join(STUDIES)}; default: all but grid")
    asked = parser.parse_args()
    if unknown := set(asked.studies) - set(STUDIES):  # choices= would refuse that there are none
        parser.error(f"STUDY {', '.join(sorted(unknown))}: expected one of {', '.join(STUDIES)}")
    if not torch.cuda.is_available():
        parser.error("no CUDA device: there is nothing to tune")
    with open(asked.out, "w") as file:
        print(json.dumps(hardware()), file=file, flush=True)
        for name in asked.studies or list(STUDIES)[1:]:
            for line in STUDIES[name]():
                torch.cuda.empty_cache()
                print(json.dumps(line), file=file, flush=True)
                print(line, flush=True)


if __name__ == "__main__":
    main()
