"""One image: from a file to upright 8-bit RGB, and from there to what a model takes."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from timm.data import create_transform
from torchvision import transforms

from ..errors import DataError, first_line


def to_rgb(image: Image.Image) -> Image.Image:
    """Bring an image of any mode to upright 8-bit RGB.

    An EXIF rotation is applied and transparency is laid over white. Gray values of 16 bits are
    scaled to 8 (Pillow alone would cut them off at 255); gray floats count as 0 to 1, or as 0 to
    their maximum if that is higher.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        white = max(1.0, values.max()) if image.mode == "F" else 65535.0
        image = Image.fromarray((255.0 * values / white).clip(0, 255).round().astype(np.uint8))
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
                return to_rgb(image)
    except FileNotFoundError:
        raise DataError(f"{name}: no such file; check the path") from None
    except IsADirectoryError:
        raise DataError(f"{name}: is a folder; name the image files in it") from None
    except PermissionError:
        raise DataError(f"{name}: may not be read; change its permissions") from None
    except UnidentifiedImageError:
        raise DataError(f"{name}: not an image that Pillow can read; give a PNG, JPEG, …") from None
    except Image.DecompressionBombError:
        raise DataError(f"{name}: has too many pixels to be safe; scale it down first") from None
    except Exception as error:  # each of Pillow's decoders fails in its own way
        reason = first_line(error)
        raise DataError(f"{name}: damaged image ({reason}); replace the file") from None


def eval_transform(data_config: Mapping[str, Any], normalize: bool = True) -> Callable:
    """Resize, crop and normalize as a model's timm data config says, in evaluation.

    Args:
        data_config: From `timm.data.resolve_model_data_config(model)`.
        normalize: Give normalized floats; else bytes, 0 to 255.
    """
    transform = create_transform(**data_config, is_training=False, normalize=normalize)
    to_gray = [transforms.Grayscale()] if data_config["input_size"][0] == 1 else []
    return transforms.Compose([*to_gray, transform])
