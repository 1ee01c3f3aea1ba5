"""Scaled dot-product attention: what may be asked for, and what is refused; :mod:`mpiml.kernels.flash` computes it."""

import math

import numpy as np

from .flash import backward, forward
from .jit import kernel
from .public import public, refuse, whole_rows


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
    """``x`` as (batch, heads, t, d), with the elements of a row side by side."""
    return _four(whole_rows(x))


@public
def _check(q, k, v):
    if not 2 <= q.ndim <= 4 or k.ndim != q.ndim or v.ndim != q.ndim:
        refuse("attention takes queries, keys and values of shape (t, d), (batch, t, d) or (batch, heads, t, d), not {}, {} "
               "and {}", q.shape, k.shape, v.shape)
    if (q.shape[:-2] != k.shape[:-2] or k.shape[:-1] != v.shape[:-1] or q.shape[-1] != k.shape[-1]):
        refuse("queries of shape {}, keys of shape {} and values of shape {} do not belong together: queries and keys have one "
               "d, keys and values one length, all the same batch and heads", q.shape, k.shape, v.shape)


@kernel(reads="lengths")
def _all_within(lengths, limit):
    """Are all of them in 0 .. limit?"""
    for i in range(lengths.size):
        if lengths[i] < 0 or lengths[i] > limit:
            return False
    return True


@public
def _valid(lengths, batch, keys):
    """``lengths`` as the kernels take them: (batch,) of int64, or of size 0 for None."""
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
    """What is added to the scores for a boolean ``mask``: 0 or -infinity, (batch, keys), or of size 0 for None."""
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
        if out.shape != shape or out.dtype != q.dtype or (
                out.strides[out.ndim - 1] != out.itemsize and shape[-1] != 1):
            refuse("out has shape {} and strides {}, the result shape {} and a contiguous last axis",
                   out.shape, out.strides, shape)
        y = out
    else:
        y = _like(q, shape)
    logsumexp = np.empty(q.shape[:-1], q.dtype)
    factor = 1 / math.sqrt(max(q.shape[-1], 1)) if scale is None else float(scale)
    forward(q4, k4, v4, bias, valid, causal, factor, _four(y), _stack_rows(logsumexp))
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

    Raises
    ------
    TypeError, ValueError
        As :func:`attention`, or a ``g`` or ``logsumexp`` of another shape.
    """
    _check(q, k, v)
    if g.shape != out.shape or logsumexp.shape != q.shape[:-1]:
        refuse("a gradient of shape {} and a logsumexp of shape {} for a result of shape {}",
               g.shape, logsumexp.shape, out.shape)
    q4, k4, v4 = _stack(q), _stack(k), _stack(v)
    valid, bias = _valid(lengths, q4.shape[0], k4.shape[2]), _bias(mask, q4.shape[0], k4.shape[2], q.dtype)
    dq, dk, dv = _like(q, q.shape), _like(k, k.shape), _like(v, v.shape)
    factor = 1 / math.sqrt(max(q.shape[-1], 1)) if scale is None else float(scale)
    backward(_stack(g), q4, k4, v4, bias, valid, causal, factor, _stack(out), _stack_rows(logsumexp),
             _four(dq), _four(dk), _four(dv))
    return dq, dk, dv
