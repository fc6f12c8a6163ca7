"""Reference logits: record what a model computes, and check that it computes the same here.

`golden.json` beside the weights holds the logits for an input that anybody can make: it follows
from a formula, needs no random generator and no image decoder, and every floating-point type has
its numbers exactly. The logits were computed in float64, so they depend on no machine.
"""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.resolve import Source, resolve
from ..errors import CheckpointError, first_line
from ..files import hash_file, write_file
from ..hub.find import find_embedded
from ..hub.records import GOLDEN_FILE, WEIGHTS_FILE
from ..hub.repository import PREFIX
from ..load import load_trained
from ..model.config import get_config
from ..model.inference import prepare_if_possible

# By how much logits may differ, as a share of the largest: several times what rounding does.
TOLERANCE = 2e-5

_INPUT = "4 images, normalized; number n of them all, from 0: (n^3 mod 65521 mod 251 - 125) / 64"


def make_golden_input(input_size: tuple[int, int, int]) -> Tensor:
    """Make four images of noise: multiples of 1/64 between -2 and 2, in float64.

    Args:
        input_size: Channels, height and width.
    """
    shape = (4, *input_size)
    n = torch.arange(math.prod(shape))
    return (((n % 65521) ** 3 % 65521 % 251 - 125).double() / 64).reshape(shape)


@torch.inference_mode()
def _compute_logits(model: nn.Module, dtype: torch.dtype) -> Tensor:
    images = make_golden_input(get_config(model)["input_size"])
    logits: Tensor = model(images.to(dtype))
    return logits.double()


def write_golden(folder: str | Path, output: str | Path | None = None) -> None:
    """Record what the model of a folder computes, once its weights are final.

    Args:
        folder: Holds `config.json` and `model.safetensors`.
        output: Folder that gets `golden.json`; the model's own if not given.

    Raises:
        CheckpointError: If the model cannot be loaded.
        DataError: If the file cannot be written.
    """
    folder = Path(folder)
    logits = _compute_logits(load_trained(folder).eval().double(), torch.float64)
    golden = {
        "sha256": hash_file(folder / WEIGHTS_FILE),
        "input": _INPUT,
        "logits": logits.tolist(),
    }
    write_file(Path(output or folder) / GOLDEN_FILE, f"{json.dumps(golden, indent=1)}\n".encode())


def find_golden(source: Source) -> Path:
    """Name the file with the reference logits of a model; it may not be there."""
    # Beside weights in the Hub's cache there may be no logits, or what nobody checked: for a model
    # on record, the package's own count.
    own = find_embedded(source.record) if source.record else None
    return (own or source.file).with_name(GOLDEN_FILE)


def verify(name: str | Path | Source) -> float:
    """Compare what a model computes on this machine, in float32, with what is recorded.

    Args:
        name: As in `load_trained`; or what `resolve` gave.

    Returns:
        The largest difference of a logit, as a share of the largest logit: at most `TOLERANCE` if
        the model computes what it should, NaN if a logit is no number.

    Raises:
        UnknownModelError: If it is neither a trained model's name nor a folder.
        CheckpointError: If the model cannot be loaded, or nothing is recorded of these weights.
    """
    source = name if isinstance(name, Source) else resolve(name)
    model = load_trained(source)
    file = find_golden(source)
    argument = shlex.quote(source.name.removeprefix("local-dir:"))
    remedy = f"`convmixer card {argument} --data DIR` writes it"
    if not source.name or source.name.startswith(PREFIX):
        remedy = "name a model of this package, or a folder for which `convmixer card` wrote it"
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file; {remedy}") from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({first_line(error)}); {remedy}") from None
    golden = parse_golden(content, file, hash_file(source.file), remedy)
    # As it is, and as `predict` uses it.
    networks = (model.eval(), prepare_if_possible(model))
    logits, also = (_compute_logits(network, torch.float32) for network in networks)
    if logits.shape != golden.shape:
        raise CheckpointError(f"{file}: holds logits of another model; {remedy}")
    difference = (torch.stack([logits, also]) - golden).abs().max() / golden.abs().max()
    return difference.item()


def parse_golden(content: bytes, file: Path, digest: str, remedy: str) -> Tensor:
    """Take the logits from the content of a `golden.json`.

    Args:
        content: The content.
        file: Where it is from, for the message.
        digest: SHA-256 of the weights that it has to be of.
        remedy: What to do where it does not serve, for the message.

    Raises:
        CheckpointError: If it is no such file, or of other weights.
    """
    try:
        golden: dict[str, Any] = json.loads(content)
        made_with, made_from = golden["sha256"], golden["input"]
        logits = torch.tensor(golden["logits"], dtype=torch.float64)
    except (ValueError, LookupError, TypeError) as error:
        raise CheckpointError(
            f"{file}: cannot be read ({type(error).__name__}: {first_line(error)}); {remedy}"
        ) from None
    if made_with != digest:
        raise CheckpointError(f"{file}: is of weights with another SHA-256; {remedy}")
    if made_from != _INPUT:
        raise CheckpointError(f"{file}: is for another input than this version's; {remedy}")
    return logits
