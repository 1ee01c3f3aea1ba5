"""What ops refuse: dtypes, shapes and windows that do not belong together."""

import numpy as np

from mpiml import kernels as k
from mpiml.tensor import FLOATS


def floats(name, x):
    """Refuse an ``x`` that is not float32 or float64."""
    # Kernels compute in the dtype of x: of integers, sigmoid would be 0.
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} takes float32 or float64, not {x.dtype}: convert it with .astype(np.float32)")


def same_dtype(name, x, other, argument="weight"):
    """Refuse an ``other`` (the op's ``argument``) of another dtype than ``x``."""
    if x.dtype != other.dtype:
        fix = (f"convert the {argument} with .astype(np.{x.dtype})" if argument == "target" else
               f"convert the input with .astype(np.{other.dtype}) (pixels: mpiml.data.pixels)" if x.dtype == np.uint8 else
               f"convert the input with .astype(np.{other.dtype}), or the {argument}")
        raise TypeError(f"{name} got an input of {x.dtype} and a {argument} of {other.dtype}: {fix}")


def same_shape(name, x, target):
    """``target`` in the dtype of ``x``; refuse another shape."""
    floats(name, x)
    target = np.asarray(target)
    if x.shape != target.shape:
        raise ValueError(f"{name} compares arrays of one shape, not {x.shape} with {target.shape}")
    return target.astype(x.dtype, copy=False)


def vectors(name, x, shape, **arrays):
    """Refuse arrays (or None) that have not this shape and the dtype of ``x``."""
    # A kernel does not look at bounds, and broadcasting hides a wrong shape.
    for argument, array in arrays.items():
        if array is not None:
            same_dtype(name, x, array, argument)
            if array.shape != shape:
                raise ValueError(f"{name} of an input of shape {x.shape} takes a {argument} of shape {shape}, not "
                                 f"{array.shape}")


def pair(name, value):
    """(height, width) of a number or a pair."""
    if type(value) is int:  # as nearly always
        return value, value
    pair = (value, value) if isinstance(value, np.integer) else tuple(value)
    if len(pair) != 2:
        raise ValueError(f"{name} is a number or a pair (height, width), not {value!r}")
    return int(pair[0]), int(pair[1])


def image(name, x):
    """Refuse an ``x`` that is not (n, channels, height, width)."""
    if x.ndim != 4:
        raise ValueError(f"{name} takes images of shape (n, channels, height, width), not {x.shape}")


def windows(name, x, size, stride, padding, dilation=(1, 1)):
    """Refuse windows that fit nowhere in the images ``x``."""
    for axis in (0, 1):
        if size[axis] < 1 or stride[axis] < 1 or dilation[axis] < 1 or padding[axis] < 0:
            raise ValueError(f"{name} needs sizes, strides and dilations >= 1 and padding >= 0, got {size}, "
                             f"{stride}, {dilation} and {padding}")
        if k.out_size(x.shape[2 + axis], size[axis], stride[axis], padding[axis], dilation[axis]) < 1:
            raise ValueError(f"{name} with windows of {size}, dilation {dilation} and padding {padding} finds no "
                             f"place in images of {x.shape[2:]}")
