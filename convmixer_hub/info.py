"""What a checkpoint holds, and what it can be loaded as."""

from __future__ import annotations

import hashlib
from collections import Counter

import timm
from torch import nn

from .convert import Checkpoint, build_like, read_checkpoint
from .layouts import OURS, convert_layout
from .model import ACTIVATIONS, ConvMixer, name_activation
from .zoo import get_config, load_trained


def describe(name: str) -> dict[str, str]:
    """Describe a checkpoint, one fact a line.

    Args:
        name: As in `read_checkpoint`.

    Raises:
        UnknownModelError: If there is nothing of this name.
        CheckpointError: If it cannot be had, is no whole ConvMixer, or would be refused when it is
            loaded by this name.
    """
    checkpoint = read_checkpoint(name)
    file, record = checkpoint.source.file, checkpoint.source.record
    sha256 = record.sha256 if record else hashlib.sha256(file.read_bytes()).hexdigest()
    like = build_like(convert_layout(checkpoint.tensors), name)
    dtypes = Counter(str(t.dtype).removeprefix("torch.") for t in checkpoint.tensors.values())
    call, model = _find_load(name, checkpoint, like)
    return {
        "file": f"{file} ({checkpoint.part} of it)" if checkpoint.part else str(file),
        "bytes": f"{file.stat().st_size:,}",
        "sha256": f"{sha256}, {'as' if record else 'not'} on record",
        "layout": checkpoint.layout,
        "size": f"{len(like.conv_mixer_layers)} layers × {like.num_features} channels, "
        f"kernel {like.kernel_size}, patch {like.patch_emb.patch_size}, "
        f"{like.in_chans} image channels, {like.num_classes} classes",
        "arch": checkpoint.arch or "not told",
        "activation": checkpoint.activation or "not told, and no tensor would tell it",
        "tensors": ", ".join(f"{count} {dtype}" for dtype, count in dtypes.most_common()),
        "parameters": f"{checkpoint.parameters:,}",
        "metadata": ", ".join(f"{k}={v}" for k, v in sorted(checkpoint.metadata.items())) or "none",
        "loads by": call,
        "on load": _describe_changes(checkpoint, model),
    }


def _find_load(name: str, checkpoint: Checkpoint, like: ConvMixer) -> tuple[str, nn.Module | None]:
    """Write the call that loads a checkpoint with nothing adapted and nothing left out.

    Also give the model that it makes, perhaps on the meta device; None if it makes another file.
    """
    source = checkpoint.source
    if source.record:  # verified a moment ago: given as a file, it is not read for that again
        overlay = {"file": str(source.file)}
        model: nn.Module = timm.create_model(
            source.record.name, pretrained=True, pretrained_cfg_overlay=overlay
        )
        return f"timm.create_model({source.name!r}, pretrained=True)", model
    if source.name:
        model = load_trained(source.file.parent)
        return f"timm.create_model({source.name!r}, pretrained=True)", model
    if source.file.suffix != ".safetensors":
        activation = "" if checkpoint.activation else f" --activation {'|'.join(ACTIVATIONS)}"
        return f"convmixer convert {name} OUT.safetensors --layout {OURS}{activation}", None
    file = str(source.file)
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
            call = f"convmixer convert {name} OUT.safetensors --layout timm, as {arch} of timm"
            return call, None
        cfg = get_config(model)
        if like.num_classes != cfg["num_classes"]:
            changes += f", num_classes={like.num_classes}"
        if like.in_chans != cfg["input_size"][0]:
            changes += f", in_chans={like.in_chans}"
        if like.global_pool != "avg":
            changes += f", global_pool='{like.global_pool}'"
        return f"timm.create_model('{arch}'{changes}, checkpoint_path={file!r})", model
    activation = f", act_layer='{checkpoint.activation}'" if checkpoint.activation else ""
    return (
        f"model = ConvMixer({like.num_features}, {len(like.conv_mixer_layers)}, "
        f"{like.kernel_size}, {like.patch_emb.patch_size}, {like.num_classes}, {like.in_chans}, "
        f"'{like.global_pool}'{activation}); "
        f"model.load_state_dict(safetensors.torch.load_file({file!r}))"
    ), like


def _describe_changes(checkpoint: Checkpoint, model: nn.Module | None) -> str:
    """Say in what a loaded model differs from the checkpoint."""
    if model is None:
        return "every tensor as it was converted"
    changes = []
    if isinstance(model, ConvMixer) and checkpoint.layout != OURS:
        changes.append(f"keys renamed from layout {checkpoint.layout}")
    dtypes = {str(t.dtype) for t in checkpoint.tensors.values() if t.is_floating_point()}
    if others := sorted(dtypes - {"torch.float32"}):
        changes.append(f"{', '.join(others)} turned into torch.float32")
    return "; ".join(changes) or "every tensor as it is"
