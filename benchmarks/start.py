"""Time from mpirun to the end of the first training step.

    python benchmarks/start.py               # kernels in the cache
    python benchmarks/start.py --cold 20     # and so many starts of 8 ranks on an empty cache

Medians of 7 starts on 2 and on 8 ranks, of the MLP 784-128-64-10 with Adam; a kernel that is not in the cache would be an
error. A cold start must compile each kernel once between its ranks. Environments that keep Python from writing .pyc files
(PYTHONDONTWRITEBYTECODE) have it compile all sources at every start, 0.2 s for each rank: it is unset here.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections import Counter
from time import time

STARTS = 7


def first_step(started):
    """Run by the ranks: what they compiled, and when they were done."""
    import numpy as np
    from numba.core import event

    from mpiml.kernels import jit

    with event.install_recorder("numba:compile") as compiled:
        from mpiml.nn import Linear, Sequential
        from mpiml.ops import cross_entropy, relu
        from mpiml.optim import Adam
        from mpiml.parallel import Grid, gradient, place

        grid = Grid()
        model = place(Sequential(Linear(784, 128), relu, Linear(128, 64), relu, Linear(64, 10)), grid)
        optimizer = Adam(model, lr=1e-3)
        rng = np.random.default_rng(grid.rank)
        gradient(model, cross_entropy, grid)(rng.standard_normal((16, 784), np.float32), rng.integers(0, 10, 16))
        optimizer.step()
    kernels = {function for function, _ in jit._made}  # not what numba compiles into each of them
    functions = [(e.data["dispatcher"].py_func, e.data["args"]) for _, e in compiled.buffer if e.is_start]
    mine = [f"{function.__module__}.{function.__qualname__} {args}" for function, args in functions if function in kernels]
    texts = grid.texts("\n".join(mine))
    if grid.rank == 0:
        counts = Counter(line for text in texts for line in text.splitlines())
        print(time() - started, len(counts), max(counts.values(), default=0))


def start(ranks, **env):
    """Seconds until all were done, kernels compiled, and how often the same one at most."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"} | env
    job = subprocess.run(["mpirun", "-n", str(ranks), sys.executable, __file__, "--started", str(time())], env=env,
                         stdout=subprocess.PIPE, text=True, timeout=300, check=True)
    seconds, kernels, most = job.stdout.split()
    return float(seconds), int(kernels), int(most)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cold", type=int, default=0, metavar="STARTS", help="also so many starts on an empty cache")
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.started:
        first_step(args.started)
        return
    for ranks in 2, 8:
        start(ranks)  # fills the cache, where it is empty
        seconds = sorted(start(ranks, MPIML_REQUIRE_CACHE="1")[0] for _ in range(STARTS))
        print(f"{ranks} ranks, {os.cpu_count()} cores: {seconds[STARTS // 2]:.2f} s ({seconds[0]:.2f} to {seconds[-1]:.2f})",
              flush=True)
    for number in range(args.cold):
        with tempfile.TemporaryDirectory() as folder:
            seconds, kernels, most = start(8, NUMBA_CACHE_DIR=folder)
            print(f"cold start {number + 1}: {seconds:.1f} s, {kernels} kernels compiled, none more than {most} times",
                  flush=True)


main()
