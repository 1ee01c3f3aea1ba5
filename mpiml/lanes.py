"""Lanes: training that gives the same bits on any number of ranks.

Adding floating-point numbers in another order gives another result, so weights usually depend on how many ranks
computed them. Here each global batch is cut into a fixed number of lanes. The gradient of a lane is the same numbers
wherever it is computed, and the lanes are added up in one order, that of a binary tree whose leaves they are::

    lanes     0   1   2   3   4   5
               \\ /     \\ /     \\ /          level 1
                 \\     /        |           level 2
                     \\         /            level 3: the sum

Each rank computes a run of neighbouring lanes and adds what it can: up to the largest nodes that its run covers. Then
the ranks add up those nodes, again along the tree. Which rank computed a node cannot be seen in its value.
"""

import itertools
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from . import cores
from . import kernels as k
from .data.batches import share
from .kernels.jit import kernel
from .nn import BatchNorm2d, Step
from .tensor import Tensor

_BLOCK = 1024  # elements of a row that are added up at a time: they stay in the first-level cache


class Node(NamedTuple):
    """A node of the tree: the sum of the lanes ``index * 2**level`` up to the next node of its level."""

    level: int
    index: int


def root(lanes):
    """The node that is the sum of all lanes."""
    return Node((lanes - 1).bit_length(), 0)


def cover(held, lanes):
    """The largest nodes that together are the lanes ``held``, from the first to the last.

    >>> cover(range(6), lanes=16)
    [Node(level=2, index=0), Node(level=1, index=2)]
    >>> cover(range(4, 6), lanes=6)  # what lies behind the last lane is empty
    [Node(level=2, index=1)]
    """
    nodes, left = [], set(held)
    while left:
        node = Node(0, min(left))
        while node.index % 2 == 0 and node != root(lanes) and left.issuperset(_leaves(_parent(node), lanes)):
            node = _parent(node)
        nodes.append(node)
        left.difference_update(_leaves(node, lanes))
    return nodes


def _parent(node):
    return Node(node.level + 1, node.index // 2)


def _leaves(node, lanes):
    return range(node.index << node.level, min((node.index + 1) << node.level, lanes))


def program(rows, goals, lanes):
    """The additions that make the nodes ``goals`` out of other nodes.

    Parameters
    ----------
    rows, goals : list of Node
    lanes : int

    Returns
    -------
    (n, 3) int64 array
        Each line: two numbers to add, and the number of their sum. Numbers below ``len(rows)`` are those nodes, then
        come the goals, then results in between. Where there is nothing to add, the second number is -1.

    Examples
    --------
    >>> leaves = [Node(level=0, index=i) for i in range(3)]
    >>> program(leaves, [root(3)], lanes=3)  # number 4 is the sum of the first two; 3, the goal, that and the third
    array([[0, 1, 4],
           [4, 2, 3]])
    """
    numbers = {node: number for number, node in enumerate(rows)}
    lines = []

    def make(node, target=None):
        if node in numbers:
            if target is not None:
                lines.append((numbers[node], -1, target))
            return numbers[node]
        children = Node(node.level - 1, 2 * node.index), Node(node.level - 1, 2 * node.index + 1)
        parts = [make(child) for child in children if _leaves(child, lanes)]
        if len(parts) == 1 and target is None:
            return parts[0]
        target = len(rows) + len(goals) + len(lines) if target is None else target
        lines.append((*parts, target) if len(parts) == 2 else (parts[0], -1, target))
        return target

    for number, goal in enumerate(goals, len(rows)):
        make(goal, number)
    return np.array(lines, np.int64).reshape(-1, 3)


@kernel
def _block(rows, results, between, number, begin, end):
    if number < len(rows):
        return rows[number, begin:end]
    if number < len(rows) + len(results):
        return results[number - len(rows), begin:end]
    return between[number - len(rows) - len(results), :end - begin]


@kernel
def add_rows(rows, program, start, stop, results):
    """Run a :func:`program` of additions on the elements ``start`` to ``stop`` of ``rows``, into those of ``results``.

    Parameters
    ----------
    rows, results : C-contiguous (n, size) arrays of one dtype
    program : (m, 3) int64 array
    start, stop : int
    """
    between = np.empty((len(program), _BLOCK), rows.dtype)
    for begin in range(start, stop, _BLOCK):
        end = min(begin + _BLOCK, stop)
        for left, right, target in program:
            x = _block(rows, results, between, left, begin, end)
            out = _block(rows, results, between, target, begin, end)
            if right < 0:
                out[:] = x
            else:
                y = _block(rows, results, between, right, begin, end)
                for i in range(out.size):
                    out[i] = x[i] + y[i]


class Leaves:
    """The gradients of a run of lanes, added up along the tree as soon as two neighbours are there.

    Parameters
    ----------
    model : mpiml.nn.Module
        With memory; its gradients accumulate in the vector of one lane after the other.
    rows : list of (size + 2,) arrays
        Where the sums of the nodes ``cover(held, lanes)`` are put, one for each; the last two elements are the
        loss and the number of samples.
    held : sequence of int
        The lanes, which the methods then call 0, 1, ...
    lanes : int
    """

    def __init__(self, model, rows, held, lanes):
        self.model, self.held, self.lanes = model, held, lanes
        self.parameters = list(model.layout().values())
        self.rows = dict(zip(cover(held, lanes), rows, strict=True))
        # A node's first lane accumulates in the node's row, where the sum is to be; the others in spare vectors.
        self.home = {node.index << node.level: row for node, row in self.rows.items()}
        self.spare, self.views = [], {}
        self.open, self.ready = {}, {}  # {m: vector} of lanes under way; {node: vector} that wait for their neighbours
        self.lock = threading.Lock()

    def clear(self):
        """Forget the gradients of a step that an exception ended."""
        self.open, self.ready = {}, {}

    def at(self, m, tensors=None):
        """Let gradients accumulate in the vector of lane ``held[m]``, which is zero at first.

        ``tensors`` are whose gradients: by default the model's parameters; another thread has :func:`twins` of them.
        """
        vector = self.open.get(m)
        if vector is None:
            vector = self.home.get(self.held[m])
            if vector is None:
                with self.lock:
                    vector = self.spare.pop() if self.spare else np.empty_like(self.model.sums)
            vector[:] = 0
            self.open[m] = vector
        self._accumulate_in(vector, self.parameters if tensors is None else tensors)

    def _accumulate_in(self, vector, tensors):
        pairs = self.views.get((id(vector), id(tensors)))
        if pairs is None:  # making views costs more than the smallest layers
            pairs = list(zip(tensors, self.model.views(vector[:-2]).values(), strict=True))
            self.views[id(vector), id(tensors)] = pairs
        for tensor, view in pairs:
            tensor.grad = view

    def close(self, m, loss=0.0, samples=0):
        """Lane ``held[m]`` is complete, or has no samples: add it to its neighbour, if that is there."""
        vector = self.open.pop(m, None)  # None is the sum of lanes without samples
        if vector is not None:
            vector[-2:] = loss, samples
        node = Node(0, self.held[m])
        while node not in self.rows:
            sibling = Node(node.level, node.index ^ 1)
            if _leaves(sibling, self.lanes):
                with self.lock:  # of two threads, the second adds
                    if sibling not in self.ready:
                        self.ready[node] = vector
                        return
                    pair = self.ready.pop(sibling), vector
                vector = self._add(*(pair if sibling.index < node.index else pair[::-1]))
            node = _parent(node)
        self.ready[node] = vector

    def _add(self, left, right):
        if left is None or right is None:
            return right if left is None else left
        left += right
        self.spare.append(right)
        return left

    def finish(self):
        """Put the sums in their rows; the model's gradients are then those in the first of them."""
        for node, row in self.rows.items():
            vector = self.ready.pop(node)
            if vector is None:
                row[:] = -0.0  # which changes no number that it is added to, not even -0.0
            elif vector is not row:
                row[:] = vector
                self.spare.append(vector)
        self._accumulate_in(next(iter(self.rows.values())), self.parameters)


def twins(model):
    """{id of a parameter: leaf with its value and a gradient of its own}; see :class:`mpiml.nn.Step`."""
    return {id(p): Tensor(p.value) for p in model.layout().values()}


def in_threads(work, count):
    """Call ``work(0)``, ..., ``work(count - 1)``, each in a thread of its own, the first in this one; what they return."""
    if count == 1:
        return [work(0)]
    with ThreadPoolExecutor(count - 1) as pool:
        futures = [pool.submit(work, i) for i in range(1, count)]
        return [work(0), *(future.result() for future in futures)]


def samples_together(model, pieces):
    """The number of samples of which a piece of a batch holds a multiple: 1, but for batch normalisation.

    Raises
    ------
    ValueError
        A BatchNorm2d takes its statistics over the whole batch, and there are several pieces.
    """
    norms = model.named(BatchNorm2d).values()
    if pieces > 1 and any(norm.samples is None for norm in norms):
        raise ValueError(f"BatchNorm2d takes its statistics over the whole batch, which is cut into {pieces} pieces (by ranks, "
                         f"micro-batches or lanes): give it samples=, a number of samples that each piece can hold, or use "
                         f"GroupNorm")
    return math.lcm(*(norm.samples or 1 for norm in norms))


def gradient(model, loss, lanes, first_step=0, threads=None):
    """A function ``step(x, y)`` that leaves the gradient of the mean loss in ``model.gradient``, without MPI.

    The same bits as from :func:`mpiml.parallel.gradient` on any grid with as many lanes.

    Parameters
    ----------
    model : mpiml.nn.Module
        After ``init``.
    loss : function of (output, target)
        Returns the *sum* over the samples, such as :func:`mpiml.ops.cross_entropy`.
    lanes : int
        Pieces into which each batch is cut.
    first_step : int
        Number of the first step, which dropout depends on: ``optimizer.steps``, if a checkpoint was loaded.
    threads : int, optional
        Threads that compute the lanes; by default one for each core. The bits do not depend on it.

    Returns
    -------
    step : function of (x, y)
        Takes the whole batch, replaces the model's gradient and returns the mean loss, a float.

    Raises
    ------
    ValueError
        The number of lanes or threads is none, or a BatchNorm2d would see its batch in pieces.
    """
    if not isinstance(lanes, (int, np.integer)) or lanes < 1:
        raise ValueError(f"lanes is a number of pieces of a batch, a whole number above 0, not {lanes!r}")
    if threads is not None and (not isinstance(threads, (int, np.integer)) or threads < 1):
        raise ValueError(f"threads is a whole number above 0, not {threads!r}")
    multiple = samples_together(model, lanes)
    threads = min(lanes, cores.threads() if threads is None else threads)
    leaves = Leaves(model, [model.sums], range(lanes), lanes)
    others = [None, *(twins(model) for _ in range(threads - 1))]
    tensors = [other and list(other.values()) for other in others]
    numbers = itertools.count(first_step)

    def step(x, y):
        number = next(numbers)
        if len(x) != len(y) or not len(x):
            raise ValueError(f"a batch has samples, as many in x as in y: x has {len(x)} and y has {len(y)}")
        leaves.clear()

        def compute(thread):
            for lane in range(thread, lanes, threads):
                start, stop = share(len(x), lane, lanes, multiple)
                total = 0.0
                if start < stop:
                    leaves.at(lane, tensors[thread])
                    value = loss(model(x[start:stop], Step(number, start, others[thread])), y[start:stop])
                    total = float(value)
                    value.backward()
                leaves.close(lane, total, stop - start)

        in_threads(compute, threads)
        leaves.finish()
        count = float(model.sums[-1])
        k.scale(model.gradient, model.sums.dtype.type(1 / count))
        return float(model.sums[-2]) / count

    return step
