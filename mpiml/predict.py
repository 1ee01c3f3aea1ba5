"""``python -m mpiml predict``: what a saved model says of new data, by one process or by many together.

The model is one that ``save(model, path, about)`` has written, and ``about`` says how to use it:

=========  =============================================================================================================
"input"    How data become the model's input: the ``settings()`` of what encoded them for training, such as
           :class:`mpiml.data.Features` or :class:`mpiml.data.TextFeatures`; or, of images, ``{"kind": "pixels", "shape":
           [1, 28, 28]}``, the name of a function of :mod:`mpiml.data` and the shape of an image. Without it, arrays are
           given to the model as they are.
"target"   What its outputs mean: the ``settings()`` of :class:`mpiml.data.Labels`, if they are the logits of its classes, or
           of :class:`mpiml.data.Number`. Without it, they are written as they are.
"csv"      Arguments of :func:`mpiml.data.read_csv`, for files that it does not read without: ``{"names": [...]}``, say.
=========  =============================================================================================================

Data are a CSV file or, for images and other arrays, a ``.npy`` file, and so are predictions, in the order of the data. Ranks
read and compute by shares, and write what one would write, to the last byte.
"""

import contextlib
import csv
import functools
import hashlib
import io
import math
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mpiml import data, patience
from mpiml.alone import Alone
from mpiml.data import Features, Labels, Number, TextFeatures, read_csv, share
from mpiml.data.read_csv import MISSING
from mpiml.nn import Module
from mpiml.save.weights import fill, read_model, replacing

_RUN = 256  # samples that go through the model together


def predict(path, source, out=None, only=False, force=False, pipe=1):
    """Write a model's predictions; under a launcher, by all ranks of the job together.

    Parameters
    ----------
    path, source : str
        The files of the model and of the data.
    out : str, optional
        A ``.npy`` or any other file, which is then CSV; without it, CSV goes to the standard output.
    only : bool
        Leave out the data's own columns.
    force : bool
        Replace ``out`` if it exists.
    pipe : int
        Stages that the model is cut into.

    Raises
    ------
    OSError, ValueError
        A file is missing, damaged or not what the model takes; the message says which, and where. Nothing is written then.
        With many ranks, rank 0 says so, and all leave the program.
    """
    work = functools.partial(_predict, path, source, out, only, force)
    if patience.launched_rank() is None:
        if pipe > 1:
            raise ValueError(f"a pipeline of {pipe} stages takes {pipe} ranks: mpirun -n {pipe} python -m mpiml predict ...")
        try:
            return work(Alone(), Module.init, _outputs)
        except (MemoryError, TypeError) as error:
            raise ValueError(f"{source} is nothing that {path} can compute: {error}") from error
    from mpiml import parallel

    def outputs_of(model, x, transform):
        try:
            return parallel.predict(model, x, grid, _RUN, transform)
        except (OSError, TypeError, ValueError) as error:  # perhaps on this rank alone
            raise RuntimeError(f"{source} is nothing that {path} can compute: {error}") from error

    try:
        grid = parallel.Grid(pipe=pipe)
        work(grid, functools.partial(parallel.place, grid=grid), outputs_of)
    except (parallel.RankError, OSError, TypeError, ValueError) as error:  # on all ranks
        parallel.leave(f"mpiml: {error.__cause__ or error}")


def _outputs(model, x, transform):
    """The model's outputs for all rows of x, as :func:`mpiml.parallel.predict` computes them."""
    return np.concatenate([model(transform(x[start:start + _RUN])) for start in range(0, len(x), _RUN)])


def _predict(path, source, out, only, force, grid, place, outputs_of):
    # What may fail on one rank alone is done together; what is not fails on all of them, or ends the job.
    grid.together("preparing the output", _check_out, out, force, (path, source), grid.rank)
    model, arrays, use = grid.together("loading the model", _load, path, source)
    grid.same("the saved model", use.digest)
    rows = (_Array if source.endswith(".npy") else _Table)(source, use, grid)
    model = fill(model, arrays, place)

    def transform(run):
        run = rows.transform(run)
        return run.astype(model.vector.dtype, copy=False) if run.dtype.kind == "f" else run

    outputs = outputs_of(model, rows.x, transform)
    content = grid.together("reading the outputs", _content, outputs, rows, use, out, only)
    if not isinstance(content, bytes):
        content = "".join(grid.texts(content)).encode()
    grid.together("writing the output", _write, out, content, grid.rank)


def _check_out(out, force, inputs, rank):
    if out is None or rank:
        return
    if not os.path.isdir(os.path.dirname(out) or "."):
        raise FileNotFoundError(f"cannot write {out}: there is no folder {os.path.dirname(out)}")
    if os.path.exists(out):
        if not os.path.isfile(out):
            raise ValueError(f"cannot write {out}: it is a {'folder' if os.path.isdir(out) else 'device'}, not a file")
        if any(os.path.exists(path) and os.path.samefile(out, path) for path in inputs):
            raise ValueError(f"{out} is what is read: write the predictions to another file")
        if not force:
            raise FileExistsError(f"{out} exists already: --force replaces it")


# --- The model --------------------------------------------------------------------------------------------------------

class Images:
    """Images of one shape, uint8, as arrays of floats."""

    def __init__(self, function, shape):
        self.function, self.shape = function, shape

    @classmethod
    def from_settings(cls, settings):
        return cls(getattr(data, settings["kind"]), tuple(settings["shape"]))


INPUTS = {"table": Features, "text": TextFeatures, "pixels": Images, "colors": Images}
TARGETS = {"classes": Labels, "number": Number}
READING = ("names", "header", "missing", "separator", "quotes", "errors")  # not "ragged": no row is left out


class _Use(NamedTuple):
    """What a file says about the use of its model."""

    path: str
    digest: str
    input: Any
    target: Any
    csv: dict


def _load(path, source):
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    model, arrays, about = read_model(path)
    reading = about.get("csv", {})
    if not isinstance(reading, dict) or not set(reading) <= set(READING):
        raise ValueError(f"{path} has an entry 'csv' that is {reading!r}, instead of some of {', '.join(READING)}")
    use = _Use(path, digest, _made("input", INPUTS, path, about), _made("target", TARGETS, path, about), reading)
    of_arrays = use.input is None or isinstance(use.input, Images)
    if of_arrays and not source.endswith(".npy"):
        raise ValueError(f"{path} does not say how rows of a table become its input, so it takes arrays: a file that ends in "
                         f".npy, not {source}. For tables: save(model, path, about={{'input': features.settings()}})")
    if not of_arrays and source.endswith(".npy"):
        raise ValueError(f"{path} takes the rows of a table: a CSV file, not {source}")
    return model, arrays, use


def _made(what, kinds, path, about):
    """The encoder whose settings a file holds; None if it holds none."""
    settings = about.get(what)
    if settings is None:
        return None
    kind = settings.get("kind") if isinstance(settings, dict) else settings
    if kind not in kinds:
        raise ValueError(f"{path} has an entry {what!r} of the kind {kind!r}, but this version of mpiml knows "
                         f"{', '.join(kinds)}")
    try:
        return kinds[kind].from_settings(settings)
    except Exception as error:
        raise ValueError(f"{path} has an entry {what!r} that cannot be used: {type(error).__name__}: {error}") from error


# --- The data ---------------------------------------------------------------------------------------------------------

class _Array:
    """The samples in a .npy file, which all ranks see: this rank's are those from ``start`` to ``stop``."""

    def __init__(self, path, use, grid):
        self.path, self.use = path, use
        self.x = grid.together(f"reading {path}", self._read)
        grid.same("the array", (self.x.shape, self.x.dtype.str))
        self.start, self.stop = share(len(self.x), grid.rank, grid.size)
        self.kept, self.first = {}, grid.rank == 0

    def _read(self):
        try:
            x = np.load(self.path, mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            raise ValueError(f"{self.path} is no .npy file of numbers ({error}): numpy.save(path, array) writes one") from error
        if x.ndim == 0 or len(x) == 0:
            raise ValueError(f"{self.path} has no samples: it holds an array of shape {x.shape}")
        images = self.use.input
        if images is None:
            if x.dtype.kind not in "iuf":
                raise ValueError(f"{self.path} holds {x.dtype}, but a model takes floats or integers")
            return x
        if (1, *x.shape[1:]) == images.shape:
            x = x[:, None]
        if x.dtype != np.uint8 or x.shape[1:] != images.shape:
            raise ValueError(f"{self.path} holds {x.dtype} of shape {x.shape}, but {self.use.path} takes images of uint8, of "
                             f"shape (n, {', '.join(map(str, images.shape))})")
        return x

    def transform(self, run):
        return self.use.input.function(run) if self.use.input else np.asarray(run)

    def where(self, row):
        return f"{self.path}, sample {self.start + row}"


class _Table:
    """The rows of a CSV file: encoded all of them, as they are those from ``start`` to ``stop``, which this rank has read."""

    def __init__(self, path, use, grid):
        options = {"missing": MISSING} | grid.together(f"reading {path}", _options, path, use)
        missing = frozenset(options.pop("missing"))
        table = read_csv(path, **options, missing=(), grid=grid)
        known = table
        for name in table.names:
            if not missing.isdisjoint(table[name].tolist()):
                known = known.map(name, lambda text: "" if text in missing else text)
        self.x = grid.rows(grid.together(f"encoding {path}", use.input.encode, known))
        counts = [int(text) for text in grid.texts(str(len(table)))]
        self.start = sum(counts[:grid.rank])
        self.stop = self.start + len(table)
        self.kept, self.first, self.where = {name: table[name].tolist() for name in table.names}, grid.rank == 0, table.where

    def transform(self, run):
        return run


def _options(path, use):
    """How to read this file: as those for training were, but it may have a header, and lack the target."""
    options = dict(use.csv)
    if options.get("names") and "header" not in options:
        names, target = options["names"], getattr(use.target, "column", None)
        fields = _first(path, options.get("separator", ","))
        if {name.casefold() for name in names} & {field.casefold() for field in fields}:  # a header, if perhaps a wrong one
            del options["names"]
        elif len(fields) == len(names) - 1:
            options["names"] = [name for name in names if name != target]
    return options


def _first(path, separator):
    """The fields of the first line of a file that is not empty."""
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file, contextlib.suppress(csv.Error):
        for fields in csv.reader(file, delimiter=separator, skipinitialspace=True):
            if any(fields):
                return [field.strip() for field in fields]
    return []


# --- The predictions --------------------------------------------------------------------------------------------------

def _content(outputs, rows, use, out, only):
    """What is written: the bytes of a .npy file; or this rank's lines of CSV, as text."""
    mine = outputs[rows.start:rows.stop]
    wrong = ~np.isfinite(mine).all(axis=tuple(range(1, mine.ndim)))
    if wrong.any():
        raise ValueError(f"{rows.where(int(wrong.argmax()))}: the model's output is not finite")
    if out and out.endswith(".npy"):
        file = io.BytesIO()
        np.save(file, _meaning(outputs, use)[1])
        return file.getvalue()
    kept = {} if only else rows.kept
    said, _ = _meaning(mine, use)
    twice = [name for name in said if name in kept]
    if twice:
        raise ValueError(f"the data have a column {twice[0]!r} themselves: rename it, or leave their columns out, by --only")
    columns = kept | said
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if rows.first:
        writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return text.getvalue()


def _meaning(outputs, use):
    """What outputs say: columns of texts by name, and an array of the same."""
    flat, target = outputs.reshape(len(outputs), math.prod(outputs.shape[1:])), use.target
    if target is None:
        return {f"output {i}": _written(column, 9) for i, column in enumerate(flat.T)}, outputs
    if isinstance(target, Number):
        if flat.shape[1] != 1:
            raise ValueError(f"{use.path} has {flat.shape[1]} outputs for a row, but predicts one number, {target.column}")
        values = target.decode(flat)
        return {f"predicted {target.column}": _written(values, 9)}, values
    if flat.shape[1] == 1 and len(target.classes) == 2:  # the logit of the second class
        flat = np.concatenate([np.zeros_like(flat), flat], axis=1)
    if flat.shape[1] != len(target.classes):
        raise ValueError(f"{use.path} has {flat.shape[1]} outputs for a row, but {target.column} has {len(target.classes)} "
                         f"classes")
    exponentials = np.exp(flat.astype(np.float64) - flat.max(axis=1, keepdims=True))
    probabilities = (exponentials / exponentials.sum(axis=1, keepdims=True)).astype(np.float32)
    columns = {f"probability {name}": _written(column, 6) for name, column in zip(target.classes, probabilities.T, strict=True)}
    return {f"predicted {target.column}": target.decode(flat)} | columns, probabilities


def _written(numbers, digits):
    return [f"{number:.{digits}g}" for number in numbers.tolist()]


def _write(out, content, rank):
    if rank:
        return
    if out is None:
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
        return
    with replacing(os.path.realpath(out)) as part, open(part, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
