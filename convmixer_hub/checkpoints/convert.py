"""From a checkpoint of any ConvMixer, in any layout, to a safetensors file in the layout wanted."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import timm
import torch
from timm.models.convmixer import ConvMixer as TimmConvMixer
from torch import Tensor, nn

from ..errors import CheckpointError, first_line
from ..files import write_file
from ..hub.records import CONFIG_FILE
from ..model.convmixer import ACTIVATIONS, ConvMixer
from ..model.layouts import LAYOUTS, check_fit, convert_layout, detect_layout, find_networks
from ..model.parts import name_activation
from .files import check_finite, check_is_no_pointer, check_safetensors
from .resolve import Source, resolve

# What training programs keep beside the weights: their options, and figures as numpy has them.
_NUMPY = {"scalar": np.float64(0).__reduce__()[0], "_reconstruct": np.empty(0).__reduce__()[0]}
SAFE_GLOBALS: list[Any] = [
    argparse.Namespace,
    np.ndarray,
    np.dtype,
    *{type(np.dtype(code)) for code in np.typecodes["AllInteger"] + np.typecodes["AllFloat"] + "?"},
    *(
        (function, f"numpy.{core}.multiarray.{name}")  # `core` in files of numpy before 2
        for name, function in _NUMPY.items()
        for core in ("core", "_core")
    ),
]
# Where training programs keep the state dict in a file of theirs; like timm, averages first.
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model", "net")
# Options of timm's train.py that say how images are prepared.
PREPROCESSING = ("input_size", "img_size", "mean", "std", "crop_pct", "crop_mode", "interpolation")


@dataclass(frozen=True)
class Checkpoint:
    """A state dict as it stands in a file, and what is known of it.

    Attributes:
        source: The file.
        tensors: The state dict, in its own layout.
        layout: A key of `LAYOUTS`.
        model: A model of these sizes, on the meta device, with GELU.
        part: Where in the file the state dict is, such as `model_ema`; empty if it is all of it.
        arch: The architecture, if a name, a configuration, the file or its metadata tells it.
        activation: A key of `ACTIVATIONS`, if metadata or the architecture tells it.
        metadata: The metadata of a safetensors file.
        preprocessing: How images are prepared, as options of timm's train.py, if that is known.
    """

    source: Source
    tensors: dict[str, Tensor]
    layout: str
    model: ConvMixer
    part: str = ""
    arch: str | None = None
    activation: str | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    preprocessing: dict[str, Any] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """The number of parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters())


def read_checkpoint(name: str | Path) -> Checkpoint:
    """Read the weights of a trained model, a folder, a file or a repository, in any layout.

    Args:
        name: A trained model's name, a folder with `config.json` and `model.safetensors`, such a
            repository of the Hub (`hf-hub:OWNER/NAME[@REVISION]`, or without the prefix), or a
            file: safetensors, or of `torch.save`, which is opened with `weights_only=True`. A
            `Path` is always a path.

    Raises:
        UnknownModelError: If there is nothing of this name.
        CheckpointError: If there is no whole ConvMixer of any layout in it; the first tensor that
            is wrong is named.
    """
    # 1. The tensors of the one ConvMixer in the file, and where they were in it.
    source = resolve(name)
    file, config = source.file, source.config
    content: dict[str, Any] = {}
    part, metadata = "", {}
    if file.suffix == ".safetensors":
        metadata = check_safetensors(file)
        tensors = safetensors.torch.load_file(file)
    else:
        content = _unpickle(file)
        part, tensors = _unwrap(file, content)
    networks = find_networks(tensors)
    if len(networks) > 1:
        raise CheckpointError(
            f"{file}: holds several networks, {', '.join(networks)}; save the state dict of one"
        )
    [(prefix, tensors)] = networks.items()
    part = ".".join(filter(None, (part, prefix)))
    # 2. Architecture and activation, which no tensor tells.
    arch = config.get("architecture") or content.get("arch") or metadata.get("arch")
    arch = str(arch).partition(".")[0]
    network = _build_convmixer(arch)
    trained_with = content.get("args")  # timm's train.py keeps its options
    options = getattr(trained_with, "model_kwargs", None) or config.get("model_args") or {}
    activation = metadata.get("activation") or options.get("act_layer")
    if activation is None and network:
        activation = name_activation(network)
    if activation not in (None, *ACTIVATIONS):
        raise CheckpointError(
            f"{file}: is said to have the activation {activation!r}, which is none of "
            f"{', '.join(ACTIVATIONS)}; fix its metadata, or {CONFIG_FILE} beside it"
        )
    # 3. The check: every tensor of a ConvMixer of these sizes, and finite.
    layout = detect_layout(tensors)
    if layout is None:
        raise CheckpointError(
            f"{file}: tensor '{next(iter(tensors), '')}' is of no ConvMixer; "
            f"give a state dict in one of the layouts {', '.join(LAYOUTS)}"
        )
    converted = convert_layout(tensors)
    global_pool = metadata.get("global_pool") or getattr(trained_with, "gp", None)
    global_pool = global_pool or options.get("global_pool")
    try:
        model = _build_like(converted, str(file), global_pool)
    except (AssertionError, AttributeError):  # timm's
        raise CheckpointError(
            f"{file}: is said to have the pooling {global_pool!r}, which timm does not know; fix "
            f"its metadata, or {CONFIG_FILE} beside it"
        ) from None
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    check_fit(converted, shapes, str(file), tensors)
    check_finite(tensors, str(file))
    return Checkpoint(
        source,
        tensors,
        layout,
        model,
        part,
        arch if network else None,
        activation,
        metadata,
        _read_preprocessing(file, trained_with, metadata, config),
    )


def _read_preprocessing(
    file: Path, options: object, metadata: dict[str, str], config: dict[str, Any]
) -> dict[str, Any]:
    """Read how images are prepared: from the options of a training program, else from metadata.

    Else from `config`, that of the model, of which older ones of timm are flat.
    """
    given = {name: getattr(options, name, None) for name in PREPROCESSING}
    if isinstance(given["input_size"], int):  # as in DeiT's program
        given["img_size"], given["input_size"] = given["input_size"], None
    kinds = (int, float, str, list, tuple)
    configured = config.get("pretrained_cfg") or config
    known = {name: configured[name] for name in PREPROCESSING if name in configured}
    try:
        saved = dict(json.loads(metadata.get("preprocessing", "{}")))
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"{file}: the preprocessing in its metadata is no JSON object ({first_line(error)}); "
            "convert the checkpoint again"
        ) from None
    given = {name: value for name, value in given.items() if isinstance(value, kinds) and value}
    return known | saved | given


def _build_convmixer(arch: str) -> nn.Module | None:
    """Build the ConvMixer of this name, ours or timm's, on the meta device; None if it is none."""
    if not timm.is_model(arch):
        return None
    model = timm.create_model(arch, device="meta")
    return model if isinstance(model, (ConvMixer, TimmConvMixer)) else None


def _unpickle(file: Path) -> dict[str, Any]:
    check_is_no_pointer(file)
    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no error of its own
        raise CheckpointError(
            f"{file}: cannot be read with weights_only=True ({_find_reason(file, error)}); "
            "save the state dict alone with torch.save or safetensors.torch.save_file"
        ) from None
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{file}: holds a {type(content).__name__}, not a state dict; "
            "save the state dict of the model"
        )
    return dict(content)


def _find_reason(file: Path, error: Exception) -> str:
    """Name what a pickle holds beside tensors, rather than torch's general advice."""
    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            others = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception:  # it is no whole file
        others = []
    return f"it holds {', '.join(sorted(others))}" if others else first_line(error)


def _unwrap(file: Path, content: Mapping[str, Any]) -> tuple[str, dict[str, Tensor]]:
    """Find the state dict in what a training program saved, and tell where it was."""
    path = []
    for _ in WRAPPERS:  # no more: a dict may hold itself
        wrapper = next((w for w in WRAPPERS if isinstance(content.get(w), Mapping)), None)
        if wrapper is None:
            break
        path.append(wrapper)
        content = content[wrapper]
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{file}: '{key}' is a {type(value).__name__}, not a tensor with a name; "
                f"save the state dict alone, or under one of {', '.join(WRAPPERS)}"
            )
    return ".".join(path), dict(content)


def _build_like(
    state_dict: Mapping[str, Tensor], source: str, global_pool: str | None
) -> ConvMixer:
    """Build the model that a state dict in our layout is of, on the meta device, with GELU."""
    stem, kernel = "patch_emb.conv.weight", "conv_mixer_layers.0.depth_wise_conv.weight"
    head = state_dict.get("classification.linear.weight")
    dimensions = {stem: 4, kernel: 4}
    if head is not None:
        dimensions["classification.linear.weight"] = 2
    for key, count in dimensions.items():
        if key not in state_dict or state_dict[key].dim() != count or not state_dict[key].numel():
            raise CheckpointError(
                f"{source}: tensor '{key}' is missing, empty or has not {count} dimensions; "
                f"give a whole state dict in one of the layouts {', '.join(LAYOUTS)}"
            )
    d_model, in_chans, patch_size, _ = state_dict[stem].shape
    layers = {key.split(".")[1] for key in state_dict if key.startswith("conv_mixer_layers.")}
    doubled = head is not None and head.shape[-1] == 2 * d_model
    return ConvMixer(
        d_model,
        len(layers),
        kernel_size=state_dict[kernel].shape[-1],
        patch_size=patch_size,
        num_classes=0 if head is None else len(head),
        in_chans=in_chans,
        global_pool=global_pool or ("catavgmax" if doubled else "avg"),
        device="meta",
    )


def _choose_activation(checkpoint: Checkpoint, activation: str | None) -> str:
    """Return the activation of a checkpoint: no tensor tells it, and it is never guessed."""
    file = checkpoint.source.file
    if activation and checkpoint.activation and activation != checkpoint.activation:
        raise CheckpointError(
            f"{file}: was trained with {checkpoint.activation}, not {activation}; "
            "leave --activation out"
        )
    chosen = activation or checkpoint.activation
    if chosen is None:
        raise CheckpointError(
            f"{file}: nothing in it tells the activation; "
            f"give --activation {' or '.join(ACTIVATIONS)}"
        )
    return chosen


def convert(name: str, output: Path, layout: str, activation: str | None = None) -> Checkpoint:
    """Write the weights of any ConvMixer as a safetensors file in the layout wanted.

    The file's metadata says the activation, the layout and, where they are known, the architecture
    and how images are prepared.

    Args:
        name: As in `read_checkpoint`.
        output: The file to write, replaced whole or not at all.
        layout: A key of `LAYOUTS`.
        activation: A key of `ACTIVATIONS`; needed where nothing in the checkpoint tells it.

    Returns:
        What was written.

    Raises:
        UnknownModelError: If there is nothing of this name.
        CheckpointError: If the checkpoint is no whole ConvMixer, or its activation is not known.
        DataError: If the file cannot be written.
    """
    if output.suffix != ".safetensors":
        raise CheckpointError(
            f"{output}: is written as safetensors; give it a name in .safetensors"
        )
    checkpoint = read_checkpoint(name)
    metadata = {
        "format": "pt",
        "layout": layout,
        "activation": _choose_activation(checkpoint, activation),
    }
    if checkpoint.arch:
        metadata["arch"] = checkpoint.arch
    if checkpoint.preprocessing:
        metadata["preprocessing"] = json.dumps(checkpoint.preprocessing)
    if checkpoint.model.global_pool != "avg":
        metadata["global_pool"] = checkpoint.model.global_pool
    tensors = {
        key: tensor.clone(memory_format=torch.contiguous_format)
        for key, tensor in convert_layout(checkpoint.tensors, layout).items()
    }
    write_file(output, safetensors.torch.save(tensors, metadata))
    return replace(
        checkpoint,
        source=Source(output),
        tensors=tensors,
        layout=layout,
        activation=metadata["activation"],
        metadata=metadata,
    )
