"""Layer normalisation: every row standardised over its features, times a weight plus a bias for each feature.

Rows are taken several at a time, so that their sums, each a chain of additions, wait together; a row's result does not
depend on which. Their memory is then read and written at as many places at once. Where it is not in a cache yet, that
is quicker for rows longer than a page, beyond which nothing is fetched ahead, but much slower for others. So rows that
are neither short nor longer than a page are taken one by one, WIDE vectors at a time: 1024 x 768 elements from
memory take 0.25 ms instead of 0.4, their gradients 0.5 instead of 0.7.

Mean and variance come from one pass over the row's elements less the mean of its first ones, a vector of them or WIDE
(Chan, Golub and LeVeque 1983, "Algorithms for computing the sample variance"). So the mean may be large, and what
cancels is at most as many times the sum as there are vectors in a row.
"""

import numpy as np

from . import aligned
from .aligned import PAGE
from .jit import kernel, vector_function
from .public import contiguous_output, given, public, refuse
from .registers import REGISTER
from .simd import (
    filled,
    first_lanes,
    fma,
    lanes,
    load,
    load_part,
    load_wide,
    out_of_line,
    reduce_add,
    select,
    splat,
    sqrt,
    store,
    store_part,
)
from .tile import (
    dot_tile,
    load_tile,
    splat_tile,
    spread,
    store_first,
    store_tile,
    sums_of_rows,
    tile_add,
    tile_fma,
    tile_multiply,
    tile_subtract,
    zero_tile,
)

ROWS = REGISTER // 8  # short rows at a time; their sums are lanes of one vector, of float64 all of them
SHORT = 1 << 10  # bytes of a row up to which so many, and their results, stay in the first cache until they are read again
FEW = min(ROWS, 4)  # rows longer than a page at a time
ROWS_VJP = 2
WIDE = 4  # vectors at a time of a row on its own


def _make_rows(size):
    """A kernel for the rows from ``start`` to ``stop``, ``size`` at a time: y, and the rows' ``mean`` and ``scale``."""
    @kernel(exact=True)
    def rows(x, start, stop, weight, bias, eps, y, mean, scale):
        out_of_line()
        count, width, t = x.shape[1], lanes(x), x.dtype.type
        whole, rest = count // width * width, count % width
        zero, one, share = splat(t(0)), splat(t(1)), splat(t(1) / t(count))
        in_rest = select(first_lanes(zero, rest), one, zero)
        for r in range(start, stop, size):
            i = r * count
            if whole:
                head = sums_of_rows(load_tile(x, i, count, None, size, 1))
            else:
                head = sums_of_rows(load_tile(x, i, count, rest, size, 1))
            shift = spread(head * splat(t(1) / t(min(count, width))), size)
            total = square = zero_tile(x, size)
            for j in range(i, i + whole, width):
                d = tile_subtract(load_tile(x, j, count, None, size, 1), shift)
                total, square = tile_add(total, d), tile_fma(d, d, square)
            if rest:
                d = tile_multiply(tile_subtract(load_tile(x, i + whole, count, rest, size, 1), shift), in_rest)
                total, square = tile_add(total, d), tile_fma(d, d, square)
            off = sums_of_rows(total) * share  # from here on a row in each lane
            variance = sums_of_rows(square) * share - off * off
            scales = one / sqrt(select(variance < zero, zero, variance) + splat(t(eps)))
            mu, factor = tile_add(shift, spread(off, size)), spread(scales, size)
            store_first(mu, mean, r)
            store_first(factor, scale, r)
            for j in range(0, whole, width):
                d = tile_multiply(tile_subtract(load_tile(x, i + j, count, None, size, 1), mu), factor)
                store_tile(tile_fma(d, load(weight, j), load(bias, j)), y, i + j, count, None, 1)
            if rest:
                d = tile_multiply(tile_subtract(load_tile(x, i + whole, count, rest, size, 1), mu), factor)
                d = tile_fma(d, load_part(weight, whole, rest), load_part(bias, whole, rest))
                store_tile(d, y, i + whole, count, rest, 1)

    return rows


_rows, _few_rows, _row = _make_rows(ROWS), _make_rows(FEW), _make_rows(1)


@vector_function
def _affine(x, i, mu, factor, weight, bias, j, y, count):
    """WIDE vectors of y from position i on, features from j on, or ``count`` elements of them."""
    d = (load_wide(x, i, count, WIDE) - mu) * factor
    store_part(y, i, fma(d, load_wide(weight, j, count, WIDE), load_wide(bias, j, count, WIDE)), count)


@kernel(exact=True)
def _one_by_one(x, weight, bias, eps, y, mean, scale):
    """The same for all rows of x, of at least WIDE vectors."""
    out_of_line()
    count, step, t = x.shape[1], WIDE * lanes(x), x.dtype.type
    rest = count % step
    whole = count - rest
    for r in range(len(x)):
        i = r * count
        head = load_wide(x, i, None, WIDE)
        base, zero = reduce_add(head) / t(step), filled(head, t(0))
        total, square, shift = zero, zero, filled(zero, base)
        for j in range(i, i + whole, step):
            d = load_wide(x, j, None, WIDE) - shift
            total, square = total + d, fma(d, d, square)
        if rest:
            d = select(first_lanes(zero, rest), load_wide(x, i + whole, rest, WIDE) - shift, zero)
            total, square = total + d, fma(d, d, square)
        off = reduce_add(total) / t(count)
        variance = reduce_add(square) / t(count) - off * off
        if variance < 0:
            variance = t(0)
        mean[r], scale[r] = base + off, t(1) / np.sqrt(variance + t(eps))
        mu, factor = filled(zero, mean[r]), filled(zero, scale[r])
        for j in range(0, whole, step):
            _affine(x, i + j, mu, factor, weight, bias, j, y, None)
        if rest:
            _affine(x, i + whole, mu, factor, weight, bias, whole, y, rest)


@kernel(exact=True, floats="x weight bias y mean scale")
def _layer_norm(x, weight, bias, eps, y, mean, scale):
    if x.size == 0:
        return
    size = x.shape[1] * x.itemsize
    if SHORT < size <= PAGE:
        _one_by_one(x, weight, bias, eps, y, mean, scale)
        return
    many = len(x) // ROWS * ROWS if size <= SHORT else 0
    few = many + (len(x) - many) // FEW * FEW
    _rows(x, 0, many, weight, bias, eps, y, mean, scale)
    _few_rows(x, many, few, weight, bias, eps, y, mean, scale)
    _row(x, few, len(x), weight, bias, eps, y, mean, scale)


def _make_rows_vjp(size):
    """A kernel for the gradients of such rows; those of weight and bias are added."""
    @kernel(exact=True)
    def rows_vjp(g, start, stop, x, mean, scale, weight, dx, dweight, dbias):
        out_of_line()
        count, width, t = x.shape[1], lanes(x), x.dtype.type
        share, one, zero = splat(t(1) / t(count)), splat(t(1)), splat(t(0))
        whole, rest = count // width * width, count % width
        for r in range(start, stop, size):
            i = r * count
            mu = splat_tile(mean, r, 1, size)
            sum_g = sum_gd = zero_tile(x, size)  # of g * weight, and of that times d = x - mean
            for j in range(0, whole, width):
                v = load_tile(g, i + j, count, None, size, 1)
                d = tile_subtract(load_tile(x, i + j, count, None, size, 1), mu)
                w = tile_multiply(v, load(weight, j))
                sum_g, sum_gd = tile_add(sum_g, w), tile_fma(w, d, sum_gd)
            if rest:
                v = load_tile(g, i + whole, count, rest, size, 1)
                d = tile_subtract(load_tile(x, i + whole, count, rest, size, 1), mu)
                w = tile_multiply(v, load_part(weight, whole, rest))
                sum_g, sum_gd = tile_add(sum_g, w), tile_fma(w, d, sum_gd)
            # dx = scale * g * weight - scale * sum_g / n - d * scale**3 * sum_gd / n
            s = load_part(scale, r, size)
            lower = s * share
            term = spread(zero - lower * sums_of_rows(sum_g), size)
            tilt = spread(zero - lower * s * s * sums_of_rows(sum_gd), size)
            factor = spread(s, size)
            for j in range(0, whole, width):
                v = load_tile(g, i + j, count, None, size, 1)
                d = tile_subtract(load_tile(x, i + j, count, None, size, 1), mu)
                u = tile_multiply(v, factor)
                store_tile(tile_fma(u, load(weight, j), tile_fma(d, tilt, term)), dx, i + j, count, None, 1)
                store(dweight, j, dot_tile(u, d, load(dweight, j)))
                store(dbias, j, dot_tile(v, one, load(dbias, j)))
            if rest:
                v = load_tile(g, i + whole, count, rest, size, 1)
                d = tile_subtract(load_tile(x, i + whole, count, rest, size, 1), mu)
                u = tile_multiply(v, factor)
                store_tile(tile_fma(u, load_part(weight, whole, rest), tile_fma(d, tilt, term)), dx, i + whole, count, rest, 1)
                store_part(dweight, whole, dot_tile(u, d, load_part(dweight, whole, rest)), rest)
                store_part(dbias, whole, dot_tile(v, one, load_part(dbias, whole, rest)), rest)

    return rows_vjp


_rows_vjp, _row_vjp = _make_rows_vjp(ROWS_VJP), _make_rows_vjp(1)


@vector_function
def _add_products(g, x, i, mu, weight, j, sum_g, sum_gd, count):
    """The sums of g * weight, and of that times x - mean, with those of WIDE vectors more, or ``count`` elements of them."""
    w = load_wide(g, i, count, WIDE) * load_wide(weight, j, count, WIDE)
    return sum_g + w, fma(w, load_wide(x, i, count, WIDE) - mu, sum_gd)


@vector_function
def _affine_vjp(g, x, i, mu, factor, tilt, term, weight, j, dx, dweight, dbias, count):
    """WIDE vectors of dx, or ``count`` elements of them, and what they add to dweight and dbias."""
    v, d = load_wide(g, i, count, WIDE), load_wide(x, i, count, WIDE) - mu
    u = v * factor
    store_part(dx, i, fma(u, load_wide(weight, j, count, WIDE), fma(d, tilt, term)), count)
    store_part(dweight, j, fma(u, d, load_wide(dweight, j, count, WIDE)), count)
    store_part(dbias, j, v + load_wide(dbias, j, count, WIDE), count)


@kernel(exact=True)
def _one_by_one_vjp(g, x, mean, scale, weight, dx, dweight, dbias):
    """The same for all such rows of x."""
    out_of_line()
    count, step, t = x.shape[1], WIDE * lanes(x), x.dtype.type
    rest = count % step
    whole = count - rest
    zero = filled(load_wide(x, 0, None, WIDE), t(0))
    for r in range(len(x)):
        i = r * count
        sum_g, sum_gd, mu = zero, zero, filled(zero, mean[r])
        for j in range(0, whole, step):
            sum_g, sum_gd = _add_products(g, x, i + j, mu, weight, j, sum_g, sum_gd, None)
        if rest:
            sum_g, sum_gd = _add_products(g, x, i + whole, mu, weight, whole, sum_g, sum_gd, rest)
        s = scale[r]
        factor = filled(zero, s)
        term = filled(zero, -s / t(count) * reduce_add(sum_g))
        tilt = filled(zero, -s / t(count) * s * s * reduce_add(sum_gd))
        for j in range(0, whole, step):
            _affine_vjp(g, x, i + j, mu, factor, tilt, term, weight, j, dx, dweight, dbias, None)
        if rest:
            _affine_vjp(g, x, i + whole, mu, factor, tilt, term, weight, whole, dx, dweight, dbias, rest)


@kernel(exact=True, floats="g x mean scale weight dx dweight dbias")
def _layer_norm_vjp(g, x, mean, scale, weight, dx, dweight, dbias):
    dweight[:] = 0
    dbias[:] = 0
    if x.size == 0:
        return
    if SHORT < x.shape[1] * x.itemsize <= PAGE:
        _one_by_one_vjp(g, x, mean, scale, weight, dx, dweight, dbias)
        return
    whole = len(x) // ROWS_VJP * ROWS_VJP
    _rows_vjp(g, 0, whole, x, mean, scale, weight, dx, dweight, dbias)
    _row_vjp(g, whole, len(x), x, mean, scale, weight, dx, dweight, dbias)


@public
def _whole(array, x, value):
    """A weight or bias (features,) of the rows x, contiguous; None stands for ``value`` everywhere."""
    whole = given(array, x.shape[1], x.dtype)
    if array is None:
        whole[:] = value
    if whole.shape != x.shape[1:]:
        refuse("layer_norm of rows of shape {} takes a weight and bias of their length, not of shape {}", x.shape, whole.shape)
    return np.ascontiguousarray(whole)


@public
def layer_norm(x, weight=None, bias=None, eps=1e-5, out=None):
    """``(x - mean) / sqrt(var + eps) * weight + bias`` for each row (Ba et al. 2016, "Layer normalization").

    Parameters
    ----------
    x : (rows, features) array, float32 or float64
    weight, bias : (features,) arrays, optional
    eps : float
    out : (rows, features) array, optional
        Contiguous; where to put y.

    Returns
    -------
    y : (rows, features) array
    mean, scale : (rows,) arrays
        The rows' means and 1 / sqrt(var + eps), for :func:`layer_norm_vjp`.

    Raises
    ------
    TypeError, ValueError
        Dtypes differ, or shapes do not belong together; as of :func:`layer_norm_vjp`.
    """
    if x.ndim != 2:
        refuse("layer_norm takes (rows, features), not {}: reshape the input", x.shape)
    y = contiguous_output(out, x.shape, x.dtype)
    mean, scale = np.empty(len(x), x.dtype), np.empty(len(x), x.dtype)
    weight, bias = _whole(weight, x, 1), _whole(bias, x, 0)
    _layer_norm(np.ascontiguousarray(x), weight, bias, eps, y, mean, scale)
    return y, mean, scale


@public
def layer_norm_vjp(g, x, mean, scale, weight=None):
    """Gradients of ``y, mean, scale = layer_norm(x, weight, bias)`` for y: dx (rows, features), dweight, dbias (features,)."""
    if x.ndim != 2 or g.shape != x.shape or mean.shape != x.shape[:1] or scale.shape != x.shape[:1]:
        refuse("layer_norm of rows of shape {} has a gradient of that shape, not {}, and a mean and scale for each row, not {}",
               x.shape, g.shape, mean.shape)
    dx = aligned.array(x.shape, x.dtype)
    dweight, dbias = np.empty(x.shape[1], x.dtype), np.empty(x.shape[1], x.dtype)
    weight = _whole(weight, x, 1)
    _layer_norm_vjp(np.ascontiguousarray(g), np.ascontiguousarray(x), mean, scale, weight, dx, dweight, dbias)
    return dx, dweight, dbias
