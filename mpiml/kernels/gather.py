"""Rows of a table by number, and the gradient for the table."""

import numpy as np

from .jit import kernel


@kernel
def _scatter_add(g, ids, out):
    out[:] = 0
    for i in range(ids.size):
        for j in range(g.shape[1]):
            out[ids[i], j] += g[i, j]


def embedding(ids, weight):
    """``weight[ids]``: (*ids.shape, features) from integers ``ids`` and ``weight`` (rows, features).

    Raises
    ------
    ValueError
        An id outside 0 .. rows - 1 (a negative one does not count from the end).
    """
    if ids.size and (ids.min() < 0 or ids.max() >= len(weight)):
        bad = np.argmax((ids < 0) | (ids >= len(weight)))
        place = tuple(int(i) for i in np.unravel_index(bad, ids.shape))
        raise ValueError(f"id {ids.flat[bad]} at position {place} in an embedding of "
                         f"{len(weight)} rows: ids run from 0 to {len(weight) - 1}")
    return weight[ids]


def embedding_vjp(g, ids, rows):
    """Gradient for weight, (rows, features): each row is the sum of the gradients of its uses."""
    out = np.empty((rows, g.shape[-1]), g.dtype)
    ids = np.ascontiguousarray(ids, np.int64).reshape(-1)
    _scatter_add(np.ascontiguousarray(g).reshape(ids.size, g.shape[-1]), ids, out)
    return out
