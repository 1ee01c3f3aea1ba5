"""Evaluation, spread over the ranks and combined exactly."""

import math

import numpy as np
from mpi4py import MPI

from .predict import runs_of, stream
from .recorder import recorder


def evaluate(model, x, y, metrics, grid, size=256, transform=None):
    """Mean of each metric over all samples: of equal weights the same number, to the last bit, on any number of replicas.

    To be called on all ranks together.

    The data are cut into runs of ``size`` samples, whatever the number of ranks; each replica computes some of the runs,
    and their sums are added up exactly.

    Parameters
    ----------
    model : Part, or function of an array
        What :func:`mpiml.parallel.place` returned; or a function that each rank has.
    x, y : arrays (n, ...), the same on all ranks
    metrics : {name: function of (output, target)}
        Each returns a sum over the samples, such as :func:`mpiml.ops.cross_entropy` or
        :func:`mpiml.metrics.correct`.
    grid : mpiml.parallel.Grid
    size : int
        Samples that pass through a stage together.
    transform : function of an array, optional
        Applied to each run of x.

    Returns
    -------
    {name: float}
        The same on all ranks.

    Raises
    ------
    ValueError
        There is nothing to evaluate.
    """
    with recorder.at("evaluate"):
        return grid.again(_evaluate, model, x, y, metrics, grid, size, transform)


def _evaluate(model, x, y, metrics, grid, size, transform):
    grid.same("the numbers of samples in x and y", (len(x), len(y)))
    if len(x) == 0 or len(x) != len(y):
        raise ValueError(f"evaluation needs samples, as many in x as in y: x has {len(x)} and y has {len(y)}")
    runs = runs_of(x, grid, size)
    sums = np.zeros((-(-len(x) // size), len(metrics)))
    for (start, stop), output in stream(model, x, grid, runs, transform):
        sums[start // size] = [float(metric(output, np.asarray(y[start:stop]))) for metric in metrics.values()]
    grid.comm.Allreduce(MPI.IN_PLACE, sums, MPI.SUM)  # adds zeros only, which is exact
    return {name: math.fsum(column) / len(x) for name, column in zip(metrics, sums.T, strict=True)}
