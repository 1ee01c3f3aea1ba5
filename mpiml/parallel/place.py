"""Placing a model on a grid: each rank allocates and fills the part it holds."""

import numpy as np


def place(model, grid, seed=0, dtype=np.float32):
    """Give the model memory on every rank: on a grid of replicas, all of it on each.

    The weights are functions of (seed, name), so nothing is sent but a check that all ranks build the same model.

    Parameters
    ----------
    model : mpiml.nn.Module
    grid : mpiml.parallel.Grid
    seed : int
    dtype : float32 or float64

    Returns
    -------
    mpiml.nn.Module
        The model, initialised.

    Raises
    ------
    mpiml.parallel.RankError
        The ranks were given different models, seeds or dtypes.
    """
    grid.same("the model, its seed and dtype", (model, seed, np.dtype(dtype).name))
    return model.init(seed, dtype)
