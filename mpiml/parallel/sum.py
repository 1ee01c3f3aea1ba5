"""The gradient sum: one all-reduce over the ranks, in shared memory where they share a node."""

import numpy as np
from mpi4py import MPI

from . import shared


def all_reduce(grid, vector):
    """Replace ``vector``, contiguous and of one length on all ranks, by its sum over the replicas, in place."""
    if grid.data > 1:
        grid.comm.Allreduce(MPI.IN_PLACE, vector, MPI.SUM)


class PlainSum:
    """A vector and its sum over the ranks, by MPI's all-reduce."""

    def __init__(self, grid, size, dtype):
        self._grid = grid
        self.vector = np.zeros(size, dtype)

    def __call__(self):
        """Replace ``vector`` by the sum over all ranks."""
        all_reduce(self._grid, self.vector)


def summation(grid, size, dtype):
    """A vector of this rank and the way to sum it over all ranks: the fastest that this grid allows.

    Returns
    -------
    object with ``vector``, a (size,) array of zeros, and ``__call__()``, which replaces it by the sum
    """
    node, across = grid.node, grid.across
    # Slices are summed across nodes by ranks of equal number, so the nodes must be alike. All ranks choose
    # alike, before any of them makes memory: a rank of a node of mean size may see less than its neighbour.
    alike = grid.all(node.size > 1 and across.size * node.size == grid.size)
    memory = shared.allocate(node, size, dtype) if alike else None
    if not grid.all(memory is not None):
        return PlainSum(grid, size, dtype)
    return shared.SharedSum(memory, node, across if across.size > 1 else None, size, dtype)
