"""What each rank was doing: time spent computing, communicating and waiting; the progress bar."""

import os
import sys
from time import perf_counter

import numpy as np
from mpi4py import MPI


class Watch:
    """Durations of the steps of this rank, compared with those of the others when asked.

    An all-reduce lasts from a rank's arrival until the sum is there. The last rank to arrive waits for nobody, so
    the shortest time among the ranks is communication, and what the others spent beyond it is waiting. No
    barrier is needed to tell the two apart.
    """

    def __init__(self):
        self.restart()

    def restart(self):
        """Forget what was recorded and start anew."""
        self.start = perf_counter()
        self._steps = []

    def record(self, compute, reduce):
        """Note a step: seconds until this rank was ready, and seconds in the all-reduce."""
        self._steps.append((compute, reduce))

    def times(self, grid):
        """{"compute", "communicate", "wait", "other"}: seconds since the start, (ranks,) arrays, on every rank.

        To be called on all ranks together.
        "other" is all that is not in a step: reading data, the optimizer, evaluation.
        """
        wall = perf_counter() - self.start
        mine = np.array(self._steps, float).reshape(-1, 2).T
        grid.same("the number of recorded steps", mine.shape[1])
        compute, reduce = np.ascontiguousarray(mine)
        communicate = np.empty_like(reduce)
        grid.comm.Allreduce(reduce, communicate, MPI.MIN)
        sums = np.empty((grid.size, 3))
        grid.comm.Allgather(np.array([compute.sum(), (reduce - communicate).sum(), wall]), sums)
        compute, wait, walls = sums.T
        communicate = np.full(grid.size, communicate.sum())
        return {"compute": compute, "communicate": communicate, "wait": wait,
                "other": walls - compute - communicate - wait}

    def report(self, grid):
        """Two lines that compare the rank that computed longest with the one that computed shortest.

        To be called on all ranks together.
        """
        times = self.times(grid)
        compute = times["compute"]
        lines = []
        for word, rank in ("slowest", compute.argmax()), ("fastest", compute.argmin()):
            total = sum(part[rank] for part in times.values())
            lines.append(f"{word} rank {rank}: " + ", ".join(
                f"{name} {part[rank]:.2f} s ({part[rank] / total:.0%})" for name, part in times.items()))
        return "\n".join(lines)


def progress(iterable, grid, description=""):
    """``iterable``, with a progress bar from rank 0 if the job's error stream is a terminal; else as it is."""
    if grid.rank or not _terminal():
        return iterable
    try:
        from tqdm import tqdm
    except ImportError:
        return iterable
    return tqdm(iterable, description, leave=False, dynamic_ncols=True)


def _terminal():
    """Whether what this rank writes to stderr ends at a terminal, if need be through the launcher's pipe."""
    if sys.stderr.isatty():
        return True
    launchers = {"mpirun", "mpiexec", "mpiexec.hydra", "prterun", "orterun"}
    process = os.getppid()
    try:
        while process > 1:
            with open(f"/proc/{process}/stat") as file:
                name, rest = file.read().split("(", 1)[1].rsplit(")", 1)
            if name in launchers:
                return os.readlink(f"/proc/{process}/fd/2").startswith(("/dev/pts/", "/dev/tty"))
            process = int(rest.split()[1])
    except (OSError, ValueError, IndexError):
        pass  # no /proc, or not ours to read
    return False
