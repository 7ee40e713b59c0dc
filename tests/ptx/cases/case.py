from collections.abc import Callable, Iterator
from typing import NamedTuple

from .compare import Comparison
from .tensors import ALIGNED, Layout


class Case(NamedTuple):
    """check: runs the launcher and the reference on tensors of a layout.

    elements: of the full chunks in the layout ALIGNED; None where a case brings its own tensors, whatever the layout.
    """

    check: Callable[[Layout], Iterator[Comparison]]
    elements: int | None = sum(ALIGNED.sizes)


Cases = dict[tuple[str, str], Case]  # by op and variant
