"""The `growkit` command: its commands and options. torch is imported by the commands, not by their help."""

import importlib.metadata
import importlib.util
import platform
from pathlib import Path

import click

import growkit
from growkit.cli.growth import grow, inspect
from growkit.cli.options import OUT_FILE, OUT_FOLDER, TEXT, AboveZero, Device, cuda, keyboard_interrupts

# package, how to get it, what it is for
OPTIONAL = (
    ("transformers", "pip install transformers", "growing Hugging Face models; growkit demo"),
    ("safetensors", "pip install safetensors", "checkpoints of grown models"),
    ("matplotlib", "pip install matplotlib", "the figure of growkit demo"),
    ("triton", "pip install triton (CUDA builds of torch bring it)", "kernels on an NVIDIA GPU"),
)
DEMO_NEEDS = ("transformers", "matplotlib")
KEYS = ("CPU", "CUDA")


@click.group(
    help=growkit.__doc__,
    invoke_without_command=True,
    context_settings={"show_default": True, "help_option_names": ["-h", "--help"]},
)
@click.version_option(growkit.__version__, message="growkit %(version)s")
@click.pass_context
def command(context):
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


command.add_command(grow)
command.add_command(inspect)


@command.command()
@click.option(
    "--data",
    type=TEXT,
    metavar="FILE|DIR",
    show_default="text that comes with Python",
    help="A text file, or a folder whose .txt, .md, .rst, .py, .tex and .html files are read, e.g. --data notes.txt",
)
@click.option(
    "--pretrained",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="FOLDER",
    show_default="off",
    help="Grow this causal model of yours instead and train it on, e.g. --pretrained growkit-demo/small",
)
@click.option("--device", type=Device(), default="auto", help="Where to train, e.g. --device cpu")
@click.option("--seed", type=int, default=0, help="Of weights, batches and labels, e.g. --seed 1")
@click.option("--out", type=OUT_FOLDER, default="growkit-demo", help="Folder for the results, e.g. --out runs/first")
@click.option(
    "--steps-scale",
    type=AboveZero(),
    default=1.0,
    help="Multiplies every number of steps, e.g. --steps-scale 0.05 for a quick look",
)
@click.option(
    "--sophia",
    is_flag=True,
    show_default="off",
    help="Also train the large model with SophiaG, grown and from scratch, e.g. growkit demo --sophia",
)
def demo(pretrained, sophia, **options):
    """Train small, grow, train on: on real text, with no download and no GPU."""
    missing = [package for package in DEMO_NEEDS if not importlib.util.find_spec(package)]
    if missing:
        raise click.ClickException(f"growkit demo needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    # Here, because they import what has just been asked for.
    with keyboard_interrupts():
        if pretrained:
            from growkit.demo import pretrained as own

            return own.run(folder=pretrained, **options)
        from growkit.demo.story import run

        return run(sophia=sophia, **options)


@command.command()
@click.argument("ids", nargs=-1, metavar="[ID]...")
@click.option(
    "--list",
    "listed",
    is_flag=True,
    show_default="off",
    help="Only list the ids and what each measures, e.g. growkit bench --list",
)
@click.option("--device", type=Device(), default="auto", help="Where to measure, e.g. --device cpu")
@click.option(
    "--json",
    type=OUT_FILE,
    metavar="FILE",
    show_default="no file",
    help="Write the table there too, after every row, e.g. --json bench.json",
)
def bench(ids, listed, **options):
    """Measure growkit's goals on this machine, each beside what it is compared with.

    ID is the id of a goal or the beginning of one, in any case: S, L or C for a series, s4, C1.official. Without: all.
    """
    from growkit.bench import table  # here, because it imports more than the other commands need

    try:
        chosen = table.select(ids)
    except ValueError as error:
        raise click.BadParameter(f"{error}; growkit bench --list shows all", param_hint="ID") from None
    if listed:
        click.echo(table.listing(chosen))
        return 0
    with keyboard_interrupts():
        return table.run(ids, **options)


@command.command()
@click.option(
    "--verbose",
    "-v",
    is_flag=True,
    show_default="off",
    help="List every operator and optional package, e.g. growkit info --verbose",
)
def info(verbose):
    """What is installed here, and which implementation the operators use."""
    import torch

    from growkit import ops  # noqa: F401, registers the operators
    from growkit.kron import expand

    click.echo(f"growkit {growkit.__version__}, python {platform.python_version()}, torch {torch.__version__}")
    click.echo(f"devices: cpu ({torch.get_num_threads()} threads); {cuda()}")
    click.echo(f"CUDA extension: {expand.extension}")
    names = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("growkit::"))
    if verbose:
        click.echo("\noptional packages")
        for package, get, use in OPTIONAL:
            found = importlib.util.find_spec(package)
            click.echo(f"  {package:13} {_version(package) if found else f'missing: {get}; for {use}'}")
        click.echo("\noperators")
        for name in names:
            served = (f"{key.lower()}: {_serves(name, key)}" for key in KEYS)
            click.echo(f"  {name.removeprefix('growkit::'):24} {', '.join(served)}")
        return
    for key in KEYS:
        served = [_serves(name, key) for name in names]
        counts = (f"{served.count(kind)} {kind}" for kind in sorted(set(served)))
        click.echo(f"{len(names)} operators on {key.lower()}: {', '.join(counts)}")
    for package, get, use in OPTIONAL:
        if not importlib.util.find_spec(package):
            click.echo(f"missing, for {use}: {get}")
    click.echo("growkit info --verbose lists every operator and package")


def _serves(op, key):
    import torch

    from growkit import kernels, ops

    if torch._C._dispatch_has_kernel_for_dispatch_key(op, key):
        return "growkit._C"
    name = op.removeprefix("growkit::").partition(".")[0]
    module = ops.kernel_of.get(name) or ops.kernel_of.get(name.removesuffix("_"))  # in place, or not
    if key != "CUDA" or module is None:
        return "reference"
    return f"growkit.kernels.{module}" if kernels.available else "reference (triton is missing)"


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # vendor builds go by other names, pytorch-triton for one
        return "present, version unknown"
