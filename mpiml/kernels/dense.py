"""Matrix products: the affine map ``x W' + b`` with its three gradients, and the product of stacks of matrices.

Fastest where ``weight`` (out, in) lies in memory with its outputs side by side, ``np.asfortranarray(weight)``: then
both the map and the gradient for the weight read and write it in the order in which it lies.
"""

import numpy as np

from .gemm import affine, gemm, pack, packed_product, transpose, whole_tiles
from .jit import kernel
from .public import contiguous_output, given, matrix, output, public, refuse
from .simd import lanes, out_of_line
from .tile import load_row, store_tile, tile_add

# Rows of a gradient that serve for all that is made of them while they are in cache: 5 to 15 % less time for 1024 of them
# than one pass for each of dx, dweight and dbias.
BLOCK = 256


@kernel(exact=True, reads="a b", writes="c", floats="a b c")
def _matmul(a, b, c, add):
    """c = a b for each matrix of three stacks, or c += a b; a stack of one serves all."""
    size = c.itemsize
    a_row, a_step = a.strides[1] // size, a.strides[2] // size
    b_step, b_column = b.strides[1] // size, b.strides[2] // size
    c_row, c_column = c.strides[1] // size, c.strides[2] // size
    for s in range(len(c)):
        ai, bi, ci = s % len(a) * a.strides[0] // size, s % len(b) * b.strides[0] // size, s * c.strides[0] // size
        if c_column == 1 or c.shape[2] == 1:
            gemm(a, ai, a_row, a_step, b, bi, b_step, b_column, c, ci, c_row, c.shape[1], a.shape[2], c.shape[2], add)
        elif c_row == 1 or c.shape[1] == 1:  # c' = b' a'
            gemm(b, bi, b_column, b_step, a, ai, a_step, a_row, c, ci, c_column, c.shape[2], a.shape[2], c.shape[1], add)
        else:
            whole = np.empty((c.shape[1], c.shape[2]), c.dtype)
            gemm(a, ai, a_row, a_step, b, bi, b_step, b_column, whole, 0, whole.shape[1], c.shape[1], a.shape[2], c.shape[2],
                 False)
            for i in range(whole.shape[0]):
                for j in range(whole.shape[1]):
                    c[s, i, j] = c[s, i, j] + whole[i, j] if add else whole[i, j]


@kernel(exact=True, reads="x weight bias", floats="x weight bias y")
def _linear(x, weight, bias, relu, y):
    """y = x weight' + bias of matrices, a bias of size 0 being none. Returns whether the shapes belong together."""
    size = y.itemsize
    rows, outputs = y.shape
    if x.shape[0] != rows or x.shape[1] != weight.shape[1] or weight.shape[0] != outputs or bias.size not in (0, outputs):
        return False
    side_by_side = np.empty(bias.size, y.dtype)
    side_by_side[:] = bias
    affine(x, 0, x.strides[0] // size, x.strides[1] // size, weight, 0, weight.strides[1] // size, weight.strides[0] // size,
           side_by_side, y, 0, outputs, rows, x.shape[1], outputs, relu)
    return True


@kernel(exact=True)
def _add_rows(g, first, rows, sums):
    """Add ``rows`` rows of the matrix ``g`` to ``sums``, four vectors at a time, which stay in registers meanwhile."""
    out_of_line()
    columns = sums.size
    for j in range(0, columns, 4 * lanes(g)):
        n = columns - j
        total = load_row(sums, j, n, 4)
        for i in range(first, first + rows):
            total = tile_add(total, load_row(g, i * columns + j, n, 4))
        store_tile(total, sums, j, 0, n, 4)


@kernel(exact=True, reads="x weight", writes="dweight dx dbias", floats="x weight g y dx dweight dbias")
def _linear_vjp(g, x, weight, y, dx, dweight, dbias, add):
    """Gradients of ``_linear``, or ``dweight`` and ``dbias`` added to; what has size 0 is not wanted.

    ``y`` is its value if that had a relu. Returns whether the shapes belong together.
    """
    size = g.itemsize
    rows, outputs = g.shape
    inputs = x.shape[1]
    if len(x) != rows or weight.shape != (outputs, inputs) or y.size not in (0, g.size) or dx.size not in (0, x.size) \
            or dbias.size not in (0, outputs) or (dbias.size > 1 and dbias.strides[0] != size):
        return False
    if dweight.size and (dweight.shape != weight.shape or size not in dweight.strides):
        return False
    step, across = weight.strides[0] // size, weight.strides[1] // size
    x_row, x_column = x.strides[0] // size, x.strides[1] // size
    # dx = g weight, where weight' is what lies row by row. For few rows it takes less time to turn g and dx round than weight,
    # and to compute dx' = weight' g': the same sums in the same order.
    turn_weight = step != 1 or rows < lanes(g) or inputs * outputs <= rows * (inputs + outputs)
    panels = np.empty(outputs * whole_tiles(inputs, g) if dx.size and turn_weight else 0, g.dtype)
    turned = np.empty(0 if turn_weight else inputs * min(BLOCK, rows), g.dtype)
    if dx.size and turn_weight:
        pack(weight, 0, step, across, outputs, inputs, panels)
    masked = np.empty((min(BLOCK, rows), outputs) if y.size else (0, 0), g.dtype)
    if dbias.size and not add:
        dbias[:] = 0
    for first in range(0, max(rows, 1), BLOCK):  # all that is done with some rows of g while they are in cache
        count = min(BLOCK, rows - first)
        here, top, at_x = g, first, first * x_row
        if y.size:
            for i in range(count):
                for j in range(outputs):
                    masked[i, j] = g[first + i, j] if y[first + i, j] > 0 else g.dtype.type(0)
            here, top = masked, 0
        if dx.size and not turn_weight:
            gemm(weight, 0, across, 1, here, top * outputs, 1, outputs, turned, 0, count, inputs, outputs, count, False)
            transpose(turned, 0, count, inputs, count, dx, first * inputs, inputs)
        elif dx.size:
            packed_product(here, top * outputs, outputs, 1, panels, dx, first * inputs, inputs, count, outputs, inputs,
                           False)
        if dweight.size:
            more = add or first > 0
            if dweight.strides[1] == size:  # g' x
                gemm(here, top * outputs, 1, outputs, x, at_x, x_row, x_column, dweight, 0, dweight.strides[0] // size,
                     outputs, count, inputs, more)
            else:  # its transpose, x' g
                gemm(x, at_x, x_column, x_row, here, top * outputs, outputs, 1, dweight, 0, dweight.strides[1] // size,
                     inputs, count, outputs, more)
        if dbias.size:
            _add_rows(here, top, count, dbias)
    return True


@public
def linear(x, weight, bias=None, relu=False, out=None):
    """``x @ weight.T + bias``, and ``max(., 0)`` of it with ``relu``.

    Parameters
    ----------
    x : (..., in_features) array, float32 or float64
    weight : (out_features, in_features) array of the same dtype
    bias : (out_features,) array, optional
    relu : bool
    out : (..., out_features) C-contiguous array, optional
        Where the result is written.

    Returns
    -------
    (..., out_features) array

    Raises
    ------
    TypeError
        Other dtypes than float32 and float64, or several.
    ValueError
        Shapes that do not belong together.
    """
    if x.ndim == 0:
        refuse("linear takes {} features (weight {}), but the input is a number", weight.shape[1], weight.shape)
    y = contiguous_output(out, x.shape[:-1] + (len(weight),), x.dtype)
    b = given(bias, 0, x.dtype)
    if not _linear(matrix(x), weight, b, relu, matrix(y)):
        if x.shape[-1] != weight.shape[1]:
            refuse("linear takes {} features (weight {}), but the input of shape {} has {} in its last axis",
                   weight.shape[1], weight.shape, x.shape, x.shape[-1])
        refuse("linear with a weight of shape {} takes a bias of shape {}, not {}", weight.shape, weight.shape[:1], b.shape)
    return y


@public
def linear_vjp(g, x, weight, y=None, dx=None, dweight=None, dbias=None, add=False):
    """The gradients of ``linear``, those that have a place, in one call.

    Parameters
    ----------
    g : (..., out_features) array
    x, weight : the arguments of ``linear``
    y : (..., out_features) array, optional
        The value of ``linear``, if that was called with ``relu``.
    dx : (..., in_features) C-contiguous array, optional
    dweight : (out_features, in_features) array, C- or (faster) Fortran-contiguous, optional
    dbias : (out_features,) contiguous array, optional
        Where the gradients are written.
    add : bool
        Add to dweight and dbias instead.

    Raises
    ------
    TypeError
        Other dtypes than float32 and float64, or several.
    ValueError
        Shapes that do not belong together, or a place that is read-only or not as contiguous as said above.
    """
    if dx is not None and not dx.flags.c_contiguous:
        refuse("linear_vjp writes to a C-contiguous dx")
    # Arrays of size 0 stand for None, so that the kernel is compiled once for any selection.
    if not _linear_vjp(np.ascontiguousarray(matrix(g)), matrix(x), weight,
                       matrix(given(y, (0, 0), g.dtype)), matrix(given(dx, (0, 0), g.dtype)),
                       given(dweight, (0, 0), g.dtype), given(dbias, 0, g.dtype), add):
        refuse("linear_vjp got a gradient of shape {}, an input of shape {} and a weight of shape {}, or a y, dx, dweight "
               "or dbias of another shape, or a dweight neither C- nor Fortran-contiguous, or a dbias with gaps",
               g.shape, x.shape, weight.shape)


@public
def linear_vjp_x(g, weight):
    """Gradient for x, (..., in_features), from ``g`` (..., out_features)."""
    dx = np.empty(g.shape[:-1] + (weight.shape[1],), g.dtype)
    linear_vjp(g, dx, weight, dx=dx)  # dx in the place of x, of which only the shape is looked at
    return dx


@public
def linear_vjp_weight(g, x):
    """Gradient for weight, (out_features, in_features), Fortran-contiguous, from ``g`` and ``x``."""
    dweight = np.empty((x.shape[-1], g.shape[-1]), g.dtype).T
    linear_vjp(g, x, dweight, dweight=dweight)  # and so dweight in that of weight
    return dweight


@public
def linear_vjp_bias(g):
    """Gradient for bias, (out_features,): the sum of ``g`` over all but its last axis."""
    dbias = np.empty(g.shape[-1], g.dtype)
    # g in the place of x, and a weight of the shape that belongs to it: memory that nobody touches.
    linear_vjp(g, g, np.empty((g.shape[-1], g.shape[-1]), g.dtype), dbias=dbias)
    return dbias


@public
def matmul(a, b, out=None):
    """Products of matrices: ``out[i] = a[i] @ b[i]``.

    Parameters
    ----------
    a : (n, rows, inner) array, float32 or float64
    b : (n, inner, columns) array of the same dtype
        Stacks of any strides; a stack of one matrix serves all of the other's.
    out : (n, rows, columns) array, optional

    Returns
    -------
    (n, rows, columns) array

    Raises
    ------
    TypeError, ValueError
        Dtypes differ, or shapes do not belong together.
    """
    if a.ndim != 3 or b.ndim != 3 or a.shape[2] != b.shape[1] or (len(a) != len(b) and len(a) != 1 and len(b) != 1):
        refuse("matmul takes stacks of shapes (n, rows, inner) and (n, inner, columns), not {} and {}", a.shape, b.shape)
    n = len(b) if len(a) == 1 else len(a)
    c = output(out, (n, a.shape[1], b.shape[2]), a.dtype)
    _matmul(a, b, c, False)
    return c
