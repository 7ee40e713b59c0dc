class EmulationError(Exception):
    """What a compiled kernel did wrong, and where."""


class Unsupported(EmulationError):
    """PTX that the emulator does not execute."""
