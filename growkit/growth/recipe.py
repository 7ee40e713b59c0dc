"""`growkit grow`: from one checkpoint on disk to a larger one, by a recipe that is kept beside it."""

import dataclasses
import importlib.metadata
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from huggingface_hub import ModelCard, ModelCardData

from growkit.growth.batches import is_causal, is_masked
from growkit.growth.check import output_change
from growkit.growth.checkpoint import (
    SHARD_BYTES,
    Checkpoint,
    CheckpointError,
    Entry,
    load_whole,
    new_folder,
    open_checkpoint,
    write_tensors,
)
from growkit.growth.families import FAMILIES
from growkit.growth.layout import matrices
from growkit.growth.ligo import LiGO, Sharing, StartName
from growkit.growth.sizes import count_of, propose, wanted_fields
from growkit.text import read_text
from growkit.warn import warn

RECIPE = "growkit_recipe.yaml"


@dataclasses.dataclass
class Recipe:
    """All that decides a grown checkpoint. sizes: word of `growth.sizes.WORDS` -> size; config: a config.json instead.

    params: a number of parameters such as "1.3B", for which sizes are proposed. learn: steps of `LiGO.fit` on the text
    of `data`, in batches of `batch` windows of `context` tokens.
    """

    small: str
    sizes: dict[str, int] = dataclasses.field(default_factory=dict)
    config: str | None = None
    params: str | None = None
    start: StartName = "lossless"
    sharing: Sharing | None = None
    seed: int = 0
    noise: float = 0.0
    learn: int = 0
    data: str | None = None
    batch: int = 8
    context: int = 256
    lr: float = 1e-3
    optimizer: str = "adamw"

    @classmethod
    def load(cls, path: Path) -> "Recipe":
        """From a file that `save` wrote; ValueError where it holds something else."""
        try:
            found = yaml.safe_load(Path(path).read_text())
            return cls(**found["recipe"])
        except (yaml.YAMLError, TypeError, KeyError) as error:
            raise ValueError(f"{path}: expected a {RECIPE} as `growkit grow` writes it: {error}") from None

    def save(self, path: Path, measured: dict[str, Any]) -> None:
        kept = {k: v for k, v in dataclasses.asdict(self).items() if v not in (None, {})}
        versions = {name: importlib.metadata.version(name) for name in ("growkit", "torch", "transformers")}
        text = yaml.safe_dump({"recipe": kept, "measured": measured, "versions": versions}, sort_keys=False)
        path.write_text(
            f"# growkit grow --recipe {path.name} SMALL NEW_FOLDER  # SMALL: where {self.small} is now\n{text}"
        )


@dataclasses.dataclass
class Plan:
    """A recipe against a checkpoint, before any weight is read: what will be made, and what that takes.

    sizes: name -> (small, grown), of those that differ. parameters: (small, grown). disk, memory: bytes; memory is the
    peak beyond what importing growkit takes. flops: of the expansion and of the `learn` steps.
    """

    recipe: Recipe
    checkpoint: Checkpoint
    operator: LiGO
    entries: list[Entry]
    sizes: dict[str, tuple[int, int]]
    parameters: tuple[int, int]
    disk: int
    memory: int
    flops: float


def plan(recipe: Recipe) -> Plan:
    """Open the small checkpoint and lay out the growth; ValueError for whatever cannot be, before data are read."""
    checkpoint = open_checkpoint(recipe.small)
    config = checkpoint.config
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise CheckpointError(f"{recipe.small}: model_type {config.model_type!r}, expected {', '.join(FAMILIES)}")
    if bool(recipe.sizes) + bool(recipe.config) + bool(recipe.params) != 1:
        raise ValueError("sizes: expected sizes such as --layers 24, or --config FILE, or --params 1.3B, one of them")
    if recipe.learn and not recipe.data:
        raise ValueError(f"--learn: got {recipe.learn} steps, expected --data FILE|DIR to learn from as well")
    if recipe.config:
        big = transformers.AutoConfig.from_pretrained(recipe.config, local_files_only=True)
    else:
        words = recipe.sizes
        if recipe.params:
            words = propose(family, config, count_of(recipe.params), lambda words: _count(checkpoint, family, words))
        big = wanted_fields(family, config, words)
    operator = LiGO(
        config, big, recipe.start, recipe.sharing, recipe.seed, weights=checkpoint.weights, noise=recipe.noise
    )
    small_sizes, sizes = family.sizes(config), family.sizes(operator.config)
    dtype = next(iter(checkpoint.weights.values())).dtype
    entries = [Entry(name, row.shape, dtype) for row in operator.rows for name in row.names]
    count = sum(math.prod(entry.shape) for entry in entries)
    entries += [Entry(name, list(value.shape), value.dtype) for name, value in operator.kept_buffers.items()]
    small_count = sum(len(row.small_names) * math.prod(row.small_shape) for row in operator.rows)
    # The small stack of a row, the same widened, one large tensor; the operators; learning holds four large models.
    widest = max(
        len(row.small_names) * (math.prod(row.small_shape) + math.prod(row.shape)) + math.prod(row.shape)
        for row in operator.rows
    )
    operators = sum(p.numel() for p in operator.parameters())
    held = widest + operators + (4 * count + 3 * operators if recipe.learn else 0)
    tokens = recipe.learn * recipe.batch * recipe.context  # each takes 6 FLOPs per weight to learn from
    return Plan(
        recipe,
        checkpoint,
        operator,
        entries,
        {name: (small_sizes[name], size) for name, size in sizes.items() if size != small_sizes[name]},
        (small_count, count),
        sum(entry.bytes for entry in entries),
        held * torch.promote_types(dtype, torch.float32).itemsize + 64 * 2**20,
        _expansion(operator) * (1 + 3 * recipe.learn) + 6.0 * count * tokens,
    )


def _expansion(operator):
    """FLOPs of one expansion from shapes alone, as wide columns, rows, then depth, by maps that keep what is old;
    `LiGO.flops_per_expansion` counts, but reads the weights."""
    flops = 0
    for row in operator.rows:
        small = matrices(
            torch.empty(len(row.small_names), *row.small_shape, device="meta"), row.entries, operator._small
        )
        big = matrices(torch.empty(len(row.names), *row.shape, device="meta"), row.entries, operator._big)
        for old, new in zip(small, big, strict=True):
            (L1, *_, r1, c1), (L2, *stack, r2, c2) = old.shape, new.shape
            depth = L1 * L2 * r2 * c2 if row.layered else 0
            flops += 2 * math.prod(stack) * (L1 * (r1 * (c2 - c1) * c1 + (r2 - r1) * r1 * c2) + depth)
    return flops


def _count(checkpoint, family, words):
    config = type(checkpoint.config).from_dict(checkpoint.config.to_dict())
    for field, size in wanted_fields(family, config, words).items():
        setattr(config, field, size)
    with torch.device("meta"):
        return sum(p.numel() for p in checkpoint.model_class(config).parameters())


def run(
    plan: Plan,
    out: Path,
    *,
    force: bool = False,
    check: bool = True,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[str, int, int], None] = lambda what, done, of: None,
) -> dict[str, Any]:
    """Grow into the folder `out`, which appears whole or not at all. Returns what was measured.

    check: load both checkpoints from disk and compare their outputs; needs memory for both models.
    progress: called with what is being done, how much is done, and of how much.
    FileExistsError where `out` exists without `force`, OSError where the disk has too little space: nothing is written.
    """
    free = shutil.disk_usage(_existing(out)).free
    if free < plan.disk:
        raise OSError(f"{out}: {plan.disk / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB free")
    started = time.perf_counter()
    measured: dict[str, Any] = {}
    with new_folder(out, force) as part:
        operator = plan.operator
        if plan.recipe.learn:
            operator, state = _learned(plan, progress)
            measured |= {"loss_before_learning": state["losses"][0], "loss_after_learning": state["losses"][-1]}
            measured["learning_in_plain_steps"] = round(state["plain_steps"], 1)
        write_tensors(part, plan.entries, _counted(operator.tensors(), len(plan.entries), progress), shard_bytes)
        operator.config.save_pretrained(part)
        for path in plan.checkpoint.companions:
            shutil.copy2(path, part / path.name)
        if plan.checkpoint.gguf:
            _save_tokenizer(plan.checkpoint, part)
        if check:
            measured["relative_output_change"] = compare(plan.checkpoint, part)
        measured["seconds"] = round(time.perf_counter() - started, 1)
        plan.recipe.save(part / RECIPE, measured)
        _card(plan, measured).save(part / "README.md")
        _sync(part)
    return measured


def _save_tokenizer(checkpoint, folder):
    """Of a GGUF file, which holds it; a model may come without one."""
    try:
        checkpoint.tokenizer().save_pretrained(folder)
    except ValueError as error:
        warn(f"the grown checkpoint gets no tokenizer: {error}")


def _existing(path):
    path = Path(path).absolute()
    while not path.exists():
        path = path.parent
    return path


def _counted(tensors, total, progress) -> Iterator[tuple[str, torch.Tensor]]:
    for done, pair in enumerate(tensors, 1):
        yield pair
        progress("writing", done, total)


def _sync(folder):
    """Every file, and the folder's list of them, is on disk before the folder takes its name."""
    for path in (*folder.iterdir(), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _learned(plan, progress):
    """An operator on the model in memory, fitted; and the state of that fit."""
    recipe = plan.recipe
    tokenizer = plan.checkpoint.tokenizer()
    tokens = torch.tensor(tokenizer(read_text(Path(recipe.data)).decode(errors="replace"), verbose=False).input_ids)
    if len(tokens) < recipe.context:
        raise ValueError(f"--data: has {len(tokens)} tokens, expected at least {recipe.context}, one window")
    model = plan.checkpoint.model()
    if not is_causal(model) and not is_masked(model):
        raise ValueError(f"--learn: learns from text, and {type(model).__name__} is no language model")
    operator = LiGO(model, plan.operator.config, recipe.start, recipe.sharing, recipe.seed, noise=recipe.noise)
    draw = torch.Generator().manual_seed(recipe.seed)

    def batches():
        while True:
            starts = torch.randint(len(tokens) - recipe.context + 1, (recipe.batch,), generator=draw)
            yield torch.stack([tokens[i : i + recipe.context] for i in starts.tolist()])

    state = {}
    operator.fit(
        batches(),
        recipe.learn,
        recipe.lr,
        optimizer=recipe.optimizer,
        mask_token=tokenizer.mask_token_id,
        state=state,
        progress=lambda step, loss: progress(f"learning, loss {loss:.3f}", step + 1, recipe.learn),
    )
    return operator, state


@torch.no_grad()
def compare(small: Checkpoint, folder: Path) -> float:
    """max |output_big - output_small| / max |output_small| of both checkpoints as they are loaded from disk.

    CheckpointError where loading finds a weight missing, unexpected or of another shape.
    """
    return output_change(small.model(), load_whole(small.model_class, folder, dtype="auto").eval())


def _card(plan, measured) -> ModelCard:
    """The README.md of the grown checkpoint: front matter, what was done, what was measured."""
    recipe, small = plan.recipe, Path(plan.recipe.small).name
    data = ModelCardData(library_name="transformers", base_model=small, tags=["growkit", "model-growth"])
    rows = "\n".join(f"| {name} | {old} | {new} |" for name, (old, new) in plan.sizes.items())
    old, new = plan.parameters
    change = measured.get("relative_output_change")
    told = "not measured" if change is None else f"{change:.2g} of the largest output, on random inputs"
    version = importlib.metadata.version("growkit")
    learned = f"The map was then trained for {recipe.learn} steps on {recipe.data}.\n" if recipe.learn else ""
    return ModelCard(
        f"---\n{data.to_yaml()}\n---\n\n# {small}, grown\n\n"
        f"Grown from {small} by growkit {version} (LiGO, arXiv:2303.00980, start: {recipe.start}).\n"
        f"{learned}"
        f"Change of the outputs, grown model against small one: {told}.\n\n"
        f"| | small | grown |\n|---|---|---|\n{rows}\n| parameters | {old:,} | {new:,} |\n\n"
        f"`growkit grow --recipe {RECIPE} SMALL NEW_FOLDER` makes it again, SMALL being where {small} is.\n"
    )
