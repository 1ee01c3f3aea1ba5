"""Linear maps with weights, and pooling."""

import numpy as np

from mpiml import kernels as k
from mpiml.tensor import op

from .check import image, pair, windows


@op
def linear(x, weight, bias=None, relu=False):
    """x (..., in) @ weight (out, in).T + bias (out,), then max(., 0) with ``relu``."""
    y = k.linear(x, weight, bias, relu)
    positive = y if relu else None

    def vjp(g, into):
        into_x, into_weight, into_bias, _ = into
        dx = None if into_x is None else np.empty(x.shape, x.dtype)
        dweight = np.zeros_like(weight) if into_weight is True else into_weight
        dbias = np.zeros_like(bias) if into_bias is True else into_bias
        k.linear_vjp(g, x, weight, positive, dx, dweight, dbias, True)
        return dx, dweight if into_weight is True else None, dbias if into_bias is True else None

    return y, vjp


@op
def conv2d(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, relu=False):
    """Cross-correlation of x (n, c, h, w) with weight (out, c / groups, kh, kw), plus bias (out,); max(., 0) with ``relu``."""
    windows_of = pair("stride", stride), pair("padding", padding), pair("dilation", dilation), groups
    y = k.conv2d(x, weight, *windows_of, bias, relu)
    positive = y if relu else None

    def vjp(g, into):
        into_x, into_weight, into_bias = into[:3]
        dbias = None
        if positive is not None:
            g, dbias = k.conv2d_vjp_relu(g, positive)
        elif into_bias is not None:
            dbias = k.conv2d_vjp_bias(g)
        return (None if into_x is None else k.conv2d_vjp_x(g, weight, x.shape, *windows_of),
                None if into_weight is None else k.conv2d_vjp_weight(g, x, weight.shape, *windows_of), dbias)

    return y, vjp


@op
def max_pool2d(x, kernel_size, stride=None, padding=0, relu=False):
    """Largest element of each window of x (n, c, h, w), or 0 with ``relu``; ``stride`` is the window's size by default."""
    image("max_pool2d", x)
    size = pair("kernel_size", kernel_size)
    stride, padding = pair("stride", kernel_size if stride is None else stride), pair("padding", padding)
    windows("max_pool2d", x, size, stride, padding)
    if 2 * padding[0] > size[0] or 2 * padding[1] > size[1]:
        raise ValueError(f"max_pool2d with windows of {size} takes a padding of half of that at most, not {padding}")
    value, index = k.max_pool2d(x, size, stride, padding, relu)
    shape = x.shape
    return value, (lambda g: k.max_pool2d_vjp(g, index, shape, size, stride, padding),)


@op
def avg_pool2d(x, kernel_size, stride=None, padding=0):
    """Mean of each window of x (n, c, h, w), padding counted as zeros; ``stride`` is the window's size by default."""
    image("avg_pool2d", x)
    size = pair("kernel_size", kernel_size)
    stride, padding = pair("stride", kernel_size if stride is None else stride), pair("padding", padding)
    windows("avg_pool2d", x, size, stride, padding)
    shape = x.shape
    return k.avg_pool2d(x, size, stride, padding), (lambda g: k.avg_pool2d_vjp(g, shape, size, stride, padding),)


@op
def embedding(ids, weight):
    """weight[ids]: rows of ``weight`` (rows, features) for integers ``ids`` of any shape."""
    ids = np.asarray(ids)
    if ids.dtype.kind not in "iu":
        raise TypeError(f"embedding takes integer ids, not {ids.dtype}")
    rows = len(weight)

    def vjp(g, into):
        place = into[1]
        if place is True or not place.flags.c_contiguous:
            return None, k.embedding_vjp(g, ids, rows)
        k.embedding_vjp(g, ids, rows, place, True)
        return None, None

    return k.embedding(ids, weight), vjp
