"""Winograd's convolution F(4x4, 3x3): 36 multiplications for 4 x 4 pixels of the result instead of 144.

A convolution is a product of polynomials, and these can be multiplied by their values at a few points: here at 0, 1, -1,
2, -2 and infinity, in both directions. Each 6 x 6 square of the image, every 4 pixels, is transformed to its 36 "values"
(``B' d B``), the weights to theirs (``G g G'``), values are multiplied and summed over the channels, 36 matrix products,
and the result's 4 x 4 pixels come back of the sums (``A' m A``). The transforms are sums of few pixels with small
factors, so all of that is work on whole vectors of samples; it costs accuracy: the error is up to 1e-5 of the largest
element in float32, where the direct sum has 1e-6. (Lavin and Gray 2016, "Fast algorithms for convolutional neural
networks"; Winograd 1980.) Each row of the three matrices belongs to one of the points, or gives one of the pixels:

    G:  1/4    0     0          B':  4  0 -5  0  1  0          A':  1  1  1  1  1  0
       -1/6  -1/6  -1/6              0 -4 -4  1  1  0               0  1 -1  2 -2  0
       -1/6   1/6  -1/6              0  4 -4 -1  1  0               0  1  1  4  4  0
        1/24  1/12  1/6              0 -2 -1  2  1  0               0  1 -1  8 -8  1
        1/24 -1/12  1/6              0  2 -1 -2  1  0
         0     0     1               0  4  0 -5  0  1

A square's pixels lie far apart in memory, in more streams than the processor follows by itself. So those of the next one
are asked for during the products: that saves a fifth of the time where the images come from memory, and more for batches
larger than 32. And pixels a power of two apart would all want the same few places of the first cache: so they are copied
together before they are transformed, which saves a tenth.
"""

import numpy as np
from numba.extending import register_jitable

from . import aligned
from .direct import bias_and_least, pack_weights
from .gemm import ROWS, VECTORS, column_of_tiles, make_tiles
from .jit import kernel, vector_function
from .polynomial import number
from .simd import flat, fma, lanes, load, load_part, maximum, out_of_line, prefetch, splat, store, store_part
from .tile import across, load_row, load_tile, store_tile, tile_add, tile_fma, tile_multiply, tile_subtract

VALUES = 36
NEAR = 4  # channels of a square that are copied together
# What the transforms of one vector of samples cost, in fused multiply-adds, measured.
_IMAGE_COST, _RESULT_COST = 330, 270

_tiles = make_tiles(ROWS, VECTORS, False)


@register_jitable
def _block(panel):
    return (VALUES + 1) * panel  # of a channel's pixels; one more, so that channels do not want the same places of the cache


@register_jitable
def near_size(panel):
    """Elements of the memory that :func:`transform_squares` copies pixels to."""
    return NEAR * _block(panel)


@kernel
def pays(height, width, channels, outputs):
    """Does it take clearly fewer operations, a fifth at least, for a result of height x width?"""
    tiles = -(-height // 4) * -(-width // 4)
    direct = height * width * 9 * channels * outputs
    return 1.25 * tiles * (VALUES * channels * outputs + _IMAGE_COST * channels + _RESULT_COST * outputs) < direct


@vector_function
def _six(a, i, stride):
    return load_tile(a, i, stride, None, 6, 1)


@vector_function
def _tap_values(g):
    """``G g``: three taps to six values."""
    g0, g1, g2 = g
    sixth, small = number(g0, "0.16666666666666666"), number(g0, "0.041666666666666664")
    odd, wide, half = (g0 + g2) * number(g0, "-0.16666666666666666"), fma(g0, small, g2 * sixth), g1 * (small + small)
    return (g0 * number(g0, "0.25"), fma(g1, number(g0, "-0.16666666666666666"), odd), fma(g1, sixth, odd), wide + half,
            wide - half, g2)


@vector_function
def _image_values(d):
    """``B' d``: six pixels to six values."""
    d0, d1, d2, d3, d4, d5 = d
    two, four, minus_four, minus_five = number(d0, "2"), number(d0, "4"), number(d0, "-4"), number(d0, "-5")
    even, odd, wide, steep = fma(minus_four, d2, d4), fma(minus_four, d1, d3), d4 - d2, two * (d3 - d1)
    return (fma(four, d0, fma(minus_five, d2, d4)), even + odd, even - odd, wide + steep, wide - steep,
            fma(four, d1, fma(minus_five, d3, d5)))


@vector_function
def _square_values(d, at, line, pixel, v, vi, plane):
    """``B' d B`` of the 6 x 6 vectors in ``d`` from ``at`` to v, value by value ``plane`` apart.

    For each row of values the rows of pixels that it takes are read again: that costs less than to store what is halfway.
    """
    r0, r1, r2, r3, r4, r5 = at, at + line, at + 2 * line, at + 3 * line, at + 4 * line, at + 5 * line
    like = load(d, at)
    two, four, minus_four, minus_five = number(like, "2"), number(like, "4"), number(like, "-4"), number(like, "-5")
    ends = tile_fma(_six(d, r2, pixel), minus_five, _six(d, r4, pixel))
    store_tile(_image_values(tile_fma(_six(d, r0, pixel), four, ends)), v, vi, plane, None, 1)
    even = tile_fma(_six(d, r2, pixel), minus_four, _six(d, r4, pixel))
    odd = tile_fma(_six(d, r1, pixel), minus_four, _six(d, r3, pixel))
    store_tile(_image_values(tile_add(even, odd)), v, vi + 6 * plane, plane, None, 1)
    store_tile(_image_values(tile_subtract(even, odd)), v, vi + 12 * plane, plane, None, 1)
    wide = tile_subtract(_six(d, r4, pixel), _six(d, r2, pixel))
    steep = tile_multiply(tile_subtract(_six(d, r3, pixel), _six(d, r1, pixel)), two)
    store_tile(_image_values(tile_add(wide, steep)), v, vi + 18 * plane, plane, None, 1)
    store_tile(_image_values(tile_subtract(wide, steep)), v, vi + 24 * plane, plane, None, 1)
    ends = tile_fma(_six(d, r3, pixel), minus_five, _six(d, r5, pixel))
    store_tile(_image_values(tile_fma(_six(d, r1, pixel), four, ends)), v, vi + 30 * plane, plane, None, 1)


@vector_function
def _result_pixels(m):
    """``A' m``: six values to four pixels."""
    m0, m1, m2, m3, m4, m5 = m
    even, odd, wide, steep = m1 + m2, m1 - m2, m3 + m4, m3 - m4
    return (m0 + even + wide, fma(number(m0, "2"), steep, odd), fma(number(m0, "4"), wide, even),
            fma(number(m0, "8"), steep, odd) + m5)


@kernel(exact=True)
def _transform_weights(w, inner, u, plane):
    """``G g G'`` for the (3, 3, inner) array ``w``: value v, 0 to 35, is written to ``u`` from v * plane on."""
    out_of_line()
    for i in range(0, inner, lanes(w)):
        count = inner - i
        rows = across((_tap_values(load_tile(w, i, 3 * inner, count, 3, 1)),
                       _tap_values(load_tile(w, i + inner, 3 * inner, count, 3, 1)),
                       _tap_values(load_tile(w, i + 2 * inner, 3 * inner, count, 3, 1))))
        store_tile(_tap_values(rows[0]), u, i, plane, count, 1)
        store_tile(_tap_values(rows[1]), u, i + 6 * plane, plane, count, 1)
        store_tile(_tap_values(rows[2]), u, i + 12 * plane, plane, count, 1)
        store_tile(_tap_values(rows[3]), u, i + 18 * plane, plane, count, 1)
        store_tile(_tap_values(rows[4]), u, i + 24 * plane, plane, count, 1)
        store_tile(_tap_values(rows[5]), u, i + 30 * plane, plane, count, 1)


@vector_function
def _copy(a, i, b, j, count):
    """Copy ``count`` elements, at most a panel, between arrays of one axis."""
    if count == VECTORS * lanes(b):
        store_tile(load_row(a, i, None, VECTORS), b, j, lanes(b), None, 1)
    elif count == 1:  # a picture by itself: twice as fast as with a mask
        b[j] = a[i]
    else:
        whole = count // lanes(b) * lanes(b)
        for s in range(0, whole, lanes(b)):
            store(b, j + s, load(a, i + s))
        if whole < count:
            store_part(b, j + whole, load_part(a, i + whole, count - whole), count - whole)


@kernel(exact=True, reads="x")
def transform_squares(x, i, first, end, wide, above, before, count, v, plane, near):
    """``B' d B`` of squares ``first`` to ``end`` of ``wide`` in a row, zeros being outside of the image, for samples from i.

    Value k of channel c lies in v from ``c * panel + k * plane`` on: ``count`` samples of the first square, of the next one,
    and so on, a panel at most. The pixels are first copied to ``near`` (:func:`near_size`), a few channels at a time so
    that they stay in the first cache: where they lie in x, a power of two apart, they would all want the same few places of
    it. That takes 270 cycles of AMD Zen 4 for a vector of samples; read from where they lie, 300 to 440.
    """
    out_of_line()
    samples, channels, height, width = x.shape
    full, panel = lanes(v), VECTORS * lanes(v)
    block = _block(panel)
    pixels, zero = flat(x), splat(v.dtype.type(0))
    for begin in range(0, channels, NEAR):
        here = min(channels - begin, NEAR)
        for t in range(first, end):
            top, left = t // wide * 4 - above, t % wide * 4 - before
            for k in range(VALUES):
                iy, ix, to = top + k // 6, left + k % 6, k * panel + (t - first) * count
                at = ((iy * width + ix) * channels + begin) * samples + i
                if 0 <= iy < height and 0 <= ix < width:
                    for c in range(here):
                        _copy(pixels, at + c * samples, near, to + c * block, count)
                else:
                    for c in range(here):
                        for s in range(0, count, full):
                            store_part(near, to + c * block + s, zero, count - s)
        for c in range(here):
            for s in range(0, (end - first) * count, full):
                _square_values(near, c * block + s, 6 * panel, panel, v, (begin + c) * panel + s, plane)


@vector_function
def _line(m, bias, least, y, yi, pixel, inside, count):
    """``A' m`` of six values, plus ``bias`` and not below ``least``: the first ``inside`` of the four pixels are written."""
    p0, p1, p2, p3 = _result_pixels(m)
    store_part(y, yi, maximum(least, p0 + bias), count)
    if inside > 1:
        store_part(y, yi + pixel, maximum(least, p1 + bias), count)
    if inside > 2:
        store_part(y, yi + 2 * pixel, maximum(least, p2 + bias), count)
    if inside > 3:
        store_part(y, yi + 3 * pixel, maximum(least, p3 + bias), count)


@kernel(exact=True, writes="y")
def _square(m, at, plane, bias, low, y, yi, line, pixel, below, right, count):
    """``A' m A`` for a vector of samples: the first ``below`` x ``right`` of the 4 x 4 pixels, ``line`` and ``pixel`` apart."""
    out_of_line()
    biases, least, down = splat(bias), splat(low), 6 * plane
    rows = across((_result_pixels(_six(m, at, down)), _result_pixels(_six(m, at + plane, down)),
                   _result_pixels(_six(m, at + 2 * plane, down)), _result_pixels(_six(m, at + 3 * plane, down)),
                   _result_pixels(_six(m, at + 4 * plane, down)), _result_pixels(_six(m, at + 5 * plane, down))))
    _line(rows[0], biases, least, y, yi, pixel, right, count)
    if below > 1:
        _line(rows[1], biases, least, y, yi + line, pixel, right, count)
    if below > 2:
        _line(rows[2], biases, least, y, yi + 2 * line, pixel, right, count)
    if below > 3:
        _line(rows[3], biases, least, y, yi + 3 * line, pixel, right, count)


@kernel(exact=True, writes="y")
def _transform_results(m, plane, bias, low, y, i, first, end, wide, count, near):
    """``A' m A`` of all outputs and squares, as :func:`transform_squares` has them in a row.

    A vector of samples of one square is written to where it belongs. One that holds several squares, of few samples, is
    written to ``near``, from where each sample's pixels are copied.
    """
    out_of_line()
    samples, outputs, height, width = y.shape
    full, panel, pixels = lanes(m), VECTORS * lanes(m), flat(y)
    pixel = outputs * samples
    for o in range(outputs):
        for s in range(0, (end - first) * count, full):
            if count >= full:
                t, part = first + s // count, s % count
                top, left = t // wide * 4, t % wide * 4
                _square(m, o * panel + s, plane, bias[o], low, pixels, (top * width + left) * pixel + o * samples + i + part,
                        width * pixel, pixel, height - top, width - left, count - part)
            else:
                _square(m, o * panel + s, plane, bias[o], low, near, s, 4 * panel, panel, 4, 4, full)
        if count < full:
            for t in range(first, end):
                top, left = t // wide * 4, t % wide * 4
                for p in range(16):
                    if top + p // 4 < height and left + p % 4 < width:
                        to = ((top + p // 4) * width + left + p % 4) * pixel + o * samples + i
                        _copy(near, p * panel + (t - first) * count, pixels, to, count)


@kernel(exact=True, reads="x")
def prefetch_pixel(x, i, top, left, samples):
    """Have the pixel at (top, left) of ``samples`` samples from ``i`` brought near, if there is one."""
    out_of_line()
    n, channels, height, width = x.shape
    if 0 <= top < height and 0 <= left < width:
        at = (top * width + left) * channels * n + i
        for c in range(channels):
            for s in range(0, samples, lanes(x)):
                prefetch(x, at + c * n + s)


@kernel(exact=True, reads="x")
def _products(u, u_plane, v, v_plane, m, m_plane, outputs, channels, columns, x, y, i, top, left, result_top, result_left,
              count):
    """The matrix products of all values: outputs x channels times channels x columns, at most a panel of samples.

    During each of them a pixel of ``count`` samples of the next square, at (top, left) of x, is asked for: 4 columns of 6,
    as 2 are those of the square before; and one of those of y that will be written.
    """
    out_of_line()
    full, panel = lanes(m), VECTORS * lanes(m)
    whole = outputs // ROWS * ROWS if columns > full else 0
    for value in range(VALUES):
        ui, vi, mi = value * u_plane, value * v_plane, value * m_plane
        if value < 24:
            prefetch_pixel(x, i, top + value // 4, left + 2 + value % 4, count)
        if value < 16:
            prefetch_pixel(y, i, result_top + value // 4, result_left + value % 4, count)
        # Not a call for each value, which would cost as much as a sixth of 16 x 16 products.
        _tiles(u, ui, 1, outputs, v, vi, panel, m, 0, 0, m, mi, panel, whole, channels, 0, panel, False, False)
        if whole < outputs:
            column_of_tiles(u, ui + whole, 1, outputs, v, vi, panel, m, mi + whole * panel, panel, outputs - whole, channels,
                            panel if columns > full else full, False)


@kernel(exact=True, reads="x weight bias", writes="y", floats="x weight bias y", name="conv2d")
def convolve_by_values(x, weight, bias, relu, y, padding, backward):
    """As :func:`direct.convolve`, for a weight of 3 x 3 without strides, dilation and groups."""
    out_of_line()
    samples, channels = x.shape[:2]
    _, outputs, oh, ow = y.shape
    by_row, by_inner = weight.strides[0] // weight.itemsize, weight.strides[1] // weight.itemsize
    taps, above, before = np.arange(3), padding[0], padding[1]
    if backward:  # the same with the kernel turned round
        by_row, by_inner, taps, above, before = by_inner, by_row, taps[::-1].copy(), 2 - above, 2 - before
    biases, low = bias_and_least(bias, relu, outputs, y)

    full, panel = lanes(y), VECTORS * lanes(y)
    inner = channels * outputs
    w = np.empty(weight.size, y.dtype)
    pack_weights(weight, by_row, by_inner, 0, taps, taps, outputs, channels, 1, outputs, w)
    # Planes a little longer than a power of two, or their elements would all want the same places of the cache.
    u_plane, v_plane, m_plane = inner + full, channels * panel + full, outputs * panel + full
    u, v = aligned.empty(VALUES * u_plane, y.dtype), aligned.empty(VALUES * v_plane, y.dtype)
    m, near = aligned.empty(VALUES * m_plane, y.dtype), aligned.empty(near_size(panel), y.dtype)
    v[:] = 0
    near[:] = 0
    _transform_weights(w, inner, u, u_plane)

    wide = (ow + 3) // 4
    tiles = (oh + 3) // 4 * wide
    for i in range(0, samples, panel):
        count = min(samples - i, panel)
        together = panel // count  # few samples: several squares side by side
        for first in range(0, tiles, together):
            end = min(tiles, first + together)
            transform_squares(x, i, first, end, wide, above, before, count, v, v_plane, near)
            _products(u, u_plane, v, v_plane, m, m_plane, outputs, channels, (end - first) * count, x, y, i,
                      end // wide * 4 - above, end % wide * 4 - before, first // wide * 4, first % wide * 4, count)
            _transform_results(m, m_plane, biases, low, y, i, first, end, wide, count, near)
