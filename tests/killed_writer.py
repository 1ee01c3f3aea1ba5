"""Kills a process that writes checkpoints, at 20 random moments, and looks each time whether the newest one loads.

tests/test_checkpoint.py runs it: ``python killed_writer.py FOLDER SEED``.
"""

import os
import signal
import sys
import time

import numpy as np

from mpiml.nn import Linear, Sequential
from mpiml.optim import Adam
from mpiml.save import Checkpoints


def training(folder):
    optimizer = Adam(Sequential(Linear(100, 300), Linear(300, 100)).init())
    return optimizer, Checkpoints(folder, optimizer, minutes=None, every=1)


def save_for_ever(folder, told):
    optimizer, checkpoints = training(folder)
    checkpoints.load()
    os.write(told, b".")
    while True:
        optimizer.steps += 1  # a training whose numbers are all that of the step
        for vector in optimizer.model.vector, optimizer.mean, optimizer.square:
            vector[:] = optimizer.steps
        checkpoints.step()
        if optimizer.steps % 3 == 0:
            checkpoints.save()  # over the one of the same step


def main(folder, seed):
    rng, before = np.random.default_rng(int(seed)), 0
    left = {"tmp": 0, "old": 0}
    optimizer, checkpoints = training(folder)
    begin = time.perf_counter()
    checkpoints.save()
    length = time.perf_counter() - begin
    for _ in range(20):
        listen, told = os.pipe()
        child = os.fork()
        if not child:
            save_for_ever(folder, told)
        os.read(listen, 1)
        time.sleep(rng.uniform(0, 4 * length))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for kind in left:
            left[kind] += any(name.endswith(f".{kind}") for name in os.listdir(folder))
        optimizer, checkpoints = training(folder)
        checkpoints.load()
        assert optimizer.steps >= before, (optimizer.steps, before)
        for vector in optimizer.model.vector, optimizer.mean, optimizer.square:
            assert optimizer.steps == 0 or (vector == optimizer.steps).all()
        before = optimizer.steps
    optimizer.steps += 1
    checkpoints.save()
    names = sorted(os.listdir(folder))
    assert len(names) <= 4 and not any(name.endswith((".tmp", ".old")) for name in names), names
    print(f"{before} steps in 20 lives; orphans after {left['tmp']} and unfinished replacements after {left['old']} of them")


if __name__ == "__main__":
    main(*sys.argv[1:])
