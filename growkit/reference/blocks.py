"""What the operators share: the walk in blocks that fit a core's cache, flags, and the dtype of computation."""

import torch

# Elements per block: the five operands of one block stay in a core's cache from one operation to the next.
BLOCK = 1 << 17


def in_memory_order(*tensors):
    """Tensors of one shape as contiguous views, themselves if they are; None unless dense and laid out alike."""
    if all(t.is_contiguous() for t in tensors):
        return tensors
    order = sorted(range(tensors[0].dim()), key=lambda d: -tensors[0].stride(d))
    views = tuple(t.permute(order) for t in tensors)
    return views if all(v.is_contiguous() for v in views) else None


def walk(*tensors, numbered=False):
    """Yield (first element, slices) over tensors of one shape, in flat slices of at most BLOCK elements.

    Tensors that are dense and laid out alike are walked in memory order; others are yielded whole. numbered: random
    bits belong to the row-major index of an element, so in any other memory order tensors are yielded whole, too.
    """
    views = in_memory_order(*tensors)
    if views is None or numbered and views[0] is not tensors[0]:
        yield 0, tensors
        return
    slices = [t.view(-1).split(BLOCK) for t in views]
    for i, block in enumerate(zip(*slices, strict=True)):
        yield i * BLOCK, block


def is_set(flag):
    return flag is not None and bool(flag)


def wide(t):
    return torch.promote_types(t.dtype, torch.float32)
