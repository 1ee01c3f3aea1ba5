"""Weights to and from safetensors files, under the names and shapes that PyTorch gives them.

``torch.nn.Module.load_state_dict(safetensors.torch.load_file(path))`` takes what :func:`save` wrote, and
:func:`load` takes what ``safetensors.torch.save_file(model.state_dict(), path)`` wrote.
"""

import os
import tempfile

import numpy as np

from .checkpoint import Checkpoint
from .file import read, write

_COUNTER = "num_batches_tracked"  # an integer in PyTorch


def save(model, path):
    """Write all parameters and statistics of ``model``, a Module or {name: array}, to ``path``.

    The file appears under its name when it is complete: whoever reads it sees the old one or the new one.
    In a parallel program one rank writes: ``weights = model.collect()`` on all ranks, and then
    ``if grid.rank == 0: save(weights, path)``.

    Raises
    ------
    RuntimeError
        The model has no memory yet.
    FileNotFoundError
        The folder does not exist.
    """
    if not isinstance(model, dict):
        if not hasattr(model, "vector"):
            raise RuntimeError("this model has no memory yet: call model.init(seed) before saving it")
        model = {name: parameter.value for name, parameter in model.named().items()}
    arrays = {name: np.array(a, np.int64) if name.endswith(_COUNTER) else a for name, a in model.items()}
    path = os.fspath(path)
    if not os.path.isdir(os.path.dirname(path) or "."):
        raise FileNotFoundError(f"cannot save to {path}: the folder {os.path.dirname(path)} does not exist")
    with tempfile.TemporaryDirectory(dir=os.path.dirname(path) or ".", prefix=".mpiml-") as folder:
        part = os.path.join(folder, "part")
        write(part, arrays)
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
    named, everything = model.named(), model.whole().named()
    arrays = Checkpoint(path).weights() if os.path.isdir(path) else read(path, path)
    shapes = {name: array.shape for name, array in arrays.items()}
    problems = misfits({name: p.shape for name, p in named.items()}, everything, shapes)
    problems += [f"{name} is of {array.dtype}, not of floats" for name, array in arrays.items()
                 if array.dtype.kind != "f" and not (array.dtype.kind == "i" and name.endswith(_COUNTER))]
    refuse(path, problems)
    if not hasattr(model, "vector"):
        model.init()
    for name, parameter in named.items():
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
