"""The price of the same bits on any grid: a training step with lanes against one without, on the ranks there are.

    mpirun -n 2 python benchmarks/lanes.py

Whole steps with Adam, in turn, medians; the table shows time with lanes over time without. Small lanes cost more: their
matrices are small, and each lane's gradient is a vector to be added.
"""

import os

os.environ.pop("OPENBLAS_CORETYPE", None)  # halves NumPy's BLAS on machines where it is set; must go before NumPy loads
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
from time import perf_counter

import numpy as np

import mpiml  # noqa: F401  (before NumPy: it shares out the cores)
from mpiml.data import share
from mpiml.nn import Conv2d, Flatten, Linear, MaxPool2d, Sequential
from mpiml.ops import cross_entropy, relu
from mpiml.optim import Adam
from mpiml.parallel import Grid, gradient, place

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--rounds", type=int, default=25)
parser.add_argument("--only", nargs=2, metavar=("MODEL", "BATCH"), help="one row, such as conv 8192")
args = parser.parse_args()

BATCHES = {"mlp": (512, 1920, 8192), "conv": (512, 1920, 8192)}
GRIDS = {"without": Grid(), **{f"{lanes} lanes": Grid(lanes=lanes) for lanes in (4, 8, 16, 32)}}


def mlp():
    return Sequential(Linear(784, 128), relu, Linear(128, 64), relu, Linear(64, 10))


def conv():
    return Sequential(Conv2d(1, 16, 3, padding=1), relu, MaxPool2d(2), Conv2d(16, 32, 3, padding=1), relu, MaxPool2d(2),
                      Flatten(), Linear(1568, 64), relu, Linear(64, 10))


def trainer(build, grid, x, y):
    net = place(build(), grid)
    step, optimizer = gradient(net, cross_entropy, grid), Adam(net)
    mine = slice(*share(len(x), grid.replica, grid.data, lanes=grid.lanes))

    def run():
        step(x[mine], y[mine])
        optimizer.step()

    return run


def seconds(run, repeats):
    GRIDS["without"].comm.Barrier()
    start = perf_counter()
    for _ in range(repeats):
        run()
    GRIDS["without"].comm.Barrier()
    return (perf_counter() - start) / repeats


rng = np.random.default_rng(0)
say = print if GRIDS["without"].rank == 0 else lambda *_: None
say(f"{GRIDS['without'].size} ranks, medians of {args.rounds} rounds\n")
say(f"| model | batch | {' | '.join(GRIDS)} |\n|---|---|{'---|' * len(GRIDS)}")
for build in mlp, conv:
    for size in BATCHES[build.__name__]:
        if args.only not in (None, [build.__name__, str(size)]):
            continue
        x = rng.standard_normal((size, 784) if build is mlp else (size, 1, 28, 28), np.float32)
        y = rng.integers(0, 10, size)
        runs = [trainer(build, grid, x, y) for grid in GRIDS.values()]
        for run in runs:
            run()
        repeats = max(1, 8192 // size // (1 if build is mlp else 8))
        times = np.array([[seconds(run, repeats) for run in runs] for _ in range(args.rounds)])
        ratios = np.median(times / times[:, :1], axis=0)
        say(f"| {build.__name__} | {size} | {1e3 * np.median(times[:, 0]):.2f} ms | "
            + " | ".join(f"{ratio:.2f}" for ratio in ratios[1:]) + " |")
