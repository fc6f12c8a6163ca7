"""A page in the browser on which to try trained models."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from timm.data import resolve_input_data_config
from torch import nn
from torchvision.transforms.functional import to_pil_image

from ..checkpoints.resolve import resolve
from ..data.images import eval_transform, open_image
from ..errors import DataError
from ..load import load_trained
from ..model.config import check_classifies, get_label_names
from ..predict import predict

if TYPE_CHECKING:
    import gradio

TOP_K = 5
HEIGHT = 320  # of a picture on the page, in pixels
SHOWN_SIDE = 256  # of what the model sees


@cache
def _load(name: str) -> nn.Module:
    model = load_trained(name).eval()
    check_classifies(model)
    return model


def _describe(name: str) -> str:
    """Say what a model is, in Markdown."""
    record, model = resolve(name).record, _load(name)
    classes = get_label_names(model)
    text = f"**{name}** tells {model.num_classes} classes apart"
    text += f": {', '.join(classes)}." if classes else "."
    if record:
        text += (
            f" Top-1 {record.top1:.2f} %, expected calibration error {record.ece:.2f} %, on the "
            f"test images of {record.dataset.name}."
        )
    return text


def _answer(name: str, file: str | None) -> tuple[dict[str, float] | None, Any]:
    """Classify an image file; also give what the model sees of it."""
    import gradio

    if file is None:
        return None, None
    model = _load(name)
    try:
        image = open_image(file, Path(file).name)
        [predictions] = predict(model, [image], TOP_K)
        pixels = eval_transform(resolve_input_data_config(model), normalize=False)(image)
    except DataError as error:
        raise gradio.Error(str(error), print_exception=False) from None
    seen = to_pil_image(pixels)
    scale = SHOWN_SIDE / max(seen.size)
    size = (round(seen.width * scale), round(seen.height * scale))
    seen = seen.resize(size, Image.Resampling.NEAREST)
    return {p.label: p.probability for p in predictions}, seen


def find_examples() -> list[Path]:
    """Find the ten pictures that come with the package, or are in the clone."""
    package = Path(__file__).parents[1]
    folders = package / "examples", package.parent / "tests" / "images"
    return sorted(file for folder in folders for file in folder.glob("*.png"))


def build_demo(names: Sequence[str]) -> gradio.Blocks:
    """Build a gradio page that asks no address outside the machine.

    Args:
        names: Models to choose from, as in `load_trained`; the first is loaded at once.

    Raises:
        DataError: If gradio is not installed.
        UnknownModelError: If the first model does not exist.
        CheckpointError: If it cannot be loaded.
    """
    if find_spec("gradio") is None:
        raise DataError("the demo needs gradio: pip install gradio")
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    import gradio

    description = _describe(names[0])
    with gradio.Blocks(title="ConvMixer", analytics_enabled=False) as page:
        gradio.Markdown("# ConvMixer\nDrop, paste or choose a picture.")
        name = gradio.Dropdown(list(names), value=names[0], label="Model", visible=len(names) > 1)
        with gradio.Row():
            picture = gradio.Image(
                type="filepath",
                image_mode=None,
                sources=["upload", "clipboard"],
                label="Picture",
                height=HEIGHT,
            )
            seen = gradio.Image(
                interactive=False, label="What the model sees", height=HEIGHT, buttons=["download"]
            )
            label = gradio.Label(num_top_classes=TOP_K, label="Prediction")
        gradio.Examples([str(file) for file in find_examples()], picture)
        about = gradio.Markdown(description)
        name.change(_describe, name, about)
        for event in (picture.change, name.change):
            event(_answer, [name, picture], [label, seen])
    return page


def run_demo(names: Sequence[str], port: int) -> None:
    """Serve the page to this machine alone, until Ctrl-C.

    Raises:
        DataError: If the port is in use, or as in `build_demo`.
    """
    page = build_demo(names)
    import gradio

    theme = gradio.themes.Default(font="sans-serif", font_mono="monospace")  # none from elsewhere
    try:
        page.launch(
            theme=theme, server_name="127.0.0.1", server_port=port, share=False, show_error=True
        )
    except OSError:
        raise DataError(f"port {port} is in use; give another --port") from None
