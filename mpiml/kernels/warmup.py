"""``python -m mpiml warmup``: compile all kernels before they are needed, on a login node, say, or into an image.

The table holds a small call of each kernel, which compiles it the way the ops call it, and is a first look whether it
works on this machine.
"""

import sys
from time import perf_counter

import numpy as np

from mpiml import cores
from mpiml import kernels as k

from . import jit

LABELS = np.array([2, 0, 1])
IMAGES = (2, 4, 6, 6)  # samples, channels, height, width
WEIGHT = (4, 4, 3, 3)


def _max_pool2d_vjp(x):
    y, index = k.max_pool2d(x(*IMAGES), (2, 2), (2, 2))
    return k.max_pool2d_vjp(y, index, IMAGES, (2, 2), (2, 2))


def _layer_norm_vjp(x):
    _, *statistics = k.layer_norm(x(3, 8))
    return k.layer_norm_vjp(x(3, 8), x(3, 8), *statistics, x(8))


def _standardize(x):
    for samples, groups in (1, 2), (2, 0):  # group norm, batch norm
        _, *statistics = k.standardize(x(2, 4, 9), samples, 1e-5, groups, x(4), x(4))
        k.standardize_vjp(x(2, 4, 9), x(2, 4, 9), *statistics, samples, 1e-5, x(4), x(4))


def _by_parameter(update, x, *moments):
    """LARS and LAMB: two parameters, of which one is adapted."""
    return lambda *options: update(x(9), x(9), *moments, np.array([0, 4, 9]), np.array([True, False]), *options)


# name: a call of that kernel, given a function that makes arrays of the dtype to compile for: x(*shape)
EXAMPLES = {
    "absolute": lambda x: k.absolute(x(3, 5), x(3, 5)),
    "adam": lambda x: k.adam(x(9), x(9), x(9), x(9) ** 2, 1e-3, 0.9, 0.999, 0.1, 0.001, 0.1, 0.001, 1e-8),
    "add_relu": lambda x: k.add_relu(x(3, 5), x(3, 5)),
    "attention": lambda x: k.attention(x(2, 3, 4), x(2, 5, 4), x(2, 5, 4)),
    "attention_vjp": lambda x: k.attention_vjp(x(2, 3, 4), x(2, 3, 4), x(2, 5, 4), x(2, 5, 4), x(2, 3, 4), x(2, 3)),
    "avg_pool2d": lambda x: k.avg_pool2d(x(*IMAGES), (2, 2), (2, 2)),
    "avg_pool2d_vjp": lambda x: k.avg_pool2d_vjp(x(2, 4, 3, 3), IMAGES, (2, 2), (2, 2)),
    "binary": lambda x: k.binary(x(3, 5), abs(x(3, 5))),
    "binary_vjp": lambda x: k.binary_vjp(1.0, x(3, 5), abs(x(3, 5))),
    "conv2d": lambda x: [k.conv2d(x(*IMAGES), x(*WEIGHT), winograd=winograd) for winograd in (False, True)],
    "conv2d_vjp_bias": lambda x: k.conv2d_vjp_bias(x(2, 4, 4, 4)),
    "conv2d_vjp_relu": lambda x: k.conv2d_vjp_relu(x(2, 4, 4, 4), x(2, 4, 4, 4)),
    "conv2d_vjp_weight": lambda x: [k.conv2d_vjp_weight(x(2, 4, 4, 4), x(*IMAGES), WEIGHT, winograd=winograd)
                                    for winograd in (False, True)],
    "conv2d_vjp_x": lambda x: k.conv2d_vjp_x(x(2, 4, 4, 4), x(*WEIGHT), IMAGES),
    "dropout": lambda x: k.dropout(x(3, 5), 0.5, 1),
    "embedding": lambda x: k.embedding(LABELS, x(3, 5)),
    "embedding_vjp": lambda x: k.embedding_vjp(x(3, 5), LABELS, 3),
    "exp": lambda x: k.exp(x(3, 5)),
    "exp_vjp": lambda x: k.exp_vjp(x(3, 5), x(3, 5)),
    "from_bfloat16": lambda x: k.from_bfloat16(np.arange(9, dtype=np.uint16)),
    "from_float16": lambda x: k.from_float16(np.arange(9, dtype=np.float16)),
    "gelu": lambda x: [k.gelu(x(3, 5), tanh) for tanh in (False, True)],
    "gelu_vjp": lambda x: [k.gelu_vjp(x(3, 5), x(3, 5), tanh) for tanh in (False, True)],
    "huber": lambda x: k.huber(x(3, 5), x(3, 5), 1.0),
    "huber_vjp": lambda x: k.huber_vjp(1.0, x(3, 5), x(3, 5), 1.0),
    "label_loss": lambda x: k.label_loss(x(3, 5), LABELS),
    "label_loss_vjp": lambda x: k.label_loss_vjp(1.0, abs(x(3, 5)), LABELS),
    "lamb": lambda x: _by_parameter(k.lamb, x, x(9), x(9) ** 2)(1e-3, 0.9, 0.999, 0.1, 0.001, 0.1, 0.001, 1e-8),
    "lars": lambda x: _by_parameter(k.lars, x, x(9))(0.1),
    "layer_norm": lambda x: k.layer_norm(x(3, 8), x(8), x(8)),
    "layer_norm_vjp": _layer_norm_vjp,
    "linear": lambda x: k.linear(x(3, 5), x(4, 5), x(4)),
    "linear_vjp": lambda x: k.linear_vjp(x(3, 4), x(3, 5), x(4, 5)),
    "linear_vjp_bias": lambda x: k.linear_vjp_bias(x(3, 4)),
    "linear_vjp_weight": lambda x: k.linear_vjp_weight(x(3, 4), x(3, 5)),
    "linear_vjp_x": lambda x: k.linear_vjp_x(x(3, 4), x(4, 5)),
    "log": lambda x: k.log(abs(x(3, 5))),
    "log_softmax": lambda x: k.log_softmax(x(3, 5)),
    "logsumexp": lambda x: k.logsumexp(x(3, 5)),
    "logsumexp_vjp": lambda x: k.logsumexp_vjp(x(3), x(3, 5), x(3)),
    "log_softmax_vjp": lambda x: k.log_softmax_vjp(x(3, 5), x(3, 5)),
    "log_vjp": lambda x: k.log_vjp(x(3, 5), x(3, 5)),
    "matmul": lambda x: k.matmul(x(2, 3, 4), x(2, 4, 5)),
    "max_pool2d": lambda x: k.max_pool2d(x(*IMAGES), (2, 2), (2, 2)),
    "max_pool2d_vjp": _max_pool2d_vjp,
    "norm": lambda x: k.norm(x(9)),
    "relu": lambda x: k.relu(x(3, 5)),
    "relu_vjp": lambda x: k.relu_vjp(x(3, 5), x(3, 5)),
    "scale": lambda x: k.scale(x(9), 0.5),
    "sgd": lambda x: k.sgd(x(9), x(9), x(9), 0.1, 0.9, False, 0.01),
    "sigmoid": lambda x: k.sigmoid(x(3, 5)),
    "sigmoid_vjp": lambda x: k.sigmoid_vjp(x(3, 5), x(3, 5)),
    "silu": lambda x: k.silu(x(3, 5)),
    "silu_vjp": lambda x: k.silu_vjp(x(3, 5), x(3, 5)),
    "softmax": lambda x: k.softmax(x(3, 5)),
    "softmax_vjp": lambda x: k.softmax_vjp(x(3, 5), x(3, 5)),
    "squared": lambda x: k.squared(x(3, 5), x(3, 5)),
    "standardize": _standardize,
    "standardize_by": lambda x: k.standardize_by(x(2, 4, 9), x(4), x(4) ** 2, 1e-5, x(4), x(4)),
    "standardize_by_vjp": lambda x: k.standardize_by_vjp(x(2, 4, 9), x(2, 4, 9), x(4), x(4) ** 2, 1e-5, x(4), x(4)),
    "standardize_vjp": _standardize,
    "tanh": lambda x: k.tanh(x(3, 5)),
    "tanh_vjp": lambda x: k.tanh_vjp(x(3, 5), x(3, 5)),
    "to_bfloat16": lambda x: k.to_bfloat16(x(9).astype(np.float32)),
    "to_float16": lambda x: k.to_float16(x(9).astype(np.float32)),
}
WITHOUT_KERNEL = {"out_size"}


def array(dtype):
    """A function that makes arrays of a dtype: x(*shape)."""
    return lambda *shape: np.linspace(-1, 1, int(np.prod(shape)), dtype=dtype).reshape(shape)


def warm_up(dtypes=("float32", "float64"), names=None):
    """Call each kernel once for each dtype, so that all are compiled; tell what was done on stdout.

    Parameters
    ----------
    dtypes : names of dtypes
    names : names of kernels, all by default
    """
    names = list(EXAMPLES if names is None else names)
    say = cores.rank_on_node() == 0
    line = say and sys.stdout.isatty()
    with jit.silent():
        for dtype in dtypes:
            start = perf_counter()
            for done, name in enumerate(names):
                if line:
                    print(f"\r{dtype} {done}/{len(names)} {name}\033[K", end="", flush=True)
                EXAMPLES[name](array(dtype))
            if say:
                print("\r\033[K" * line + f"{dtype}: {len(names)} kernels in {perf_counter() - start:.1f} s", flush=True)
