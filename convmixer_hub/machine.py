"""The machine that a job runs on."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist

from .errors import TrainingError


def find_device() -> torch.device:
    """Return what training, evaluation and benchmarks compute on: the GPU, if torch finds one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def describe_machine(device: torch.device) -> str:
    """Name what computes on a device in a few words, such as `2 CPU cores (AMD EPYC)`."""
    if device.type == "cuda":
        return f"1 × {torch.cuda.get_device_name(device)}"
    return f"{_count_cores()} CPU cores ({describe_processor('model name')})"


def describe_processor(*names: str) -> str:
    """Return what Linux says of the first processor under one of the names; else its kind."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(names):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def count_workers() -> int:
    """Say how many workers there may be: one for each CPU core but one, 1 to 16."""
    # Each keeps batches in shared memory, of which containers have little.
    return max(1, min(16, _count_cores() - 1))


def _count_cores() -> int:
    try:
        return len(os.sched_getaffinity(0))  # those that this process may use
    except AttributeError:  # not Linux
        return os.cpu_count() or 1


def refuse_torchrun() -> None:
    """Refuse to be one of several processes, each of which would do the same work.

    Raises:
        TrainingError: If torchrun started this one and others.
    """
    if not dist.is_available() or not dist.is_torchelastic_launched():
        return
    count = int(os.environ.get("WORLD_SIZE") or 1)
    if count > 1:
        raise TrainingError(
            f"torchrun started {count} processes, but this trains in one, on one GPU; start it "
            "without torchrun, or use timm's train.py, see docs/timm-scripts.md"
        )
