"""Whether the parts of a ConvMixer are those that it was built with, and which activation it has.

What computes a model in another way than its own `forward` has to know.
"""

from __future__ import annotations

from timm.layers import DropPath
from torch import nn

from .convmixer import ACTIVATIONS, ConvMixer, ConvMixerLayer, PatchEmbeddings
from .cpu import FastConvMixerLayer, FastPatchEmbeddings

PARTS: dict[str, tuple[type[nn.Module], ...]] = {
    "patch_emb": (PatchEmbeddings, FastPatchEmbeddings),
    "layer": (ConvMixerLayer, FastConvMixerLayer),
    **dict.fromkeys(("conv", "depth_wise_conv", "point_wise_conv"), (nn.Conv2d,)),
    **dict.fromkeys(("norm", "norm1", "norm2"), (nn.BatchNorm2d,)),
    "drop_path": (nn.Identity, DropPath),
}
SETTINGS = {
    "padding_mode": "zeros",
    "dilation": (1, 1),
    "affine": True,
    "track_running_stats": True,
}


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


def find_changed_part(model: ConvMixer) -> str | None:
    """Describe the first part that was replaced or set to compute something else, if any was."""
    for name, module in model.named_modules():
        parent, _, part = name.rpartition(".")
        kinds = PARTS.get("layer" if parent == "conv_mixer_layers" else part)
        if kinds is None:
            continue
        is_as_built = all(getattr(module, k, value) == value for k, value in SETTINGS.items())
        is_as_built &= not isinstance(getattr(module, "padding", 0), str)
        if type(module) not in kinds or not is_as_built:
            text = str(module).partition("(\n")[0]  # without its parts
            return f"{name} is {text}"
    return None
