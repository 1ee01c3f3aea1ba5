"""A job that trains until its launcher is sent the signal that tests/test_checkpoint.py names."""

import os
import signal
import sys
import time

import numpy as np
import psutil

from mpiml.nn import Linear, Sequential
from mpiml.ops import cross_entropy
from mpiml.optim import Adam
from mpiml.parallel import Grid, gradient, place
from mpiml.save import Checkpoints

LAUNCHERS = {"mpirun", "mpiexec", "mpiexec.hydra", "prterun", "orterun"}


def main(folder, name):
    grid = Grid()
    model = place(Sequential(Linear(5, 10)), grid)
    optimizer = Adam(model)
    step = gradient(model, cross_entropy, grid)
    checkpoints = Checkpoints(folder, optimizer)
    checkpoints.load()
    if grid.rank == 0:
        print(f"goes on after {optimizer.steps} steps")
    x, y = np.ones((4, 5), np.float32), np.zeros(4, int)
    first = optimizer.steps
    while True:
        step(x, y)
        optimizer.step()
        checkpoints.step()
        if grid.rank == 0 and optimizer.steps == first + 20:
            launcher = [process.pid for process in psutil.Process().parents() if process.name() in LAUNCHERS][-1]
            os.kill(launcher, getattr(signal, name))
        time.sleep(0.001)


if __name__ == "__main__":
    main(*sys.argv[1:])
