"""Optimizer updates: one pass over the flat vectors of parameters, gradients and moments.

Each kernel works in place on contiguous vectors (n,) of one dtype and sets the gradient to zero behind
itself, ready to be accumulated into again. Scalars must have the vectors' dtype, or the loop widens.
"""

import numpy as np

from .jit import kernel


@kernel
def sgd(w, g, velocity, lr, momentum, nesterov, weight_decay):
    """Gradient descent; with ``velocity`` (n,) also momentum (Polyak 1964) or Nesterov's, as PyTorch writes it.

    g += weight_decay * w;  v = momentum * v + g;  w -= lr * v, or lr * (g + momentum * v) with nesterov.
    ``velocity`` of size 0 stands for no momentum.
    """
    zero = w.dtype.type(0)
    if velocity.size == 0:
        for i in range(w.size):
            w[i] -= lr * (g[i] + weight_decay * w[i])
            g[i] = zero
    else:
        for i in range(w.size):
            d = g[i] + weight_decay * w[i]
            v = momentum * velocity[i] + d
            velocity[i] = v
            w[i] -= lr * (d + momentum * v if nesterov else v)
            g[i] = zero


@kernel
def adam(w, g, m, v, lr, beta1, beta2, rest1, rest2, correction1, correction2, eps, l2, decay):
    """Adam (Kingma and Ba 2015) and AdamW (Loshchilov and Hutter 2019).

    ``rest = 1 - beta`` comes from outside: in float32, 1 - 0.999 has lost four digits, and the compiler may turn
    (1 - beta) * d into d - beta * d. ``correction = 1 - beta**t`` removes the bias of the moments at step t.
    ``l2`` adds to the gradient (Adam's weight decay), ``decay`` shrinks the weight by ``lr * decay`` (AdamW's).
    """
    one, zero = w.dtype.type(1), w.dtype.type(0)
    step = lr / correction1
    root = one / np.sqrt(correction2)
    keep = one - lr * decay
    for i in range(w.size):
        d = g[i] + l2 * w[i]
        a = beta1 * m[i] + rest1 * d
        b = beta2 * v[i] + rest2 * d * d
        m[i] = a
        v[i] = b
        w[i] = keep * w[i] - step * a / (np.sqrt(b) * root + eps)
        g[i] = zero


@kernel
def norm(g):
    """Euclidean norm of ``g`` (n,), accumulated in float64."""
    total = 0.0
    for i in range(g.size):
        total += np.float64(g[i]) * np.float64(g[i])
    return np.sqrt(total)


@kernel
def scale(g, factor):
    """``g *= factor`` in place; the sum of the result, which is not finite if any element is not."""
    total = g.dtype.type(0)
    for i in range(g.size):
        g[i] *= factor
        total += g[i]
    return total
