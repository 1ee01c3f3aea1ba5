"""The gradient sum: one all-reduce over the ranks, in shared memory where they share a node."""

import numpy as np
from mpi4py import MPI

from . import shared


class PlainSum:
    """A vector and its sum over the ranks of a communicator, by MPI's all-reduce."""

    def __init__(self, comm, size, dtype):
        self._comm = comm
        self.vector = np.zeros(size, dtype)

    def __call__(self):
        """Replace ``vector`` by the sum over all ranks."""
        if self._comm.size > 1:
            self._comm.Allreduce(MPI.IN_PLACE, self.vector, MPI.SUM)


def summation(grid, size, dtype):
    """A vector of this rank and the way to sum it over the replicas of its stage: the fastest that this grid allows.

    To be called on all ranks together; ``size`` may differ from stage to stage.

    Returns
    -------
    object with ``vector``, a (size,) array of zeros, and ``__call__()``, which replaces it by the sum
    """
    near, across = grid.near, grid.across
    # Slices are summed across nodes by ranks of equal number, so the nodes must be alike. All ranks choose
    # alike, before any of them makes memory: a rank of a node of mean size may see less than its neighbour.
    alike = grid.all(near.size > 1 and across.size * near.size == grid.data)
    memory = shared.allocate(near, size, dtype) if alike else None
    if not grid.all(memory is not None):
        return PlainSum(grid.replicas, size, dtype)
    return shared.SharedSum(memory, near, across if across.size > 1 else None, size, dtype)
