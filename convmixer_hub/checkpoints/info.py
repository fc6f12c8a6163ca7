"""What a checkpoint holds."""

from __future__ import annotations

from collections import Counter

from ..files import hash_file
from ..hub.records import RECORDS
from .convert import read_checkpoint


def describe(name: str) -> dict[str, str]:
    """Describe a checkpoint, one fact per line.

    Args:
        name: As in `read_checkpoint`.

    Raises:
        UnknownModelError: If there is nothing of this name.
        CheckpointError: If it cannot be found or downloaded, or is no whole ConvMixer.
    """
    checkpoint = read_checkpoint(name)
    file = checkpoint.source.file
    verified = checkpoint.source.record
    sha256 = verified.sha256 if verified else hash_file(file)
    recorded = [record.name for record in RECORDS.values() if record.sha256 == sha256]
    model = checkpoint.model
    dtypes = Counter(str(t.dtype).removeprefix("torch.") for t in checkpoint.tensors.values())
    return {
        "file": f"{file} ({checkpoint.part} of it)" if checkpoint.part else str(file),
        "bytes": f"{file.stat().st_size:,}",
        "sha256": f"{sha256}, {f'on record for {recorded[0]}' if recorded else 'not on record'}",
        "layout": checkpoint.layout,
        "size": f"{len(model.conv_mixer_layers)} layers × {model.num_features} channels, "
        f"kernel {model.kernel_size}, patch {model.patch_emb.patch_size}, "
        f"{model.in_chans} image channels, {model.num_classes} classes",
        "arch": checkpoint.arch or "not told",
        "activation": checkpoint.activation or "not told, and no tensor would tell it",
        "tensors": ", ".join(f"{count} {dtype}" for dtype, count in dtypes.most_common()),
        "parameters": f"{checkpoint.parameters:,}",
        "metadata": ", ".join(f"{k}={v}" for k, v in sorted(checkpoint.metadata.items())) or "none",
    }
