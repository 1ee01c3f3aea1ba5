"""Convolution and pooling against PyTorch, over random shapes and layouts."""

import numba
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mpiml import kernels as k
from mpiml.kernels.layout import images, is_batch_innermost

torch = pytest.importorskip("torch")

TOLERANCE = {"float32": 1e-5, "float64": 1e-10}
dtypes = st.sampled_from(["float32", "float64"])
often = settings(deadline=None, max_examples=40, derandomize=True)


def pairs(low, high):
    return st.tuples(st.integers(low, high), st.integers(low, high))


def normal(seed, *shape, dtype="float32"):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def laid(x, layout):
    """``x`` with other strides."""
    if layout == "innermost":
        y = images(*x.shape, x.dtype)
    elif layout == "channels last":
        n, c, h, w = x.shape
        y = np.empty((n, h, w, c), x.dtype).transpose(0, 3, 1, 2)
    elif layout == "part":
        y = np.empty([2 * size for size in x.shape], x.dtype)[::2, ::2, ::2, ::2]
    elif layout == "fortran":
        y = np.empty(x.shape, x.dtype, order="F")
    else:
        y = np.empty(x.shape, x.dtype)
    y[...] = x
    y.flags.writeable = False
    return y


layouts = st.sampled_from(["innermost", "channels last", "part", "fortran", "usual"])


def near(ours, theirs):
    theirs = theirs.detach().numpy()
    assert ours.shape == theirs.shape
    error = abs(ours - theirs).max() if ours.size else 0
    assert error <= TOLERANCE[str(ours.dtype)] * max(abs(theirs).max() if ours.size else 0, 1e-30)


def tensors(*arrays):
    return [torch.tensor(np.array(a, dtype="float64", order="C"), requires_grad=True) for a in arrays]


@often
@given(dtypes, layouts, layouts, st.sampled_from([1, 2, 7, 16, 17, 33]), st.sampled_from([1, 1, 1, 2, 4]),
       st.sampled_from([1, 2, 3, 8, 17]), st.sampled_from([1, 2, 3, 5, 6, 9, 16, 19]), pairs(5, 12), pairs(1, 5),
       pairs(1, 3), pairs(0, 4), pairs(1, 3), st.booleans(), st.booleans())
def test_conv2d_and_its_gradients(dtype, layout, other, n, groups, inners, outputs, size, kernel, stride, padding, dilation,
                                  biased, relu):
    assume(all(s + 2 * p > d * (t - 1) for s, p, d, t in zip(size, padding, dilation, kernel, strict=True)))
    x = laid(normal(1, n, inners * groups, *size, dtype=dtype), layout)
    weight = laid(normal(2, outputs * groups, inners, *kernel, dtype=dtype), other)
    bias = normal(3, outputs * groups, dtype=dtype) if biased else None
    how = stride, padding, dilation, groups
    tx, tw = tensors(x, weight)
    expected = torch.conv2d(tx, tw, None if bias is None else tensors(bias)[0], *how)
    y = k.conv2d(x, weight, *how, bias, relu)
    near(y, expected.relu() if relu else expected)
    assert is_batch_innermost(y)
    g = laid(normal(4, *y.shape, dtype=dtype), other)
    expected.backward(tensors(g)[0])
    dx, dw = k.conv2d_vjp_x(g, weight, x.shape, *how), k.conv2d_vjp_weight(g, x, weight.shape, *how)
    near(dx, tx.grad)
    near(dw, tw.grad)
    near(k.conv2d_vjp_bias(g), tensors(g)[0].sum((0, 2, 3)))
    masked, db = k.conv2d_vjp_relu(g, y)
    np.testing.assert_array_equal(masked, np.where(y > 0, g, 0))
    np.testing.assert_array_equal(db, k.conv2d_vjp_bias(masked))
    assert is_batch_innermost(masked)
    assert is_batch_innermost(dx)
    for call, result in ((lambda out: k.conv2d(x, weight, *how, bias, relu, out), y),
                         (lambda out: k.conv2d_vjp_x(g, weight, x.shape, *how, out), dx),
                         (lambda out: k.conv2d_vjp_weight(g, x, weight.shape, *how, out), dw)):
        for out in np.empty(result.shape, dtype), np.empty_like(result):
            assert call(out) is out
            np.testing.assert_array_equal(out, result)


@often
@given(dtypes, layouts, st.sampled_from([1, 2, 7, 16, 17, 33, 70]), st.integers(1, 20), st.integers(1, 20), pairs(3, 13),
       pairs(0, 3), st.booleans())
def test_winograd_is_a_convolution(dtype, layout, n, channels, outputs, size, padding, relu):
    x = laid(normal(1, n, channels, *size, dtype=dtype), layout)
    weight = laid(normal(2, outputs, channels, 3, 3, dtype=dtype), layout)
    bias = normal(3, outputs, dtype=dtype)
    tx, tw, tb = tensors(x, weight, bias)
    expected = torch.conv2d(tx, tw, tb, padding=padding)
    near(k.conv2d(x, weight, (1, 1), padding, bias=bias, relu=relu, winograd=True), expected.relu() if relu else expected)
    g = laid(normal(4, *expected.shape, dtype=dtype), layout)
    expected.backward(tensors(g)[0])
    near(k.conv2d_vjp_x(g, weight, x.shape, (1, 1), padding, winograd=True), tx.grad)
    dw = k.conv2d_vjp_weight(g, x, weight.shape, (1, 1), padding, winograd=True)
    near(dw, tw.grad)
    for out in np.empty(weight.shape, dtype), np.empty_like(dw):
        assert k.conv2d_vjp_weight(g, x, weight.shape, (1, 1), padding, out=out, winograd=True) is out
        np.testing.assert_array_equal(out, dw)
    part = slice(n // 3, None)
    np.testing.assert_array_equal(k.conv2d(x[part], weight, (1, 1), padding, winograd=True),
                                  k.conv2d(x, weight, (1, 1), padding, winograd=True)[part])


@pytest.mark.parametrize("n", [1, 8, 150])
def test_errors_of_winograd_do_not_grow_with_the_batch(n):
    x, g = normal(1, n, 16, 20, 20), normal(2, n, 16, 20, 20)
    tx, tg = torch.tensor(x).double(), torch.tensor(g).double()
    exact = torch.nn.grad.conv2d_weight(tx, (16, 16, 3, 3), tg, padding=1).numpy()
    ours = k.conv2d_vjp_weight(g, x, (16, 16, 3, 3), (1, 1), (1, 1))
    assert abs(ours - exact).max() <= 7e-6 * abs(exact).max()


def test_images_begin_at_a_cache_line():
    for shape in (3, 2, 5, 7), (32, 16, 32, 32):
        for dtype in np.float32, np.float64:
            x = images(*shape, dtype)
            assert x.__array_interface__["data"][0] % 64 == 0
            assert is_batch_innermost(x) and x.shape == shape
    y = k.relu(images(32, 8, 16, 16, np.float32))
    assert y.__array_interface__["data"][0] % 64 == 0
    assert is_batch_innermost(y)


def test_winograd_is_used_where_it_pays_and_can_be_forbidden():
    x, weight = normal(1, 3, 32, 16, 16), normal(2, 32, 32, 3, 3)
    how = (1, 1), (1, 1)
    by_values, directly = k.conv2d(x, weight, *how, winograd=True), k.conv2d(x, weight, *how, winograd=False)
    assert (by_values != directly).any()
    np.testing.assert_array_equal(k.conv2d(x, weight, *how), by_values)
    gradient = k.conv2d_vjp_x(x, weight, x.shape, *how, winograd=True)
    np.testing.assert_array_equal(k.conv2d_vjp_x(x, weight, x.shape, *how), gradient)
    gradient = k.conv2d_vjp_weight(x, x, weight.shape, *how, winograd=True)
    np.testing.assert_array_equal(k.conv2d_vjp_weight(x, x, weight.shape, *how), gradient)
    assert (k.conv2d_vjp_weight(x, x, weight.shape, *how, winograd=False) != gradient).any()
    few = weight[:, :2]
    np.testing.assert_array_equal(k.conv2d(x[:, :2], few, *how), k.conv2d(x[:, :2], few, *how, winograd=False))


@pytest.mark.parametrize(("n", "c", "size", "out", "kernel", "padding"),
                         [(64, 4, 40, 16, 3, 1), (40, 1, 28, 6, 5, 2), (33, 64, 8, 64, 3, 1)])
def test_many_pixels_keep_their_accuracy(n, c, size, out, kernel, padding):
    x, weight = 1 + normal(1, n, c, size, size), normal(2, out, c, kernel, kernel)
    tx, tw = tensors(x, weight)
    expected = torch.conv2d(tx, tw, padding=padding)
    g = 1 + normal(3, *expected.shape)
    expected.backward(tensors(g)[0])
    how = (1, 1), (padding, padding)
    near(k.conv2d(x, weight, *how), expected)
    near(k.conv2d_vjp_x(g, weight, x.shape, *how), tx.grad)
    near(k.conv2d_vjp_weight(g, x, weight.shape, *how), tw.grad)


SAME = [((5, 9, 9), (7, 5, 3, 3), (1, 1), (1, 1), (1, 1), 1), ((4, 8, 7), (12, 2, 3, 2), (2, 1), (0, 1), (1, 2), 2),
        ((16, 12, 12), (16, 16, 3, 3), (1, 1), (1, 1), (1, 1), 1), ((3, 6, 6), (9, 3, 1, 1), (1, 1), (0, 0), (1, 1), 1)]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("image", "kernel", "stride", "padding", "dilation", "groups"), SAME)
def test_a_sample_has_the_same_bits_in_every_batch(dtype, image, kernel, stride, padding, dilation, groups):
    x, weight = normal(1, 128, *image, dtype=dtype), normal(2, *kernel, dtype=dtype)
    how = stride, padding, dilation, groups
    y = k.conv2d(x, weight, *how)
    g = normal(3, *y.shape, dtype=dtype)
    dx = k.conv2d_vjp_x(g, weight, x.shape, *how)
    pooled, _ = k.max_pool2d(x, (2, 2), (2, 2))
    mean = k.avg_pool2d(x, (3, 2), (2, 2), (1, 0))
    for n in 1, 7, 40:
        part = slice(128 - n, 128)
        np.testing.assert_array_equal(k.conv2d(x[part], weight, *how), y[part])
        np.testing.assert_array_equal(k.conv2d_vjp_x(g[part], weight, x[part].shape, *how), dx[part])
        np.testing.assert_array_equal(k.max_pool2d(x[part], (2, 2), (2, 2))[0], pooled[part])
        np.testing.assert_array_equal(k.avg_pool2d(x[part], (3, 2), (2, 2), (1, 0)), mean[part])


def test_an_empty_batch():
    x, weight = np.zeros((0, 3, 5, 5), "float32"), normal(1, 4, 3, 3, 3)
    y = k.conv2d(x, weight)
    assert y.shape == (0, 4, 3, 3)
    assert k.conv2d_vjp_x(y, weight, x.shape).shape == x.shape
    for winograd in None, True:
        assert not k.conv2d_vjp_weight(y, x, weight.shape, winograd=winograd).any()
    assert not k.conv2d_vjp_bias(y).any()
    masked, db = k.conv2d_vjp_relu(y, y)
    assert masked.shape == y.shape and not db.any()
    pooled, index = k.max_pool2d(x, (2, 2), (2, 2))
    assert k.max_pool2d_vjp(pooled, index, x.shape, (2, 2), (2, 2)).shape == x.shape
    assert k.avg_pool2d_vjp(k.avg_pool2d(x, (2, 2), (2, 2)), x.shape, (2, 2), (2, 2)).shape == x.shape


def test_nan_and_infinity_reach_the_result():
    x, weight = np.ones((2, 1, 3, 3), "float32"), np.ones((1, 1, 1, 1), "float32")
    x[0, 0, 0, 0], x[1, 0, 1, 1] = np.nan, -np.inf
    np.testing.assert_array_equal(k.conv2d(x, weight), x)
    np.testing.assert_array_equal(k.conv2d(x, weight, relu=True), np.where(x == -np.inf, 0, x))
    g = np.where(x == 1, x, np.nan)
    np.testing.assert_array_equal(k.conv2d_vjp_relu(g, x)[0], np.where(x > 0, g, 0))


@often
@given(dtypes, layouts, layouts, st.sampled_from([1, 2, 7, 17]), st.sampled_from([1, 3, 16]), pairs(5, 12), pairs(1, 5),
       pairs(1, 3), pairs(0, 2))
def test_pooling_and_its_gradients(dtype, layout, other, n, c, size, window, stride, padding):
    assume(all(2 * p <= w for p, w in zip(padding, window, strict=True)))
    x = laid(normal(1, n, c, *size, dtype=dtype), layout)
    tx, = tensors(x)
    y, index = k.max_pool2d(x, window, stride, padding)
    expected, places = torch.nn.functional.max_pool2d(tx, window, stride, padding, return_indices=True)
    near(y, expected)
    np.testing.assert_array_equal(index, places)
    g = laid(normal(2, *y.shape, dtype=dtype), other)
    expected.backward(tensors(g)[0])
    near(k.max_pool2d_vjp(g, index, x.shape, window, stride, padding), tx.grad)
    near(k.max_pool2d_vjp(g, laid(index, other), x.shape, window, stride, padding), tx.grad)

    positive, places = k.max_pool2d(x, window, stride, padding, relu=True)
    np.testing.assert_array_equal(positive, k.max_pool2d(np.maximum(x, 0), window, stride, padding)[0])
    np.testing.assert_array_equal(places, np.where(y > 0, index, -1))
    np.testing.assert_array_equal(k.max_pool2d_vjp(g, places, x.shape, window, stride, padding),
                                  k.max_pool2d_vjp(np.where(y > 0, g, 0), index, x.shape, window, stride, padding))

    tx, = tensors(x)
    expected = torch.nn.functional.avg_pool2d(tx, window, stride, padding)
    expected.backward(tensors(g)[0])
    near(k.avg_pool2d(x, window, stride, padding), expected)
    near(k.avg_pool2d_vjp(g, x.shape, window, stride, padding), tx.grad)


def test_max_pooling_takes_the_first_of_equals_and_nan_first_of_all():
    x = np.array([[[[1, 1, 2], [1, 0, np.nan]]]], "float32")
    y, index = k.max_pool2d(x, (2, 2), (1, 1))
    assert index[0, 0, 0, 0] == 0
    assert index[0, 0, 0, 1] == 5
    assert np.isnan(y[0, 0, 0, 1])
    y, index = k.max_pool2d(x, (2, 2), (1, 1), relu=True)
    np.testing.assert_array_equal(index, [[[[0, -1]]]])
    assert np.isnan(y[0, 0, 0, 1])


def test_compiled_code_calls_them():
    @numba.njit
    def step(x, weight, bias):
        y = k.conv2d(x, weight, (1, 1), (1, 1), bias=bias, relu=True)
        pooled, index = k.max_pool2d(y, (2, 2), (2, 2))
        g = k.max_pool2d_vjp(k.avg_pool2d(pooled, (1, 1), (1, 1)), index, y.shape, (2, 2), (2, 2))
        return k.conv2d_vjp_x(g, weight, x.shape, (1, 1), (1, 1)), k.conv2d_vjp_weight(g, x, weight.shape, (1, 1), (1, 1))

    x, weight, bias = normal(1, 3, 2, 6, 6), normal(2, 4, 2, 3, 3), normal(3, 4)
    for ours, theirs in zip(step(x, weight, bias), step.py_func(x, weight, bias), strict=True):
        np.testing.assert_array_equal(ours, theirs)


IMAGE = np.zeros((2, 4, 5, 5), "float32")


@pytest.mark.parametrize(("error", "text", "call"), [
    (TypeError, "float32 and float64: convert", lambda: k.conv2d(IMAGE, np.zeros((3, 4, 2, 2)))),
    (TypeError, "not int64: convert", lambda: k.max_pool2d(np.zeros((1, 1, 3, 3), int), (2, 2), (2, 2))),
    (ValueError, r"and \(2, 4\)", lambda: k.conv2d(IMAGE, normal(1, 2, 4))),
    (ValueError, "images have shape", lambda: k.conv2d(IMAGE, normal(1, 3, 3, 2, 2))),
    (ValueError, "multiple of the groups", lambda: k.conv2d(IMAGE, normal(1, 3, 2, 2, 2), groups=2)),
    (ValueError, "finds no place in images", lambda: k.conv2d(IMAGE, normal(1, 3, 4, 6, 2))),
    (ValueError, "strides and dilations >= 1", lambda: k.conv2d(IMAGE, normal(1, 3, 4, 2, 2), (0, 1))),
    (ValueError, "winograd=True takes", lambda: k.conv2d(IMAGE, normal(1, 3, 4, 2, 2), winograd=True)),
    (ValueError, "winograd=True takes", lambda: k.conv2d_vjp_weight(IMAGE[:, :3, 1:], IMAGE, (3, 4, 2, 1), winograd=True)),
    (ValueError, "takes a bias of shape", lambda: k.conv2d(IMAGE, normal(1, 3, 4, 2, 2), bias=normal(1, 2))),
    (ValueError, "out has shape", lambda: k.conv2d(IMAGE, normal(1, 3, 4, 2, 2), out=normal(1, 2))),
    (ValueError, r"has shape \(2, 3, 4, 4\)", lambda: k.conv2d_vjp_x(IMAGE, normal(1, 3, 4, 2, 2), IMAGE.shape)),
    (ValueError, r"has shape \(2, 3, 4, 4\)", lambda: k.conv2d_vjp_weight(IMAGE, IMAGE, (3, 4, 2, 2))),
    (ValueError, "value of one shape", lambda: k.conv2d_vjp_relu(IMAGE, IMAGE[1:])),
    (ValueError, "padding of half", lambda: k.max_pool2d(IMAGE, (2, 2), (2, 2), (2, 2))),
    (ValueError, "finds no place", lambda: k.avg_pool2d(IMAGE, (6, 6), (1, 1))),
    (ValueError, "pooling takes images", lambda: k.avg_pool2d(IMAGE[0], (2, 2), (2, 2)))])
def test_what_does_not_fit_is_refused(error, text, call):
    with pytest.raises(error, match=text):
        call()
