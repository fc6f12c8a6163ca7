"""A disk that is really full: a tmpfs of 1 MB, in a mount namespace of the command."""

import shutil
import subprocess
import sys

import pytest

from .conftest import CHECKOUT, NAME

ALONE = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
MOUNT = 'mount -t tmpfs -o size=1m none "$0"'


@pytest.fixture
def convmixer(tmp_path, monkeypatch):
    """Run the command line where `tmp_path/disk` is small; give its exit status and its errors.

    What is left on the disk is checked to be nothing.
    """
    disk = tmp_path / "disk"
    disk.mkdir()
    if not shutil.which("unshare") or subprocess.run([*ALONE, MOUNT, disk]).returncode:
        pytest.skip("no disk can be mounted here")
    monkeypatch.setenv("PYTHONPATH", str(CHECKOUT))
    monkeypatch.setenv("HF_HOME", str(disk))

    def run(*arguments):
        script = f'{MOUNT} && "$@"; status=$?; find "$0" -type f -o -type l; exit $status'
        command = [*ALONE, script, disk, sys.executable, "-m", "convmixer_hub", *arguments]
        result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert result.stdout == ""
        return result.returncode, result.stderr

    return run


@pytest.mark.slow
def test_a_pull_to_a_full_disk_is_one_line_and_leaves_nothing(hub, convmixer, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    status, errors = convmixer("pull", NAME)
    assert status == 1
    assert errors.splitlines()[-1].startswith(
        f"Error: {NAME}: the Hub's cache cannot be used ([Errno 28] No space left on device"
    )
    assert errors.count("Error: ") == 1 and "Traceback" not in errors
