"""One checkpoint: a folder with a safetensors file from each rank, and a manifest that says what is where.

::

    step_300/0.safetensors    what rank 0 wrote: some rows of parameters and of the optimizer's moments
    step_300/1.safetensors
    step_300/manifest.json    shapes, dtypes, which rows lie in which file; size and SHA-256 of each file and of itself

Arrays go by the names of their parameters, ``0.weight`` and ``0.weight/mean``, in the shapes that they have in the whole
model. So the folder knows no grid: any number of ranks may have written it, and any other may read it.
"""

import hashlib
import json
import math
import os
import re
import stat

import numpy as np

from mpiml.data.batches import share

from .file import read

MANIFEST, FORMAT = "manifest.json", "mpiml checkpoint 1"
_LARGEST = 1 << 28  # bytes of a manifest


def split(shapes, writer, writers):
    """The rows of each array that fall to one of several writers, who so get about the same number of elements.

    >>> split({"weight": (4, 3), "bias": (4,), "scale": ()}, 0, 2)
    {'weight': (0, 3), 'bias': (0, 0), 'scale': (0, 0)}
    >>> split({"weight": (4, 3), "bias": (4,), "scale": ()}, 1, 2)
    {'weight': (3, 4), 'bias': (0, 4), 'scale': (0, 1)}
    """
    bounds = share(sum(map(math.prod, shapes.values())), writer, writers)
    rows, first = {}, 0
    for name, shape in shapes.items():
        count, width = _rows(shape), max(1, math.prod(shape[1:]))
        rows[name] = tuple(min(count, max(0, -(-(bound - first) // width))) for bound in bounds)
        first += math.prod(shape)
    return rows


def _rows(shape):
    return shape[0] if shape else 1


def plain(what, values):
    """A copy of ``values`` as a manifest carries them; ``what`` they are is for the error.

    Raises
    ------
    ValueError
        JSON cannot carry them.
    """
    try:
        return json.loads(json.dumps(values, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} are text, finite numbers, lists and dicts of these: {error}") from error


def seal(content):
    """The bytes of a manifest, the last line of which is the SHA-256 of all before it."""
    head = _lines(content, 2).removesuffix("\n}").encode()
    return head + _seal(head)


def _lines(value, levels):
    """JSON with a line for each item of the outer levels."""
    if not levels or not isinstance(value, dict) or not value:
        return json.dumps(value, allow_nan=False)
    return "{\n" + ",\n".join(f"{json.dumps(key)}: {_lines(item, levels - 1)}" for key, item in value.items()) + "\n}"


def _seal(head):
    return f',\n"sha256": "{hashlib.sha256(head).hexdigest()}"\n}}\n'.encode()


def contents(path, size=None, digest=None):
    """The bytes of a plain file (no link, no pipe), of this size and SHA-256 if they are given.

    Raises
    ------
    ValueError
        It cannot be read, or is another.
    """
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ValueError(f"{path} is no plain file")
            if size is not None and status.st_size != size:
                raise ValueError(f"{path} has {status.st_size} bytes instead of {size}")
            if size is None and status.st_size > _LARGEST:
                raise ValueError(f"{path} has {status.st_size} bytes, more than any manifest")
            data = file.read()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    if digest is not None and hashlib.sha256(data).hexdigest() != digest:
        raise ValueError(f"{path} is not what was written: its SHA-256 is not that of the manifest")
    return data


def _require(condition, what):
    if not condition:
        raise ValueError(what)


def _whole(*values):
    return all(type(value) is int and 0 <= value < 1 << 62 for value in values)


def _constant(text):
    raise ValueError(f"{text} is no number")


class Checkpoint:
    """A checkpoint that lies in a folder. Its files are read, and verified, when their arrays are asked for.

    Parameters
    ----------
    folder : str
    manifest : bytes, optional
        The content of its manifest, if another rank has read it.

    Attributes
    ----------
    content : dict
        The manifest: "optimizer", "settings", "at", ...
    shapes, dtypes : dict
        Of each array, by its name.

    Raises
    ------
    ValueError
        The manifest is damaged, or no manifest of a checkpoint.
    """

    def __init__(self, folder, manifest=None):
        self.folder = os.fspath(folder)
        _require(not os.path.islink(self.folder), f"{self.folder} is a link, not a folder")
        path = os.path.join(self.folder, MANIFEST)
        data = contents(path) if manifest is None else manifest
        cut = len(data) - len(_seal(b""))
        _require(cut >= 0 and data[cut:] == _seal(data[:cut]),
                 f"{path} is not what was written: its last line is not the SHA-256 of those before it")
        try:
            self.content = json.loads(data, parse_constant=_constant)
            self._check()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            # Sealed, so it is not damage: somebody has written this.
            said = error if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            raise ValueError(f"{path} is no manifest of a checkpoint ({said})") from error

    def _check(self):
        content = self.content
        _require(content["format"] == FORMAT, f"its format is {content['format']!r}, and not {FORMAT!r}")
        _require(_whole(content["step"], content["next_step"]) and type(content["seed"]) is int,
                 "its steps and seed are no whole numbers")
        _require(isinstance(content["optimizer"], str) and isinstance(content["settings"], dict)
                 and isinstance(content["at"], dict), "its optimizer, settings and values are no text and objects")
        self._files = content["files"]
        for name, file in self._files.items():
            _require(re.fullmatch(r"\d+\.safetensors", name), f"{name!r} is no name of a file in a checkpoint")
            _require(_whole(file["bytes"]) and re.fullmatch("[0-9a-f]{64}", file["sha256"]), f"no size and SHA-256 of {name}")
        self.shapes, self.dtypes = {}, {}
        self._placed = {name: {} for name in self._files}
        for name, array in content["arrays"].items():
            shape = self.shapes[name] = tuple(array["shape"])
            _require(len(shape) < 64 and _whole(*shape) and _whole(math.prod(shape)), f"the shape of {name} is {shape}")
            _require(array["dtype"] in ("float32", "float64"), f"{name} is of {array['dtype']}")
            self.dtypes[name] = np.dtype(array["dtype"])
            end = 0
            for file, start, stop in array["rows"]:
                _require(_whole(start, stop) and start == end < stop and name not in self._placed[file],
                         f"the rows of {name} do not follow each other")
                self._placed[file][name] = start, stop
                end = stop
            _require(end == _rows(shape) or math.prod(shape) == 0, f"{end} of the {_rows(shape)} rows of {name} are there")

    def _arrays(self, file):
        """The arrays of one of the files, {name: rows}, all verified."""
        path = os.path.join(self.folder, file)
        arrays = read(contents(path, self._files[file]["bytes"], self._files[file]["sha256"]), path)
        forms = {name: (self.dtypes[name], (stop - start, *self.shapes[name][1:]))
                 for name, (start, stop) in self._placed[file].items()}
        _require({name: (array.dtype, array.shape) for name, array in arrays.items()} == forms,
                 f"{path} does not hold the arrays that the manifest says")
        return arrays

    def verify(self):
        """Read everything; a ValueError says what is damaged."""
        for file in self._files:
            self._arrays(file)

    def fill(self, targets):
        """Copy arrays into ``targets``, {name: array of its shape}; only files that are needed are read, each once."""
        for file, placed in self._placed.items():
            if any(name in targets for name in placed):
                for name, array in self._arrays(file).items():
                    if name in targets:
                        np.atleast_1d(targets[name])[slice(*placed[name])] = array

    def weights(self):
        """{name: array} of the parameters and statistics, without the optimizer's moments."""
        arrays = {name: np.empty(shape, self.dtypes[name]) for name, shape in self.shapes.items() if "/" not in name}
        self.fill(arrays)
        return arrays
