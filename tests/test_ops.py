"""Every op: its adjoint against finite differences, its numbers against PyTorch, dtypes and memory layouts.

A new op needs a line in ``CASES``; without one, ``test_every_op_has_a_case`` fails.
"""

import zlib
from typing import Any, NamedTuple

import numpy as np
import pytest

from mpiml import Replay, ops, tensor
from mpiml.tensor import Tensor

# --- What a case is made of -----------------------------------------------------------------------------------


def normal(*shape):
    """A differentiable argument: standard normal numbers."""
    return lambda rng: np.asarray(rng.standard_normal(shape))


def wide(*shape):
    """A differentiable argument: numbers large enough for exp to overflow in float32."""
    return lambda rng: np.asarray(60 * rng.standard_normal(shape))


def positive(*shape):
    """A differentiable argument: numbers in 0.5 .. 2."""
    return lambda rng: np.asarray(rng.uniform(0.5, 2, shape))


class Case(NamedTuple):
    args: tuple  # functions of a generator: differentiable arguments; anything else is passed as it is
    options: dict
    name: str = ""
    call: Any = None
    torch: Any = None

    def draw(self, dtype):
        """The arguments; arrays of floats have this dtype."""
        rng = np.random.default_rng(zlib.crc32(self.name.encode()))
        args = [a(rng) if callable(a) else a for a in self.args]
        return [a.astype(dtype) if getattr(a, "dtype", np.dtype(int)).kind == "f" else a for a in args]

    def project(self, args, u):
        return float(np.sum(u * self.call(*args, **self.options)))

    def gradients(self, args, g=None):
        """The value, and {number of the argument: gradient}; ``g(shape)`` makes the gradient for the value."""
        leaves = {i: Tensor(a) for i, a in enumerate(args) if callable(self.args[i])}
        out = self.call(*[leaves.get(i, a) for i, a in enumerate(args)], **self.options)
        assert isinstance(out, Tensor)
        out.backward(g(out.shape))
        return out.value, {i: leaf.grad for i, leaf in leaves.items()}


def case(*args, **options):
    return Case(args, options)


def weights(dtype, layout=np.asarray):
    """A function of a shape: the weights ``u`` of the outputs."""
    return lambda shape: layout(np.asarray(np.random.default_rng(1).standard_normal(shape)).astype(dtype))


def op(torch, *cases, call=None):
    """The PyTorch equivalent, called as ``torch(t, *args, **options)`` (or None), and the cases."""
    return torch, cases, call


ARRAY = np.random.default_rng(0)
REAL = {shape: ARRAY.standard_normal(shape) for shape in [(3,), (2, 3), (4, 3), (3, 1), (2, 3, 4), (5, 2), (0, 3)]}
PARTS = ARRAY.dirichlet(np.ones(4), (5,))
MASK = REAL[2, 3] > 0


def broadcasting(make=normal):
    """Pairs of shapes that every binary op has to broadcast."""
    return (case(make(2, 3), make(2, 3)), case(make(2, 3), make(3)), case(make(2, 1, 4), make(3, 1)),
            case(make(1, 1), make(4, 3)), case(make(3), make()), case(make(0, 3), make(1, 3)), case(make(1), make(0)),
            case(make(2, 3), 2), case(1.5, make(2, 3)))


def elementwise(make=normal):
    return case(make(2, 3)), case(make()), case(make(0, 3)), case(make(1, 1, 1)), case(make(7, 11))


def reductions(*more):
    return (case(normal(3, 4)), case(normal(3, 4), 0), case(normal(3, 4), -1), case(normal(2, 3, 4), (0, 2)),
            case(normal(2, 3, 4), (-1, 0), True), case(normal(2, 3), None, True), case(normal(1, 3), 0),
            case(normal(1)), case(normal()), case(normal(2, 0, 3), 2), *more)


def group_norm_torch(t, x, groups, weight=None, bias=None, eps=1e-5, relu=False):
    weight = t.ones(x.shape[1]) if weight is None else weight  # or it would not take a bias
    y = t.nn.functional.group_norm(x, groups, weight, bias, eps)
    return y.relu() if relu else y


def batch_norm_torch(t, x, running_mean, running_var, seen, weight=None, bias=None, training=False, samples=None,
                     eps=1e-5, relu=False):
    blocks = x.split(samples) if training and samples else [x]
    y = t.cat([t.nn.functional.batch_norm(b, None if training else running_mean, None if training else running_var,
                                             weight, bias, training, eps=eps) for b in blocks])
    return y.relu() if relu else y


def batch_norms(x, *affine, samples=(2, 3)):
    """Cases of batch_norm of 3 channels: inference, the whole batch, and blocks of samples."""
    mean, var, seen = REAL[3,], np.exp(REAL[3,]), np.zeros(())
    options = ({"training": True, "samples": s, "eps": 0.01} for s in (*samples, 50))
    return [case(x, mean, var, seen, *affine, **o) for o in (
        {}, {"training": True}, *options, {"relu": True}, {"training": True, "relu": True})]


def cross_entropy_torch(t, logits, target, **options):
    classes = logits.shape[-1]
    target = target.reshape(-1, classes) if target.is_floating_point() else target.reshape(-1).long()
    return t.nn.functional.cross_entropy(logits.reshape(-1, classes), target, reduction="sum", **options)


def attention_torch(t, q, k, v, is_causal=False, mask=None, scale=None):
    keys = None if mask is None else t.from_numpy(mask)[:, None]
    return t.nn.functional.scaled_dot_product_attention(q, k, v, keys, is_causal=is_causal, scale=scale)


def masked_mean_torch(t, x, mask):
    mask = t.as_tensor(mask)[:, :, None].to(x.dtype)
    return (x * mask).sum(1) / mask.sum(1).clamp(min=1)


def losses(*more):
    return (case(normal(2, 3), REAL[2, 3]), case(normal(2, 3, 4), REAL[2, 3, 4]), case(normal(0, 3), REAL[0, 3]),
            case(normal(), np.array(0.3)), case(normal(3), np.array([0, 1, 1])), case(normal(1, 1), np.ones((1, 1))),
            *more)


def take(t, x, index):
    index = index.numpy() if isinstance(index, t.Tensor) else index
    places = np.asarray(np.arange(x.numel()).reshape(x.shape)[index])
    return t.take(x, t.from_numpy(places.copy()))


CASES = {
    # Arithmetic
    "add": op(lambda t, x, y: x + y, *broadcasting()),
    "subtract": op(lambda t, x, y: x - y, *broadcasting()),
    "multiply": op(lambda t, x, y: x * y, *broadcasting(), case(normal(2, 3), MASK)),
    "divide": op(lambda t, x, y: x / y, *broadcasting(positive)),
    "negative": op(lambda t, x: -x, *elementwise()),
    "power": op(lambda t, x, y: t.pow(x, y), *broadcasting(positive), case(normal(2, 3), 3), case(normal(2, 3), 0),
                case(normal(2, 3), 1), case(positive(3), -2), case(positive(3), 0.5),
                case(normal(2, 3), np.array([2.0, 0.0, 3.0])), case(positive(2, 1), normal(3))),
    "matmul": op(lambda t, x, y: x @ y,
                 case(normal(3), normal(3)), case(normal(3), normal(3, 2)), case(normal(4, 3), normal(3)),
                 case(normal(4, 3), normal(3, 2)), case(normal(5, 4, 3), normal(5, 3, 2)),
                 case(normal(5, 4, 3), normal(3, 2)), case(normal(4, 3), normal(5, 3, 2)),
                 case(normal(5, 1, 4, 3), normal(2, 3, 1)), case(normal(1, 4, 3), normal(5, 3, 2)),
                 case(normal(3), normal(5, 3, 2)), case(normal(5, 4, 3), normal(3)), case(normal(1, 3), normal(3, 1)),
                 case(normal(1), normal(1)), case(normal(0, 3), normal(3, 2)), case(normal(4, 0), normal(0, 2)),
                 case(normal(0), normal(0)), case(normal(2, 3), REAL[3, 1]), case(REAL[2, 3], normal(3))),
    "getitem": op(take, *[case(normal(5, 4), index) for index in (
        1, -1, (2, 3), slice(1, 4), slice(None, None, -2), (slice(None), 0), (..., None, 1), None, ..., (),
        [0, 0, 3], np.array([[0, 1], [1, 1]]), (np.array([0, 0, 2]), np.array([1, 1, 3])), (slice(None), [1, 1]),
        ([4, 4], slice(0, 3)), (np.array([2, 2]), slice(None, None, -1)), np.arange(20).reshape(5, 4) % 3 == 0,
        np.array([True, False, True, True, False]), np.zeros((5, 4), bool), np.empty(0, int), slice(2, 2),
        (np.int64(1), slice(None)), np.array(3))], case(normal(1, 3), 0), case(normal(0, 3), slice(None))),
    # Shapes
    "identity": op(lambda t, x: x, *elementwise()),
    "reshape": op(lambda t, x, shape: x.reshape(shape), case(normal(2, 6), (3, 4)), case(normal(2, 6), (-1, 3)),
                  case(normal(2, 6), -1), case(normal(1), ()), case(normal(), (1, 1)), case(normal(0, 3), (3, 0)),
                  case(normal(0, 3), (0, 1))),
    "flatten": op(lambda t, x: x.flatten(1), case(normal(2, 3, 4)), case(normal(2, 3)), case(normal(1, 1, 1, 1)),
                  case(normal(0, 2, 3)), case(normal(2, 0, 3))),
    "transpose": op(lambda t, x, axes=None: x.permute(*(range(x.ndim - 1, -1, -1) if axes is None else axes)),
                    case(normal(2, 3)), case(normal(2, 3, 4)), case(normal(2, 3, 4), (1, 2, 0)),
                    case(normal(2, 3, 4), (-1, 0, 1)), case(normal(2, 3, 4), (2, -3, -2)), case(normal(2, 1, 0)),
                    case(normal(3))),
    "broadcast_to": op(lambda t, x, shape: x.broadcast_to(shape), case(normal(3), (2, 3)),
                       case(normal(2, 1), (4, 2, 3)), case(normal(), (2, 2)), case(normal(2, 3), (2, 3)),
                       case(normal(1), (0,)), case(normal(1), (1, 1))),
    "concatenate": op(lambda t, *p, axis=0: t.cat(p, axis), case(normal(2, 3), normal(4, 3)),
                      case(normal(2, 1), normal(2, 3), normal(2, 2), axis=1), case(normal(2, 1), normal(2, 3), axis=-1),
                      case(normal(0, 3), normal(2, 3)), case(normal(2)), case(normal(2, 3), REAL[4, 3]),
                      case(REAL[2, 3], normal(4, 3)),
                      call=lambda *p, **options: ops.concatenate(p, **options)),
    "stack": op(lambda t, *p, axis=0: t.stack(p, axis), case(normal(2, 3), normal(2, 3)), case(normal(), normal()),
                case(normal(2, 3), normal(2, 3), REAL[2, 3], axis=1), case(normal(2), normal(2), axis=-1),
                case(normal(0, 3), normal(0, 3), axis=2), case(normal(1)),
                call=lambda *p, **options: ops.stack(p, **options)),
    "pad": op(lambda t, x, widths, value=0.0: t.nn.functional.pad(x, sum(reversed(widths), ()), value=value),
              case(normal(2, 3), ((1, 0), (2, 3))), case(normal(3), ((0, 0),)), case(normal(1, 2), ((1, 1), (0, 1)), 2.5),
              case(normal(0, 2), ((1, 0), (1, 1)))),
    # Reductions
    "sum": op(lambda t, x, axis=None, keepdims=False: t.sum(x, axis, keepdims),
              *reductions(case(normal(0, 3)), case(normal(0, 3), 0))),
    "mean": op(lambda t, x, axis=None, keepdims=False: t.mean(x, axis, keepdims), *reductions(case(normal(0, 3), 1))),
    "masked_mean": op(masked_mean_torch, case(normal(3, 4, 2), np.arange(12).reshape(3, 4) % 5 > 1),
                      case(normal(2, 3, 7), np.array([[False] * 3, [True] * 3])),
                      case(normal(1, 1, 1), np.ones((1, 1), bool)), case(normal(0, 3, 2), np.ones((0, 3), bool))),
    "max": op(lambda t, x, axis=None, keepdims=False: t.amax(x, () if axis is None else axis, keepdims),
              *reductions()),
    "min": op(lambda t, x, axis=None, keepdims=False: t.amin(x, () if axis is None else axis, keepdims),
              *reductions()),
    # Elementwise
    "exp": op(lambda t, x: t.exp(x), *elementwise()),
    "log": op(lambda t, x: t.log(x), *elementwise(positive)),
    "sqrt": op(lambda t, x: t.sqrt(x), *elementwise(positive)),
    "tanh": op(lambda t, x: t.tanh(x), *elementwise()),
    "sigmoid": op(lambda t, x: t.sigmoid(x), *elementwise(), case(wide(20))),
    "relu": op(lambda t, x: t.relu(x), *elementwise()),
    "add_relu": op(lambda t, x, y: t.relu(x + y), case(normal(3, 4), normal(3, 4)), case(normal(2, 3, 5), normal(2, 3, 5)),
                   case(normal(7), normal(7)), case(normal(), normal()), case(normal(0, 3), normal(0, 3))),
    "gelu": op(lambda t, x, **o: t.nn.functional.gelu(x, **o), *elementwise(), case(wide(20)),
               case(normal(2, 3), approximate="tanh"), case(wide(20), approximate="tanh")),
    "silu": op(lambda t, x: t.nn.functional.silu(x), *elementwise(), case(wide(20))),
    "where": op(lambda t, mask, x, y: t.where(mask, x, y), case(MASK, normal(2, 3), normal(2, 3)),
                case(MASK, normal(3), normal(2, 1)), case(MASK, normal(2, 3), 0.0), case(MASK, 1, normal()),
                case(np.array(True), normal(2), normal(3, 1)), case(np.zeros((0, 3), bool), normal(3), normal(1))),
    "clip": op(lambda t, x, low=None, high=None: t.clamp(x, low, high), case(normal(4, 5), -0.5, 0.5),
               case(normal(4, 5), 0), case(normal(4, 5), high=0.2), case(normal(), -1, 1), case(normal(0), 0, 1)),
    "dropout": op(None, case(normal(4, 5), 0.3, 7), case(normal(3, 2, 3), 0.6, 2**63 + 5, first=2**40),
                  case(normal(5), 0.5, 1), case(normal(2, 3), 0.0, 1), case(normal(0, 3), 0.5, 1),
                  case(normal(3, 0), 0.5, 1)),
    # Layers
    "linear": op(lambda t, *a: t.nn.functional.linear(*a), case(normal(4, 3), normal(2, 3), normal(2)),
                 case(normal(4, 3), normal(2, 3)), case(normal(2, 5, 3), normal(2, 3), normal(2)),
                 case(normal(3), normal(2, 3), normal(2)), case(normal(1, 1), normal(1, 1), normal(1)),
                 case(normal(0, 3), normal(2, 3), normal(2)), case(normal(2, 0, 3), normal(2, 3), normal(2)),
                 case(normal(4, 0), normal(2, 0), normal(2)), case(normal(4, 3), normal(0, 3), normal(0)),
                 case(REAL[4, 3], normal(2, 3), normal(2)), case(normal(4, 3), REAL[2, 3])),
    "conv2d": op(lambda t, *a, **o: t.nn.functional.conv2d(*a, **o),
                 case(normal(2, 3, 5, 6), normal(4, 3, 3, 2), normal(4)),
                 case(normal(2, 3, 5, 6), normal(4, 3, 3, 3), normal(4), padding=1),
                 case(normal(2, 2, 7, 6), normal(3, 2, 3, 2), normal(3), stride=2),
                 case(normal(1, 2, 7, 8), normal(3, 2, 3, 3), stride=(2, 3), padding=(2, 1)),
                 case(normal(1, 2, 9, 8), normal(3, 2, 3, 2), dilation=(3, 2), padding=(0, 1)),
                 case(normal(1, 2, 9, 9), normal(2, 2, 3, 3), normal(2), stride=3, padding=2, dilation=2),
                 case(normal(2, 4, 4, 5), normal(6, 2, 3, 2), normal(6), groups=2, padding=1),
                 case(normal(2, 3, 5, 5), normal(3, 1, 3, 3), normal(3), groups=3, stride=2, padding=1),
                 case(normal(2, 2, 4, 4), normal(4, 1, 2, 2), normal(4), groups=2),
                 case(normal(2, 3, 4, 4), normal(2, 3, 1, 1), normal(2)),
                 case(normal(2, 3, 4, 4), normal(2, 3, 1, 1), stride=2), case(normal(1, 1, 1, 1), normal(1, 1, 1, 1)),
                 case(normal(1, 1, 1, 1), normal(1, 1, 3, 3), normal(1), padding=1),
                 case(normal(2, 1, 1, 9), normal(2, 1, 1, 4), stride=(1, 3)),
                 case(normal(1, 1, 3, 3), normal(1, 1, 2, 2), padding=4),
                 case(normal(0, 3, 4, 4), normal(2, 3, 3, 3), normal(2))),
    "max_pool2d": op(lambda t, *a: t.nn.functional.max_pool2d(*a), case(normal(2, 3, 4, 6), 2),
                     case(normal(1, 2, 5, 7), 2), case(normal(1, 2, 5, 7), 3, 2, 1), case(normal(2, 1, 6, 5), (2, 3), 1),
                     case(normal(2, 1, 6, 5), (3, 2), (1, 2), (1, 0)), case(normal(1, 1, 1, 1), 2, 1, 1),
                     case(normal(1, 1, 7, 7), 2, 3), case(normal(0, 2, 4, 4), 2)),
    "avg_pool2d": op(lambda t, *a: t.nn.functional.avg_pool2d(*a), case(normal(2, 3, 4, 6), 2),
                     case(normal(1, 2, 5, 7), 2), case(normal(1, 2, 5, 7), 3, 2, 1), case(normal(2, 1, 6, 5), (2, 3), 1),
                     case(normal(2, 1, 6, 5), (3, 2), (1, 2), (1, 0)), case(normal(1, 1, 1, 1), 2, 1, 1),
                     case(normal(1, 1, 7, 7), 2, 3), case(normal(0, 2, 4, 4), 2)),
    "scaled_dot_product_attention": op(
        attention_torch, case(normal(2, 3, 4, 5), normal(2, 3, 6, 5), normal(2, 3, 6, 7)),
        case(normal(2, 3, 4, 5), normal(2, 3, 4, 5), normal(2, 3, 4, 5), is_causal=True),
        case(normal(2, 3, 5), normal(2, 3, 5), normal(2, 3, 5), mask=np.array([[True, False, True], [False, True, True]])),
        case(normal(3, 5), normal(4, 5), normal(4, 2), scale=0.3), case(normal(1, 1), normal(1, 1), normal(1, 1)),
        case(normal(0, 3, 5), normal(0, 3, 5), normal(0, 3, 5))),
    "embedding": op(lambda t, ids, weight: t.nn.functional.embedding(ids.long(), weight),
                    case(np.array([[0, 2, 2], [4, 2, 0]]), normal(5, 3)), case(np.array(1), normal(5, 3)),
                    case(np.array([1, 1], np.uint8), normal(2, 1)), case(np.arange(8)[::-2], normal(8, 2)),
                    case(np.empty((0, 2), int), normal(5, 3))),
    # Normalisation
    "layer_norm": op(lambda t, x, weight=None, bias=None, eps=1e-5, axes=1: t.nn.functional.layer_norm(
        x, x.shape[x.ndim - axes:], weight, bias, eps),
        case(normal(4, 6), normal(6), normal(6)), case(normal(4, 6)), case(normal(4, 6), normal(6)),
        case(normal(4, 6), None, normal(6)), case(normal(2, 3, 5), normal(5), normal(5), eps=0.1),
        case(normal(2, 3, 5), normal(3, 5), normal(3, 5), axes=2), case(normal(2, 1, 5), normal(1, 5), normal(1, 5), axes=2),
        case(normal(6), normal(6), normal(6)), case(normal(3, 1), normal(1), normal(1), eps=0.1),
        case(normal(0, 6), normal(6), normal(6))),
    "group_norm": op(group_norm_torch,
                     case(normal(2, 4, 3, 2), 2, normal(4), normal(4)), case(normal(2, 4, 3, 2), 4, normal(4), normal(4)),
                     case(normal(2, 4, 3, 2), 2, normal(4), normal(4), relu=True), case(normal(2, 4, 3), 2, relu=True),
                     case(normal(2, 4, 3, 2), 1), case(normal(2, 4, 3, 2), 2, None, normal(4), eps=0.1),
                     case(normal(2, 9), 3, normal(9), normal(9)), case(normal(2, 3, 5), 3, normal(3), normal(3)),
                     case(normal(1, 1, 2, 2), 1, normal(1), normal(1)), case(normal(0, 4, 3, 2), 2, normal(4), normal(4))),
    "batch_norm": op(batch_norm_torch, *batch_norms(normal(5, 3, 2, 3), normal(3), normal(3)),
                     *batch_norms(normal(7, 3, 2)), *batch_norms(normal(8, 3), normal(3), samples=(4, 5)),
                     *batch_norms(normal(2, 3, 1, 2), None, normal(3)),
                     case(normal(0, 3, 2, 2), REAL[3,], np.exp(REAL[3,]), np.zeros(()), normal(3), normal(3))),
    # Losses
    "softmax": op(lambda t, x, axis=-1: t.softmax(x, axis), case(normal(3, 4)), case(normal(2, 3, 4), 1),
                  case(normal(2, 3, 4), axis=0), case(wide(3, 4)), case(normal(5)), case(normal(3, 1)),
                  case(normal(0, 4)), case(normal(3, 0)), case(normal(0, 4), 0)),
    "log_softmax": op(lambda t, x, axis=-1: t.log_softmax(x, axis), case(normal(3, 4)), case(normal(2, 3, 4), 1),
                      case(normal(2, 3, 4), axis=0), case(wide(3, 4)), case(normal(5)), case(normal(3, 1)),
                      case(normal(0, 4)), case(normal(3, 0)), case(normal(0, 4), 0)),
    "cross_entropy": op(cross_entropy_torch,
                        case(normal(5, 4), np.array([0, 3, 1, 1, 2])), case(wide(5, 4), np.array([0, 3, 1, 1, 2])),
                        case(normal(5, 4), np.array([0, 3, 1, 1, 2], np.uint8), label_smoothing=0.1),
                        case(normal(5, 4), np.array([0, -100, 1, -100, 2]), label_smoothing=0.2),
                        case(normal(5, 4), np.array([0, 3, 1, 1, 3]), ignore_index=3),
                        case(normal(2, 4), np.array([1, 1]), ignore_index=1),
                        case(normal(2, 3, 4), np.array([[0, 1, 2], [3, 3, 0]])), case(normal(4), np.array(2)),
                        case(normal(2, 3, 4), np.array([[0, 1, 2], [3, -1, 0]]), ignore_index=-1, label_smoothing=0.3),
                        case(normal(5, 4), PARTS), case(normal(5, 4), PARTS, label_smoothing=0.1),
                        case(wide(5, 4), PARTS), case(normal(2, 3, 4), np.exp(REAL[2, 3, 4])),
                        case(normal(4), PARTS[0]), case(normal(3, 1), np.zeros(3, int)),
                        case(normal(0, 4), np.empty(0, int)), case(normal(0, 3), np.empty((0, 3)))),
    "binary_cross_entropy_with_logits": op(
        lambda t, x, y: t.nn.functional.binary_cross_entropy_with_logits(x, y.to(x.dtype), reduction="sum"),
        *losses(case(wide(5, 2), REAL[5, 2] > 0))),
    "mse_loss": op(lambda t, x, y: t.nn.functional.mse_loss(x, y.to(x.dtype), reduction="sum"), *losses()),
    "l1_loss": op(lambda t, x, y: t.nn.functional.l1_loss(x, y.to(x.dtype), reduction="sum"), *losses()),
    "huber_loss": op(lambda t, x, y, delta=1.0: t.nn.functional.huber_loss(x, y.to(x.dtype), "sum", delta),
                     *losses(case(normal(5, 2), REAL[5, 2], delta=0.3), case(wide(5, 2), REAL[5, 2], 2.5))),
}

ALL = [c._replace(name=f"{name}-{i}", call=call or getattr(ops, name), torch=torch)
       for name, (torch, cases, call) in CASES.items() for i, c in enumerate(cases)]
every_case = pytest.mark.parametrize("case", ALL, ids=[c.name for c in ALL])


# --- The table is complete ------------------------------------------------------------------------------------

def test_every_op_has_a_case():
    rules = {name.lstrip("_") for module in (ops, tensor) for name, f in vars(module).items() if hasattr(f, "rule")}
    assert len(rules) > 40
    assert rules | set(ops.__all__) == set(CASES)


@pytest.mark.parametrize("name", ops.__all__)
def test_every_op_is_documented(name):
    assert len(getattr(ops, name).__doc__.strip()) > 2


def test_ops_are_listed_in_order():
    public = {name for name, f in vars(ops).items() if hasattr(f, "rule") and not name.startswith("_")}
    assert public <= set(ops.__all__)
    assert list(ops.__all__) == sorted(ops.__all__)


# --- Every case -----------------------------------------------------------------------------------------------

def close(actual, expected, tolerance, floor=0.1):
    """Equal to within ``tolerance`` of the largest element, or of ``floor`` if all are smaller."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    scale = max(np.abs(expected).max(initial=0.0), floor)
    np.testing.assert_allclose(actual / scale, expected / scale, rtol=0, atol=tolerance)


@every_case
def test_adjoint_against_finite_differences(case):
    args = case.draw(np.float64)
    u = weights(np.float64)
    value, gradients = case.gradients(args, u)
    u = u(value.shape)
    assert gradients
    eps = 1e-6

    def slope(i, direction):
        moved = [[a + sign * eps * direction if j == i else a for j, a in enumerate(args)] for sign in (1, -1)]
        return (case.project(moved[0], u) - case.project(moved[1], u)) / (2 * eps)

    for i, gradient in gradients.items():
        v = np.asarray(np.random.default_rng(2).standard_normal(args[i].shape))
        scale = np.linalg.norm(gradient) * np.linalg.norm(v)
        assert abs(slope(i, v) - np.vdot(gradient, v)) <= 1e-6 * max(scale, 0.1)
        numeric = np.empty(args[i].shape)
        for place in np.ndindex(args[i].shape):
            one = np.zeros(args[i].shape)
            one[place] = 1
            numeric[place] = slope(i, one)
        close(gradient, numeric, 1e-6)


@pytest.mark.parametrize("case", [c for c in ALL if c.torch], ids=lambda c: c.name)
def test_against_pytorch(case):
    t = pytest.importorskip("torch")
    args = case.draw(np.float32)
    value, gradients = case.gradients(args, weights(np.float32))
    theirs = [t.from_numpy(a.copy()) if isinstance(a, np.ndarray) else a for a in args]
    for i in gradients:
        theirs[i].requires_grad_()
    expected = case.torch(t, *theirs, **case.options)
    close(value, expected.detach().numpy(), 1e-5)
    expected.backward(t.from_numpy(weights(np.float32)(value.shape)))
    for i, gradient in gradients.items():
        close(gradient, theirs[i].grad.numpy(), 1e-5)


@every_case
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dtype_is_kept(case, dtype):
    value, gradients = case.gradients(case.draw(dtype), weights(dtype))
    assert value.dtype == dtype
    assert {g.dtype for g in gradients.values()} == {np.dtype(dtype)}


@every_case
def test_plain_arrays_give_plain_arrays(case):
    args = case.draw(np.float32)
    plain = case.call(*args, **case.options)
    assert isinstance(plain, (np.ndarray, np.float32))
    np.testing.assert_array_equal(plain, case.gradients(args, weights(np.float32))[0])


@pytest.mark.parametrize("case", [c for c in ALL if c.call is not ops.identity], ids=lambda c: c.name)
def test_a_replayed_op_gives_the_same_bits(case):
    args = case.draw(np.float32)

    def function(*tensors):
        rest = iter(tensors)
        return case.call(*[next(rest) if callable(made) else a for made, a in zip(case.args, args, strict=True)],
                         **case.options)

    def weights(shape):
        return np.linspace(1, 2, int(np.prod(shape)), dtype=np.float32).reshape(shape)

    replay = Replay(function)
    replayed = case._replace(call=lambda *args, **options: replay(*[a for a in args if isinstance(a, Tensor)]))
    expected, gradients = case.gradients(args, weights)
    for _ in range(3):  # the third time it is a program
        value, others = replayed.gradients(args, weights)
    assert replay.reasons == []
    np.testing.assert_array_equal(value, expected)
    for i, gradient in gradients.items():
        np.testing.assert_array_equal(others[i], gradient)


def fortran(x):
    return np.array(x, order="F")


def strided(x):
    wide = np.zeros((*x.shape, 2), x.dtype)
    wide[..., 0] = x
    return wide[..., 0]


def reversed_(x):
    return np.flip(np.flip(x).copy())


def read_only(x):
    x = x.copy()
    x.flags.writeable = False
    return x


@every_case
@pytest.mark.parametrize("layout", [fortran, strided, reversed_, read_only])
def test_memory_layout_does_not_matter(case, layout):
    args = case.draw(np.float32)
    value, gradients = case.gradients(args, weights(np.float32))
    other, others = case.gradients([layout(a) if isinstance(a, np.ndarray) else a for a in args],
                                   weights(np.float32, layout))
    close(other, value, 1e-6)
    for i, gradient in gradients.items():
        close(others[i], gradient, 1e-6)


# --- What the table cannot say --------------------------------------------------------------------------------

@pytest.mark.parametrize(("reduce", "extreme"), [(ops.max, 3.0), (ops.min, 1.0)])
def test_equal_extremes_share_the_gradient(reduce, extreme):
    x = Tensor(np.array([[1.0, 3.0, 1.0, 3.0], [1.0, 1.0, 3.0, 3.0]]))
    reduce(x, 1).backward(np.array([2.0, 4.0]))
    np.testing.assert_array_equal(x.grad, np.where(x.value == extreme, [[1.0], [2.0]], 0.0))


def test_max_pool_takes_the_first_of_equal_elements():
    x = Tensor(np.zeros((1, 1, 2, 2)))
    ops.max_pool2d(x, 2).backward(np.ones((1, 1, 1, 1)))
    np.testing.assert_array_equal(x.grad.ravel(), [1, 0, 0, 0])


@pytest.mark.parametrize("f", [ops.relu, ops.sigmoid, ops.silu, ops.gelu, ops.softmax, ops.log_softmax, ops.max,
                               lambda x: ops.max_pool2d(x.reshape(1, 1, 1, 3), (1, 3))])
def test_nan_is_not_hidden(f):
    assert np.isnan(f(np.array([1.0, np.nan, 2.0], np.float32))).any()


def test_no_overflow_far_from_zero():
    x = np.array([-1e4, 1e4], np.float32)
    np.testing.assert_array_equal(ops.sigmoid(x), [0, 1])
    np.testing.assert_array_equal(ops.softmax(x), [0, 1])
    np.testing.assert_array_equal(ops.log_softmax(x), [-2e4, 0])
    assert ops.cross_entropy(x, np.array(0)) == 2e4
    assert ops.binary_cross_entropy_with_logits(x, np.array([1, 0])) == 2e4


def test_cross_entropy_with_a_class_masked_out():
    logits = Tensor(np.array([[1.0, -np.inf, 2.0]]))
    loss = ops.cross_entropy(logits, np.array([0]))
    loss.backward()
    rest = Tensor(np.array([[1.0, 2.0]]))
    other = ops.cross_entropy(rest, np.array([0]))
    other.backward()
    assert float(loss) == pytest.approx(float(other))
    np.testing.assert_allclose(logits.grad[:, [0, 2]], rest.grad)
    assert logits.grad[0, 1] == 0


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_losses_of_parts_add_up(smoothing):
    rng = np.random.default_rng(0)
    logits, labels = rng.standard_normal((7, 4)), rng.integers(0, 4, 7)
    whole = ops.cross_entropy(logits, labels, smoothing)
    parts = [ops.cross_entropy(logits[a:b], labels[a:b], smoothing) for a, b in [(0, 3), (3, 3), (3, 7)]]
    assert sum(parts) == pytest.approx(whole)


def test_softmax_of_a_strided_axis_is_that_of_each_column():
    x = np.random.default_rng(0).standard_normal((3, 4))
    np.testing.assert_allclose(ops.softmax(x, 0), np.exp(x) / np.exp(x).sum(0))


def dropped(n=64, size=1000, p=0.25, key=3, first=0, dtype=np.float32):
    return ops.dropout(np.ones((n, size), dtype), p, key, first)


@pytest.mark.parametrize("p", [0.1, 0.25, 0.9])
def test_dropout_keeps_its_share(p):
    y = dropped(p=p)
    np.testing.assert_allclose(y[y != 0], 1 / (1 - p), rtol=1e-6)
    deviation = np.sqrt(p * (1 - p) / y.size)
    assert abs(np.mean(y == 0) - p) < 5 * deviation
    for axis in (0, 1):  # no row and no column is favoured
        count = y.shape[axis]
        assert np.abs(np.mean(y == 0, axis) - p).max() < 6 * np.sqrt(p * (1 - p) / count)


def test_dropout_masks_are_independent():
    p = 0.25
    masks = [dropped(n=1, size=20000, key=key, first=first)[0] == 0
             for key in (1, 2, 2**32 + 1, 2**64 - 1) for first in (0, 1, 2**32, 2**40)]
    shared = np.corrcoef(masks) - np.eye(len(masks))
    assert np.abs(shared).max() < 6 / np.sqrt(20000)
    assert abs(np.mean(masks) - p) < 0.01


def test_dropout_depends_on_the_global_sample_only():
    whole = dropped(n=10, size=7)
    np.testing.assert_array_equal(np.concatenate([dropped(n=3, size=7), dropped(n=7, size=7, first=3)]), whole)
    np.testing.assert_array_equal(dropped(n=10, size=7, dtype=np.float64) == 0, whole == 0)


def test_batch_norm_sums_its_statistics():
    rng = np.random.default_rng(0)
    x, samples = rng.standard_normal((7, 3, 2, 2)), 3  # blocks of 3, 3 and 1 samples
    statistics = [Tensor(np.zeros(3)), Tensor(np.ones(3)), Tensor(np.zeros(()))]
    g = rng.standard_normal(x.shape)
    for _ in range(2):  # they accumulate, whatever the gradient is
        ops.batch_norm(Tensor(x), *statistics, training=True, samples=samples).backward(g)
    blocks = [x[i:i + samples] for i in range(0, 7, samples)]
    mean, var, seen = (s.grad for s in statistics)
    np.testing.assert_allclose(mean, 2 * sum(len(b) * b.mean((0, 2, 3)) for b in blocks))
    np.testing.assert_allclose(var, 2 * sum(len(b) * b.var((0, 2, 3), ddof=1) for b in blocks))
    assert seen == 14


def test_batch_norm_statistics_do_not_depend_on_the_partition():
    x = np.random.default_rng(0).standard_normal((8, 3, 2, 2))

    def run(*parts):
        statistics = [Tensor(np.zeros(3)), Tensor(np.ones(3)), Tensor(np.zeros(()))]
        values = []
        for part in parts:
            value = ops.batch_norm(part, *statistics, training=True, samples=2)
            value.backward(np.ones(value.shape))
            values.append(value.value)
        return np.concatenate(values), *[s.grad for s in statistics]

    for one, other in zip(run(x), run(x[:2], x[2:6], x[6:6], x[6:]), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-13)


def test_batch_norm_leaves_the_running_statistics_alone():
    mean, var = np.zeros(3), np.ones(3)
    ops.batch_norm(np.random.default_rng(0).standard_normal((4, 3)), mean, var, np.zeros(()), training=True)
    np.testing.assert_array_equal([mean, var], [np.zeros(3), np.ones(3)])


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


IMAGE = zeros(2, 4, 5, 5)
INTEGERS = zeros(2, 3, dtype=int)


@pytest.mark.parametrize(("error", "words", "f"), [
    (ValueError, "takes 4 features .* has 3", lambda: ops.linear(zeros(2, 3), zeros(5, 4))),
    (ValueError, "the input is a number", lambda: ops.linear(zeros(), zeros(5, 4))),
    (ValueError, r"bias of shape \(5,\), not \(1,\)", lambda: ops.linear(zeros(2, 4), zeros(5, 4), zeros(1))),
    (TypeError, "float64 and float32: convert", lambda: ops.linear(zeros(2, 4, dtype=float), zeros(5, 4))),
    (TypeError, "arrays of float32 and float64", lambda: ops.linear(zeros(2, 4), zeros(5, 4), zeros(5, dtype=float))),
    (ValueError, r"takes images \(n, c, h, w\) .* not \(2, 4\)", lambda: ops.conv2d(zeros(2, 4), zeros(3, 4, 2, 2))),
    (ValueError, r"weight \(3, 3, .* channels .* images have shape \(2, 4,", lambda: ops.conv2d(IMAGE, zeros(3, 3, 2, 2))),
    (ValueError, "multiple of the groups", lambda: ops.conv2d(IMAGE, zeros(3, 2, 2, 2), groups=2)),
    (ValueError, "groups=0 takes", lambda: ops.conv2d(IMAGE, zeros(3, 4, 2, 2), groups=0)),
    (ValueError, r"a weight \(out, c / groups, kh, kw\), not", lambda: ops.conv2d(IMAGE, zeros(3, 4))),
    (ValueError, "takes a bias of shape", lambda: ops.conv2d(IMAGE, zeros(3, 4, 2, 2), zeros(1))),
    (ValueError, "finds no place in images", lambda: ops.conv2d(IMAGE, zeros(3, 4, 6, 2))),
    (ValueError, "finds no place in images", lambda: ops.conv2d(IMAGE, zeros(3, 4, 3, 3), dilation=3)),
    (ValueError, "strides and dilations >= 1", lambda: ops.conv2d(IMAGE, zeros(3, 4, 2, 2), stride=0)),
    (ValueError, "stride is a number or a pair", lambda: ops.conv2d(IMAGE, zeros(3, 4, 2, 2), stride=(1, 1, 1))),
    (ValueError, "padding of half", lambda: ops.max_pool2d(IMAGE, 2, padding=2)),
    (ValueError, "finds no place", lambda: ops.avg_pool2d(IMAGE, 6)),
    (ValueError, "images of shape", lambda: ops.avg_pool2d(zeros(2, 3), 2)),
    (TypeError, "integer ids, not float32", lambda: ops.embedding(zeros(2), zeros(3, 2))),
    (ValueError, r"id 3 at position \(1, 0\) .* from 0 to 2", lambda: ops.embedding([[0], [3]], zeros(3, 2))),
    (ValueError, "id -1 at position", lambda: ops.embedding([-1], zeros(3, 2))),
    (ValueError, "takes a weight of shape", lambda: ops.layer_norm(zeros(2, 3), zeros(2))),
    (ValueError, "takes a bias of shape", lambda: ops.layer_norm(zeros(2, 3), zeros(3), zeros(1))),
    (ValueError, r"one shape, not \(2, 4, 5, 5\) and \(1,\)", lambda: ops.add_relu(IMAGE, zeros(1))),
    (ValueError, "cannot split 4 channels", lambda: ops.group_norm(IMAGE, 3)),
    (ValueError, r"takes a weight of shape \(4,\)", lambda: ops.group_norm(IMAGE, 2, zeros(1))),
    (ValueError, "takes a running_mean of shape", lambda: ops.batch_norm(IMAGE, zeros(3), zeros(3), zeros())),
    (ValueError, "a single value per channel",
     lambda: ops.batch_norm(zeros(1, 3), zeros(3), zeros(3), zeros(), training=True)),
    (ValueError, "a mean of nothing", lambda: ops.mean(zeros(2, 0), 1)),
    (ValueError, r"not \(2, 3, 4\) and \(2, 4\) of bool", lambda: ops.masked_mean(zeros(2, 3, 4), zeros(2, 4) > 0)),
    (ValueError, r"\(2, 3\) of float32", lambda: ops.masked_mean(zeros(2, 3, 4), zeros(2, 3))),
    (ValueError, "0 <= p < 1, not 1", lambda: ops.dropout(zeros(2, 3), 1, key=0)),
    (ValueError, "approximate=.*'erf'", lambda: ops.gelu(zeros(2), approximate="erf")),
    (ValueError, "label 3 at position 1 .* from 0 to 2", lambda: ops.cross_entropy(zeros(2, 3), np.array([0, 3]))),
    (ValueError, "label -1 at position 0", lambda: ops.cross_entropy(zeros(2, 3), np.array([-1, 0]))),
    (ValueError, "integer labels of shape", lambda: ops.cross_entropy(zeros(2, 3), np.array([0, 1, 2]))),
    (ValueError, "integer labels of shape", lambda: ops.cross_entropy(zeros(2, 3), zeros(2))),
    (TypeError, "a target of float64", lambda: ops.cross_entropy(zeros(2, 3), zeros(2, 3, dtype=float))),
    (ValueError, "arrays of one shape", lambda: ops.mse_loss(zeros(2, 3), zeros(3))),
    *[(TypeError, "takes float32 or float64, not int64", lambda f=f: f(INTEGERS)) for f in (
        ops.sigmoid, ops.gelu, ops.silu, ops.softmax, ops.log_softmax, ops.layer_norm,
        lambda x: ops.group_norm(x, 3), lambda x: ops.dropout(x, 0.5, 1), lambda x: ops.mse_loss(x, x),
        lambda x: ops.avg_pool2d(x[None, None], 1), lambda x: ops.cross_entropy(x, np.array([0, 1])))],
])
def test_errors_say_what_is_wrong(error, words, f):
    with pytest.raises(error, match=words):
        f()
