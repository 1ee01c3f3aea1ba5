"""What the benchmarks share: one thread each, rounds in turn, medians. To be imported before NumPy."""

import os
import platform
import sys
from time import perf_counter

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ[name] = "1"
if os.environ.pop("OPENBLAS_CORETYPE", None):  # a pinned core type would halve NumPy's BLAS
    os.execv(sys.executable, [sys.executable, *sys.argv])  # noqa: S606

import numpy as np
import torch

torch.set_num_threads(1)


def processor():
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def versions():
    return f"{processor()}, 1 thread; numpy {np.__version__}, torch {torch.__version__}"


def seconds(step, repeats):
    """Time of one of so many calls."""
    start = perf_counter()
    for _ in range(repeats):
        step()
    return (perf_counter() - start) / repeats


def alternate(steps, rounds, repeats=None, least=0.003):
    """Time the functions in turn, one round of each, again and again.

    Parameters
    ----------
    steps : list of functions
    rounds : int
    repeats : int, optional
        Calls in a round; by default as many as take ``least`` seconds.

    Returns
    -------
    (rounds, functions) array of seconds a call
    """
    for step in steps:
        step()
    counts = [repeats or max(1, int(least / seconds(step, 1))) for step in steps]
    return np.array([[seconds(step, count) for step, count in zip(steps, counts, strict=True)] for _ in range(rounds)])


def against(times):
    """Medians of our seconds (column 0) and of the best of the others, which of these it is, and the ratio by rounds."""
    medians = np.median(times, axis=0)
    best = 1 + int(medians[1:].argmin())
    return medians[0], medians[best], best - 1, np.median(times[:, best] / times[:, 0])
