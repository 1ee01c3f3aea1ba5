"""Optimizer updates: one pass over the flat vectors of parameters, gradients and moments.

Each works in place on contiguous vectors (n,) of one dtype, float32 or float64, and sets the gradient to zero behind
itself, ready to be accumulated into again. Numbers may be given in any float type; they are rounded to the vectors'.

``lars`` and ``lamb`` scale the step of each parameter by a ratio of norms. The parameters follow each other in the
vector: ``bounds`` (parameters + 1,) holds where each begins, and where the last one ends; ``adapt`` (parameters,) says
which are scaled so.
"""

import numpy as np

from .jit import kernel
from .public import check_writable, public, refuse


@kernel(floats="w g velocity")
def _sgd(w, g, velocity, lr, momentum, nesterov, weight_decay):
    t = w.dtype.type  # a float64 among float32 numbers would make the whole line one of float64
    lr, momentum, weight_decay = t(lr), t(momentum), t(weight_decay)
    if velocity.size == 0:
        for i in range(w.size):
            w[i] -= lr * (g[i] + weight_decay * w[i])
            g[i] = t(0)
        return
    of_d, of_v = (lr, lr * momentum) if nesterov else (t(0), lr)  # shares of the gradient and of v in the step
    for i in range(w.size):
        d = g[i] + weight_decay * w[i]
        v = momentum * velocity[i] + d
        velocity[i] = v
        w[i] -= of_v * v + of_d * d
        g[i] = t(0)


@kernel(floats="w g m v")
def _adam(w, g, m, v, lr, beta1, beta2, rest1, rest2, correction1, correction2, eps, l2, decay):
    t = w.dtype.type
    beta1, beta2, rest1, rest2, eps, l2 = t(beta1), t(beta2), t(rest1), t(rest2), t(eps), t(l2)
    step = t(lr) / t(correction1)
    root = t(1) / np.sqrt(t(correction2))
    keep = t(1) - t(lr) * t(decay)
    for i in range(w.size):
        d = g[i] + l2 * w[i]
        a = beta1 * m[i] + rest1 * d
        b = beta2 * v[i] + rest2 * d * d
        m[i] = a
        v[i] = b
        w[i] = keep * w[i] - step * a / (np.sqrt(b) * root + eps)
        g[i] = t(0)


@kernel(floats="x")
def _norm(x):
    """Euclidean norm, accumulated in float64."""
    total = 0.0
    for i in range(x.size):
        total += np.float64(x[i]) * np.float64(x[i])
    return np.sqrt(total)


@kernel
def _are_bounds(bounds, adapt, n):
    """Do they rise from 0 to n, one more than there are parameters?"""
    if len(bounds) != len(adapt) + 1 or bounds[0] != 0 or bounds[-1] != n:
        return False
    for p in range(len(adapt)):
        if bounds[p + 1] < bounds[p]:
            return False
    return True


@kernel(floats="w g velocity")
def _lars(w, g, velocity, bounds, adapt, lr, momentum, weight_decay, trust, eps):
    if not _are_bounds(bounds, adapt, len(w)):
        return False
    t = w.dtype.type
    momentum = t(momentum)
    for p in range(len(adapt)):
        part = slice(bounds[p], bounds[p + 1])
        wp, gp, vp = w[part], g[part], velocity[part]
        rate, decay = lr, 0.0
        if adapt[p]:
            decay = weight_decay
            size, slope = _norm(wp), _norm(gp)
            if size > 0 and slope > 0:
                rate = lr * trust * size / (slope + decay * size + eps)
        rate, decay = t(rate), t(decay)
        for i in range(wp.size):
            v = momentum * vp[i] + rate * (gp[i] + decay * wp[i])
            vp[i] = v
            wp[i] -= v
            gp[i] = t(0)
    return True


@kernel(floats="w g m v")
def _lamb(w, g, m, v, bounds, adapt, lr, beta1, beta2, rest1, rest2, correction1, correction2, eps, weight_decay):
    if not _are_bounds(bounds, adapt, len(w)):
        return False
    t = w.dtype.type
    beta1, beta2, rest1, rest2, eps = t(beta1), t(beta2), t(rest1), t(rest2), t(eps)
    first, root = t(1) / t(correction1), t(1) / np.sqrt(t(correction2))
    for p in range(len(adapt)):
        part = slice(bounds[p], bounds[p + 1])
        wp, gp, mp, vp = w[part], g[part], m[part], v[part]
        decay = t(weight_decay) if adapt[p] else t(0)
        for i in range(wp.size):
            a = beta1 * mp[i] + rest1 * gp[i]
            b = beta2 * vp[i] + rest2 * gp[i] * gp[i]
            mp[i] = a
            vp[i] = b
            gp[i] = first * a / (np.sqrt(b) * root + eps) + decay * wp[i]  # the step, for its norm
        rate = lr
        if adapt[p]:
            size, step = _norm(wp), _norm(gp)
            if size > 0 and step > 0:
                rate = lr * size / step
        rate = t(rate)
        for i in range(wp.size):
            wp[i] -= rate * gp[i]
            gp[i] = t(0)
    return True


@kernel(floats="g")
def _scale(g, factor):
    total, factor = g.dtype.type(0), g.dtype.type(factor)
    for i in range(g.size):
        g[i] *= factor
        total += g[i]
    return total


@public
def _check(name, w, g, m, v):
    check_writable(w, g, m, v)
    if w.ndim != 1 or g.shape != w.shape or m.shape != w.shape or v.shape != w.shape:
        refuse("{} updates vectors of one length, not of shapes {}, {}, {} and {}", name, w.shape, g.shape, m.shape, v.shape)
    if not (w.flags.c_contiguous and g.flags.c_contiguous and m.flags.c_contiguous and v.flags.c_contiguous):
        refuse("{} updates contiguous vectors in place, and one given is a strided view: use a vector of its own", name)


@public
def _refuse_bounds(name, w, bounds, adapt):
    refuse("{} of a vector of {} numbers takes bounds from 0 to that, one more than the {} parameters, not {}",
           name, len(w), len(adapt), bounds)


@public
def sgd(w, g, velocity, lr, momentum=0.0, nesterov=False, weight_decay=0.0):
    """Gradient descent; with ``velocity`` (n,) also momentum (Polyak 1964) or Nesterov's, as PyTorch writes it.

    g += weight_decay * w;  v = momentum * v + g;  w -= lr * v, or lr * (g + momentum * v) with nesterov.
    ``velocity`` of size 0 stands for no momentum.

    Raises
    ------
    TypeError, ValueError
        Dtypes or lengths differ, or a vector is not contiguous.
    """
    _check("sgd", w, g, velocity if velocity.size else w, w)
    _sgd(w, g, velocity, float(lr), float(momentum), nesterov, float(weight_decay))


@public
def adam(w, g, m, v, lr, beta1, beta2, rest1, rest2, correction1, correction2, eps, l2=0.0, decay=0.0):
    """Adam (Kingma and Ba 2015) and AdamW (Loshchilov and Hutter 2019).

    ``rest = 1 - beta`` comes from outside: in float32, 1 - 0.999 has lost four digits, and the compiler may turn
    (1 - beta) * d into d - beta * d. ``correction = 1 - beta**t`` removes the bias of the moments at step t.
    ``l2`` adds to the gradient (Adam's weight decay), ``decay`` shrinks the weight by ``lr * decay`` (AdamW's).

    Raises
    ------
    TypeError, ValueError
        Dtypes or lengths differ, or a vector is not contiguous.
    """
    _check("adam", w, g, m, v)
    _adam(w, g, m, v, float(lr), float(beta1), float(beta2), float(rest1), float(rest2), float(correction1),
          float(correction2), float(eps), float(l2), float(decay))


@public
def lars(w, g, velocity, bounds, adapt, lr, momentum=0.9, weight_decay=0.0, trust=0.001, eps=0.0):
    """Momentum with a rate for each parameter, LARS (You et al. 2017, "Large batch training of convolutional networks").

    rate = lr * trust * |w| / (|g| + weight_decay * |w| + eps);  v = momentum * v + rate * (g + weight_decay * w);  w -= v.
    Parameters that are not adapted, or whose norm or gradient is 0, take ``rate = lr``; those not adapted do not decay.

    Parameters
    ----------
    bounds : (parameters + 1,) array of int64
    adapt : (parameters,) array of bool

    Raises
    ------
    TypeError, ValueError
        Dtypes or lengths differ, a vector is not contiguous, or the bounds are not those of this vector.
    """
    _check("lars", w, g, velocity, w)
    if not _lars(w, g, velocity, bounds, adapt, float(lr), float(momentum), float(weight_decay), float(trust), float(eps)):
        _refuse_bounds("lars", w, bounds, adapt)


@public
def lamb(w, g, m, v, bounds, adapt, lr, beta1, beta2, rest1, rest2, correction1, correction2, eps, weight_decay=0.0):
    """Adam with a rate for each parameter, LAMB (You et al. 2020, "Large batch optimization for deep learning").

    u = m / correction1 / (sqrt(v / correction2) + eps) + weight_decay * w;  w -= lr * |w| / |u| * u, with Adam's moments.
    Parameters that are not adapted, or where a norm is 0, take the ratio 1; those not adapted do not decay.
    The other arguments, and the errors, are those of :func:`adam` and :func:`lars`.
    """
    _check("lamb", w, g, m, v)
    if not _lamb(w, g, m, v, bounds, adapt, float(lr), float(beta1), float(beta2), float(rest1), float(rest2),
                 float(correction1), float(correction2), float(eps), float(weight_decay)):
        _refuse_bounds("lamb", w, bounds, adapt)


@public
def norm(g):
    """Euclidean norm of the contiguous vector ``g`` (n,), accumulated in float64."""
    _check("norm", g, g, g, g)
    return _norm(g)


@public
def scale(g, factor):
    """``g *= factor`` in place; the sum of the result, which is not finite if any element is not."""
    _check("scale", g, g, g, g)
    return _scale(g, float(factor))
