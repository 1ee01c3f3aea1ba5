"""Sums, means and extremes over axes."""

import numpy as np

from mpiml import kernels as k
from mpiml.tensor import op

from .check import floats


def _expand(g, axis, keepdims):
    # A reduced array with the reduced axes back, of size 1.
    return g if keepdims or axis is None else np.expand_dims(g, axis)


def _count(x, axis):
    return x.size if axis is None else int(np.prod([x.shape[a] for a in np.atleast_1d(axis)]))


@op
def sum(x, axis=None, keepdims=False):
    """Sum over ``axis`` (an int, a tuple, or None for all)."""
    shape = x.shape
    return np.sum(x, axis, keepdims=keepdims), (
        lambda g: np.broadcast_to(_expand(g, axis, keepdims), shape),)


@op
def mean(x, axis=None, keepdims=False):
    """Mean over ``axis`` (an int, a tuple, or None for all).

    Raises
    ------
    ValueError
        There is nothing to take the mean of.
    """
    count = _count(x, axis)
    if count == 0:
        raise ValueError(f"the mean over axis {axis} of an array of shape {x.shape} is a mean of nothing")
    shape = x.shape
    return np.mean(x, axis, keepdims=keepdims), (
        lambda g: np.broadcast_to(_expand(g, axis, keepdims) / count, shape),)


@op
def masked_mean(x, mask):
    """Mean of x (n, length, features) over the places where ``mask`` (n, length) is true, (n, features); 0 where none is."""
    floats("masked_mean", x)
    if mask.shape != x.shape[:2] or x.ndim != 3 or mask.dtype != bool:
        raise ValueError(f"masked_mean takes x (n, length, features) and a mask (n, length) of bool, not {x.shape} and "
                         f"{mask.shape} of {mask.dtype}")
    share = (mask / np.maximum(mask.sum(axis=1, keepdims=True), 1)).astype(x.dtype)
    return k.matmul(share[:, None], x)[:, 0], (lambda g: share[:, :, None] * g[:, None],)


def _extreme(reduce, x, axis, keepdims):
    value = reduce(x, axis, keepdims=keepdims)

    def vjp(g):
        mask = x == _expand(value, axis, keepdims)
        share = mask / mask.sum(axis, keepdims=True, dtype=x.dtype)  # equal elements share the gradient
        return share * _expand(g, axis, keepdims)

    return value, (vjp,)


@op
def max(x, axis=None, keepdims=False):
    """Largest element over ``axis``; equal ones share the gradient evenly."""
    return _extreme(np.max, x, axis, keepdims)


@op
def min(x, axis=None, keepdims=False):
    """Smallest element over ``axis``; equal ones share the gradient evenly."""
    return _extreme(np.min, x, axis, keepdims)
