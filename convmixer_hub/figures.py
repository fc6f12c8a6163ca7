"""The pictures of predictions and of model cards, each drawn by matplotlib and given as PNG.

Every function raises a DataError if matplotlib, an extra of this package, is not installed.
"""

from __future__ import annotations

import io
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from .errors import DataError
from .evaluate import Calibration
from .predict import Prediction

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILTERS_PER_ROW = 32
KERNELS_PER_LAYER = 24
# Fonts that have what DejaVu Sans, matplotlib's own, lacks: scripts of East Asia, for one.
WIDE_FONTS = "Noto Sans|CJK|Arial Unicode|WenQuanYi|YaHei|Malgun|Yu Gothic|PingFang|Hiragino|Nanum"
BLUE, ORANGE = "#3f72a6", "#d9772b"


def check_matplotlib() -> None:
    """Refuse before the work that is to be drawn, rather than after it."""
    if find_spec("matplotlib") is None:
        raise DataError("drawing needs matplotlib: pip install matplotlib")


def is_figure(file: Path) -> bool:
    """Return whether a file is a PNG of matplotlib, as all figures here are, or is empty."""
    try:
        with Image.open(file) as image:
            return str(image.info.get("Software")).startswith("Matplotlib")
    except Exception:  # each of Pillow's decoders fails in its own way
        return not os.path.getsize(file)


def draw_predictions(
    images: Sequence[Image.Image],
    titles: Sequence[str],
    predictions: Sequence[Sequence[Prediction]],
) -> bytes:
    """Draw images with bars for their most likely classes, as PNG.

    Args:
        images: RGB images.
        titles: One above each image.
        predictions: As `predict` gives them.
    """
    columns = min(5, len(images))
    rows = -(-len(images) // columns)
    figure = _new_figure(2.1 * columns, 3.0 * rows)
    axes = figure.subplots(2 * rows, columns, squeeze=False, height_ratios=[3, 1] * rows)
    for axis in axes.flat:
        axis.set_axis_off()
    for i, (image, title, classes) in enumerate(zip(images, titles, predictions)):
        picture = axes[2 * (i // columns), i % columns]
        picture.imshow(image, interpolation="nearest")
        picture.set_title(_shorten(title, 24), fontsize=10, parse_math=False)
        bars = axes[2 * (i // columns) + 1, i % columns]
        heights = range(len(classes))
        bars.barh(heights, [c.probability for c in classes], color="#9ecae1")
        for height, c in zip(heights, classes):
            text = f"{_shorten(c.label, 20)} {c.probability:.0%}"
            # Clipped, or the layout would take room for it from the picture.
            bars.text(0.02, height, text, va="center", fontsize=9, parse_math=False, clip_on=True)
        bars.set_xlim(0, 1)
        bars.invert_yaxis()
    return _to_png(figure)


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def draw_curve(metrics: Mapping[str, Sequence[float]]) -> bytes:
    """Draw loss and top-1 by epoch, from the columns of `metrics.csv`, as PNG."""
    figure = _new_figure(9, 3.2)
    left, right = figure.subplots(1, 2)
    style: dict[str, Any] = {"marker": "o", "markersize": 3.5}
    epochs = metrics["epoch"]
    left.plot(epochs, metrics["train_loss"], color=BLUE, **style)
    left.set_ylabel("training loss")
    right.plot(epochs, metrics["train_top1"], color=BLUE, label="training images", **style)
    if "held_out_top1" in metrics:
        right.plot(epochs, metrics["held_out_top1"], color=ORANGE, label="held-out images", **style)
    right.set_ylabel("top-1 (%)")
    right.legend(frameon=False)
    for axis in (left, right):
        axis.set_xlabel("epoch")
        axis.locator_params(axis="x", integer=True)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    return _to_png(figure)


def draw_confusion(confusion: Tensor, classes: Sequence[str]) -> bytes:
    """Draw the counts of `count_confusions`, as numbers too for up to 20 classes, as PNG."""
    side = min(2.5 + 0.4 * len(classes), 12.0)
    figure = _new_figure(side + 0.3, side)
    axis = figure.subplots()
    shares = confusion / confusion.sum(dim=1, keepdim=True).clamp(min=1)
    # The root makes rare mistakes visible beside the diagonal.
    axis.imshow(shares.sqrt().numpy(), cmap="Blues", vmin=0, vmax=1)
    if len(classes) <= 20:
        for (row, column), count in np.ndenumerate(confusion.numpy()):
            color = "white" if shares[row, column] > 0.3 else "black" if count else "#b0b0b0"
            axis.text(column, row, f"{count}", ha="center", va="center", fontsize=8, color=color)
    ticks = range(len(classes))
    turned: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    axis.set_xticks(ticks, classes, parse_math=False, **turned)
    axis.set_yticks(ticks, classes, parse_math=False)
    axis.tick_params(length=0, labelsize=min(9.0, 500 / len(classes)))
    axis.set_xlabel("top-1 prediction")
    axis.set_ylabel("label")
    axis.spines[:].set_visible(False)
    return _to_png(figure)


def draw_reliability(calibration: Calibration) -> bytes:
    """Draw accuracy by confidence, above a histogram of the confidences, as PNG."""
    figure = _new_figure(5.2, 5.2)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    bins = len(calibration.counts)
    middles = (np.arange(bins) + 0.5) / bins
    style: dict[str, Any] = {"width": 1 / bins, "color": BLUE, "edgecolor": "white"}
    upper.bar(middles, calibration.accuracy.numpy(), label="accuracy of a bin", **style)
    upper.plot([0, 1], [0, 1], "--", color=ORANGE, label="accuracy = confidence")
    upper.legend(frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))
    upper.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy")
    lower.bar(middles, (100 * calibration.counts / calibration.counts.sum()).numpy(), **style)
    lower.set(xlabel="confidence (probability of the top-1 prediction)", ylabel="images (%)")
    figure.suptitle(f"expected calibration error: {100 * calibration.error:.2f} %", fontsize=11)
    for axis in (upper, lower):
        axis.spines[["top", "right"]].set_visible(False)
    return _to_png(figure)


def draw_patch_embedding(weight: Tensor) -> bytes:
    """Draw the filters `[d_model, in_chans, patch, patch]`, in color if they have any, as PNG.

    Each is scaled by its own largest weight; 0 is mid-gray.
    """
    if weight.shape[1] != 3:
        weight = weight.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
    return _draw_tiles(0.5 + 0.5 * _scale_each(weight), min(FILTERS_PER_ROW, len(weight)), 28)


def draw_kernels(weights: Sequence[Tensor]) -> bytes:
    """Draw the first depthwise kernels `[d_model, 1, side, side]` of each layer, as PNG.

    Each is scaled by its own largest weight; blue is below 0, white 0, red above.
    """
    kernels = torch.cat([_scale_each(weight[:KERNELS_PER_LAYER]) for weight in weights])
    red, blue = (torch.tensor(c).view(3, 1, 1) for c in ([0.7, 0.05, 0.1], [0.05, 0.3, 0.7]))
    tiles = 1 - kernels.abs() * (1 - torch.where(kernels > 0, red, blue))
    names = [f"layer {i + 1}" for i in range(len(weights))]
    return _draw_tiles(tiles, len(tiles) // len(weights), 42, names)


def _scale_each(weight: Tensor) -> Tensor:
    """Bring each filter of `[count, channels, side, side]` to a largest absolute weight of 1."""
    return weight.cpu() / weight.cpu().abs().amax(dim=(1, 2, 3), keepdim=True).clamp(min=1e-12)


def _draw_tiles(tiles: Tensor, columns: int, pixels: int, row_names: Sequence[str] = ()) -> bytes:
    """Lay out RGB tiles `[count, 3, side, side]`, each about so many pixels wide, unblurred."""
    scale, gap, margin = max(1, pixels // tiles.shape[-1]), 4, 60 if row_names else 4
    tiles = tiles.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
    canvas = make_grid(tiles, columns, padding=gap, pad_value=1.0)[:, :, gap:]
    _, height, width = canvas.shape
    figure = _new_figure((margin + width) / 100, height / 100, layout=None)
    figure.figimage(canvas.permute(1, 2, 0).numpy(), margin, 0)
    for row, name in enumerate(row_names):
        y = 1 - (row + 0.5) / len(row_names)
        figure.text((margin - 8) / (margin + width), y, name, ha="right", va="center", fontsize=9)
    return _to_png(figure)


def _new_figure(width: float, height: float, layout: Any = "constrained") -> Figure:
    """Make a figure of so many inches, 100 pixels each."""
    check_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=100, layout=layout)


def _to_png(figure: Figure) -> bytes:
    from matplotlib.font_manager import get_font_names
    from matplotlib.text import Text

    fonts = [name for name in sorted(get_font_names()) if re.search(WIDE_FONTS, name)]
    for text in figure.findobj(Text):
        if not text.get_text().isascii():
            text.set_fontfamily(["sans-serif", *fonts])
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as that there is little room
        figure.savefig(content, format="png", dpi="figure")
    return content.getvalue()
