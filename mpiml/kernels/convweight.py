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

from . import aligned
from .jit import kernel
from .simd import lanes, load, load_part, out_of_line, reduce_add, splat, store, store_part
from .taps import COUNT, FIRST, SOURCE, forward_taps
from .tile import fetch_tile, lanewise, load_row, load_tile, outer, store_tile, tile_add, turn_part, zero_tile

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


def _make_dots(rows, columns, blocks=1):
    """A kernel that adds to a tile of ``total`` products of ``rows`` outputs of g and ``blocks`` times ``columns`` rows of x.

    What is added up is a vector for each, of which a lane has every so many-th sample.
    """
    width = columns * blocks
    size = rows * width

    @kernel(exact=True, reads="g x")
    def tile(g, gi, g_row, g_pixel, x, xi, x_column, x_block, x_pixel, pixels, samples, total, ti, t_row):
        out_of_line()
        acc = zero_tile(total, size)
        whole = samples // lanes(g) * lanes(g)
        for p in range(pixels):
            gk, xk = gi + p * g_pixel, xi + p * x_pixel
            for i in range(0, whole, lanes(g)):  # without a mask, which costs as much as several of the products
                if blocks > 1:
                    fetch_tile(g, gk + rows * g_row + i, g_row, rows, 1)  # the next tile's
                acc = lanewise(acc, g, gk + i, g_row, x, xk + i, x_column, x_block, None, columns, blocks)
            if whole < samples:
                acc = lanewise(acc, g, gk + whole, g_row, x, xk + whole, x_column, x_block, samples - whole, columns, blocks)
        store_tile(tile_add(acc, load_tile(total, ti, t_row, None, size, width)), total, ti, t_row, None, width)

    return tile


_eight, _five, _four, _two, _one = (_make_broadcast(rows) for rows in (8, 5, 4, 2, 1))
_three_five, _three_three, _three_one, _one_five, _one_three, _one_one = (
    _make_dots(rows, columns) for rows in (3, 1) for columns in (5, 3, 1))
_two_nine, _one_nine = _make_dots(2, 3, 3), _make_dots(1, 3, 3)


@kernel(exact=True, reads="x")
def broadcast_products(x, xi, x_row, x_pixel, g, gi, g_row, pixels, samples, total, ti, t_row, rows, outputs):
    """All tiles of one product, lanes being output channels: ``rows`` x ``outputs`` sums."""
    out_of_line()
    r = 0
    while r < rows:
        left = rows - r
        # Tiles of fewer rows than 4 wait for their own results: fives first, until the others are a multiple of 4.
        fives = left % 4 * 5
        step = 5 if 0 < fives <= left else 8 if left >= 8 else 4 if left >= 4 else 2 if left >= 2 else 1
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
def _dots(x, xi, x_row, x_block, x_pixel, g, gi, g_row, g_pixel, pixels, samples, total, ti, t_row, rows, outputs):
    """The same, lanes being samples; where ``x_block`` is not 0, 9 rows are 3 of each of 3 blocks."""
    out_of_line()
    o = 0
    while o < outputs and rows == 9:
        high = 2 if outputs - o >= 2 else 1
        task = (g, gi + o * g_row, g_row, g_pixel, x, xi, x_row, x_block or 3 * x_row, x_pixel, pixels, samples,
                total, ti + o * t_row, t_row)
        if high == 2:
            _two_nine(*task)
        else:
            _one_nine(*task)
        o += high
    while o < outputs:
        high = 3 if outputs - o >= 3 else 1
        r = 0
        while r < rows:
            wide = 5 if rows - r >= 5 else 3 if rows - r >= 3 else 1
            task = (g, gi + o * g_row, g_row, g_pixel, x, xi + r * x_row, x_row, 0, x_pixel, pixels, samples,
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


@kernel(exact=True, reads="g")
def _turn_pixel(g, gi, samples, out, turned, ti, row):
    """Write the ``out`` x ``samples`` elements of a pixel of ``g`` as rows of output channels, ``row`` apart."""
    out_of_line()
    for o in range(0, out, lanes(g)):
        for i in range(0, samples, lanes(g)):
            turn_part(g, gi + o * samples + i, samples, turned, ti + i * row + o, row, out - o, samples - i)


@kernel(exact=True, reads="g x", writes="dw")
def weight_gradient(g, x, dw, stride, padding, dilation, groups):
    """``conv2d_vjp_weight`` of ``g`` and ``x`` that lie batch innermost; the outputs of ``dw`` lie side by side."""
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
    broadcast = 4 * outputs > 3 * filled and section > 4
    line = filled if broadcast else outputs * full  # elements of ``total`` for a row
    total = aligned.empty(groups * kh * rows * line, g.dtype)
    total[:] = 0
    # Of one channel 3 x 3 taps make one tile.
    nine = not broadcast and single and rows == 3 and kh == 3
    # So many pixels at a time that their part of g stays in the first cache, if the sums are not too short for that.
    g_row = filled if groups == 1 else out + full
    pixel = samples * (g_row if broadcast else out)
    chunk = min(max(NEAR // max(pixel * g.itemsize, 1), SHORT // max(samples, 1), 1), max(CHAIN // max(samples, 1), 1))
    turned = aligned.empty(min(chunk, ow) * samples * g_row if broadcast else 0, g.dtype)
    turned[:] = 0

    for oy in range(oh):
        for begin in range(0, ow, chunk):
            end = min(begin + chunk, ow)
            if broadcast:
                for ox in range(begin, end):
                    _turn_pixel(g, (oy * ow + ox) * out * samples, samples, out, turned, (ox - begin) * samples * g_row, g_row)
            for group in range(groups):
                for tap in range(lines[oy, COUNT]):
                    ky, iy = lines[oy, FIRST] + tap, lines[oy, SOURCE] + tap * line_step
                    at = (group * kh + ky) * rows * line
                    vi = (group * outputs * kh + ky) * rows * full
                    ox = begin
                    while ox < end:
                        # Pixels side by side that the same taps meet.
                        first, count = columns[ox, FIRST], columns[ox, COUNT]
                        next_ox = ox + 1
                        while next_ox < end and columns[next_ox, FIRST] == first and columns[next_ox, COUNT] == count:
                            next_ox += 1
                        blocks = nine and count == 3 and lines[oy, COUNT] == 3
                        for kx in range(0 if blocks and tap > 0 else count if sections > 1 else min(count, 1)):
                            r = (first + kx) * inners
                            n = section if sections > 1 else count * inners
                            column = columns[ox, SOURCE] + kx * column_step
                            xi = ((iy * width + column) * channels + group * inners) * samples
                            if broadcast:
                                broadcast_products(x, xi, row_stride, stride[1] * channels * samples, turned,
                                           (ox - begin) * samples * g_row + group * outputs, g_row, next_ox - ox, samples,
                                           total, at + r * line, line, n, outputs)
                            else:
                                _dots(x, xi, row_stride, line_step * width * channels * samples if blocks else 0,
                                      stride[1] * channels * samples, g,
                                      ((oy * ow + ox) * out + group * outputs) * samples, samples, out * samples,
                                      next_ox - ox, samples, total, vi + r * full, kh * rows * full, 9 if blocks else n,
                                      outputs)
                        ox = next_ox
    down, right, inward = dw.strides[2] // dw.itemsize, dw.strides[3] // dw.itemsize, dw.strides[1] // dw.itemsize
    for group in range(groups):
        for ky in range(kh):
            for kx in range(kw):
                for c in range(inners):
                    r, at = kx * inners + c, ky * down + kx * right + c * inward + group * outputs
                    if broadcast:
                        for o in range(0, outputs, full):
                            store_part(dw, at + o, load(total, ((group * kh + ky) * rows + r) * line + o), outputs - o)
                    else:
                        for o in range(outputs):
                            dw[group * outputs + o, c, ky, kx] = reduce_add(
                                load(total, (((group * outputs + o) * kh + ky) * rows + r) * full))


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
        for i in range(0, row.size, full):  # short chains, as above
            store(total, i, load(total, i) + load(row, i))
            store(row, i, splat(g.dtype.type(0)))
    for o in range(out):
        db[o] = reduce_add(load(total, o * full))
