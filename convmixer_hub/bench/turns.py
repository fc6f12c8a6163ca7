"""Timing several programs in turns, so that a busy machine slows them all alike.

Each lives in a process of its own, so that neither its memory nor its settings touch the others.
"""

from __future__ import annotations

import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from ..errors import TrainingError, first_line

# Between turns: threads of the last one, such as onnxruntime's, go on looking for work for a while.
SECONDS_TO_REST = 0.3

# What makes a program ready: it gives what takes one turn and tells its seconds per image, and a
# remark.
Maker = Callable[[], tuple[Callable[[], float], Any]]


@dataclass(frozen=True)
class Timing:
    """What one program took.

    Attributes:
        images_per_second: Median over the turns.
        remark: What it says of itself.
        peak_memory: The most memory its process held, in MiB; on a GPU, of the GPU.
    """

    images_per_second: float
    remark: Any
    peak_memory: float


def time_in_turns(makers: Mapping[str, Maker], rounds: int, warm_up: int = 2) -> dict[str, Timing]:
    """Let programs take turns.

    Args:
        makers: The programs by name; called in their processes, so that they have to be pickled.
        rounds: Turns of each that count.
        warm_up: Turns of each before that.

    Raises:
        TrainingError: If one fails, naming it.
    """
    context = multiprocessing.get_context("spawn")
    turns: dict[str, list[tuple[float, Any, float]]] = {name: [] for name in makers}
    total = len(makers) * (rounds + warm_up)
    with ExitStack() as stack, tqdm(total=total, leave=False, disable=None) as bar:
        pools = {
            name: stack.enter_context(
                ProcessPoolExecutor(1, context, initializer=_begin, initargs=(make,))
            )
            for name, make in makers.items()
        }
        for _ in range(rounds + warm_up):
            for name, pool in pools.items():
                bar.set_description(name)
                time.sleep(SECONDS_TO_REST)
                try:
                    turns[name].append(pool.submit(_take_turn).result())
                except (BrokenProcessPool, TrainingError) as error:
                    reason = "its process died, perhaps for want of memory"
                    raise TrainingError(
                        f"{name}: cannot be timed "
                        f"({reason if isinstance(error, BrokenProcessPool) else error}); leave it "
                        "out, or give a smaller --batch-size"
                    ) from None
                bar.update()
    timings = {}
    for name, taken in turns.items():
        seconds = statistics.median(seconds for seconds, _, _ in taken[warm_up:])
        timings[name] = Timing(1 / seconds, *taken[-1][1:])
    return timings


_program: dict[str, Any] = {}  # in the process of one


def _begin(make: Maker) -> None:
    _program["make"] = make


def _take_turn() -> tuple[float, Any, float]:
    """Return the seconds of a turn, the program's remark, and its memory; in its own process."""
    try:
        if "turn" not in _program:  # not before the first turn, as this takes all cores
            _program["turn"], _program["remark"] = _program["make"]()
        return _program["turn"](), _program["remark"], _peak_memory()
    except Exception as error:  # not all can be sent to another process
        raise TrainingError(f"{type(error).__name__}: {first_line(error)}") from None


def _peak_memory() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes there, else KiB
