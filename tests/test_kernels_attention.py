"""Attention against PyTorch: shapes, masks, layouts, and what must not change any bits."""

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpiml import kernels as k
from mpiml import ops
from mpiml.tensor import Tensor

t = pytest.importorskip("torch")


def heads(rng, dtype, batch, heads, length, d):
    """(batch, heads, length, d), in memory (batch, length, heads, d)."""
    return rng.standard_normal((batch, length, heads, d)).astype(dtype).swapaxes(1, 2)


def visible(batch, tq, tk, causal, lengths, mask):
    seen = np.ones((batch, 1, tq, tk), bool)
    if causal:
        seen = seen & np.tri(tq, tk, dtype=bool)
    if lengths is not None:
        seen = seen & (np.arange(tk) < lengths[:, None])[:, None, None]
    return seen & mask[:, None, None] if mask is not None else seen


def expected(q, k, v, seen, g):
    q, k, v = (t.from_numpy(np.array(a, order="C")).requires_grad_() for a in (q, k, v))
    seen = t.from_numpy(seen)
    scores = (q @ k.transpose(-1, -2) / max(q.shape[-1], 1)**0.5).masked_fill(~seen, -1e30)
    out = (t.softmax(scores, -1) * seen) @ v
    return [a.detach().numpy() for a in (out, *t.autograd.grad(out, (q, k, v), t.from_numpy(np.array(g, order="C"))))]


@settings(deadline=None, max_examples=40, derandomize=True)
@given(batch=st.integers(1, 3), n=st.integers(1, 3), tq=st.integers(1, 150), tk=st.integers(1, 560), d=st.integers(1, 40),
       dv=st.integers(1, 40), causal=st.booleans(), hide=st.sampled_from(["nothing", "lengths", "mask"]),
       dtype=st.sampled_from([np.float32, np.float64]), seed=st.integers(0, 99))
def test_against_torch(batch, n, tq, tk, d, dv, causal, hide, dtype, seed):
    rng = np.random.default_rng(seed)
    q, keys, v = heads(rng, dtype, batch, n, tq, d), heads(rng, dtype, batch, n, tk, d), heads(rng, dtype, batch, n, tk, dv)
    g = rng.standard_normal((batch, n, tq, dv)).astype(dtype)
    lengths = rng.integers(0, tk + 1, batch) if hide == "lengths" else None
    mask = rng.random((batch, tk)) < 0.6 if hide == "mask" else None
    for a in q, keys, v, g:
        a.flags.writeable = False
    out, logsumexp = k.attention(q, keys, v, causal, lengths, mask)
    gradients = k.attention_vjp(g, q, keys, v, out, logsumexp, causal, lengths, mask)
    reference = expected(q, keys, v, visible(batch, tq, tk, causal, lengths, mask), g)
    for ours, theirs in zip((out, *gradients), reference, strict=True):
        assert ours.dtype == dtype
        limit = (3e-5 if dtype == np.float32 else 1e-10) * max(1, np.abs(theirs).max())
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=limit)


def test_long_rows_meet_keys_block_by_block():
    rng = np.random.default_rng(0)
    q, keys, v = (heads(rng, np.float64, 1, 1, 700, 8) * 4 for _ in range(3))
    for causal in False, True:
        out, logsumexp = k.attention(q, keys, v, causal)
        ones = np.ones(out.shape)
        reference = expected(q, keys, v, visible(1, 700, 700, causal, None, None), ones)
        for ours, theirs in zip((out, *k.attention_vjp(ones, q, keys, v, out, logsumexp, causal)), reference, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-10 * np.abs(theirs).max())


def test_queries_without_keys_get_zero():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 5, 4))
    out, logsumexp = k.attention(x, x, x, lengths=np.array([0, 3]))
    assert (out[0] == 0).all()
    assert (logsumexp[0] == -np.inf).all()
    gradients = k.attention_vjp(x, x, x, x, out, logsumexp, lengths=np.array([0, 3]))
    assert all((g[0] == 0).all() for g in gradients)
    assert all((g[1, :, 3:] == 0).all() for g in gradients[1:])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rows_do_not_depend_on_the_batch(dtype):
    rng = np.random.default_rng(0)
    q, keys, v, g = (heads(rng, dtype, 12, 2, 70, 16) for _ in range(4))

    def run(part):
        out, logsumexp = k.attention(q[part], keys[part], v[part], True)
        return out, logsumexp, *k.attention_vjp(g[part], q[part], keys[part], v[part], out, logsumexp, True)

    whole = run(slice(None))
    for size in 1, 7:
        parts = [run(slice(i, i + size)) for i in range(0, 12, size)]
        for i, expected in enumerate(whole):
            np.testing.assert_array_equal(np.concatenate([part[i] for part in parts]), expected)


def test_layouts_and_axes():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 9, 3, 4, 6)).astype(np.float32)
    q, keys, v = (a.swapaxes(1, 2) for a in np.moveaxis(x, 2, 0))  # (2, 4, 9, 6), parts of one array
    out, logsumexp = k.attention(q, keys, v)
    assert out.swapaxes(1, 2).flags.c_contiguous
    same, _ = k.attention(*(np.asfortranarray(a) for a in (q, keys, v)), out=np.empty(out.shape, np.float32))
    np.testing.assert_array_equal(same, out)
    one, row = k.attention(q[0, 0], keys[0, 0], v[0, 0])
    np.testing.assert_array_equal(one, out[0, 0])
    np.testing.assert_array_equal(row, logsumexp[0, 0])
    np.testing.assert_array_equal(k.attention(q[:, 0], keys[:, 0], v[:, 0])[0], out[:, 0])


def test_empty_arrays():
    for shape in (0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4):
        x = np.zeros(shape)
        out, logsumexp = k.attention(x, x, x, True)
        assert out.shape == shape
        assert [g.shape for g in k.attention_vjp(x, x, x, x, out, logsumexp, True)] == [shape] * 3
    assert (k.attention(np.ones((2, 3, 4)), np.ones((2, 0, 4)), np.ones((2, 0, 4)))[0] == 0).all()


@pytest.mark.parametrize(("error", "words", "f"), [
    (ValueError, "one d", lambda x: k.attention(x, x[..., :2], x)),
    (ValueError, "lengths", lambda x: k.attention(x, x, x, lengths=np.array([4, 0]))),
    (ValueError, "a mask of shape", lambda x: k.attention(x, x, x, mask=np.ones((3, 2), bool))),
    (ValueError, "takes queries, keys and values", lambda x: k.attention(x[0, 0], x[0, 0], x)),
    (TypeError, "arrays of float32 and float64", lambda x: k.attention(x, x, x.astype(float))),
    (ValueError, "out has shape", lambda x: k.attention(x, x, x, out=np.empty((2, 2), np.float32))),
    (ValueError, "a gradient of shape", lambda x: k.attention_vjp(x[..., :2], x, x, x, x, x[..., 0])),
])
def test_errors(error, words, f):
    with pytest.raises(error, match=words):
        f(np.zeros((2, 1, 3, 4), np.float32))


def test_one_backward_computation_serves_all(monkeypatch):
    calls = []
    vjp = k.attention_vjp
    monkeypatch.setattr(k, "attention_vjp", lambda *args: calls.append(1) or vjp(*args))
    q, keys, v = (Tensor(np.random.default_rng(i).standard_normal((2, 3, 4))) for i in range(3))
    ops.scaled_dot_product_attention(q, keys, v).backward(np.ones((2, 3, 4)))
    assert len(calls) == 1
    assert all(x.grad.any() for x in (q, keys, v))


def test_from_compiled_code():
    @numba.njit
    def step(q, keys, v):
        out, logsumexp = k.attention(q, keys, v, True)
        return out, k.attention_vjp(out, q, keys, v, out, logsumexp, True)

    q, keys, v = np.random.default_rng(0).standard_normal((3, 2, 2, 9, 4))
    out, gradients = step(q, keys, v)
    same, others = step.py_func(q, keys, v)
    np.testing.assert_array_equal(out, same)
    for one, other in zip(gradients, others, strict=True):
        np.testing.assert_array_equal(one, other)
