"""Scaled dot-product attention, softmax(q k' scale) v, block by block: the matrix of all scores is never stored.

A block of queries meets one block of keys after the other. Of the scores of a row only its largest, the sum of their
exponentials and the sum of the values so weighted are kept; when a later block brings a larger score, the two sums are
scaled down (Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"; Dao et al. 2022,
"FlashAttention"). Backward the scores are computed anew, from the logarithm of the sum of exponentials of each row.

All products are made of the register tile of :mod:`mpiml.kernels.gemm`. With a causal mask, tiles above the diagonal are
left out. A row's bits are a function of its query, the keys and the values.
"""

import math

import numpy as np

from .gemm import ROWS, VECTORS, _pack, column_of_tiles
from .jit import kernel
from .polynomial import exp_of_negative, log, vector_function
from .public import check_dtypes, check_writable, public, refuse
from .simd import fma, lanes, load, load_part, out_of_line, reduce_add, splat, store, store_part
from .softmax import row_exponentials, row_scale, row_top

QUERIES = 4 * ROWS  # in a block
KEYS = 256  # in a block; a multiple of a tile's width
ROOM = KEYS + 16  # elements from row to row of a block of scores: no power of two, which would crowd the cache


@vector_function
def _four_axes(x):
    """Memory of this file's own, as an array of four axes: kernels are compiled for those alone."""
    return x.reshape((1, 1, 1, x.size))


@vector_function
def _scratch(size, dtype):
    return _four_axes(np.empty(size, dtype))


@kernel(exact=True, reads="a b", writes="c")
def _product(a, ai, a_row, a_step, b, bi, b_step, c, ci, c_row, rows, inner, columns, add):
    """c = a b or c += a b, where the elements of a row of b are consecutive in memory."""
    out_of_line()
    width = VECTORS * lanes(c)
    for j in range(0, columns, width):
        column_of_tiles(a, ai, a_row, a_step, b, bi + j, b_step, c, ci + j, c_row, rows, inner, min(width, columns - j), add)


@kernel(exact=True, reads="a panel", writes="s")
def _scores(a, ai, a_row, panel, inner, s, i0, rows, j0, n, causal):
    """s = a b for a block of rows from i0 and columns from j0 of the packed ``panel``; causal: up to the diagonal."""
    out_of_line()
    width = VECTORS * lanes(s)
    for j in range(0, n, width):
        first = max(0, j0 + j - i0) if causal else 0
        if first < rows:
            column_of_tiles(a, ai + first * a_row, a_row, 1, panel, (j0 + j) * inner, width, s, first * ROOM + j, ROOM,
                            rows - first, inner, min(width, n - j), False)


@kernel(exact=True, reads="s v", writes="out")
def _by_query(s, v, vi, v_row, out, oi, o_row, i0, rows, j0, n, columns, causal, add):
    """out = s v, or out += s v, a row for each query of the block."""
    out_of_line()
    if not causal or j0 + n <= i0:
        _product(s, 0, ROOM, 1, v, vi, v_row, out, oi, o_row, rows, n, columns, add)
        return
    for r in range(0, rows, ROWS):
        m = min(ROWS, rows - r)
        inner = min(n, i0 + r + m - j0)
        if inner > 0:
            _product(s, r * ROOM, ROOM, 1, v, vi, v_row, out, oi + r * o_row, o_row, m, inner, columns, add)


@kernel(exact=True, reads="s g", writes="out")
def _by_key(s, g, gi, g_row, out, oi, o_row, i0, rows, j0, n, columns, causal):
    """out += s' g, a row for each key of the block."""
    out_of_line()
    whole = min(n, max(0, i0 - j0 + 1)) // ROWS * ROWS if causal else n  # keys that every query of the block sees
    _product(s, 0, 1, ROOM, g, gi, g_row, out, oi, o_row, whole, rows, columns, True)
    for j in range(whole, n, ROWS):
        first = max(0, j0 + j - i0)
        if first < rows:
            _product(s, first * ROOM + j, 1, ROOM, g, gi + first * g_row, g_row, out, oi + j * o_row, o_row, min(ROWS, n - j),
                     rows - first, columns, True)


@vector_function
def _seen(i, j0, n, causal):
    """How many of the n keys from j0 the query i sees."""
    return min(n, max(0, i + 1 - j0)) if causal else n


@vector_function
def _clear(s, r, i, j0, n, causal):
    """0 for what tiles on the diagonal read behind the last key that the query i sees."""
    if causal:
        stop = min(n, i + 1 - j0 + ROWS)
        for j in range(max(0, i + 1 - j0), stop, lanes(s)):
            store_part(s, r * ROOM + j, splat(s.dtype.type(0)), stop - j)


@kernel(exact=True, writes="s")
def _add_bias(s, rows, n, bias, bi):
    """Add 0 or -infinity to the columns of a block of scores."""
    out_of_line()
    step = lanes(s)
    for r in range(rows):
        for j in range(0, n, step):
            store(s, r * ROOM + j, load(s, r * ROOM + j) + load_part(bias, bi + j, n - j))


@kernel(exact=True, reads="x", writes="y")
def _scaled_rows(x, xi, x_row, rows, n, scale, y):
    """Copy rows, times ``scale``, to where they are consecutive."""
    step = lanes(x)
    for r in range(rows):
        for j in range(0, n, step):
            store_part(y, r * n + j, load_part(x, xi + r * x_row + j, n - j) * splat(scale), n - j)


@kernel(exact=True, writes="s out")
def _exponentials(s, out, oi, o_row, columns, i0, rows, j0, n, causal, top, total, fresh):
    """The online softmax of a block of scores; scales what the sums hold so far."""
    out_of_line()
    for r in range(rows):
        fresh[r] = max(top[r], row_top(s, r * ROOM, _seen(i0 + r, j0, n, causal)))
    for r in range(rows):
        seen = _seen(i0 + r, j0, n, causal)
        _clear(s, r, i0 + r, j0, n, causal)
        if seen:
            largest = fresh[r] if fresh[r] > -np.inf else fresh.dtype.type(0)  # no key so far
            sums = row_exponentials(s, r * ROOM, seen, largest, s, r * ROOM)
            if j0:
                factor = math.exp(top[r] - largest)
                row_scale(out, oi + r * o_row, columns, out.dtype.type(factor))
                sums += total[r] * out.dtype.type(factor)
            total[r] = sums
            top[r] = fresh[r]


@kernel(exact=True, reads="q k v", writes="out lse")
def _attention(q, k, v, bias, lengths, causal, scale, out, lse):
    batch, heads, tq, d = q.shape
    tk, dv, size, width = k.shape[2], v.shape[3], q.itemsize, VECTORS * lanes(q)
    q_row, k_row, v_row, o_row = q.strides[2] // size, k.strides[2] // size, v.strides[2] // size, out.strides[2] // size
    dtype = q.dtype
    panel = np.empty((tk + width) * d, dtype)
    shown, s, rows_q = _four_axes(panel), _scratch(QUERIES * ROOM, dtype), _scratch(QUERIES * d, dtype)
    top, total, fresh = np.empty(QUERIES, dtype), np.empty(QUERIES, dtype), np.empty(QUERIES, dtype)
    for item in range(batch * heads):
        b, h = item // heads, item % heads
        qi, ki = (b * q.strides[0] + h * q.strides[1]) // size, (b * k.strides[0] + h * k.strides[1]) // size
        vi, oi = (b * v.strides[0] + h * v.strides[1]) // size, (b * out.strides[0] + h * out.strides[1]) // size
        keys = lengths[b] if lengths.size else tk
        _pack(k, ki, 1, k_row, d, keys, panel, 0)
        for i0 in range(0, tq, QUERIES):
            m = min(QUERIES, tq - i0)
            here = oi + i0 * o_row
            _scaled_rows(q, qi + i0 * q_row, q_row, m, d, dtype.type(scale), rows_q)
            top[:], total[:] = -np.inf, 0
            last = min(keys, i0 + m) if causal else keys
            if last == 0:
                out[b, h, i0:i0 + m] = 0
            for j0 in range(0, last, KEYS):
                n = min(KEYS, last - j0)
                _scores(rows_q, 0, d, shown, d, s, i0, m, j0, n, causal)
                if bias.size:
                    _add_bias(s, m, n, bias, b * tk + j0)
                _exponentials(s, out, here, o_row, dv, i0, m, j0, n, causal, top, total, fresh)
                _by_query(s, v, vi + j0 * v_row, v_row, out, here, o_row, i0, m, j0, n, dv, causal, j0 > 0)
            for r in range(m):
                row_scale(out, here + r * o_row, dv, dtype.type(0 if total[r] == 0 else 1 / total[r]))
            for r in range(0, m, lanes(q)):
                store(total, r, log(load(total, r)) + load(top, r))
            lse[b, h, i0:i0 + m] = total[:m]


@vector_function
def _slopes(s, ds, i, n, lse, delta):
    """In place of scores s their probabilities; in place of gradients ds for these, those for the scores."""
    step = lanes(s)
    for j in range(i, i + n - n % step, step):
        p = exp_of_negative(load(s, j) - splat(lse))
        store(ds, j, p * (load(ds, j) - splat(delta)))
        store(s, j, p)
    left = n % step
    if left:
        j = i + n - left
        p = exp_of_negative(load_part(s, j, left) - splat(lse))
        store_part(ds, j, p * (load_part(ds, j, left) - splat(delta)), left)
        store_part(s, j, p, left)


@vector_function
def _dot(x, i, y, j, n):
    step = lanes(x)
    total = splat(x.dtype.type(0))
    for k in range(0, n, step):
        total = fma(load_part(x, i + k, n - k), load_part(y, j + k, n - k), total)
    return reduce_add(total)


@kernel(exact=True, reads="g q k v out lse", writes="dq dk dv")
def _attention_vjp(g, q, k, v, bias, lengths, causal, scale, out, lse, dq, dk, dv):
    batch, heads, tq, d = q.shape
    tk, wide, size, width = k.shape[2], v.shape[3], q.itemsize, VECTORS * lanes(q)
    dtype = q.dtype
    q_row, k_row, v_row, o_row = q.strides[2] // size, k.strides[2] // size, v.strides[2] // size, out.strides[2] // size
    g_row, dq_row, dk_row, dv_row = g.strides[2] // size, dq.strides[2] // size, dk.strides[2] // size, dv.strides[2] // size
    panel_k, panel_v = np.empty((tk + width) * d, dtype), np.empty((tk + width) * wide, dtype)
    shown_k, shown_v = _four_axes(panel_k), _four_axes(panel_v)
    s, ds, rows_q = _scratch(QUERIES * ROOM, dtype), _scratch(QUERIES * ROOM, dtype), _scratch(QUERIES * d, dtype)
    delta = np.empty(QUERIES, dtype)
    dk[:], dv[:] = 0, 0
    for item in range(batch * heads):
        b, h = item // heads, item % heads
        qi, ki = (b * q.strides[0] + h * q.strides[1]) // size, (b * k.strides[0] + h * k.strides[1]) // size
        vi, oi = (b * v.strides[0] + h * v.strides[1]) // size, (b * out.strides[0] + h * out.strides[1]) // size
        gi, dqi = (b * g.strides[0] + h * g.strides[1]) // size, (b * dq.strides[0] + h * dq.strides[1]) // size
        dki, dvi = (b * dk.strides[0] + h * dk.strides[1]) // size, (b * dv.strides[0] + h * dv.strides[1]) // size
        keys = lengths[b] if lengths.size else tk
        _pack(k, ki, 1, k_row, d, keys, panel_k, 0)
        _pack(v, vi, 1, v_row, wide, keys, panel_v, 0)
        for i0 in range(0, tq, QUERIES):
            m = min(QUERIES, tq - i0)
            g_here, here = gi + i0 * g_row, dqi + i0 * dq_row
            _scaled_rows(q, qi + i0 * q_row, q_row, m, d, dtype.type(scale), rows_q)
            for r in range(m):
                delta[r] = _dot(g, g_here + r * g_row, out, oi + (i0 + r) * o_row, wide)
            last = min(keys, i0 + m) if causal else keys
            if last == 0:
                dq[b, h, i0:i0 + m] = 0
            for j0 in range(0, last, KEYS):
                n = min(KEYS, last - j0)
                _scores(rows_q, 0, d, shown_k, d, s, i0, m, j0, n, causal)
                _scores(g, g_here, g_row, shown_v, wide, ds, i0, m, j0, n, causal)
                if bias.size:
                    _add_bias(s, m, n, bias, b * tk + j0)
                for r in range(m):
                    _clear(s, r, i0 + r, j0, n, causal)
                    _clear(ds, r, i0 + r, j0, n, causal)
                    row = lse[b, h, i0 + r]
                    _slopes(s, ds, r * ROOM, _seen(i0 + r, j0, n, causal), dtype.type(0) if row == -np.inf else row, delta[r])
                _by_key(s, g, g_here, g_row, dv, dvi + j0 * dv_row, dv_row, i0, m, j0, n, wide, causal)
                _by_key(ds, rows_q, 0, d, dk, dki + j0 * dk_row, dk_row, i0, m, j0, n, d, causal)
                _by_query(ds, k, ki + j0 * k_row, k_row, dq, here, dq_row, i0, m, j0, n, d, causal, j0 > 0)
            for r in range(m):
                row_scale(dq, here + r * dq_row, d, dtype.type(scale))


@public
def _whole_rows(x):
    """``x``, or a copy of it in which the elements of a row are consecutive."""
    if x.strides[x.ndim - 1] == x.itemsize or x.shape[-1] == 1:  # the stride of an axis of one element means nothing
        return x
    return np.ascontiguousarray(x)


@public
def _four(x):
    """``x`` (t, d), (batch, t, d) or (batch, heads, t, d) as the last of these."""
    if x.ndim == 2:
        return x[None, None]
    if x.ndim == 3:
        return x[:, None]
    return x


@public
def _stack(x):
    return _four(_whole_rows(x))


@public
def _check(q, k, v):
    check_dtypes("attention", q, k, v)
    if not 2 <= q.ndim <= 4 or k.ndim != q.ndim or v.ndim != q.ndim:
        refuse("attention takes queries, keys and values of shape (t, d), (batch, t, d) or (batch, heads, t, d), not {}, {} "
               "and {}", q.shape, k.shape, v.shape)
    if (q.shape[:-2] != k.shape[:-2] or k.shape[:-1] != v.shape[:-1] or q.shape[-1] != k.shape[-1]):
        refuse("queries of shape {}, keys of shape {} and values of shape {} do not belong together: queries and keys have one "
               "d, keys and values one length, all the same batch and heads", q.shape, k.shape, v.shape)


@kernel(reads="lengths")
def _all_within(lengths, limit):
    for i in range(lengths.size):
        if lengths[i] < 0 or lengths[i] > limit:
            return False
    return True


@public
def _valid(lengths, batch, keys):
    if lengths is None:
        return np.empty(0, np.int64)
    if lengths.shape != (batch,) or not _all_within(lengths, keys):
        refuse("attention to {} keys takes {} lengths in 0 .. {}, not lengths of shape {}", keys, batch, keys, lengths.shape)
    return lengths.astype(np.int64)


@kernel(reads="mask")
def _minus_infinity(mask, bias):
    for b in range(mask.shape[0]):
        for j in range(mask.shape[1]):
            bias[b, j] = 0 if mask[b, j] else -np.inf


@public
def _bias(mask, batch, keys, dtype):
    if mask is None:
        return np.empty((0, 0), dtype)
    if mask.shape != (batch, keys):
        refuse("attention of a batch of {} to {} keys takes a mask of shape {}, not {}", batch, keys, (batch, keys), mask.shape)
    bias = np.empty(mask.shape, dtype)
    _minus_infinity(mask, bias)
    return bias


@public
def attention(q, k, v, causal=False, lengths=None, mask=None, scale=None, out=None):
    """softmax(q k' * scale) v for each item of the batch and each head.

    Parameters
    ----------
    q : (batch, heads, t_q, d) array, float32 or float64
        Leading axes of any strides, as of ``x.reshape(batch, t, heads, d).swapaxes(1, 2)``; a last axis that is not
        contiguous is copied. (batch, t_q, d) and (t_q, d) do as well.
    k : (batch, heads, t_k, d) array
    v : (batch, heads, t_k, d_v) array
    causal : bool
        Query i sees the keys 0 .. i only.
    lengths : (batch,) integer array, optional
        How many keys of each item are valid: the first ones.
    mask : (batch, t_k) boolean array, optional
        Which keys of each item are valid.
    scale : float, optional
        1 / sqrt(d) by default.
    out : (batch, heads, t_q, d_v) array, optional
        Its last axis is contiguous.

    Returns
    -------
    out : (batch, heads, t_q, d_v) array
        0 for queries that see no key. In memory its axes are ordered as those of ``q``, if d_v is d.
    logsumexp : (batch, heads, t_q) array
        log(sum(exp(q k' * scale))) over the keys: what the vjp needs.

    Raises
    ------
    TypeError, ValueError
        Dtypes or shapes that do not belong together, lengths out of range.
    """
    _check(q, k, v)
    q4, k4, v4 = _stack(q), _stack(k), _stack(v)
    valid, bias = _valid(lengths, q4.shape[0], k4.shape[2]), _bias(mask, q4.shape[0], k4.shape[2], q.dtype)
    shape = q.shape[:-1] + (v.shape[-1],)
    if out is not None:
        check_writable(out)
        if out.shape != shape or out.dtype != q.dtype or (
                out.strides[out.ndim - 1] != out.itemsize and shape[-1] != 1):
            refuse("out has shape {} and strides {}, the result shape {} and a contiguous last axis",
                   out.shape, out.strides, shape)
        y = out
    else:
        y = _like(q, shape)
    logsumexp = np.empty(q.shape[:-1], q.dtype)
    factor = 1 / math.sqrt(max(q.shape[-1], 1)) if scale is None else float(scale)
    if y.size:
        _attention(q4, k4, v4, bias, valid, causal, factor, _four(y), _stack_rows(logsumexp))
    return y, logsumexp


@public
def _like(x, shape):
    """A new array of ``shape``, its axes in memory in the order of those of ``x`` if they are as long."""
    if x.shape == shape and (x.strides[x.ndim - 1] == x.itemsize or shape[-1] == 1):
        return np.empty_like(x)
    return np.empty(shape, x.dtype)


@public
def _stack_rows(x):
    """``x`` (t,), (batch, t) or (batch, heads, t) as the last of these."""
    if x.ndim == 1:
        return x[None, None]
    if x.ndim == 2:
        return x[:, None]
    return x


@public
def attention_vjp(g, q, k, v, out, logsumexp, causal=False, lengths=None, mask=None, scale=None):
    """Gradients for q, k and v of ``out, logsumexp = attention(q, k, v, ...)``, given the gradient ``g`` for ``out``.

    Returns
    -------
    dq, dk, dv : arrays of the shapes of q, k and v, and of the order of their axes in memory
    """
    _check(q, k, v)
    check_dtypes("attention_vjp", q, g, out, logsumexp)
    if g.shape != out.shape or logsumexp.shape != q.shape[:-1]:
        refuse("a gradient of shape {} and a logsumexp of shape {} for a result of shape {}",
               g.shape, logsumexp.shape, out.shape)
    q4, k4, v4 = _stack(q), _stack(k), _stack(v)
    valid, bias = _valid(lengths, q4.shape[0], k4.shape[2]), _bias(mask, q4.shape[0], k4.shape[2], q.dtype)
    dq, dk, dv = _like(q, q.shape), _like(k, k.shape), _like(v, v.shape)
    factor = 1 / math.sqrt(max(q.shape[-1], 1)) if scale is None else float(scale)
    _attention_vjp(_stack(g), q4, k4, v4, bias, valid, causal, factor, _stack(out), _stack_rows(logsumexp),
                   _four(dq), _four(dk), _four(dv))
    return dq, dk, dv
