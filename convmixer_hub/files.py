"""Writing files whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import DataError, first_line


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Give a temporary path to write to; rename it to `file` when all went well."""
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())  # or a power cut may leave the name without the content
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def write_file(file: Path, content: bytes) -> None:
    """Write a file that a user asked for.

    Raises:
        DataError: If it cannot be written.
    """
    try:
        with replacing(file) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise DataError(
            f"{file}: cannot be written ({first_line(error)}); make room, or name another place"
        ) from None
