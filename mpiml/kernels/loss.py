"""Elementwise losses, summed: squared, absolute, Huber and binary cross-entropy errors, beside their vjps.

Each loss is accumulated in float64, in one pass.
"""

import numpy as np

from .jit import kernel


def _flat(*arrays):
    return [np.ascontiguousarray(a).reshape(-1) for a in arrays]


@kernel
def _huber(x, target, delta):
    loss = 0.0
    for i in range(x.size):
        e = abs(x[i] - target[i])
        loss += 0.5 * e * e if e <= delta else delta * (e - 0.5 * delta)
    return loss


@kernel
def _huber_vjp(g, x, target, delta, out):
    for i in range(x.size):
        out[i] = g * min(max(x[i] - target[i], -delta), delta)


def huber(x, target, delta):
    """Sum of e**2 / 2 where |e| <= delta, else delta * (|e| - delta / 2), with e = x - target (Huber 1964)."""
    return _huber(*_flat(x, target), float(delta))


def huber_vjp(g, x, target, delta):
    """Gradient for x of ``huber``; ``g`` is a scalar."""
    out = np.empty(x.shape, x.dtype)
    t = x.dtype.type
    _huber_vjp(t(g), *_flat(x, target), t(delta), out.reshape(-1))
    return out


@kernel
def _squared(x, target):
    loss = 0.0
    for i in range(x.size):
        e = x[i] - target[i]
        loss += e * e
    return loss


def squared(x, target):
    """Sum of (x - target)**2."""
    return _squared(*_flat(x, target))


@kernel
def _absolute(x, target):
    loss = 0.0
    for i in range(x.size):
        loss += abs(x[i] - target[i])
    return loss


def absolute(x, target):
    """Sum of |x - target|."""
    return _absolute(*_flat(x, target))


@kernel
def _binary(x, target):
    loss = 0.0
    for i in range(x.size):
        loss += max(x[i], x.dtype.type(0)) - x[i] * target[i] + np.log1p(np.exp(-abs(x[i])))
    return loss


@kernel
def _binary_vjp(g, x, target, out):
    one = x.dtype.type(1)
    for i in range(x.size):
        e = np.exp(-abs(x[i]))
        p = one / (one + e) if x[i] >= 0 else e / (one + e)
        out[i] = g * (p - target[i])


def binary(x, target):
    """Sum of -target * log(sigmoid(x)) - (1 - target) * log(1 - sigmoid(x)), finite for every finite x."""
    return _binary(*_flat(x, target))


def binary_vjp(g, x, target):
    """Gradient for x of ``binary``; ``g`` is a scalar."""
    out = np.empty(x.shape, x.dtype)
    _binary_vjp(x.dtype.type(g), *_flat(x, target), out.reshape(-1))
    return out
