"""The affine map ``x W' + b`` and the gradients for its three arguments."""

import math

import numpy as np

from .jit import kernel


@kernel
def _add_bias(y, bias):
    for i in range(y.shape[0]):
        for j in range(y.shape[1]):
            y[i, j] += bias[j]


@kernel
def _sum_rows(g, out):
    out[:] = 0
    for i in range(g.shape[0]):
        for j in range(g.shape[1]):
            out[j] += g[i, j]


def _rows(x):
    return np.ascontiguousarray(x).reshape(math.prod(x.shape[:-1]), x.shape[-1])  # -1 fails for 0 features


def linear(x, weight, bias=None):
    """``x @ weight.T + bias``.

    Parameters
    ----------
    x : (..., in_features) array, float32 or float64
    weight : (out_features, in_features) array of the same dtype
    bias : (out_features,) array, optional

    Returns
    -------
    (..., out_features) array
    """
    y = np.dot(_rows(x), weight.T)
    if bias is not None:
        _add_bias(y, bias)
    return y.reshape(*x.shape[:-1], len(weight))


def linear_vjp_x(g, weight):
    """Gradient for x, (..., in_features), from ``g`` (..., out_features)."""
    return np.dot(_rows(g), weight).reshape(*g.shape[:-1], weight.shape[1])


def linear_vjp_weight(g, x):
    """Gradient for weight, (out_features, in_features)."""
    return np.dot(_rows(g).T, _rows(x))


def linear_vjp_bias(g):
    """Gradient for bias, (out_features,): the sum of ``g`` over all but its last axis."""
    out = np.empty(g.shape[-1], g.dtype)
    _sum_rows(_rows(g), out)
    return out
