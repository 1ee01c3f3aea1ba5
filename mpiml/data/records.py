"""The records of a CSV file, found by any number of ranks, each in its own part of the file.

A record ends at a line end outside quotes. Since quotes inside a quoted field are doubled (RFC 4180), a line end is
outside if the number of quotes before it in the file is even; so ranks that know how many quotes stand in the parts of
the ranks before them cut the file where one rank would.
"""

import json
import os
import re
from itertools import pairwise

import numpy as np

from .batches import share

BOM = b"\xef\xbb\xbf"


def records(path, quotes, grid):
    """This rank's records of a file, as pairs (line, bytes), without empty lines; those of all ranks are the file's.

    To be called on all ranks together.

    Parameters
    ----------
    path : str
    quotes : bool
        Whether a line end between quotes is part of a field.
    grid : mpiml.parallel.Grid or mpiml.alone.Alone
    """
    reading = f"reading {path}"
    size, start, stop, data = grid.together(reading, _part, path, grid)
    ends, marks = _ends_and_quotes(data, stop - start, quotes)
    counts = map(json.loads, grid.texts(json.dumps([size, len(ends), len(marks)])))
    sizes, lines, quoted = zip(*counts, strict=True)
    if len(set(sizes)) > 1:
        raise ValueError(f"the ranks read different files: {path} has {' and '.join(map(str, sorted(set(sizes))))} bytes")
    line, before = 1 + sum(lines[:grid.rank]), sum(quoted[:grid.rank])
    outside = (before + np.searchsorted(marks, ends)) % 2 == 0
    # Of a rank are the records behind the line ends in its part; and the first one of the file is the first rank's.
    cuts, at = (ends[outside] + 1).tolist(), (line + 1 + np.flatnonzero(outside)).tolist()
    if grid.rank == 0:
        cuts, at = [0, *cuts], [1, *at]
    data = data[:stop - start]
    if cuts:
        data += grid.together(reading, _rest, path, stop, before + len(marks), quotes)
    else:
        grid.together(reading, bytes)
    if grid.rank == 0 and data.startswith(BOM):
        cuts[0] = len(BOM)
    pieces = (data[begin:end].rstrip(b"\r\n") for begin, end in pairwise([*cuts, len(data)]))
    return [(line, piece) for line, piece in zip(at, pieces, strict=True) if piece.strip(b" ")]


def _part(path, grid):
    """(size of the file, first byte, last byte, bytes) of the part that this rank searches."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start, stop = share(size, grid.rank, grid.size)
        file.seek(start)
        return size, start, stop, file.read(stop - start + 1)  # one byte more: is a last "\r" a line end of its own?


def _ends_and_quotes(data, length, quotes):
    """Positions of the last bytes of line ends, and of quotes, among the first ``length`` bytes."""
    data = np.frombuffer(data, np.uint8)
    end = data == ord("\n")
    end[:-1] |= (data[:-1] == ord("\r")) & ~end[1:]
    if len(data):
        end[-1] |= data[-1] == ord("\r")
    return np.flatnonzero(end[:length]), np.flatnonzero(data[:length] == ord('"')) if quotes else np.empty(0, np.int64)


def _rest(path, position, before, quotes):
    """What the file has from ``position`` to the end of the record there, with so many quotes before it."""
    pieces = []
    with open(path, "rb") as file:
        file.seek(position)
        for piece in file:
            ends, marks = _ends_and_quotes(piece, len(piece), quotes)
            outside = ends[(before + np.searchsorted(marks, ends)) % 2 == 0]
            if len(outside):
                pieces.append(piece[:outside[0] + 1])
                break
            pieces.append(piece)
            before += len(marks)
    return b"".join(pieces)


def well_quoted(separator):
    """A function of a record: are its quotes where RFC 4180 wants them, with blanks around quoted fields allowed?

    No text matches in two ways, so that the search for a match takes no more than linear time.
    """
    blanks = " \t".replace(separator, "")
    quoted = rf'"[^"]*(?:""[^"]*)*"[{blanks}]*'
    plain = rf'[^"{re.escape(separator)}]*'
    field = rf"(?:{quoted}|{plain})" if separator == " " else rf"[ ]*(?:{quoted}|(?![ ]){plain})"
    return re.compile(rf"{field}(?:{re.escape(separator)}{field})*".encode()).fullmatch
