"""Evaluation, spread over the ranks and combined exactly."""

import math

import numpy as np

from mpiml.data.batches import share

from .sum import all_reduce


def evaluate(model, x, y, metrics, grid, size=256, transform=None):
    """Mean of each metric over all samples: of equal weights the same number, to the last bit, on any number of ranks.

    To be called on all ranks together.

    The data are cut into chunks of ``size`` samples, whatever the number of ranks; each rank computes a run of
    chunks, and the sums of the chunks are added up exactly.

    Parameters
    ----------
    model : mpiml.nn.Module or function
    x, y : arrays (n, ...), the same on all ranks
    metrics : {name: function of (output, target)}
        Each returns a sum over the samples, such as :func:`mpiml.ops.cross_entropy` or
        :func:`mpiml.metrics.correct`.
    grid : mpiml.parallel.Grid
    transform : function of an array, optional
        Applied to each chunk of x.

    Returns
    -------
    {name: float}

    Raises
    ------
    ValueError
        There is nothing to evaluate.
    """
    if len(x) == 0 or len(x) != len(y):
        raise ValueError(f"evaluation needs samples, as many in x as in y: x has {len(x)} and y has {len(y)}")
    grid.same("the number of samples and the size of a chunk", (len(x), size))
    chunks = -(-len(x) // size)
    sums = np.zeros((chunks, len(metrics)))
    for chunk in range(*share(chunks, grid.replica, grid.data)):
        part = slice(chunk * size, (chunk + 1) * size)
        output = model(transform(x[part]) if transform else x[part])
        sums[chunk] = [float(metric(output, y[part])) for metric in metrics.values()]
    all_reduce(grid, sums)  # adds zeros only, which is exact
    return {name: math.fsum(column) / len(x) for name, column in zip(metrics, sums.T, strict=True)}
