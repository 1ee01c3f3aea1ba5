"""Rows of a table by number, and the gradient for the table."""

import numpy as np
from numba.extending import overload

from .jit import kernel
from .public import contiguous_output, matrix, output, public, refuse, whole_rows
from .simd import lanes, load, load_part, splat, store, store_part


@kernel
def _first_bad(ids, rows):
    """The position of the first id outside 0 .. rows - 1; -1 if there is none.

    The smallest and the largest are found without a branch, many ids at a time; only a bad one is looked for.
    """
    low, high = np.int64(0), np.int64(-1)
    for i in range(ids.size):
        low, high = min(low, ids[i]), max(high, ids[i])
    if low < 0 or high >= rows:
        for i in range(ids.size):
            if ids[i] < 0 or ids[i] >= rows:
                return i
    return -1


@kernel(exact=True, reads="weight", floats="weight y", name="embedding")
def _gather(ids, weight, y):
    """y (ids, features) = weight[ids], for rows of weight that are contiguous."""
    width = lanes(y)
    features = y.shape[1]
    whole = features // width * width
    for i in range(ids.size):
        at, to = ids[i] * (weight.strides[0] // y.itemsize), i * features
        for j in range(0, whole, width):
            store(y, to + j, load(weight, at + j))
        if whole < features:
            store_part(y, to + whole, load_part(weight, at + whole, features - whole), features - whole)


@kernel(exact=True, reads="g", writes="out", floats="g out", name="embedding_vjp")
def _scatter_add(g, ids, out, add):
    """Rows of g added to their rows of out, in order; without ``add``, the first one of each is put there."""
    width = lanes(out)
    rows, features = out.shape
    whole, rest = features // width * width, features % width
    used = np.full(rows, add)
    for i in range(ids.size):
        row = ids[i]
        at, to = i * (g.strides[0] // g.itemsize), row * (out.strides[0] // g.itemsize)
        if used[row]:
            for j in range(0, whole, width):
                store(out, to + j, load(out, to + j) + load(g, at + j))
            if rest:
                store_part(out, to + whole, load_part(out, to + whole, rest) + load_part(g, at + whole, rest), rest)
        else:
            used[row] = True
            for j in range(0, whole, width):
                store(out, to + j, load(g, at + j))
            if rest:
                store_part(out, to + whole, load_part(g, at + whole, rest), rest)
    zero = splat(out.dtype.type(0))
    for row in range(rows):
        if not used[row]:
            to = row * (out.strides[0] // out.itemsize)
            for j in range(to, to + whole, width):
                store(out, j, zero)
            if rest:
                store_part(out, to + whole, zero, rest)


def _refuse_id(ids, bad, rows):
    place = tuple(int(i) for i in np.unravel_index(bad, ids.shape))
    raise ValueError(f"id {ids.flat[bad]} at position {place} in an embedding of {rows} rows: ids run from 0 to {rows - 1}")


@overload(_refuse_id)
def _compiled_refuse_id(ids, bad, rows):
    def raises(ids, bad, rows):
        raise ValueError("an id in an embedding is not one of its rows' numbers")

    return raises


@public
def _checked(ids, rows):
    """The ids as a vector, each a number of a row."""
    flat = np.ascontiguousarray(np.asarray(ids, np.int64)).reshape(-1)
    bad = _first_bad(flat, rows)
    if bad >= 0:
        _refuse_id(ids, bad, rows)
    return flat


@public
def embedding(ids, weight, out=None):
    """``weight[ids]``: rows of a table by number.

    Parameters
    ----------
    ids : array of integers, any shape
    weight : (rows, features) array, float32 or float64
    out : (*ids.shape, features) array, optional
        Contiguous; where to put the result.

    Returns
    -------
    (*ids.shape, features) array

    Raises
    ------
    TypeError
        A weight of another dtype than float32 and float64.
    ValueError
        An id outside 0 .. rows - 1 (a negative one does not count from the end); nothing is written then.
    """
    if weight.ndim != 2:
        refuse("an embedding takes rows from a matrix, not from an array of shape {}", weight.shape)
    flat = _checked(ids, len(weight))
    y = contiguous_output(out, ids.shape + (weight.shape[1],), weight.dtype)
    _gather(flat, whole_rows(weight), y.reshape(len(flat), weight.shape[1]))
    return y


@public
def embedding_vjp(g, ids, rows, out=None, add=False):
    """Gradient for weight: each row is the sum of the gradients of its uses, in their order.

    Parameters
    ----------
    g : (*ids.shape, features) array, float32 or float64
    ids : array of integers in 0 .. rows - 1
    rows : int
    out : (rows, features) array, optional
        Rows contiguous; where to put the result or, with ``add``, to add it to: then no other row is touched.

    Returns
    -------
    (rows, features) array

    Raises
    ------
    TypeError
        A gradient of another dtype than float32 and float64.
    ValueError
        An id outside 0 .. rows - 1, or a g or an out of another shape; nothing is written then.
    """
    if g.shape[:-1] != ids.shape:
        refuse("embedding_vjp of ids of shape {} takes a gradient with one more axis, not {}", ids.shape, g.shape)
    flat = _checked(ids, rows)
    if add and out is None:
        refuse("embedding_vjp adds to out: give one")
    dweight = output(out, (rows, g.shape[-1]), g.dtype)
    if dweight.size and dweight.strides[1] != dweight.itemsize:
        refuse("embedding_vjp writes to an out with contiguous rows, not with strides {}", dweight.strides)
    _scatter_add(matrix(whole_rows(g)), flat, dweight, add)
    return dweight
