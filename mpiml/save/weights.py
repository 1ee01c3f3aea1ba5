"""Weights to and from safetensors files, under the names and shapes that PyTorch gives them; and whole models.

``torch.nn.Module.load_state_dict(safetensors.torch.load_file(path))`` takes what :func:`save` wrote, and
:func:`load` takes what ``safetensors.torch.save_file(model.state_dict(), path)`` wrote. A file may hold besides, in its
metadata, the layers of the model and what else is needed to use it: :func:`load_model` builds it again.
"""

import contextlib
import json
import os
import tempfile

import numpy as np

from mpiml.describe import build, describe
from mpiml.nn import Module

from .checkpoint import Checkpoint, plain
from .file import read, text_of, write

FORMAT = "mpiml model 1"

_COUNTER = "num_batches_tracked"  # an integer in PyTorch


def save(model, path, about=None, weights=None):
    """Write all parameters and statistics of ``model`` to ``path``.

    The file appears under its name when it is complete: whoever reads it sees the old one or the new one.
    In a parallel program one rank writes, under ``if grid.rank == 0``.

    Parameters
    ----------
    model : mpiml.nn.Module, or {name: array}
    path : str or path
    about : dict, optional
        With it, be it empty, the file also holds a description of the model's layers, so that :func:`load_model` builds it
        again. What it holds is numbers, texts, lists and dicts; :mod:`mpiml.predict` says what ``python -m mpiml predict``
        looks for there.
    weights : {name: array}, optional
        Of a model that is cut into stages: ``weights = model.collect()`` on all ranks together, on rank 0.

    Raises
    ------
    RuntimeError
        The model has no memory yet.
    FileNotFoundError
        The folder does not exist.
    ValueError
        The model cannot be described; or it is one rank's part of a model that is cut into stages.
    """
    described = None
    if isinstance(model, dict):
        if about is not None:
            raise ValueError("arrays cannot describe the layers that they belong to: save(model, path, about, weights=arrays)")
        weights = model
    elif about is not None:
        described = {"format": FORMAT, "model": _described(model), "about": plain("the entries of about", about)}
    if weights is None:
        if not hasattr(model, "vector"):
            raise RuntimeError("this model has no memory yet: call model.init(seed) before saving it")
        weights = {name: parameter.value for name, parameter in model.named().items()}
    if not isinstance(model, dict):
        missing = model.whole().named().keys() - weights.keys()
        if missing:
            raise ValueError(f"other ranks hold {min(missing)}: weights = model.collect() on all ranks together, and then, on "
                             f"rank 0, save(weights, path) or save(model, path, about, weights=weights)")
    arrays = {name: np.array(a, np.int64) if name.endswith(_COUNTER) else a for name, a in weights.items()}
    with replacing(path) as part:
        write(part, arrays, None if described is None else json.dumps(described))


def _described(model):
    try:
        return describe(model)
    except ValueError as error:
        raise ValueError(f"{error}. Without about= the weights alone are saved, which load(model, path) takes") from error


@contextlib.contextmanager
def replacing(path):
    """A path to write a new file to, which gets the name ``path`` at the end of the block, complete or not at all."""
    path = os.fspath(path)
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"cannot save to {path}: the folder {folder} does not exist")
    with tempfile.TemporaryDirectory(dir=folder, prefix=".mpiml-") as folder:
        part = os.path.join(folder, "part")
        yield part
        os.replace(part, path)


def load(model, path):
    """Fill all parameters and statistics of ``model`` from ``path``; return the model.

    Parameters
    ----------
    model : mpiml.nn.Module
        With memory or without; on many ranks what :func:`mpiml.parallel.place` returned.
    path : str or path
        A safetensors file; or the folder of a checkpoint, such as ``run/step_300``.

    Raises
    ------
    ValueError
        The file is damaged, or its names, shapes or dtypes are not the model's; the model is then untouched.
    """
    arrays = Checkpoint(path).weights() if os.path.isdir(path) else read(path, path)
    _refuse_misfits(model, arrays, path)
    if not hasattr(model, "vector"):
        model.init()
    return _copied(model, arrays)


def load_model(path, layers=None, place=Module.init):
    """The model that :func:`save` has written, with its weights, and what was said about it.

    Parameters
    ----------
    path : str or path
    layers : {name: class or function}, optional
        Those of your own that the model is made of. Their constructors get the arguments that the file names.
    place : function of (model, dtype), optional
        What gives the model memory: for ranks of a grid ``functools.partial(mpiml.parallel.place, grid=grid)``.

    Returns
    -------
    model, about
        The model is what ``place`` returned.

    Raises
    ------
    ValueError
        The file is damaged, or it holds no description of a model, or one that does not fit its weights. All of this is
        known before the model has memory.
    """
    model, arrays, about = read_model(path, layers)
    return fill(model, arrays, place), about


def read_model(path, layers=None):
    """(model, arrays, about): :func:`load_model` up to where the model is given memory, for :func:`fill`."""
    path = os.fspath(path)
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder: if it is a checkpoint, it holds weights, but no description of their model, and "
                         f"load(model, path) takes them")
    with open(path, "rb") as file:
        content = file.read()
    arrays, text = dict(sorted(read(content, path).items())), text_of(content, path)
    del content
    if text is None:
        raise ValueError(f"{path} holds weights, but no description of their model: load(model, path) takes them, and "
                         f"save(model, path, about={{}}) writes both")
    try:
        described = json.loads(text)
        if described["format"] != FORMAT:
            raise ValueError(f"it is of the format {described['format']!r}, but this version of mpiml reads {FORMAT!r}")
        about = dict(described["about"])
        model = build(described["model"], layers)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        what = error if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} describes no model that can be built: {what}") from error
    _refuse_misfits(model, arrays, path)
    return model, arrays, about


def fill(model, arrays, place=Module.init):
    """The model with memory, of the width that ``arrays`` have, and filled from them."""
    model = place(model, dtype=np.float64 if any(array.dtype == np.float64 for array in arrays.values()) else np.float32)
    return _copied(model, arrays)


def _refuse_misfits(model, arrays, path):
    """Raise a ValueError unless these arrays can fill this model, or this part of one."""
    shapes = {name: array.shape for name, array in arrays.items()}
    problems = misfits({name: p.shape for name, p in model.named().items()}, model.whole().named(), shapes)
    problems += [f"{name} is of {array.dtype}, not of floats" for name, array in arrays.items()
                 if array.dtype.kind != "f" and not (array.dtype.kind == "i" and name.endswith(_COUNTER))]
    refuse(path, problems)


def _copied(model, arrays):
    for name, parameter in model.named().items():
        parameter.value[...] = arrays[name]
    return model


def misfits(wanted, known, found):
    """What keeps arrays from filling a model: a list of phrases.

    Parameters
    ----------
    wanted : {name: shape}
        Those to be filled.
    known : collection of str
        The names of all in the model.
    found : {name: shape}
        Those that a file holds.
    """
    return ([f"{name} is missing" for name in wanted if name not in found]
            + [f"{name} is not in the model" for name in found if name not in known]
            + [f"{name} has shape {found[name]} instead of {shape}" for name, shape in wanted.items()
               if name in found and found[name] != shape])


def refuse(path, problems):
    """Raise a ValueError if there are problems."""
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise ValueError(f"{os.fspath(path)} does not fit this model: {shown}")
