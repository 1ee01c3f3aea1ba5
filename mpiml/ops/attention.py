"""Scaled dot-product attention."""

from mpiml import kernels as k
from mpiml.tensor import op

from .check import floats


@op
def scaled_dot_product_attention(q, k_, v, is_causal=False, mask=None, scale=None):
    """softmax(q k' * scale) v for each item of the batch and each head; the matrix of scores is never stored.

    Parameters
    ----------
    q, k, v : (..., t_q, d), (..., t_k, d) and (..., t_k, d_v), with up to two leading axes: batch and heads
    is_causal : bool
        Query i sees the keys 0 .. i only.
    mask : (batch, t_k) boolean array, optional
        Which keys of each item are valid. Queries that see no key get 0.
    scale : float, optional
        1 / sqrt(d) by default.
    """
    floats("scaled_dot_product_attention", q)
    out, logsumexp = k.attention(q, k_, v, is_causal, None, mask, scale)

    def vjp(g, into):
        return k.attention_vjp(g, q, k_, v, out, logsumexp, is_causal, None, mask, scale)

    return out, vjp
