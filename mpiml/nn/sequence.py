"""Layers for sequences of tokens: embeddings, positions, attention."""

import numpy as np

from mpiml import ops

from .layers import Linear
from .module import Module, Parameter, given, normal


class Embedding(Module):
    """Integers of any shape -> rows of a table, (..., embedding_dim), at first normal with deviation ``std``."""

    def __init__(self, num_embeddings, embedding_dim, std=1.0):
        self.weight = Parameter((num_embeddings, embedding_dim), normal(std))

    def __call__(self, x, training=False):
        return ops.embedding(x, *given(training, self.weight))


class EmbeddingBag(Module):
    """Rows of integers (n, length) -> the mean of their rows of a table, (n, embedding_dim).

    The integer ``padding_idx`` is left out; the mean of nothing is 0.
    """

    def __init__(self, num_embeddings, embedding_dim, padding_idx=0, std=1.0):
        self.weight = Parameter((num_embeddings, embedding_dim), normal(std))
        self.padding_idx = padding_idx

    def __call__(self, x, training=False):
        x = np.asarray(x)
        return ops.masked_mean(ops.embedding(x, *given(training, self.weight)), x != self.padding_idx)


class Positions(Module):
    """x (n, length, embedding_dim) plus a learnt vector for each of at most ``max_length`` positions."""

    def __init__(self, max_length, embedding_dim, std=0.02):
        self.weight = Parameter((max_length, embedding_dim), normal(std))

    def __call__(self, x, training=False):
        weight, = given(training, self.weight)
        length, most = x.shape[-2], len(weight)
        if length > most:
            raise ValueError(f"a sequence of {length} is too long for a model of {most} positions: cut it")
        return x + (weight if length == most else weight[:length])


class SelfAttention(Module):
    """Attention of each position of x (n, length, embed_dim) to the others, in ``num_heads`` heads (Vaswani et al. 2017).

    Parameters
    ----------
    embed_dim, num_heads : int
        The first is a multiple of the second.
    is_causal : bool
        Positions see themselves and those before them.
    """

    def __init__(self, embed_dim, num_heads, is_causal=False):
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"SelfAttention cannot split {embed_dim} features into {num_heads} equal heads")
        self.query, self.key, self.value, self.out = (Linear(embed_dim, embed_dim) for _ in range(4))
        self.num_heads, self.is_causal = num_heads, is_causal

    def __call__(self, x, training=False, mask=None):
        """``mask`` (n, length) of booleans, optional, says which positions may be seen; those that see none get ``out(0)``."""
        n, length, features = x.shape
        split = n, length, self.num_heads, features // self.num_heads

        def heads(layer):
            return ops.transpose(ops.reshape(layer(x, training), split), (0, 2, 1, 3))

        y = ops.scaled_dot_product_attention(heads(self.query), heads(self.key), heads(self.value), self.is_causal, mask)
        return self.out(ops.reshape(ops.transpose(y, (0, 2, 1, 3)), x.shape), training)
