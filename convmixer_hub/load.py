"""Load a trained model by name, or from a folder, a file or a repository of the Hub."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
from timm.data import resolve_input_data_config
from torch import nn

from .checkpoints.convert import read_checkpoint
from .checkpoints.files import check_safetensors
from .checkpoints.resolve import Source, resolve
from .errors import CheckpointError, ConvMixerHubError, first_line
from .files import hash_file
from .hub.records import CONFIG_FILE, RECORDS, WEIGHTS_FILE
from .hub.repository import PREFIX
from .model.config import get_config
from .zoo import VARIANTS, Variant


def load_trained(name: str | Path | Source, label_names: Sequence[str] | None = None) -> nn.Module:
    """Build a trained model from what names it.

    Args:
        name: As in `checkpoints.resolve.resolve`, or what that gave: a trained model's name, a
            folder such as a run of `train`, a repository of the Hub, or a file of weights, whose
            classes have no names unless it is on record. A `Path` is always a path.
        label_names: Classes that the model is to tell apart instead of those it was trained on, if
            it is one of this package.

    Raises:
        UnknownModelError: If there is nothing of this name.
        CheckpointError: If the weights cannot be found or downloaded, are damaged or do not fit.
        ModelSizeError: If a name stands twice in `label_names`.
    """
    source = name if isinstance(name, Source) else resolve(name)
    options: dict[str, Any] = {"label_names": label_names} if label_names else {}
    if source.record:  # verified by `resolve`, so timm gets the file
        overlay = {"file": str(source.file), "label_names": source.record.dataset.classes}
        return timm.create_model(
            source.record.name, pretrained=True, pretrained_cfg_overlay=overlay, **options
        )
    if not source.name and not label_names:
        return _load_file(source)
    source.check_is_whole()
    config_file = source.folder / CONFIG_FILE
    arch = source.config.get("architecture")
    if "architecture" not in source.config:
        raise CheckpointError(
            f"{config_file}: missing, or not a model's configuration; "
            "name a folder that `convmixer train` or timm wrote"
        )
    if label_names and arch not in VARIANTS:
        raise CheckpointError(
            f"{source.folder}: holds timm's {arch}, which takes no label_names; "
            "name one of this package"
        )
    check_safetensors(source.file)
    if source.name.startswith(PREFIX):  # the repository's own configuration may name a pickle
        options["pretrained_cfg_overlay"] = {"hf_hub_filename": WEIGHTS_FILE}
    try:
        return timm.create_model(source.name, pretrained=True, **options)
    except ConvMixerHubError:
        raise
    except Exception as error:  # of timm or torch, which have none of their own
        raise CheckpointError(
            f"{source.folder}: cannot be loaded as {arch} ({first_line(error)}); "
            f"fix its {CONFIG_FILE}, or name a folder that `convmixer train` or timm wrote"
        ) from None


def _load_file(source: Source) -> nn.Module:
    """Build the model of a file of weights; images are prepared as it says, or else the arch."""
    if source.config:
        return load_trained(source.folder)
    digest = ""
    if source.file.suffix == ".safetensors":  # by which timm tells how to open a file
        with suppress(OSError):  # `read_checkpoint` says it
            digest = hash_file(source.file)
    if known := [record for record in RECORDS.values() if record.sha256 == digest]:
        return load_trained(replace(source, record=known[0]))
    checkpoint = read_checkpoint(source.file)
    like = checkpoint.model
    sizes = Variant(
        like.num_features, len(like.conv_mixer_layers), like.kernel_size, like.patch_emb.patch_size
    )
    found = [arch for arch, v in VARIANTS.items() if v == sizes]
    if not found:
        raise CheckpointError(
            f"{source.file}: no model of this package has its sizes; build a ConvMixer of these, "
            "which `convmixer info` tells, and load it with load_state_dict"
        )
    if checkpoint.activation is None:
        raise CheckpointError(
            f"{source.file}: nothing in it tells the activation; write a copy that does: convmixer "
            f"convert {shlex.quote(str(source.file))} OUT.safetensors --layout ours --activation "
            "gelu (or relu)"
        )
    model = timm.create_model(
        found[0],
        num_classes=like.num_classes,
        in_chans=like.in_chans,
        global_pool=like.global_pool,
        act_layer=checkpoint.activation,
    )
    model.load_state_dict(checkpoint.tensors)
    get_config(model)["label_names"] = None
    try:
        own = resolve_input_data_config(model, checkpoint.preprocessing)
    except (AssertionError, TypeError, ValueError):  # timm's
        raise CheckpointError(
            f"{source.file}: says how images are prepared, but timm does not understand it "
            f"({checkpoint.preprocessing}); save the state dict alone"
        ) from None
    get_config(model).update(own)
    return model
