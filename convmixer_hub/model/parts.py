"""Whether the parts of a ConvMixer are those that it was built with, and which activation it has.

Code that computes a model other than by its own `forward` needs to know this.
"""

from __future__ import annotations

from typing import Any

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


def _describe_convolution(
    kernel_size: int, stride: int = 1, padding: int = 0, groups: int = 1
) -> dict[str, Any]:
    sides = {"kernel_size": kernel_size, "stride": stride, "padding": padding}
    return {name: (side, side) for name, side in sides.items()} | {"groups": groups}


def find_changed_part(model: ConvMixer) -> str | None:
    """Describe the first part that was replaced or set to compute something else, if any was."""
    channels, side = model.num_features, getattr(model.patch_emb, "patch_size", 0)
    mixing = {"in_channels": channels, "out_channels": channels}
    geometry = {
        "conv": {"out_channels": channels} | _describe_convolution(side, side),
        "depth_wise_conv": mixing
        | _describe_convolution(model.kernel_size, padding=model.kernel_size // 2, groups=channels),
        "point_wise_conv": mixing | _describe_convolution(1),
    }
    for name, module in model.named_modules():
        parent, _, part = name.rpartition(".")
        kinds = PARTS.get("layer" if parent == "conv_mixer_layers" else part)
        if kinds is None:
            continue
        settings = SETTINGS | geometry.get(part, {})
        is_as_built = all(getattr(module, k, value) == value for k, value in settings.items())
        if type(module) not in kinds or not is_as_built:
            text = str(module).partition("(\n")[0]  # without its parts
            return f"{name} is {text}"
    return None
