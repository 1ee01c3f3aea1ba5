"""Activations and dropout: one pass over the elements, each function beside its vjp."""

import math

import numpy as np

from .jit import kernel

_SQRT_HALF = math.sqrt(0.5)
_INV_SQRT_2PI = 1 / math.sqrt(2 * math.pi)
_SQRT_2_OVER_PI = math.sqrt(2 / math.pi)
_GELU_CUBIC = 0.044715  # Hendrycks and Gimpel 2016


def _flat(*arrays):
    # Kernels see one contiguous axis only: each further layout would be compiled anew.
    return [np.ascontiguousarray(a).reshape(-1) for a in arrays]


@kernel
def _relu(x, y):
    for i in range(x.size):
        y[i] = x[i] if x[i] > 0 or x[i] != x[i] else x.dtype.type(0)


@kernel
def _relu_vjp(g, y, out):
    for i in range(g.size):
        out[i] = g[i] if y[i] > 0 else g.dtype.type(0)


def relu(x):
    """max(x, 0) of ``x`` (any shape, float32 or float64); NaN stays NaN."""
    y = np.empty(x.shape, x.dtype)
    _relu(*_flat(x), y.reshape(-1))
    return y


def relu_vjp(g, y):
    """Gradient for x of ``y = relu(x)``, given the gradient ``g`` for y; 0 at the kink."""
    out = np.empty(g.shape, g.dtype)
    _relu_vjp(*_flat(g, y), out.reshape(-1))
    return out


@kernel
def _sigmoid(x, y):
    one = x.dtype.type(1)
    for i in range(x.size):
        e = np.exp(-abs(x[i]))  # never overflows
        y[i] = one / (one + e) if x[i] >= 0 else e / (one + e)


@kernel
def _sigmoid_vjp(g, y, out):
    one = g.dtype.type(1)
    for i in range(g.size):
        out[i] = g[i] * y[i] * (one - y[i])


def sigmoid(x):
    """1 / (1 + exp(-x)) of ``x`` (any shape), without overflow for any x."""
    y = np.empty(x.shape, x.dtype)
    _sigmoid(*_flat(x), y.reshape(-1))
    return y


def sigmoid_vjp(g, y):
    """Gradient for x of ``y = sigmoid(x)``."""
    out = np.empty(g.shape, g.dtype)
    _sigmoid_vjp(*_flat(g, y), out.reshape(-1))
    return out


@kernel
def _silu_vjp(g, x, s, out):
    one = g.dtype.type(1)
    for i in range(g.size):
        out[i] = g[i] * s[i] * (one + x[i] * (one - s[i]))


def silu(x):
    """x * sigmoid(x) (Elfwing et al. 2018, "swish")."""
    return x * sigmoid(x)


def silu_vjp(g, x):
    """Gradient for x of ``silu(x)``."""
    out = np.empty(g.shape, g.dtype)
    _silu_vjp(*_flat(g, x, sigmoid(x)), out.reshape(-1))
    return out


@kernel
def _gelu(x, y, tanh):
    t = x.dtype.type
    for i in range(x.size):
        v = x[i]
        if tanh:
            u = t(_SQRT_2_OVER_PI) * (v + t(_GELU_CUBIC) * v * v * v)
            y[i] = t(0.5) * v * (t(1) + np.tanh(u))
        else:
            y[i] = t(0.5) * v * (t(1) + t(math.erf(v * t(_SQRT_HALF))))


@kernel
def _gelu_vjp(g, x, out, tanh):
    t = x.dtype.type
    for i in range(x.size):
        v = x[i]
        if tanh:
            u = t(_SQRT_2_OVER_PI) * (v + t(_GELU_CUBIC) * v * v * v)
            h = np.tanh(u)
            du = t(_SQRT_2_OVER_PI) * (t(1) + t(3 * _GELU_CUBIC) * v * v)
            slope = t(0.5) * (t(1) + h) + t(0.5) * v * (t(1) - h * h) * du
        else:
            cdf = t(0.5) * (t(1) + t(math.erf(v * t(_SQRT_HALF))))
            slope = cdf + v * t(_INV_SQRT_2PI) * np.exp(t(-0.5) * v * v)
        out[i] = g[i] * slope


def gelu(x, tanh=False):
    """x * Phi(x), Phi the normal distribution (Hendrycks and Gimpel 2016); ``tanh``: their tanh form of it."""
    y = np.empty(x.shape, x.dtype)
    _gelu(*_flat(x), y.reshape(-1), tanh)
    return y


def gelu_vjp(g, x, tanh=False):
    """Gradient for x of ``gelu(x, tanh)``."""
    out = np.empty(g.shape, g.dtype)
    _gelu_vjp(*_flat(g, x), out.reshape(-1), tanh)
    return out


@kernel
def _philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): 128 -> 128 bits."""
    mask = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        p0 = np.uint64(0xD2511F53) * c0
        p1 = np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = ((p1 >> np.uint64(32)) ^ c1 ^ k0, p1 & mask,
                          (p0 >> np.uint64(32)) ^ c3 ^ k1, p0 & mask)
        k0 = (k0 + np.uint64(0x9E3779B9)) & mask
        k1 = (k1 + np.uint64(0xBB67AE85)) & mask
    return c0, c1, c2, c3


@kernel
def _dropout(x, p, key, first, out):
    samples, size = x.shape
    mask = np.uint64(0xFFFFFFFF)
    scale = x.dtype.type(1 / (1 - p))
    zero = x.dtype.type(0)
    threshold = np.uint64(p * 4294967296.0)
    k0, k1 = key & mask, key >> np.uint64(32)
    for s in range(samples):
        sample = np.uint64(first + s)
        for block in range((size + 3) // 4):
            bits = _philox(np.uint64(block), np.uint64(0), sample & mask, sample >> np.uint64(32), k0, k1)
            start = 4 * block
            for i in range(start, min(start + 4, size)):
                keep = bits[i - start] >= threshold
                out[s, i] = x[s, i] * scale if keep else zero


def dropout(x, p, key, first=0):
    """``x`` with each element set to 0 with probability ``p``, the others divided by 1 - p.

    Parameters
    ----------
    x : (n, ...) array, float32 or float64
    p : float in [0, 1)
    key : int, 64 bits; a function of (seed, layer, step), see :func:`mpiml.random.key`
    first : int
        Number of ``x[0]`` in the global batch. The mask of a sample is a function of (key, its number,
        element) alone, so it is the same on whichever rank the sample is computed. The operation is linear
        with a diagonal matrix, hence its own vjp: ``dropout(g, p, key, first)``.
    """
    rows = np.ascontiguousarray(x).reshape(len(x), -1) if x.size else x.reshape(0, 1)
    out = np.empty(rows.shape, x.dtype)
    _dropout(rows, float(p), np.uint64(key), first, out)
    return out.reshape(x.shape)
