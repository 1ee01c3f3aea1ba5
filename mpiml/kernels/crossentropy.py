"""The cross-entropy of softmax(logits) against labels, fused with the softmax.

With top the largest of a row x of n logits and L = log(sum(exp(x - top))), a label's loss is L + top - x[label]. Smoothed
by s it is, since the targets' sum is 1, L + (1 - s) (top - x[label]) + s / n sum(top - x): no term cancels another.
"""

import numpy as np

from . import aligned
from .jit import kernel
from .public import contiguous_output, public, refuse
from .simd import borrowed, first_lanes, flat, in_use, lanes, load, load_part, reduce_add, select, splat, store, store_part
from .softmax import block_exponentials, block_rows, in_place, log_totals, pitch, row_times, workspace


@kernel(reads="labels")
def _first_bad(labels, classes, ignore):
    """The position of the first label that is neither one of the classes nor to be ignored; -1 if there is none."""
    for i in range(labels.size):
        if (labels[i] < 0 or labels[i] >= classes) and labels[i] != ignore:
            return i
    return -1


@kernel(exact=True, reads="x labels", writes="p", floats="x p")
def _label_loss(x, labels, smoothing, ignore, p):
    """The sum of the losses of rows x; p becomes their softmax, 0 in rows to be ignored."""
    rows, n = x.shape
    step = lanes(x)
    whole = n - n % step
    block, scratch, tops, totals = workspace(n, x, in_place(n, x))
    loss = 0.0
    x, p, e = borrowed(x), flat(p), flat(p) if in_place(n, x) else flat(scratch)
    for first in range(0, rows, block):
        m = min(block, rows - first)
        to = first * n if in_place(n, x) else 0
        block_exponentials(x, first * n, e, to, m, n, tops, totals)
        for i in range(m):
            row_times(e, to + i * pitch(n, x), n, x.dtype.type(labels[first + i] != ignore) / totals[i], p, (first + i) * n)
        log_totals(totals)
        for i in range(m):
            label = labels[first + i]
            if label == ignore:
                continue
            loss += totals[i] + (1 - smoothing) * (tops[i] - x[first + i, label])
            if smoothing > 0:  # 0 times the infinity of a class masked out would be NaN
                at = (first + i) * n
                top = splat(tops[i])
                below = splat(x.dtype.type(0))
                for j in range(at, at + whole, step):
                    below = below + (top - load(x, j))
                if whole < n:
                    last = top - load_part(x, at + whole, n - whole)
                    below = below + select(first_lanes(last, n - whole), last, splat(x.dtype.type(0)))
                loss += smoothing / n * reduce_add(below)
    in_use(scratch)
    return loss


@kernel(exact=True, reads="p labels", writes="out", floats="p out")
def _label_loss_vjp(g, p, labels, smoothing, ignore, out):
    """out = g * (p - target), or 0 in rows to be ignored.

    First what is the same for all of them, over several rows at once without regard to where they end; in a second pass,
    while these are in the cache, what differs. Where g is 1 and p itself is to become the gradient, as in training, the
    first pass would change nothing, and is left out: that is a fifth of the time of both.
    """
    rows, n = p.shape
    t = p.dtype.type
    slope, spread = splat(t(g)), splat(t(smoothing / n))
    done = g == 1 and smoothing == 0 and out.ctypes.data == p.ctypes.data
    block = block_rows(n)
    for first in range(0, rows, block):
        last = min(first + block, rows)
        stop = first * n if done else last * n
        rest = (stop - first * n) % lanes(p)
        for i in range(first * n, stop - rest, lanes(p)):
            store(out, i, slope * (load(p, i) - spread))
        store_part(out, stop - rest, slope * (load_part(p, stop - rest, rest) - spread), rest)
        for i in range(first, last):
            if labels[i] == ignore:
                for c in range(n):
                    out[i, c] = 0
            else:
                out[i, labels[i]] -= t(g) * t(1 - smoothing)


@public
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
    TypeError
        Logits of another dtype than float32 and float64.
    ValueError
        A label out of range, with its value and place; labels that are not one for each row.
    """
    if labels.shape != (logits.shape[0],):
        refuse("logits of shape {} take one label a row, not labels of shape {}", logits.shape, labels.shape)
    classes = logits.shape[1]
    bad = _first_bad(labels, classes, ignore)
    if bad >= 0:
        if labels[bad] >= classes:
            refuse("label {} at position {} in a problem of {} classes: labels run from 0 to {}, so the last layer needs more "
                   "outputs or the labels fewer values", labels[bad], bad, classes, classes - 1)
        refuse("label {} at position {} in a problem of {} classes: labels run from 0 to {}",
               labels[bad], bad, classes, classes - 1)
    probabilities = aligned.array(logits.shape, logits.dtype)
    loss = _label_loss(np.ascontiguousarray(logits), labels, float(smoothing), ignore, probabilities)
    return loss, probabilities


@public
def label_loss_vjp(g, probabilities, labels, smoothing=0.0, ignore=-100, out=None):
    """Gradient for logits, (n, classes), of the loss; ``g`` is its scalar gradient, ``out`` may be ``probabilities``."""
    out = contiguous_output(out, probabilities.shape, probabilities.dtype)
    _label_loss_vjp(float(g), np.ascontiguousarray(probabilities), labels, float(smoothing), ignore, out)
    return out
