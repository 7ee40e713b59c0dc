"""litgpt, which makes an optimizer out of `model.parameters()` and a dotted name, and never hands it the model.

litgpt pretrain ... --optimizer.class_path growkit.integrations.litgpt.SophiaG --optimizer.init_args.every 10
"""

from types import GeneratorType
from typing import Any

from torch import nn

from growkit import optim


class SophiaG(optim.SophiaG):
    """growkit.SophiaG, attached to the model whose `parameters()` it is given.

    params: `model.parameters()` itself: the generator knows its model. every: steps between refreshes. options: those
    of growkit.SophiaG. Raises TypeError for any other iterable. litgpt makes one group, so everything decays.
    """

    def __init__(self, params, lr: float = 1e-4, *, every: int = 10, **options: Any):
        model = params.gi_frame.f_locals.get("self") if isinstance(params, GeneratorType) else None
        if not isinstance(model, nn.Module):
            raise TypeError(f"SophiaG: params is {type(params).__name__}, expected model.parameters()")
        super().__init__(params, lr, **options)
        model = getattr(model, "module", model)  # out of Fabric's wrapper, and of torch.compile's
        self.attach(getattr(model, "_orig_mod", model), every)
