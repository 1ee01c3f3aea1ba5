"""The gradient sum: one all-reduce over the ranks, in shared memory where they share a node."""

import numpy as np
from mpi4py import MPI

from mpiml.data.batches import share
from mpiml.lanes import Node, add_rows, cover, program, root

from . import shared


class AllReduce:
    """The sum over the ranks of a communicator, in whatever order MPI adds."""

    def __init__(self, comm):
        self._comm = comm

    def __call__(self, rows):
        """Replace ``rows[0]`` of (1, size) rows by the sum over all ranks."""
        if self._comm.size > 1:
            self._comm.Allreduce(MPI.IN_PLACE, rows[0], MPI.SUM)


class TreeSum:
    """The sum over the ranks of a communicator, in the order of the lanes' tree (see :mod:`mpiml.lanes`).

    A reduce-scatter and an all-gather: each rank gets a slice of all rows of all ranks, adds them up, and hands out its
    slice of the sum.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm
    nodes : list of lists of Node
        Which node of the tree each row of each rank is.
    lanes : int
    """

    def __init__(self, comm, nodes, lanes):
        self._comm, self._counts = comm, np.array([len(some) for some in nodes])
        self._program = program([node for some in nodes for node in some], [root(lanes)], lanes)

    def __call__(self, rows):
        """Replace ``rows[0]`` of (n, size) rows, one for each of this rank's nodes, by the sum over all ranks."""
        comm, size = self._comm, rows.shape[1]
        if comm.size == 1:
            return  # there is one row, the root
        bounds = [share(size, rank, comm.size) for rank in range(comm.size)]
        widths = np.array([stop - start for start, stop in bounds])
        sent = np.concatenate([rows[:, start:stop].ravel() for start, stop in bounds])
        width = int(widths[comm.rank])
        received = np.empty((int(self._counts.sum()), width), rows.dtype)
        comm.Alltoallv([sent, widths * len(rows)], [received, self._counts * width])
        result = np.empty((1, width), rows.dtype)
        add_rows(received, self._program, 0, width, result)
        comm.Allgatherv(result, [rows[0], widths])


class PlainSum:
    """Rows of numbers of this rank, and their sum over the ranks by messages.

    Attributes
    ----------
    rows : list of (size,) arrays
        This rank's. The first is also where the sum will be.
    """

    def __init__(self, combine, count, size, dtype):
        self._combine, self._all = combine, np.zeros((count, size), dtype)
        self.rows = list(self._all)

    def __call__(self):
        """Replace the first row by the sum over all ranks."""
        self._combine(self._all)


def held(grid, replica):
    """First lane of a replica, and the one behind its last."""
    return share(grid.lanes, replica, grid.data)


def summation(grid, size, dtype):
    """Rows of this rank and the way to sum them over the replicas of its stage: the fastest that this grid allows.

    To be called on all ranks together; ``size`` may differ from stage to stage.

    Returns
    -------
    object with ``rows`` and ``__call__()``
        Arrays (size,) of zeros; the call replaces the first by the sum. There is one on each rank or, with lanes, one for
        each of the nodes that cover this replica's lanes.
    """
    near, across, lanes = grid.near, grid.across, grid.lanes

    def nodes(replicas):
        return cover([lane for replica in replicas for lane in range(*held(grid, replica))], lanes)

    # Slices are summed across nodes by ranks of equal number, so the nodes must be alike. All ranks choose
    # alike, before any of them makes memory: a rank of a node of mean size may see less than its neighbour.
    # A rank that died could not be told from a late one there, so an elastic grid adds by messages.
    memory, alike = None, grid.all(not grid.elastic and 1 < near.size <= shared.MOST and across.size * near.size == grid.data)
    if alike:
        here = np.empty(near.size, np.int64)  # replicas on this node
        near.Allgather(np.array([grid.replica]), here)
        everywhere = np.empty((across.size, near.size), np.int64)
        across.Allgather(here, everywhere)
        if lanes:
            given, wanted, of = [nodes([replica]) for replica in here], nodes(here), lanes
            combine = TreeSum(across, [nodes(replicas) for replicas in everywhere], lanes)
        else:
            given, wanted, of = [[Node(0, rank)] for rank in range(near.size)], [root(near.size)], near.size
            combine = AllReduce(across)
        counts = [len(some) for some in given]
        memory = shared.allocate(near, shared.bytes_of(sum(counts) + len(wanted), size, dtype))
    if grid.all(memory is not None):
        additions = program([node for some in given for node in some], wanted, of)
        return shared.SharedSum(memory, near, counts, additions, len(wanted), combine if across.size > 1 else None, size, dtype)
    everyones = [nodes([replica]) if lanes else [None] for replica in range(grid.data)]
    combine = TreeSum(grid.replicas, everyones, lanes) if lanes else AllReduce(grid.replicas)
    return PlainSum(combine, len(everyones[grid.replica]), size, dtype)
