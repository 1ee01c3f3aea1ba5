"""Reverse-mode automatic differentiation: the Tensor, the ``@op`` that records it, and ``backward``.

A :class:`Tensor` is an array that wants a gradient. An op applied to plain arrays returns a plain array and
records nothing; applied to a Tensor, it returns a Tensor that remembers, for each argument that wants a
gradient, one function: the vjp, which maps the gradient for the op's value to the gradient for that argument.
These (argument, vjp) pairs are the tape. ``backward`` walks it once, from the end.

>>> import numpy as np
>>> x = Tensor(np.array([1.0, 2.0, 3.0]))
>>> y = x * x + 2 * x
>>> y.backward(np.ones(3))
>>> x.grad
array([4., 6., 8.])
"""

import functools
import inspect
import itertools
import math
import threading

import numpy as np

from mpiml import kernels

FLOATS = (np.dtype(np.float32), np.dtype(np.float64))
_new = object.__new__
recordings = {}  # {thread: who is to be told of each op that is called in it}, see mpiml.replay


class Tensor:
    """An array that wants a gradient.

    Parameters
    ----------
    value : array_like of float32 or float64
        Kept as it is if it is an array (no copy).

    Attributes
    ----------
    value : numpy.ndarray
        The plain array.
    grad : numpy.ndarray or None
        The accumulated gradient, of the value's shape and dtype; only leaves (Tensors that no op made) get one.

    Raises
    ------
    TypeError
        Another dtype: gradients need float32 or float64.
    """

    __slots__ = ("grad", "node", "value")
    __array_ufunc__ = None  # array + Tensor asks the Tensor

    def __init__(self, value):
        value = np.asarray(value)
        if value.dtype not in FLOATS:
            raise TypeError(f"a Tensor holds float32 or float64, not {value.dtype}: convert it with "
                            f".astype(np.float32), or leave it a plain array if it needs no gradient")
        self.value = value
        self.grad = None
        self.node = None  # a leaf; the value of an op has a Node

    def backward(self, gradient=None):
        """Accumulate into ``grad`` of every leaf the gradient of this Tensor, see :func:`backward`."""
        for _ in backward(self, gradient):
            pass

    shape = property(lambda self: self.value.shape)
    ndim = property(lambda self: self.value.ndim)
    size = property(lambda self: self.value.size)
    dtype = property(lambda self: self.value.dtype)

    def __len__(self):
        return len(self.value)

    def __float__(self):
        return float(_look(self))

    def __bool__(self):
        return bool(_look(self))

    def __repr__(self):
        return f"Tensor({np.array2string(self.value, separator=', ', prefix='Tensor(')}, {self.dtype})"

    def __array__(self, *args, **kwargs):
        raise TypeError("NumPy would lose this Tensor's gradient: use mpiml.ops, or .value for the plain array")

    __hash__ = object.__hash__

    # Comparisons make masks, plain boolean arrays.
    def __lt__(self, other):
        return _look(self) < value_of(other)

    def __le__(self, other):
        return _look(self) <= value_of(other)

    def __gt__(self, other):
        return _look(self) > value_of(other)

    def __ge__(self, other):
        return _look(self) >= value_of(other)

    def __eq__(self, other):
        return _look(self) == value_of(other)

    def __ne__(self, other):
        return _look(self) != value_of(other)

    def __add__(self, other):
        return add(self, other)

    def __radd__(self, other):
        return add(other, self)

    def __sub__(self, other):
        return subtract(self, other)

    def __rsub__(self, other):
        return subtract(other, self)

    def __mul__(self, other):
        return multiply(self, other)

    def __rmul__(self, other):
        return multiply(other, self)

    def __truediv__(self, other):
        return divide(self, other)

    def __rtruediv__(self, other):
        return divide(other, self)

    def __pow__(self, other):
        return power(self, other)

    def __rpow__(self, other):
        return power(other, self)

    def __matmul__(self, other):
        return matmul(self, other)

    def __rmatmul__(self, other):
        return matmul(other, self)

    def __neg__(self):
        return negative(self)

    def __getitem__(self, index):
        return getitem(self, index)


class Node:
    """The place of an op's value on the tape, without the value itself, so that this may be freed before the walk.

    ``edges`` are pairs (Node or leaf, vjp), one for each argument that wants a gradient; None once walked. With a
    ``joint`` vjp for all ``parameters`` of the rule, they are pairs (Node or leaf, number of the argument).
    """

    __slots__ = ("dtype", "edges", "joint", "parameters", "shape")
    grad = None  # only leaves keep one


def value_of(x):
    """The plain array of a Tensor; anything else as it is."""
    return x.value if isinstance(x, Tensor) else x


def op(rule):
    """Make a differentiable function of a rule: a function of plain arrays that returns (value, vjps).

    ``vjps`` is a tuple with one function for each positional argument (trailing ones that take no gradient
    may be left out), each mapping the gradient for the value to the gradient for that argument. It is called
    once at most, and only if that argument is a Tensor, so a rule saves nothing by hand: what a vjp mentions
    lives as long as the tape does.

    Where the gradients share work, ``vjps`` is one function ``vjp(g, into)`` of the gradient for the value and a list
    with an entry for each parameter of the rule: None if its gradient is not wanted, else an array to which it may be
    added, or True. It returns the gradients, in new arrays (one may serve several arguments), and None
    for those added and those left out. One that nobody wanted but that came along is not computed again where it was
    only put off (``later`` in :func:`backward`).

    Raises
    ------
    TypeError
        From the op: its value would not have the dtype of its Tensors (float32 and float64 were mixed), or an
        argument that takes no gradient is a Tensor.
    """
    signature = inspect.signature(rule)
    name = rule.__name__.lstrip("_")
    several = any(p.kind is p.VAR_POSITIONAL for p in signature.parameters.values())
    parameters = None if several else len(signature.parameters)

    @functools.wraps(rule)
    def apply(*args, **options):
        if options and any(isinstance(option, Tensor) for option in options.values()):
            bound = signature.bind(*args, **options)
            bound.apply_defaults()  # behind an argument left out, a Tensor would stay a keyword
            args, options = bound.args, bound.kwargs
        values, edges = [*args], []
        for i, a in enumerate(args):
            if isinstance(a, Tensor):
                values[i] = a.value
                edges.append((a.node or a, i))
        value, vjps = rule(*values, **options)
        if edges:
            value = np.asarray(value)  # a loss is a number
            dtype = value.dtype
            for _, i in edges:
                if values[i].dtype is not dtype and values[i].dtype != dtype:
                    raise TypeError(f"{name} of {_kinds(args)} gives {dtype}: use one of float32 and float64 throughout, "
                                    f"with .astype(np.{values[i].dtype})")
            joint = callable(vjps)
            if not joint:
                edges = [(place, _vjp(name, vjps, i)) for place, i in edges]
            value = on_tape(value, edges, vjps if joint else None, parameters or len(args))
        if recordings:
            _record(apply, args, options, value)
        return value

    apply.rule = rule
    return apply


def on_tape(value, edges, joint, parameters):
    """The Tensor of an op's value; the arguments are those of its :class:`Node`."""
    # Many are made in each step, hence without __init__, whose checks they do not need.
    tensor, node = _new(Tensor), _new(Node)
    tensor.value, tensor.grad, tensor.node = value, None, node
    node.edges, node.joint, node.parameters, node.shape, node.dtype = edges, joint, parameters, value.shape, value.dtype
    return tensor


def _record(called, args, options, result):
    recording = recordings.get(threading.get_ident())
    if recording:
        recording.add(called, args, options, result)


def _look(tensor):
    """The value, for Python to see: what is made of it, such as a branch, is in no recording."""
    recording = recordings and recordings.get(threading.get_ident())
    if recording:
        recording.fail("it looked at the value of a Tensor, by a comparison, bool() or float(): use mpiml.ops")
    return tensor.value


def _vjp(name, vjps, i):
    if i >= len(vjps) or vjps[i] is None:
        raise TypeError(f"{name} has no gradient for its argument {i + 1}: pass a plain array")
    return vjps[i]


def _kinds(args):
    return " and ".join(str(a.dtype) for a in args if hasattr(a, "dtype"))


def backward(root, gradient=None, wrt=None, later=None):
    """Walk the tape back from ``root``; yield each leaf as soon as its gradient is final.

    Gradients are added to the leaves' ``grad``. The tape is used up on the way, so that what it holds is freed
    as early as possible.

    Parameters
    ----------
    root : Tensor
    gradient : array of root's shape and dtype, optional
        The gradient for ``root``; 1 if root has one element.
    wrt, later : Tensor and list, optional
        With ``later``, only the gradient for the leaf ``wrt`` is computed. Those for the other leaves are put off: for
        each, a function without arguments that adds it to the leaf's ``grad`` is appended to ``later``. So the
        backward pass can be split in two, and what nobody waits for done when there is time.

    Yields
    ------
    Tensor
        A leaf. Nothing more will be added to its ``grad`` in this walk: a sum over the ranks may start.

    Raises
    ------
    ValueError
        ``gradient`` is missing or of another shape, a vjp returned another shape or dtype than its argument's,
        or part of the tape was walked before.
    """
    if gradient is None:
        if root.size != 1:
            raise ValueError(f"the gradient of a Tensor of shape {root.shape} needs to know its weights: sum it to "
                             f"one number first, or call backward(gradient)")
        gradient = np.ones(root.shape, root.dtype)
    _check(gradient, root, "backward's argument")
    if root.node is None:
        _accumulate(root, gradient, "backward's argument")
        yield root
        return
    uses = _count_uses(root.node)
    gradients = {root.node: gradient}
    ready = [root.node]
    while ready:
        node = ready.pop()
        g = gradients.pop(node)
        edges, joint, node.edges, node.joint = node.edges, node.joint, None, None
        put_off = ()
        if later is not None:
            waits = [isinstance(argument, Tensor) and argument is not wrt for argument, _ in edges]
            put_off = [*itertools.compress(edges, waits)]
            edges = [edge for edge, wait in zip(edges, waits, strict=True) if not wait]
        parts = None if joint is None else _all(edges, joint, node.parameters, g)
        if put_off:
            came = {i: parts[i] for _, i in put_off} if parts else {}
            later.append(functools.partial(_contribute, put_off, joint, node.parameters, g, came))
        for argument, vjp in edges:
            part = vjp(g) if joint is None else parts[vjp]
            left = uses[argument] - 1
            if left:
                uses[argument] = left
            if type(argument) is Node:
                if type(part) is not np.ndarray or part.shape != argument.shape or part.dtype != argument.dtype:
                    _check(part, argument, joint or vjp)
                if argument in gradients:
                    own = joint is not None and is_own(part, parts)
                    part = np.add(gradients[argument], part, out=part if own else None)
                gradients[argument] = part
                if not left:
                    ready.append(argument)
            else:
                if part is not None or joint is None:  # else it was added
                    _accumulate(argument, part, joint or vjp, joint is not None and is_own(part, parts))
                if not left:
                    yield argument


def _all(edges, joint, parameters, g):
    """The gradients for all arguments of an op with a joint vjp; None for those that it added to their leaf's."""
    if not edges:
        return []
    offers = [None] * parameters
    for argument, i in edges:
        offers[i] = True if argument.grad is None else argument.grad
    return joint(g, offers)


def is_own(part, parts):
    """Whether a joint vjp, which returned ``parts``, made this one for one argument alone: memory to write to, and to keep."""
    return isinstance(part, np.ndarray) and sum(other is part for other in parts) == 1


def _contribute(edges, joint, parameters, g, parts):
    """Add to the gradients of leaves what was left for later; ``parts`` of a joint vjp may have come along before."""
    if joint is not None and any(parts.get(i) is None for _, i in edges):
        parts = _all(edges, joint, parameters, g)
    for leaf, vjp in edges:
        part = vjp(g) if joint is None else parts[vjp]
        if part is not None or joint is None:
            _accumulate(leaf, part, joint or vjp)


def _count_uses(root):
    uses = {}
    stack = [root]
    while stack:
        node = stack.pop()
        if node.edges is None:
            raise ValueError("part of this tape was already walked by backward and is gone: add up the losses "
                             "and call backward once, or compute this one anew")
        for argument, _ in node.edges:
            if argument in uses:
                uses[argument] += 1
            else:
                uses[argument] = 1
                if type(argument) is Node:
                    stack.append(argument)
    return uses


def _accumulate(leaf, part, source, own=False):
    _check(part, leaf, source)
    if leaf.grad is None:
        leaf.grad = part if own else np.array(part)  # a copy: a vjp may return its argument
    else:
        leaf.grad += part


def _check(gradient, place, source):
    if isinstance(gradient, (np.ndarray, np.generic)) and gradient.shape == place.shape and gradient.dtype == place.dtype:
        return
    name = getattr(source, "__qualname__", str(source)).split(".")[0]
    if not isinstance(gradient, (np.ndarray, np.generic)):
        raise TypeError(f"the gradient from {name} is an array, not a {type(gradient).__name__}")
    raise ValueError(f"the gradient from {name} has shape {gradient.shape} and dtype {gradient.dtype}, its Tensor "
                     f"{place.shape} and {place.dtype}")


def unbroadcast(g, shape):
    """``g`` summed over the axes along which an array of ``shape`` was broadcast: the vjp of broadcasting.

    >>> unbroadcast(np.ones((2, 3)), (3,))
    array([2., 2., 2.])
    """
    if g.shape == shape:
        return g
    lead = g.ndim - len(shape)
    stretched = tuple(lead + i for i, n in enumerate(shape) if n == 1 and g.shape[lead + i] != 1)
    return g.sum(axis=(*range(lead), *stretched)).reshape(shape)


@op
def add(x, y):
    """x + y, with broadcasting."""
    x_shape, y_shape = np.shape(x), np.shape(y)  # all that the vjps need to keep
    return np.add(x, y), (lambda g: unbroadcast(g, x_shape), lambda g: unbroadcast(g, y_shape))


@op
def subtract(x, y):
    """x - y, with broadcasting."""
    x_shape, y_shape = np.shape(x), np.shape(y)
    return np.subtract(x, y), (lambda g: unbroadcast(g, x_shape), lambda g: unbroadcast(-g, y_shape))


@op
def multiply(x, y):
    """x * y, with broadcasting."""
    return np.multiply(x, y), (lambda g: unbroadcast(g * y, np.shape(x)), lambda g: unbroadcast(g * x, np.shape(y)))


@op
def divide(x, y):
    """x / y, with broadcasting."""
    value = np.true_divide(x, y)
    x_shape = np.shape(x)
    return value, (lambda g: unbroadcast(g / y, x_shape), lambda g: unbroadcast(-g * value / y, np.shape(y)))


@op
def negative(x):
    """-x."""
    return np.negative(x), (lambda g: -g,)


@op
def power(x, y):
    """x**y, with broadcasting; the gradient for y takes 0**y as constant."""
    value = np.power(x, y)

    def vjp_x(g):
        slope = y * np.power(x, np.where(y == 0, np.ones_like(y), y) - 1)
        return unbroadcast(g * slope.astype(g.dtype, copy=False), np.shape(x))

    def vjp_y(g):
        return unbroadcast(g * value * np.log(np.where(x > 0, x, np.ones_like(x))).astype(g.dtype, copy=False), np.shape(y))

    return value, (vjp_x, vjp_y)


@op
def matmul(x, y):
    """Matrix product as ``numpy.matmul``: (..., n, k) @ (..., k, m), leading axes broadcast, vectors allowed."""
    # A vector is a matrix with one axis that the product drops again; with it put back there is one rule.
    left, right = (x[None, :] if np.ndim(x) == 1 else x), (y[:, None] if np.ndim(y) == 1 else y)

    def full(g):
        return np.reshape(g, (*g.shape, *(1,) * (np.ndim(y) == 1))) if np.ndim(x) > 1 else (
            np.reshape(g, (*g.shape[:g.ndim - (np.ndim(y) > 1)], 1, right.shape[-1])))

    value = _product(left, right)
    if np.ndim(x) == 1:
        value = value[..., 0, :]
    return value[..., 0] if np.ndim(y) == 1 else value, (
        lambda g: unbroadcast(_product(full(g), right.swapaxes(-1, -2)), left.shape).reshape(x.shape),
        lambda g: unbroadcast(_product(left.swapaxes(-1, -2), full(g)), right.shape).reshape(y.shape))


def _product(x, y):
    """``numpy.matmul`` of matrices and stacks of them, the sums in one fixed order."""
    if x.dtype != y.dtype or x.dtype not in FLOATS or x.shape[-1] != y.shape[-2]:
        return np.matmul(x, y)  # integers, and errors
    if y.ndim == 2:
        rows = x.reshape(1, math.prod(x.shape[:-1]), x.shape[-1])
        return kernels.matmul(rows, y[None]).reshape(*x.shape[:-1], y.shape[-1])
    lead = np.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    stacks = [np.broadcast_to(a, lead + a.shape[-2:]).reshape(math.prod(lead), *a.shape[-2:]) for a in (x, y)]
    return kernels.matmul(*stacks).reshape(*lead, x.shape[-2], y.shape[-1])


@op
def getitem(x, index):
    """x[index]: integers, slices, None, ..., masks and integer arrays, as in NumPy."""
    def vjp(g):
        out = np.zeros_like(x)
        if _is_basic(index):
            out[index] = g
        else:
            np.add.at(out, index, g)  # an element may be taken several times
        return out

    return np.asarray(x[index]), (vjp,)


def _is_basic(index):
    parts = index if isinstance(index, tuple) else (index,)
    return all(p is None or p is Ellipsis or isinstance(p, (int, np.integer, slice)) for p in parts)
