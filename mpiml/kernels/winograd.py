"""Winograd's convolution F(4x4, 3x3): 36 multiplications for 4 x 4 pixels of the result instead of 144.

A convolution is a product of polynomials, and these can be multiplied by their values at a few points: here at 0, 1, -1,
2, -2 and infinity, in both directions. Each 6 x 6 square of the image, every 4 pixels, is transformed to its 36 "values"
(``B' d B``), the weights to theirs (``G g G'``), values are multiplied and summed over the channels, 36 matrix products,
and the result's 4 x 4 pixels come back of the sums (``A' m A``). The transforms are sums of few pixels with small
factors, so all of that is work on whole vectors of samples; it costs accuracy: the error is up to 1e-5 of the largest
element in float32, where the direct sum has 1e-6. (Lavin and Gray 2016, "Fast algorithms for convolutional neural
networks"; Winograd 1980.)
"""

import numpy as np

from .direct import pack
from .gemm import VECTORS, column_of_tiles
from .jit import kernel
from .simd import fma, lanes, load, load_part, maximum, out_of_line, splat, store, store_part

VALUES = 36
# What the transforms of one vector of samples cost, in fused multiply-adds, measured.
_IMAGE_COST, _RESULT_COST = 450, 450


@kernel
def pays(height, width, channels, outputs):
    """Does it take clearly fewer operations for a result of height x width?"""
    tiles = -(-height // 4) * -(-width // 4)
    direct = height * width * 9 * channels * outputs
    return 1.15 * tiles * (VALUES * channels * outputs + _IMAGE_COST * channels + _RESULT_COST * outputs) < direct


@kernel(exact=True)
def _transform_weights(w, inner, u, plane):
    """``G g G'`` for the (3, 3, inner) array ``w``."""
    out_of_line()
    number = w.dtype.type
    quarter, sixth, twelfth, small = (splat(number(1 / 4)), splat(number(1 / 6)), splat(number(1 / 12)), splat(number(1 / 24)))
    minus = splat(number(-1 / 6))
    columns = np.empty(18 * lanes(w), w.dtype)
    for i in range(0, inner, lanes(w)):
        for turn in range(2):
            for k in range(3 if turn == 0 else 6):
                if turn == 0:
                    a, b, c = (load_part(w, k * inner + i, inner - i), load_part(w, (3 + k) * inner + i, inner - i),
                               load_part(w, (6 + k) * inner + i, inner - i))
                else:
                    at = 3 * k * lanes(w)
                    a, b, c = load(columns, at), load(columns, at + lanes(w)), load(columns, at + 2 * lanes(w))
                odd, wide = (a + c) * minus, fma(a, small, c * sixth)
                u0, u1, u2 = a * quarter, fma(b, minus, odd), fma(b, sixth, odd)
                half = b * twelfth
                u3, u4 = wide + half, wide - half
                if turn == 0:
                    to, step = k * lanes(w), 3 * lanes(w)
                    store(columns, to, u0)
                    store(columns, to + step, u1)
                    store(columns, to + 2 * step, u2)
                    store(columns, to + 3 * step, u3)
                    store(columns, to + 4 * step, u4)
                    store(columns, to + 5 * step, c)
                else:
                    to = 6 * k * plane + i
                    store_part(u, to, u0, inner - i)
                    store_part(u, to + plane, u1, inner - i)
                    store_part(u, to + 2 * plane, u2, inner - i)
                    store_part(u, to + 3 * plane, u3, inner - i)
                    store_part(u, to + 4 * plane, u4, inner - i)
                    store_part(u, to + 5 * plane, c, inner - i)


@kernel(exact=True, reads="x")
def _transform_image(x, xi, top, left, height, width, pixel, count, v, vi, plane, square):
    """``B' d B`` for one channel, and a vector of ``count`` samples, of the square at (top, left); zeros are outside."""
    out_of_line()
    number = v.dtype.type
    zero, two, four = splat(number(0)), splat(number(2)), splat(number(4))
    minus_four, minus_five = splat(number(-4)), splat(number(-5))
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
            a, b = fma(minus_four, d2, d4), fma(minus_four, d1, d3)
            c, e = d4 - d2, two * (d3 - d1)
            t0, t5 = fma(four, d0, fma(minus_five, d2, d4)), fma(four, d1, fma(minus_five, d3, d5))
            t1, t2, t3, t4 = a + b, a - b, c + e, c - e
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


@kernel(exact=True, writes="y")
def _transform_result(m, mi, plane, bias, low, y, yi, top, left, height, width, pixel, count, square):
    """``A' m A`` for one output, and a vector of samples: at most 4 x 4 pixels of the result from (top, left)."""
    out_of_line()
    number = m.dtype.type
    two, four, eight = splat(number(2)), splat(number(4)), splat(number(8))
    end, least = splat(bias), splat(low)
    full = lanes(m)
    for turn in range(2):
        for k in range(6 if turn == 0 else min(4, height - top)):
            if turn == 0:
                at, step = mi + k * plane, 6 * plane
                m0, m1, m2 = (load_part(m, at, count), load_part(m, at + step, count), load_part(m, at + 2 * step, count))
                m3, m4, m5 = (load_part(m, at + 3 * step, count), load_part(m, at + 4 * step, count),
                              load_part(m, at + 5 * step, count))
            else:
                at = 6 * k * full
                m0, m1, m2 = load(square, at), load(square, at + full), load(square, at + 2 * full)
                m3, m4, m5 = load(square, at + 3 * full), load(square, at + 4 * full), load(square, at + 5 * full)
            s, d, ss, dd = m1 + m2, m1 - m2, m3 + m4, m3 - m4
            y0, y1, y2, y3 = m0 + s + ss, fma(two, dd, d), fma(four, ss, s), fma(eight, dd, d) + m5
            if turn == 0:
                to = k * full
                store(square, to, y0)
                store(square, to + 6 * full, y1)
                store(square, to + 12 * full, y2)
                store(square, to + 18 * full, y3)
            else:
                to = yi + ((top + k) * width + left) * pixel
                store_part(y, to, maximum(least, y0 + end), count)
                if left + 1 < width:
                    store_part(y, to + pixel, maximum(least, y1 + end), count)
                if left + 2 < width:
                    store_part(y, to + 2 * pixel, maximum(least, y2 + end), count)
                if left + 3 < width:
                    store_part(y, to + 3 * pixel, maximum(least, y3 + end), count)


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
    ends = np.zeros(outputs, y.dtype)
    for o in range(bias.size):
        ends[o] = bias[o]
    low = ends.dtype.type(0 if relu else -np.inf)

    full, panel = lanes(y), VECTORS * lanes(y)
    inner = channels * outputs
    w = np.empty(weight.size, y.dtype)
    pack(weight, by_row, by_inner, 0, taps, taps, outputs, channels, 1, outputs, w)
    # Planes a little longer than a power of two, or their elements would all want the same places of the cache.
    u_plane, v_plane, m_plane = inner + full, channels * panel + full, outputs * panel + full
    u, v, m = np.empty((VALUES, u_plane), y.dtype), np.empty((VALUES, v_plane), y.dtype), np.empty((VALUES, m_plane), y.dtype)
    square = np.empty(VALUES * full, y.dtype)
    _transform_weights(w, inner, u.reshape(u.size), u_plane)
    v_flat, m_flat = v.reshape(v.size), m.reshape(m.size)

    across = (ow + 3) // 4
    tiles = (oh + 3) // 4 * across
    for i in range(0, samples, panel):
        count = min(samples - i, panel)
        together = panel // count  # few samples: several squares side by side
        for first in range(0, tiles, together):
            end = min(tiles, first + together)
            for t in range(first, end):
                top, left = t // across * 4 - above, t % across * 4 - before
                for c in range(channels):
                    for s in range(0, count, full):
                        _transform_image(x, c * samples + i + s, top, left, height, width, channels * samples, count - s,
                                         v_flat, c * panel + (t - first) * count + s, v_plane, square)
            for value in range(VALUES):
                column_of_tiles(u, value * u_plane, 1, outputs, v, value * v_plane, panel, m, value * m_plane, panel,
                                outputs, channels, (end - first) * count, False)
            for t in range(first, end):
                for o in range(outputs):
                    for s in range(0, count, full):
                        _transform_result(m_flat, o * panel + (t - first) * count + s, m_plane, ends[o], low,
                                          y, o * samples + i + s, t // across * 4, t % across * 4, oh, ow, outputs * samples,
                                          count - s, square)
