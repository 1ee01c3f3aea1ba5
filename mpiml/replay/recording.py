"""What a function does: the ops it calls, where their arguments come from, and what speaks against a repetition."""

import inspect
import threading
from typing import NamedTuple

import numpy as np

from mpiml import tensor
from mpiml.nn import Step
from mpiml.tensor import Tensor, value_of

ARRAYS = (np.ndarray, np.number)  # not bool_: there is one True only, so it cannot be told where it came from


class Source(NamedTuple):
    """Where an argument of an op came from: "op", "argument" or "leaf", its number, and whether it wants a gradient."""

    kind: str
    number: int
    wants: bool


class Call(NamedTuple):
    """One call of an op."""

    op: object
    sources: list  # a Source for each argument; None for a constant
    constants: list  # these, and None for the others
    options: dict
    shape: tuple  # of its value
    parameters: int  # of the op
    tape: str  # "joint" if it has one vjp for all arguments, "each" if one for each, "" if it is not on the tape


class Recording:
    """The ops that a function called in this thread, and with what.

    ``outside`` are arrays that it took the time before without having them as arguments.
    """

    def __init__(self, args, outside=()):
        self.arrays = [i for i, a in enumerate(args) if isinstance(value_of(a), ARRAYS)]
        self.twins = [a.twins for a in args if isinstance(a, Step)]  # kept, as _kind knows them by their id
        self.calls, self.leaves, self.failure = [], [], None
        self._sources = {}  # of Tensors and arrays, by id
        # Of the same, and of what lies outside: (Tensor or array, its contents hashed); so no other gets an id of these.
        self._prints = [(a, _print(a)) for a in outside]
        for i, a in enumerate(args):
            if id(value_of(a)) in self._sources:
                self.fail("two of its arguments are one Tensor, or of one array")
            self._know(a, "argument", i)

    def __enter__(self):
        tensor.recordings[threading.get_ident()] = self
        return self

    def __exit__(self, *error):
        del tensor.recordings[threading.get_ident()]

    def fail(self, reason):
        """What is recorded cannot be replayed, for a reason in words."""
        self.failure = self.failure or reason

    def add(self, called, args, options, result):
        """The op ``called`` was called: :mod:`mpiml.tensor` says so."""
        if [*_arrays_in(options)]:
            bound = inspect.signature(called.rule).bind(*args, **options)
            bound.apply_defaults()
            args, options = bound.args, bound.kwargs
        sources = [self._source(a) for a in args]
        constants = [None if s else a for a, s in zip(args, sources, strict=True)]
        outside = [*_arrays_in([constants, options])]
        if any(id(a) in self._sources for a in outside):
            self.fail(f"{called.__name__} took an array inside a tuple, list or option: its arguments themselves may be arrays")
        tape = "" if not isinstance(result, Tensor) else "joint" if result.node.joint else "each"
        self._know(result, "op", len(self.calls))
        self._prints += [(a, _print(a)) for a in outside]
        self.calls.append(Call(called, sources, constants, options, np.shape(value_of(result)),
                                getattr(getattr(result, "node", None), "parameters", 0), tape))

    def _know(self, a, kind, number):
        if isinstance(a, Tensor):
            self._sources[id(a)] = Source(kind, number, True)
        if isinstance(value_of(a), ARRAYS):
            self._sources[id(value_of(a))] = Source(kind, number, False)
            self._prints.append((a, _print(a)))

    def _source(self, a):
        if isinstance(a, Tensor) and id(a) not in self._sources:
            self._know(a, "leaf", len(self.leaves))
            self.leaves.append(a)
        return self._sources.get(id(a)) if isinstance(a, (Tensor, *ARRAYS)) else None

    def finish(self, output):
        """Keep the calls on which the output depends, and no arrays."""
        if any(_print(a) != before for a, before in self._prints):
            self.fail("it changed an array in place: compute another with mpiml.ops")
        if any(leaf.node for leaf in self.leaves):
            self.fail("it took the value of an op that it did not call: give it as an argument")
        if any(isinstance(a, Tensor) and a.node and a.node.edges is None for a, _ in self._prints):
            self.fail("it called backward: do so with what it returns")
        root = self._sources.get(id(output))
        if root is None or root.kind != "op" or not root.wants:
            root = None
            self.fail(f"it returned {type(output).__name__}, not a Tensor from one of its ops")
        needed = [root.number] if root else []
        for i in needed:  # which grows meanwhile
            needed += {s.number for s in self.calls[i].sources if s and s.kind == "op"} - {*needed}
        new = {old: i for i, old in enumerate(sorted(needed))}
        self.calls = [self.calls[old]._replace(sources=[
            s._replace(number=new[s.number]) if s and s.kind == "op" else s for s in self.calls[old].sources]) for old in new]
        del self._sources, self._prints

    def outside(self):
        """Arrays and Tensors that are neither arguments nor from ops."""
        return [*_arrays_in([[(call.constants, call.options) for call in self.calls], self.leaves])]

    def unlike(self, other):
        """What keeps this from being replayed, or was not the same in the other recording, in words; None if nothing."""
        if self.failure:
            return self.failure
        for call, before in zip(self.calls, other.calls, strict=False):
            if call.op is not before.op:
                return f"it called {call.op.__name__} where it had called {before.op.__name__}"
            arrays, others = ([*_arrays_in([c.constants, c.options])] for c in (call, before))
            if not _same(arrays, others):
                return (f"{call.op.__name__} took an array that is neither an argument nor from an op: compute it with "
                        f"mpiml.ops, or give it as an argument; make a NumPy scalar that depends on no array a Python number")
            if not _same(call, before):
                return f"{call.op.__name__} had other arguments than the time before"
        if len(self.calls) != len(other.calls):
            return f"it called {len(self.calls)} ops where it had called {len(other.calls)}"
        if not _same(self.leaves, other.leaves):
            return "a Tensor that is not among its arguments was not that of the time before"
        return None


def _arrays_in(a):
    """The arrays, NumPy scalars and Tensors in ``a``, which may be a tuple, list or dict."""
    if isinstance(a, dict):
        a = [*a.values()]
    if isinstance(a, (tuple, list)):
        for item in a:
            yield from _arrays_in(item)
    elif isinstance(a, (np.ndarray, np.generic, Tensor)):
        yield a


def _print(a):
    """The contents of an array or Tensor, hashed."""
    return hash(value_of(a).tobytes("A"))


def _same(a, b):
    """Whether constants are the same; arrays only if they are one, since nobody knows what they depend on."""
    if type(a) is not type(b) or isinstance(a, np.bool_):
        return False
    if isinstance(a, (np.ndarray, np.generic, Tensor)):
        return a is b
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(value, b[key]) for key, value in a.items())
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_same, a, b))
    return a is b or bool(a == b)
