"""The machine that a job runs on: its device, memory and compiler, and the processes on it."""

from __future__ import annotations

import ctypes
import itertools
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from pathlib import Path
from types import FunctionType
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import ConvMixerHubError, TrainingError

_MEETINGS = itertools.count()


def find_device() -> torch.device:
    """Give what training and tests compute on: the GPU, if torch finds one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def describe_machine(device: torch.device) -> str:
    """Name what computes on a device in a few words, such as `2 CPU cores (AMD EPYC)`."""
    if device.type == "cuda":
        return f"{get_world_size()} × {torch.cuda.get_device_name(device)}"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        models = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    except OSError:
        models = []
    kind = models[0] if models else platform.processor() or platform.machine()
    return f"{os.cpu_count()} CPU cores ({kind})"


def keep_freed_memory() -> None:
    """Let glibc reuse freed activations instead of giving their pages back to the kernel.

    By default every tensor over 32 MiB is mapped, zeroed page by page, and unmapped again at each
    step, which is a good part of its time. Elsewhere than on glibc this does nothing.
    """
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, -1)  # never
    mallopt(m_top_pad, 2**28)  # grow in steps of 256 MiB


def has_fast_bf16() -> bool:
    """Tell whether matrix products in bfloat16 are faster here than in fp32.

    They are on GPUs from Ampere on, and on x86 CPUs with AVX512-BF16; others imitate them, many
    times slower.
    """
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported()


@cache
def can_compile() -> bool:
    """Find out whether torch.compile works here; without a C++ compiler it does not."""
    try:
        torch.compile(lambda x: x + 1)(torch.ones(1))
    except Exception:  # its backends fail each in its own way
        return False
    return True


def compiled(function: Callable) -> Callable:
    """Compile a function at its first call for each layout of tensors, if there is a compiler."""

    @cache
    def make_fast(*layouts: tuple) -> Callable:
        # Each layout has code of its own: of one piece of code, torch.compile makes a few versions
        # and then runs it as it is, so that results would depend on what was computed before.
        plain = cast(FunctionType, function)
        return torch.compile(
            FunctionType(plain.__code__.replace(), plain.__globals__), dynamic=False
        )

    @wraps(function)
    def call(*tensors: Tensor) -> Any:
        if not can_compile():
            return function(*tensors)
        layouts = [(x.shape, x.stride(), x.dtype, x.requires_grad) for x in tensors]
        return make_fast(*layouts)(*tensors)

    return call


def get_rank() -> int:
    """Give the number of this process, from 0; the first one alone prints and writes files."""
    return int(os.environ["RANK"]) if _started_by_torchrun() else 0


def get_world_size() -> int:
    """Give the number of processes."""
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
