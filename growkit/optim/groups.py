"""Which parameters decay, and settings that somebody has trained with."""

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

from torch import nn


def param_groups(model: nn.Module, weight_decay: float, *, no_decay: Iterable[str] = ()) -> list[dict[str, Any]]:
    """The trainable parameters of `model` as two named groups, with and without weight decay, for any optimizer.

    No decay for

    - parameters of fewer than two dimensions: biases, the gains of norms;
    - all parameters of a module whose class name contains "Norm" or "Embedding", position embeddings and class tokens
      that such a module holds itself among them; so a head tied to the token embedding does not decay either;
    - parameters whose own name contains "bias" or "embed", such as the biases of stacked experts;
    - those whose full name matches a pattern of `no_decay` (shell style: "*.cls_token").

    This is the rule of the official training script (github.com/Liuhong99/Sophia, `configure_optimizers`): decay for
    the weights of matrix products, none for embeddings, norms and biases, a tied head among the embeddings. The script
    lists module types; names stand for them here, so that norms and embeddings of any library are found.

    A tensor that several modules share appears once, under its first name; frozen parameters are left out, and so is a
    group that would be empty. Order within a group is that of the model.
    Returns [{"params": [(name, parameter), ...], "weight_decay": number}, ...]. Raises TypeError if `model` is no
    module, ValueError if weight_decay is negative or not finite, if a pattern of `no_decay` matches nothing, or if
    nothing is trainable.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"param_groups: model is {type(model).__name__}, expected a torch.nn.Module")
    if not 0 <= weight_decay < float("inf"):
        raise ValueError(f"param_groups: weight_decay={weight_decay}, expected a finite number >= 0")
    names, undecayed, matched = {}, set(), set()
    # Every name of a tensor has a say: under one of them it may be an embedding.
    for prefix, module in model.named_modules(remove_duplicate=False):
        kept = any(word in type(module).__name__ for word in ("Norm", "Embedding"))
        for own, p in module._parameters.items():
            if p is None or not p.requires_grad:
                continue
            name = f"{prefix}.{own}" if prefix else own
            names.setdefault(p, name)
            patterns = {pattern for pattern in no_decay if fnmatchcase(name, pattern)}
            matched |= patterns
            if kept or patterns or p.dim() < 2 or "bias" in own or "embed" in own:
                undecayed.add(p)
    if unmatched := [pattern for pattern in no_decay if pattern not in matched]:
        raise ValueError(f"param_groups: no_decay={unmatched} match no trainable parameter, expected patterns that do")
    if not names:
        raise ValueError(f"param_groups: {type(model).__name__} has no parameter that requires a gradient")
    groups = [
        {"params": [(name, p) for p, name in names.items() if p not in undecayed], "weight_decay": weight_decay},
        {"params": [(name, p) for p, name in names.items() if p in undecayed], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class Preset(dict):
    """Options of an optimizer as keywords, `SophiaG(params, **preset)`, and who trained with them.

    optimizer: the class they are for. sources: {option: where its value stands}. run: what else that training used; a
    preset cannot set it, and without it the values mean less.
    """

    def __init__(self, optimizer, run, **options):
        """options: name=(value, source)."""
        super().__init__({name: value for name, (value, _) in options.items()})
        self.optimizer, self.run = optimizer, run
        self.sources = {name: source for name, (_, source) in options.items()}


def _official(size, lr, rho, min_lr, model=""):
    file = f"github.com/Liuhong99/Sophia at a7e1572, config/train_gpt2_{size}_sophiag.py"
    return Preset(
        "SophiaG",
        f"100,000 steps of 480 x 1024 tokens of OpenWebText{model}, warm-up over 2,000, cosine to {min_lr:g}, training "
        "and sampled-label gradients clipped at 1.0, refresh every 10 steps",
        lr=(lr, file),
        rho=(rho, file),
        betas=((0.965, 0.99), file),
        weight_decay=(0.2, file),
    )


def _levanter(size, lr):
    file = f"github.com/stanford-crfm/levanter, config/optim/sophia-h_{size}.yaml"
    code = "github.com/stanford-crfm/levanter, src/levanter/optim/sophia.py, defaults"
    return Preset(
        "SophiaH",
        "warm-up over 2,000 steps, then decay to a tenth of lr; its probes are Gaussian, those here random signs",
        lr=(lr, file),
        rho=(0.01, f"{file}, gamma"),
        betas=((0.96, 0.99), code),
        weight_decay=(0.2, file),
        eps=(1e-12, code),
    )


_SHORT = "docs/training.md, the sweep of the demo: a starting point, not an optimum"

_SCALED = ", scale_attn_by_inverse_layer_idx=True"

presets = {
    "gpt2-125m": _official("small", 6e-4, 0.05, 1.5e-5),
    "gpt2-355m": _official("medium", 7e-4, 0.08, 1e-5, _SCALED),
    "gpt2-770m": _official("large", 3e-4, 0.05, 1e-5, _SCALED),
    "gpt2-125m-hutchinson": _levanter("small", 6e-4),
    "gpt2-355m-hutchinson": _levanter("medium", 4e-4),
    "gpt2-770m-hutchinson": _levanter("large", 3e-4),
    "gpt2-1.5b-hutchinson": _levanter("xl", 1.2e-4),
    # Hundreds of steps: the official beta1 averages over a good part of such a run.
    "short-run": Preset(
        "SophiaG",
        "0.4 to 1.6 M parameters, some hundred steps of 1,536 bytes of text, warm-up over a tenth, cosine to a tenth, "
        "gradients clipped at 1.0, refresh every 10 steps",
        lr=(1e-3, _SHORT),
        rho=(0.2, _SHORT),
        betas=((0.7, 0.99), _SHORT),
        weight_decay=(0.1, _SHORT),
    ),
}
