"""Growing a pretrained model: `ligo` is the operator; `spaces` and `architectures` are what it is made of."""

from growkit.growth.ligo import LiGO

__all__ = ["LiGO"]
