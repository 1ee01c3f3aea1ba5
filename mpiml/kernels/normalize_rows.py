"""Standardising arrays (n, c, m) whose places (last axis) are contiguous: sums, and what is done with them.

See :mod:`mpiml.kernels.normalize`. Sums over a channel's places are taken lane by lane, then over channels and samples
lane by lane, and over the lanes last.
"""

from .jit import inlined, kernel
from .simd import first_lanes, fma, lanes, load, load_part, reduce_add, select, splat, store, store_part


@inlined
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


@inlined
def _run_products(g, i, x, j, count, mean):
    """Sums, lane by lane, of g and of g * (x - mean), over ``count`` elements from ``i`` of g and ``j`` of x."""
    width = lanes(x)
    total, product, mu = splat(x.dtype.type(0)), splat(x.dtype.type(0)), splat(mean)
    whole = count // width * width
    for k in range(0, whole, width):
        v = load(g, i + k)
        total = total + v
        product = fma(v, load(x, j + k) - mu, product)
    if count % width:
        v = load_part(g, i + whole, count % width)
        total = total + v
        product = fma(v, load_part(x, j + whole, count % width) - mu, product)
    return total, product


@inlined
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
def row_moments(x, samples, groups, mean, var):
    """Mean and biased variance, (blocks, groups), of x (n, c, m): two passes, the second corrects the first one's mean."""
    n, c, m = x.shape
    size = x.itemsize
    by_sample, by_channel = x.strides[0] // size, x.strides[1] // size
    t = x.dtype.type
    each = c // groups
    for b in range(len(mean)):
        first, end = b * samples, min((b + 1) * samples, n)
        count = t((end - first) * each * m)
        for group in range(groups):
            total = splat(t(0))
            for i in range(first, end):
                for ch in range(group * each, (group + 1) * each):
                    total = total + _run_sum(x, i * by_sample + ch * by_channel, m)
            mu = reduce_add(total) / count
            total, square = splat(t(0)), splat(t(0))
            for i in range(first, end):
                for ch in range(group * each, (group + 1) * each):
                    d, dd = _run_deviations(x, i * by_sample + ch * by_channel, m, mu)
                    total = total + d
                    square = square + dd
            rest = reduce_add(total) / count
            mean[b, group] = mu + rest
            var[b, group] = max(reduce_add(square) / count - rest * rest, t(0))


@kernel(exact=True)
def row_products(g, x, samples, mean, total, product):
    """Sums of g and of g * (x - mean), (blocks, c), for each block and channel; ``mean`` is (blocks, groups)."""
    n, c, m = x.shape
    size = x.itemsize
    each = c // mean.shape[1]
    for b in range(len(mean)):
        for ch in range(c):
            gs, gx = splat(x.dtype.type(0)), splat(x.dtype.type(0))
            for i in range(b * samples, min((b + 1) * samples, n)):
                s, p = _run_products(g, i * (g.strides[0] // size) + ch * (g.strides[1] // size),
                                    x, i * (x.strides[0] // size) + ch * (x.strides[1] // size), m, mean[b, ch // each])
                gs = gs + s
                gx = gx + p
            total[b, ch] = reduce_add(gs)
            product[b, ch] = reduce_add(gx)


def _make_affine(vjp):
    """A kernel for y = (x - mean) * scale + shift, or (vjp) y = g * scale + (x - mean) * slope + shift.

    ``mean`` is (blocks, groups), the other coefficients are (blocks, c).
    """
    @kernel(exact=True)
    def affine(g, x, samples, mean, scale, slope, shift, y):
        n, c, m = x.shape
        size, width, groups = x.itemsize, lanes(x), mean.shape[1]
        each, whole, rest = c // groups, m // width * width, m % width
        for i in range(n):
            b = i // samples
            for group in range(groups):
                mu = splat(mean[b, group])
                for ch in range(group * each, (group + 1) * each):
                    factor, tilt, term = splat(scale[b, ch]), splat(slope[b, ch]), splat(shift[b, ch])
                    at_g = i * (g.strides[0] // size) + ch * (g.strides[1] // size)
                    at_x = i * (x.strides[0] // size) + ch * (x.strides[1] // size)
                    to = i * (y.strides[0] // size) + ch * (y.strides[1] // size)
                    for j in range(0, whole, width):
                        d = load(x, at_x + j) - mu
                        if vjp:
                            v = fma(load(g, at_g + j), factor, fma(d, tilt, term))
                        else:
                            v = fma(d, factor, term)
                        store(y, to + j, v)
                    if rest:
                        d = load_part(x, at_x + whole, rest) - mu
                        if vjp:
                            v = fma(load_part(g, at_g + whole, rest), factor, fma(d, tilt, term))
                        else:
                            v = fma(d, factor, term)
                        store_part(y, to + whole, v, rest)

    return affine


row_affine, row_affine_vjp = _make_affine(False), _make_affine(True)
