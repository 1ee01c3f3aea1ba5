"""Arrays in files, joined to one that is read only where it is indexed: data larger than memory."""

import copy
import math
import operator
import os
import weakref
from typing import NamedTuple

import numpy as np
from numpy.lib import format as npy


class Rows:
    """Several files as one array, joined along the first axis, of which only those rows are read that are asked for.

    With it ``batches(x, y, ..., grid=grid)`` makes each rank read its own share and nothing else.

    ``rows[array of integers]``, or of bools, reads these rows into a new array, and ``rows[3]`` reads one. A slice is
    again a Rows, and reads nothing: ``x[:9000]``, ``x[9000:]`` are a part for training and one for validation. What is
    left is read by ``np.asarray``.

    Nothing is kept of what was read; the system keeps files in memory that is free, once for all ranks of a node. A row
    costs 2 us beside the time for its bytes: many short ones, as of a table, are better loaded whole.

    Parameters
    ----------
    paths : path, or list of paths
        Files of NumPy's format ``.npy``, arrays of numbers of one dtype and of one shape but for the first axis. Or, if
        a dtype is given, any files that are records of one length.
    dtype : dtype, optional
        Of the elements of a row in a record.
    shape : tuple of int
        Of the row in a record.
    before, after : int
        Bytes of a record before the row and behind it.

    Attributes
    ----------
    shape, ndim, dtype
        As of an array.

    Raises
    ------
    FileNotFoundError
    ValueError
        A file is empty, cut short, of another kind, or does not fit to the others; or when a row is read, the file has
        changed. The message names the file and the row.
    OSError
        A row could not be read.

    Examples
    --------
    The images and labels of CIFAR-10, without reading them all into memory:

    >>> files = [f"cifar10/data_batch_{number}.bin" for number in range(1, 6)]
    >>> x = Rows(files, np.uint8, (3, 32, 32), before=1)  # doctest: +SKIP
    >>> y = Rows(files, np.uint8, after=3072)  # doctest: +SKIP
    """

    def __init__(self, paths, dtype=None, shape=(), before=0, after=0):
        paths = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
        if not paths:
            raise ValueError("Rows joins files: name one at least")
        self._files = [_npy_file(path) if dtype is None else _record_file(path, np.dtype(dtype), tuple(shape), before, after)
                       for path in paths]
        first = self._files[0]
        for file in self._files[1:]:
            if (file.dtype, file.shape) != (first.dtype, first.shape):
                raise ValueError(f"{file.path} has rows of shape {file.shape} and dtype {file.dtype}, but {first.path} of "
                                 f"{first.shape} and {first.dtype}: they cannot be joined")
        self.dtype = first.dtype
        self._starts = np.cumsum([0, *(file.rows for file in self._files)])  # of the files, and the end
        self._range = range(self._starts[-1])  # the rows of the files that this is made of

    @property
    def shape(self):
        return len(self._range), *self._files[0].shape

    @property
    def ndim(self):
        return len(self.shape)

    def __len__(self):
        return len(self._range)

    def __repr__(self):
        return f"Rows of shape {self.shape} and dtype {self.dtype} in {len(self._files)} files, the first {self._files[0].path}"

    def __array__(self, dtype=None, copy=None):
        if copy is False:
            raise ValueError("Rows are read into a new array: they cannot be had without a copy")
        return self._read(np.arange(len(self))).astype(dtype or self.dtype, copy=False)

    def __getitem__(self, index):
        if isinstance(index, slice):
            part = copy.copy(self)
            part._range = self._range[index]
            return part
        if isinstance(index, tuple):
            raise IndexError("rows are indexed along their first axis alone: read them, then index the array, "
                             "rows[numbers][:, 0]")
        index = np.asarray(index)
        if index.dtype == bool and index.shape == (len(self),):
            index = np.flatnonzero(index)
        if index.ndim == 0:
            return self._read(self._checked(np.array([operator.index(index.item())])))[0]
        if index.ndim > 1 or (index.dtype.kind not in "iu" and index.size):
            raise IndexError(f"rows are indexed by integers (n,), or bools ({len(self)},), not by {index.dtype} {index.shape}")
        return self._read(self._checked(index.astype(np.int64)))

    def _checked(self, index):
        """Numbers of rows, none of them negative any more."""
        wrong = (index < -len(self)) | (index >= len(self))
        if wrong.any():
            raise IndexError(f"there is no row {index[wrong][0]}: there are {len(self)}")
        return np.where(index < 0, index + len(self), index)

    def _read(self, index):
        index = self._range.start + self._range.step * index
        result = np.empty((len(index), *self._files[0].shape), self.dtype)
        if not result.size:
            return result
        size = result.nbytes // len(result)
        memory = memoryview(result.reshape(-1).view(np.uint8))
        numbers = np.searchsorted(self._starts, index, "right") - 1  # of the files
        begins = np.arange(len(index))  # of what is read at once: one row,
        if size == self._files[0].stride:  # or neighbours in one file
            begins = np.flatnonzero((np.diff(index, prepend=-2) != 1) | (np.diff(numbers, prepend=-1) != 0))
        places = (begins * size).tolist()
        for begin, end, number, row in zip(places, [*places[1:], len(memory)], numbers[begins].tolist(),
                                           (index - self._starts[numbers])[begins].tolist(), strict=True):
            self._files[number].read(row, memory[begin:end])
        return result


class _File(NamedTuple):
    """Rows that lie one behind the other in a file, perhaps with something in between."""

    path: str
    rows: int
    dtype: np.dtype
    shape: tuple  # of a row
    start: int  # byte of the first row
    stride: int  # bytes from one row to the next
    handle: "_Handle"

    def read(self, row, memory):
        """Fill ``memory`` with what begins with a row."""
        at = self.start + row * self.stride
        while memory:  # a read may be interrupted
            try:
                count = os.preadv(self.handle.number, [memory], at)
            except OSError as error:
                raise OSError(error.errno, f"row {row} (byte {at}) cannot be read: {error.strerror}", self.path) from error
            if not count:
                raise ValueError(f"{self.path} ends in row {(at - self.start) // self.stride} (byte {at}), but had {self.rows} "
                                 f"rows when it was opened: who has changed it?")
            memory, at = memory[count:], at + count


class _Handle:
    """An open file, which is closed with the last of those who use it."""

    def __init__(self, path):
        self.number = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.number)


def _npy_file(path):
    path = os.fspath(path)
    with open(path, "rb") as file:
        try:
            version = npy.read_magic(file)
            header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, fortran, dtype = header(file)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path} is not a whole file of NumPy's format .npy ({error}): write it with np.save") from error
        start, end = file.tell(), file.seek(0, os.SEEK_END)
    if dtype.hasobject:
        raise ValueError(f"{path} holds Python objects, which could run any program when they are read: save numbers")
    if not shape or (fortran and len(shape) > 1):
        raise ValueError(f"{path} holds {'one number' if not shape else 'an array in the order of Fortran'}, not row behind "
                         f"row: write it with np.save(path, np.ascontiguousarray(array))")
    stride = math.prod(shape[1:]) * dtype.itemsize
    if end != start + shape[0] * stride:
        row = min((end - start) // max(stride, 1), shape[0])
        raise ValueError(f"{path} is {'longer than its header says' if row == shape[0] else 'cut short'}: its header says "
                         f"{shape[0]} rows of {stride} bytes, and row {row} (byte {start + row * stride}) "
                         f"{'should be the end' if row == shape[0] else f'has {end - start - row * stride}'}")
    return _File(path, shape[0], dtype, shape[1:], start, stride, _Handle(path))


def _record_file(path, dtype, shape, before, after):
    path = os.fspath(path)
    stride = before + math.prod(shape) * dtype.itemsize + after
    return _File(path, records(path, stride), dtype, shape, before, stride, _Handle(path))


def records(path, size):
    """The number of records of ``size`` bytes in a file, which holds nothing else.

    Raises
    ------
    FileNotFoundError
    ValueError
        The file is empty, or cut short: the record and the byte.
    """
    whole, rest = divmod(os.path.getsize(path), size)
    if rest:
        raise ValueError(f"{path} is cut short, or of another format: record {whole} (byte {whole * size}) has {rest} of "
                         f"{size} bytes")
    if not whole:
        raise ValueError(f"{path} is empty: it should hold records of {size} bytes")
    return whole
