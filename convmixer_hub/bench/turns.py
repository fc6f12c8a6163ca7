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
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from tqdm import tqdm

from ..errors import TrainingError, first_line

SECONDS_TO_END = 10.0
# Between turns: threads of the last one, such as onnxruntime's, go on looking for work for a while.
SECONDS_TO_REST = 0.3

# Prepares a program in its own process; returns a function that takes one turn and returns its
# seconds per image, and a remark.
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
    workers = []
    for name, make in makers.items():
        connection, other_end = context.Pipe()
        process = context.Process(target=_serve, args=(other_end, make), daemon=True)
        process.start()
        other_end.close()
        workers.append((name, connection, process))
    seconds: dict[str, list[float]] = {name: [] for name in makers}
    turns = rounds + warm_up
    try:
        with tqdm(total=len(makers) * turns, leave=False, disable=None) as bar:
            for _ in range(turns):
                for name, connection, _ in workers:
                    bar.set_description(name)
                    time.sleep(SECONDS_TO_REST)
                    seconds[name].append(_ask(name, connection, "turn"))
                    bar.update()
        return {
            name: Timing(
                1 / statistics.median(seconds[name][warm_up:]),
                _ask(name, connection, "remark"),
                _ask(name, connection, "memory"),
            )
            for name, connection, _ in workers
        }
    finally:
        for _, connection, _ in workers:
            connection.close()  # upon which the process ends, and what it started
        for _, _, process in workers:
            process.join(SECONDS_TO_END)
            process.kill()


class _Failure(str):
    """Why a variant cannot be timed."""


def _ask(name: str, connection: Connection, question: str) -> Any:
    try:
        connection.send(question)
        answer = connection.recv()
    except (EOFError, OSError):
        answer = _Failure("its process died, perhaps for want of memory")
    if isinstance(answer, _Failure):
        raise TrainingError(
            f"{name}: cannot be timed ({answer}); leave it out, or give a smaller --batch-size"
        )
    return answer


def _serve(connection: Connection, make: Maker) -> None:
    """Be the process of one program: take a turn when asked to, and tell how long it took."""
    try:
        question = connection.recv()  # wait for the first turn, as getting ready takes all cores
        turn, remark = make()
        answers = {"turn": turn, "remark": lambda: remark, "memory": _peak_memory}
        while True:
            connection.send(answers[question]())
            question = connection.recv()
    except EOFError:
        pass
    except Exception as error:
        connection.send(_Failure(f"{type(error).__name__}: {first_line(error)}"))


def _peak_memory() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes there, else KiB
