"""Models in one file, to be carried to a machine without network: a tar archive.

It holds `<name>/model.safetensors` and what else is known of the model, `<name>/golden.json` for
one. On the other machine the files go where a download would have put them, the Hub's cache, so
all that works with downloaded models works with these.
"""

from __future__ import annotations

import io
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from huggingface_hub import constants

from .checkpoint import (
    WEIGHTS_FILE,
    find_checkpoint,
    is_model_file,
    put_in_cache,
    read_model_files,
    verify_file,
)
from .errors import CheckpointError, UnknownModelError, first_line
from .files import write_file
from .records import RECORDS, CheckpointRecord, get_record

_BUNDLE_AGAIN = "make the kit again with `convmixer bundle`, and copy it as it is"


def bundle(names: Sequence[str], output: str | Path) -> list[str]:
    """Write models into a kit; the same files in the same order give the same bytes.

    Beside weights that were downloaded, there may be none of the other files of a model.

    Args:
        names: The models, as in `find_checkpoint`, which downloads what is not on this machine.
        output: The kit, replaced whole or not at all.

    Returns:
        The full names of the models, each once.

    Raises:
        UnknownModelError: If no trained model has one of the names.
        CheckpointError: If the weights cannot be had, or a file beside them cannot be read.
        DataError: If the kit cannot be written.
    """
    records = list({record.name: record for record in map(get_record, names)}.values())
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as kit:
        for record in records:
            for file, data in read_model_files(find_checkpoint(record.name).parent).items():
                member = tarfile.TarInfo(f"{record.name}/{file.name}")
                member.size = len(data)
                kit.addfile(member, io.BytesIO(data))
    write_file(Path(output), content.getvalue())
    return [record.name for record in records]


def unbundle(kit: str | Path, cache_dir: str | Path | None = None) -> dict[str, Path]:
    """Put the models of a kit into the Hub's cache, where `find_checkpoint` finds them.

    Nothing is put there unless the kit holds models alone, each with the recorded weights. Nothing
    else is checked: `config.json`, `golden.json`, the card and the pictures are what the kit says.

    Args:
        kit: What `bundle` wrote.
        cache_dir: The Hub's cache folder; huggingface_hub's own by default.

    Returns:
        The weights of each model, by full name.

    Raises:
        UnknownModelError: If the kit holds a model that this version does not know.
        CheckpointError: If the file is no such kit, or the cache cannot be written to.
    """
    kit = Path(kit)
    try:
        content = io.BytesIO(kit.read_bytes())
    except OSError as error:
        raise CheckpointError(
            f"{kit}: cannot be read ({first_line(error)}); name a kit of `convmixer bundle`"
        ) from None
    cache = Path(cache_dir or constants.HF_HUB_CACHE)
    try:
        # Uncompressed archives alone: they hold no more than they seem to.
        with tarfile.open(fileobj=content, mode="r:") as archive:
            records = _check_members(archive, kit)
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache, prefix=".unbundling-") as temporary:
                _extract(archive, Path(temporary))
                folders = {record: Path(temporary) / record.name for record in records}
                for record, folder in folders.items():
                    verify_file(folder / WEIGHTS_FILE, record, f"it is of {kit}: {_BUNDLE_AGAIN}")
                # A kit is no commit of the Hub's; the digest, cut to that length, stands in for it.
                return {
                    record.name: put_in_cache(folder.iterdir(), record, record.sha256[:40], cache)
                    for record, folder in folders.items()
                }
    except OSError as error:
        raise CheckpointError(
            f"{kit}: cannot be unbundled into the Hub's cache ({first_line(error)}); make room "
            "there, or name another folder with HF_HOME"
        ) from None
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise CheckpointError(
            f"{kit}: is no whole tar archive ({first_line(error)}); {_BUNDLE_AGAIN}"
        ) from None


def _check_members(archive: tarfile.TarFile, kit: Path) -> list[CheckpointRecord]:
    """Let nothing pass but plain files `<name>/<file of a model>`; say which models they are."""
    names = []
    for member in archive.getmembers():
        folder, _, file = member.name.partition("/")
        plain = member.isreg() and not member.issparse()
        if not plain or folder in ("", ".", "..") or not is_model_file(PurePosixPath(file)):
            raise CheckpointError(
                f"{kit}: holds {member.name!r}, which is no file of a model, so nothing was "
                f"taken from it; {_BUNDLE_AGAIN}"
            )
        names.append(folder)
    if not names:
        raise CheckpointError(f"{kit}: holds no model; {_BUNDLE_AGAIN}")
    unknown = ", ".join(map(repr, sorted(set(names) - RECORDS.keys())))
    if unknown:
        raise UnknownModelError(
            f"{kit}: holds {unknown}, which this version does not know; update convmixer-hub, or "
            "make a kit without"
        )
    return [RECORDS[name] for name in dict.fromkeys(names)]


def _extract(archive: tarfile.TarFile, folder: Path) -> None:
    for member in archive.getmembers():
        content = archive.extractfile(member)
        assert content is not None  # as for every plain file
        (folder / member.name).parent.mkdir(exist_ok=True)
        (folder / member.name).write_bytes(content.read())
