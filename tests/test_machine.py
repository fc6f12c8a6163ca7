import os
import subprocess
import sys

import pytest

from .conftest import CHECKOUT

MEET = """
import time, torch
from convmixer_hub.machine import get_rank, join_processes, sum_over_processes

for meeting in range(3):
    with join_processes() as device:
        time.sleep(0.5 * get_rank())  # or the late one would meet nobody by chance
        assert sum_over_processes(torch.ones(1, device=device)).item() == 2
    time.sleep(0.5 * get_rank())
"""


@pytest.mark.slow
def test_processes_can_meet_again(tmp_path):
    (tmp_path / "meet.py").write_text(MEET)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*command, str(tmp_path / "meet.py")],
        env={**os.environ, "PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
