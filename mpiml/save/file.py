"""safetensors files: arrays under their names.

Files are written here and not by the safetensors library, for a background thread's sake: what is written is hashed
on its way, and neither holds up the interpreter. They are read by the library, which has met more hostile files.
"""

import hashlib
import json
import os
import struct

import numpy as np

try:
    from safetensors import SafetensorError
    from safetensors.numpy import load, load_file
except ImportError as error:
    raise ImportError("mpiml.save keeps weights in safetensors files: pip install 'mpiml[save]'") from error

_BLOCK = 1 << 24  # bytes that are hashed and written at a time
_TEXT, _DIGEST = "mpiml", "sha256"  # of the metadata
_KINDS = {"f": "F", "i": "I", "u": "U", "c": "C"}


def _code(name, dtype):
    if dtype.kind == "b":
        return "BOOL"
    if dtype.kind not in _KINDS or dtype.itemsize > 8:
        raise TypeError(f"{name} is an array of {dtype}, which a safetensors file cannot hold: convert it to float32, say")
    return f"{_KINDS[dtype.kind]}{8 * dtype.itemsize}"


def write(path, arrays, text=None):
    """Write {name: array} to a new file, down to the disk.

    Parameters
    ----------
    path : str
    arrays : {name: array}
    text : str, optional
        Goes along in the file's metadata, with the SHA-256 of itself and the arrays; see :func:`text_of`.

    Returns
    -------
    size, digest
        Of the file: its bytes, and their SHA-256 as text.
    """
    # A file holds memory as it lies: little-endian, in C order, and the wide numbers first, at multiples of their width.
    arrays = dict(sorted(((name, np.asarray(a)) for name, a in arrays.items()), key=lambda item: -item[1].itemsize))
    header, end = {}, 0
    if text is not None:
        header["__metadata__"] = {_TEXT: text, _DIGEST: _digest(text, _blocks(b"", arrays.values()))}
    for name, array in arrays.items():
        header[name] = {"dtype": _code(name, array.dtype), "shape": array.shape, "data_offsets": [end, end + array.nbytes]}
        end += array.nbytes
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    digest = hashlib.sha256()
    with open(path, "xb") as file:
        for block in _blocks(struct.pack("<Q", len(head)) + head, arrays.values()):
            digest.update(block)
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return file.tell(), digest.hexdigest()


def _digest(text, blocks):
    digest = hashlib.sha256(text.encode())
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()


def _blocks(head, arrays):
    yield head
    for array in arrays:
        data = np.asarray(array, array.dtype.newbyteorder("<"), order="C").reshape(-1).view(np.uint8)
        for begin in range(0, len(data), _BLOCK):
            yield data[begin:begin + _BLOCK]


def read(source, path):
    """{name: array} of a file's content, bytes, or of the file itself if ``source`` is ``path``.

    Raises
    ------
    ValueError
        It is no whole safetensors file.
    """
    try:
        return load(source) if isinstance(source, bytes) else load_file(source)
    except (TypeError, AttributeError, KeyError) as error:  # how safetensors meets a dtype that NumPy lacks
        raise ValueError(f"{os.fspath(path)} holds a dtype that NumPy does not know, such as bfloat16 ({error}): "
                         f"convert it to float32") from error
    except SafetensorError as error:
        raise ValueError(f"{os.fspath(path)} is not a whole safetensors file ({error}); pickled files (.pt, .pkl) are "
                         f"programs and are not read: convert them with safetensors.torch.save_file") from error


def text_of(source, path):
    """The text that :func:`write` has put into a file with content ``source``, whole as :func:`read` knows; None without.

    Raises
    ------
    ValueError
        The text or the arrays are no longer what was written.
    """
    start = 8 + struct.unpack("<Q", source[:8])[0]
    metadata = json.loads(source[8:start]).get("__metadata__") or {}
    text = metadata.get(_TEXT)
    if text is not None and metadata.get(_DIGEST) != _digest(text, [memoryview(source)[start:]]):
        raise ValueError(f"{os.fspath(path)} is damaged, or another program has changed it: its SHA-256 is not the one that it "
                         f"was saved with")
    return text
