"""The ladder to the matrix product of :mod:`mpiml.kernels.gemm`, float32, 128 x 784 times 784 x 128, on one core.

    python benchmarks/ladder.py
"""

# isort: off
from timing import alternate, versions  # first: it sets the number of threads
# isort: on
import numpy as np

from mpiml import kernels as k
from mpiml.kernels.jit import kernel
from mpiml.kernels.simd import lanes
from mpiml.kernels.tile import load_row, outer, store_tile, zero_tile


@kernel(exact=True)
def textbook(a, b, c):
    for i in range(c.shape[0]):
        for j in range(c.shape[1]):
            total = c.dtype.type(0)
            for p in range(a.shape[1]):
                total += a[i, p] * b[p, j]
            c[i, j] = total


@kernel
def columns_innermost(a, b, c):
    c[:] = 0
    for i in range(c.shape[0]):
        for p in range(a.shape[1]):
            for j in range(c.shape[1]):
                c[i, j] += a[i, p] * b[p, j]


def tiles(rows, vectors):
    size = rows * vectors

    @kernel(exact=True)
    def tiled(a, b, c):
        inner, columns = b.shape
        for j in range(0, columns, vectors * lanes(c)):
            for i in range(0, c.shape[0], rows):
                tile = zero_tile(c, size)
                for p in range(inner):
                    tile = outer(tile, a, i * inner + p, inner, load_row(b, p * columns + j, None, vectors))
                store_tile(tile, c, i * columns + j, columns, None, vectors)

    return tiled


STEPS = {"textbook, a dot product innermost": textbook, "columns innermost": columns_innermost,
         "a tile of 1 x 1 registers": tiles(1, 1), "a tile of 2 x 2": tiles(2, 2), "a tile of 8 x 2": tiles(8, 2),
         "mpiml.kernels.matmul": lambda a, b, c: k.matmul(a[None], b[None], out=c[None]),
         "numpy.dot": lambda a, b, c: np.dot(a, b, out=c)}


def main():
    a, b = np.random.default_rng(0).standard_normal((2, 784, 128), np.float32)
    a = np.ascontiguousarray(a.T)
    results = [np.empty((128, 128), np.float32) for _ in STEPS]
    steps = [lambda step=step, c=c: step(a, b, c) for step, c in zip(STEPS.values(), results, strict=True)]
    times = np.median(alternate(steps, rounds=11), axis=0)
    print(f"{versions()}\n")
    for name, seconds, c in zip(STEPS, times, results, strict=True):
        assert np.allclose(c, a @ b, rtol=1e-3, atol=1e-3)
        print(f"{name:36}{seconds * 1e6:>10.0f}us{2 * a.size * b.shape[1] / seconds / 1e9:>8.1f} GF/s")


main()
