"""Batches of a data set: this rank's share of each, every sample exactly once per epoch."""

import contextlib
import hashlib

import numpy as np

from mpiml.random import generator

from .prefetch import prefetching


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
    augment : function of (array, samples, epoch), optional
        Applied to each share of x before ``transform``. ``samples`` (int array) are the positions of its rows in the data set:
        what is random should be a function of those, the epoch and a seed, so that it is the same on any grid.
    start : int
        The first so many batches of the epoch are left out: a training that goes on has had them.
    ahead : int
        So many batches are read, augmented and transformed ahead, in a thread, while the model computes: where that takes
        time, and there is a core for it or it waits for a disk. What it calls must not call MPI.

    Raises
    ------
    ValueError
        There are no samples, fewer samples or smaller batches than ranks, x and y differ in length, or ``size`` or
        ``multiple`` is not a whole number above 0, ``start`` or ``ahead`` not one from 0.
    mpiml.parallel.RankError
        The ranks hold data of different lengths, or ask for different batches.

    Examples
    --------
    >>> [y.tolist() for x, y in batches(np.zeros((5, 2)), np.arange(5), size=2, shuffle=False)]
    [[0, 1], [2, 3], [4]]
    """

    def __init__(self, x, y, size, *, epoch=0, seed=0, shuffle=True, grid=None, multiple=1, transform=None, augment=None,
                 start=0, ahead=0):
        ranks = grid.data if grid else 1
        for name, value in ("size", size), ("multiple", multiple):
            if not isinstance(value, (int, np.integer)) or value < 1:
                raise ValueError(f"{name} is a number of samples, a whole number above 0, not {value!r}")
        if grid:
            grid.same("what the batches are made of", {"samples": len(x), "size": int(size), "epoch": epoch, "seed": seed,
                                                       "shuffle": shuffle, "multiple": int(multiple), "start": start})
        if len(x) != len(y):
            raise ValueError(f"x has {len(x)} samples but y has {len(y)}")
        if len(x) < ranks:
            raise ValueError(f"{len(x)} samples cannot be shared by {ranks} ranks: every rank needs one at least, so "
                             f"use {len(x)} ranks at most" if len(x) else "the data set is empty: no samples")
        if size < ranks * multiple:
            raise ValueError(f"a batch of {size} cannot be shared by {ranks} ranks in multiples of {multiple}: use a "
                             f"size of {ranks * multiple} at least, or fewer ranks")
        if grid and grid.pipe == 1:  # of a pipeline, only some stages need x, and some y
            grid.same("some of the samples, which each rank needs all of, and batches shares out (of a table that ranks have "
                      "read in parts: grid.rows(array)),", [_digest(x), _digest(y)])
        self.x, self.y, self.size, self.transform = x, y, size, transform
        self.augment, self.epoch, self.grid, self.multiple = augment, epoch, grid, multiple
        if not isinstance(start, (int, np.integer)) or not 0 <= start * size < len(x):
            raise ValueError(f"start is the number of a batch, from 0 to {-(-len(x) // size) - 1}, not {start!r}")
        if not isinstance(ahead, (int, np.integer)) or ahead < 0:
            raise ValueError(f"ahead is a number of batches to be read ahead, a whole number from 0, not {ahead!r}")
        self.start, self.ahead = start, ahead
        self.order = generator(seed, "shuffle", epoch).permutation(len(x)) if shuffle else np.arange(len(x))

    def __len__(self):
        return -(-len(self.x) // self.size) - self.start

    def __iter__(self):
        with prefetching(self._share) if self.ahead else contextlib.nullcontext(lambda wanted: self._share(*wanted)) as get:
            numbers = range(self.start, self.start + len(self))
            for i in range(len(numbers)):
                tries = None
                # Once, and once more in other shares whenever a step was undone. Ranks that were lost elsewhere, in an
                # evaluation after the step, say, undid none.
                while tries != (now := self.grid.undone if self.grid else 0):
                    tries, place = now, (0, 1)
                    if self.grid:
                        place = self.grid.replica, self.grid.data
                        self.grid.stale = False
                    yield get(*((number, *place) for number in numbers[i:i + 1 + self.ahead]))

    def _share(self, number, rank, ranks):
        """The share of one batch that falls to a rank."""
        batch = self.order[number * self.size:(number + 1) * self.size]
        start, stop = share(len(batch), rank, ranks, self.multiple, self.grid.lanes if self.grid else None)
        mine = batch[start:stop]
        x = self.x[mine]
        if self.augment:
            x = self.augment(x, mine, self.epoch)
        return (self.transform(x) if self.transform else x), self.y[mine]


def _digest(array):
    """A few bytes that tell arrays apart which differ in more than some rows; nothing of what is in files, not in memory."""
    if type(array) is not np.ndarray or array.dtype.kind not in "biuf":
        return ""
    some = array[np.linspace(0, len(array) - 1, 8).astype(int)]
    return hashlib.blake2b(some.tobytes(), digest_size=8).hexdigest()
