"""Exports for runtimes other than torch, each of which is run before it is kept."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_input_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms
from tqdm import tqdm

from ..checkpoints.resolve import resolve
from ..checkpoints.runtimes import (
    check_onnx_libraries,
    open_onnx,
    open_pt2,
    store_weights_in_int8,
    write_onnx,
    write_pt2,
)
from ..data.images import eval_transform
from ..data.reader import ImageDataset, LabeledImages
from ..errors import CheckpointError, first_line
from ..evaluate import prepare_test_images
from ..files import hash_file, replacing, writing
from ..hub.records import GOLDEN_FILE, WEIGHTS_FILE
from ..load import load_trained
from ..model.config import check_classifies, get_config, get_label_names
from .golden import TOLERANCE as GOLDEN_TOLERANCE
from .golden import find_golden, make_golden_input, verify

# By format: how a network is written, and opened.
RUNTIMES = {"onnx": (write_onnx, open_onnx), "pt2": (write_pt2, open_pt2)}
TOLERANCE = 1e-4  # of logits, as a share of the largest


@dataclass(frozen=True)
class Export:
    """A file that was exported.

    Attributes:
        file: The file.
        difference: The largest difference of a logit from torch's, as a share of the largest logit,
            before weights are stored in int8.
        verified: Whether torch's logits were compared with the reference logits, `golden.json`,
            which not every folder has.
        top1: Top-1 in fp32 and with weights in int8, in percent; None without.
        images: What that was measured on, in words.
    """

    file: Path
    difference: float
    verified: bool
    top1: tuple[float, float] | None = None
    images: str = ""


class _FromPixels(nn.Module):
    """A model that takes the pixels of images, as Pillow and numpy have them."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map bytes `[batch, height, width, channels]` to logits `[batch, num_classes]`."""
        return self.model((x.permute(0, 3, 1, 2) / 255.0 - self.mean) / self.std)


def export(
    name: str | Path,
    output: Path,
    format: str = "onnx",
    with_preprocessing: bool = False,
    int8_dataset: ImageDataset | None = None,
    max_loss: float = 0.3,
) -> Export:
    """Export a trained model as one file, and compare its logits with torch's.

    Before that, torch's logits are compared with the reference logits of the model, if it has any.

    The file takes batches of any size. With it come, as ONNX metadata or as `metadata.json` in the
    `.pt2`, the names of the classes and how to prepare images.

    Args:
        name: As in `load.load_trained`.
        output: The folder to write to; made if missing.
        format: A key of `RUNTIMES`; `pt2` is for `torch.export.load` and AOTInductor.
        with_preprocessing: Take bytes `[batch, height, width, channels]` of images that have the
            model's size, instead of normalized floats `[batch, channels, height, width]`.
        int8_dataset: If given, store the weights in int8, a third of the size, and measure on its
            test images what that costs. Only for ONNX.
        max_loss: How many percentage points of top-1 that may cost.

    Returns:
        The export, `model.onnx`, `model_int8.onnx` or `model.pt2`.

    Raises:
        UnknownModelError: If there is no such model.
        CheckpointError: If the model cannot be loaded or exported, if torch or the export computes
            other logits, or a library is missing.
        DataError: If the file cannot be written, or the dataset does not serve.
    """
    if int8_dataset and format != "onnx":
        raise CheckpointError(f"{name}: int8 is only for ONNX; leave --int8 or --format out")
    if format == "onnx":
        check_onnx_libraries()
    source = resolve(name)
    model = load_trained(source).eval()
    check_classifies(model)
    # Beside a file of another name there may be the reference logits of other weights.
    verified = source.file.name == WEIGHTS_FILE and os.path.exists(find_golden(source))
    if verified and not verify(source) <= GOLDEN_TOLERANCE:
        raise CheckpointError(
            f"{name}: its logits do not match {GOLDEN_FILE}, so it was not exported; try another "
            "version of torch, and report it"
        )
    config = resolve_input_data_config(model)
    metadata = _describe(model, with_preprocessing) | {"sha256": hash_file(source.file)}
    network: nn.Module = model
    images = make_golden_input(config["input_size"]).float()
    if with_preprocessing:
        network = _FromPixels(model, config["mean"], config["std"]).eval()
        images = (images * 64 + 125).byte().permute(0, 2, 3, 1)
    test = None
    if int8_dataset:
        transform = eval_transform(config, normalize=not with_preprocessing)
        if with_preprocessing:
            transform = transforms.Compose([transform, lambda pixels: pixels.permute(1, 2, 0)])
        test = replace(prepare_test_images(model, int8_dataset), transform=transform)
    file = output / f"model{'_int8' if int8_dataset else ''}.{format}"
    with writing(file):
        output.mkdir(parents=True, exist_ok=True)
        with replacing(file) as temporary:
            difference = _write(name, network, images, metadata, format, temporary)
            if not difference <= TOLERANCE:
                raise CheckpointError(
                    f"{name}: exported as {format}, its logits differ from torch's by "
                    f"{difference:.0e} of the largest; please report it, with the versions of "
                    "torch and onnx"
                )
            if test is None:
                return Export(file, difference, verified)
            in_fp32 = _measure(temporary, test)
            store_weights_in_int8(temporary)
            in_int8 = _measure(temporary, test)
            if in_fp32 - in_int8 > max_loss + 1e-9:
                raise CheckpointError(
                    f"{name}: int8 lowers the top-1 from {in_fp32:.2f} to {in_int8:.2f} %; give a "
                    "larger --max-loss, or leave --int8 out"
                )
    assert int8_dataset is not None
    split = f"{len(test)} {int8_dataset.test_split} images"
    return Export(file, difference, verified, (in_fp32, in_int8), split)


def _describe(model: nn.Module, with_preprocessing: bool) -> dict[str, Any]:
    """Say what a program needs to know to use the export."""
    config = resolve_input_data_config(model)
    pixels = "uint8 [batch, height, width, channels]"
    floats = "normalized float32 [batch, channels, height, width]"
    return {
        "input": pixels if with_preprocessing else floats,
        "labels": get_label_names(model),
        "input_size": list(config["input_size"]),
        "interpolation": config["interpolation"],
        "crop_pct": config["crop_pct"],
        "crop_mode": config["crop_mode"],
        "mean": None if with_preprocessing else config["mean"],
        "std": None if with_preprocessing else config["std"],
        "architecture": get_config(model).get("architecture"),
    }


def _write(
    name: str | Path,
    network: nn.Module,
    images: Tensor,
    metadata: dict[str, Any],
    format: str,
    file: Path,
) -> float:
    """Write a file; give the largest difference of a logit, for several images and for one."""
    write, reopen = RUNTIMES[format]
    differences = []
    try:
        write(network, images, metadata, file)
        exported = reopen(file)
        with torch.inference_mode():
            for batch in (images, images[:1]):
                expected = network(batch)
                differences.append((exported(batch) - expected).abs().max() / expected.abs().max())
    except OSError:
        raise
    except Exception as error:  # of exporters and runtimes, each has its own
        raise CheckpointError(
            f"{name}: cannot be exported as {format} ({first_line(error)}); try another --format, "
            "or newer versions of torch, onnx, onnxscript and onnxruntime"
        ) from None
    return torch.stack(differences).max().item()


def _measure(file: Path, images: LabeledImages) -> float:
    """Return the top-1 of an ONNX file on images, in percent."""
    run = open_onnx(file)
    correct = 0
    loader = DataLoader(images, batch_size=64)
    for batch, labels in tqdm(loader, "evaluate", leave=False, disable=None):
        correct += int((run(batch).argmax(dim=1) == labels).sum())
    return 100.0 * correct / len(images)
