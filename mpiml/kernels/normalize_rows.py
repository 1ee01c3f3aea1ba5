"""Standardising a block (n, c, m) whose last axis is contiguous: sums, and what is done with them.

See :mod:`mpiml.kernels.normalize`. A channel is n *runs* of m elements, one after the other with those of the other
channels between them. All passes go through the memory from its beginning to its end, with one vector of sums for each
channel; a pass of its own for each channel, though it finds its runs in the cache again, takes twice as long. Coefficients
are read once a run: as vectors beside x they would take the first cache from it.

Sums are taken lane by lane, over the lanes last: RUNS runs of a channel at once, vector after vector of all of them, then
the next ones; those left over one by one.
"""

import numpy as np
from numba.extending import register_jitable

from .aligned import PAGE
from .jit import kernel
from .simd import (
    at,
    first_lanes,
    fma,
    lanes,
    load,
    load_part,
    out_of_line,
    reduce_add,
    select,
    splat,
    store,
    store_part,
)
from .tile import dot_tile, load_tile, tile_fma, tile_multiply, tile_subtract, tile_where_positive

RUNS = 4  # of a channel that are added up at once: their sums are loaded and stored that much less often


@register_jitable
def _steps(x):
    """Strides of the first two axes in elements, elements of whole vectors in a run, and of the rest of it."""
    size, m = x.itemsize, x.shape[2]
    return x.strides[0] // size, x.strides[1] // size, m // lanes(x) * lanes(x), m % lanes(x)


@register_jitable
def _together(x):
    """Of how many samples RUNS runs are added up at once; of the others they are one by one.

    Runs side by side are as many places in memory. Where these are not in a cache and samples shorter than a page, it takes
    twice as long to read them so (see :mod:`mpiml.kernels.layernorm`): with 32 x 16 x 32 x 32 elements 160 us instead of 85.
    """
    n, c, m = x.shape
    return 0 if c * m * x.itemsize <= PAGE and m >= 2 * lanes(x) else n // RUNS * RUNS


@register_jitable
def _run_sum(x, i, count):
    """Sum, lane by lane, of the ``count`` elements from position ``i``."""
    width = lanes(x)
    total = splat(x.dtype.type(0))
    whole = i + count // width * width
    for j in range(i, whole, width):
        total = total + load(x, j)
    if count % width:
        total = total + load_part(x, whole, count % width)
    return total


@register_jitable
def _run_deviations(x, i, count, mean):
    """Sums, lane by lane, of d = x - mean and of d * d, over the ``count`` elements from position ``i``."""
    width = lanes(x)
    zero, mu = splat(x.dtype.type(0)), splat(mean)
    total, square = zero, zero
    whole = i + count // width * width
    for j in range(i, whole, width):
        d = load(x, j) - mu
        total = total + d
        square = fma(d, d, square)
    if count % width:
        d = select(first_lanes(mu, count % width), load_part(x, whole, count % width) - mu, zero)
        total = total + d
        square = fma(d, d, square)
    return total, square


@kernel(exact=True)
def _sample_moments(x, mean, var):
    """Of one sample, which stays in the cache: two passes, the second corrects the first one's mean."""
    out_of_line()
    _, c, m = x.shape
    by_channel = x.strides[1] // x.itemsize
    t = x.dtype.type
    each = c // len(mean)
    count = t(each * m)
    for group in range(len(mean)):
        total = splat(t(0))
        for ch in range(group * each, (group + 1) * each):
            total = total + _run_sum(x, ch * by_channel, m)
        mu = reduce_add(total) / count
        total, square = splat(t(0)), splat(t(0))
        for ch in range(group * each, (group + 1) * each):
            d, dd = _run_deviations(x, ch * by_channel, m, mu)
            total = total + d
            square = square + dd
        rest = reduce_add(total) / count
        mean[group] = mu + rest
        var[group] = max(reduce_add(square) / count - rest * rest, t(0))


def _make_add_moments(size):
    """A kernel that adds the runs from ``start`` to ``stop``, ``size`` at a time, to the lanes' means and squares about them.

    A lane's new elements are taken less its mean so far (Chan, Golub and LeVeque 1983): of what they add to the squares,
    at most ``size`` times the sum cancels, and only at first.
    """
    @kernel(exact=True)
    def add_moments(x, start, stop, inverse, mean, square):
        out_of_line()
        t, width = x.dtype.type, lanes(x)
        by_sample, by_channel, whole, rest = _steps(x)
        zero, one = splat(t(0)), splat(t(1))
        in_rest = select(first_lanes(zero, rest), one, zero)
        for i in range(start, stop, size):
            share = load(inverse, 0) * splat(t(1) / t(i + size))
            for ch in range(x.shape[1]):
                place = i * by_sample + ch * by_channel
                mu, total, squares = load(mean, ch * width), zero, load(square, ch * width)
                for j in range(place, place + whole, width):
                    d = tile_subtract(load_tile(x, j, by_sample, None, size, 1), mu)
                    total, squares = dot_tile(d, one, total), dot_tile(d, d, squares)
                if rest:
                    d = tile_subtract(load_tile(x, place + whole, by_sample, rest, size, 1), mu)
                    d = tile_multiply(d, in_rest)
                    total, squares = dot_tile(d, one, total), dot_tile(d, d, squares)
                off = total * share
                store(mean, ch * width, mu + off)
                store(square, ch * width, squares - total * off)

    return add_moments


_add_moments, _add_moments_of_one = _make_add_moments(RUNS), _make_add_moments(1)


@kernel(exact=True)
def row_moments(x, mean, var):
    """Mean and biased variance, (groups,), of the channels of x (n, c, m) in equal groups."""
    n, c, m = x.shape
    if n == 1:
        _sample_moments(x, mean, var)
        return
    t, width, by_channel, each = x.dtype.type, lanes(x), x.strides[1] // x.itemsize, c // len(mean)
    zero, one = splat(t(0)), splat(t(1))
    count = splat(t(m // width)) + select(first_lanes(zero, m % width), one, zero)  # elements of a run in each lane
    inverse, means, squares = np.empty(width, x.dtype), np.empty(c * width, x.dtype), np.zeros(c * width, x.dtype)
    store(inverse, 0, select(count > zero, one / count, zero))
    for ch in range(c):
        store(means, ch * width, _run_sum(x, ch * by_channel, m) * load(inverse, 0))
    whole = _together(x)
    _add_moments(x, 0, whole, inverse, means, squares)
    _add_moments_of_one(x, whole, n, inverse, means, squares)
    # The lanes' means together, less one of them, which is that much more exact; and what they differ from that.
    for group in range(len(mean)):
        first, end = group * each * width, (group + 1) * each * width
        base, total = at(means, first), zero
        for i in range(first, end, width):
            total = fma(load(means, i) - splat(base), count, total)
        off = reduce_add(total) / t(each * m)
        total, square = zero, zero
        for i in range(first, end, width):
            d = (load(means, i) - splat(base)) - splat(off)
            total, square = fma(d * count, d, total), square + load(squares, i)
        mean[group] = base + off
        var[group] = (reduce_add(square) / t(n) + reduce_add(total)) / t(each * m)


def _make_add_products(size):
    """A kernel that adds the runs from ``start`` to ``stop``, ``size`` at a time, to the sums of :func:`row_products`."""
    @kernel(exact=True)
    def add_products(g, x, start, stop, mean, scale, offset, relu, totals, products):
        out_of_line()
        width, each = lanes(x), x.shape[1] // len(mean)
        by_sample, by_channel, whole, rest = _steps(x)
        g_by_sample, g_by_channel, _, _ = _steps(g)
        one = splat(x.dtype.type(1))
        for i in range(start, stop, size):
            for ch in range(x.shape[1]):
                place, g_place = i * by_sample + ch * by_channel, i * g_by_sample + ch * g_by_channel
                mu, factor, term = splat(mean[ch // each]), splat(scale[ch]), splat(offset[ch])
                total, product = load(totals, ch * width), load(products, ch * width)
                for j in range(0, whole, width):
                    d = tile_subtract(load_tile(x, place + j, by_sample, None, size, 1), mu)
                    v = load_tile(g, g_place + j, g_by_sample, None, size, 1)
                    if relu:
                        v = tile_where_positive(tile_fma(d, factor, term), v)
                    total, product = dot_tile(v, one, total), dot_tile(v, d, product)
                if rest:
                    d = tile_subtract(load_tile(x, place + whole, by_sample, rest, size, 1), mu)
                    v = load_tile(g, g_place + whole, g_by_sample, rest, size, 1)
                    if relu:
                        v = tile_where_positive(tile_fma(d, factor, term), v)
                    total, product = dot_tile(v, one, total), dot_tile(v, d, product)
                store(totals, ch * width, total)
                store(products, ch * width, product)

    return add_products


_add_products, _add_products_of_one = _make_add_products(RUNS), _make_add_products(1)


@kernel(exact=True)
def row_products(g, x, mean, scale, offset, relu, total, product):
    """Sums of g and of g * (x - mean), (c,), for each channel; with ``relu`` where (x - mean) * scale + offset > 0."""
    n, c, width = len(x), x.shape[1], lanes(x)
    totals, products = np.zeros(c * width, x.dtype), np.zeros(c * width, x.dtype)
    whole = _together(x)
    _add_products(g, x, 0, whole, mean, scale, offset, relu, totals, products)
    _add_products_of_one(g, x, whole, n, mean, scale, offset, relu, totals, products)
    for ch in range(c):
        total[ch], product[ch] = reduce_add(load(totals, ch * width)), reduce_add(load(products, ch * width))


def _make_affine(vjp):
    """A kernel for y = (x - mean) * scale + offset, or (vjp) y = g * scale + (x - mean) * slope + shift.

    With ``relu`` y is 0 where that is negative, and (vjp) so is g where (x - mean) * scale + offset is not positive.
    ``mean`` is (groups,), the other coefficients are (c,).
    """
    @kernel(exact=True)
    def affine(g, x, mean, scale, offset, slope, shift, relu, y):
        out_of_line()
        n, c, _ = x.shape
        width, each = lanes(x), c // len(mean)
        by_sample, by_channel, whole, rest = _steps(x)
        g_by_sample, g_by_channel, _, _ = _steps(g)
        y_by_sample, y_by_channel, _, _ = _steps(y)
        zero = splat(x.dtype.type(0))
        for i in range(n):
            for ch in range(c):
                mu, factor, term = splat(mean[ch // each]), splat(scale[ch]), splat(offset[ch])
                tilt, lift = splat(slope[ch]), splat(shift[ch])
                at_g, at_x = i * g_by_sample + ch * g_by_channel, i * by_sample + ch * by_channel
                at_y = i * y_by_sample + ch * y_by_channel
                for j in range(0, whole, width):
                    d = load(x, at_x + j) - mu
                    v = fma(d, factor, term)
                    if vjp:
                        up = load(g, at_g + j)
                        if relu:
                            up = select(v > zero, up, zero)
                        v = fma(up, factor, fma(d, tilt, lift))
                    elif relu:
                        v = select(zero > v, zero, v)  # NaN is not below 0
                    store(y, at_y + j, v)
                if rest:
                    d = load_part(x, at_x + whole, rest) - mu
                    v = fma(d, factor, term)
                    if vjp:
                        up = load_part(g, at_g + whole, rest)
                        if relu:
                            up = select(v > zero, up, zero)
                        v = fma(up, factor, fma(d, tilt, lift))
                    elif relu:
                        v = select(zero > v, zero, v)
                    store_part(y, at_y + whole, v, rest)

    return affine


row_affine, row_affine_vjp = _make_affine(False), _make_affine(True)
