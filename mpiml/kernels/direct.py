"""Direct convolution, batch innermost: one register tile of channels x samples, moved over the result's pixels.

For one pixel of the result a tile is a matrix product: a few output channels, of which each step broadcasts the weights,
times one or two vectors of samples; its inner dimension are the taps and the input channels, which lie in memory one
after the other (:mod:`layout`). There are no patches to copy ("im2col") and no padded image: at an edge the inner
dimension is shorter (:mod:`taps`). An element of the result is a sum over taps and channels in their order, one fma for
each term, so its bits do not depend on the batch.
"""

import numpy as np

from .ahead import fetch, lines_ahead, next_is, nothing_ahead
from .gemm import transpose
from .jit import kernel, vector_function
from .registers import REGISTER
from .simd import at, flat, lanes, load_part, out_of_line, splat, store_part
from .taps import COUNT, FIRST, SOURCE, backward_taps, forward_taps
from .tile import at_least, load_row, outer, store_tile, zero_tile

ROWS = {64: 8, 32: 6, 16: 6}[REGISTER]  # output channels of the largest tile, as in gemm
VECTORS = 2  # of samples


def _make_tile(rows, vectors):
    """A kernel for ``rows`` output channels x ``vectors`` of samples of a line of the result's pixels.

    ``wi``, ``xi`` and ``yi`` are the positions of its first weight, sample and result; ``lines`` lines of taps meet it, each
    ``w_line`` and ``x_line`` further; ``columns`` is the plan for the pixels of the line (:mod:`taps`), whose taps are
    ``w_pixel`` and ``x_column`` apart. ``merged``: taps and channels follow each other as one run, in both w and x.
    """
    size = rows * vectors

    @kernel(exact=True, reads="x", writes="y")
    def tile(w, wi, w_line, w_pixel, x, xi, x_line, lines, columns, x_column, x_pixel, samples, channels, merged,
             bias, bi, ones, low, y, yi, y_pixel, count, ahead, wanted):
        out_of_line()
        for ox in range(columns.shape[0]):
            fetch(ahead, wanted)
            acc = zero_tile(y, size)
            taps = columns[ox, COUNT]
            runs, length = (1, taps * channels) if merged else (taps, channels)
            w_there, x_there = wi + columns[ox, FIRST] * w_pixel, xi + columns[ox, SOURCE] * x_pixel
            for _ in range(lines):
                for run in range(runs):
                    wk, xk = w_there + run * w_pixel, x_there + run * x_column
                    for _ in range(length):
                        acc = outer(acc, w, wk, 1, load_row(x, xk, count, vectors))
                        wk += rows
                        xk += samples
                w_there += w_line
                x_there += x_line
            acc = outer(acc, bias, bi, 1, load_row(ones, 0, count, vectors))  # each row's bias times 1, for all samples
            store_tile(at_least(acc, splat(low)), y, yi + ox * y_pixel, samples, count, vectors)

    return tile


# A tile's size is fixed when it is compiled, so that it fits the registers; each size is a kernel of its own.
_eight, _six, _four, _two, _one = (_make_tile(rows, VECTORS) for rows in (8, 6, 4, 2, 1))
_narrow_eight, _narrow_six, _narrow_four, _narrow_two, _narrow_one = (_make_tile(rows, 1) for rows in (8, 6, 4, 2, 1))


@kernel
def next_rows(left):
    """Rows of the next tile, if ``left`` outputs are left."""
    return ROWS if left >= ROWS else 6 if left >= 6 else 4 if left >= 4 else 2 if left >= 2 else 1


@kernel(exact=True, reads="w")
def pack_weights(w, row, inner, group, down, across, rows, inners, groups, block, packed):
    """Copy weights to the order in which tiles read them: tile, tap down, tap across, input channel, row of the tile.

    ``row``, ``inner`` and ``group`` are the strides of ``w`` along the outputs and inputs of the convolution, and from
    group to group; ``rows`` and ``inners`` their numbers; ``down`` and ``across`` the orders of the taps; ``block`` the
    number of rows of a tile, 0 for those of this file.
    """
    out_of_line()
    by_y, by_x = w.strides[2] // w.itemsize, w.strides[3] // w.itemsize
    to = 0
    for g in range(groups):
        o = 0
        while o < rows:
            n = block if block else next_rows(rows - o)
            for ky in down:
                for kx in across:
                    here = g * group + o * row + ky * by_y + kx * by_x
                    if row == 1:
                        for c in range(inners):
                            for r in range(0, n, lanes(w)):
                                store_part(packed, to + c * n + r, load_part(w, here + c * inner + r, n - r), n - r)
                    elif inner == 1:
                        transpose(flat(w), here, row, n, inners, packed, to, n)
                    else:
                        for c in range(inners):
                            for r in range(n):
                                packed[to + c * n + r] = at(w, here + c * inner + r * row)
                    to += inners * n
            o += n


@vector_function
def _end(taps, o, step):
    """Of a plan (:mod:`taps`): the source pixel behind the last one that pixel ``o`` meets, if it meets one."""
    return taps[o, SOURCE] + (taps[o, COUNT] - 1) * step + 1


@kernel(reads="bias")
def bias_and_least(bias, relu, outputs, y):
    """The ``bias`` of each output, zeros if it has size 0, and what no result is below, in the dtype of ``y``."""
    biases = np.zeros(outputs, y.dtype)
    for o in range(bias.size):  # an assignment of slices takes numba a second to compile
        biases[o] = bias[o]
    return biases, biases.dtype.type(0 if relu else -np.inf)


@kernel(exact=True, reads="x weight bias", writes="y", floats="x weight bias y", name="conv2d")
def convolve(x, weight, bias, relu, y, stride, padding, dilation, groups, backward):
    """``conv2d`` of ``x``, or ``backward`` its gradient for images; both ``x`` and ``y`` lie batch innermost.

    Backward x is the gradient for the result, and the weight's outputs and inputs change places.
    """
    out_of_line()
    samples, _, height, width = x.shape
    kh, kw = weight.shape[2:]
    outer_stride, inner_stride = weight.strides[0] // weight.itemsize, weight.strides[1] // weight.itemsize
    group_stride = weight.shape[0] // groups * outer_stride
    if backward:
        plan_down = backward_taps(y.shape[2], kh, height, stride[0], padding[0], dilation[0])
        plan_across = backward_taps(y.shape[3], kw, width, stride[1], padding[1], dilation[1])
        outputs, channels = weight.shape[1], weight.shape[0] // groups
        outer_stride, inner_stride = inner_stride, outer_stride
    else:
        plan_down = forward_taps(height, kh, y.shape[2], stride[0], padding[0], dilation[0])
        plan_across = forward_taps(width, kw, y.shape[3], stride[1], padding[1], dilation[1])
        outputs, channels = weight.shape[0] // groups, weight.shape[1]
    down, lines, line_step = plan_down
    across, columns, column_step = plan_across
    w = np.empty(weight.size, weight.dtype)
    pack_weights(weight, outer_stride, inner_stride, group_stride, down, across, outputs, channels, groups, 0, w)
    biases, low = bias_and_least(bias, relu, groups * outputs, y)

    x_pixel, y_pixel = groups * channels * samples, groups * outputs * samples
    x_line, y_line = width * x_pixel, len(columns) * y_pixel
    merged = column_step == 1 and groups == 1  # the channels of one pixel are followed by those of the next
    full = lanes(y)
    ones = np.ones(VECTORS * full, y.dtype)
    ahead, known = nothing_ahead(), 0
    times = -(-samples // (VECTORS * full)) * groups * -(-outputs // ROWS) * len(columns)
    # Line by line of the result for all samples: so all that is read and written goes forward in memory.
    for oy in range(len(lines)):
        # Meanwhile ask for the next line of y, and for the lines of x that are new to it.
        known, following = max(known, _end(lines, oy, line_step)), min(oy + 1, len(lines) - 1)
        next_is(ahead, 0, y, (oy + 1) * y_line, (oy + 2) * y_line)
        next_is(ahead, 1, x, max(known, lines[following, SOURCE]) * x_line, _end(lines, following, line_step) * x_line)
        wanted = lines_ahead(ahead, times)
        for i in range(0, samples, VECTORS * full):
            count = min(samples - i, VECTORS * full)
            for group in range(groups):
                o = 0
                while o < outputs:
                    rows = next_rows(outputs - o)
                    out = group * outputs + o
                    wi = (out * kh + lines[oy, FIRST] * rows) * kw * channels
                    xi = lines[oy, SOURCE] * x_line + group * channels * samples + i
                    yi = oy * y_line + out * samples + i
                    task = (w, wi, kw * channels * rows, channels * rows, x, xi, line_step * x_line,
                            lines[oy, COUNT], columns, column_step * x_pixel, x_pixel, samples, channels, merged, biases, out,
                            ones, low, y, yi, y_pixel, count, flat(ahead), wanted)
                    if count > full:
                        if rows == 8:
                            _eight(*task)
                        elif rows == 6:
                            _six(*task)
                        elif rows == 4:
                            _four(*task)
                        elif rows == 2:
                            _two(*task)
                        else:
                            _one(*task)
                    elif rows == 8:
                        _narrow_eight(*task)
                    elif rows == 6:
                        _narrow_six(*task)
                    elif rows == 4:
                        _narrow_four(*task)
                    elif rows == 2:
                        _narrow_two(*task)
                    else:
                        _narrow_one(*task)
                    o += rows
