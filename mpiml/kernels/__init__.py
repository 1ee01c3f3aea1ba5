"""Kernels: plain arrays in, plain arrays out; no autograd, no MPI. Each ``f`` stands beside its ``f_vjp``.

A vjp ("vector-Jacobian product") maps the gradient ``g`` for the output to the gradient for one argument.

To read them all, begin with how they are made and what they are made of, then follow a family:

- ``jit`` compiles, ``cache`` keeps what it compiled on disk, ``public`` checks arguments; ``update`` and ``dropout`` are
  plain loops that need nothing else;
- ``registers``, ``simd``: vectors as values; ``polynomial``: exp and log of them; with these ``elementwise``, ``loss``,
  ``gather``, ``softmax``, ``crossentropy``, ``convert``;
- ``tile``: several vectors at once; with these ``gemm``, ``dense``, ``layernorm``, and ``scores``, ``flash``, ``attention``;
- images: ``layout``, then ``taps``, ``direct``, ``convweight``, ``conv``; ``winograd``, ``winogradweight``; ``pool``; and
  ``normalize`` with its two files.
"""

from .attention import attention, attention_vjp
from .conv import conv2d, conv2d_vjp_bias, conv2d_vjp_relu, conv2d_vjp_weight, conv2d_vjp_x, out_size
from .convert import from_bfloat16, from_float16, to_bfloat16, to_float16
from .crossentropy import label_loss, label_loss_vjp
from .dense import linear, linear_vjp, linear_vjp_bias, linear_vjp_weight, linear_vjp_x, matmul
from .dropout import dropout
from .elementwise import (
    add_relu,
    exp,
    exp_vjp,
    gelu,
    gelu_vjp,
    log,
    log_vjp,
    relu,
    relu_vjp,
    sigmoid,
    sigmoid_vjp,
    silu,
    silu_vjp,
    tanh,
    tanh_vjp,
)
from .gather import embedding, embedding_vjp
from .layernorm import layer_norm, layer_norm_vjp
from .loss import absolute, binary, binary_vjp, huber, huber_vjp, squared
from .normalize import standardize, standardize_by, standardize_by_vjp, standardize_vjp
from .pool import avg_pool2d, avg_pool2d_vjp, max_pool2d, max_pool2d_vjp
from .softmax import log_softmax, log_softmax_vjp, logsumexp, logsumexp_vjp, softmax, softmax_vjp
from .update import adam, lamb, lars, norm, scale, sgd

__all__ = [
    "absolute", "adam", "add_relu", "attention", "attention_vjp", "avg_pool2d", "avg_pool2d_vjp", "binary", "binary_vjp",
    "conv2d", "conv2d_vjp_bias", "conv2d_vjp_relu", "conv2d_vjp_weight", "conv2d_vjp_x", "dropout", "embedding",
    "embedding_vjp", "exp", "exp_vjp", "from_bfloat16", "from_float16", "gelu", "gelu_vjp", "huber", "huber_vjp",
    "label_loss", "label_loss_vjp", "lamb", "lars", "layer_norm", "layer_norm_vjp", "linear", "linear_vjp",
    "linear_vjp_bias", "linear_vjp_weight", "linear_vjp_x", "log", "log_softmax", "log_softmax_vjp", "log_vjp",
    "logsumexp", "logsumexp_vjp", "matmul", "max_pool2d", "max_pool2d_vjp", "norm", "out_size", "relu", "relu_vjp",
    "scale", "sgd", "sigmoid", "sigmoid_vjp", "silu", "silu_vjp", "softmax", "softmax_vjp", "squared", "standardize",
    "standardize_by", "standardize_by_vjp", "standardize_vjp", "tanh", "tanh_vjp", "to_bfloat16", "to_float16",
]
