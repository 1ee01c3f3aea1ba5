"""Reading IDX files, the format of MNIST: a header of big-endian numbers, then the elements."""

import gzip
import os
import struct
import zlib

import numpy as np

_DTYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_LIMIT = 2**33  # bytes: a damaged or hostile header must not ask for all memory
_DEFLATE = 1032  # gzip makes data smaller by this factor at most
_AXES = 32  # NumPy 1 has no more


def read_idx(path):
    """The array in an IDX file, plain or gzipped (recognised by its first bytes), in native byte order.

    Raises
    ------
    FileNotFoundError
    ValueError
        The file is not an IDX file, is cut short, or has bytes behind its end; the message says by how much.
    """
    path = os.fspath(path)
    try:
        with open(path, "rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        with (gzip.open if packed else open)(path, "rb") as file:
            return _parse(file, path, os.path.getsize(path) * (_DEFLATE if packed else 1))
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is a damaged or truncated gzip file ({error}): fetch it again") from error


def _parse(file, path, room):
    head = file.read(4)
    if len(head) < 4 or head[:2] != b"\0\0" or head[2] not in _DTYPES or not 0 < head[3] <= _AXES:
        raise ValueError(f"{path} is not an IDX file: it starts with the bytes {head.hex(' ') or '(none)'}, not with "
                         f"00 00, an element type and a number of axes")
    axes = head[3]
    sizes = file.read(4 * axes)
    if len(sizes) < 4 * axes:
        raise ValueError(f"{path} is truncated: its header should have {4 + 4 * axes} bytes, not {4 + len(sizes)}")
    shape = struct.unpack(f">{axes}I", sizes)
    dtype = np.dtype(_DTYPES[head[2]])
    expected = dtype.itemsize
    for n in shape:
        expected *= n
    if not 0 < expected <= _LIMIT:
        raise ValueError(f"{path} claims the shape {shape}, {expected} bytes: its header is damaged")
    data = file.read(min(expected, room) + 1)  # read() allocates what it is asked for before it reads
    if len(data) != expected:
        longer = len(data) > expected
        raise ValueError(f"{path} is {'longer' if longer else 'truncated'}: its header says {expected} bytes for the "
                         f"shape {shape}, but {'more follow' if longer else f'there are {len(data)}'}: fetch it again")
    return np.frombuffer(data, dtype).reshape(shape).astype(dtype.newbyteorder("="))
