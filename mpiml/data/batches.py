"""Batches of a data set: this rank's share of each, every sample exactly once per epoch."""

import numpy as np

from mpiml.random import generator


def share(n, rank, ranks, multiple=1, lanes=None):
    """(start, stop) of the contiguous run of ``n`` items that falls to ``rank``; sizes differ by one at most.

    With ``multiple``, every run starts at a multiple of it and sizes differ by one multiple at most. With ``lanes``, the
    items are first cut into this many runs, of which each rank gets some.

    >>> [share(10, rank, 4) for rank in range(4)]
    [(0, 2), (2, 5), (5, 7), (7, 10)]
    >>> [share(10, rank, 2, multiple=4) for rank in range(2)]
    [(0, 4), (4, 10)]
    >>> [share(12, rank, 3, lanes=4) for rank in range(3)]
    [(0, 3), (3, 6), (6, 12)]
    """
    lanes = lanes or ranks
    units = -(-n // multiple)
    first, stop = lanes * rank // ranks, lanes * (rank + 1) // ranks
    return min(n, units * first // lanes * multiple), min(n, units * stop // lanes * multiple)


class batches:
    """The batches of one epoch, as pairs (x, y) of this rank's shares; ``len`` is their number.

    Each global batch is a run of ``size`` samples of the epoch's order (the last batch may be smaller), and each
    rank gets a contiguous run of it. So every sample is used exactly once per epoch, at any number of ranks and
    any batch size; in a last batch of fewer samples than ranks some shares are empty, of length 0.

    Parameters
    ----------
    x, y : arrays (n, ...), or anything of that length that takes an array of integers as an index
    size : int
        Samples in a global batch, over all ranks together.
    epoch, seed : int
        The order is a function of these two alone.
    shuffle : bool
        False keeps the order of the data.
    grid : mpiml.parallel.Grid, optional
        The ranks that share each batch, and its lanes; without it there is one rank.
    multiple : int
        Each share starts at a multiple of this many samples, see :class:`mpiml.nn.BatchNorm2d`.
    transform : function of an array, optional
        Applied to each share of x, such as a conversion of pixels to floats.
    start : int
        The first so many batches of the epoch are left out: a training that goes on has had them.

    Raises
    ------
    ValueError
        There are no samples, fewer samples or smaller batches than ranks, x and y differ in length, or ``size`` or
        ``multiple`` is not a whole number above 0.
    mpiml.parallel.RankError
        The ranks hold data of different lengths, or ask for different batches.

    Examples
    --------
    >>> [y.tolist() for x, y in batches(np.zeros((5, 2)), np.arange(5), size=2, shuffle=False)]
    [[0, 1], [2, 3], [4]]
    """

    def __init__(self, x, y, size, *, epoch=0, seed=0, shuffle=True, grid=None, multiple=1, transform=None, start=0):
        ranks = grid.data if grid else 1
        for name, value in ("size", size), ("multiple", multiple):
            if not isinstance(value, (int, np.integer)) or value < 1:
                raise ValueError(f"{name} is a number of samples, a whole number above 0, not {value!r}")
        if grid:
            grid.same("the number of samples, the batch size, epoch, seed, shuffle, multiple and start",
                      (len(x), int(size), epoch, seed, shuffle, int(multiple), start))
        if len(x) != len(y):
            raise ValueError(f"x has {len(x)} samples but y has {len(y)}")
        if len(x) < ranks:
            raise ValueError(f"{len(x)} samples cannot be shared by {ranks} ranks: every rank needs one at least, so "
                             f"use {len(x)} ranks at most" if len(x) else "the data set is empty: no samples")
        if size < ranks * multiple:
            raise ValueError(f"a batch of {size} cannot be shared by {ranks} ranks in multiples of {multiple}: use a "
                             f"size of {ranks * multiple} at least, or fewer ranks")
        self.x, self.y, self.size, self.transform = x, y, size, transform
        self.grid, self.multiple = grid, multiple
        if not isinstance(start, (int, np.integer)) or not 0 <= start * size < len(x):
            raise ValueError(f"start is the number of a batch, from 0 to {-(-len(x) // size) - 1}, not {start!r}")
        self.start = start
        self.order = generator(seed, "shuffle", epoch).permutation(len(x)) if shuffle else np.arange(len(x))

    def __len__(self):
        return -(-len(self.x) // self.size) - self.start

    def __iter__(self):
        grid = self.grid
        for begin in range(self.start * self.size, len(self.x), self.size):
            batch = self.order[begin:begin + self.size]
            tries = None
            # Once, and once more in other shares whenever a step was undone. Ranks that were lost elsewhere, in an evaluation
            # after the step, say, undid none.
            while tries != (now := grid.undone if grid else 0):
                tries = now
                rank, ranks, lanes = (grid.replica, grid.data, grid.lanes) if grid else (0, 1, None)
                if grid:
                    grid.stale = False
                start, stop = share(len(batch), rank, ranks, self.multiple, lanes)
                mine = batch[start:stop]
                x = self.x[mine]
                yield (self.transform(x) if self.transform else x), self.y[mine]
