"""Functions of each element."""

import numpy as np

from mpiml import kernels as k
from mpiml.tensor import op, unbroadcast

from .check import floats, same_dtype


@op
def exp(x):
    """e**x."""
    x = np.asarray(x)
    y = k.exp(x)
    return y, (lambda g: k.exp_vjp(g, y),)


@op
def log(x):
    """Natural logarithm."""
    x = np.asarray(x)
    return k.log(x), (lambda g: k.log_vjp(g, x),)


@op
def sqrt(x):
    """Square root."""
    y = np.sqrt(x)
    return y, (lambda g: g / (2 * y),)


@op
def tanh(x):
    """Hyperbolic tangent."""
    x = np.asarray(x)
    y = k.tanh(x)
    return y, (lambda g: k.tanh_vjp(g, y),)


@op
def sigmoid(x):
    """1 / (1 + exp(-x))."""
    y = k.sigmoid(x)
    return y, (lambda g: k.sigmoid_vjp(g, y),)


@op
def relu(x):
    """max(x, 0)."""
    y = k.relu(x)
    return y, (lambda g: k.relu_vjp(g, y),)


@op
def add_relu(x, y):
    """max(x + y, 0) of arrays of one shape: the end of a residual block, in one pass."""
    floats("add_relu", x)
    same_dtype("add_relu", x, y, "second input")
    if x.shape != y.shape:
        raise ValueError(f"add_relu adds arrays of one shape, not {x.shape} and {y.shape}: use relu(x + y)")
    value = k.add_relu(x, y)

    def vjp(g, into):
        g = k.relu_vjp(g, value)
        return g, g

    return value, vjp


@op
def gelu(x, approximate="none"):
    """x * Phi(x) (Hendrycks and Gimpel 2016), exact or with ``approximate="tanh"``."""
    if approximate not in ("none", "tanh"):
        raise ValueError(f'gelu knows approximate="none" and "tanh", not {approximate!r}')
    tanh = approximate == "tanh"
    return k.gelu(x, tanh), (lambda g: k.gelu_vjp(g, x, tanh),)


@op
def silu(x):
    """x * sigmoid(x)."""
    return k.silu(x), (lambda g: k.silu_vjp(g, x),)


@op
def where(mask, x, y):
    """x where the boolean array ``mask`` is true, else y, with broadcasting."""
    return np.where(mask, x, y), (None, lambda g: unbroadcast(np.where(mask, g, np.zeros_like(g)), np.shape(x)),
                                  lambda g: unbroadcast(np.where(mask, np.zeros_like(g), g), np.shape(y)))


@op
def clip(x, low=None, high=None):
    """x limited to low .. high (numbers or None); no gradient where the limit holds."""
    inside = np.ones(x.shape, bool)
    if low is not None:
        inside &= x >= low
    if high is not None:
        inside &= x <= high
    return np.clip(x, low, high), (lambda g: g * inside,)


@op
def dropout(x, p, key, first=0):
    """x (n, ...) with each element set to 0 with probability ``p``, the others divided by 1 - p.

    The mask is a function of (``key``, ``first`` + row, element) alone, see :func:`mpiml.kernels.dropout`.
    """
    if not 0 <= p < 1:
        raise ValueError(f"dropout sets elements to 0 with a probability 0 <= p < 1, not {p}")
    return k.dropout(x, p, key, first), (lambda g: k.dropout(g, p, key, first),)
