"""timm's configuration of a model: its input, its classes, where its weights came from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast
from unicodedata import normalize

from torch import nn

from ..errors import CheckpointError

CLASSIFIER = "classification.linear"
FIRST_CONV = "patch_emb.conv"


def get_config(model: nn.Module) -> dict[str, Any]:
    """Return timm's configuration of a model: input, labels, where its weights came from."""
    return cast("dict[str, Any]", model.pretrained_cfg)


def get_label_names(model: nn.Module) -> list[str] | None:
    """Return the names of a model's classes by index; None if it has none, or too few or many."""
    names = order_names(get_config(model).get("label_names"))
    return [str(name) for name in names] if names and len(names) == model.num_classes else None


def order_names(label_names: Any) -> Any:
    """List names of classes, in one Unicode form (NFC).

    A dict of names by number, such as `id2label`, is put in order; None if its numbers do not run
    from 0. Anything but a list, tuple or dict is returned unchanged.
    """
    if isinstance(label_names, Mapping):
        by_number = {str(number): name for number, name in label_names.items()}
        label_names = [by_number.get(str(i)) for i in range(len(by_number))]
        if None in label_names:
            return None
    if not isinstance(label_names, (list, tuple)):
        return label_names
    return [normalize("NFC", name) if isinstance(name, str) else name for name in label_names]


def check_classifies(model: nn.Module) -> None:
    """Refuse a model with fewer than two classes.

    Raises:
        CheckpointError: If it has no head, or one output alone.
    """
    count = getattr(model, "num_classes", None)
    if count in (0, 1):
        found = "no head" if count == 0 else "one output, whose probability is always 1"
        raise CheckpointError(
            f"the model has {found} (num_classes is {count}); give it two classes or more"
        )
