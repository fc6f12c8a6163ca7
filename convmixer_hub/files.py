"""Writing files whole or not at all, and telling them apart by digest."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import DataError, first_line


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; rename it to `file` when all went well.

    What a link leads to is replaced, not the link.

    Raises:
        OSError: If it cannot be written, or exists and is not a regular file: a folder, a device.
    """
    target = Path(os.path.realpath(file))
    if target.exists() and not target.is_file():
        raise OSError("exists, and is not a regular file")
    # A folder of its own for each writer; names with a dot are what a killed one leaves over.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".saving-") as folder:
        temporary = Path(folder, target.name)
        yield temporary
        with temporary.open("r+b") as written:  # Windows flushes only what it may write
            os.fsync(written.fileno())  # or a power cut may leave the name without the content
        os.replace(temporary, target)


def hash_file(file: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Say in one line that a file or folder that a user asked for cannot be written.

    Raises:
        DataError: Instead of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{place}: cannot be written ({first_line(error)}); make room, or name another place"
        ) from None


def write_file(file: Path, content: bytes) -> None:
    """Write a file that a user asked for.

    Raises:
        DataError: If it cannot be written.
    """
    with writing(file), replacing(file) as temporary:
        temporary.write_bytes(content)
