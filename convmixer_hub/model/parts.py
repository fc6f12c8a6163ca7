"""Whether the parts of a ConvMixer are those that it was built with, and which activation it has.

Code that computes a model other than by its own `forward` needs to know this.
"""

from __future__ import annotations

import re

from timm.layers import DropPath
from torch import nn

from .convmixer import ACTIVATIONS, ConvMixer
from .cpu import FAST, has_hooks

# What may stand in for what a model was built with.
_BUILT_AS: dict[type, type] = {fast: plain for plain, fast in FAST.items()}
_BUILT_AS[DropPath] = nn.Identity
# The head, and activations, see `name_activation`, may be any.
_FREE = re.compile(r"|classification\b.*|.*\.act\d?\b.*")


def name_activation(model: nn.Module) -> str | None:
    """Return which of `ACTIVATIONS` a ConvMixer, ours or timm's, has; None if it has another."""

    def name(module: nn.Module) -> str | None:
        if getattr(module, "approximate", "none") != "none":
            return None
        return next((name for name, kind in ACTIVATIONS.items() if type(module) is kind), None)

    known = tuple(ACTIVATIONS.values())
    found = {
        name(module)
        for path, module in model.named_modules()
        if path.rpartition(".")[2] in ("act", "act1", "act2") or isinstance(module, known)
    }
    return found.pop() if len(found) == 1 else None


def _describe(part: nn.Module | None) -> tuple[type, str]:
    """Give the kind of a part and its settings, without those that BatchNorms may differ in."""
    settings = re.sub(r"(eps|momentum|drop_prob)=[^,]*(, )?", "", part.extra_repr() if part else "")
    return _BUILT_AS.get(type(part), type(part)), settings


def find_changed_part(model: ConvMixer) -> str | None:
    """Describe the first part that has hooks, was replaced or set to compute something else."""
    layers, side = len(model.conv_mixer_layers), getattr(model.patch_emb, "patch_size", 1)
    sizes = (model.num_features, layers, model.kernel_size, side)
    channels = getattr(getattr(model.patch_emb, "conv", None), "in_channels", model.in_chans)
    built = dict(ConvMixer(*sizes, in_chans=channels, device="meta").named_modules())
    parts = dict(model.named_modules(remove_duplicate=False))
    for name in parts | built:
        part = parts.get(name)
        if part is not None and has_hooks(part):
            return f"{name or 'the model'} has hooks, such as of pruning"
        if not _FREE.fullmatch(name) and _describe(part) != _describe(built.get(name)):
            text = str(part).partition("(\n")[0]  # without its parts
            return f"{name} is {text}"
    return None
