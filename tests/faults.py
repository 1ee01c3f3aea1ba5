"""A job in which one rank does what the first argument says; tests/test_launch.py looks at how it ends."""

import contextlib
import os
import signal
import sys
import threading
import time

import numpy as np
from train_checkpoints import segments

from mpiml.data import mnist
from mpiml.nn import Linear, Sequential
from mpiml.ops import cross_entropy
from mpiml.parallel import Grid, evaluate, gradient, place
from mpiml.tensor import op

trap = None


def sprung(g):
    if trap == "backward":
        raise LookupError("this stage cannot go back")
    return g


@op
def trapped(x):
    if trap == "forward":
        raise LookupError("this stage cannot go on")
    return x + 0, (sprung,)


def main(fault, folder=None):
    global trap
    pipeline = fault in ("forward", "backward", "short")
    grid = Grid()
    grid = Grid(pipe=grid.size) if pipeline else grid
    culprit = grid.size // 2 - 1  # rank 3 of 8
    layers = [Sequential(Linear(5, 5), trapped) for _ in range(grid.pipe - 1)]
    model = place(Sequential(*layers, Linear(5, 10)), grid)
    step = gradient(model, cross_entropy, grid, 4 if pipeline else 1)
    other = gradient(place(Sequential(Linear(5, 10)), grid), cross_entropy, grid) if fault == "swapped" else None
    x, y = np.ones((4, 5), np.float32), np.zeros(4, int)
    for _ in range(20):
        step(x, y)
    if grid.rank == (0 if fault == "data" else culprit):
        sys.stderr.write(f"SEGMENTS {' '.join(segments())}\nFAULT {time.time()}\n")
        sys.stderr.flush()
        if fault == "raise":
            raise LookupError("this rank cannot go on")
        if fault == "exit":
            try:
                sys.exit(5)  # caught, so it counts for nothing
            except SystemExit:
                pass
            sys.exit(7)
        if fault == "thread":
            thread = threading.Thread(target=lambda: {}["key of a thread"])
            thread.start()
            thread.join()
        if fault == "data":
            mnist(folder)
        if fault == "label":
            y[2] = 10
        if fault == "nan":
            x[3, 1] = np.nan
        if fault == "shape":
            x = x[:, :4]
        if pipeline:
            trap = fault
        if fault == "dtype":
            x = x.astype(np.float64)
        if fault == "exit0":
            sys.exit(0)
        if fault == "SIGSEGV":
            os.kill(os.getpid(), signal.SIGSEGV)
        if fault == "alone":
            evaluate(model, x, y, {"loss": cross_entropy}, grid)
        if fault == "swapped":
            other(x, y)
            step(x, y)
        if fault == "caught":
            with contextlib.suppress(ValueError):
                step(x, y + 10)
        if fault == "short":
            x, y = x[:2], y[:2]
        if fault == "late":
            time.sleep(60)
    elif fault == "swapped":
        step(x, y)
        other(x, y)
    while True:
        step(x, y)


if __name__ == "__main__":
    main(*sys.argv[1:])
