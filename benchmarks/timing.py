"""Seconds of functions, taken in turn, for the benchmarks."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np


def timed(function: Callable[[], Any]) -> float:
    """Seconds until what the function gives is there."""
    began = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - began


def interleaved(functions: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """{name: seconds of each repetition}: all functions once in every round."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            times[name].append(timed(function))
    return times


def medians(times: Mapping[str, list[float]]) -> dict[str, float]:
    """{name: median seconds}."""
    return {name: float(np.median(each)) for name, each in times.items()}
