"""Kernels of layer, group and batch normalisation: against PyTorch, in every layout, bit by bit, from @njit."""

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpiml import kernels as k

few = settings(deadline=None, max_examples=25, derandomize=True)
either = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def innermost(x):
    """The same (n, c, m) array with its samples innermost in memory."""
    return np.ascontiguousarray(x.transpose(2, 1, 0)).transpose(2, 1, 0)


def strided(x):
    wide = np.zeros((*x.shape, 2), x.dtype)
    wide[..., 0] = x
    return wide[..., 0]


def read_only(x):
    x = x.copy()
    x.flags.writeable = False
    return x


LAYOUTS = {"rows": np.ascontiguousarray, "innermost": innermost, "strided": strided, "read_only": read_only,
           "channels last": lambda x: np.ascontiguousarray(x.transpose(0, 2, 1)).transpose(0, 2, 1)}
layouts = st.sampled_from(list(LAYOUTS.values()))


def draw(seed, *shapes, dtype=np.float64, mean=0.0):
    rng = np.random.default_rng(seed)
    return [(rng.standard_normal(shape) + mean).astype(dtype) for shape in shapes]


def close(ours, theirs, dtype, scale=1.0):
    assert ours.dtype == dtype and ours.shape == tuple(theirs.shape)
    theirs = theirs.detach().numpy()
    bound = (1e-5 if dtype == np.float32 else 1e-10) * max(scale, np.abs(theirs).max(initial=0))
    assert np.abs(ours - theirs).max(initial=0) <= bound


def double(torch, *arrays):
    return [torch.tensor(a.astype(float), requires_grad=True) for a in arrays]


# --- With relu ---------------------------------------------------------------------------------------------------

@either
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(("n", "c", "m"), [(32, 16, 64), (5, 3, 7), (40, 2, 9), (1, 6, 16), (0, 4, 3)])
@pytest.mark.parametrize(("samples", "groups"), [(50, 0), (3, 0), (1, 1)])
def test_relu_in_the_same_pass_has_the_bits_of_relu_after_it(dtype, layout, n, c, m, samples, groups):
    x, g, weight, bias = draw(0, (n, c, m), (n, c, m), c, c, dtype=dtype)
    x = layout(x)
    y, mean, var = k.standardize(x, samples, 1e-3, groups, weight, bias)
    if n:
        np.testing.assert_array_equal(k.standardize(x, samples, 1e-3, groups, weight, bias, True)[0], np.maximum(y, 0))
    masked = k.standardize_vjp(np.where(y > 0, g, 0).astype(dtype), x, mean, var, samples, 1e-3, weight)
    for ours, expected in zip(k.standardize_vjp(layout(g), x, mean, var, samples, 1e-3, weight, bias, True), masked,
                              strict=True):
        np.testing.assert_array_equal(ours, expected)
    by = draw(1, c)[0].astype(dtype), draw(2, c)[0].astype(dtype) ** 2
    y = k.standardize_by(x, *by, 1e-3, weight, bias)
    np.testing.assert_array_equal(k.standardize_by(x, *by, 1e-3, weight, bias, True), np.maximum(y, 0))
    masked = k.standardize_by_vjp(np.where(y > 0, g, 0).astype(dtype), x, *by, 1e-3, weight)
    for ours, expected in zip(k.standardize_by_vjp(g, x, *by, 1e-3, weight, bias, True), masked, strict=True):
        np.testing.assert_array_equal(ours, expected)


# --- Layer normalisation --------------------------------------------------------------------------------------

@either
@given(rows=st.integers(0, 9), features=st.integers(2, 70) | st.integers(120, 330), affine=st.booleans(), layout=layouts,
       seed=st.integers(0, 99))
@few
def test_layer_norm(dtype, rows, features, affine, layout, seed):
    torch = pytest.importorskip("torch")
    x, g, weight, bias = draw(seed, (rows, features), (rows, features), features, features, dtype=dtype)
    x, g = (layout(a[:, None])[:, 0] for a in (x, g))
    xt, wt, bt = double(torch, x, weight, bias)
    yt = torch.nn.functional.layer_norm(xt, (features,), wt if affine else None, bt if affine else None, 1e-3)
    yt.backward(torch.from_numpy(np.array(g, float)))
    y, mean, scale = k.layer_norm(x, weight if affine else None, bias if affine else None, 1e-3)
    close(y, yt, dtype)
    dx, dweight, dbias = k.layer_norm_vjp(g, x, mean, scale, weight if affine else None)
    close(dx, xt.grad, dtype, 1 / np.sqrt(1e-3) if features == 2 else 1.0)
    if affine:
        close(dweight, wt.grad, dtype)
        close(dbias, bt.grad, dtype)


@pytest.mark.parametrize("features", [1, 15, 16, 17, 128, 1000])
def test_layer_norm_far_from_zero(features):
    x, = draw(0, (6, features), dtype=np.float32, mean=100)
    x[0, 0] = 1e3  # an outlier, where a row begins
    exact = x.astype(float)
    exact -= exact.mean(axis=1, keepdims=True)
    exact /= np.sqrt((exact**2).mean(axis=1, keepdims=True) + 1e-5)
    bound = 1e-5 if features < 1000 else 4e-5  # of an outlier in the first vector, as much as there are vectors is lost
    assert np.abs(k.layer_norm(x)[0] - exact).max() <= bound * max(1, np.abs(exact).max())
    assert np.abs(k.layer_norm(x)[0] - exact)[1:].max() <= 1e-5 * max(1, np.abs(exact[1:]).max())


@either
@pytest.mark.parametrize("features", [10, 75, 300, 1100])
def test_a_row_has_the_same_bits_in_any_batch(dtype, features):
    x, g, weight, bias = draw(0, (128, features), (128, features), features, features, dtype=dtype)
    y, mean, scale = k.layer_norm(x, weight, bias)
    dx = k.layer_norm_vjp(g, x, mean, scale, weight)[0]
    for rows in slice(5, 6), slice(3, 10), slice(0, 127):
        part = k.layer_norm(x[rows], weight, bias)
        np.testing.assert_array_equal(part[0], y[rows])
        np.testing.assert_array_equal(k.layer_norm_vjp(g[rows], x[rows], *part[1:], weight)[0], dx[rows])


def test_what_layer_norm_refuses():
    x = np.ones((3, 4), np.float32)
    with pytest.raises(ValueError, match=r"layer_norm takes \(rows, features\), not \(3,\)"):
        k.layer_norm(x[:, 0])
    with pytest.raises(ValueError, match=r"of shape \(3, 4\) takes a weight and bias of their length, not of shape \(3,\)"):
        k.layer_norm(x, x[:, 0])
    with pytest.raises(TypeError, match="float32 and float64"):
        k.layer_norm(x, x[0].astype(float))
    with pytest.raises(ValueError, match="contiguous out"):
        k.layer_norm(x, out=np.empty((4, 3), np.float32).T)
    with pytest.raises(ValueError, match=r"has a gradient of that shape, not \(2, 4\)"):
        k.layer_norm_vjp(x[:2], x, x[:, 0], x[:, 0])


# --- Group and batch normalisation ----------------------------------------------------------------------------

def group_norm_torch(torch, x, groups, weight, bias):
    return torch.nn.functional.group_norm(x, groups, weight, bias, 1e-3)


def batch_norm_torch(torch, x, samples, weight, bias):
    return torch.cat([torch.nn.functional.batch_norm(b, None, None, weight, bias, True, eps=1e-3) for b in x.split(samples)])


shapes = st.tuples(st.integers(1, 40), st.sampled_from([1, 2, 4, 6]), st.sampled_from([1, 2, 9, 16, 49]))


@either
@given(shape=shapes, kind=st.sampled_from(["group", "batch", "ghost"]), layout=layouts, other=layouts, seed=st.integers(0, 99))
@few
def test_standardize(dtype, shape, kind, layout, other, seed):
    torch = pytest.importorskip("torch")
    n, c, m = shape
    x, g, weight, bias = draw(seed, shape, shape, c, c, dtype=dtype)
    samples, groups = {"group": (1, 2 if c % 2 == 0 else 1), "batch": (n, c), "ghost": (3, c)}[kind]
    xt, wt, bt = double(torch, x, weight, bias)
    if kind == "group":
        if c // groups * m == 1:
            return
        yt = group_norm_torch(torch, xt, groups, wt, bt)
    else:
        if min(samples, n % samples or samples) * m == 1:
            return
        yt = batch_norm_torch(torch, xt, samples, wt, bt)
    yt.backward(torch.from_numpy(g.astype(float)))
    x, g = layout(x), other(g)
    y, mean, var = k.standardize(x, samples, 1e-3, groups, weight, bias)
    assert mean.shape == var.shape == (-(-n // samples), groups)
    few_values = min(samples, n) * m * (c // groups) < 5
    close(y, yt, dtype)
    for ours, theirs in zip(k.standardize_vjp(g, x, mean, var, samples, 1e-3, weight), (xt, wt, bt), strict=True):
        close(ours, theirs.grad, dtype, 30.0 if few_values else 1.0)
    if layout is innermost and n * c * x.itemsize >= 64:
        assert y.transpose(2, 1, 0).flags.c_contiguous


@either
@given(shape=shapes, layout=layouts, other=layouts, seed=st.integers(0, 99))
@few
def test_standardize_by_given_statistics(dtype, shape, layout, other, seed):
    torch = pytest.importorskip("torch")
    x, g, mean, var, weight, bias = draw(seed, shape, shape, *[shape[1]] * 4, dtype=dtype)
    var = np.exp(var)
    xt, wt, bt = double(torch, x, weight, bias)
    yt = torch.nn.functional.batch_norm(xt, torch.from_numpy(mean.astype(float)), torch.from_numpy(var.astype(float)), wt, bt)
    yt.backward(torch.from_numpy(g.astype(float)))
    x, g = layout(x), other(g)
    close(k.standardize_by(x, mean, var, 1e-5, weight, bias), yt, dtype)
    for ours, theirs in zip(k.standardize_by_vjp(g, x, mean, var, 1e-5, weight), (xt, wt, bt), strict=True):
        close(ours, theirs.grad, dtype)


@pytest.mark.parametrize("layout", [np.ascontiguousarray, innermost])
@pytest.mark.parametrize("samples, groups", [(1, 2), (32, 4), (8, 4)])
def test_images_far_from_zero(layout, samples, groups):
    x, = draw(0, (32, 4, 49), dtype=np.float32, mean=100)
    x[0, :, 0] = 1e3
    y, _, var = k.standardize(layout(x), samples, 1e-5, groups)
    exact = x.astype(float).reshape(32 // samples, samples, groups, -1, 49)
    axes = (1, 3, 4)
    exact = exact - exact.mean(axis=axes, keepdims=True)
    square = (exact**2).mean(axis=axes, keepdims=True)
    np.testing.assert_allclose(var, square[:, 0, :, 0, 0], rtol=1e-5)
    exact = (exact / np.sqrt(square + 1e-5)).reshape(x.shape)
    assert np.abs(y - exact).max() <= 1e-5 * np.abs(exact).max()


@either
def test_a_sample_has_the_same_bits_in_any_batch_and_layout(dtype):
    x, g, weight, bias = draw(0, (128, 6, 25), (128, 6, 25), 6, 6, dtype=dtype)
    y, mean, var = k.standardize(x, 1, 1e-5, 2, weight, bias)
    dx = k.standardize_vjp(g, x, mean, var, 1, 1e-5, weight)[0]
    fixed = k.standardize_by(x, bias, weight**2, 1e-5, weight, bias)
    for rows in slice(5, 6), slice(3, 10), slice(0, 128):
        for layout in np.ascontiguousarray, innermost:
            a, b = layout(x[rows]), layout(g[rows])
            part = k.standardize(a, 1, 1e-5, 2, weight, bias)
            np.testing.assert_array_equal(part[0], y[rows])
            np.testing.assert_array_equal(k.standardize_vjp(b, a, *part[1:], 1, 1e-5, weight)[0], dx[rows])
            np.testing.assert_array_equal(k.standardize_by(a, bias, weight**2, 1e-5, weight, bias), fixed[rows])


@either
@pytest.mark.parametrize("layout", [np.ascontiguousarray, innermost])
@pytest.mark.parametrize("samples", [3, 16, 20])
def test_a_block_has_the_same_bits_in_any_batch(dtype, layout, samples):
    x, g, weight, bias = draw(0, (47, 6, 25), (47, 6, 25), 6, 6, dtype=dtype)
    y, mean, var = k.standardize(layout(x), samples, 1e-5, 0, weight, bias)
    dx = k.standardize_vjp(layout(g), layout(x), mean, var, samples, 1e-5, weight)[0]
    for b in range(len(mean)):
        rows = slice(b * samples, (b + 1) * samples)
        part = k.standardize(layout(x[rows]), samples, 1e-5, 0, weight, bias)
        for ours, whole in zip(part, (y[rows], mean[b:b + 1], var[b:b + 1]), strict=True):
            np.testing.assert_array_equal(ours, whole)
        np.testing.assert_array_equal(
            k.standardize_vjp(layout(g[rows]), layout(x[rows]), *part[1:], samples, 1e-5, weight)[0], dx[rows])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("layout", [np.ascontiguousarray, innermost])
@pytest.mark.parametrize("n", [1, 5, 32])
def test_what_is_not_finite_stays_in_its_channel(bad, layout, n):
    x, = draw(0, (n, 4, 25), dtype=np.float32)
    x[n // 2, 2, 24] = bad
    y, mean, var = k.standardize(layout(x), n, 1e-5, 0)
    assert np.isnan(y[:, 2]).all() and not np.isfinite(mean[:, 2]).any() and np.isnan(var[:, 2]).all()
    assert np.isfinite(np.delete(y, 2, axis=1)).all()
    assert np.isnan(k.standardize(layout(x), n, 1e-5, 0, relu=True)[0][:, 2]).all()


@pytest.mark.parametrize("features", [7, 40, 300])
def test_what_is_not_finite_stays_in_its_row(features):
    x, = draw(0, (21, features), dtype=np.float32)
    for row, bad in (2, np.nan), (11, np.inf), (20, np.nan):
        x[row, row % features] = bad
    finite = np.isfinite(k.layer_norm(x)[0])
    np.testing.assert_array_equal(finite, np.repeat(np.isfinite(x).all(axis=1, keepdims=True), features, axis=1))


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 4, 0)])
def test_empty_images(shape):
    x, weight = np.ones(shape, np.float32), np.ones(shape[1], np.float32)
    y, mean, var = k.standardize(x, 2, 1e-5, 0, weight, weight)
    assert y.shape == shape and mean.size == var.size == 0
    dx, dweight, dbias = k.standardize_vjp(x, x, mean, var, 2, 1e-5, weight)
    assert dx.shape == shape and not dweight.any() and not dbias.any()
    assert k.standardize_by(x, weight, weight).shape == shape


def test_what_standardize_refuses():
    x = np.ones((4, 6, 5), np.float32)
    with pytest.raises(ValueError, match=r"takes \(samples, channels, places\), not \(4, 6\)"):
        k.standardize(x[..., 0])
    with pytest.raises(ValueError, match=r"of shape \(4, 6, 5\) takes .* groups that divide the channels, not 1 and 4"):
        k.standardize(x, 1, 1e-5, 4)
    with pytest.raises(ValueError, match=r"of shape \(4, 6, 5\) takes one number for each channel, not \(5,\)"):
        k.standardize(x, weight=x[0, 0])
    with pytest.raises(TypeError, match="float32 and float64"):
        k.standardize(x, bias=np.ones(6))
    _, mean, var = k.standardize(x, 2)
    with pytest.raises(ValueError, match=r"in blocks of 1 .* statistics of each block, not \(2, 6\)"):
        k.standardize_vjp(x, x, mean, var, 1)


def test_norms_in_compiled_code():
    @numba.njit
    def norms(x, g, weight):
        y, mean, var = k.standardize(x, 2, 1e-5, 0, weight, weight)
        dx, dweight, dbias = k.standardize_vjp(g, x, mean, var, 2, 1e-5, weight)
        z = k.standardize_by(x, weight, weight * weight)
        rows, center, scale = k.layer_norm(x[:, :, 0], weight)
        drows = k.layer_norm_vjp(g[:, :, 0], x[:, :, 0], center, scale, weight)
        return y, mean, var, dx, dweight, dbias, z, rows, drows[0], drows[1]

    x, g, weight = draw(0, (8, 6, 5), (8, 6, 5), 6)
    for layout in np.ascontiguousarray, innermost:
        a, b = layout(x), layout(g)
        for ours, theirs in zip(norms(a, b, weight), norms.py_func(a, b, weight), strict=True):
            np.testing.assert_array_equal(ours, theirs)
