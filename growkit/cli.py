"""The `growkit` command: `growkit demo`, `growkit bench` and `growkit info`."""

import argparse
import importlib.metadata
import importlib.util
import math
import platform
import sys
from pathlib import Path

import torch

import growkit
from growkit import kernels, ops
from growkit.kron import expand

# package, how to get it, what it is for
OPTIONAL = (
    ("transformers", "pip install transformers", "growing Hugging Face models; growkit demo"),
    ("safetensors", "pip install safetensors", "checkpoints of grown models"),
    ("matplotlib", "pip install matplotlib", "the curves of growkit demo"),
    ("rich", "pip install rich", "the progress and table of growkit demo"),
    ("triton", "pip install triton (CUDA builds of torch bring it)", "kernels on an NVIDIA GPU"),
)
KEYS = ("CPU", "CUDA")
DEMO_NEEDS = ("transformers", "matplotlib", "rich")


def main(arguments=None):
    """Run the command and return its exit code; a bad flag exits with 2 and names flag, given and expected."""
    parser = argparse.ArgumentParser(prog="growkit", description=growkit.__doc__)
    parser.add_argument("--version", action="version", version=f"growkit {growkit.__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    demo = commands.add_parser("demo", help="train small, grow, train on: on real text, with no download and no GPU")
    demo.add_argument(
        "--data", type=_path, metavar="FILE|DIR", help="text to train on (default: text that comes with Python)"
    )
    demo.add_argument("--device", type=_device, default="auto", help="auto, cpu or cuda (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="of weights, batches and labels (default: %(default)s)")
    demo.add_argument(
        "--out", type=_folder, default=Path("growkit-demo"), help="folder for results (default: %(default)s)"
    )
    demo.add_argument("--steps-scale", type=_positive, default=1.0, help="multiplies every number of steps")
    demo.add_argument("--full", action="store_true", help="then sweep the settings of SophiaG and AdamW")
    demo.set_defaults(run=_demo)

    bench = commands.add_parser(
        "bench", help="measure growkit's goals on this machine, each beside what it is compared with"
    )
    bench.add_argument("ids", nargs="*", metavar="ID", help="S, L, C, S4, C1.official, ... (default: all)")
    bench.add_argument("--device", type=_device, default="auto", help="auto, cpu or cuda (default: %(default)s)")
    bench.add_argument("--json", type=_file, metavar="FILE", help="write the table there too, after every row")
    bench.set_defaults(run=_bench)

    info = commands.add_parser("info", help="what is installed here, and which implementation each operator uses")
    info.set_defaults(run=_info)

    options = vars(parser.parse_args(arguments))
    return options.pop("run")(**options)


def _path(text):
    if not Path(text).exists():
        raise argparse.ArgumentTypeError(f"{text!r} does not exist; expected a text file or a folder of them")
    return Path(text)


def _folder(text):
    if Path(text).exists() and not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a file; expected a folder, or a name for a new one")
    return Path(text)


def _file(text):
    if Path(text).is_dir() or not Path(text).absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a name for a file in a folder that exists")
    return Path(text)


def _device(text):
    if text not in ("auto", "cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected auto, cpu or cuda")
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(f"got 'cuda', but {_cuda()}; expected auto or cpu")
    return text


def _positive(text):
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number above 0")
    return value


def _demo(**options):
    missing = [package for package in DEMO_NEEDS if not importlib.util.find_spec(package)]
    if missing:
        print(f"growkit demo needs {' and '.join(missing)}: pip install {' '.join(missing)}", file=sys.stderr)
        return 1
    from growkit.demo import run  # here, because it imports what has just been asked for

    return run(**options)


def _bench(ids, **options):
    from growkit.bench import table  # here, because it imports more than the other commands need

    try:
        table.select(ids)
    except ValueError as error:
        print(f"growkit bench: ID: {error}", file=sys.stderr)
        return 2
    return table.run(ids, **options)


def _info():
    print(f"growkit {growkit.__version__}, python {platform.python_version()}, torch {torch.__version__}")
    print(f"devices: cpu ({torch.get_num_threads()} threads); {_cuda()}")
    print(f"CUDA extension: {expand.extension}")

    print("\noptional packages")
    for package, get, use in OPTIONAL:
        if importlib.util.find_spec(package):
            print(f"  {package:13} {_version(package)}")
        else:
            print(f"  {package:13} missing: {get}; for {use}")

    print("\noperators")
    for op in sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("growkit::")):
        served = (f"{key.lower()}: {_serves(op, key)}" for key in KEYS)
        print(f"  {op.removeprefix('growkit::'):24} {', '.join(served)}")
    return 0


def _serves(op, key):
    if torch._C._dispatch_has_kernel_for_dispatch_key(op, key):
        return "growkit._C"
    name = op.removeprefix("growkit::").partition(".")[0]
    module = ops.kernel_of.get(name) or ops.kernel_of.get(name.removesuffix("_"))  # in place, or not
    if key != "CUDA" or module is None:
        return "reference"
    return f"growkit.kernels.{module}" if kernels.available else "reference (triton is missing)"


def _cuda():
    if torch.cuda.is_available():
        return ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    if torch.version.cuda is None:
        return f"no cuda: this build of torch ({torch.__version__}) has none"
    return f"no cuda: torch is built for CUDA {torch.version.cuda}, but sees no GPU or driver"


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # vendor builds go by other names, pytorch-triton for one
        return "present, version unknown"
