"""Gradients of a convolution for its weight, and for its bias: a sum over samples and pixels, in two forms.

For a row of the result's pixels and one row of taps it is a matrix product: tap column and input channel, which lie one
after the other in the images, times output channels, summed over the pixels of the row and the samples.

* Lanes are output channels: the row of ``g`` is transposed, once for all taps; a step broadcasts the images' elements.
  For as many output channels as fill the lanes.
* Lanes are samples: a step multiplies vectors of ``g`` and of the images as they lie; the lanes are summed at the end.
  For few output channels, or few elements to broadcast: the transpose would take a quarter of the time of 3 x 3 x 3 taps.

At its edges a row's pixels meet fewer taps, and products of one pixel take longer than their multiplications. So either
rows of the images are first copied together with their padding, or each tap is a product by itself, of those pixels that
it meets: the copy is little work for few channels, and for many each tap has rows enough for whole tiles.

Each row of pixels has a sum of its own that is then added to the others': short chains of additions, small errors.
"""

import numpy as np

from . import aligned
from .ahead import fetch, lines_ahead, next_is, nothing_ahead
from .gemm import transpose
from .jit import kernel
from .registers import REGISTER
from .simd import flat, in_use, lanes, load, load_part, out_of_line, reduce_add, select, splat, store, store_part
from .tile import lanewise, load_row, load_tile, outer, store_tile, tile_add, zero_tile

CHAIN, SHORT = 4096, 256  # most and fewest terms of a sum before it is added to the total
FEW = 9  # rows, taps of a line times channels, at most, of which the second form is faster for any number of outputs
NEAR = 1 << 16  # bytes of g, at most, that are used for all taps before the next ones


def _make_broadcast(rows):
    """A kernel that adds to ``rows`` rows of ``total`` the sums over pixels and samples of x times a vector of outputs of g.

    Rows of x are ``x_row`` apart, samples of g ``g_row``; x has a sample behind the other, and pixels ``x_pixel`` apart.
    """
    @kernel(exact=True, reads="x")
    def tile(x, xi, x_row, x_pixel, g, gi, g_row, pixels, samples, total, ti, t_row, ahead, wanted):
        out_of_line()
        acc = zero_tile(g, rows)
        for p in range(pixels):
            fetch(ahead, wanted)
            xk = xi + p * x_pixel
            for _ in range(samples):
                acc = outer(acc, x, xk, x_row, load_row(g, gi, None, 1))
                xk += 1
                gi += g_row
        store_tile(tile_add(acc, load_tile(total, ti, t_row, None, rows, 1)), total, ti, t_row, None, 1)

    return tile


def _make_dots(rows, columns):
    """A kernel that adds to ``total`` products of ``rows`` outputs of g at a time and ``columns`` rows of x.

    What is added up is a vector for each, of which a lane has every so many-th sample.
    """
    size = rows * columns

    @kernel(exact=True, reads="g x")
    def tiles(g, gi, g_row, g_pixel, x, xi, x_row, x_pixel, pixels, samples, total, ti, t_row, outputs, ahead, wanted):
        out_of_line()
        whole = samples // lanes(g) * lanes(g)
        for _ in range(outputs // rows):
            acc = zero_tile(total, size)
            for p in range(pixels):
                fetch(ahead, wanted)
                gk, xk = gi + p * g_pixel, xi + p * x_pixel
                for i in range(0, whole, lanes(g)):  # without a mask, which costs as much as several of the products
                    acc = lanewise(acc, g, gk + i, g_row, x, xk + i, x_row, None, columns)
                if whole < samples:
                    acc = lanewise(acc, g, gk + whole, g_row, x, xk + whole, x_row, samples - whole, columns)
            store_tile(tile_add(acc, load_tile(total, ti, t_row, None, size, columns)), total, ti, t_row, None, columns)
            gi += rows * g_row
            ti += rows * t_row

    return tiles


_eight, _five, _four, _two, _one = (_make_broadcast(rows) for rows in (8, 5, 4, 2, 1))
# Rows of x in a tile, largest first: 3 x 9 sums and their factors take 31 registers, of 32 that there are but for AVX2.
WIDE, MIDDLE, NARROW = (4, 3, 2) if REGISTER == 32 else (9, 5, 3)
_three_wide, _three_middle, _three_narrow, _three_one, _one_wide, _one_middle, _one_narrow, _one_one = (
    _make_dots(rows, columns) for rows in (3, 1) for columns in (WIDE, MIDDLE, NARROW, 1))


@kernel(exact=True, reads="x")
def broadcast_products(x, xi, x_row, x_pixel, g, gi, g_row, pixels, samples, total, ti, t_row, rows, outputs, ahead, wanted):
    """All tiles of one product, lanes being output channels: ``rows`` x ``outputs`` sums."""
    out_of_line()
    r = 0
    while r < rows:
        left = rows - r
        # Tiles of fewer rows than 4 wait for their own results: fives first, until the others are a multiple of 4.
        fives = left % 4 * 5
        step = 5 if 0 < fives <= left else 8 if left >= 8 else 4 if left >= 4 else 2 if left >= 2 else 1
        for o in range(0, outputs, lanes(g)):
            task = (x, xi + r * x_row, x_row, x_pixel, g, gi + o, g_row, pixels, samples, total, ti + r * t_row + o, t_row,
                    ahead, wanted)
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
def _dots(x, xi, x_row, x_pixel, g, gi, g_row, g_pixel, pixels, samples, total, ti, t_row, rows, outputs, ahead, wanted):
    """The same, lanes being samples."""
    out_of_line()
    o = outputs // 3 * 3
    r = 0
    while r < rows:
        left = rows - r
        step = WIDE if left >= WIDE else MIDDLE if left >= MIDDLE else NARROW if left >= NARROW else 1
        xk, tk = xi + r * x_row, ti + r * lanes(g)
        threes = (g, gi, g_row, g_pixel, x, xk, x_row, x_pixel, pixels, samples, total, tk, t_row, o, ahead, wanted)
        ones = (g, gi + o * g_row, g_row, g_pixel, x, xk, x_row, x_pixel, pixels, samples, total, tk + o * t_row, t_row,
                outputs - o, ahead, wanted)
        if step == WIDE:
            _three_wide(*threes)
            _one_wide(*ones)
        elif step == MIDDLE:
            _three_middle(*threes)
            _one_middle(*ones)
        elif step == NARROW:
            _three_narrow(*threes)
            _one_narrow(*ones)
        else:
            _three_one(*threes)
            _one_one(*ones)
        r += step


@kernel(exact=True, reads="x g")
def _products(x, x_steps, ring, height, width, top, left, g, gi, g_steps, total, t_steps, broadcast, groups, kh, taps, rows,
              outputs, stride, dilation, pixels, samples, ahead, wanted):
    """Either of these, for ``pixels`` pixels of g, from ``gi`` on, and for all taps that meet the image.

    The tap at the top left of the first pixel meets the pixel (top, left) of the images, of height x width, of which ``ring``
    lines are there: line y is number ``y % ring``. A line of taps is ``taps`` products by themselves, side by side. Steps are
    from row to row of a product, from pixel to pixel and from group to group; of ``total`` from row to row, from tap to tap,
    from line to line of taps and from group to group.
    """
    out_of_line()
    x_row, x_pixel, x_group = x_steps
    g_row, g_pixel, g_group = g_steps
    t_row, t_tap, t_line, t_group = t_steps
    for group in range(groups):
        for ky in range(kh):
            iy = top + ky * dilation[0]
            if not 0 <= iy < height:
                continue
            for kx in range(taps):
                start, across = left + kx * dilation[1], stride[1]
                # Of the pixels those that this tap meets; -(a // b) is -a / b rounded up.
                first, last = max(0, -(start // across)), min(pixels, (width - 1 - start) // across + 1)
                if first < last:
                    factors = (x, (iy % ring * width + start + first * across) * x_pixel + group * x_group, x_row,
                               across * x_pixel, g, gi + group * g_group + first * g_pixel, g_row)
                    sums = (last - first, samples, total, group * t_group + ky * t_line + kx * t_tap, t_row, rows, outputs,
                            ahead, wanted)
                    if broadcast:
                        broadcast_products(*factors, *sums)
                    else:
                        _dots(*factors, g_pixel, *sums)


@kernel(exact=True, reads="x")
def _copy(x, xi, y, yi, size):
    """``y[yi:yi + size] = x[xi:xi + size]``, of flat positions."""
    out_of_line()
    for i in range(0, size, lanes(y)):
        store_part(y, yi + i, load_part(x, xi + i, size - i), size - i)


@kernel(exact=True, reads="g x", writes="dw", floats="g x dw", name="conv2d_vjp_weight")
def weight_gradient(g, x, dw, stride, padding, dilation, groups):
    """``conv2d_vjp_weight`` of ``g`` and ``x`` that lie batch innermost; the outputs of ``dw`` lie side by side."""
    out_of_line()
    samples, channels, height, width = x.shape
    _, out, oh, ow = g.shape
    outputs, inners, kh, kw = dw.shape[0] // groups, dw.shape[1], dw.shape[2], dw.shape[3]

    full = lanes(g)
    filled = -(-outputs // full) * full
    broadcast = 4 * outputs > 3 * filled and kw * inners > FEW
    # At the edges pixels meet fewer taps. For few channels lines of the images are copied together with their padding; else
    # each tap is a product by itself, of the pixels that it meets.
    copy = padding[1] > 0 and (inners < 8 or not broadcast)
    # What is a row of the product: a channel of all taps of a line, a tap of the only channel, or a channel of one tap.
    merged = (inners == 1 or (dilation[1] == 1 and groups == 1)) and (copy or padding[1] == 0)
    taps, rows = (1, kw * inners) if merged else (kw, inners)
    pixel, x_line, g_pixel = channels * samples, width * channels * samples, out * samples
    x_row = dilation[1] * pixel if inners == 1 else samples

    # The steps of :func:`_products`. Lanes are outputs: rows of outputs, of g one for each sample, of ``total`` one for each
    # tap and channel. Lanes are samples: rows of samples, a vector of sums for each output, tap and channel.
    chunk, turned_row = ow, filled if groups == 1 else out + full
    if broadcast:
        g_steps = turned_row, samples * turned_row, outputs
        t_steps = filled, rows * filled, kw * inners * filled, kh * kw * inners * filled
        # So many pixels at a time that they stay in the first cache, if the sums are not too short for that.
        chunk = max(NEAR // max(samples * turned_row * g.itemsize, 1), SHORT // max(samples, 1), 1)
    else:
        g_steps = samples, g_pixel, outputs * samples
        of_output = kh * kw * inners * full
        t_steps = of_output, rows * full, kw * inners * full, outputs * of_output
    chunk = min(chunk, max(CHAIN // max(samples, 1), 1))
    before, span = padding[1] if copy else 0, (kh - 1) * dilation[0] + 1
    wide, ring = width + 2 * before, span if copy else height
    total = aligned.empty(groups * t_steps[3], g.dtype)
    turned = aligned.empty(min(chunk, ow) * samples * turned_row if broadcast else 0, g.dtype)
    padded = aligned.empty(span * wide * pixel if copy else 0, g.dtype)
    total[:], turned[:], padded[:] = 0, 0, 0
    near_x, near_g = flat(x), flat(g)
    if copy:
        near_x = flat(padded)
    if broadcast:
        near_g = flat(turned)

    copied, ahead, new = 0, nothing_ahead(), min(stride[0], kh)
    tiles = groups * kh * taps * -(-rows // (8 if broadcast else WIDE)) * -(-outputs // (full if broadcast else 3))
    for oy in range(oh):
        top = oy * stride[0] - padding[0]
        if copy:
            for iy in range(max(copied, top), min(top + span, height)):
                _copy(x, iy * x_line, padded, (iy % ring * wide + before) * pixel, x_line)
            copied = max(copied, top + span)
        for ox in range(0, ow, chunk):
            pixels, here = min(chunk, ow - ox), (oy * ow + ox) * g_pixel
            if broadcast:
                for p in range(pixels):
                    transpose(flat(g), here + p * g_pixel, samples, out, samples, turned, p * g_steps[1], turned_row)
            # Meanwhile ask for the next pixels of g, and of so large a part of the lines that are new to the next line of g.
            after, there = here + pixels * g_pixel, (top + span + stride[0] - new) * x_line
            next_is(ahead, 0, g, after, after + chunk * g_pixel)
            next_is(ahead, 1, x, there + new * x_line * ox // ow, there + new * x_line * (ox + pixels) // ow)
            _products(near_x, (x_row, pixel, inners * samples), ring, height, wide, top, ox * stride[1] - padding[1] + before,
                      near_g, 0 if broadcast else here, g_steps, total, t_steps, broadcast, groups, kh, taps, rows, outputs,
                      stride, dilation, pixels, samples, flat(ahead), lines_ahead(ahead, tiles * pixels))
    in_use(turned)
    in_use(padded)
    _write_sums(total, broadcast, t_steps, dw, groups)


@kernel(exact=True, writes="dw")
def _write_sums(total, broadcast, steps, dw, groups):
    """Copy the sums to where they belong in ``dw``; where lanes were samples, they are summed first."""
    out_of_line()
    outputs, inners, kh, kw = dw.shape[0] // groups, dw.shape[1], dw.shape[2], dw.shape[3]
    inward, down, right = [stride // dw.itemsize for stride in dw.strides[1:]]
    t_row, _, t_line, t_group = steps
    full = lanes(dw)
    for group in range(groups):
        for ky in range(kh):
            for kx in range(kw):
                for c in range(inners):
                    ti, r = group * t_group + ky * t_line, kx * inners + c
                    if broadcast:
                        at = group * outputs + c * inward + ky * down + kx * right
                        for o in range(0, outputs, full):
                            store_part(dw, at + o, load(total, ti + r * t_row + o), outputs - o)
                    else:
                        for o in range(outputs):
                            dw[group * outputs + o, c, ky, kx] = reduce_add(load(total, ti + o * t_row + r * full))


@kernel(exact=True, reads="g y", writes="masked db", floats="g y masked db", name="conv2d_vjp")
def bias_gradient(g, y, masked, db):
    """Sums of ``g`` (n, out, oh, ow), batch innermost, over samples and pixels.

    With a ``y`` of the same shape, not of size 0, of what is written to ``masked``: g where y is above 0, else 0.
    """
    out_of_line()
    samples, out, oh, ow = g.shape
    full, zero = lanes(g), splat(g.dtype.type(0))
    row, total = np.zeros(out * full, g.dtype), np.zeros(out * full, g.dtype)
    for oy in range(oh):
        for ox in range(ow):
            for o in range(out):
                at, v = ((oy * ow + ox) * out + o) * samples, load(row, o * full)
                for i in range(0, samples, full):
                    here = load_part(g, at + i, samples - i)
                    if y.size:
                        here = select(load_part(y, at + i, samples - i) > zero, here, zero)
                        store_part(masked, at + i, here, samples - i)
                    v = v + here
                store(row, o * full, v)
        for i in range(0, row.size, full):  # short chains, as above
            store(total, i, load(total, i) + load(row, i))
            store(row, i, zero)
    for o in range(out):
        db[o] = reduce_add(load(total, o * full))
