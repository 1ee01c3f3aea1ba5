"""Elementwise kernels, softmax, cross-entropy and losses against PyTorch, in every memory layout, from Python and @njit."""

import math

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpiml import kernels as k
from mpiml.kernels import aligned

t = pytest.importorskip("torch")
F = t.nn.functional

DTYPES = [np.float32, np.float64]
TOLERANCE = {np.float32: 1e-5, np.float64: 1e-10}
# name: torch's function; whether the vjp takes the result instead of the argument
FUNCTIONS = {
    "exp": (t.exp, True), "log": (lambda x: t.log(x.abs() + 0.1), False), "tanh": (t.tanh, True), "sigmoid": (t.sigmoid, True),
    "relu": (t.relu, True), "silu": (F.silu, False), "gelu": (F.gelu, False),
    "softmax": (lambda x: t.softmax(x, -1), True), "log_softmax": (lambda x: t.log_softmax(x, -1), True),
}
SHAPES = st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(lambda shape: np.prod(shape) < 20000)
LAYOUTS = {
    "contiguous": lambda x: x,
    "reversed axes": lambda x: np.asfortranarray(x),
    "first axis innermost": lambda x: np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 0, -1)), -1, 0),
    "strided": lambda x: np.repeat(x, 2, axis=-1)[..., ::2],
    "backwards": lambda x: x[::-1].copy()[::-1],
}


def close(value, expected, dtype):
    assert value.dtype == dtype
    assert value.shape == expected.shape
    scale = max(1, np.abs(expected).max(initial=0))
    np.testing.assert_allclose(value, expected, rtol=0, atol=TOLERANCE[dtype] * scale)


def read_only(x):
    x.flags.writeable = False
    return x


@pytest.mark.parametrize("name", FUNCTIONS)
@settings(deadline=None, max_examples=25, derandomize=True)
@given(shape=SHAPES, dtype=st.sampled_from(DTYPES), layout=st.sampled_from(sorted(LAYOUTS)), seed=st.integers(0, 99))
def test_against_torch(name, shape, dtype, layout, seed):
    rng = np.random.default_rng(seed)
    x, g = (rng.standard_normal(shape).astype(dtype) * 3 for _ in range(2))
    if not shape[-1] and "softmax" in name:
        return
    theirs = t.from_numpy(x.copy()).requires_grad_()
    expected = FUNCTIONS[name][0](theirs)
    slope, = t.autograd.grad(expected, theirs, t.from_numpy(g.copy()))
    ours = np.abs(x) + dtype(0.1) if name == "log" else x
    x, g = read_only(LAYOUTS[layout](ours)), read_only(LAYOUTS[layout](g))
    y = getattr(k, name)(x)
    close(y, expected.detach().numpy(), dtype)
    gradient = getattr(k, name + "_vjp")(g, y if FUNCTIONS[name][1] else x)
    if name == "log":
        slope = slope * t.sign(theirs)
    close(gradient, slope.detach().numpy(), dtype)
    out = np.empty(shape, dtype)
    assert getattr(k, name)(x, out=out) is out
    np.testing.assert_array_equal(out, y)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tanh_form_of_gelu(dtype):
    x = np.linspace(-12, 12, 999, dtype=dtype)
    theirs = t.from_numpy(x.copy()).requires_grad_()
    y = F.gelu(theirs, approximate="tanh")
    close(k.gelu(x, True), y.detach().numpy(), dtype)
    close(k.gelu_vjp(np.ones_like(x), x, True), t.autograd.grad(y.sum(), theirs)[0].numpy(), dtype)


@pytest.mark.parametrize(("name", "reference", "ulps", "low", "high"), [
    ("exp", np.exp, 1, -87, 88.7), ("log", np.log, 1, 1e-30, 1e30), ("tanh", np.tanh, 3.5, -12, 12),
    ("sigmoid", lambda x: 1 / (1 + np.exp(-x)), 3, -80, 40)])
def test_stated_errors(name, reference, ulps, low, high):
    rng = np.random.default_rng(0)
    for dtype, wide in (np.float32, np.float64), (np.float64, np.longdouble):
        x = (np.exp(rng.uniform(np.log(low), np.log(high), 200000)) if name == "log" else rng.uniform(low, high, 200000))
        x = np.concatenate([x, x * 1e-3]).astype(dtype)
        exact = reference(x.astype(wide))
        assert np.max(np.abs(getattr(k, name)(x) - exact) / np.spacing(np.abs(exact).astype(dtype))) <= ulps


def test_stated_errors_of_gelu():
    """Relative ones, far into the tail; the reference is in float64 and, there, no better than it."""
    x = np.concatenate([np.linspace(-12.9, 8, 200000), np.random.default_rng(0).normal(size=200000)])
    for dtype, bound in (np.float32, lambda x: 7), (np.float64, lambda x: 8 + 2 * x * x):
        x = x.astype(dtype)
        below = np.array([math.erfc(-v / math.sqrt(2)) / 2 for v in x.tolist()])
        wide = x.astype(float)
        assert (np.abs(k.gelu(x) - wide * below) <= bound(x) * np.spacing(np.abs((wide * below).astype(dtype)))).all()
        slope = below + wide * np.exp(-wide * wide / 2) / math.sqrt(2 * math.pi)
        error = np.abs(k.gelu_vjp(np.ones_like(x), x) - slope)
        assert error.max() <= 2 * np.finfo(dtype).eps
        tail = x < -1.5  # the slope is 0 at -0.75
        assert (error[tail] <= bound(x[tail]) * np.spacing(np.abs(slope[tail].astype(dtype)))).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_limits(dtype):
    inf, nan, tiny = np.inf, np.nan, np.finfo(dtype).smallest_subnormal
    x = np.array([0, -0.0, inf, -inf, nan, 1e4, -1e4], dtype)
    np.testing.assert_array_equal(k.exp(x), [1, 1, inf, 0, nan, inf, 0])
    np.testing.assert_array_equal(k.tanh(x), [0, -0.0, 1, -1, nan, 1, -1])
    np.testing.assert_array_equal(k.sigmoid(x), [0.5, 0.5, 1, 0, nan, 1, 0])
    np.testing.assert_array_equal(k.relu(x), [0, 0, inf, 0, nan, 1e4, 0])
    np.testing.assert_array_equal(k.gelu(x)[[0, 2, 4, 5, 6]], [0, inf, nan, 1e4, 0])
    np.testing.assert_array_equal(k.log(np.array([0, -1, inf, -inf, nan, 1], dtype)), [-inf, nan, inf, nan, nan, 0])
    small = np.array([tiny, np.finfo(dtype).tiny / 3], dtype)
    np.testing.assert_allclose(k.log(small), np.log(small), rtol=1e-6)
    low = np.log(np.finfo(dtype).tiny) - 3  # gradual underflow
    np.testing.assert_allclose(k.exp(np.array([low], dtype)), np.exp(np.array([low], dtype)), rtol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (7, 5), (300, 101)])
def test_large_results_begin_at_a_cache_line(shape, dtype):
    x = aligned.array(shape, dtype)
    assert (x.shape, x.dtype) == (shape, dtype) and x.flags.c_contiguous and x.flags.writeable
    x[...] = 1
    for y in x, aligned.zeros(x.size, dtype), k.relu(x):
        assert y.nbytes < aligned.LARGE or y.ctypes.data % aligned.LINE == 0
    assert (k.relu(x) == 1).all() and not aligned.zeros(x.size, dtype).any()


def test_results_lie_in_memory_as_their_arguments():
    x = np.random.default_rng(0).standard_normal((5, 6, 3, 4)).astype(np.float32).transpose(3, 2, 0, 1)
    for y in k.relu(x), k.relu_vjp(x, x), k.gelu(x), k.relu_vjp(np.ascontiguousarray(x), x), k.dropout(x, 0.5, 1):
        assert y.strides == x.strides
    np.testing.assert_array_equal(k.dropout(x, 0.5, 1), k.dropout(np.ascontiguousarray(x), 0.5, 1))


def test_dropout_mask_of_old():
    # Philox 4x32-10 of counter (block, 0, sample), key 0: the first words from Salmon's reference implementation.
    y = k.dropout(np.ones((1, 4), np.float32), 0.5, 0)
    words = np.array([0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8])
    np.testing.assert_array_equal(y[0] != 0, words >= 2**31)


def philox(counter, key):
    """Philox 4x32-10 in Python's numbers of any size."""
    (a, b, c, d), (k0, k1) = counter, key
    for _ in range(10):
        left, right = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = right >> 32 ^ b ^ k0, right % 2**32, left >> 32 ^ d ^ k1, left % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return a, b, c, d


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 6, 256, 300, 517])
def test_dropout_masks_by_their_definition(size, dtype):
    key, first = 0xFEDCBA9876543210, 2**32 - 1  # samples on both sides of what 32 bits hold
    x = np.random.default_rng(0).standard_normal((2, size)).astype(dtype)
    x[0, 0] = np.nan
    x[1, -1] = np.inf
    y = k.dropout(x, 0.4, key, first)
    for sample in range(2):
        high, low = divmod(first + sample, 2**32)
        words = [w for i in range(-(-size // 4)) for w in philox((i, 0, low, high), (key % 2**32, key >> 32))][:size]
        kept = np.array(words) >= 0.4 * 2**32
        np.testing.assert_array_equal(y[sample], np.where(kept, x[sample] * dtype(1 / 0.6), dtype(0)))


@settings(deadline=None, max_examples=25, derandomize=True)
@given(rows=st.integers(1, 40), classes=st.integers(1, 70), dtype=st.sampled_from(DTYPES),
       smoothing=st.sampled_from([0.0, 0.1]), seed=st.integers(0, 99))
def test_label_loss(rows, classes, dtype, smoothing, seed):
    rng = np.random.default_rng(seed)
    x, labels = 5 * rng.standard_normal((rows, classes)).astype(dtype), rng.integers(0, classes, rows)
    labels[rng.random(rows) < 0.2] = -100
    theirs = t.from_numpy(x.copy()).requires_grad_()
    expected = F.cross_entropy(theirs, t.from_numpy(labels), reduction="sum", label_smoothing=smoothing)
    loss, p = k.label_loss(read_only(x), labels, smoothing)
    assert loss == pytest.approx(float(expected.detach()), rel=TOLERANCE[dtype], abs=TOLERANCE[dtype])
    expected.backward()
    for g in 0.5, 1.0:
        gradient = k.label_loss_vjp(g, p, labels, smoothing)
        np.testing.assert_array_equal(k.label_loss_vjp(g, p.copy(), labels, smoothing, out=np.empty_like(p)), gradient)
        q = p.copy()
        np.testing.assert_array_equal(k.label_loss_vjp(g, q, labels, smoothing, out=q), gradient)
        close(gradient, g * theirs.grad.numpy(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["huber", "binary", "squared", "absolute"])
def test_losses(name, dtype):
    rng = np.random.default_rng(0)
    more = (0.7,) if name == "huber" else ()
    for shape in (0,), (1,), (7, 3), (33, 65), (4, 5, 6):
        x, target = 3 * rng.standard_normal(shape).astype(dtype), rng.random(shape).astype(dtype)
        theirs, goal = t.from_numpy(x).requires_grad_(), t.from_numpy(target)
        expected = {"huber": lambda x, y: F.huber_loss(x, y, "sum", 0.7), "squared": lambda x, y: ((x - y)**2).sum(),
                    "absolute": lambda x, y: (x - y).abs().sum(),
                    "binary": lambda x, y: F.binary_cross_entropy_with_logits(x, y, reduction="sum")}[name](theirs, goal)
        for layout in LAYOUTS.values():
            loss = getattr(k, name)(layout(x), layout(target), *more)
            assert loss == pytest.approx(float(expected.detach()), rel=TOLERANCE[dtype], abs=1e-12)
        if name in ("huber", "binary"):
            gradient = getattr(k, name + "_vjp")(1.0, x, target, *more)
            close(gradient, t.autograd.grad(expected, theirs)[0].numpy(), dtype)
    assert k.binary(np.array([1e3, -1e3, 30], dtype), np.array([1, 0, 1], dtype)) == pytest.approx(np.exp(-30), rel=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 10, 65, 300])
def test_rows_do_not_depend_on_the_batch(n, dtype):
    x = np.random.default_rng(0).standard_normal((128, n)).astype(dtype)
    for f in k.softmax, k.log_softmax, lambda x: k.label_loss(x, np.zeros(len(x), int))[1], k.gelu, k.tanh:
        whole = f(x)
        for size in 1, 7:
            parts = np.concatenate([f(x[i:i + size]) for i in range(0, 128, size)])
            np.testing.assert_array_equal(parts, whole)


@pytest.mark.parametrize(("error", "words", "f"), [
    (TypeError, "exp takes float32 or float64, not int64", lambda x: k.exp(np.arange(3))),
    (TypeError, "arrays of float64 and float32", lambda x: k.relu_vjp(x, x.astype(float))),
    (ValueError, r"add_relu adds arrays of one shape, not \(4,\)", lambda x: k.add_relu(np.ones(4, np.float32), x)),
    (ValueError, r"gradient of shape \(4,\)", lambda x: k.relu_vjp(np.zeros(4, np.float32), x)),
    (ValueError, "out has shape", lambda x: k.tanh(x, out=np.empty(4, np.float32))),
    (ValueError, "has gaps", lambda x: k.tanh(x, out=np.empty((2, 6), np.float32)[:, ::2])),
    (ValueError, "label 3 at position 1", lambda x: k.label_loss(x, np.array([0, 3]))),
    (ValueError, "one label a row", lambda x: k.label_loss(x, np.array([0]))),
    (ValueError, "C-contiguous out", lambda x: k.label_loss_vjp(1.0, x, np.zeros(2, int), out=np.empty((3, 2), x.dtype).T)),
    (ValueError, "one shape", lambda x: k.squared(x, x[0])),
])
def test_errors(error, words, f):
    with pytest.raises(error, match=words):
        f(np.zeros((2, 3), np.float32))


def test_from_compiled_code():
    @numba.njit
    def step(x, labels):
        y = k.gelu(k.relu(x), True)
        loss, p = k.label_loss(y, labels)
        g = k.label_loss_vjp(1.0, p, labels)
        return loss, k.relu_vjp(k.gelu_vjp(g, x, True), k.softmax(x)), k.dropout(x, 0.5, 1), k.huber(x, y, 1.0)

    x, labels = np.random.default_rng(0).standard_normal((7, 5)), np.array([0, 1, 2, 3, 4, 0, 1])
    for ours, expected in zip(step(x, labels), step.py_func(x, labels), strict=True):
        np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(1, 1), (5, 10), (3, 4, 65), (7, 16), (2, 1000), (0, 3)])
def test_logsumexp_against_its_definition(shape, dtype):
    rng = np.random.default_rng(0)
    x = (30 * rng.standard_normal(shape)).astype(dtype)
    y = k.logsumexp(x)
    top = x.astype(float).max(axis=-1, keepdims=True, initial=-np.inf)
    want = np.log(np.exp(x - top).sum(axis=-1)) + top[..., 0]
    np.testing.assert_allclose(y, want, rtol=1e-6 if dtype == np.float32 else 1e-14)
    g = rng.standard_normal(y.shape).astype(dtype)
    np.testing.assert_allclose(k.logsumexp_vjp(g, x, y), np.exp(x - want[..., None]) * g[..., None], rtol=1e-4, atol=1e-6)


def test_logsumexp_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one number"):
        k.logsumexp(np.zeros((3, 0)))
