"""Two-dimensional convolution as one matrix product over unrolled patches ("im2col"), and its two gradients.

The patches of an image, one column each, form a matrix of (channels * kernel height * kernel width) rows and
(output height * output width) columns. The convolution is the weight matrix times it; the gradient for the
weight is the output gradient times its transpose; the gradient for the image adds each row of
``weight' g`` back to where it was taken from. (Chellapilla, Puri and Simard 2006.)
"""

import numpy as np

from .jit import kernel


@kernel
def _span(out, size, k, stride, padding, dilation):
    """First and end output position whose tap ``k`` lies inside the image."""
    offset = k * dilation - padding
    first = max(0, (-offset + stride - 1) // stride)
    end = min(out, (size - 1 - offset) // stride + 1)
    return first, max(first, end), offset


@kernel
def _unroll(x, columns, kh, kw, oh, ow, stride, padding, dilation):
    n, c, h, w = x.shape
    for i in range(n):
        for row in range(c * kh * kw):
            ch, ky, kx = row // (kh * kw), row // kw % kh, row % kw
            top, bottom, dy = _span(oh, h, ky, stride[0], padding[0], dilation[0])
            left, right, dx = _span(ow, w, kx, stride[1], padding[1], dilation[1])
            column = columns[i, row]
            column[:] = 0
            for y in range(top, bottom):
                source = x[i, ch, y * stride[0] + dy]
                for xx in range(left, right):
                    column[y * ow + xx] = source[xx * stride[1] + dx]


@kernel
def _unroll_vjp(columns, x, kh, kw, oh, ow, stride, padding, dilation):
    n, c, h, w = x.shape
    x[:] = 0
    for i in range(n):
        for row in range(c * kh * kw):
            ch, ky, kx = row // (kh * kw), row // kw % kh, row % kw
            top, bottom, dy = _span(oh, h, ky, stride[0], padding[0], dilation[0])
            left, right, dx = _span(ow, w, kx, stride[1], padding[1], dilation[1])
            column = columns[i, row]
            for y in range(top, bottom):
                target = x[i, ch, y * stride[0] + dy]
                for xx in range(left, right):
                    target[xx * stride[1] + dx] += column[y * ow + xx]


def out_size(size, k, stride, padding, dilation=1):
    """Number of output positions along an axis of ``size`` elements."""
    return (size + 2 * padding - dilation * (k - 1) - 1) // stride + 1


def _geometry(x_shape, kernel_size, stride, padding, dilation):
    sizes = [out_size(*a) for a in zip(x_shape[2:], kernel_size, stride, padding, dilation, strict=True)]
    return (*kernel_size, *sizes, stride, padding, dilation)


def _columns(x, groups, kernel_size, stride, padding, dilation):
    n, c = x.shape[:2]
    geometry = _geometry(x.shape, kernel_size, stride, padding, dilation)
    kh, kw, oh, ow = geometry[:4]
    columns = np.empty((n, c * kh * kw, oh * ow), x.dtype)
    _unroll(np.ascontiguousarray(x), columns, *geometry)
    return columns.reshape(n, groups, c // groups * kh * kw, oh * ow)


def conv2d(x, weight, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1):
    """Cross-correlation of images with a kernel, as in PyTorch.

    Parameters
    ----------
    x : (n, c, h, w) array, float32 or float64
    weight : (out, c / groups, kh, kw) array of the same dtype
    stride, padding, dilation : pairs of int
        Steps between output positions, rows and columns of zeros around the image, steps between taps.
    groups : int
        Number of blocks that the channels are split into; each sees its own inputs only.

    Returns
    -------
    (n, out, oh, ow) array, ``oh = (h + 2 * padding - dilation * (kh - 1) - 1) // stride + 1``
    """
    out, _, kh, kw = weight.shape
    _, _, oh, ow, *_ = _geometry(x.shape, (kh, kw), stride, padding, dilation)
    columns = _columns(x, groups, (kh, kw), stride, padding, dilation)
    y = np.matmul(weight.reshape(groups, out // groups, -1), columns)
    return y.reshape(len(x), out, oh, ow)


def conv2d_vjp_x(g, weight, x_shape, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1):
    """Gradient for x, of shape ``x_shape``, from ``g`` (n, out, oh, ow)."""
    out, _, kh, kw = weight.shape
    geometry = _geometry(x_shape, (kh, kw), stride, padding, dilation)
    oh, ow = g.shape[2:]
    rows = weight.reshape(groups, out // groups, -1).swapaxes(1, 2)
    columns = np.matmul(rows, g.reshape(len(g), groups, out // groups, oh * ow))
    x = np.empty(x_shape, g.dtype)
    _unroll_vjp(np.ascontiguousarray(columns).reshape(len(g), x_shape[1] * kh * kw, oh * ow), x, *geometry)
    return x


def conv2d_vjp_weight(g, x, weight_shape, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1):
    """Gradient for weight, of shape ``weight_shape``, from ``g`` (n, out, oh, ow)."""
    out, _, kh, kw = weight_shape
    oh, ow = g.shape[2:]
    columns = _columns(x, groups, (kh, kw), stride, padding, dilation)
    blocks = g.reshape(len(g), groups, out // groups, oh * ow)
    return np.matmul(blocks, columns.swapaxes(2, 3)).sum(axis=0).reshape(weight_shape)
