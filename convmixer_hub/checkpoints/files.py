"""Files of weights in the safetensors format: checking them, and saving a model as timm does."""

from __future__ import annotations

import json
import os
import shlex
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from timm.models import save_for_hf
from torch import Tensor, nn

from ..errors import CheckpointError, first_line
from ..files import replacing
from ..hub.records import CONFIG_FILE, MODEL_FILES, WEIGHTS_FILE
from ..model.config import get_label_names
from ..model.convmixer import ConvMixer
from ..model.parts import name_activation

POINTER = b"version https://git-lfs."
PICKLE_FILE = "pytorch_model.bin"  # of older versions of transformers


def read_model_files(folder: Path) -> dict[str, bytes]:
    """Read the `MODEL_FILES` of a folder, each once, by name.

    Raises:
        CheckpointError: If one cannot be read.
    """
    try:
        files = [f for f in sorted(folder.iterdir()) if f.name in MODEL_FILES and f.is_file()]
        return {file.name: file.read_bytes() for file in files}
    except OSError as error:
        raise CheckpointError(
            f"{folder}: cannot be read whole ({first_line(error)}); make all in it readable to you"
        ) from None


def check_safetensors(path: Path) -> dict[str, str]:
    """Refuse a file that is not in the safetensors format; a pickle is never opened.

    Returns:
        The metadata of the file.

    Raises:
        CheckpointError: With the fault and the remedy.
    """
    check_is_no_pointer(path)
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except FileNotFoundError:  # safetensors' answer to a lack of permission, too
        reason, remedy = "no such file", "check the path"
        if os.path.exists(path):
            reason, remedy = "may not be read", "change its permissions"
        elif os.path.exists(pickle := path.with_name(PICKLE_FILE)):
            reason = f"no such file, but {PICKLE_FILE} beside it"
            paths = shlex.join(map(str, [pickle, path]))
            remedy = f"convert that: convmixer convert {paths} --layout ours"
    except (SafetensorError, OSError) as error:
        reason = f"not a whole safetensors file ({first_line(error)})"
        remedy = "copy it again; pickles are not opened, `convmixer convert` rewrites them"
    raise CheckpointError(f"{path}: {reason}; {remedy}")


def check_is_no_pointer(path: Path) -> None:
    """Refuse what Git leaves in place of a large file if git-lfs is not there.

    Raises:
        CheckpointError: With the remedy.
    """
    try:
        with path.open("rb") as file:
            start = file.read(len(POINTER))
    except OSError:  # reported by whoever reads the file
        return
    if start == POINTER:
        raise CheckpointError(
            f"{path}: is a Git LFS pointer, not the file itself; run git lfs pull where it is from"
        )


def check_finite(state_dict: Mapping[str, Tensor], source: str) -> None:
    """Refuse a state dict with a tensor that holds anything but numbers.

    Args:
        state_dict: What is about to be loaded.
        source: Where the state dict comes from, for the message.

    Raises:
        CheckpointError: Naming the first such tensor, and the remedy.
    """
    for key, tensor in state_dict.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"{source}: tensor {key!r} holds NaN or infinite numbers; "
                "use another copy, or a checkpoint of an earlier epoch"
            )


def save_model(model: nn.Module, folder: Path, extra_config: Mapping[str, Any]) -> None:
    """Write `config.json` and `model.safetensors` as timm and the Hub read them.

    Each file is replaced whole or not at all.

    Args:
        model: A model made by `timm.create_model`.
        folder: Where the two files go; made if missing.
        extra_config: Entries added to `config.json`.
    """
    # What a model was made with comes from timm, but for what is no JSON: classes, arrays.
    arguments: dict[str, Any] = {"label_names": None}
    if isinstance(model, ConvMixer) and (activation := name_activation(model)):
        arguments["act_layer"] = activation
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as temporary:
        save_for_hf(
            model,
            temporary,
            model_config={"label_names": get_label_names(model), **extra_config},
            model_args=arguments,
            safe_serialization=True,
        )
        _correct_config(Path(temporary, CONFIG_FILE))
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            with replacing(folder / name) as file:
                # Copied, as safetensors makes its files readable only to their owner.
                file.write_bytes(Path(temporary, name).read_bytes())


def _correct_config(file: Path) -> None:
    """Leave out what timm writes but is wrong here.

    transformers fails where `model_args` repeats what the classes are, and the tag is that of the
    weights that the model began with.
    """
    config = json.loads(file.read_text(encoding="utf-8"))
    config["pretrained_cfg"].pop("tag", None)
    for name in ("num_classes", "label_names"):
        config.get("model_args", {}).pop(name, None)
    file.write_text(json.dumps(config, indent=2), encoding="utf-8")
