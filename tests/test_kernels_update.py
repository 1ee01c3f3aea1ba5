"""Kernels of optimizers, embeddings and conversions: against PyTorch, at odd sizes, in strange memory, from @njit."""

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpiml import kernels as k

few = settings(deadline=None, max_examples=25, derandomize=True)
either = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def vectors(n, dtype, count=4, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.uniform(0.1, 1, n).astype(dtype) for _ in range(count)]


def close(ours, theirs, dtype):
    assert ours.dtype == dtype
    theirs = np.asarray(theirs)
    assert np.abs(ours - theirs).max(initial=0) <= (1e-5 if dtype == np.float32 else 1e-10) * np.abs(theirs).max(initial=1)


# --- Optimizers -----------------------------------------------------------------------------------------------

@either
@given(n=st.integers(0, 200), nesterov=st.booleans(), decay=st.sampled_from([0.0, 0.1]), seed=st.integers(0, 99))
@few
def test_sgd_against_pytorch(dtype, n, nesterov, decay, seed):
    torch = pytest.importorskip("torch")
    w, g, *_ = vectors(n, dtype, 2, seed)
    velocity = np.zeros(n, dtype)
    parameter = torch.nn.Parameter(torch.from_numpy(w.copy()))
    theirs = torch.optim.SGD([parameter], 0.1, 0.9, nesterov=nesterov, weight_decay=decay)
    for _ in range(3):
        parameter.grad = torch.from_numpy(g.copy())
        theirs.step()
        used = g.copy()
        k.sgd(w, used, velocity, 0.1, 0.9, nesterov, decay)
        assert not used.any()
    close(w, parameter.detach().numpy(), dtype)


@either
@given(n=st.integers(0, 200), decay=st.sampled_from([0.0, 0.1]), seed=st.integers(0, 99))
@few
def test_adamw_against_pytorch(dtype, n, decay, seed):
    torch = pytest.importorskip("torch")
    w, g, *_ = vectors(n, dtype, 2, seed)
    m, v = np.zeros(n, dtype), np.zeros(n, dtype)
    parameter = torch.nn.Parameter(torch.from_numpy(w.copy()))
    theirs = torch.optim.AdamW([parameter], 0.1, weight_decay=decay)
    for t in range(1, 4):
        parameter.grad = torch.from_numpy(g.copy())
        theirs.step()
        used = g.copy()
        k.adam(w, used, m, v, 0.1, 0.9, 0.999, 1 - 0.9, 1 - 0.999, 1 - 0.9**t, 1 - 0.999**t, 1e-8, 0.0, decay)
        assert not used.any()
    close(w, parameter.detach().numpy(), dtype)


def lamb(w, g, m, v, bounds, adapt):
    k.lamb(w, g, m, v, bounds, adapt, 0.1, 0.9, 0.99, 0.1, 0.01, 0.1, 0.01, 1e-6, 0.05)


def lars(w, g, m, v, bounds, adapt):
    k.lars(w, g, m, bounds, adapt, 0.1, 0.9, 0.05, 0.02)


@either
@pytest.mark.parametrize("update", [lars, lamb])
def test_a_parameter_does_not_know_its_neighbours(update, dtype):
    whole = vectors(57, dtype)
    parts = [a.copy() for a in whole]
    bounds, adapt = np.array([0, 5, 5, 40, 57]), np.array([True, True, False, True])
    update(*whole, bounds, adapt)
    for start, stop, own in zip(bounds[:-1], bounds[1:], adapt, strict=True):
        alone = [a[start:stop].copy() for a in parts]
        update(*alone, np.array([0, stop - start]), np.array([own]))
        for a, b in zip(whole, alone, strict=True):
            np.testing.assert_allclose(a[start:stop], b, rtol=8 * np.finfo(dtype).eps)


@pytest.mark.parametrize("update", [lars, lamb])
@pytest.mark.parametrize("bounds", [[0, 5], [0, 5, 9], [1, 5, 10], [0, 11, 10], [0, 5, 8, 10]])
def test_bounds_of_another_vector(update, bounds):
    before = vectors(10, np.float32)
    after = [a.copy() for a in before]
    with pytest.raises(ValueError, match="of a vector of 10 numbers takes bounds from 0 to that, one more than the 2"):
        update(*after, np.array(bounds), np.array([True, False]))
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_updates_refuse():
    w, g, m, v = vectors(10, np.float32)
    with pytest.raises(ValueError, match=r"sgd updates vectors of one length, not of shapes \(10,\), \(9,\), \(10,\)"):
        k.sgd(w, g[:9], m, 0.1, 0.9)
    with pytest.raises(ValueError, match="sgd updates contiguous vectors in place"):
        k.sgd(w[::2], g[:5], m[:5], 0.1, 0.9)
    with pytest.raises(TypeError, match="adam got arrays of float32 and float64"):
        k.adam(w, g.astype(float), m, v, *[0.1] * 8)
    with pytest.raises(TypeError, match="norm takes float32 or float64, not int64"):
        k.norm(np.arange(3))


@either
@pytest.mark.parametrize("n", [0, 1, 7, 1000, 100_003])
def test_norm_and_scale(n, dtype):
    g, = vectors(n, dtype, 1)
    assert k.norm(g) == pytest.approx(np.linalg.norm(g.astype(float)), rel=1e-13)
    expected = g * dtype(0.3)
    assert k.scale(g, 0.3) == pytest.approx(expected.astype(float).sum(), rel=1e-4)
    np.testing.assert_array_equal(g, expected)
    if n:
        g[-1] = np.nan
        assert np.isnan(k.norm(g)) and np.isnan(k.scale(g, 0.5))


def test_updates_in_compiled_code():
    @numba.njit
    def train(w, g, m, v, bounds, adapt):
        k.sgd(w, g, m, 0.1, 0.9, False, 0.0)
        k.adam(w, g, m, v, 0.1, 0.9, 0.999, 0.1, 0.001, 0.1, 0.001, 1e-8)
        k.lars(w, g, m, bounds, adapt, 0.1)
        k.lamb(w, g, m, v, bounds, adapt, 0.1, 0.9, 0.999, 0.1, 0.001, 0.1, 0.001, 1e-8)
        return k.norm(w) + k.scale(g, 2.0)

    bounds, adapt = np.array([0, 5, 10]), np.array([True, False])
    ours, theirs = vectors(10, np.float32), vectors(10, np.float32)
    assert train(*ours, bounds, adapt) == pytest.approx(train.py_func(*theirs, bounds, adapt), rel=1e-6)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)


# --- Embeddings -----------------------------------------------------------------------------------------------

@either
@given(shape=st.sampled_from([(), (0,), (1,), (7,), (3, 4), (2, 0)]), rows=st.integers(1, 9), features=st.integers(0, 40),
       kind=st.sampled_from([np.int64, np.uint8, np.int16]), seed=st.integers(0, 99))
@few
def test_embedding(dtype, shape, rows, features, kind, seed):
    rng = np.random.default_rng(seed)
    ids = np.asarray(rng.integers(0, rows, shape)).astype(kind)
    weight = rng.standard_normal((features, rows)).astype(dtype).T
    g = rng.standard_normal((*shape, features, 2)).astype(dtype)[..., 0]
    np.testing.assert_array_equal(k.embedding(ids, weight), weight[ids])
    expected = np.zeros((rows, features))
    np.add.at(expected, ids, g)
    before = rng.standard_normal((rows, features)).astype(dtype)
    after = before.copy()
    assert k.embedding_vjp(g, ids, rows, after, True) is after
    for ours, theirs in (k.embedding_vjp(g, ids, rows), expected), (after, before + expected):
        close(ours, theirs, dtype)


@pytest.mark.parametrize("bad", [-1, 5])
def test_an_id_outside_is_found_before_memory_is_touched(bad):
    ids, g, out = np.array([[0, 1], [bad, 2]]), np.ones((2, 2, 3)), np.zeros((5, 3))
    message = rf"id {bad} at position \(1, 0\) in an embedding of 5 rows: ids run from 0 to 4"
    with pytest.raises(ValueError, match=message):
        k.embedding(ids, out)
    with pytest.raises(ValueError, match=message):
        k.embedding_vjp(g, ids, 5, out, True)
    assert not out.any()


def test_what_embeddings_refuse():
    ids = np.zeros(3, int)
    with pytest.raises(ValueError, match=r"takes rows from a matrix, not from an array of shape \(3,\)"):
        k.embedding(ids, np.ones(3))
    with pytest.raises(ValueError, match=r"ids of shape \(3,\) takes a gradient with one more axis, not \(4, 2\)"):
        k.embedding_vjp(np.ones((4, 2)), ids, 5)
    with pytest.raises(ValueError, match="contiguous rows"):
        k.embedding_vjp(np.ones((3, 2)), ids, 5, np.ones((2, 5)).T)
    with pytest.raises(ValueError, match="adds to out"):
        k.embedding_vjp(np.ones((3, 2)), ids, 5, add=True)


def test_embedding_in_compiled_code():
    @numba.njit
    def both(ids, weight, g):
        return k.embedding(ids, weight), k.embedding_vjp(g, ids, len(weight))

    rng = np.random.default_rng(0)
    ids, weight, g = rng.integers(0, 5, (3, 2)), rng.standard_normal((5, 7)), rng.standard_normal((3, 2, 7))
    for ours, theirs in zip(both(ids, weight, g), both.py_func(ids, weight, g), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(ValueError, match="an id in an embedding"):
        both(ids + 5, weight, g)


# --- Half the bits --------------------------------------------------------------------------------------------

ALL = np.arange(65536, dtype=np.uint16)


def floats():
    """Random patterns of bits, all halfway cases between bfloat16 and float16, and what lies beside them."""
    some = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
    upper = ALL.astype(np.uint32) << 16
    near = [upper + d for d in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]
    halves = k.from_float16(ALL.view(np.float16)).view(np.uint32)
    near += [halves + np.uint32(d % 2**32) for d in (0, 1, -1, 0xFFF, 0x1000, 0x1001, 0x1FFF)]
    return np.concatenate([some, *near]).view(np.float32)


def test_every_bfloat16():
    x = k.from_bfloat16(ALL)
    np.testing.assert_array_equal(x.view(np.uint32), ALL.astype(np.uint32) << 16)
    back = k.to_bfloat16(x)
    np.testing.assert_array_equal(back[~np.isnan(x)], ALL[~np.isnan(x)])
    assert np.isnan(k.from_bfloat16(back[np.isnan(x)])).all()


def test_to_bfloat16_against_pytorch():
    torch = pytest.importorskip("torch")
    x = floats()
    ours, nan = k.to_bfloat16(x), np.isnan(x)
    theirs = torch.from_numpy(x).to(torch.bfloat16).view(torch.uint16).numpy()
    np.testing.assert_array_equal(ours[~nan], theirs[~nan])
    assert np.isnan(k.from_bfloat16(ours[nan])).all() and nan.sum() > 100


def test_every_float16():
    x = k.from_float16(ALL.view(np.float16))
    np.testing.assert_array_equal(x, ALL.view(np.float16).astype(np.float32))
    back = k.to_float16(x)
    np.testing.assert_array_equal(back, ALL.view(np.float16))


def test_to_float16_against_numpy():
    x = floats()
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        theirs = x.astype(np.float16)
    np.testing.assert_array_equal(k.to_float16(x), theirs)


@pytest.mark.parametrize("there, back, kind", [(k.to_bfloat16, k.from_bfloat16, np.uint16),
                                               (k.to_float16, k.from_float16, np.float16)])
def test_shapes_of_halves(there, back, kind):
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    for a in x, x.T, x[:, ::2], x[:0], x[0, 0, 1:2].reshape(()):
        a.flags.writeable = False
        half = there(a)
        assert half.dtype == kind and half.shape == a.shape
        np.testing.assert_array_equal(back(half), a)
    out = np.empty(24, kind)
    assert there(x.reshape(-1), out=out) is out and out[2] == there(x)[0, 0, 2]
    with pytest.raises(TypeError, match="takes an array of float32, not of float64"):
        there(x.astype(float))
    with pytest.raises(ValueError, match=r"out has shape \(23,\)"):
        there(x.reshape(-1), out=out[1:])


def test_halves_in_compiled_code():
    compiled = numba.njit(lambda x: k.from_bfloat16(k.to_bfloat16(x)))
    x = np.linspace(-3, 3, 77, dtype=np.float32)
    np.testing.assert_array_equal(compiled(x), k.from_bfloat16(k.to_bfloat16(x)))
