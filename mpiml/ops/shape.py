"""Other shapes of the same elements: each vjp is the way back."""

import math

import numpy as np

from mpiml.tensor import op, unbroadcast


def identity(x):
    """x itself: the branch that does nothing."""
    return x


@op
def reshape(x, shape):
    """x with the same elements in another shape; one entry may be -1."""
    old = x.shape
    return np.reshape(x, shape), (lambda g: g.reshape(old),)


@op
def flatten(x):
    """x (n, ...) as (n, features)."""
    shape = x.shape
    n, features = shape[0], math.prod(shape[1:])
    if x.ndim > 2 and x.strides[0] == x.itemsize:  # samples lie side by side, as images do in convolutions: leave them so
        value = np.moveaxis(x, 0, -1).reshape(features, n).T
    else:
        value = np.reshape(x, (n, features))
    return value, (lambda g: g.reshape(shape),)


@op
def transpose(x, axes=None):
    """x with its axes reversed, or in the order ``axes``."""
    dims = x.ndim

    def vjp(g):
        places = axes and [axis % dims for axis in axes]
        return np.transpose(g, places and [places.index(axis) for axis in range(dims)])

    return np.transpose(x, axes), (vjp,)


@op
def broadcast_to(x, shape):
    """x repeated along new axes and axes of size 1, to ``shape``."""
    old = x.shape
    return np.broadcast_to(x, shape), (lambda g: unbroadcast(g, old),)


@op
def _concatenate(*parts, axis):
    ends = np.cumsum([np.shape(p)[axis] for p in parts])

    def vjp(i):
        return lambda g: np.split(g, ends[:-1], axis=axis)[i]

    return np.concatenate(parts, axis=axis), tuple(vjp(i) for i in range(len(parts)))


def concatenate(parts, axis=0):
    """The arrays ``parts`` joined along an axis they have."""
    return _concatenate(*parts, axis=axis)


@op
def _stack(*parts, axis):
    def vjp(i):
        return lambda g: np.take(g, i, axis=axis)

    return np.stack(parts, axis=axis), tuple(vjp(i) for i in range(len(parts)))


def stack(parts, axis=0):
    """The arrays ``parts``, of one shape, along a new axis."""
    return _stack(*parts, axis=axis)


@op
def pad(x, widths, value=0.0):
    """x with ``value`` around it; ``widths`` is a pair (before, after) for each axis, as in ``numpy.pad``."""
    inside = tuple(slice(before, before + n) for (before, _), n in zip(widths, x.shape, strict=True))
    return np.pad(x, widths, constant_values=value), (lambda g: g[inside],)
