"""Layer, group and batch normalisation: two kernels, one of rows and one of channels of images."""

import math

import numpy as np

from mpiml import kernels as k
from mpiml.tensor import op

from .check import floats, vectors


@op
def layer_norm(x, weight=None, bias=None, eps=1e-5, axes=1):
    """x (..., features) standardised over its last ``axes`` axes, times weight plus bias (Ba et al. 2016)."""
    floats("layer_norm", x)
    shape = x.shape[x.ndim - axes:]
    vectors("layer_norm", x, shape, weight=weight, bias=bias)
    features = math.prod(shape)
    rows = x.reshape(x.size // max(features, 1), features)
    flat = [None if a is None else a.reshape(features) for a in (weight, bias)]
    y, mean, scale = k.layer_norm(rows, *flat, eps)

    def vjp(g, into):
        dx, dweight, dbias = k.layer_norm_vjp(g.reshape(rows.shape), rows, mean, scale, flat[0])
        return dx.reshape(x.shape), dweight.reshape(shape), dbias.reshape(shape)

    return y.reshape(x.shape), vjp


def _channels(x):
    """x (n, c, ...) as (n, c, places); a view of images that lie in C order or with their samples innermost."""
    return x.reshape(*x.shape[:2], math.prod(x.shape[2:]))


@op
def group_norm(x, groups, weight=None, bias=None, eps=1e-5, relu=False):
    """x (n, c, ...) standardised for each sample over each of ``groups`` groups of channels (Wu and He 2018).

    Then max(., 0) with ``relu``.
    """
    c = x.shape[1]
    if c % groups:
        raise ValueError(f"group_norm cannot split {c} channels into {groups} equal groups")
    floats("group_norm", x)
    vectors("group_norm", x, (c,), weight=weight, bias=bias)
    view = _channels(x)
    y, mean, var = k.standardize(view, 1, eps, groups, weight, bias, relu)

    def vjp(g, into):
        dx, dweight, dbias = k.standardize_vjp(_channels(g), view, mean, var, 1, eps, weight, bias, relu)
        return dx.reshape(x.shape), None, dweight, dbias

    return y.reshape(x.shape), vjp


def _weighted_sum(weights, statistics):
    """Sum over blocks of weight * statistic, (c,)."""
    return (np.array(weights, statistics.dtype)[:, None] * statistics).sum(axis=0)


@op
def batch_norm(x, running_mean, running_var, seen, weight=None, bias=None, training=False, samples=None, eps=1e-5, relu=False):
    """x (n, c, ...) standardised for each channel, times weight plus bias (Ioffe and Szegedy 2015).

    In training by the statistics of the batch, otherwise by the running ones.

    The running statistics take part in the reverse pass like parameters, though no loss depends on them: what
    accumulates in their ``grad`` is the *sum* over blocks of (samples * mean), (samples * unbiased variance) and
    (samples). So they travel with the gradients, are summed over ranks and micro-batches by the same all-reduce,
    and ``sum / samples`` is the exact average wherever the blocks were computed.

    Parameters
    ----------
    running_mean, running_var : (c,)
    seen : () array
        Where the number of samples behind the sums is accumulated.
    samples : int, optional
        Take the statistics over this many consecutive samples instead of the whole batch ("ghost batches", Hoffer
        et al. 2017): then they depend on the samples alone, not on how a batch is spread over ranks.
    relu : bool
        max(., 0) of the result.
    """
    n, c = x.shape[:2]
    floats("batch_norm", x)
    vectors("batch_norm", x, (c,), running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    view = _channels(x)
    if not training:
        y = k.standardize_by(view, running_mean, running_var, eps, weight, bias, relu)

        def vjp(g):
            dx, dweight, dbias = k.standardize_by_vjp(_channels(g), view, running_mean, running_var, eps, weight, bias,
                                                       relu)
            return dx.reshape(x.shape), None, None, None, dweight, dbias

        return y.reshape(x.shape), tuple(None if i in (1, 2, 3) else lambda g, i=i: vjp(g)[i] for i in range(6))
    samples = samples or max(n, 1)
    if min(samples, n) * view.shape[2] == 1:
        raise ValueError(f"batch_norm cannot take statistics over a single value per channel (input {x.shape}): use "
                         f"larger batches, or group_norm")
    y, mean, var = k.standardize(view, samples, eps, 0, weight, bias, relu)

    def vjp(g, into):
        dx, dweight, dbias = k.standardize_vjp(_channels(g), view, mean, var, samples, eps, weight, bias, relu)
        sizes = [min(samples, n - b * samples) for b in range(len(mean))]
        values = [size * view.shape[2] for size in sizes]
        unbiased = [size * m / max(m - 1, 1) for size, m in zip(sizes, values, strict=True)]
        return (dx.reshape(x.shape), _weighted_sum(sizes, mean), _weighted_sum(unbiased, var), x.dtype.type(sum(sizes)),
                dweight, dbias)

    return y.reshape(x.shape), vjp
