"""Trains a little with checkpoints, and dies where it is told to; started by test_killed.py, which looks how it goes on."""

import argparse
import hashlib
import os
import signal

from train_lanes import mlp, problem

from mpiml.data import batches
from mpiml.ops import cross_entropy
from mpiml.optim import Adam
from mpiml.save import Checkpoints
from mpiml.save.folder import Folder
from mpiml.save.state import State
from mpiml.save.writing import Writing

LANES, SIZE, EVERY = 16, 512, 3
PLACES = {f"{owner.__name__}.{name}": owner for owner, name in (
    (State, "copies"), (Folder, "make"), (Folder, "name"), (Folder, "_prune"), (Writing, "start"), (Writing, "report"))}


def digest(optimizer):
    """SHA-256 of the weights and moments."""
    vectors = [optimizer.model.vector, *(getattr(optimizer, name) for name in optimizer.moments)]
    return hashlib.sha256(b"".join(vector.tobytes() for vector in vectors)).hexdigest()


def train(step, optimizer, steps, lost=(), checkpoints=None, grid=None):
    """Train up to so many steps, from where the optimizer is; yields after each."""
    x, y = problem("mlp", 1200)
    length = len(batches(x, y, SIZE, grid=grid))
    while optimizer.steps < steps:
        epoch, start = divmod(optimizer.steps, length)
        for bx, by in batches(x, y, SIZE, epoch=epoch, start=start, grid=grid):
            try:
                step(bx, by)
            except lost:
                continue
            optimizer.step()
            if checkpoints:
                checkpoints.step()
            yield
            if optimizer.steps == steps:
                break


def die_at(place, steps, optimizer):
    """Kill this process when it comes to a function of mpiml.save after so many steps."""
    owner, name = PLACES[place], place.split(".")[1]
    function = getattr(owner, name)

    def call(*args):
        if optimizer.steps >= steps:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args)

    setattr(owner, name, call)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("steps", type=int)
    parser.add_argument("--die", nargs=3, action="append", default=[], metavar=("RANK", "PLACE", "STEPS"))
    args = parser.parse_args()

    from mpiml.parallel import Grid, RanksLost, gradient, place

    grid = Grid(lanes=LANES)
    model = place(mlp(), grid, seed=1)
    optimizer = Adam(model, lr=0.01)
    step = gradient(model, cross_entropy, grid)
    checkpoints = Checkpoints(args.folder, optimizer, minutes=None, every=EVERY)
    checkpoints.load()
    for rank, where, steps in args.die:
        if grid.rank == int(rank):
            die_at(where, int(steps), optimizer)
    if grid.rank == 0:
        print("begins after", optimizer.steps, flush=True)
    for _ in train(step, optimizer, args.steps, RanksLost, checkpoints, grid):
        pass
    checkpoints.save()
    if grid.rank == 0:
        print("ends on", grid.size, digest(optimizer), flush=True)


if __name__ == "__main__":
    main()
