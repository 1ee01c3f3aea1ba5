"""The derivative table: every differentiable function beside arithmetic, one vjp per argument.

Each function takes plain arrays or Tensors, float32 or float64, and returns the same kind; see
:mod:`mpiml.tensor` for the rules. Names and arguments follow PyTorch where the thing is the same. Losses
return *sums* over the samples: sums of parts add up to the sum of the whole, on any number of ranks, and one
division by the number of samples gives the mean.
"""

from mpiml.tensor import add, divide, getitem, matmul, multiply, negative, power, subtract

from .attention import scaled_dot_product_attention
from .elementwise import add_relu, clip, dropout, exp, gelu, log, relu, sigmoid, silu, sqrt, tanh, where
from .layer import avg_pool2d, conv2d, embedding, linear, max_pool2d
from .loss import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    huber_loss,
    l1_loss,
    log_softmax,
    mse_loss,
    softmax,
)
from .normalize import batch_norm, group_norm, layer_norm
from .reduce import masked_mean, max, mean, min, sum
from .shape import broadcast_to, concatenate, flatten, identity, pad, reshape, stack, transpose

__all__ = ["add", "add_relu", "avg_pool2d", "batch_norm", "binary_cross_entropy_with_logits", "broadcast_to", "clip",
           "concatenate", "conv2d", "cross_entropy", "divide", "dropout", "embedding", "exp", "flatten", "gelu",
           "getitem", "group_norm", "huber_loss", "identity", "l1_loss", "layer_norm", "linear", "log",
           "log_softmax", "masked_mean", "matmul", "max", "max_pool2d", "mean", "min", "mse_loss", "multiply",
           "negative", "pad", "power", "relu", "reshape", "scaled_dot_product_attention", "sigmoid", "silu",
           "softmax", "sqrt", "stack", "subtract", "sum", "tanh", "transpose", "where"]
