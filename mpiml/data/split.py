"""Splitting a data set into parts, for training, validation and test."""

import numpy as np

from mpiml.alone import Alone
from mpiml.random import generator

from .table import distinct


def split(labels, fractions, seed=0, grid=None):
    """Rows divided at random into parts, in each of which the labels are as frequent as in all.

    Which row falls to which part is a function of the labels and the seed alone.

    Parameters
    ----------
    labels : array (n,) of integers or texts, or int
        What is to be as frequent in the parts: a column of a :class:`Table`, say. A number n: there are n rows, all alike.
    fractions : sequence of float
        The size of each part, such as (0.8, 0.1, 0.1). Each label's rows are divided so, too, up to a row or two.
    seed : int
    grid : mpiml.parallel.Grid, optional
        Each rank has labels of rows of its own, and gets the numbers of its own rows: those of all ranks together are
        divided as one rank would divide them.

    Returns
    -------
    list of int64 arrays
        The numbers of the rows of each part, in ascending order.

    Raises
    ------
    ValueError
        The fractions are not positive or their sum is not 1, or a part would be empty.

    Examples
    --------
    >>> train, test = split(np.array(["a", "b", "a", "a", "b", "a"]), (0.5, 0.5), seed=1)
    >>> len(train), len(test), sorted([*train, *test]) == list(range(6))
    (3, 3, True)
    """
    grid = grid or Alone()
    if not fractions or min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-9:
        raise ValueError(f"fractions are above 0, and their sum is 1: {tuple(fractions)} are not")
    labels = np.zeros(labels, np.int64) if isinstance(labels, (int, np.integer)) else np.asarray(labels)
    if labels.ndim != 1 or labels.dtype.kind not in "OUiub":
        raise ValueError(f"labels are integers or texts, one for each row, not an array of {labels.dtype} of shape "
                         f"{labels.shape}; to divide rows whatever their values, give their number")
    values = distinct(labels, grid)
    known = {value: code for code, value in enumerate(values)}
    codes = np.array([known[label] for label in labels.tolist()], np.int64)
    start = sum(map(int, grid.texts(str(len(codes)))[:grid.rank]))
    everyones = grid.rows(codes)
    sizes = np.diff(np.rint(np.cumsum([0, *fractions]) * len(everyones)).astype(int)).tolist()
    if not all(sizes):
        raise ValueError(f"{len(everyones)} rows in parts of {tuple(fractions)} make parts of {sizes} rows: none may be empty")
    # The rows, label by label and shuffled within each, fall to the parts in turns that are as even as can be: those of
    # every part are equally spaced.
    turns = np.concatenate([(np.arange(size) + 0.5) / size for size in sizes])
    part = np.empty(len(everyones), np.int64)
    part[_shuffled(everyones, values, seed)] = np.repeat(np.arange(len(sizes)), sizes)[np.argsort(turns, kind="stable")]
    mine = part[start:start + len(codes)]
    return [np.flatnonzero(mine == number) for number in range(len(fractions))]


def _shuffled(codes, values, seed):
    """The numbers of the rows, those of each label behind each other, in random order."""
    rows = np.split(np.argsort(codes, kind="stable"), np.cumsum(np.bincount(codes, minlength=len(values)))[:-1])
    return np.concatenate([generator(seed, "split", value).permutation(some) for value, some in zip(values, rows, strict=True)])
