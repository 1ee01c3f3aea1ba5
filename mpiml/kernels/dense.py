"""Matrix products: the affine map ``x W' + b`` with its three gradients, and the product of stacks of matrices.

Fastest where ``weight`` (out, in) lies in memory with its outputs side by side, ``np.asfortranarray(weight)``: then
both the map and the gradient for the weight read and write it in the order in which it lies.
"""

import numpy as np

from .gemm import gemm
from .jit import kernel
from .public import check_dtypes, output, public, refuse


@kernel(exact=True, reads="a b", writes="c")
def _matmul(a, b, c, add):
    """c = a b for each matrix of three stacks, or c += a b; a stack of one serves all."""
    size = c.itemsize
    a_row, a_step, b_step, b_column = a.strides[1] // size, a.strides[2] // size, b.strides[1] // size, b.strides[2] // size
    c_row, c_column = c.strides[1] // size, c.strides[2] // size
    for s in range(len(c)):
        ai, bi, ci = s % len(a) * a.strides[0] // size, s % len(b) * b.strides[0] // size, s * c.strides[0] // size
        if c_column == 1 or c.shape[2] == 1:
            gemm(a, ai, a_row, a_step, b, bi, b_step, b_column, c, ci, c_row, c.shape[1], a.shape[2], c.shape[2], add)
        elif c_row == 1 or c.shape[1] == 1:  # c' = b' a'
            gemm(b, bi, b_column, b_step, a, ai, a_step, a_row, c, ci, c_column, c.shape[2], a.shape[2], c.shape[1], add)
        else:
            whole = np.ascontiguousarray(c[s])
            gemm(a, ai, a_row, a_step, b, bi, b_step, b_column, whole, 0, whole.shape[1], c.shape[1], a.shape[2], c.shape[2], add)
            c[s] = whole


@kernel(exact=True, reads="x weight bias", writes="y")
def _linear(x, weight, bias, relu, y):
    size = y.itemsize
    rows, outputs = y.shape
    y_row = y.strides[0] // size
    if bias.size:
        for i in range(rows):
            for j in range(outputs):
                y[i, j] = bias[j]
    gemm(x, 0, x.strides[0] // size, x.strides[1] // size, weight, 0, weight.strides[1] // size, weight.strides[0] // size,
         y, 0, y_row, rows, x.shape[1], outputs, bias.size > 0)
    if relu:
        for i in range(rows):
            for j in range(outputs):
                y[i, j] = y[i, j] if y[i, j] > 0 or y[i, j] != y[i, j] else y.dtype.type(0)
