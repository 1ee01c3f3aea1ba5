"""MNIST (LeCun, Cortes and Burges 1998), and the smaller digits that stand in where it cannot be had."""

import importlib.util
import sys
from pathlib import Path

import numpy as np

from mpiml.random import generator

from .download import download, locate
from .idx import read_idx
from .images import normalize

# MD5 of the files as their authors packed them.
FILES = {
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
}
MIRRORS = ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/")


def mnist(folder=None, grid=None):
    """The MNIST digits; where they are not at hand and cannot be downloaded, the 1,797 digits of scikit-learn.

    They are looked for in ``folder``, else in the folder that the variable ``MPIML_DATA`` names (there or in its
    subfolder ``mnist``), else in the user's cache, else on the network: one rank of each node downloads them
    into the cache, checks their MD5, and the others wait. A folder that was named is never replaced by
    anything else.

    Parameters
    ----------
    folder : path, optional
        Holds the four IDX files, plain or gzipped.
    grid : mpiml.parallel.Grid, optional
        The ranks that load together: all of them get the same data set, read once on each node.

    Returns
    -------
    (x, y), (x_test, y_test)
        Images as uint8 (n, 1, height, width), labels as int64 (n,) in 0 .. 9.

    Raises
    ------
    FileNotFoundError
        The named folder lacks a file.
    ValueError
        A file is damaged, or is not what its name says.
    """
    folder, problem = locate(("mnist",), fetch, folder, grid)
    if folder:
        return load(folder, grid)
    if grid is None or grid.rank == 0:
        print(f"mpiml: MNIST is not at hand ({problem}): using the 1,797 digits of "
              f"scikit-learn; mnist(FOLDER) or MPIML_DATA can name a folder with the IDX files", file=sys.stderr, flush=True)
    return digits()


def load(folder, grid=None):
    """MNIST from the four IDX files in ``folder``, plain or gzipped; see :func:`mnist`."""
    x, y, x_test, y_test = grid.arrays_once_per_node(_read, folder) if grid else _read(folder)
    return (x, y), (x_test, y_test)


def _read(folder):
    paths = [_find(Path(folder), name) for name in FILES]
    arrays = [read_idx(path) for path in paths]
    for i in 0, 2:
        images, labels = arrays[i], arrays[i + 1]
        if images.ndim != 3 or images.dtype != np.uint8:
            raise ValueError(f"{paths[i]} holds an array of shape {images.shape} and dtype {images.dtype}, not images "
                             f"(n, height, width) of uint8")
        if labels.shape != (len(images),) or labels.dtype != np.uint8:
            raise ValueError(f"{paths[i + 1]} holds an array of shape {labels.shape} and dtype {labels.dtype}, not "
                             f"labels ({len(images)},) of uint8 for the images in {paths[i].name}")
        if labels.max() > 9:
            raise ValueError(f"{paths[i + 1]} holds the label {labels.max()} at position {labels.argmax()}: digits run "
                             f"from 0 to 9")
    x, y, x_test, y_test = arrays
    return x[:, None], y.astype(np.int64), x_test[:, None], y_test.astype(np.int64)


def _find(folder, name):
    plain = name.removesuffix(".gz")
    for candidate in folder / plain, folder / name:
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"{folder} has neither {plain} nor {name}: name the folder with the four MNIST files by "
                            f"--data or MPIML_DATA, or name none to download them")


def fetch():
    """Download MNIST into the user's cache, unless it is there: (folder, None), or (None, reason)."""
    return download("mnist", FILES, MIRRORS)


def digits():
    """The 1,797 handwritten digits (8 x 8) that ship with scikit-learn, as 1,500 for training and 297 for testing.

    Returned as by :func:`mnist`.
    """
    package = importlib.util.find_spec("sklearn")
    if package is None:
        raise ImportError("the embedded digits come with scikit-learn: pip install 'mpiml[examples]'")
    # Its file is read here, since importing scikit-learn takes each rank seconds.
    table = np.loadtxt(Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    order = generator(0, "digits").permutation(len(table))
    images, y = table[order, :64].reshape(-1, 1, 8, 8), table[order, 64].astype(np.int64)
    x = np.rint(images * (255 / 16)).astype(np.uint8)
    return (x[:1500], y[:1500]), (x[1500:], y[1500:])


def pixels(images):
    """Images of uint8 as float32 with MNIST's mean and standard deviation taken out."""
    return normalize(images, 33.3184, 78.5675)
