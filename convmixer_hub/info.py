"""What a checkpoint holds, and what it can be loaded as."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import timm

from .checkpoint import get_record
from .convert import Checkpoint, build_like, read_checkpoint
from .errors import UnknownModelError
from .layouts import convert_layout
from .model import ConvMixer, name_activation
from .zoo import get_config, load_trained


def describe(name: str) -> dict[str, str]:
    """Describe a checkpoint, one fact a line.

    Args:
        name: A trained model's name, a folder, or a safetensors file of any layout.

    Raises:
        UnknownModelError: If there is nothing of this name.
        CheckpointError: If there is no whole ConvMixer in it, or the folder's does not load.
    """
    checkpoint = read_checkpoint(name)
    content = checkpoint.file.read_bytes()
    like = build_like(convert_layout(checkpoint.tensors), name)
    dtypes = Counter(str(t.dtype).removeprefix("torch.") for t in checkpoint.tensors.values())
    return {
        "file": str(checkpoint.file),
        "bytes": f"{len(content):,}",
        "sha256": hashlib.sha256(content).hexdigest(),
        "layout": checkpoint.layout,
        "size": f"{len(like.conv_mixer_layers)} layers × {like.num_features} channels, "
        f"kernel {like.kernel_size}, patch {like.patch_emb.patch_size}, "
        f"{like.in_chans} image channels, {like.num_classes} classes",
        "arch": checkpoint.arch or "not told",
        "activation": checkpoint.activation or "not told, and no tensor would tell it",
        "tensors": ", ".join(f"{count} {dtype}" for dtype, count in dtypes.most_common()),
        "parameters": f"{checkpoint.parameters:,}",
        "metadata": ", ".join(f"{k}={v}" for k, v in sorted(checkpoint.metadata.items())) or "none",
        "loads by": _find_load(name, checkpoint, like),
    }


def _find_load(name: str, checkpoint: Checkpoint, like: ConvMixer) -> str:
    """Write the call that loads a checkpoint with nothing adapted and nothing left out."""
    try:
        known = get_record(name).name
    except UnknownModelError:
        known = f"local-dir:{name}" if Path(name).is_dir() else ""
    if known:
        load_trained(name)
        return f"timm.create_model({known!r}, pretrained=True)"
    file = str(checkpoint.file)
    shapes = {key: tensor.shape for key, tensor in like.state_dict().items()}
    for arch in timm.list_models("convmixer_*"):
        model = timm.create_model(
            arch,
            num_classes=like.num_classes,
            in_chans=like.in_chans,
            global_pool=like.global_pool,
            device="meta",
        )
        own = model.state_dict()
        if {key: tensor.shape for key, tensor in convert_layout(own).items()} != shapes:
            continue
        changes = ""
        if checkpoint.activation not in (None, name_activation(model)):
            if not isinstance(model, ConvMixer):
                continue
            changes = f", act_layer='{checkpoint.activation}'"
        if not isinstance(model, ConvMixer) and own.keys() != checkpoint.tensors.keys():
            return f"convmixer convert {name} OUT.safetensors --layout timm, as {arch} of timm"
        cfg = get_config(model)
        if like.num_classes != cfg["num_classes"]:
            changes += f", num_classes={like.num_classes}"
        if like.in_chans != cfg["input_size"][0]:
            changes += f", in_chans={like.in_chans}"
        if like.global_pool != "avg":
            changes += f", global_pool='{like.global_pool}'"
        return f"timm.create_model('{arch}'{changes}, checkpoint_path={file!r})"
    activation = f", act_layer='{checkpoint.activation}'" if checkpoint.activation else ""
    return (
        f"model = ConvMixer({like.num_features}, {len(like.conv_mixer_layers)}, "
        f"{like.kernel_size}, {like.patch_emb.patch_size}, {like.num_classes}, {like.in_chans}, "
        f"'{like.global_pool}'{activation}); "
        f"model.load_state_dict(safetensors.torch.load_file({file!r}))"
    )
