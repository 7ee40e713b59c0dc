"""What options of the commands may be: checked before a command runs, with words for what was expected."""

import contextlib
import math
import signal
import tempfile
from pathlib import Path

import click


class Writable(click.Path):
    """A name for a file, or for a folder, that can be written: tried out, and nothing is left behind."""

    def convert(self, value, param, ctx):
        path = Path(super().convert(value, param, ctx))
        home = path.absolute() if self.dir_okay else path.absolute().parent
        while self.dir_okay and not home.exists():
            home = home.parent  # folders that are missing will be made
        try:
            tempfile.TemporaryFile(dir=home).close()
        except OSError as error:
            self.fail(f"got {str(path)!r}, which cannot be written: {home}: {error.strerror}", param, ctx)
        return path


class Device(click.Choice):
    def __init__(self):
        super().__init__(["auto", "cpu", "cuda"])

    def convert(self, value, param, ctx):
        device = super().convert(value, param, ctx)
        if device == "cuda":
            import torch

            if not torch.cuda.is_available():
                self.fail(f"got 'cuda', but {cuda()}; expected auto or cpu", param, ctx)
        return device


class AboveZero(click.ParamType):
    name = "NUMBER"

    def convert(self, value, param, ctx):
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not 0 < number < math.inf:
            self.fail(f"got {value!r}, expected a number above 0", param, ctx)
        return number


OUT_FOLDER = Writable(file_okay=False, path_type=Path)
OUT_FILE = Writable(dir_okay=False, path_type=Path)
TEXT = click.Path(exists=True, path_type=Path)


@contextlib.contextmanager
def keyboard_interrupts():
    """In here Ctrl-C raises KeyboardInterrupt, for a command that has something to keep; elsewhere it just ends."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def cuda() -> str:
    """The GPUs, or why there is none."""
    import torch

    if torch.cuda.is_available():
        return ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    if torch.version.cuda is None:
        return f"no cuda: this build of torch ({torch.__version__}) has none"
    return f"no cuda: torch is built for CUDA {torch.version.cuda}, but sees no GPU or driver"
