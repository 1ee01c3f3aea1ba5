"""Softmax over the last axis, its logarithm, and the cross-entropy fused with it."""

import numpy as np

from .jit import kernel


def _rows(x):
    return np.ascontiguousarray(x).reshape(-1, x.shape[-1]) if x.size else np.empty((0, max(x.shape[-1], 1)), x.dtype)


@kernel
def _log_sum_exp(row):
    top = row[0]
    for j in range(1, row.size):
        top = max(top, row[j])
    total = row.dtype.type(0)
    for j in range(row.size):
        total += np.exp(row[j] - top)
    return top + np.log(total)


@kernel
def _softmax(x, y, log):
    for i in range(x.shape[0]):
        lse = _log_sum_exp(x[i])
        for j in range(x.shape[1]):
            y[i, j] = x[i, j] - lse if log else np.exp(x[i, j] - lse)


@kernel
def _softmax_vjp(g, y, out, log):
    for i in range(g.shape[0]):
        total = g.dtype.type(0)
        for j in range(g.shape[1]):
            total += g[i, j] if log else g[i, j] * y[i, j]
        for j in range(g.shape[1]):
            out[i, j] = g[i, j] - np.exp(y[i, j]) * total if log else y[i, j] * (g[i, j] - total)


def _apply(x, log):
    rows = _rows(x)
    y = np.empty(rows.shape, x.dtype)
    _softmax(rows, y, log)
    return y.reshape(x.shape)


def _apply_vjp(g, y, log):
    rows = _rows(g)
    out = np.empty(rows.shape, g.dtype)
    _softmax_vjp(rows, _rows(y), out, log)
    return out.reshape(g.shape)


def softmax(x):
    """exp(x) / sum(exp(x)) over the last axis of ``x`` (..., classes), without overflow."""
    return _apply(x, False)


def softmax_vjp(g, y):
    """Gradient for x of ``y = softmax(x)``."""
    return _apply_vjp(g, y, False)


def log_softmax(x):
    """x - log(sum(exp(x))) over the last axis of ``x`` (..., classes), without overflow."""
    return _apply(x, True)


def log_softmax_vjp(g, y):
    """Gradient for x of ``y = log_softmax(x)``."""
    return _apply_vjp(g, y, True)


@kernel
def _label_loss(logits, labels, smoothing, ignore, probabilities):
    rows, classes = logits.shape
    t = logits.dtype.type
    loss = 0.0
    for i in range(rows):
        label = labels[i]
        if label == ignore:
            probabilities[i] = 0
            continue
        if label < 0 or label >= classes:
            return np.nan, i
        lse = _log_sum_exp(logits[i])
        row = t(0)
        for j in range(classes):
            probabilities[i, j] = np.exp(logits[i, j] - lse)
            row += logits[i, j]
        loss += lse - (1 - smoothing) * logits[i, label]
        if smoothing > 0:  # 0 times the infinity of a class masked out would be NaN
            loss -= smoothing / classes * row
    return loss, -1


@kernel
def _label_loss_vjp(g, probabilities, labels, smoothing, ignore, out):
    rows, classes = probabilities.shape
    t = out.dtype.type
    spread = t(smoothing / classes)
    for i in range(rows):
        if labels[i] == ignore:
            out[i] = 0
            continue
        for j in range(classes):
            out[i, j] = g * (probabilities[i, j] - spread)
        out[i, labels[i]] -= g * t(1 - smoothing)


def label_loss(logits, labels, smoothing=0.0, ignore=-100):
    """Cross-entropy of softmax(logits) against labels, summed over the samples.

    Parameters
    ----------
    logits : (n, classes) array, float32 or float64
    labels : (n,) integer array, each in 0 .. classes - 1 or equal to ``ignore`` (which adds nothing)
    smoothing : float
        Label smoothing (Szegedy et al. 2016): the target is 1 - smoothing on the label plus
        smoothing / classes on every class.

    Returns
    -------
    loss : float
        Sum over the samples, accumulated in float64.
    probabilities : (n, classes) array
        softmax(logits), 0 in ignored rows: what the vjp needs.

    Raises
    ------
    ValueError
        A label out of range, with its value and place.
    """
    labels = np.ascontiguousarray(labels, np.int64)
    logits = np.ascontiguousarray(logits)
    probabilities = np.empty(logits.shape, logits.dtype)
    loss, bad = _label_loss(logits, labels, float(smoothing), ignore, probabilities)
    if bad >= 0:
        classes = logits.shape[1]
        raise ValueError(f"label {labels[bad]} at position {bad} in a problem of {classes} classes: labels run from 0 "
                         f"to {classes - 1}" + (", so the last layer needs more outputs or the labels fewer values"
                                                if labels[bad] >= classes else ""))
    return loss, probabilities


def label_loss_vjp(g, probabilities, labels, smoothing=0.0, ignore=-100):
    """Gradient for logits, (n, classes), of the loss; ``g`` is the scalar gradient for the loss."""
    out = np.empty(probabilities.shape, probabilities.dtype)
    labels = np.ascontiguousarray(labels, np.int64)
    _label_loss_vjp(out.dtype.type(g), probabilities, labels, float(smoothing), ignore, out)
    return out
