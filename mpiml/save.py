"""Weights to and from safetensors files, under the names and shapes that PyTorch gives them.

``torch.nn.Module.load_state_dict(safetensors.torch.load_file(path))`` takes what :func:`save` wrote, and
:func:`load` takes what ``safetensors.torch.save_file(model.state_dict(), path)`` wrote.
"""

import os
import tempfile

import numpy as np

try:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file, save_file
except ImportError as error:
    raise ImportError("mpiml.save keeps weights in safetensors files: pip install 'mpiml[save]'") from error

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
    # Files hold memory as it lies: in C order.
    arrays = {name: np.array(a, np.int64) if name.endswith(_COUNTER) else np.asarray(a, order="C")
              for name, a in model.items()}
    path = os.fspath(path)
    if not os.path.isdir(os.path.dirname(path) or "."):
        raise FileNotFoundError(f"cannot save to {path}: the folder {os.path.dirname(path)} does not exist")
    with tempfile.TemporaryDirectory(dir=os.path.dirname(path) or ".", prefix=".mpiml-") as folder:
        part = os.path.join(folder, "part")
        save_file(arrays, part)
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(part, 0o666 & ~_umask())
        os.replace(part, path)


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def load(model, path):
    """Fill all parameters and statistics of ``model`` from ``path``; return the model.

    Raises
    ------
    ValueError
        The file is damaged, or its names, shapes or dtypes are not the model's; the model is then untouched.
    """
    try:
        arrays = load_file(path)
    except (TypeError, AttributeError) as error:  # how safetensors meets a dtype that NumPy lacks
        raise ValueError(f"{os.fspath(path)} holds a dtype that NumPy does not know, such as bfloat16 ({error}): "
                         f"convert it to float32") from error
    except SafetensorError as error:
        raise ValueError(f"{os.fspath(path)} is not a whole safetensors file ({error}); pickled files (.pt, .pkl) are "
                         f"programs and are not read: convert them with safetensors.torch.save_file") from error
    named, everything = model.named(), model.whole().named()
    problems = [f"{name} is missing" for name in named if name not in arrays]
    problems += [f"{name} is not in the model" for name in arrays if name not in everything]
    problems += [f"{name} has shape {arrays[name].shape} instead of {p.shape}" for name, p in named.items()
                 if name in arrays and arrays[name].shape != p.shape]
    problems += [f"{name} is of {array.dtype}, not of floats" for name, array in arrays.items()
                 if array.dtype.kind != "f" and not (array.dtype.kind == "i" and name.endswith(_COUNTER))]
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise ValueError(f"{os.fspath(path)} does not fit this model: {shown}")
    if not hasattr(model, "vector"):
        model.init()
    for name, parameter in named.items():
        parameter.value[...] = arrays[name]
    return model
