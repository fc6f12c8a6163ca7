"""Writing files whole or not at all."""

import os
from pathlib import Path

import pytest

from convmixer_hub import DataError
from convmixer_hub.files import replacing, write_file


@pytest.fixture
def file(tmp_path):
    """A file with something in it."""
    (tmp_path / "file").write_text("old")
    return tmp_path / "file"


def test_of_two_writers_at_once_the_later_to_end_is_read(file):
    with replacing(file) as late, replacing(file) as early:
        late.write_text("late")
        early.write_text("early")
        assert [path for path in file.parent.iterdir() if path.name[0] != "."] == [file]
        assert file.read_text() == "old"
    assert file.read_text() == "late"
    assert list(file.parent.iterdir()) == [file]


def test_a_writer_that_fails_changes_nothing(file):
    with pytest.raises(ZeroDivisionError), replacing(file) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert file.read_text() == "old"
    assert list(file.parent.iterdir()) == [file]


def test_a_link_stays_and_what_it_leads_to_is_replaced(file, tmp_path):
    (tmp_path / "link").symlink_to("file")
    write_file(tmp_path / "link", b"new")
    assert (tmp_path / "link").readlink() == Path("file")
    assert file.read_bytes() == b"new"


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_nothing_but_a_file_is_replaced(make, tmp_path):
    make(tmp_path / "there")
    mode = (tmp_path / "there").stat().st_mode
    with pytest.raises(DataError, match=r"there: cannot be written \(exists, and is not a regul"):
        write_file(tmp_path / "there", b"")
    assert (tmp_path / "there").stat().st_mode == mode
