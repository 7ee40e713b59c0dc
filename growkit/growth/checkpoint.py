"""Checkpoints as files: opening one without loading it, and writing one tensor by tensor, whole or not at all."""

import contextlib
import json
import math
import os
import re
import shutil
import signal
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors import SafetensorError, safe_open

from growkit.growth.source import class_of, saved_buffers

SHARD_BYTES = 5 * 10**9
# Beside config and weights: what a tokenizer or processor reads, by the names that transformers gives these files.
_COMPANIONS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "spiece.model",
    "sentencepiece*.model", "chat_template*", "preprocessor_config.json", "processor_config.json",
    "generation_config.json", "LICENSE*",
)  # fmt: skip
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or whose files contradict each other: says which file and what is wrong."""


class Checkpoint(NamedTuple):
    """A small model as its files hold it.

    config, model_class: of transformers. weights: name -> tensor of every parameter, then of every buffer that is
    saved, read from disk when asked for; buffers: names of the latter.
    companions: files of tokenizer, processor and generation that a grown checkpoint takes over.
    gguf: name of the file where it is one; its tokenizer is in it.
    """

    folder: Path
    config: Any
    model_class: type
    weights: Mapping[str, torch.Tensor]
    buffers: list[str]
    companions: list[Path]
    gguf: str | None = None

    def tokenizer(self):
        """As transformers reads it; ValueError where there is none that it can read."""
        try:
            return transformers.AutoTokenizer.from_pretrained(
                self.folder, local_files_only=True, **({"gguf_file": self.gguf} if self.gguf else {})
            )
        except Exception as error:  # transformers and tokenizers each raise their own
            told = str(error).strip().partition("\n")[0]
            raise ValueError(
                f"{self.folder / (self.gguf or '')}: no tokenizer that transformers reads: {told}"
            ) from error

    def model(self):
        """The model in memory, in eval mode."""
        model = self.model_class._from_config(self.config, dtype=next(iter(self.weights.values())).dtype).eval()
        with torch.no_grad():
            for name, held in (*model.named_parameters(), *saved_buffers(model).items()):
                held.copy_(self.weights[name])
        return model


def open_checkpoint(path: str | Path) -> Checkpoint:
    """A local Hugging Face folder (safetensors or .bin, sharded or single), or a .gguf file.

    Files whose names and shapes are those of the model's own parameters and buffers are read tensor by tensor; others
    (older names, GGUF) go through transformers' own loading, into memory. Nothing is executed: pickles are read with
    weights_only, and code that a checkpoint brings is not run.
    CheckpointError where something is missing, of another shape, cut off, quantized, or named outside the folder.
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".gguf":
        return _through_transformers(path.parent, gguf_file=path.name)
    if not path.is_dir():
        raise CheckpointError(f"{path}: expected a local folder with config.json, or a .gguf file")
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path}: has no config.json, expected a Hugging Face checkpoint")
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    except Exception as error:  # whatever a broken config.json makes transformers raise
        raise CheckpointError(f"{path / 'config.json'}: {error}") from error
    if getattr(config, "quantization_config", None):
        raise CheckpointError(
            f"{path}: is quantized (quantization_config), expected plain weights: dequantize it first"
        )
    try:
        model_class = class_of(config)
    except ValueError as error:
        raise CheckpointError(f"{path / 'config.json'}: {error}") from None
    found = _Files(path)
    with torch.device("meta"):
        skeleton = model_class(config)
    buffers = saved_buffers(skeleton)
    names = {name: list(held.shape) for name, held in (*skeleton.named_parameters(), *buffers.items())}
    every = names.keys() | {name for name, _ in skeleton.named_parameters(remove_duplicate=False)}
    ignored = getattr(skeleton, "_keys_to_ignore_on_load_unexpected", None) or ()
    extra = [name for name in found if name not in every and not any(re.search(each, name) for each in ignored)]
    if extra or not names.keys() <= found.keys():
        return _through_transformers(path, config, model_class)
    for name, shape in names.items():
        if found.shape(name) != shape:
            raise CheckpointError(
                f"{found.place(name)}: {name} is {found.shape(name)}, expected {shape} by config.json"
            )
    return Checkpoint(path, config, model_class, found.only(names), list(buffers), _companions(path))


def load_whole(model_class: type, folder: Path, **options: Any):
    """`model_class.from_pretrained(folder, **options)`, where everything that it would pass over is an error."""
    name = folder / options.get("gguf_file", "")
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        model, info = model_class.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, weights_only=True, **options
        )
    except Exception as error:  # transformers, torch and safetensors each raise their own for a broken file
        raise CheckpointError(f"{name}: {error}") from error
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info.get(problem):
            raise CheckpointError(f"{name}: {problem}: {', '.join(map(str, sorted(info[problem])))}")
    return model


def _through_transformers(folder, config=None, model_class=None, gguf_file=None):
    if gguf_file:
        model = load_whole(transformers.AutoModelForCausalLM, folder, gguf_file=gguf_file)
        model.config = type(model.config).from_dict(  # its weights are plain numbers once read
            {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
        )
        model.config.architectures = [type(model).__name__]
    else:
        model = load_whole(model_class, folder, config=config, dtype="auto")
    buffers = saved_buffers(model)
    weights = dict(model.named_parameters()) | buffers
    companions = [] if gguf_file else _companions(folder)  # what lies beside such a file need not belong to it
    return Checkpoint(folder, model.config, type(model), weights, list(buffers), companions, gguf_file)


def _companions(folder):
    return sorted({path for pattern in _COMPANIONS for path in folder.glob(pattern) if path.is_file()})


class _Files(Mapping):
    """name -> tensor over the weight files of a folder; opened once, a tensor is read when it is asked for."""

    def __init__(self, folder, names=None, places=None):
        self._folder = folder
        self._places = places if places is not None else self._find()
        self._names = list(self._places) if names is None else list(names)

    def only(self, names):
        return _Files(self._folder, names, self._places)

    def place(self, name):
        return self._places[name][0]

    def shape(self, name):
        path, source = self._places[name]
        with _reading(path):
            return list(source[name].shape) if isinstance(source, dict) else source.get_slice(name).get_shape()

    def __getitem__(self, name):
        path, source = self._places[name]
        with _reading(path):
            return source[name] if isinstance(source, dict) else source.get_tensor(name)

    def __iter__(self):
        return iter(self._names)

    def __len__(self):
        return len(self._names)

    def _find(self):
        for single, reader in (("model.safetensors", _safetensors), ("pytorch_model.bin", _pickle)):
            index = self._folder / f"{single}.index.json"
            if index.is_file():
                return self._sharded(index, reader)
            if (path := self._folder / single).is_file():
                source = reader(path)
                return {name: (path, source) for name in source.keys()}  # noqa: SIM118, an open file is no mapping
        raise CheckpointError(f"{self._folder}: has no model.safetensors and no pytorch_model.bin, whole or with index")

    def _sharded(self, index, reader):
        try:
            weight_map = json.loads(index.read_text())["weight_map"]
            files = sorted(set(weight_map.values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index}: expected JSON with a weight_map of name to file: {error!r}") from None
        sources = {}
        for name in files:
            if not isinstance(name, str) or name != os.path.basename(name) or name in ("", ".", ".."):
                raise CheckpointError(f"{index}: names the file {name!r}, expected names of files in the same folder")
            if not (self._folder / name).is_file():
                raise CheckpointError(f"{index}: names {name}, which is not there")
            sources[name] = reader(self._folder / name)
        for name, file in weight_map.items():
            if name not in sources[file].keys():  # noqa: SIM118, an open file is no mapping
                raise CheckpointError(f"{self._folder / file}: has no {name}, which {index.name} says it has")
        return {name: (self._folder / file, sources[file]) for name, file in weight_map.items()}


@contextlib.contextmanager
def _reading(path):
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read, cut off or damaged: {error}") from error


def _safetensors(path):
    with _reading(path):
        return safe_open(path, framework="pt")


def _pickle(path):
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError and others
        raise CheckpointError(f"{path}: cannot be read as plain weights (weights_only): {error}") from error
    found = found.get("state_dict", found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise CheckpointError(f"{path}: expected a dict of tensors")
    return found


def _is_zip(path):
    with path.open("rb") as file:
        return file.read(2) == b"PK"


# --- writing ---------------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """What a file will hold under one name, known before its value is."""

    name: str
    shape: list[int]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@contextlib.contextmanager
def new_folder(path: Path, force: bool = False) -> Iterator[Path]:
    """A folder to fill that takes the name `path` at the end. If anything, SIGINT and SIGTERM too, comes between, it is
    gone, and so are the folders above that were made for it.

    force: another folder of that name is replaced. FileExistsError where there is one without.
    """
    path = Path(path)
    if path.exists() and not force:
        raise FileExistsError(f"{path}: exists already, expected a new name, or --force to replace it")
    parents = [folder for folder in path.absolute().parents if not folder.exists()]  # the deepest first
    part = None

    def stop(number, frame):
        raise SystemExit(128 + number)

    main = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    before = signal.signal(signal.SIGTERM, stop) if main else None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
        yield part
        part.chmod(0o777 & ~_umask())
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
            path.rename(old / path.name)
            part.rename(path)
            shutil.rmtree(old)
        else:
            part.rename(path)
    finally:
        if part:
            shutil.rmtree(part, ignore_errors=True)
        with contextlib.suppress(OSError):  # they hold the new folder, or somebody else's
            for folder in parents:
                folder.rmdir()
        if main:
            signal.signal(signal.SIGTERM, before)


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_tensors(
    folder: Path, entries: Iterable[Entry], tensors: Iterable[tuple[str, torch.Tensor]], shard_bytes: int = SHARD_BYTES
) -> None:
    """Write safetensors, sharded as transformers expects it, holding one tensor at a time.

    entries: of all tensors, in the order in which `tensors` yields them. The safetensors library writes a file from
    tensors that are all in memory, so the format (a length, a JSON header, the bytes) is written here.
    """
    shards, size = [[]], 0
    for entry in entries:
        if shards[-1] and size + entry.bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.bytes
    pairs = iter(tensors)
    single = len(shards) == 1
    files = ["model.safetensors"] if single else _shard_names(len(shards))
    for file, shard in zip(files, shards, strict=True):
        with (folder / file).open("wb") as out:
            out.write(_header(shard))
            for entry in shard:
                name, value = next(pairs)
                if (name, list(value.shape), value.dtype) != entry:
                    raise ValueError(f"tensors: got {name} {list(value.shape)} {value.dtype}, expected {entry}")
                out.write(memoryview(value.contiguous().view(-1).view(torch.uint8).cpu().numpy()))
            out.flush()
            os.fsync(out.fileno())
    if not single:
        total = sum(entry.bytes for shard in shards for entry in shard)
        weight_map = {entry.name: file for file, shard in zip(files, shards, strict=True) for entry in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _shard_names(count):
    return [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]


def _header(shard):
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for entry in shard:
        span = [at, at + entry.bytes]
        header[entry.name] = {"dtype": _DTYPES[entry.dtype], "shape": entry.shape, "data_offsets": span}
        at = span[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data start at a multiple of 8
    return len(text).to_bytes(8, "little") + text
