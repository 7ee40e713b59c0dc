"""What the demo trains, on what, and for how long. No torch here: the parent process has no use for it."""

import dataclasses
import pydoc_data.topics
from pathlib import Path

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".tex", ".html")

# What seeds of one and the same run differ by, in bits per byte, at most (docs/training.md): less says nothing.
SPREAD = 0.05


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sizes are GPT-2's fields; flops: what every run may cost, everything counted; decay: the share of a run at whose
    end the learning rate is 0; rates: learning rates by number of layers, each the best of a few tried on seed 0."""

    context: int = 32
    batch: int = 16
    small: dict = dataclasses.field(default_factory=lambda: {"n_layer": 1, "n_embd": 32, "n_head": 2})
    middle: dict = dataclasses.field(default_factory=lambda: {"n_layer": 2, "n_embd": 48, "n_head": 3})
    large: dict = dataclasses.field(default_factory=lambda: {"n_layer": 4, "n_embd": 64, "n_head": 4})
    flops: float = 7e11
    small_steps: int = 1500
    fit_steps: int = 20
    warmup: int = 30
    decay: float = 0.4
    refresh_every: int = 10
    sophia: dict = dataclasses.field(default_factory=lambda: {"betas": (0.9, 0.99), "rho": 0.05, "eps": 1e-4})
    adamw: dict = dataclasses.field(default_factory=lambda: {"betas": (0.9, 0.95)})
    sophia_rates: dict = dataclasses.field(default_factory=lambda: {1: 1.5e-3, 2: 1e-3, 4: 1e-3})
    adamw_rates: dict = dataclasses.field(default_factory=lambda: {4: 4e-3})
    weight_decay: float = 0.1

    def scaled(self, by):
        """The same with every number of steps multiplied."""
        steps = {name: max(2, round(getattr(self, name) * by)) for name in ("small_steps", "fit_steps", "warmup")}
        return dataclasses.replace(self, flops=self.flops * by, **steps)

    def least_text(self):
        """Bytes without which training and validation have too few windows."""
        return 200 * self.context


def read_text(path=None):
    """(name, bytes): a file, every text file below a folder in order of name, or the help texts every Python has."""
    if path is None:
        topics = pydoc_data.topics.topics
        return "pydoc_data.topics", "\n".join(topics[name] for name in sorted(topics)).encode()
    files = [path]
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.suffix.lower() in TEXT_SUFFIXES and f.is_file())
    return str(path), b"\n".join(Path(f).read_bytes() for f in files)


def doubts(text):
    """Why `text` may be no text, or None. Bytes that are no UTF-8, or of which many are control characters."""
    try:
        text.decode()
    except UnicodeDecodeError as error:
        if error.start < len(text) - 3:  # a file that is cut off within its last character is text
            return f"byte {error.start} is no UTF-8"
    controls = sum(text.count(bytes([code])) for code in (*range(9), *range(14, 32), 127))
    return f"{controls / len(text):.0%} of the bytes are control characters" if controls > 0.01 * len(text) else None
