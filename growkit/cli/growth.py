"""`growkit grow` and `growkit inspect`: checkpoints on disk."""

import importlib.util
import sys
import time
from pathlib import Path

import click
from click.core import ParameterSource

from growkit.cli.options import OUT_FOLDER, TEXT, AboveZero, keyboard_interrupts

NEEDS = ("transformers", "safetensors")
STARTS = (
    "lossless", "closest", "official", "stack", "interpolate", "overlap", "zero_blocks", "hypercloning", "lemon",
    "zero_pad", "net2net", "fpi", "aki", "staged",
)  # fmt: skip
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


def _size(name, what, example):
    return click.option(
        f"--{name}",
        type=click.IntRange(1),
        metavar="N",
        show_default="as it is",
        help=f"{what}, e.g. --{name} {example}",
    )


@click.command()
@click.argument("small", nargs=-1, metavar="[SMALL]")
@click.argument("out", type=OUT_FOLDER)
@_size("layers", "Layers", 24)
@_size("hidden-size", "Width of the residual stream; heads and MLP follow unless asked for", 1024)
@_size("heads", "Attention heads", 16)
@_size("kv-heads", "Key and value heads; by default as many queries share one as before", 4)
@_size("head-dim", "Size of a head", 64)
@_size("intermediate-size", "Hidden units of the MLP", 4096)
@_size("experts", "Experts; as many times more are chosen unless asked for", 16)
@_size("experts-per-token", "Experts chosen for each token", 4)
@_size("vocab-size", "Rows of the embedding", 50304)
@_size("positions", "Longest text", 2048)
@click.option(
    "--config", type=_FILE, show_default="none", help="A config.json in place of sizes, e.g. --config big.json"
)
@click.option("--params", metavar="NUMBER", show_default="none", help="Propose sizes for so many, e.g. --params 1.3B")
@click.option("--start", type=click.Choice(STARTS), default="lossless", help="How weights begin, e.g. --start closest")
@click.option(
    "--sharing",
    type=click.Choice(("model", "target", "source")),
    show_default="model; target for the official start",
    help="Which layers share a map, e.g. --sharing target",
)
@click.option("--seed", type=int, default=0, help="Of all that is random, e.g. --seed 1")
@click.option(
    "--noise",
    type=click.FloatRange(0),
    default=0.0,
    help="Tell copies apart without changing the outputs, in units of the weights, e.g. --noise 0.1",
)
@click.option("--learn", type=click.IntRange(0), default=0, help="Steps that train the map, e.g. --learn 100")
@click.option(
    "--data", type=TEXT, metavar="FILE|DIR", show_default="none", help="Text to learn from, e.g. --data text/"
)
@click.option("--batch", type=click.IntRange(1), default=8, help="Windows a step of --learn, e.g. --batch 16")
@click.option("--context", type=click.IntRange(2), default=256, help="Tokens a window of --learn, e.g. --context 512")
@click.option("--lr", type=AboveZero(), default=1e-3, help="Learning rate of --learn, e.g. --lr 3e-4")
@click.option(
    "--optimizer", type=click.Choice(("adamw", "sophiag")), default="adamw", help="Of --learn, e.g. --optimizer sophiag"
)
@click.option("--recipe", type=_FILE, show_default="none", help="Replay one, e.g. --recipe big/growkit_recipe.yaml")
@click.option("--dry-run", is_flag=True, show_default="off", help="Only tell what it takes, e.g. --layers 24 --dry-run")
@click.option("--check/--no-check", default=True, help="Load both, compare their outputs, e.g. --check or --no-check")
@click.option("--force", is_flag=True, show_default="off", help="Replace a folder OUT that exists, e.g. --force")
def grow(small, out, recipe, dry_run, check, force, **options):
    """Grow the checkpoint SMALL into a larger one, in the new folder OUT.

    SMALL is a local Hugging Face folder or a .gguf file. OUT gets sharded safetensors, config, tokenizer, model card
    and a recipe, and appears whole or not at all. Without --learn the weights are read and written one by one.
    """
    if len(small) > 1:
        raise click.UsageError(f"Got {len(small)} arguments and OUT, expected SMALL and OUT.")
    if not small and recipe is None:
        raise click.UsageError("Missing argument 'SMALL', or --recipe FILE.")
    source = click.get_current_context().get_parameter_source
    given = [f"--{name.replace('_', '-')}" for name in options if source(name) is ParameterSource.COMMANDLINE]
    if recipe is not None and given:
        raise click.UsageError(f"--recipe holds all that decides the result, expected it without {', '.join(given)}.")
    _needs("grow")
    from growkit.growth import recipe as growth
    from growkit.growth.sizes import WORDS

    sizes = {word: options.pop(word) for word in WORDS}
    sizes = {word: size for word, size in sizes.items() if size is not None}
    options = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    try:
        if recipe is not None:
            wanted = growth.Recipe.load(recipe)
            wanted.small = small[0] if small else wanted.small
        else:
            wanted = growth.Recipe(small[0], sizes, **options)
        plan = growth.plan(wanted)
        click.echo(_told(plan, check))
        if dry_run:
            return 0
        if out.exists() and not force:
            raise FileExistsError(f"OUT: {out} exists already, expected a new name, or --force to replace it")
        with keyboard_interrupts():
            measured = growth.run(plan, out, force=force, check=check, progress=_Progress())
    except BrokenPipeError:
        raise  # of what is printed here; main ends it quietly
    except (ValueError, FloatingPointError, OSError) as error:
        raise click.ClickException(str(error)) from None
    except KeyboardInterrupt:
        click.echo(f"\ninterrupted: {out} was not written", err=True)
        return 130
    if "learning_in_plain_steps" in measured:
        losses = (measured[f"loss_{when}_learning"] for when in ("before", "after"))
        click.echo(
            f"learned: loss {' to '.join(f'{loss:.3f}' for loss in losses)}, at the FLOPs of "
            f"{measured['learning_in_plain_steps']} plain training steps of the grown model"
        )
    change = measured.get("relative_output_change")
    told = "not compared (--no-check)" if change is None else f"outputs change by {change:.2g} relative"
    click.echo(f"{out}: {told}, {measured['seconds']} s")
    return 0


def _told(plan, check):
    """What will be made and what it takes, one line each."""
    old, new = plan.parameters
    both = (old + new) * plan.entries[0].dtype.itemsize / 1e9
    sizes = ", ".join(f"{name} {a} to {b}" for name, (a, b) in plan.sizes.items()) or "no size changes"
    lossless = plan.operator.reason or "the outputs are meant to stay"
    return "\n".join(
        (
            f"{plan.checkpoint.model_class.__name__}: {sizes}",
            f"parameters {old:,} to {new:,}",
            f"start {plan.recipe.start}: {lossless}",
            f"disk {plan.disk / 1e9:.2f} GB, memory at most {plan.memory / 1e9:.2f} GB beyond the program's own"
            + (f", then {both:.2f} GB to compare both models" if check else ""),
            f"about {plan.flops / _rate():.0f} s of arithmetic here",
        )
    )


def _rate():
    """FLOPs per second of this machine, from a product of a few milliseconds."""
    import torch

    a = torch.ones(512, 512)
    a @ a
    started = time.perf_counter()
    for _ in range(5):
        a @ a
    return 5 * 2 * 512**3 / (time.perf_counter() - started)


class _Progress:
    """A line that counts on a terminal; elsewhere a line every 20 s."""

    def __init__(self):
        self._told = time.monotonic()

    def __call__(self, what, done, of):
        if not sys.stderr.isatty():
            if time.monotonic() - self._told > 20:
                self._told = time.monotonic()
                click.echo(f"{what}: {done} of {of}", err=True)
            return
        click.echo(f"\r{what}: {done} of {of}  ", err=True, nl=done == of)


@click.command()
@click.argument("model", type=click.Path(exists=True))
def inspect(model):
    """Show how the checkpoint MODEL would be grown: its family, sizes, and the table entry of every weight."""
    _needs("inspect")
    from growkit.growth.checkpoint import CheckpointError, open_checkpoint
    from growkit.growth.families import FAMILIES
    from growkit.growth.families.table import match

    try:
        checkpoint = open_checkpoint(model)
    except CheckpointError as error:
        raise click.ClickException(str(error)) from None
    config = checkpoint.config
    family = FAMILIES.get(config.model_type)
    click.echo(f"{checkpoint.model_class.__name__}, model_type {config.model_type}, {len(checkpoint.weights)} weights")
    if family is None:
        raise click.ClickException(f"no table for {config.model_type!r}; there are {', '.join(FAMILIES)}")
    for name, size in family.sizes(config).items():
        field = family.fields().get(name)
        click.echo(f"  {name:12} {size:8}  {field.field if field else 'derived'}")
    parameters = [name for name in checkpoint.weights if name not in checkpoint.buffers]
    rows, unknown = match(family, parameters, checkpoint.model_class.base_model_prefix)
    for pattern, (entries, names) in rows.items():
        axes = ", ".join(_axis(entry) for entry in entries)
        click.echo(f"  {pattern:44} {len(names):4} x ({axes})")
    for name in checkpoint.buffers:
        click.echo(f"  {name:44}    buffer, as it is")
    for name in unknown:
        click.echo(f"  {name:44} not understood")
    return 1 if unknown else 0


def _axis(entry):
    if entry is None:
        return "as it is"
    return entry if isinstance(entry, str) else " and ".join(entry.sides)


def _needs(command):
    missing = [package for package in NEEDS if not importlib.util.find_spec(package)]
    if missing:
        raise click.ClickException(f"growkit {command} needs {' and '.join(missing)}: pip install {' '.join(missing)}")
