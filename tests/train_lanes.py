"""Trains a little and prints a digest of all weights: started by test_lanes.py on many grids."""

import argparse
import hashlib
import itertools
import os
import signal
import threading

import numpy as np

from mpiml import schedule
from mpiml.data import batches
from mpiml.nn import BatchNorm2d, Conv2d, Dropout, Flatten, Linear, MaxPool2d, Sequential
from mpiml.ops import cross_entropy, relu
from mpiml.optim import Adam, clip_norm


def mlp():
    return Sequential(Linear(20, 32), relu, Dropout(0.2), Linear(32, 16), relu, Linear(16, 10))


def conv_net():
    return Sequential(Conv2d(1, 4, 3, padding=1), BatchNorm2d(4, samples=4), relu, MaxPool2d(2), Conv2d(4, 8, 3), relu,
                      Dropout(0.2), Flatten(), Linear(72, 10))


MODELS = {"mlp": mlp, "conv_net": conv_net}


def problem(model, samples):
    rng = np.random.default_rng(5)
    shape = (20,) if model == "mlp" else (1, 10, 10)
    return rng.standard_normal((samples, *shape), np.float32), rng.integers(0, 10, samples)


def train(net, step, x, y, size, steps, lost=(), **options):
    """Train by Adam with clipping, and try again after the exceptions ``lost``; the losses."""
    optimizer, losses = Adam(net, lr=0.01), []
    for epoch in itertools.count():
        for bx, by in batches(x, y, size, epoch=epoch, **options):
            try:
                losses.append(step(bx, by))
            except lost:
                continue
            clip_norm(net, 1.0)
            optimizer.step()
            if len(losses) == steps:
                return losses


def digest(weights):
    """SHA-256 of all weights, by their names."""
    return hashlib.sha256(b"".join(weights[name].tobytes() for name in sorted(weights))).hexdigest()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=MODELS, default="mlp")
    parser.add_argument("--pipe", type=int, default=1)
    parser.add_argument("--schedule", default="one_f_one_b")
    parser.add_argument("--die", nargs=2, action="append", default=[], metavar=("RANK", "SECONDS"),
                        help="this rank kills itself so many seconds after the first step")
    parser.add_argument("--ahead", type=int, default=0, help="batches that a thread reads ahead")
    parser.add_argument("--evaluate", type=int, metavar="RANK",
                        help="evaluate between each batch and its step; this rank kills itself the tenth time")
    parser.add_argument("--fail", type=int, metavar="RANK", help="MPI fails on this rank, once, and nobody dies")
    args = parser.parse_args()

    from mpi4py import MPI

    from mpiml.parallel import Grid, RanksLost, evaluate, gradient, place

    grid = Grid(pipe=args.pipe, lanes=16)
    net = place(MODELS[args.model](), grid, seed=1, schedule=getattr(schedule, args.schedule))
    step = gradient(net, cross_entropy, grid)
    x, y = problem(args.model, 1200)
    evaluate(net, x, y, {"loss": cross_entropy}, grid)
    for rank, seconds in args.die:
        if grid.rank == int(rank):
            threading.Timer(float(seconds), os.kill, (os.getpid(), signal.SIGKILL)).start()
    if grid.rank == args.fail:
        def broken(*_):
            raise RanksLost("MPI failed") from MPI.Exception(MPI.ERR_NO_MEM)

        grid.replicas.Alltoallv = broken

    calls, dies = itertools.count(), grid.rank == args.evaluate

    def metric(output, target):
        if dies and next(calls) == 10:
            os.kill(os.getpid(), signal.SIGKILL)
        return cross_entropy(output, target)

    def evaluated(bx, by):
        evaluate(net, x[:100], y[:100], {"loss": metric}, grid, size=25)
        return step(bx, by)

    train(net, step if args.evaluate is None else evaluated, x, y, 512, 50, RanksLost, grid=grid,
          multiple=4 if args.model == "conv_net" else 1, ahead=args.ahead)
    weights = net.collect()
    if grid.rank == 0:
        print("weights", digest(weights))
