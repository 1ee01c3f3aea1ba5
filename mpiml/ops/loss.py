"""Softmax, and the losses: sums over the samples."""

import numpy as np

from mpiml import kernels as k
from mpiml.tensor import op

from .check import floats, same_dtype, same_shape


@op
def softmax(x, axis=-1):
    """exp(x) / sum(exp(x)) over ``axis``."""
    y = k.softmax(np.moveaxis(x, axis, -1))
    return np.moveaxis(y, -1, axis), (
        lambda g: np.moveaxis(k.softmax_vjp(np.moveaxis(g, axis, -1), y), -1, axis),)


@op
def log_softmax(x, axis=-1):
    """x - log(sum(exp(x))) over ``axis``."""
    y = k.log_softmax(np.moveaxis(x, axis, -1))
    return np.moveaxis(y, -1, axis), (
        lambda g: np.moveaxis(k.log_softmax_vjp(np.moveaxis(g, axis, -1), y), -1, axis),)


@op
def cross_entropy(logits, target, label_smoothing=0.0, ignore_index=-100):
    """Cross-entropy of softmax(logits) against ``target``, summed over the samples.

    Parameters
    ----------
    logits : (..., classes)
    target : (...) integer labels, or (..., classes) probabilities
    label_smoothing : float in [0, 1)
        Move this share of the target to all classes alike (Szegedy et al. 2016).
    ignore_index : int
        Samples with this label add nothing to the sum.

    Raises
    ------
    ValueError
        A label outside 0 .. classes - 1, or shapes that do not belong together.
    """
    floats("cross_entropy", logits)
    target = np.asarray(target)
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label smoothing moves a share 0 <= label_smoothing < 1 of the target, not {label_smoothing}")
    classes = logits.shape[-1]
    rows = logits.reshape(-1, classes) if logits.size else np.empty((0, classes), logits.dtype)
    if target.dtype.kind in "iu" and target.shape == logits.shape[:-1]:
        labels = target.reshape(-1)
        loss, p = k.label_loss(rows, labels, label_smoothing, ignore_index)
        return logits.dtype.type(loss), (
            lambda g: k.label_loss_vjp(g, p, labels, label_smoothing, ignore_index, p).reshape(logits.shape),)
    if target.dtype.kind == "f" and target.shape == logits.shape:
        same_dtype("cross_entropy", logits, target, "target")
        goal = target * (1 - label_smoothing) + label_smoothing / classes
        log_p = k.log_softmax(logits)
        mass = goal.sum(axis=-1, keepdims=True)
        return -np.sum(goal * log_p), (lambda g: g * (k.exp(log_p) * mass - goal),)
    raise ValueError(f"cross_entropy of logits {logits.shape} takes integer labels of shape {logits.shape[:-1]} or "
                     f"probabilities of shape {logits.shape}, not {target.dtype} of shape {target.shape}")


@op
def binary_cross_entropy_with_logits(x, target):
    """-target * log(sigmoid(x)) - (1 - target) * log(1 - sigmoid(x)), summed over all elements."""
    target = same_shape("binary_cross_entropy_with_logits", x, target)
    return x.dtype.type(k.binary(x, target)), (lambda g: k.binary_vjp(g, x, target),)


@op
def mse_loss(x, target):
    """(x - target)**2, summed over all elements."""
    target = same_shape("mse_loss", x, target)
    return x.dtype.type(k.squared(x, target)), (lambda g: 2 * g * (x - target),)


@op
def l1_loss(x, target):
    """|x - target|, summed over all elements."""
    target = same_shape("l1_loss", x, target)
    return x.dtype.type(k.absolute(x, target)), (lambda g: g * np.sign(x - target),)


@op
def huber_loss(x, target, delta=1.0):
    """Squared error up to |x - target| = delta, linear beyond (Huber 1964), summed over all elements."""
    target = same_shape("huber_loss", x, target)
    return x.dtype.type(k.huber(x, target, delta)), (lambda g: k.huber_vjp(g, x, target, delta),)
