"""A page in the browser on which to try trained models."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from packaging.version import Version
from PIL import Image
from timm.data import resolve_input_data_config
from torch import nn
from torchvision.transforms.functional import to_pil_image

from ..checkpoints.resolve import resolve
from ..data.images import eval_transform, open_image
from ..errors import ConvMixerHubError, DataError, first_line
from ..hub.records import CARD_FILE
from ..load import load_trained
from ..model.config import check_classifies, get_label_names
from ..predict import predict

if TYPE_CHECKING:
    import gradio

TOP_K = 5
HEIGHT = 320  # of a picture on the page, in pixels
SHOWN_SIDE = 256  # of what the model sees


def find_examples() -> list[Path]:
    """Find the ten pictures that come with the package, or are in the clone."""
    package = Path(__file__).parents[1]
    folders = package / "examples", package.parent / "tests" / "images"
    return next((sorted(f.glob("*.png")) for f in folders if f.is_dir()), [])


@dataclass(frozen=True)
class _Choice:
    """A model on the page."""

    model: nn.Module
    description: str  # Markdown, as the card
    card: str  # empty if there is none

    def classify(self, file: str) -> tuple[dict[str, float], Image.Image]:
        """Return the most likely classes of an image file, and what the model sees of it."""
        image = open_image(file, Path(file).name)
        [predictions] = predict(self.model, [image], TOP_K)
        config = resolve_input_data_config(self.model)
        seen = to_pil_image(eval_transform(config, normalize=False)(image))
        scale = SHOWN_SIDE / max(seen.size)
        size = (round(seen.width * scale), round(seen.height * scale))
        probabilities = {p.label: p.probability for p in predictions}
        return probabilities, seen.resize(size, Image.Resampling.NEAREST)


def _load(name: str) -> _Choice:
    source = resolve(name)
    model = load_trained(source).eval()
    check_classifies(model)
    classes, record = get_label_names(model), source.record
    text = f"**{name}** has {model.num_classes} classes"
    text += f": {', '.join(classes)}." if classes else "."
    if record:
        text += (
            f" Top-1 {record.top1:.2f} %, expected calibration error {record.ece:.2f} %, on the "
            f"test images of {record.dataset.name}."
        )
    file = source.file.with_name(CARD_FILE)
    is_whole = source.name or source.config  # beside weights alone may be anything
    return _Choice(model, text, _read_card(file) if is_whole and file.is_file() else "")


def _read_card(file: Path) -> str:
    """Return the text of a model card, without pictures and without links to files beside it."""
    text = file.read_text(encoding="utf-8", errors="replace")
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)  # metadata
    text = re.sub(r"!\[[^]]*\]\([^)]*\)\s*(\*.*\*)?", "", text)
    return re.sub(r"\[([^]]+)\]\((?!https?:)[^)]*\)", r"\1", text)


def _build(choices: dict[str, _Choice]) -> gradio.Blocks:
    import gradio

    def answer(name: str, file: str | None) -> tuple[dict[str, float] | None, Image.Image | None]:
        if file is None:
            return None, None
        try:
            return choices[name].classify(file)
        except DataError as error:
            raise gradio.Error(str(error), print_exception=False) from None

    first = next(iter(choices))
    with gradio.Blocks(title="ConvMixer", analytics_enabled=False) as page:
        gradio.Markdown("# ConvMixer\nDrop, paste or choose a picture.")
        name = gradio.Dropdown(list(choices), value=first, label="Model", visible=len(choices) > 1)
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
        about = gradio.Markdown(choices[first].description)
        with gradio.Accordion("Model card", open=False):
            card = gradio.Markdown(choices[first].card)
        name.change(
            lambda name: (choices[name].description, choices[name].card), name, [about, card]
        )
        for event in (picture.change, name.change):
            event(answer, [name, picture], [label, seen])
    return page


def check_gradio() -> str:
    """Return the version of gradio.

    Raises:
        ConvMixerHubError: If gradio 6 is not installed.
    """
    with suppress(PackageNotFoundError):
        found = version("gradio")
        if Version(found).major >= 6:
            return found
    raise ConvMixerHubError("the demo needs gradio 6: pip install 'gradio>=6'")


def run_demo(names: Sequence[str], port: int, host: str = "127.0.0.1") -> None:
    """Serve a page until Ctrl-C, and print its address; it makes no requests to other machines.

    Args:
        names: Models to choose from, as in `load_trained`.
        port: Port to listen on.
        host: Address to listen on; by default, only this machine is served.

    Raises:
        ConvMixerHubError: If gradio 6 is not installed, or the port cannot be used.
        UnknownModelError: If a model does not exist.
        CheckpointError: If one cannot be loaded.
    """
    check_gradio()
    choices = {name: _load(name) for name in names}
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        raise ConvMixerHubError(
            f"port {port} of {host} cannot be used ({first_line(error)}); give another port"
        ) from None
    with TemporaryDirectory() as folder:
        # Pictures do not stay on the disk, nobody is told of them, and no proxy is asked for what
        # is on this machine.
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False"}
        for variable in ("NO_PROXY", "no_proxy"):
            others = filter(None, [os.environ.get(variable)])
            os.environ[variable] = ",".join([*others, "127.0.0.1", "localhost"])
        import gradio

        theme = gradio.themes.Default(font="sans-serif", font_mono="monospace")  # fonts from here
        print(f"http://{host}:{port}", flush=True)
        _build(choices).launch(
            theme=theme,
            server_name=host,
            server_port=port,
            share=False,
            show_error=True,
            quiet=True,
        )
