"""What the tensors of a list are, told in a few bytes per tensor, so that what was found once is looked at only again
when something is another."""

from array import array
from itertools import chain
from operator import attrgetter

import torch

try:
    from growkit._C import describe, identities, referents, use_tensors

    use_tensors(torch.Tensor)
except (ImportError, AttributeError):  # not built, or a torch whose tensors lack DLPack's C interface
    _FACTS = type, torch.Tensor.get_device, attrgetter("dtype"), torch.Tensor.size, torch.Tensor.stride

    def describe(tensors):
        """(addresses, facts) of a list of tensors: 8 bytes for each address; class, device, dtype, sizes and strides.

        Raises one of WITHOUT_ADDRESS.
        """
        return array("q", map(torch.Tensor.data_ptr, tensors)).tobytes(), tuple(
            tuple(map(of, tensors)) for of in _FACTS
        )

    def identities(owner):
        """Which objects a list holds, or are the keys and values of the dictionaries in a dictionary."""
        if isinstance(owner, list):
            return list(map(id, owner))
        owned = [each if isinstance(each, dict) else {0: each} for each in owner.values()]
        values = chain.from_iterable(map(dict.values, owned))
        return list(map(id, owner)), list(map(tuple, owned)), list(map(id, values))

    def referents(references):
        """What weak references refer to; None for what is gone."""
        return [each() for each in references]


WITHOUT_ADDRESS = RuntimeError, BufferError, TypeError  # what `describe` raises of a sparse tensor, and of None


class TensorList(list):
    """A list of tensors that its owner never changes.

    known: where a kernel notes how it goes about it, for lists like it, to which the owner gives the same dictionary.
    told: what `describe` says of it, where the owner asks that before every call.
    """

    def __init__(self, tensors, known=None):
        super().__init__(tensors)
        self.known, self.told = {} if known is None else known, None
