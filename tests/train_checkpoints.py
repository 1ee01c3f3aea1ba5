"""Trains a little with checkpoints, and is disturbed as it is told to.

Started by test_killed.py and random_faults.py, which look how it ends, and how it goes on.
"""

import argparse
import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time

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


def train(step, optimizer, steps, lost=(), save=None, grid=None):
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
            if save:
                save()
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


def segments():
    """The shared memory of this process that MPICH and mpiml could leave behind; Open MPI's is swept by its own daemon."""
    with open("/proc/self/maps") as maps:
        return {line.split()[5] for line in maps if "/dev/shm/mpi" in line}


class Fault:
    """Something that happens to this process at a random moment.

    Parameters
    ----------
    kind : str
        ``raise``, ``stop``, ``fill`` (the disk), ``kill`` (the whole job), or what is left out once: ``step``, ``save``, or
        ``collective``, a message of mpiml's to all.
    step, delay : int, float
        So many seconds after so many steps, or after the start of MPI if these are -1.
    passes : float or None
        A process that is stopped goes on, and a full disk has room again, after so many seconds.
    folder : str
        On the disk.
    """

    def __init__(self, kind, step, delay, passes, folder):
        self.kind, self.at, self.delay, self.passes, self.folder = kind, step, delay, passes, folder
        self.leave_out = None
        self.timer = threading.Timer(delay, self.happen)
        self.timer.daemon = True
        signal.signal(signal.SIGALRM, self.throw)
        self.when(-1)

    def when(self, step):
        """The training is at this step."""
        if step == self.at:
            self.timer.start()

    def happen(self):
        sys.stderr.write(f"SEGMENTS {' '.join(segments())}\nFAULT {time.time()}\n")
        sys.stderr.flush()
        if self.kind == "raise":
            signal.raise_signal(signal.SIGALRM)  # whose handler runs in the main thread, wherever that is
        elif self.kind == "stop":
            if self.passes:
                subprocess.Popen(["sh", "-c", f"sleep {self.passes}; kill -CONT {os.getpid()}"])
            os.kill(os.getpid(), signal.SIGSTOP)
        elif self.kind == "fill":
            self.fill()
        elif self.kind == "kill":
            self.kill_all()
        else:
            self.leave_out = self.kind

    def throw(self, *_):
        raise LookupError("this rank cannot go on")

    def fill(self):
        end, path = time.monotonic() + (self.passes or 3600), os.path.join(os.path.dirname(self.folder), "full")
        with open(path, "wb", buffering=0) as file:
            while time.monotonic() < end:
                with contextlib.suppress(OSError):
                    file.write(bytes(4096))
                    continue
                time.sleep(0.001)  # for the moment it is full
        os.remove(path)

    def kill_all(self):
        mark, me = f"MPIML_TEST_JOB={os.environ['MPIML_TEST_JOB']}".encode(), os.getpid()
        for pid in [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != me]:
            with contextlib.suppress(OSError), open(f"/proc/{pid}/environ", "rb") as file:
                if mark in file.read():
                    os.kill(pid, signal.SIGKILL)
        os.kill(me, signal.SIGKILL)

    def may_leave_out(self, what, function):
        def call(*args):
            if self.leave_out == what:
                self.leave_out = None
                return None
            return function(*args)

        return call

    def may_leave_out_collectives(self):
        from mpiml.parallel.group import Group
        from mpiml.parallel.shared import SharedSum

        for owner, names in (Group, ("Allgather", "Allgatherv", "Allreduce", "Alltoallv", "Barrier", "Bcast")), (
                SharedSum, ("__call__",)):
            for name in names:
                setattr(owner, name, self.may_leave_out("collective", getattr(owner, name)))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("steps", type=int)
    parser.add_argument("--pipe", type=int, default=1)
    parser.add_argument("--patient", action="store_true", help="go on where a checkpoint could not be saved")
    parser.add_argument("--die", nargs=3, action="append", default=[], metavar=("RANK", "PLACE", "STEPS"))
    parser.add_argument("--fault", nargs=4, metavar=("KIND", "RANK", "STEP", "DELAY"), help="see Fault")
    parser.add_argument("--passes", type=float, metavar="SECONDS", help="the fault")
    args = parser.parse_args()

    from mpi4py import MPI

    from mpiml.parallel import Grid, RankError, RanksLost, gradient, place

    fault = None
    if args.fault and MPI.COMM_WORLD.rank == int(args.fault[1]):
        kind, _, step, delay = args.fault
        fault = Fault(kind, int(step), float(delay), args.passes, args.folder)
        fault.may_leave_out_collectives()
    grid = Grid(pipe=args.pipe, lanes=LANES)
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

    def save():
        with contextlib.suppress(*[RankError] * args.patient):
            checkpoints.step()

    if fault:
        step, save = fault.may_leave_out("step", step), fault.may_leave_out("save", save)
    for _ in train(step, optimizer, args.steps, RanksLost, save, grid):
        if fault:
            fault.when(optimizer.steps)
    while True:
        try:
            checkpoints.save()
            break
        except RankError:
            if not args.patient:
                raise
    if grid.rank == 0:
        print("ends on", grid.size, digest(optimizer) if args.pipe == 1 else "", flush=True)
    if fault and fault.kind == "raise":
        fault.timer.cancel()  # what is raised after the program means nothing


if __name__ == "__main__":
    main()
