"""The same sample gives the same bits in any batch, through whole models."""

import numpy as np
import pytest

from mpiml import nn, ops


def pictures(dtype):
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), ops.relu, nn.GroupNorm(4, 16),
        nn.Residual(nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), ops.relu,
                                  nn.Conv2d(16, 16, 3, padding=1))),
        nn.MaxPool2d(2), nn.Conv2d(16, 24, 3, stride=2, padding=1, groups=2), ops.gelu, nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(96, 33), ops.tanh, nn.Linear(33, 10), ops.softmax)
    return model, np.random.default_rng(0).standard_normal((128, 3, 16, 16)).astype(dtype)


class Attention(nn.Module):
    def __init__(self, width, heads):
        self.inner, self.outer, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads

    def __call__(self, x, training=False):
        n, length, width = x.shape
        y = ops.reshape(self.inner(x, training), (n, length, 3, self.heads, width // self.heads))
        q, k, v = (ops.transpose(y[:, :, i], (0, 2, 1, 3)) for i in range(3))
        y = ops.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.outer(ops.reshape(ops.transpose(y, (0, 2, 1, 3)), (n, length, width)), training)


def texts(dtype):
    model = nn.Sequential(nn.Embedding(65, 48), nn.Residual(nn.Sequential(nn.LayerNorm(48), Attention(48, 3))),
                          nn.Residual(nn.Sequential(nn.LayerNorm(48), nn.Linear(48, 96), ops.silu, nn.Linear(96, 48))),
                          nn.Linear(48, 65), ops.log_softmax)
    return model, np.random.default_rng(0).integers(0, 65, (128, 37))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("make", [pictures, texts])
def test_a_sample_has_the_same_bits_in_any_batch(make, dtype):
    model, x = make(dtype)
    model.init(seed=1, dtype=dtype)
    whole = model(x)
    for samples in (slice(0, 1), slice(41, 42), slice(0, 7), slice(100, 128), slice(3, 20)):
        np.testing.assert_array_equal(model(x[samples]), whole[samples])
