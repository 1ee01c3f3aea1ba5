"""Max and average pooling over windows of an image, beside their vjps."""

import numpy as np

from .conv import out_size
from .jit import kernel


@kernel
def _window(i, pixels, size, stride, padding):
    """First and end pixel of window ``i`` along an axis, the padding cut off."""
    first = i * stride - padding
    return max(0, first), min(pixels, first + size)


@kernel
def _max_pool(x, y, index, size, stride, padding):
    planes, h, w = x.shape
    _, oh, ow = y.shape
    for p in range(planes):
        for i in range(oh):
            top, bottom = _window(i, h, size[0], stride[0], padding[0])
            for j in range(ow):
                left, right = _window(j, w, size[1], stride[1], padding[1])
                best, where = x[p, top, left], top * w + left
                for a in range(top, bottom):
                    for b in range(left, right):
                        v = x[p, a, b]
                        if v > best or v != v:
                            best, where = v, a * w + b
                y[p, i, j] = best
                index[p, i, j] = where


@kernel
def _max_pool_vjp(g, index, x):
    x[:] = 0
    for p in range(g.shape[0]):
        for i in range(g.shape[1]):
            x[p, index[p, i]] += g[p, i]


@kernel
def _avg_pool(x, y, size, stride, padding):
    planes, h, w = x.shape
    _, oh, ow = y.shape
    share = x.dtype.type(1 / (size[0] * size[1]))
    for p in range(planes):
        for i in range(oh):
            top, bottom = _window(i, h, size[0], stride[0], padding[0])
            for j in range(ow):
                left, right = _window(j, w, size[1], stride[1], padding[1])
                total = x.dtype.type(0)
                for a in range(top, bottom):
                    for b in range(left, right):
                        total += x[p, a, b]
                y[p, i, j] = total * share


@kernel
def _avg_pool_vjp(g, x, size, stride, padding):
    planes, h, w = x.shape
    _, oh, ow = g.shape
    share = x.dtype.type(1 / (size[0] * size[1]))
    x[:] = 0
    for p in range(planes):
        for i in range(oh):
            top, bottom = _window(i, h, size[0], stride[0], padding[0])
            for j in range(ow):
                left, right = _window(j, w, size[1], stride[1], padding[1])
                part = g[p, i, j] * share
                for a in range(top, bottom):
                    for b in range(left, right):
                        x[p, a, b] += part


def _planes(x):
    return np.ascontiguousarray(x).reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def _out_shape(x, size, stride, padding):
    return (*x.shape[:2], *(out_size(*a) for a in zip(x.shape[2:], size, stride, padding, strict=True)))


def max_pool2d(x, size, stride, padding=(0, 0)):
    """Largest element of each window; the padding never wins.

    Parameters
    ----------
    x : (n, c, h, w) array, float32 or float64
    size, stride, padding : pairs of int, ``padding <= size / 2``

    Returns
    -------
    y : (n, c, oh, ow) array
    index : (n, c, oh, ow) array of int64
        Place of each maximum in its flattened (h * w) plane; the first one where several are equal.
    """
    y = np.empty(_out_shape(x, size, stride, padding), x.dtype)
    index = np.empty(y.shape, np.int64)
    _max_pool(_planes(x), _planes(y), _planes(index), size, stride, padding)
    return y, index


def max_pool2d_vjp(g, index, x_shape):
    """Gradient for x, of shape ``x_shape``: each element of ``g`` goes to where its maximum came from."""
    x = np.empty(x_shape, g.dtype)
    planes = x_shape[0] * x_shape[1]
    pixels = g.shape[2] * g.shape[3]
    _max_pool_vjp(np.ascontiguousarray(g).reshape(planes, pixels), index.reshape(planes, pixels),
                  x.reshape(planes, x_shape[2] * x_shape[3]))
    return x


def avg_pool2d(x, size, stride, padding=(0, 0)):
    """Mean of each window of ``x`` (n, c, h, w), zeros of the padding included (as PyTorch's default)."""
    y = np.empty(_out_shape(x, size, stride, padding), x.dtype)
    _avg_pool(_planes(x), _planes(y), size, stride, padding)
    return y


def avg_pool2d_vjp(g, x_shape, size, stride, padding=(0, 0)):
    """Gradient for x, of shape ``x_shape``."""
    x = np.empty(x_shape, g.dtype)
    _avg_pool_vjp(_planes(g), _planes(x), size, stride, padding)
    return x
