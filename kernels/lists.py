"""What the tensors of a list are, told in a few bytes per tensor, so that what was found once is looked at only again
when something is another."""

from array import array

import torch

try:
    from growkit._C import describe, identities, use_tensors

    use_tensors(torch.Tensor)
except (ImportError, AttributeError):  # not built, or a torch whose tensors lack DLPack's C interface

    def describe(tensors):
        """(addresses, facts) of a list of tensors and None: 8 bytes for each address; class, device, dtype, sizes and
        strides of each. Raises one of WITHOUT_MEMORY."""
        addresses = array("q", [0 if t is None else t.data_ptr() for t in tensors]).tobytes()
        return addresses, [None if t is None else (type(t), t.device, t.dtype, t.shape, t.stride()) for t in tensors]

    def identities(owner):
        """Which objects a list holds, or are the keys and values of the dictionaries in a dictionary."""
        if isinstance(owner, list):
            return list(map(id, owner))
        owned = ((key, *each, *each.values()) if isinstance(each, dict) else (key, each) for key, each in owner.items())
        return [tuple(map(id, each)) for each in owned]


WITHOUT_MEMORY = (
    RuntimeError,
    BufferError,
)  # what `describe` raises of a tensor that has no address, such as a sparse one


class TensorList(list):
    """A list of tensors that its owner never changes, on which a kernel notes how it goes about it.

    told: what `describe` says of it, where the owner asks that before every call.
    """

    known = told = None
