"""Two-dimensional convolution and its gradients, for images that lie batch innermost in memory.

See :mod:`layout` for how images lie, :mod:`direct` for the convolution and the gradient for its images, which is one
too, and :mod:`convweight` for the gradient for the weight; :mod:`winograd` and :mod:`winogradweight` multiply fewer times.
"""

import numpy as np

from .convweight import bias_gradient, weight_gradient
from .direct import convolve
from .layout import images, innermost, is_batch_innermost
from .public import given, output, public, refuse
from .winograd import convolve_by_values, pays
from .winogradweight import weight_gradient_by_values


@public
def out_size(size, k, stride, padding, dilation=1):
    """Number of output positions along an axis of ``size`` elements."""
    return (size + 2 * padding - dilation * (k - 1) - 1) // stride + 1


@public
def _out_shape(x_shape, weight_shape, stride, padding, dilation, groups):
    """Shape of the result, if images and weight fit each other."""
    if len(x_shape) != 4 or len(weight_shape) != 4:
        refuse("conv2d takes images (n, c, h, w) and a weight (out, c / groups, kh, kw), not {} and {}", x_shape, weight_shape)
    n, c, h, w = x_shape
    outputs, inners, kh, kw = weight_shape
    if groups < 1 or c != inners * groups or outputs % groups != 0:
        refuse("conv2d with weight {} and groups={} takes images of weight.shape[1] * groups channels and as many outputs as "
               "a multiple of the groups, but the images have shape {}", weight_shape, groups, x_shape)
    if min(stride[0], stride[1], dilation[0], dilation[1]) < 1 or min(padding[0], padding[1]) < 0:
        refuse("conv2d takes strides and dilations >= 1 and a padding >= 0, not {}, {} and {}", stride, dilation, padding)
    oh, ow = out_size(h, kh, stride[0], padding[0], dilation[0]), out_size(w, kw, stride[1], padding[1], dilation[1])
    if oh < 1 or ow < 1:
        refuse("a window of weight {} finds no place in images {}: pad them, or take a smaller one", weight_shape, x_shape)
    return n, outputs, oh, ow


@public
def _by_values(wanted, itemsize, y_shape, weight_shape, stride, dilation, groups):
    """Is it Winograd's convolution? A matter of the layer and of a sample's shape, never of the batch."""
    fits = (weight_shape[2] == 3 and weight_shape[3] == 3 and stride[0] == 1 and stride[1] == 1 and dilation[0] == 1
            and dilation[1] == 1 and groups == 1)
    if wanted is None:
        return fits and itemsize == 4 and pays(y_shape[2], y_shape[3], weight_shape[1], weight_shape[0])
    else:  # of the branches only one is compiled
        if wanted and not fits:
            refuse("winograd=True takes a weight of 3 x 3 without stride, dilation and groups, not {} with {}, {} and {}",
                   weight_shape, stride, dilation, groups)
        return wanted


@public
def _into(x, weight, bias, relu, y, stride, padding, dilation, groups, backward, by_values):
    """Compute y, batch innermost, in one way or the other."""
    if by_values and y.size > 0:
        convolve_by_values(x, weight, bias, relu, y, padding, backward)
    else:
        convolve(x, weight, bias, relu, y, stride, padding, dilation, groups, backward)


@public
def _convolve(x, weight, bias, relu, y, stride, padding, dilation, groups, backward, out, winograd):
    """The result in ``out``, if there is one, else in ``y``, a new array for it."""
    by_values = _by_values(winograd, x.itemsize, y.shape, weight.shape, stride, dilation, groups)
    # The kernels write their own layout; a result wanted in another one is copied.
    if out is None:
        _into(innermost(x), weight, bias, relu, y, stride, padding, dilation, groups, backward, by_values)
        return y
    output(out, y.shape, y.dtype)
    if is_batch_innermost(out):
        _into(innermost(x), weight, bias, relu, out, stride, padding, dilation, groups, backward, by_values)
    else:
        _into(innermost(x), weight, bias, relu, y, stride, padding, dilation, groups, backward, by_values)
        out[:] = y
    return out


@public
def conv2d(x, weight, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1, bias=None, relu=False, out=None,
           winograd=None):
    """Cross-correlation of images with a kernel, as in PyTorch.

    Parameters
    ----------
    x : (n, c, h, w) array, float32 or float64
        Fastest where it lies batch innermost (:mod:`mpiml.kernels.layout`), else it is copied.
    weight : (out, c / groups, kh, kw) array of the same dtype
        Fastest where its outputs lie side by side (``np.asfortranarray(weight)``).
    stride, padding, dilation : pairs of int
        Steps between output positions, rows and columns of zeros around the image, steps between taps.
    groups : int
        Number of blocks that the channels are split into; each sees its own inputs only.
    bias : (out,) array, optional
        Is added.
    relu : bool
        ``max(., 0)`` of the result; NaN stays NaN.
    out : (n, out, oh, ow) array, optional
        Where the result is written.
    winograd : bool, optional
        Multiply fewer times, see :mod:`mpiml.kernels.winograd`, at an error of up to 1e-5 of the largest element instead
        of 1e-6. By default where it is faster: in float32, 3 x 3 without stride, dilation and groups, enough channels.

    Returns
    -------
    (n, out, oh, ow) array, batch innermost, ``oh = (h + 2 * padding - dilation * (kh - 1) - 1) // stride + 1``

    Raises
    ------
    TypeError
        Other dtypes than float32 and float64, or several.
    ValueError
        Shapes that do not fit each other.
    """
    n, outputs, oh, ow = _out_shape(x.shape, weight.shape, stride, padding, dilation, groups)
    if bias is not None and bias.shape != (outputs,):
        refuse("conv2d with weight {} takes a bias of shape (weight.shape[0],), not {}", weight.shape, bias.shape)
    y = images(n, outputs, oh, ow, x.dtype)
    return _convolve(x, weight, given(bias, 0, x.dtype), relu, y, stride, padding, dilation, groups, False, out, winograd)


@public
def _check_gradient(g, expected):
    if g.shape != expected:
        refuse("the gradient for the result of this conv2d has shape {}, not {}", expected, g.shape)


@public
def conv2d_vjp_x(g, weight, x_shape, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1, out=None, winograd=None):
    """Gradient for x, of shape ``x_shape``, batch innermost, from ``g`` (n, out, oh, ow); errors as of :func:`conv2d`."""
    _check_gradient(g, _out_shape(x_shape, weight.shape, stride, padding, dilation, groups))
    dx = images(x_shape[0], x_shape[1], x_shape[2], x_shape[3], g.dtype)
    return _convolve(g, weight, np.empty(0, g.dtype), False, dx, stride, padding, dilation, groups, True, out, winograd)


@public
def _weight_gradient(g, x, dw, stride, padding, dilation, groups, by_values):
    if by_values and g.size > 0:
        weight_gradient_by_values(g, x, dw, padding)
    else:
        weight_gradient(g, x, dw, stride, padding, dilation, groups)


@public
def conv2d_vjp_weight(g, x, weight_shape, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1, out=None, winograd=None):
    """Gradient for weight, of shape ``weight_shape``, from ``g`` (n, out, oh, ow); errors as of :func:`conv2d`.

    The result lies in memory with its outputs side by side, as ``np.asfortranarray`` of it does. ``winograd`` is that of
    :func:`conv2d`, see :mod:`mpiml.kernels.winogradweight`.
    """
    _check_gradient(g, _out_shape(x.shape, weight_shape, stride, padding, dilation, groups))
    by_values = _by_values(winograd, g.itemsize, g.shape, weight_shape, stride, dilation, groups)
    outputs, inners, kh, kw = weight_shape
    dw = np.empty((kw, kh, inners, outputs), g.dtype).transpose((3, 2, 1, 0))
    _weight_gradient(innermost(g), innermost(x), dw, stride, padding, dilation, groups, by_values)
    if out is None:
        return dw
    output(out, weight_shape, g.dtype)
    out[:] = dw
    return out


@public
def conv2d_vjp_bias(g, out=None):
    """Gradient for bias, of shape (out,), from ``g`` (n, out, oh, ow)."""
    if g.ndim != 4:
        refuse("conv2d_vjp_bias takes a gradient of shape (n, out, oh, ow), not {}", g.shape)
    db = output(out, (g.shape[1],), g.dtype)
    none = np.empty((0, 0, 0, 0), g.dtype)
    bias_gradient(innermost(g), none, none, db)
    return db


@public
def conv2d_vjp_relu(g, y):
    """Behind the relu of ``y = conv2d(..., relu=True)``: the gradient that the other vjps take, and with it that for bias.

    Both in one pass over the memory: a quarter less time than :func:`relu_vjp` and :func:`conv2d_vjp_bias`.

    Parameters
    ----------
    g : (n, out, oh, ow) array, float32 or float64
        Gradient for y.
    y : (n, out, oh, ow) array of the same dtype

    Returns
    -------
    (n, out, oh, ow) array, batch innermost
        ``g`` where y is above 0, else 0.
    (out,) array
        Gradient for bias.

    Raises
    ------
    TypeError, ValueError
        Dtypes or shapes that differ.
    """
    if g.ndim != 4 or g.shape != y.shape:
        refuse("conv2d_vjp_relu takes gradient and value of one shape (n, out, oh, ow), not {} and {}", g.shape, y.shape)
    masked = images(g.shape[0], g.shape[1], g.shape[2], g.shape[3], g.dtype)
    db = np.empty(g.shape[1], g.dtype)
    bias_gradient(innermost(g), innermost(y), masked, db)
    return masked, db
