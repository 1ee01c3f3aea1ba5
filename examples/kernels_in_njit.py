"""Kernels in your own compiled loop: k-means (Lloyd 1982) on small digits.

    python examples/kernels_in_njit.py

A function compiled with ``numba.njit`` may call any kernel by the name that Python uses; it is compiled along, and no
step goes through the interpreter. Here a linear layer measures distances: of all centres c, the one nearest to x has
the largest ``x c' - |c|^2 / 2``. And its gradients add up clusters: with ones where a sample belongs, ``linear_vjp_weight``
sums the samples of each cluster and ``linear_vjp_bias`` counts them.
"""

import numba
import numpy as np
from sklearn.datasets import load_digits

from mpiml import kernels as k


@numba.njit
def cluster(x, centres, rounds):
    """Move the centres (clusters, features), in place, to the means of the samples nearest to them; which those are."""
    half = x.dtype.type(0.5)
    nearest = np.empty(len(x), np.int64)
    for _ in range(rounds):
        scores = k.linear(x, centres, -half * (centres * centres).sum(axis=1))
        member = np.zeros_like(scores)
        for i in range(len(x)):
            nearest[i] = scores[i].argmax()
            member[i, nearest[i]] = 1
        sums, counts = k.linear_vjp_weight(member, x), k.linear_vjp_bias(member)
        for c in range(len(centres)):
            if counts[c] > 0:
                centres[c] = sums[c] / counts[c]
    return nearest


def cluster_in_numpy(x, centres, rounds):
    for _ in range(rounds):
        nearest = ((x[:, None] - centres) ** 2).sum(axis=2).argmin(axis=1)
        for c in range(len(centres)):
            if (nearest == c).any():
                centres[c] = x[nearest == c].mean(axis=0)
    return nearest


def main():
    x, labels = load_digits(return_X_y=True)
    centres = x[np.random.default_rng(0).choice(len(x), 10, replace=False)]
    theirs = centres.copy()
    nearest = cluster(x, centres, 20)
    np.testing.assert_array_equal(nearest, cluster_in_numpy(x, theirs, 20))
    np.testing.assert_allclose(centres, theirs)
    majority = sum(np.bincount(labels[nearest == c]).max() for c in range(10) if (nearest == c).any())
    print(f"20 rounds, the same as NumPy's; {majority / len(x):.1%} of the digits lie in a cluster of their kind")
    return majority / len(x)


if __name__ == "__main__":
    main()
