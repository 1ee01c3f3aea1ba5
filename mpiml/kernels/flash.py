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

from .gemm import pack_at, whole_tiles
from .jit import kernel, vector_function
from .polynomial import log
from .scores import KEYS, QUERIES, ROOM, by_key, by_query, exponentials, hide, scores, slopes
from .simd import flat, fma, lanes, load, load_part, reduce_add, splat, store, store_part
from .softmax import row_scale

LOG2_E = math.log2(math.e)  # scores are in units of log(2): 2**x takes a third less time than e**x


@kernel(exact=True, reads="x", writes="y")
def _scaled_rows(x, xi, x_row, rows, n, scale, y):
    """Copy ``rows`` rows of ``n`` elements, ``x_row`` apart from position ``xi``, times ``scale``: to y, row behind row."""
    step = lanes(x)
    whole = n - n % step
    for r in range(rows):
        i, k = xi + r * x_row, r * n
        for j in range(0, whole, step):
            store(y, k + j, load(x, i + j) * splat(scale))
        if whole < n:
            store_part(y, k + whole, load_part(x, i + whole, n - whole) * splat(scale), n - whole)


@vector_function
def _clear_rows(x, xi, x_row, rows, n):
    """Such rows set to 0."""
    step = lanes(x)
    for r in range(rows):
        for j in range(0, n, step):
            store_part(x, xi + r * x_row + j, splat(x.dtype.type(0)), n - j)


@vector_function
def _dot(x, i, y, j, n):
    """The dot product of n elements from position ``i`` of x and ``j`` of y."""
    step = lanes(x)
    total = splat(x.dtype.type(0))
    for k in range(0, n, step):
        total = fma(load_part(x, i + k, n - k), load_part(y, j + k, n - k), total)
    return reduce_add(total)


@vector_function
def _at(x, b, h):
    """Position of the first row of a head of ``x`` (batch, heads, t, d)."""
    return (b * x.strides[0] + h * x.strides[1]) // x.itemsize


@vector_function
def _row(x):
    """Elements from row to row."""
    return x.strides[2] // x.itemsize


@kernel(exact=True, reads="q k v", writes="out lse", floats="q k v out lse", name="attention")
def forward(q, k, v, bias, lengths, causal, scale, out, lse):
    """Of (batch, heads, t, d) arrays ``out``, and ``lse`` (batch, heads, tq): the logarithms of the sums of exponentials.

    ``bias`` (batch, tk) is -infinity for keys that nobody sees and 0 for others, ``lengths`` (batch,) are the numbers of
    valid keys; size 0: none, all.
    """
    batch, heads, tq, d = q.shape
    tk, dv, dtype = k.shape[2], v.shape[3], q.dtype
    q_row, k_row, v_row, o_row = _row(q), _row(k), _row(v), _row(out)
    fq, fk, fv, fo = flat(q), flat(k), flat(v), flat(out)
    panels_q = np.zeros(d * whole_tiles(QUERIES, q), dtype)  # of the transpose: a row for each feature
    panels_v = np.empty(tk * whole_tiles(dv, q), dtype)
    s, rows_q = np.empty(KEYS * ROOM, dtype), np.empty(QUERIES * d, dtype)
    top, total, factor = np.empty((3, QUERIES), dtype)
    for item in range(batch * heads):
        b, h = item // heads, item % heads
        qi, ki, oi = _at(q, b, h), _at(k, b, h), _at(out, b, h)
        keys = lengths[b] if lengths.size else tk
        pack_at(fv, _at(v, b, h), v_row, 1, keys, dv, panels_v, 0)
        for i0 in range(0, tq, QUERIES):
            m = min(QUERIES, tq - i0)
            here = oi + i0 * o_row
            _scaled_rows(fq, qi + i0 * q_row, q_row, m, d, dtype.type(scale * LOG2_E), rows_q)
            pack_at(rows_q, 0, 1, d, d, m, panels_q, 0)
            top[:], total[:] = -np.inf, 0
            last = min(keys, i0 + m) if causal else keys
            if last == 0:
                out[b, h, i0:i0 + m] = 0  # no product below writes there
            for j0 in range(0, last, KEYS):
                n = min(KEYS, last - j0)
                scores(fk, ki + j0 * k_row, k_row, panels_q, d, s, i0, m, j0, n, causal)
                if bias.size:
                    hide(s, m, n, bias, b * tk + j0)
                exponentials(s, fo, here, o_row, dv, i0, m, j0, n, causal, top, total, factor)
                by_query(s, panels_v, keys, fo, here, o_row, i0, m, j0, n, dv, causal, j0 > 0)
            for r in range(m):
                row_scale(fo, here + r * o_row, dv, dtype.type(0 if total[r] == 0 else 1 / total[r]))
            for r in range(0, m, lanes(q)):
                store(total, r, fma(load(top, r), splat(dtype.type(1 / LOG2_E)), log(load(total, r))))
            lse[b, h, i0:i0 + m] = total[:m]


@kernel(exact=True, reads="g q k v out lse", writes="dq dk dv", floats="q k v g out lse", name="attention_vjp")
def backward(g, q, k, v, bias, lengths, causal, scale, out, lse, dq, dk, dv):
    """The gradients dq, dk and dv, from the gradient ``g`` for ``out``; otherwise as :func:`forward`.

    With probabilities p and their gradients dp = g v', the products q k' have the gradients scale p (dp - delta), where
    ``delta`` is the row's sum of p dp. As out = p v, that is also the dot product g . out, which needs no probabilities.
    """
    batch, heads, tq, d = q.shape
    tk, wide, dtype = k.shape[2], v.shape[3], q.dtype
    q_row, k_row, v_row, o_row, g_row = _row(q), _row(k), _row(v), _row(out), _row(g)
    dq_row, dk_row, dv_row = _row(dq), _row(dk), _row(dv)
    fg, fq, fk, fv, fo, fdq, fdk, fdv = flat(g), flat(q), flat(k), flat(v), flat(out), flat(dq), flat(dk), flat(dv)
    panels_q, panels_g = np.zeros(d * whole_tiles(QUERIES, q), dtype), np.zeros(wide * whole_tiles(QUERIES, q), dtype)
    panels_k = np.empty(tk * whole_tiles(d, q), dtype)
    s, ds, rows_q = np.empty(KEYS * ROOM, dtype), np.empty(KEYS * ROOM, dtype), np.empty(QUERIES * d, dtype)
    top, shift = np.zeros((2, QUERIES), dtype)
    for item in range(batch * heads):
        b, h = item // heads, item % heads
        qi, ki, vi, oi, gi = _at(q, b, h), _at(k, b, h), _at(v, b, h), _at(out, b, h), _at(g, b, h)
        dqi, dki, dvi = _at(dq, b, h), _at(dk, b, h), _at(dv, b, h)
        keys = lengths[b] if lengths.size else tk
        pack_at(fk, ki, k_row, 1, keys, d, panels_k, 0)
        seen = min(keys, tq) if causal else keys * (tq > 0)  # by any query
        _clear_rows(fdk, dki + seen * dk_row, dk_row, tk - seen, d)
        _clear_rows(fdv, dvi + seen * dv_row, dv_row, tk - seen, wide)
        for i0 in range(0, tq, QUERIES):
            m = min(QUERIES, tq - i0)
            q_here, g_here, here = qi + i0 * q_row, gi + i0 * g_row, dqi + i0 * dq_row
            _scaled_rows(fq, q_here, q_row, m, d, dtype.type(scale * LOG2_E), rows_q)
            pack_at(rows_q, 0, 1, d, d, m, panels_q, 0)
            pack_at(fg, g_here, 1, g_row, wide, m, panels_g, 0)
            for r in range(m):
                shift[r] = -scale * _dot(fg, g_here + r * g_row, fo, oi + (i0 + r) * o_row, wide)
                row = lse[b, h, i0 + r]  # no key was seen where it is -infinity, and -inf - -inf would be NaN
                top[r] = dtype.type(0) if row == -np.inf else dtype.type(row * LOG2_E)
            last = min(keys, i0 + m) if causal else keys
            if last == 0:
                dq[b, h, i0:i0 + m] = 0
            for j0 in range(0, last, KEYS):
                n = min(KEYS, last - j0)
                scores(fk, ki + j0 * k_row, k_row, panels_q, d, s, i0, m, j0, n, causal)
                scores(fv, vi + j0 * v_row, v_row, panels_g, wide, ds, i0, m, j0, n, causal)
                if bias.size:
                    hide(s, m, n, bias, b * tk + j0)
                slopes(s, ds, i0, m, j0, n, causal, top, scale, shift)
                by_key(s, fg, g_here, g_row, fdv, dvi + j0 * dv_row, dv_row, i0, m, j0, n, wide, causal)
                by_key(ds, fq, q_here, q_row, fdk, dki + j0 * dk_row, dk_row, i0, m, j0, n, d, causal)
                by_query(ds, panels_k, keys, fdq, here, dq_row, i0, m, j0, n, d, causal, j0 > 0)
