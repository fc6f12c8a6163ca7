"""One image: from a file to upright 8-bit RGB, and from there to what a model takes."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.ExifTags import IFD, Base
from timm.data import create_transform
from torchvision import transforms

from ..errors import DataError, first_line

# Pillow's mode for images with so many channels.
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
# Longest side over shortest, in multiples of the model's: longer images are cropped to it before
# they are resized, which saves memory.
MAX_ASPECT_RATIO = 16


def to_rgb(image: Image.Image) -> Image.Image:
    """Bring an image of any mode to upright 8-bit RGB.

    An EXIF rotation is applied and transparency is laid over white. White in an image with deeper
    gray is the highest value of as many bits as its values need: 8, 10, 12, 14 or 16; beyond that,
    their maximum. In one of floats it is 1, or their maximum if that is higher and not all are
    whole numbers; what is not finite is black.

    Raises:
        DataError: If a gray value is negative, or all would be black without being 0.
    """
    image.load()  # pixels that cannot be read are an error
    with suppress(Exception):  # EXIF data that cannot be read say nothing of them
        image.getexif()
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.nan_to_num(np.asarray(image, np.float64), nan=0.0, posinf=0.0, neginf=0.0)
        if values.min() < 0:
            raise DataError("has negative gray values; save it as 8-bit gray")
        depths = [2.0**bits - 1 for bits in (8, 10, 12, 14, 16)]
        white = next((depth for depth in depths if values.max() <= depth), values.max())
        if image.mode == "F" and (values.max() <= 1 or (values % 1).any()):
            white = max(1.0, values.max())
        pixels = (255.0 * values / white).round().astype(np.uint8)
        if values.any() and not pixels.any():
            raise DataError(
                f"has gray values up to {values.max():.1g}, where white is {white:g}; save it as "
                "8-bit gray"
            )
        image = Image.fromarray(pixels)
    if image.mode == "La":
        image = image.convert("LA")  # the one way from there
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def open_image(source: str | Path | bytes, name: str | None = None) -> Image.Image:
    """Open an image file, or the bytes of one, as upright 8-bit RGB.

    Args:
        source: A path, or the content of a file.
        name: What to call the image in an error; its path if not given.

    Raises:
        DataError: If there is no such file, or it is no image.
    """
    name = name or str(source)
    try:
        with warnings.catch_warnings():
            # Pillow warns of large photographs, and refuses what no camera takes.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
                _check_is_whole(image)
                return to_rgb(image)
    except FileNotFoundError:
        raise DataError(f"{name}: no such file; check the path") from None
    except (IsADirectoryError, PermissionError):
        if not isinstance(source, bytes) and os.path.isdir(source):  # not allowed, says Windows
            raise DataError(f"{name}: is a folder; name the image files in it") from None
        raise DataError(f"{name}: may not be read; change its permissions") from None
    except UnidentifiedImageError:
        raise DataError(f"{name}: not an image that Pillow can read; give a PNG, JPEG, …") from None
    except Image.DecompressionBombError:
        raise DataError(f"{name}: has too many pixels to be safe; scale it down first") from None
    except DataError as error:
        raise DataError(f"{name}: {error}") from None
    except Exception as error:  # each of Pillow's decoders fails in its own way
        reason = first_line(error)
        if getattr(error, "errno", None):  # of the system, such as a name that is too long
            raise DataError(f"{name}: cannot be opened ({reason}); check the path") from None
        raise DataError(f"{name}: damaged image ({reason}); replace the file") from None


def _check_is_whole(image: Image.Image) -> None:
    """Refuse an image, not loaded yet, that Pillow would read in part or with other brightness."""
    if image.format == "TIFF":
        tags, second = image.getexif(), {}
        if image.mode in ("I;16", "F") and tags.get(Base.PhotometricInterpretation) == 0:
            raise DataError("is a negative, with white as 0; save it as 8-bit gray")
        with suppress(Exception):  # what cannot be read of a second page
            second = tags.get_ifd(IFD.IFD1)
        is_preview_or_mask = second.get(Base.NewSubfileType, 0) & 0b101
        sides = (second.get(Base.ImageWidth, 0), second.get(Base.ImageLength, 0))
        if not is_preview_or_mask and sides[0] >= image.width and sides[1] >= image.height:
            raise DataError("has several pages; save each as an image of its own")
    # Of 16 bits a color, Pillow keeps the upper 8: of a camera's 12 bits, 4.
    is_deep = image.format in ("TIFF", "PNG") and ";16" in str(getattr(image, "tile", ""))
    if is_deep and image.mode in ("RGB", "RGBA"):
        *colors, alpha = np.asarray(image.convert("RGBA")).max((0, 1))
        if 0 < max(colors) < 16 or 0 < alpha < 16:
            raise DataError(
                "is nearly black, or has fewer than 16 bits a color; save it as 8-bit RGB"
            )


def eval_transform(
    data_config: Mapping[str, Any], normalize: bool = True
) -> Callable[[Image.Image], Any]:
    """Resize, crop and normalize an RGB image as a model's timm data config says, in evaluation.

    Args:
        data_config: From `timm.data.resolve_input_data_config(model)`.
        normalize: Give normalized floats; else bytes, 0 to 255.

    Raises:
        DataError: If images have no such number of channels.
    """
    channels, height, width = data_config["input_size"]
    if channels not in MODES:
        raise DataError(
            f"the model takes {channels} channels, and images have {', '.join(map(str, MODES))}; "
            "give it tensors"
        )
    transform = create_transform(**data_config, is_training=False, normalize=normalize)
    steps = [partial(_convert, MODES[channels]), transform]
    if data_config.get("crop_mode", "center") == "center":
        longest = MAX_ASPECT_RATIO * max(height, width) // min(height, width)
        steps.insert(0, partial(_cut_ends, longest))
    return transforms.Compose(steps)


def _cut_ends(times: int, image: Image.Image) -> Image.Image:
    """Crop an image to its middle if its sides differ by more than a factor of `times`."""
    longest = times * min(image.size)
    if max(image.size) <= longest:
        return image
    width, height = (min(side, longest) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _convert(mode: str, image: Image.Image) -> Image.Image:
    return image if image.mode == mode else image.convert(mode)
