"""Matrix products: against PyTorch over random shapes, layouts and edges; same row, same bits; errors; in @njit."""

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpiml import kernels as k

SIZES = st.one_of(st.integers(1, 40), st.sampled_from([0, 1, 15, 16, 17, 31, 32, 33, 64, 100, 257]))
DTYPES = st.sampled_from([np.float32, np.float64])
LAYOUTS = st.sampled_from(["C", "F", "strided", "read-only"])


def array(seed, shape, dtype, layout="C"):
    rng = np.random.default_rng(seed)
    if layout == "strided":
        wide = rng.standard_normal([2 * n for n in shape]).astype(dtype)
        return wide[tuple(slice(None, None, 2) for _ in shape)]
    a = np.asarray(rng.standard_normal(shape).astype(dtype), order="F" if layout == "F" else "C")
    a.flags.writeable = layout != "read-only"
    return a


def close(ours, theirs):
    tolerance = 1e-5 if ours.dtype == np.float32 else 1e-10
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance * max(1.0, np.abs(theirs).max(initial=0)))


@settings(deadline=None, max_examples=60, derandomize=True)
@given(SIZES, SIZES, SIZES, DTYPES, LAYOUTS, LAYOUTS, st.booleans(), st.booleans())
def test_linear_and_its_gradients_against_pytorch(rows, inputs, outputs, dtype, x_layout, w_layout, biased, relu):
    torch = pytest.importorskip("torch")
    x, w = array(1, (rows, inputs), dtype, x_layout), array(2, (outputs, inputs), dtype, w_layout)
    b = array(3, (outputs,), dtype) if biased else None
    tx, tw, tb = (None if a is None else torch.tensor(a.copy(), requires_grad=True) for a in (x, w, b))
    ty = torch.nn.functional.linear(tx, tw, tb)
    ty = ty.relu() if relu else ty
    y = k.linear(x, w, b, relu)
    close(y, ty.detach().numpy())
    g = array(4, y.shape, dtype, x_layout)
    ty.backward(torch.tensor(g.copy()))
    dx, dw, db = np.empty(x.shape, dtype), np.ones(w.shape, dtype, order="F"), np.ones(outputs, dtype)
    k.linear_vjp(g, x, w, y if relu else None, dx, dw, db, add=True)
    close(dx, tx.grad.numpy())
    close(dw - 1, tw.grad.numpy())
    if biased:
        close(db - 1, tb.grad.numpy())
    if not relu:
        close(k.linear_vjp_x(g, w), tx.grad.numpy())
        close(k.linear_vjp_weight(g, x), tw.grad.numpy())


@settings(deadline=None, max_examples=40, derandomize=True)
@given(st.integers(0, 4), SIZES, SIZES, SIZES, DTYPES, LAYOUTS, LAYOUTS, st.sampled_from(["both", "a", "b"]))
def test_matmul_against_numpy(n, rows, inner, columns, dtype, a_layout, b_layout, stacked):
    a = array(1, (1 if stacked == "b" else n, rows, inner), dtype, a_layout)
    b = array(2, (1 if stacked == "a" else n, inner, columns), dtype, b_layout)
    want = np.matmul(a.astype(float), b.astype(float)).astype(dtype)
    close(k.matmul(a, b), want)
    for out in np.empty(want.shape, dtype), np.empty(want.shape[::-1], dtype).T, np.empty((*want.shape, 2), dtype)[..., 0]:
        assert k.matmul(a, b, out=out) is out
        close(out, want)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("inputs", "outputs"), [(784, 128), (13, 10), (300, 700), (1, 1)])
def test_a_row_has_the_same_bits_in_any_batch(inputs, outputs, dtype):
    x, w, b = array(1, (128, inputs), dtype), array(2, (outputs, inputs), dtype, "F"), array(3, (outputs,), dtype)
    whole, whole_dx = k.linear(x, w, b, True), k.linear_vjp_x(array(4, (128, outputs), dtype), w)
    for rows in 1, 7, 33:
        np.testing.assert_array_equal(k.linear(x[:rows], w, b, True), whole[:rows])
        np.testing.assert_array_equal(k.linear(x[-rows:], np.ascontiguousarray(w), b, True), whole[-rows:])
        np.testing.assert_array_equal(k.linear_vjp_x(array(4, (128, outputs), dtype)[:rows], w), whole_dx[:rows])


def test_the_weight_gradient_of_parts_is_that_of_the_whole():
    x, g, w = array(1, (96, 40), np.float32), array(2, (96, 24), np.float32), array(3, (24, 40), np.float32, "F")
    whole, parts = np.zeros_like(w), np.zeros_like(w)
    k.linear_vjp(g, x, w, dweight=whole, add=True)
    for start in range(0, 96, 32):
        k.linear_vjp(g[start:start + 32], x[start:start + 32], w, dweight=parts, add=True)
    np.testing.assert_array_equal(parts, whole)  # one sum, taken up where it was left


def test_nan_and_infinity_go_through():
    x = np.array([[1, np.nan], [np.inf, 1], [1, 1]], np.float32)
    y = k.linear(x, np.ones((3, 2), np.float32), relu=True)
    assert np.isnan(y[0]).all() and np.isinf(y[1]).all() and (y[2] == 2).all()


@pytest.mark.parametrize(("error", "words", "call"), [
    (ValueError, r"takes 4 features \(weight \(5, 4\)\), but the input of shape \(2, 3\) has 3",
     lambda z: k.linear(z(2, 3), z(5, 4))),
    (ValueError, r"bias of shape \(5,\), not \(4,\)", lambda z: k.linear(z(2, 4), z(5, 4), z(4))),
    (ValueError, r"out has shape \(2, 4\) .* the result \(2, 5\)", lambda z: k.linear(z(2, 4), z(5, 4), out=z(2, 4))),
    (ValueError, "C-contiguous", lambda z: k.linear(z(2, 4), z(5, 4), out=z(5, 2).T)),
    (TypeError, "float32 or float64, not int64", lambda z: k.linear(np.zeros((2, 4), np.int64), z(5, 4))),
    (TypeError, "float32 and float64", lambda z: k.linear(z(2, 4), z(5, 4).astype(float))),
    (ValueError, "gradient of shape", lambda z: k.linear_vjp(z(2, 4), z(2, 4), z(5, 4), dx=z(2, 4))),
    (ValueError, "neither C- nor Fortran-contiguous",
     lambda z: k.linear_vjp(z(2, 5), z(2, 4), z(5, 4), dweight=z(10, 8)[::2, ::2])),
    (ValueError, r"not \(2, 3, 4\) and \(3, 4, 5\)", lambda z: k.matmul(z(2, 3, 4), z(3, 4, 5))),
    (ValueError, r"not \(3, 4\) and \(4, 5\)", lambda z: k.matmul(z(3, 4), z(4, 5))),
])
def test_errors_name_both_shapes(error, words, call):
    with pytest.raises(error, match=words):
        call(lambda *shape: np.zeros(shape, np.float32))


@numba.njit
def _two_layers(x, w1, b1, w2):
    return k.linear(k.linear(x, w1, b1, True), w2)


@numba.njit
def _wrong(x, w):
    return k.linear(x, w)


@pytest.mark.parametrize("shape", [(5, 6), (2, 5, 6)])
def test_in_compiled_code(shape):
    x, w1, b1, w2 = (array(i, s, np.float32) for i, s in enumerate([shape, (9, 6), (9,), (3, 9)]))
    np.testing.assert_array_equal(_two_layers(x, w1, b1, w2), k.linear(k.linear(x, w1, b1, True), w2))
    with pytest.raises(ValueError, match="linear takes"):
        _wrong(x, w2)


def test_a_read_only_array_is_never_written():
    x, w, labels = np.ones((4, 4), np.float32), np.ones((4, 4), np.float32), np.zeros(4, int)
    out = np.zeros((4, 4), np.float32)
    out.flags.writeable = False
    for write in (lambda: k.linear(x, w, out=out), lambda: k.matmul(x[None], w[None], out=out[None]),
                  lambda: k.linear_vjp(x, x, w, dweight=out), lambda: k.linear_vjp(x, x, w, dx=out),
                  lambda: k.relu(x, out=out), lambda: k.softmax(x, out=out), lambda: k.layer_norm(x, out=out),
                  lambda: k.embedding(labels, x, out=out), lambda: k.embedding_vjp(x, labels, 4, out=out),
                  lambda: k.attention(x[None, None], x[None, None], x[None, None], out=out[None, None]),
                  lambda: k.sgd(out[0], x[0], np.empty(0, np.float32), 0.1)):
        with pytest.raises(ValueError, match="read-only"):
            write()
    assert not out.any()


def test_the_gradient_of_no_rows_is_zero():
    assert (k.linear_vjp_weight(np.ones((0, 3)), np.ones((0, 2))) == 0).all()
    assert (k.linear_vjp_bias(np.ones((0, 3))) == 0).all()
