"""timm's configuration of a model: its input, its classes, where its weights came from."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

CLASSIFIER = "classification.linear"
FIRST_CONV = "patch_emb.conv"


def get_config(model: nn.Module) -> dict[str, Any]:
    """Return timm's configuration of a model: input, labels, where its weights came from."""
    return cast("dict[str, Any]", model.pretrained_cfg)


def get_label_names(model: nn.Module) -> list[str] | None:
    """Name the classes of a model by index; None if its configuration is not about its classes."""
    names = get_config(model).get("label_names")
    return list(names) if names and len(names) == model.num_classes else None
