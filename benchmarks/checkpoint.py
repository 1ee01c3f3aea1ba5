"""What checkpoints in the background cost a training: ``mpirun -n 2 python benchmarks/checkpoint.py [FOLDER]``.

Steps of an MLP of 25 million parameters with Adam, so 300 MB of arrays, that the replicas share: alone, and while a
checkpoint is being written. The time of the training's own thread on its core is that of a step which need not share
the core; how much longer a step takes on the clock depends on whether there is a core for the writing thread.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import sys
import tempfile
from time import perf_counter, thread_time

import numpy as np

from mpiml.nn import Linear, Sequential
from mpiml.ops import cross_entropy, relu
from mpiml.optim import Adam
from mpiml.parallel import Grid, gradient, place
from mpiml.save import Checkpoints

grid = Grid()
model = place(Sequential(*[layer for _ in range(6) for layer in (Linear(2048, 2048), relu)], Linear(2048, 10)), grid)
optimizer = Adam(model)
step = gradient(model, cross_entropy, grid)
x, y = np.random.default_rng(0).standard_normal((64, 2048)).astype(np.float32), np.arange(64) % 10


def train():
    """Seconds of a step: on the clock, and of this thread."""
    begin, cpu = perf_counter(), thread_time()
    step(x, y)
    optimizer.step()
    return perf_counter() - begin, thread_time() - cpu


with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as folder:
    folder = grid.texts(folder)[0]
    checkpoints = Checkpoints(f"{folder}/run", optimizer, minutes=None)
    times = {"step alone": [], "step beside a writing thread": [], "copy": []}
    written = []
    for _ in range(3):
        train()
    for _ in range(5):
        times["step alone"] += [train() for _ in range(10)]
        begin, cpu = perf_counter(), thread_time()
        checkpoints._begin({})
        begun = perf_counter()
        times["copy"].append((begun - begin, thread_time() - cpu))
        while checkpoints._job:  # until a step has given it its name
            times["step beside a writing thread"].append(train())
            checkpoints.step()
        written.append(perf_counter() - begun)
    grid.all(True)

if grid.rank == 0:
    print(f"{grid.size} ranks, {3 * model.vector.nbytes / grid.data / 1e6:.0f} MB each; medians (minima) in ms")
    for name, pairs in times.items():
        clock, cpu = 1e3 * np.array(pairs).T
        print(f"{name:30} {np.median(clock):7.1f} ({clock.min():.1f}) on the clock, {np.median(cpu):7.1f} ({cpu.min():.1f}) "
              f"of the thread")
    print(f"on the disk and named after {np.median(written):.2f} s")
