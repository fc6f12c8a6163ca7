"""Adapting a checkpoint to a model, after timm has read it and before timm loads it."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from timm.models import PretrainedCfg
from torch import Tensor

from ..errors import CheckpointError
from ..hub.records import WEIGHTS_FILE
from ..model.config import CLASSIFIER, FIRST_CONV, get_config, order_names
from ..model.convmixer import ConvMixer
from ..model.layouts import OURS, check_fit, convert_layout, detect_layout
from ..model.parts import name_activation
from .files import check_finite, check_safetensors

_logger = logging.getLogger(__name__)


def adapt_checkpoint(
    state_dict: dict[str, Tensor],
    model: ConvMixer,
    trained: PretrainedCfg,
    activation: str | None,
    label_names: Sequence[str] | None,
    features_only: bool,
    cache_dir: str | Path | None,
) -> dict[str, Tensor]:
    """Adapt a checkpoint such that timm can load it into the model, or refuse it.

    Nothing but the head and the stem may differ, and these only where they are adapted: timm
    loads leniently as soon as the number of classes differs, whatever the checkpoint holds. One
    line of the log says what is adapted or newly initialized.

    Args:
        state_dict: What timm read, in any layout.
        model: As timm built it; its configuration says where the weights come from.
        trained: The configuration of the checkpoint, not yet that of the model.
        activation: What the checkpoint was trained with, where its file does not tell.
        label_names: Classes of the model, if it was asked for by their names.
        features_only: The model has no head.
        cache_dir: Of the Hub's files, if it is not the usual one.

    Returns:
        The state dict in our layout, with a stem that timm adapts to the model's channels.

    Raises:
        CheckpointError: Naming what does not fit, and the remedy.
    """
    cfg = get_config(model)
    if trained.state_dict and not trained.source:
        source = "the state dict"
    else:
        source = cfg.get("file") or cfg.get("hf_hub_id") or cfg.get("url") or "the checkpoint"
        activation = _read_activation(cfg, cache_dir) or activation
    if activation not in (None, name_activation(model)):
        raise CheckpointError(
            f"{source}: was trained with {activation}, the model has "
            f"{name_activation(model) or 'another activation'}; give act_layer='{activation}'"
        )
    given, state_dict = state_dict, convert_layout(state_dict)

    own = model.state_dict()
    expected = {key: tuple(tensor.shape) for key, tensor in own.items()}
    stem, weight, bias = f"{FIRST_CONV}.weight", f"{CLASSIFIER}.weight", f"{CLASSIFIER}.bias"
    d_model, _, *patch = expected[stem]
    if stem in state_dict and tuple(state_dict[stem].shape) != expected[stem]:
        expected[stem] = (d_model, trained.input_size[0], *patch)
    if label_names:
        loads_head = bool(trained.num_classes)
        rows: tuple[int, ...] = (trained.num_classes,)
        if loads_head and weight in state_dict and not trained.label_names:
            rows = tuple(state_dict[weight].shape[:1])  # the number may be the registry's alone
        expected[weight] = (*rows, *expected[weight][1:])
        expected[bias] = rows
    else:
        loads_head = trained.num_classes == model.num_classes
    ignored = set() if loads_head and not features_only else {weight, bias}
    check_fit(state_dict, expected, source, given, ignored)
    check_finite(state_dict, source)

    changes = []
    if given.keys() != state_dict.keys() and (layout := detect_layout(given)) != OURS:
        changes.append(f"keys renamed from layout {layout}")
    dtypes = {
        str(tensor.dtype)
        for key, tensor in state_dict.items()
        if key in own and tensor.dtype != own[key].dtype
    }
    if dtypes:
        changes.append(f"{', '.join(sorted(dtypes))} turned into {own[stem].dtype}")
    if tuple(own[stem].shape) != expected[stem]:
        changes.append(f"{stem} adapted from {trained.input_size[0]} to {model.in_chans} channels")
    if not features_only and (label_names or ignored):  # of features, timm leaves the head out
        changes.append(_adapt_head(state_dict, model, trained, label_names, source))
    if changes:
        loaded = len(expected.keys() & state_dict.keys() - ignored)
        text = "; ".join([f"loading {loaded} tensors from {source}", *changes])
        _logger.info("%s: %s", cfg["architecture"], text)
    return state_dict


def _adapt_head(
    state_dict: dict[str, Tensor],
    model: ConvMixer,
    trained: PretrainedCfg,
    label_names: Sequence[str] | None,
    source: str,
) -> str:
    """Replace the head by one for the model's classes, and say what became of it."""
    weight = f"{CLASSIFIER}.weight"
    classes = len(state_dict[weight]) if weight in state_dict else 0
    if label_names:
        known = order_names(trained.label_names) or ()
        if not known and classes == len(label_names):
            return f"{CLASSIFIER} kept, its {len(label_names)} classes had no names"
        rows = {name: row for row, name in enumerate(known) if len(known) == trained.num_classes}
        kept = [(row, rows[name]) for row, name in enumerate(label_names) if name in rows]
        for key, fresh in model.get_classifier().state_dict(prefix=f"{CLASSIFIER}.").items():
            head = fresh.clone()
            for row, old in kept:
                head[row] = state_dict[key][old]
            state_dict[key] = head
        new = len(label_names) - len(kept)
        return f"{CLASSIFIER} keeps the rows of {len(kept)} classes, {new} newly initialized"
    if not model.num_classes:
        return f"{CLASSIFIER} left out"
    if classes == model.num_classes and trained.num_classes >= 0:  # timm's train.py gives -1
        raise CheckpointError(
            f"{source}: has a head for {classes} classes, but its configuration says "
            f"{trained.num_classes}; put num_classes={classes} into pretrained_cfg_overlay, too"
        )
    return (
        f"{CLASSIFIER} newly initialized for {model.num_classes} classes, "
        f"that of the checkpoint for {classes} left out"
    )


def _read_activation(cfg: dict[str, Any], cache_dir: str | Path | None) -> str | None:
    """Read from the metadata of the file that timm loaded what no tensor tells."""
    found = cfg.get("file")
    if cfg.get("source") == "hf-hub" or (cfg.get("hf_hub_id") and not found):
        repository, _, revision = cfg["hf_hub_id"].partition("@")
        name = cfg.get("hf_hub_filename", WEIGHTS_FILE)
        found = try_to_load_from_cache(repository, name, cache_dir, revision or None)
    if not isinstance(found, (str, os.PathLike)):
        return None
    file = Path(found)
    if file.is_dir():
        file = file / WEIGHTS_FILE
    if file.suffix != ".safetensors" or not file.is_file():
        return None
    return check_safetensors(file).get("activation")
