"""The machine that a job runs on: its device, and the processes on it."""

from __future__ import annotations

import itertools
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import ConvMixerHubError, TrainingError

_MEETINGS = itertools.count()


def find_device() -> torch.device:
    """Return what training and tests compute on: the GPU, if torch finds one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def describe_machine(device: torch.device) -> str:
    """Name what computes on a device in a few words, such as `2 CPU cores (AMD EPYC)`."""
    if device.type == "cuda":
        return f"{get_world_size()} × {torch.cuda.get_device_name(device)}"
    return f"{os.cpu_count()} CPU cores ({describe_processor('model name')})"


def describe_processor(*names: str) -> str:
    """Return what Linux says of the first processor under one of the names; else its kind."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(names):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def count_workers() -> int:
    """Say how many workers each process here may have: one for each free CPU core, 1 to 16."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        cores = os.cpu_count() or 1
    processes = int(os.environ["LOCAL_WORLD_SIZE"]) if _started_by_torchrun() else 1
    # Each keeps batches in shared memory, of which containers have little.
    return max(1, min(16, cores // processes - 1))


def get_rank() -> int:
    """Return the number of this process, from 0; the first one alone prints and writes files."""
    return int(os.environ["RANK"]) if _started_by_torchrun() else 0


def get_world_size() -> int:
    """Return the number of processes."""
    return int(os.environ["WORLD_SIZE"]) if _started_by_torchrun() else 1


def _started_by_torchrun() -> bool:
    return dist.is_available() and dist.is_torchelastic_launched()


@contextmanager
def join_processes() -> Iterator[torch.device]:
    """Meet the other processes that torchrun started, if any; give the device of this one.

    Processes on CPUs talk through gloo, processes on GPUs, one each, through NCCL.

    Raises:
        TrainingError: If there are more processes than GPUs.
    """
    device = find_device()
    if not _started_by_torchrun():
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device.index >= torch.cuda.device_count():
            raise TrainingError(
                f"there are {torch.cuda.device_count()} GPUs here, and each process takes one; "
                "give a smaller --nproc-per-node"
            )
        torch.cuda.set_device(device)
    store, rank, world_size = next(dist.rendezvous("env://"))
    # The store outlives the group: without a name of its own, a second one reads from the first.
    store = dist.PrefixStore(f"meeting {next(_MEETINGS)}", store)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    yield device
    dist.destroy_process_group()  # not after an error, of which the other processes know nothing


def sum_over_processes(tensor: Tensor) -> Tensor:
    """Replace a tensor, in place, by its sum over all processes."""
    if get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def ask_first_process(function: Callable[[], Any]) -> Any:
    """Let the first process call a function; give every process its result, or raise its error.

    Raises:
        ConvMixerHubError: As the function does; other errors are raised in the first process alone.
    """
    answer: list[Any] = [None]
    if get_rank() == 0:
        try:
            answer = [function()]
        except ConvMixerHubError as error:
            answer = [error]
    if get_world_size() > 1:
        dist.broadcast_object_list(answer)
    if isinstance(answer[0], ConvMixerHubError):
        raise answer[0]
    return answer[0]
