"""The gradient sum: one all-reduce over the ranks."""

from mpi4py import MPI


def all_reduce(grid, vector):
    """Replace ``vector``, contiguous and of one length on all ranks, by its sum over the replicas, in place."""
    if grid.data > 1:
        grid.comm.Allreduce(MPI.IN_PLACE, vector, MPI.SUM)
