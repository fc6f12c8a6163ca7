"""Exports for runtimes other than torch, each of which is run before it is kept."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_input_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms

from ..checkpoints.resolve import resolve
from ..data.images import eval_transform
from ..data.reader import ImageDataset, LabeledImages, read_batches
from ..errors import CheckpointError, DataError, first_line
from ..evaluate import prepare_test_images
from ..files import hash_file, replacing
from ..model.config import check_classifies, get_config, get_label_names
from ..zoo import load_trained
from .golden import make_golden_input

FORMATS = ("onnx", "pt2")
METADATA_FILE = "metadata.json"  # in a .pt2 file
TOLERANCE = 1e-4  # of logits, as a share of the largest

Network = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Export:
    """A file that was exported.

    Attributes:
        file: The file.
        difference: The largest difference of a logit from torch's, as a share of the largest logit,
            before the quantization.
        top1: Top-1 on the test images in fp32 and with weights in int8, in percent; None without.
    """

    file: Path
    difference: float
    top1: tuple[float, float] | None = None


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
    int8: ImageDataset | None = None,
    largest_loss: float = 0.3,
) -> Export:
    """Export a trained model as one file, and compare what it answers with torch.

    The file takes batches of any size. With it come, as ONNX metadata or as `metadata.json` in the
    `.pt2`, the names of the classes and how to prepare images.

    Args:
        name: As in `zoo.load_trained`.
        output: The folder to write to; made if missing.
        format: One of `FORMATS`; `pt2` is for `torch.export.load` and AOTInductor.
        with_preprocessing: Take bytes `[batch, height, width, channels]` of images that have the
            model's size, instead of normalized floats `[batch, channels, height, width]`.
        int8: A dataset: store the weights in int8, a third of the size, and measure on the test
            images what that costs. Only for ONNX.
        largest_loss: How many points of top-1 it may cost.

    Returns:
        The export, `model.onnx`, `model_int8.onnx` or `model.pt2`.

    Raises:
        UnknownModelError: If there is no such model.
        CheckpointError: If the model cannot be loaded or exported, if the export answers something
            else, or a library is missing.
        DataError: If the file cannot be written, or the dataset does not serve.
    """
    if int8 and format != "onnx":
        raise CheckpointError(f"{name}: int8 is for ONNX alone; leave --int8 or --format out")
    if format == "onnx":
        _check_libraries()
    source = resolve(name)
    model = load_trained(source).eval()
    check_classifies(model)
    config = resolve_input_data_config(model)
    channels, height, width = config["input_size"]
    network: nn.Module = model
    images = make_golden_input(config["input_size"]).float()
    if with_preprocessing:
        network = _FromPixels(model, config["mean"], config["std"]).eval()
        images = (images * 64 + 125).byte().permute(0, 2, 3, 1)
    metadata = {
        "labels": get_label_names(model),
        "input_size": [channels, height, width],
        "interpolation": config["interpolation"],
        "crop_pct": config["crop_pct"],
        "mean": None if with_preprocessing else config["mean"],
        "std": None if with_preprocessing else config["std"],
        "architecture": get_config(model).get("architecture"),
        "sha256": hash_file(source.file),
    }
    file = output / f"model{'_int8' if int8 else ''}.{format}"
    try:
        output.mkdir(parents=True, exist_ok=True)
        with replacing(file) as temporary:
            with _quietly():
                if format == "pt2":
                    _write_pt2(network, images, metadata, temporary)
                else:
                    _write_onnx(network, images, metadata, temporary)
            run = (_open_pt2 if format == "pt2" else _open_onnx)(temporary)
            difference = _compare(network, run, images)
            if not difference <= TOLERANCE:
                raise CheckpointError(
                    f"{name}: exported as {format} it answers something else, by {difference:.0e} "
                    "of the largest logit; please report it, with the versions of torch and onnx"
                )
            top1 = None
            if int8:
                transform = eval_transform(config, normalize=not with_preprocessing)
                if with_preprocessing:
                    transform = transforms.Compose([transform, _put_channels_last])
                test = prepare_test_images(model, int8).seen_through(transform)
                in_fp32 = _measure(temporary, test)
                _quantize_weights(temporary)
                top1 = in_fp32, _measure(temporary, test)
                if top1[0] - top1[1] > largest_loss:
                    raise CheckpointError(
                        f"{name}: int8 has {top1[1]:.2f} % top-1, fp32 {top1[0]:.2f} %; "
                        "--max-loss allows more"
                    )
    except OSError as error:
        raise DataError(
            f"{file}: cannot be written ({first_line(error)}); make room, or name another --output"
        ) from None
    return Export(file, difference, top1)


def _check_libraries() -> None:
    for library in ("onnx", "onnxscript", "onnxruntime"):
        if find_spec(library) is None:
            raise CheckpointError(
                f"exporting to ONNX needs {library}: pip install onnx onnxscript onnxruntime"
            )


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep what exporters say of themselves from a user who cannot act on it."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def _write_onnx(network: nn.Module, images: Tensor, metadata: dict[str, Any], file: Path) -> None:
    program = torch.onnx.export(
        network,
        (images,),
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    for name, value in metadata.items():
        text = value if isinstance(value, str) else json.dumps(value)
        program.model.metadata_props[name] = text
    for node in program.model.graph:
        node.metadata_props.clear()  # such as stack traces, with the paths of this machine
    program.save(str(file), external_data=False)


def _write_pt2(network: nn.Module, images: Tensor, metadata: dict[str, Any], file: Path) -> None:
    program = torch.export.export(
        network, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # with the paths of this machine
    torch.export.save(program, file, extra_files={METADATA_FILE: json.dumps(metadata)})


def _open_onnx(file: Path) -> Network:
    import onnxruntime

    session = onnxruntime.InferenceSession(file.read_bytes())
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _open_pt2(file: Path) -> Network:
    network: Network = torch.export.load(file).module()
    return network


@torch.inference_mode()
def _compare(network: nn.Module, exported: Network, images: Tensor) -> float:
    """Give the largest difference of a logit, for one image and for several."""
    differences = []
    for batch in (images, images[:1]):
        expected = network(batch)
        differences.append((exported(batch) - expected).abs().max() / expected.abs().max())
    return torch.stack(differences).max().item()


def _put_channels_last(pixels: Tensor) -> Tensor:
    return pixels.permute(1, 2, 0)


def _measure(file: Path, images: LabeledImages) -> float:
    """Give the top-1 of an ONNX file on images, in percent."""
    run = _open_onnx(file)
    correct = 0
    for batch, labels in read_batches(DataLoader(images, batch_size=64)):
        correct += int((run(batch).argmax(dim=1) == labels).sum())
    return 100.0 * correct / len(images)


def _quantize_weights(file: Path) -> None:
    """Store the weights of an ONNX file in int8, each channel with a scale of its own, in place.

    Runtimes turn them into floats when they load the file (for a DequantizeLinear, which has the
    same result, onnxruntime does so at each call). Products in int8 would not be faster here, with
    GELU and BatchNorm in floats between them, and cost several tenths of a point of top-1.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(file)
    graph = model.graph
    weights = {node.input[1] for node in graph.node if node.op_type in ("Conv", "Gemm")}
    for initializer in [i for i in graph.initializer if i.name in weights]:
        name, values = initializer.name, numpy_helper.to_array(initializer)  # [out, in, …]
        scale = abs(values).max(axis=tuple(range(1, values.ndim)), keepdims=True).clip(1e-12) / 127
        graph.initializer.remove(initializer)
        graph.initializer.extend(
            [
                numpy_helper.from_array((values / scale).round().astype("int8"), f"{name}_int8"),
                numpy_helper.from_array(scale, f"{name}_scale"),
            ]
        )
        cast = helper.make_node("Cast", [f"{name}_int8"], [f"{name}_cast"], to=TensorProto.FLOAT)
        scaled = helper.make_node("Mul", [f"{name}_cast", f"{name}_scale"], [name])
        graph.node.insert(0, scaled)
        graph.node.insert(0, cast)
    onnx.save(model, file)
