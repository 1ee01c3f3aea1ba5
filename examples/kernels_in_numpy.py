"""Kernels without the engine: logistic regression on small digits, trained by SciPy's L-BFGS.

    python examples/kernels_in_numpy.py

A kernel takes plain arrays and returns plain arrays, and beside each ``f`` stands its ``f_vjp``, which takes the gradient
for the output and returns that for an argument. So a loss and its gradient are a few lines, and whoever wants a function
that returns both, as SciPy's optimizers do, can have it without a tape.
"""

import numpy as np
from scipy.optimize import minimize
from sklearn.datasets import load_digits

from mpiml import kernels as k

CLASSES, L2 = 10, 1e-3


def objective(vector, x, labels):
    """Mean cross-entropy of softmax(x w' + b) with a penalty on the weights, and its gradient; ``vector`` is w and b."""
    weight, bias = unpack(vector, x.shape[1])
    logits = k.linear(x, weight, bias)
    loss, probabilities = k.label_loss(logits, labels)
    g = k.label_loss_vjp(1 / len(x), probabilities, labels)
    gradient = np.concatenate([(k.linear_vjp_weight(g, x) + L2 * weight).ravel(), k.linear_vjp_bias(g)])
    return loss / len(x) + L2 / 2 * np.sum(weight**2), gradient


def unpack(vector, features):
    return vector[:-CLASSES].reshape(CLASSES, features), vector[-CLASSES:]


def main():
    x, labels = load_digits(return_X_y=True)  # 1797 pictures of 8 x 8, in scikit-learn itself
    x = x / 16
    train, test = slice(0, 1400), slice(1400, None)
    start = np.zeros(CLASSES * x.shape[1] + CLASSES)
    found = minimize(objective, start, (x[train], labels[train]), jac=True, method="L-BFGS-B")
    logits = k.linear(x[test], *unpack(found.x, x.shape[1]))
    accuracy = np.mean(logits.argmax(axis=1) == labels[test])
    print(f"{found.nit} steps, loss {found.fun:.4f}, test accuracy {accuracy:.1%}")
    return accuracy


if __name__ == "__main__":
    main()
