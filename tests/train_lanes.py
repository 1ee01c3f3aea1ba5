"""Trains a little and prints a digest of all weights: started by test_lanes.py on many grids."""

import argparse
import hashlib

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


def problem(model, samples):
    rng = np.random.default_rng(5)
    shape = (20,) if model is mlp else (1, 10, 10)
    return rng.standard_normal((samples, *shape), np.float32), rng.integers(0, 10, samples)


def train(net, step, x, y, size, steps, **where):
    optimizer, done, epoch = Adam(net, lr=0.01), 0, 0
    while done < steps:
        for bx, by in batches(x, y, size, epoch=epoch, **where):
            step(bx, by)
            clip_norm(net, 1.0)
            optimizer.step()
            done += 1
            if done == steps:
                break
        epoch += 1


def digest(weights):
    return hashlib.sha256(b"".join(weights[name].tobytes() for name in sorted(weights))).hexdigest()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="mlp")
    parser.add_argument("--pipe", type=int, default=1)
    parser.add_argument("--schedule", default="one_f_one_b")
    parser.add_argument("--lanes", type=int, default=16)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args()

    from mpiml.parallel import Grid, gradient, place

    model = {"mlp": mlp, "conv_net": conv_net}[args.model]
    grid = Grid(pipe=args.pipe, lanes=args.lanes)
    net = place(model(), grid, seed=1, schedule=getattr(schedule, args.schedule))
    step = gradient(net, cross_entropy, grid)
    train(net, step, *problem(model, 1200), args.batch, args.steps, grid=grid,
          multiple=4 if model is conv_net else 1)
    weights = net.collect()
    if grid.rank == 0:
        print("weights", digest(weights))
