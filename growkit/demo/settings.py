"""What the demo trains, on what, and for how long. No torch here: the parent process has no use for it."""

import dataclasses
import pydoc_data.topics

from growkit import text

# What seeds 0 to 2 of one run differ by, in bits per byte: 0.011 to 0.023 (docs/training.md). Less says nothing.
SPREAD = 0.025


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sizes are GPT-2's fields; flops: what every run may cost, everything counted; decay: the share of a run at whose
    end the learning rate is 0; rates: AdamW's, by run, each the best of three tried on seed 0."""

    context: int = 32
    batch: int = 16
    small: dict = dataclasses.field(default_factory=lambda: {"n_layer": 1, "n_embd": 32, "n_head": 2})
    middle: dict = dataclasses.field(default_factory=lambda: {"n_layer": 2, "n_embd": 48, "n_head": 3})
    large: dict = dataclasses.field(default_factory=lambda: {"n_layer": 4, "n_embd": 64, "n_head": 4})
    flops: float = 1.1e12
    small_steps: int = 2000
    fit_steps: int = 20
    warmup: int = 30
    decay: float = 0.4
    rates: dict = dataclasses.field(
        default_factory=lambda: {"small": 6e-3, "grown": 2.5e-3, "scratch": 4e-3, "middle": 4e-3}
    )
    betas: tuple = (0.9, 0.95)
    weight_decay: float = 0.1
    sophia: str = "short-run"  # of growkit.presets
    refresh_every: int = 10

    def scaled(self, by):
        """The same with every number of steps multiplied."""
        steps = {name: max(2, round(getattr(self, name) * by)) for name in ("small_steps", "fit_steps", "warmup")}
        return dataclasses.replace(self, flops=self.flops * by, **steps)

    def least_text(self):
        """Bytes without which training and validation have too few windows."""
        return 200 * self.context


def read_text(path=None):
    """(name, bytes): of a file or a folder as `growkit.text` reads them, or the help texts that every Python has."""
    if path is not None:
        return str(path), text.read_text(path)
    topics = pydoc_data.topics.topics
    return "pydoc_data.topics", "\n".join(topics[name] for name in sorted(topics)).encode()
