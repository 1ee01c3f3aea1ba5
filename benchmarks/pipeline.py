"""Two stages on two cores: the measured step against the simulated one, one rank, and two ways to cut a model.

    mpirun -n 2 python benchmarks/pipeline.py

1. An MLP of 8 equal wide layers in 8 micro-batches. The step's time is predicted by ``simulate`` from the costs that
   ``profile`` measured, and compared with one rank that has the whole batch, in one run, alternating, medians.
2. A conv net, cut by the number of parameters and by measured cost.
"""

import os

os.environ.pop("OPENBLAS_CORETYPE", None)  # halves NumPy's BLAS on machines where it is set; must go before NumPy loads
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
from time import perf_counter

import numpy as np
from mpi4py import MPI

import mpiml  # noqa: F401  (before NumPy: it shares out the cores)
from mpiml.nn import Conv2d, Flatten, Linear, MaxPool2d, Sequential
from mpiml.ops import cross_entropy, relu
from mpiml.parallel import Grid, Watch, gradient, place, profile
from mpiml.schedule import SCHEDULES, simulate

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--width", type=int, default=512)
parser.add_argument("--microbatch", type=int, default=512, help="samples in a micro-batch of the MLP (default %(default)s)")
parser.add_argument("--rounds", type=int, default=15)
parser.add_argument("--schedule", choices=SCHEDULES, default="one_f_one_b")
parser.add_argument("--draw", metavar="FILE", help="write a picture of a step of the MLP, simulated and measured")
args = parser.parse_args()

STAGES, MICROBATCHES = 2, 8
grid, alone = Grid(pipe=STAGES), Grid(comm=MPI.COMM_SELF)
rng = np.random.default_rng(0)


def mlp():
    return Sequential(*[layer for _ in range(8) for layer in (Linear(args.width, args.width), relu)])


def conv_net():
    """Most of the time goes into the first layers, most of the parameters are in the last."""
    return Sequential(Conv2d(3, 16, 3, padding=1), relu, Conv2d(16, 16, 3, padding=1), relu, MaxPool2d(2),
                      Conv2d(16, 32, 3, padding=1), relu, MaxPool2d(2), Flatten(), Linear(2048, 256), relu, Linear(256, 10))


def seconds(step):
    """Time of a step that all of the grid take together."""
    grid.comm.Barrier()
    start = perf_counter()
    step()
    grid.comm.Barrier()
    return perf_counter() - start


def alternate(*measures):
    """(rounds, measures) array of what each function returns, called in turns; the same on all ranks."""
    times = np.array([[measure() for measure in measures] for _ in range(args.rounds)])
    grid.comm.Bcast(times)
    return times


def say(text):
    if grid.rank == 0:
        print(text, flush=True)


def pipeline_against_one_rank():
    size = MICROBATCHES * args.microbatch
    x = rng.standard_normal((size, args.width)).astype(np.float32)
    y = rng.integers(0, args.width, size)

    def measure(repeats):
        return profile(mlp(), x[:args.microbatch], grid, cross_entropy, y[:args.microbatch], repeats)

    net = place(mlp(), grid, balance=measure(9), schedule=SCHEDULES[args.schedule])
    watch = Watch()
    pipe = gradient(net, cross_entropy, grid, MICROBATCHES, watch=watch)
    one = place(mlp(), alone)
    whole, cut = (gradient(one, cross_entropy, alone, microbatches) for microbatches in (1, MICROBATCHES))

    def alone_on_rank_0(step):
        return lambda: step(x, y) if grid.rank == 0 else None

    def predict():
        """The machine's speed changes from second to second, so each round has its own prediction."""
        return simulate(net.schedule, STAGES, MICROBATCHES, **measure(1).chunks(net.bounds)).makespan

    runs = [lambda: seconds(lambda: pipe(x, y)), predict, lambda: seconds(alone_on_rank_0(whole)),
            lambda: seconds(alone_on_rank_0(cut))]
    for run in runs:
        run()
    times = alternate(*runs)
    timelines = watch.draw(grid, args.draw)
    bubble = simulate(net.schedule, STAGES, MICROBATCHES).bubble
    say(f"MLP of 8 layers of {args.width}, {MICROBATCHES} micro-batches of {args.microbatch}, {args.schedule}, {STAGES} stages "
        f"(bubble {bubble:.1%})\n{net.report()}")
    for name, column in zip(("pipeline", "simulated", "one rank", "one rank, micro-batches"), times.T, strict=True):
        ratio = column / times[:, 0]
        say(f"  {name:24} {1e3 * np.median(column):7.1f} ms (quartiles {_quartiles(1e3 * column, '.1f')}), "
            f"{np.median(ratio):.2f} times the pipeline (quartiles {_quartiles(ratio, '.2f')})")
    say(timelines)


def _quartiles(values, form):
    low, high = np.quantile(values, [0.25, 0.75])
    return f"{low:{form}} to {high:{form}}"


def balance():
    size = MICROBATCHES * 8
    x = rng.standard_normal((size, 3, 32, 32)).astype(np.float32)
    y = rng.integers(0, 10, size)
    costs = profile(conv_net(), x[:8], grid, cross_entropy, y[:8])
    nets = {"parameters": place(conv_net(), grid), "measured cost": place(conv_net(), grid, balance=costs)}
    by_parameters, by_cost = (gradient(net, cross_entropy, grid, MICROBATCHES) for net in nets.values())
    by_parameters(x, y), by_cost(x, y)
    times = alternate(lambda: seconds(lambda: by_parameters(x, y)), lambda: seconds(lambda: by_cost(x, y)))
    for (name, net), column in zip(nets.items(), times.T, strict=True):
        say(f"\nconv net, cut by {name}: {1e3 * np.median(column):.1f} ms\n{net.report()}")
    ratio = times[:, 0] / times[:, 1]
    say(f"\ncut by parameters / cut by measured cost: {np.median(ratio):.2f} (quartiles {_quartiles(ratio, '.2f')})")


pipeline_against_one_rank()
balance()
