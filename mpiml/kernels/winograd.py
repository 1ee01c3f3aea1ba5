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
larger than 32.
"""

import numpy as np

from . import aligned
from .direct import pack_weights
from .gemm import VECTORS, column_of_tiles
from .jit import kernel
from .polynomial import number, vector_function
from .simd import fma, lanes, load, load_part, maximum, out_of_line, prefetch, splat, store, store_part
from .tile import across, load_tile, store_tile

VALUES = 36
# What the transforms of one vector of samples cost, in fused multiply-adds, measured.
_IMAGE_COST, _RESULT_COST = 450, 450


@kernel
def pays(height, width, channels, outputs):
    """Does it take clearly fewer operations, 15 % at least, for a result of height x width?"""
    tiles = -(-height // 4) * -(-width // 4)
    direct = height * width * 9 * channels * outputs
    return 1.15 * tiles * (VALUES * channels * outputs + _IMAGE_COST * channels + _RESULT_COST * outputs) < direct


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


@kernel(exact=True, reads="x")
def transform_image(x, xi, top, left, height, width, pixel, count, v, vi, plane, square):
    """``B' d B`` for one channel, and a vector of ``count`` samples, of the square at (top, left); zeros are outside.

    The same in two turns, in one loop so that its arithmetic is compiled once: rows of pixels to rows of ``square``, then
    its columns to v, value by value ``plane`` apart.
    """
    out_of_line()
    zero = splat(v.dtype.type(0))
    full = lanes(v)
    for turn in range(2):
        for k in range(6):
            d0, d1, d2, d3, d4, d5 = zero, zero, zero, zero, zero, zero
            if turn == 0:
                row = top + k
                if 0 <= row < height:
                    at = xi + (row * width + left) * pixel
                    if 0 <= left < width:
                        d0 = load_part(x, at, count)
                    if 0 <= left + 1 < width:
                        d1 = load_part(x, at + pixel, count)
                    if 0 <= left + 2 < width:
                        d2 = load_part(x, at + 2 * pixel, count)
                    if 0 <= left + 3 < width:
                        d3 = load_part(x, at + 3 * pixel, count)
                    if 0 <= left + 4 < width:
                        d4 = load_part(x, at + 4 * pixel, count)
                    if 0 <= left + 5 < width:
                        d5 = load_part(x, at + 5 * pixel, count)
            else:
                at = k * full
                d0, d1, d2 = load(square, at), load(square, at + 6 * full), load(square, at + 12 * full)
                d3, d4, d5 = load(square, at + 18 * full), load(square, at + 24 * full), load(square, at + 30 * full)
            t0, t1, t2, t3, t4, t5 = _image_values((d0, d1, d2, d3, d4, d5))
            if turn == 0:
                to = 6 * k * full
                store(square, to, t0)
                store(square, to + full, t1)
                store(square, to + 2 * full, t2)
                store(square, to + 3 * full, t3)
                store(square, to + 4 * full, t4)
                store(square, to + 5 * full, t5)
            else:
                to = vi + k * plane
                store_part(v, to, t0, count)
                store_part(v, to + 6 * plane, t1, count)
                store_part(v, to + 12 * plane, t2, count)
                store_part(v, to + 18 * plane, t3, count)
                store_part(v, to + 24 * plane, t4, count)
                store_part(v, to + 30 * plane, t5, count)


@vector_function
def _store_pixels(pixels, bias, least, y, yi, pixel, inside, count):
    """Write the first ``inside`` of four pixels, plus ``bias`` and not below ``least``."""
    store_part(y, yi, maximum(least, pixels[0] + bias), count)
    if inside > 1:
        store_part(y, yi + pixel, maximum(least, pixels[1] + bias), count)
    if inside > 2:
        store_part(y, yi + 2 * pixel, maximum(least, pixels[2] + bias), count)
    if inside > 3:
        store_part(y, yi + 3 * pixel, maximum(least, pixels[3] + bias), count)


@kernel(exact=True, writes="y")
def _transform_result(m, mi, plane, bias, low, y, yi, top, left, height, width, pixel, count):
    """``A' m A`` for one output, and a vector of samples: at most 4 x 4 pixels of the result from (top, left)."""
    out_of_line()
    biases, least, down = splat(bias), splat(low), 6 * plane
    rows = across((_result_pixels(load_tile(m, mi, down, count, 6, 1)),
                   _result_pixels(load_tile(m, mi + plane, down, count, 6, 1)),
                   _result_pixels(load_tile(m, mi + 2 * plane, down, count, 6, 1)),
                   _result_pixels(load_tile(m, mi + 3 * plane, down, count, 6, 1)),
                   _result_pixels(load_tile(m, mi + 4 * plane, down, count, 6, 1)),
                   _result_pixels(load_tile(m, mi + 5 * plane, down, count, 6, 1))))
    to, line, inside = yi + (top * width + left) * pixel, width * pixel, width - left
    _store_pixels(_result_pixels(rows[0]), biases, least, y, to, pixel, inside, count)
    if top + 1 < height:
        _store_pixels(_result_pixels(rows[1]), biases, least, y, to + line, pixel, inside, count)
    if top + 2 < height:
        _store_pixels(_result_pixels(rows[2]), biases, least, y, to + 2 * line, pixel, inside, count)
    if top + 3 < height:
        _store_pixels(_result_pixels(rows[3]), biases, least, y, to + 3 * line, pixel, inside, count)


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


@kernel(exact=True, reads="x weight bias", writes="y")
def convolve_by_values(x, weight, bias, relu, y, padding, backward):
    """As :func:`direct.convolve`, for a weight of 3 x 3 without strides, dilation and groups."""
    out_of_line()
    samples, channels, height, width = x.shape
    _, outputs, oh, ow = y.shape
    by_row, by_inner = weight.strides[0] // weight.itemsize, weight.strides[1] // weight.itemsize
    taps, above, before = np.arange(3), padding[0], padding[1]
    if backward:  # the same with the kernel turned round
        by_row, by_inner, taps, above, before = by_inner, by_row, taps[::-1].copy(), 2 - above, 2 - before
    biases = np.zeros(outputs, y.dtype)
    for o in range(bias.size):
        biases[o] = bias[o]
    low = biases.dtype.type(0 if relu else -np.inf)

    full, panel = lanes(y), VECTORS * lanes(y)
    inner = channels * outputs
    w = np.empty(weight.size, y.dtype)
    pack_weights(weight, by_row, by_inner, 0, taps, taps, outputs, channels, 1, outputs, w)
    # Planes a little longer than a power of two, or their elements would all want the same places of the cache.
    u_plane, v_plane, m_plane = inner + full, channels * panel + full, outputs * panel + full
    u, v = aligned.empty(VALUES * u_plane, y.dtype), aligned.empty(VALUES * v_plane, y.dtype)
    m, square = aligned.empty(VALUES * m_plane, y.dtype), aligned.empty(VALUES * full, y.dtype)
    _transform_weights(w, inner, u, u_plane)

    wide = (ow + 3) // 4
    tiles = (oh + 3) // 4 * wide
    for i in range(0, samples, panel):
        count = min(samples - i, panel)
        together = panel // count  # few samples: several squares side by side
        for first in range(0, tiles, together):
            end = min(tiles, first + together)
            for t in range(first, end):
                top, left = t // wide * 4 - above, t % wide * 4 - before
                for c in range(channels):
                    for s in range(0, count, full):
                        transform_image(x, c * samples + i + s, top, left, height, width, channels * samples, count - s,
                                         v, c * panel + (t - first) * count + s, v_plane, square)
            for value in range(VALUES):
                # During each product a pixel of the next squares is asked for, 4 columns of 6, as 2 are those of the square
                # before, and one of the 16 of the result that will be written.
                for t in range(first, end):
                    if value < 24 and t + together < tiles:
                        top, left = (t + together) // wide * 4 - above, (t + together) % wide * 4 - before
                        prefetch_pixel(x, i, top + value // 4, left + 2 + value % 4, count)
                    if value < 16:
                        prefetch_pixel(y, i, t // wide * 4 + value // 4, t % wide * 4 + value % 4, count)
                column_of_tiles(u, value * u_plane, 1, outputs, v, value * v_plane, panel, m, value * m_plane, panel,
                                outputs, channels, (end - first) * count, False)
            for t in range(first, end):
                for o in range(outputs):
                    for s in range(0, count, full):
                        _transform_result(m, o * panel + (t - first) * count + s, m_plane, biases[o], low,
                                          y, o * samples + i + s, t // wide * 4, t % wide * 4, oh, ow, outputs * samples,
                                          count - s)
