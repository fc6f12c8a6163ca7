"""How fast a trained model is there."""

from __future__ import annotations

import statistics
import time

import timm

from ..hub.records import get_record


def bench_load(name: str, rounds: int = 30) -> tuple[float, float]:
    """Time building a trained model without its weights and with them, in turns.

    Args:
        name: As in `find_checkpoint`.
        rounds: How often each counts, after one of each that does not.

    Returns:
        Medians without and with weights, in seconds.

    Raises:
        UnknownModelError: If no trained model has this name.
        CheckpointError: If the weights cannot be found or downloaded.
    """
    name = get_record(name).name
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds + 1):
        for pretrained in (False, True):
            start = time.perf_counter()
            timm.create_model(name, pretrained=pretrained)
            seconds[pretrained].append(time.perf_counter() - start)
    without, with_weights = (statistics.median(each[1:]) for each in seconds)
    return without, with_weights
