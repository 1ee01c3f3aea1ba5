"""Gradients of a convolution for its weight, and for its bias: a sum over samples and pixels, in two forms.

For a row of the result's pixels and one row of taps it is a matrix product: tap column and input channel, which lie one
after the other in the images, times output channels, summed over the pixels of the row and the samples.

* Lanes are output channels: the row of ``g`` is transposed, once for all taps; a step broadcasts the images' elements.
  For as many output channels as fill the lanes.
* Lanes are samples: a step multiplies vectors of ``g`` and of the images as they lie; the lanes are summed at the end.
  For few output channels, or few elements to broadcast.

Each row of pixels has a sum of its own that is then added to the others': short chains of additions, small errors.
"""

import numpy as np

from .jit import kernel
from .simd import lanes, load, load_part, out_of_line, reduce_add, splat, store
from .taps import COUNT, FIRST, SOURCE, forward_taps
from .tile import lanewise, load_row, load_tile, outer, store_tile, tile_add, turn_part, zero_tile

CHAIN, SHORT = 4096, 256  # most and fewest terms of a sum before it is added to the total
NEAR = 1 << 16  # bytes of g, at most, that are used for all taps before the next ones


def _make_broadcast(rows):
    """A kernel that adds to ``rows`` rows of ``total`` the sums over pixels and samples of x times a vector of outputs of g.

    Rows of x are ``x_row`` apart, samples of g ``g_row``; x has a sample behind the other, and pixels ``x_pixel`` apart.
    """
    @kernel(exact=True, reads="x")
    def tile(x, xi, x_row, x_pixel, g, gi, g_row, pixels, samples, total, ti, t_row):
        out_of_line()
        acc = zero_tile(g, rows)
        for p in range(pixels):
            xk = xi + p * x_pixel
            for _ in range(samples):
                acc = outer(acc, x, xk, x_row, load_row(g, gi, None, 1))
                xk += 1
                gi += g_row
        store_tile(tile_add(acc, load_tile(total, ti, t_row, None, rows, 1)), total, ti, t_row, None, 1)

    return tile


def _make_dots(rows, columns):
    """A kernel that adds to a tile of ``total`` the products of ``rows`` outputs of g and ``columns`` rows of x.

    What is added up is a vector for each, of which a lane has every so many-th sample.
    """
    size = rows * columns

    @kernel(exact=True, reads="g x")
    def tile(g, gi, g_row, g_pixel, x, xi, x_column, x_pixel, pixels, samples, total, ti, t_row):
        out_of_line()
        acc = zero_tile(total, size)
        whole = samples // lanes(g) * lanes(g)
        for p in range(pixels):
            gk, xk = gi + p * g_pixel, xi + p * x_pixel
            for i in range(0, whole, lanes(g)):  # without a mask, which costs as much as several of the products
                acc = lanewise(acc, g, gk + i, g_row, x, xk + i, x_column, None, columns)
            if whole < samples:
                acc = lanewise(acc, g, gk + whole, g_row, x, xk + whole, x_column, samples - whole, columns)
        store_tile(tile_add(acc, load_tile(total, ti, t_row, None, size, columns)), total, ti, t_row, None, columns)

    return tile


_eight, _five, _four, _two, _one = (_make_broadcast(rows) for rows in (8, 5, 4, 2, 1))
_three_five, _three_three, _three_one, _one_five, _one_three, _one_one = (
    _make_dots(rows, columns) for rows in (3, 1) for columns in (5, 3, 1))


@kernel(exact=True, reads="x")
def broadcast_products(x, xi, x_row, x_pixel, g, gi, g_row, pixels, samples, total, ti, t_row, rows, outputs):
    """All tiles of one product, lanes being output channels: ``rows`` x ``outputs`` sums."""
    out_of_line()
    r = 0
    while r < rows:
        left = rows - r
        # 9, the taps of a row for 3 colours, are 5 + 4: a tile of one row would wait for its own additions.
        step = 5 if left == 9 else 8 if left >= 8 else 4 if left >= 4 else 2 if left >= 2 else 1
        for o in range(0, outputs, lanes(g)):
            task = (x, xi + r * x_row, x_row, x_pixel, g, gi + o, g_row, pixels, samples, total, ti + r * t_row + o, t_row)
            if step == 8:
                _eight(*task)
            elif step == 5:
                _five(*task)
            elif step == 4:
                _four(*task)
            elif step == 2:
                _two(*task)
            else:
                _one(*task)
        r += step


@kernel(exact=True, reads="x g")
def _dots(x, xi, x_row, x_pixel, g, gi, g_row, g_pixel, pixels, samples, total, ti, t_row, rows, outputs):
    """The same, lanes being samples."""
    out_of_line()
    o = 0
    while o < outputs:
        high = 3 if outputs - o >= 3 else 1
        r = 0
        while r < rows:
            wide = 5 if rows - r >= 5 else 3 if rows - r >= 3 else 1
            task = (g, gi + o * g_row, g_row, g_pixel, x, xi + r * x_row, x_row, x_pixel, pixels, samples,
                    total, ti + o * t_row + r * lanes(g), t_row)
            if high == 3:
                if wide == 5:
                    _three_five(*task)
                elif wide == 3:
                    _three_three(*task)
                else:
                    _three_one(*task)
            elif wide == 5:
                _one_five(*task)
            elif wide == 3:
                _one_three(*task)
            else:
                _one_one(*task)
            r += wide
        o += high


@kernel(exact=True, reads="g", writes="turned")
def _turn_pixels(g, oy, begin, end, turned, row):
    """Copy pixels ``begin`` to ``end`` of the line ``oy`` to where each of their samples has a row of output channels."""
    out_of_line()
    samples, out, _, ow = g.shape
    full = lanes(g)
    for ox in range(begin, end):
        for o in range(0, out, full):
            for i in range(0, samples, full):
                turn_part(g, ((oy * ow + ox) * out + o) * samples + i, samples,
                          turned, ((ox - begin) * samples + i) * row + o, row, out - o, samples - i)


@kernel(exact=True, writes="dw")
def _collect(total, outputs, line, broadcast, dw):
    """Bring the sums to their places in ``dw``; where lanes were samples, these are added up first."""
    out_of_line()
    _, inners, kh, kw = dw.shape
    rows = kw * inners
    for o in range(len(dw)):
        for c in range(inners):
            for ky in range(kh):
                for kx in range(kw):
                    at = (o // outputs * kh + ky) * rows * line
                    r, k = kx * inners + c, o % outputs
                    if broadcast:
                        dw[o, c, ky, kx] = total[at + r * line + k]
                    else:
                        dw[o, c, ky, kx] = reduce_add(load(total, at + (k * rows + r) * lanes(total)))


@kernel(exact=True, reads="g x", writes="dw")
def weight_gradient(g, x, dw, stride, padding, dilation, groups):
    """``conv2d_vjp_weight`` of ``g`` and ``x`` that lie batch innermost."""
    out_of_line()
    samples, channels, height, width = x.shape
    _, out, oh, ow = g.shape
    outputs, inners, kh, kw = dw.shape[0] // groups, dw.shape[1], dw.shape[2], dw.shape[3]
    _, lines, line_step = forward_taps(height, kh, oh, stride[0], padding[0], dilation[0])
    _, columns, column_step = forward_taps(width, kw, ow, stride[1], padding[1], dilation[1])

    # What is a row of the product: a channel of all taps, a tap of the only channel, or a channel of one tap.
    merged = column_step == 1 and groups == 1
    single = inners == 1
    rows = kw * inners
    sections, section, row_stride = kw, inners, samples
    if merged or single:
        sections, section = 1, rows
        if not merged:
            row_stride = column_step * channels * samples

    full = lanes(g)
    filled = -(-outputs // full) * full
    broadcast = 4 * outputs > 3 * filled and section > 4  # lanes of output channels, if more than 3 of 4 would be filled
    line = filled if broadcast else outputs * full  # elements of ``total`` for a row
    total = np.zeros(groups * kh * rows * line, g.dtype)
    # So many pixels at a time that their part of g stays in the first cache, if the sums are not too short for that.
    g_row = filled if groups == 1 else out + full
    pixel = samples * (g_row if broadcast else out)
    chunk = min(max(NEAR // max(pixel * g.itemsize, 1), SHORT // max(samples, 1), 1), max(CHAIN // max(samples, 1), 1))
    turned = np.zeros(min(chunk, ow) * samples * g_row if broadcast else 0, g.dtype)

    for oy in range(oh):
        for begin in range(0, ow, chunk):
            end = min(begin + chunk, ow)
            if broadcast:
                _turn_pixels(g, oy, begin, end, turned, g_row)
            for group in range(groups):
                for tap in range(lines[oy, COUNT]):
                    ky, iy = lines[oy, FIRST] + tap, lines[oy, SOURCE] + tap * line_step
                    at = (group * kh + ky) * rows * line
                    ox = begin
                    while ox < end:
                        # Pixels side by side that the same taps meet.
                        first, count = columns[ox, FIRST], columns[ox, COUNT]
                        next_ox = ox + 1
                        while next_ox < end and columns[next_ox, FIRST] == first and columns[next_ox, COUNT] == count:
                            next_ox += 1
                        for kx in range(count if sections > 1 else min(count, 1)):
                            r = (first + kx) * inners
                            n = section if sections > 1 else count * inners
                            column = columns[ox, SOURCE] + kx * column_step
                            xi = ((iy * width + column) * channels + group * inners) * samples
                            if broadcast:
                                broadcast_products(x, xi, row_stride, stride[1] * channels * samples, turned,
                                           (ox - begin) * samples * g_row + group * outputs, g_row, next_ox - ox, samples,
                                           total, at + r * line, line, n, outputs)
                            else:
                                _dots(x, xi, row_stride, stride[1] * channels * samples, g,
                                      ((oy * ow + ox) * out + group * outputs) * samples, samples, out * samples,
                                      next_ox - ox, samples, total, at + r * full, rows * full, n, outputs)
                        ox = next_ox
    _collect(total, outputs, line, broadcast, dw)


@kernel(exact=True, reads="g", writes="db")
def bias_gradient(g, db):
    """Sums of ``g`` (n, out, oh, ow), batch innermost, over samples and pixels."""
    out_of_line()
    samples, out, oh, ow = g.shape
    full = lanes(g)
    row, total = np.zeros(out * full, g.dtype), np.zeros(out * full, g.dtype)
    for oy in range(oh):
        for ox in range(ow):
            for o in range(out):
                v = load(row, o * full)
                for i in range(0, samples, full):
                    v = v + load_part(g, ((oy * ow + ox) * out + o) * samples + i, samples - i)
                store(row, o * full, v)
        for i in range(0, row.size, full):  # each row of pixels has a sum of its own here, too
            store(total, i, load(total, i) + load(row, i))
            store(row, i, splat(g.dtype.type(0)))
    for o in range(out):
        db[o] = reduce_add(load(total, o * full))
