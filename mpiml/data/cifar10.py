"""CIFAR-10 (Krizhevsky 2009): 60,000 small colour photographs of ten kinds of things."""

import os
import shutil
import tarfile
from pathlib import Path

import numpy as np

from .download import download, locate
from .images import normalize
from .rows import records

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TRAIN, TEST = tuple(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"
SHAPE = 3, 32, 32  # channels, height, width
RECORD = 1 + 3 * 32 * 32  # bytes: the label, then the image
ARCHIVE = {"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"}  # MD5
FOLDER = "cifar-10-batches-bin"  # in the archive
MIRRORS = ("https://www.cs.toronto.edu/~kriz/",)


def cifar10(folder=None, grid=None):
    """The photographs of CIFAR-10, or as many of its files as there are.

    They are looked for in ``folder``, else in the folder that the variable ``MPIML_DATA`` names (there or in its
    subfolder ``cifar10``), else in the user's cache, else on the network: one rank of each node downloads the archive of
    170 MB into the cache, checks its MD5, and the others wait.

    Parameters
    ----------
    folder : path, optional
        Holds the files of the binary version: ``test_batch.bin`` and at least one of ``data_batch_1.bin`` to
        ``data_batch_5.bin``, of any number of records. (The Python version is a pickle, which could run any program.)
    grid : mpiml.parallel.Grid, optional
        The ranks that load together: all of them get the same data set, read once on each node.

    Returns
    -------
    (x, y), (x_test, y_test)
        Images as uint8 (n, 3, 32, 32), in the order red, green, blue; labels as int64 (n,), places in :data:`CLASSES`.

    Raises
    ------
    FileNotFoundError
        The named folder lacks a file; or none was named, and the archive cannot be had.
    ValueError
        A file is damaged: its name, the record and the byte.
    """
    folder, problem = locate(("cifar10", FOLDER), fetch, folder, grid)
    if folder is None:
        raise FileNotFoundError(f"CIFAR-10 is not at hand ({problem}): download {next(iter(ARCHIVE))} from "
                                f"{' or '.join(MIRRORS)}, unpack it, and name the folder by cifar10(FOLDER), --data FOLDER or "
                                f"MPIML_DATA")
    x, y, x_test, y_test = grid.arrays_once_per_node(_read, folder) if grid else _read(folder)
    return (x, y), (x_test, y_test)


def colors(images):
    """Images of uint8 as float32 with the mean and standard deviation of each channel of CIFAR-10 taken out."""
    return normalize(images, mean=(125.307, 122.950, 113.865), deviation=(62.993, 62.089, 66.705))


def read_records(path):
    """The images, uint8 (n, 3, 32, 32), and labels, int64 (n,), in a file of CIFAR-10.

    Raises
    ------
    FileNotFoundError
    ValueError
        The file is empty or cut short, or has a label above 9.
    """
    count = records(path, RECORD)
    rows = np.fromfile(path, np.uint8, count * RECORD).reshape(count, RECORD)
    labels = rows[:, 0].astype(np.int64)
    if labels.max() >= len(CLASSES):
        record = int((labels >= len(CLASSES)).argmax())
        raise ValueError(f"{path} has the label {labels[record]} in record {record} (byte {record * RECORD}): labels run from "
                         f"0 to {len(CLASSES) - 1}")
    return np.ascontiguousarray(rows[:, 1:]).reshape(-1, *SHAPE), labels


def _read(folder):
    train = [path for name in TRAIN if (path := Path(folder, name)).is_file()]
    missing = [] if train else ["any of data_batch_1.bin to data_batch_5.bin"]
    missing += [] if Path(folder, TEST).is_file() else [TEST]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {' and '.join(missing)}: name the folder with the files of CIFAR-10's binary "
                                f"version by --data or MPIML_DATA, or name none to download them")
    x, y = (np.concatenate(parts) for parts in zip(*map(read_records, train), strict=True))
    return [x, y, *read_records(Path(folder, TEST))]


def fetch():
    """Download CIFAR-10 into the user's cache, unless it is there: (folder, None), or (None, reason)."""
    return download("cifar10", ARCHIVE, MIRRORS, _unpack, (*TRAIN, TEST), "170 MB")


def _unpack(folder):
    """Take the six files out of the archive, which may not say where to; and remove it."""
    archive = Path(folder, next(iter(ARCHIVE)))
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for name in (*TRAIN, TEST):
                with tar.extractfile(f"{FOLDER}/{name}") as packed, open(Path(folder, f"{name}.part"), "wb") as file:
                    shutil.copyfileobj(packed, file)
                os.replace(file.name, Path(folder, name))
    except (KeyError, AttributeError, tarfile.TarError, EOFError) as error:  # no such member, or none that is a file
        raise ValueError(f"{archive} is not the archive of CIFAR-10: {error}") from error
    archive.unlink()
