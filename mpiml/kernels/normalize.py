"""Standardising images to mean 0 and variance 1, per channel or group of channels: batch and group normalisation.

An array is seen as (n, c, m): samples, channels, places. Statistics are taken over blocks of ``samples`` consecutive
samples and over each of ``groups`` equal runs of channels:

===========  =====================  ===========
batch norm   samples = the batch    groups = c
group norm   samples = 1            groups
===========  =====================  ===========

Two memory layouts are worked on where they lie: *rows*, in which the places of a channel follow each other, and
*columns*, (m, c, n) in memory, in which the samples do. A sum over samples and places does not mind which is which: a block
of samples in columns is one of rows with its axes turned round. But where each sample has its own statistics, or so few
have them together that they do not fill a vector, what is applied to a place of columns is a vector of c * n coefficients,
see :mod:`mpiml.kernels.normalize_columns`.

Variances are taken about the mean, or about one so far (Chan, Golub and LeVeque 1983, "Algorithms for computing the sample
variance"), so the mean may be large. Sums over a sample's channel have one partial sum for each remainder of the place by
the number of lanes, in both layouts, so group norm gives a sample the same bits in both.

A relu behind the norm is part of its last step. Its gradient needs to know where the result was positive: that is computed
once more from x, which is read anyhow, so that neither the result nor another gradient passes through memory.
"""

import numpy as np
from numba.extending import register_jitable

from . import aligned
from .jit import kernel
from .normalize_columns import column_affine, column_affine_vjp, column_moments, column_products
from .normalize_rows import row_affine, row_affine_vjp, row_moments, row_products
from .public import given, public, refuse
from .simd import lanes


@kernel(exact=True, reads="var weight bias")
def _coefficients(var, c, eps, weight, bias):
    """Those of ``(x - mean) * scale + offset``, for each block and channel."""
    blocks, groups = var.shape
    t = var.dtype.type
    scale, offset = np.empty((blocks, c), var.dtype), np.zeros((blocks, c), var.dtype)
    for b in range(blocks):
        for ch in range(c):
            scale[b, ch] = t(1) / np.sqrt(var[b, ch // (c // groups)] + t(eps))
            if weight.size:
                scale[b, ch] *= weight[ch]
            if bias.size:
                offset[b, ch] = bias[ch]
    return scale, offset


@register_jitable
def _block(x, b, samples, columns):
    """Block ``b`` of x, the axis that is contiguous last."""
    block = x[b * samples:(b + 1) * samples]
    return block.T if columns else block


@register_jitable
def _by_places(x, samples, columns):
    """Whether coefficients are applied to one place after the other: where the samples of a block do not fill a vector."""
    return columns and min(samples, len(x)) < lanes(x) <= len(x) * x.shape[1]


@kernel(exact=True, reads="x weight bias", writes="mean var y", floats="x mean var weight bias y")
def _standardize(x, samples, groups, eps, weight, bias, positive, measure, columns, mean, var, y):
    """y of x (n, c, m), of which mean and var (blocks, groups) are taken with ``measure``; ``columns``: the layout."""
    if x.size == 0:
        return
    if measure and columns and samples == 1:
        column_moments(x, mean, var)
    elif measure:
        for b in range(len(mean)):
            row_moments(_block(x, b, samples, columns), mean[b], var[b])
    scale, offset = _coefficients(var, x.shape[1], eps, weight, bias)
    # The vjp's form of these kernels takes a g and a slope, too; here anything of their types stands in their place.
    if _by_places(x, samples, columns):
        column_affine(x, x, samples, mean, scale, offset, offset, offset, positive, y)
    else:
        for b in range(len(mean)):
            block = _block(x, b, samples, columns)
            row_affine(block, block, mean[b], scale[b], offset[b], offset[b], offset[b], positive,
                       _block(y, b, samples, columns))


@kernel(exact=True, reads="g x weight bias mean var", writes="out", floats="g x mean var weight bias out")
def _standardize_vjp(g, x, samples, eps, weight, bias, positive, mean, var, measured, columns, out, dweight, dbias):
    """``out``, the gradient for x, and those for weight and bias. Statistics that were not ``measured`` are constants."""
    if x.size == 0:
        return
    n, c, m = x.shape
    blocks, groups = mean.shape
    each = c // groups
    t = x.dtype.type
    total, product = np.empty((blocks, c), x.dtype), np.empty((blocks, c), x.dtype)
    scale, offset = _coefficients(var, c, eps, weight, bias)
    if columns and samples == 1:
        column_products(g, x, mean, scale, offset, positive, total, product)
    else:
        for b in range(blocks):
            row_products(_block(g, b, samples, columns), _block(x, b, samples, columns), mean[b], scale[b], offset[b],
                         positive, total[b], product[b])
    # With d = x - mean and the sums over a block, of s values each, of w g and w g d:
    # out = w g / std - sum(w g) / s / std - d sum(w g d) / s / std**3
    slope, shift = np.zeros((blocks, c), x.dtype), np.zeros((blocks, c), x.dtype)
    dweight[:] = t(0)
    dbias[:] = t(0)
    for b in range(blocks):
        count = t(min(samples, n - b * samples) * each * m)
        for group in range(groups):
            inverse = t(1) / np.sqrt(var[b, group] + t(eps))
            sum_g, sum_gd = t(0), t(0)
            for ch in range(group * each, (group + 1) * each):
                w = weight[ch] if weight.size else t(1)
                sum_g += w * total[b, ch]
                sum_gd += w * product[b, ch]
                dweight[ch] += product[b, ch] * inverse
                dbias[ch] += total[b, ch]
            if measured:
                for ch in range(group * each, (group + 1) * each):
                    slope[b, ch] = -inverse * inverse * inverse * (sum_gd / count)
                    shift[b, ch] = -inverse * (sum_g / count)
    if _by_places(x, samples, columns):
        column_affine_vjp(g, x, samples, mean, scale, offset, slope, shift, positive, out)
    else:
        for b in range(blocks):
            row_affine_vjp(_block(g, b, samples, columns), _block(x, b, samples, columns), mean[b], scale[b], offset[b],
                           slope[b], shift[b], positive, _block(out, b, samples, columns))


@public
def _in_columns(x, samples):
    """Does the (n, c, m) array ``x`` lie in memory as (m, c, n)? For samples on their own a place must fill a vector."""
    size = x.itemsize
    return x.strides[0] == size and x.strides[1] == size * len(x) and (samples > 1 or lanes(x) <= len(x) * x.shape[1])


@public
def _arranged(x, columns, samples):
    """``x`` where it lies, if in this layout, or a copy."""
    if columns:
        return x if _in_columns(x, samples) else np.ascontiguousarray(x.transpose(2, 1, 0)).transpose(2, 1, 0)
    return x if x.strides[2] == x.itemsize else np.ascontiguousarray(x)


@public
def _like(x, columns):
    """A new array of the shape of x, in one of the two layouts."""
    n, c, m = x.shape
    memory = aligned.empty(x.size, x.dtype)
    return memory.reshape(m, c, n).transpose(2, 1, 0) if columns else memory.reshape(n, c, m)


@public
def _given(array, x):
    """A weight or bias as the loops take it: ``array``, or one of size 0 for None."""
    if array is not None and array.shape != x.shape[1:2]:
        refuse("a norm of an input of shape {} takes one number for each channel, not {}", x.shape, array.shape)
    return given(array, 0, x.dtype)


@public
def _check(x, samples, groups):
    if x.ndim != 3:
        refuse("standardize takes (samples, channels, places), not {}: reshape the input", x.shape)
    if samples < 1 or groups < 0 or (groups > 0 and x.shape[1] % groups):
        refuse("standardize of an input of shape {} takes samples >= 1 and groups that divide the channels, not {} and {}",
               x.shape, samples, groups)


@public
def standardize(x, samples=1, eps=1e-5, groups=0, weight=None, bias=None, relu=False):
    """``(x - mean) / sqrt(var + eps) * weight + bias``: batch, group and instance normalisation.

    Parameters
    ----------
    x : (n, c, m) array, float32 or float64
        Worked on where it lies if its places (last axis) are contiguous, or if it is the transpose of a contiguous
        (m, c, n) array; otherwise copied.
    samples : int
        Consecutive entries of the first axis that share their statistics; the last block may be smaller.
    eps : float
    groups : int
        Equal runs of channels that share their statistics; 0: each channel on its own.
    weight, bias : (c,) arrays, optional
    relu : bool
        ``max(., 0)`` of the result; NaN stays NaN.

    Returns
    -------
    y : (n, c, m) array in the layout of x
    mean, var : (blocks, groups) arrays
        The biased statistics of each block, ``blocks = ceil(n / samples)``.

    Raises
    ------
    TypeError, ValueError
        Dtypes differ, or shapes do not belong together.

    References
    ----------
    Ioffe and Szegedy 2015 (batch normalisation), Wu and He 2018 (group normalisation).
    """
    _check(x, samples, groups)
    columns = _in_columns(x, samples)
    x = _arranged(x, columns, samples)
    y = _like(x, columns)
    shape = (-(-len(x) // samples) if x.size else 0, groups or x.shape[1])
    mean, var = np.empty(shape, x.dtype), np.empty(shape, x.dtype)
    _standardize(x, samples, shape[1], eps, _given(weight, x), _given(bias, x), relu, True, columns, mean, var, y)
    return y, mean, var


@public
def standardize_vjp(g, x, mean, var, samples=1, eps=1e-5, weight=None, bias=None, relu=False):
    """Gradients of ``y, mean, var = standardize(x, samples, eps, groups, weight, bias, relu)`` for y alone.

    ``bias`` is used with ``relu`` only: where y was positive is computed anew, which is faster than to read y.

    Returns
    -------
    dx : (n, c, m) array in the layout of x
    dweight, dbias : (c,) arrays

    Raises
    ------
    TypeError, ValueError
        As :func:`standardize`, or a ``g`` or statistics of shapes that do not belong to x.
    """
    return _vjp(g, x, mean, var, samples, eps, weight, bias, relu, True)


@public
def _vjp(g, x, mean, var, samples, eps, weight, bias, relu, measured):
    _check(x, samples, mean.shape[1])
    if g.shape != x.shape or (x.size and len(mean) != -(-len(x) // samples)) or mean.shape != var.shape:
        refuse("a norm of an input of shape {} in blocks of {} has a gradient of that shape, not {}, and statistics of each "
               "block, not {}", x.shape, samples, g.shape, mean.shape)
    columns = _in_columns(x, samples)
    x, g = _arranged(x, columns, samples), _arranged(g, columns, samples)
    dx = _like(x, columns)
    dweight, dbias = np.zeros(x.shape[1], x.dtype), np.zeros(x.shape[1], x.dtype)
    _standardize_vjp(g, x, samples, eps, _given(weight, x), _given(bias, x), relu, mean, var, measured, columns, dx,
                     dweight, dbias)
    return dx, dweight, dbias


@public
def _samples_together(x):
    """How many samples of x a block of given statistics has: all, or one if they are too few to fill a vector in columns."""
    return 1 if len(x) < lanes(x) and _in_columns(x, 1) else max(len(x), 1)


@public
def _of_blocks(statistic, x, samples):
    """A statistic (c,) as that of each block."""
    of_blocks = np.empty((-(-len(x) // samples), x.shape[1]), statistic.dtype)
    of_blocks[:] = _given(statistic, x)
    return of_blocks


@public
def standardize_by(x, mean, var, eps=1e-5, weight=None, bias=None, relu=False):
    """``(x - mean) / sqrt(var + eps) * weight + bias`` with given statistics (c,): batch normalisation at inference.

    The other arguments and the result are those of :func:`standardize`.
    """
    _check(x, 1, 0)
    samples = _samples_together(x)
    columns = _in_columns(x, samples)
    x = _arranged(x, columns, samples)
    y = _like(x, columns)
    mean, var = _of_blocks(mean, x, samples), _of_blocks(var, x, samples)
    _standardize(x, samples, x.shape[1], eps, _given(weight, x), _given(bias, x), relu, False, columns, mean, var, y)
    return y


@public
def standardize_by_vjp(g, x, mean, var, eps=1e-5, weight=None, bias=None, relu=False):
    """Gradients of :func:`standardize_by` for x, weight and bias, the statistics being constants."""
    samples = _samples_together(x)
    return _vjp(g, x, _of_blocks(mean, x, samples), _of_blocks(var, x, samples), samples, eps, weight, bias, relu, False)
