"""Replay: records a function twice, then runs its program."""

import inspect
import operator
import threading

import numpy as np

from mpiml import tensor
from mpiml.nn import Module, Step
from mpiml.tensor import Tensor, on_tape, value_of

from .recording import ARRAYS, Recording
from .writer import Writer

KINDS = 256  # of arguments that a Replay remembers: one that is called with a new number each time must not grow for ever


class Replay:
    """``function``, called as before, and from the third call with arguments of the same shapes on faster.

    To the tape the whole function is one op; its gradients have the same bits as those of the ops that it stands for.

    Parameters
    ----------
    function : Module or function
        Takes arrays, Tensors, :class:`mpiml.nn.Step` and whatever can be a key of a dict (for each value of these a program
        of its own), and returns a Tensor. What depends on the values of its arrays it must compute with :mod:`mpiml.ops`;
        what else it does, such as printing, happens while it is recorded and not when it is replayed.
    model : Module, optional
        The program calls parameters by their names in it; by default ``function``, if that is one.

    Attributes
    ----------
    reasons : list of str
        Why what was recorded is not replayed.

    Raises
    ------
    TypeError
        From a call: an argument is a list, say, which cannot be a key, or a masked array.
    """

    def __init__(self, function, model=None):
        self.function = function
        self.model = function if isinstance(function, Module) else model
        self.reasons = []
        self._found = {}  # for a kind of arguments: a Recording (called once), a Program, or False (called each time)
        self._arguments = [*inspect.signature(function).parameters]
        self._names = {id(p): name for name, p in self.model.named().items()} if self.model else {}

    def __reduce__(self):
        return Replay, (self.function, self.model)  # a copy records anew: its parameters are others

    def __call__(self, *args):
        if tensor.recordings and threading.get_ident() in tensor.recordings:  # one that calls this is recorded: it gets the ops
            return self.function(*args)
        kind = tuple([_kind(a) for a in args])
        try:
            found = self._found.get(kind)
        except TypeError as error:
            raise TypeError(f"a Replay takes arrays, Tensors and what can be a key of a dict ({error}): give what is in a list "
                            f"as arrays or as arguments of their own") from None
        if type(found) is Program:
            if found.fits():
                return found(args)
            found = None
        if found is False:
            return self.function(*args)
        # Views are objects that nobody else has: so the argument is told from the same array elsewhere in the function.
        args = [a.view() if isinstance(a, ARRAYS) else a for a in args]
        with Recording(args, found.outside() if found else ()) as recording:
            output = self.function(*args)
        recording.finish(output)
        if found is None:
            self._found[kind] = recording
            if len(self._found) > KINDS:
                self._found.pop(next(iter(self._found)), None)
        elif reason := recording.unlike(found):
            self._found[kind] = False
            self.reasons += [reason] if reason not in self.reasons else []
        else:
            self._found[kind] = Program(recording, self._arguments, self._names)
        return output

    def __str__(self):
        programs = [found.text for found in self._found.values() if type(found) is Program]
        return "\n".join(programs + [f"# called each time, as {reason}" for reason in self.reasons]) or "# nothing was replayed"


def _kind(a):
    """What two arguments have in common if one program serves both."""
    if isinstance(a, np.ndarray):
        if type(a) not in (np.ndarray, np.memmap):  # such as masked ones, which an op gives back as plain, and a rule does not
            raise TypeError(f"a Replay takes plain arrays, not a {type(a).__name__}: give it np.asarray of that")
        return a.shape, a.dtype, a.strides
    if isinstance(a, Tensor):
        return Tensor, *_kind(a.value)
    if isinstance(a, Step):
        return Step, id(a.twins)
    if isinstance(a, np.number):
        return type(a)
    return type(a), a, repr(a) if isinstance(a, (float, tuple)) else ""  # 0.0 == -0.0, and (1,) == (True,)


class Program:
    """Two functions made of a recording; to the tape they are one op."""

    def __init__(self, recording, arguments, names):
        writer = Writer(recording, arguments, names)
        self.text = f"{writer.forward()}\n\n{writer.backward()}"
        exec(compile(self.text, "<replay>", "exec"), writer.names)  # noqa: S102  what print(replay) shows, and nothing else
        self._forward, self._backward = writer.names["forward"], writer.names["backward"]
        self._arrays, self._leaves, self._twins = recording.arrays, recording.leaves, recording.twins
        self._values = [leaf.value for leaf in self._leaves]
        reached = [i for i, reached in enumerate(writer.reached) if reached]
        self._arguments = [(self._arrays[i], i) for i in reached if i < len(self._arrays)]
        self._edges = [(self._leaves[i - len(self._arrays)], i) for i in reached if i >= len(self._arrays)]

    def fits(self):
        """Whether the Tensors that are no arguments have the shapes and dtypes that they had when this was recorded."""
        values = [leaf.value for leaf in self._leaves]
        if not all(map(operator.is_, values, self._values)):
            if any(a.shape != b.shape or a.dtype != b.dtype for a, b in zip(values, self._values, strict=True)):
                return False
            self._values = values
        return True

    def __call__(self, args):
        vjps = {}
        value = self._forward(vjps, *[value_of(args[i]) for i in self._arrays], *[leaf.value for leaf in self._leaves])
        edges = [(args[i].node or args[i], place) for i, place in self._arguments] + self._edges

        def vjp(g, into):
            places = [True if place is None else place for place in into]
            self._backward(vjps, g, places)
            return [None if place is True or place is offered else place for place, offered in zip(places, into, strict=True)]

        return on_tape(np.asarray(value), edges, vjp, len(self._arrays) + len(self._leaves))
