"""A Hugging Face Space that serves the page of `convmixer demo`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from tempfile import TemporaryDirectory

from packaging.requirements import Requirement

from ..checkpoints.resolve import resolve
from ..errors import DataError, printable
from ..files import writing
from ..hub.records import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE
from ..hub.repository import PREFIX
from ..load import load_trained
from ..model.config import check_classifies
from .demo import check_gradio, find_examples

CARD = """\
---
title: ConvMixer
sdk: gradio
sdk_version: {gradio}
app_file: app.py
---

Trained ConvMixers to try on a picture: {names}.

`convmixer_hub/` is a copy of convmixer-hub {version}, with the weights of its models that are shown
here. A private repository of the Hub needs the secret HF_TOKEN in the settings of the Space.

To run the page elsewhere: `pip install -r requirements.txt gradio=={gradio} && python app.py`, then
open http://127.0.0.1:7860
"""

APP = """\
from os import environ

from convmixer_hub.release.demo import run_demo

run_demo(
    {names!a},
    int(environ.get("GRADIO_SERVER_PORT", "7860")),
    environ.get("GRADIO_SERVER_NAME", "127.0.0.1"),
)
"""


def write_space(names: Sequence[str], output: Path) -> None:
    """Write a Space: a page with these models, and a copy of this package to serve it.

    Args:
        names: Models to choose from, as in `load_trained`. The files of folders and of the
            package's models are copied; a repository of the Hub is asked when the page starts.
        output: A new folder, to be uploaded as it is.

    Raises:
        ConvMixerHubError: If gradio 6 or this package itself is not installed.
        UnknownModelError: If a model does not exist.
        CheckpointError: If one cannot be loaded.
        DataError: If the folder already exists or cannot be written, or two models would get the
            same name.
    """
    gradio = check_gradio()
    if os.path.exists(output):  # unlike Path.exists, no error without permission
        raise DataError(f"{output}: already exists; name a new folder")
    shown: list[str] = []
    copies: dict[str, Path] = {}
    for name in names:
        source = resolve(name)
        source.check_is_whole()
        check_classifies(load_trained(source))
        folder = source.folder.resolve()
        place = ""
        if source.record:
            name = source.record.name
            place = f"convmixer_hub/weights/{name}"
        elif not source.name.startswith(PREFIX):
            name = place = f"models/{folder.name}"
        for part in (WEIGHTS_FILE, CONFIG_FILE, CARD_FILE):
            file = folder / part
            if place and file.is_file() and copies.setdefault(f"{place}/{part}", file) != file:
                raise DataError(f"{name}: two models have a folder of this name; rename one")
        if name not in shown:
            shown.append(name)
    package = _find_package()
    needed = [line for line in package.requires or () if not Requirement(line).marker]
    texts = {
        "app.py": APP.format(names=shown),
        "requirements.txt": "\n".join([*needed, ""]),
        CARD_FILE: CARD.format(
            gradio=gradio, names=printable(", ".join(shown)), version=package.version
        ),
    }
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=output.parent, prefix=".saving-") as temporary:
            space = Path(temporary, output.name)
            _copy_package(space / "convmixer_hub")
            for place, file in copies.items():
                (space / place).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, space / place)
            for name, text in texts.items():
                (space / name).write_text(text, encoding="utf-8")
            space.rename(output)


def _find_package() -> Distribution:
    try:
        return distribution("convmixer-hub")
    except PackageNotFoundError:
        raise DataError(
            "what this package needs is not known, as it is not installed; in a clone of it, run: "
            "pip install ."
        ) from None


def _copy_package(target: Path) -> None:
    """Copy this package without its weights, which are chosen by name."""
    ignored = shutil.ignore_patterns("__pycache__", "weights", "examples", ".saving-*")
    shutil.copytree(Path(__file__).parents[1], target, ignore=ignored)
    (target / "examples").mkdir()
    for example in find_examples():
        shutil.copy(example, target / "examples")
