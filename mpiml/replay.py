"""Replay: a function of arrays, recorded while it runs, and from then on repeated as a program without loops or branches.

A training step calls the same ops in the same order each time. What Python does between them (layers that call layers,
arguments that are looked at, the tape that is written and walked) is the same each time, too, and for small arrays takes
longer than their arithmetic. :class:`Replay` writes down which ops a function calls, and makes of the list two short Python
functions that call the rules of the ops and nothing else. Print it to read them:

>>> import numpy as np
>>> from mpiml import Tensor, ops
>>> weight = Tensor(np.array([[1.0, 2.0]]))
>>> loss = Replay(lambda x, y: ops.mse_loss(ops.linear(x, weight), y) / 2)
>>> for x in np.eye(2), np.eye(2), np.ones((2, 2)):  # the third time it is a program
...     loss(x, np.zeros((2, 1))).backward()
>>> print(loss)
def forward(vjps, x, y, p0):
    v, vjps["linear 0"] = linear(x, p0)  # (2, 1)
    v, vjps["mse_loss 1"] = mse_loss(v, y)  # ()
    v, vjps["divide 2"] = divide(v, 2)  # ()
    return v
<BLANKLINE>
def backward(vjps, g, into):
    g = vjps.pop("divide 2")[0](g)
    g = vjps.pop("mse_loss 1")[0](g)
    parts = vjps.pop("linear 0")(g, [None, into[2], None, None])
    add_to(into, 2, parts[1], parts)

The function must do the same for all arrays of one shape. It is recorded twice before it is replayed, and the two
recordings must be the same; one with dropout, say, whose mask is another one each time, is called each time as ever.
"""

import inspect
import keyword
import operator
import re
import threading
from typing import NamedTuple

import numpy as np

from mpiml import tensor
from mpiml.nn import Module, Step
from mpiml.tensor import Tensor, is_own, on_tape, value_of

KINDS = 256  # of arguments that a Replay remembers: one that is called with a new number each time must not grow for ever
ARRAYS = (np.ndarray, np.number)  # not bool_: there is one True only, so it cannot be told where it came from


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
        self._found = {}  # for a kind of arguments: a _Recording (called once), a _Program, or False (called each time)
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
        if type(found) is _Program:
            if found.fits():
                return found(args)
            found = None
        if found is False:
            return self.function(*args)
        # Views are objects that nobody else has: so the argument is told from the same array elsewhere in the function.
        args = [a.view() if isinstance(a, ARRAYS) else a for a in args]
        with _Recording(args, found.outside() if found else ()) as recording:
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
            self._found[kind] = _Program(recording, self._arguments, self._names)
        return output

    def __str__(self):
        programs = [found.text for found in self._found.values() if type(found) is _Program]
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


class _Source(NamedTuple):
    """Where an argument of an op came from: "op", "argument" or "leaf", its number, and whether it wants a gradient."""

    kind: str
    number: int
    wants: bool


class _Call(NamedTuple):
    """One call of an op."""

    op: object
    sources: list  # a _Source for each argument; None for a constant
    constants: list  # these, and None for the others
    options: dict
    shape: tuple  # of its value
    parameters: int  # of the op
    tape: str  # "joint" if it has one vjp for all arguments, "each" if one for each, "" if it is not on the tape


class _Recording:
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
        self.calls.append(_Call(called, sources, constants, options, np.shape(value_of(result)),
                                getattr(getattr(result, "node", None), "parameters", 0), tape))

    def _know(self, a, kind, number):
        if isinstance(a, Tensor):
            self._sources[id(a)] = _Source(kind, number, True)
        if isinstance(value_of(a), ARRAYS):
            self._sources[id(value_of(a))] = _Source(kind, number, False)
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


class _Program:
    """Two functions made of a recording; to the tape they are one op."""

    def __init__(self, recording, arguments, names):
        writer = _Writer(recording, arguments, names)
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


class _Writer:
    """The text of a program: Python, line by line.

    Attributes
    ----------
    names : dict
        What the text mentions: the rules of the ops, constants, and two helpers.
    reached : list of bool
        Whether there is a gradient for each argument of ``forward``.
    """

    def __init__(self, recording, arguments, names):
        self.calls = recording.calls
        self.names = {"add_to": _add_to, "total": _total}
        self.rules = [self._name(call.op.__name__, call.op.rule) for call in self.calls]
        self.inputs = {("argument", i): self._name(arguments[i] if i < len(arguments) else f"x{i}") for i in recording.arrays}
        self.inputs |= {("leaf", i): self._name(f"p{names.get(id(leaf), i)}")
                        for i, leaf in enumerate(recording.leaves)}
        self.places = {source: i for i, source in enumerate(self.inputs)}
        self.reached = [False] * len(self.inputs)

    def _name(self, wanted, thing=None):
        """A name that means this thing and no other."""
        name = re.sub(r"\W", "_", wanted).strip("_")  # <lambda>
        while re.fullmatch(r"[vg]?\d*|vjps|into|parts|each", name) or keyword.iskeyword(name) or (
                name in self.names and (thing is None or self.names[name] is not thing)):
            name += "_"
        self.names[name] = thing
        return name

    def forward(self):
        last = {s.number: i for i, call in enumerate(self.calls) for s in call.sources if s and s.kind == "op"}
        names, free = {}, _Names("v")
        lines = [f"def forward(vjps, {', '.join(self.inputs.values())}):"]
        for i, (call, rule) in enumerate(zip(self.calls, self.rules, strict=True)):
            terms = [self._constant(constant) if s is None else names[s.number] if s.kind == "op" else
                     self.inputs[s.kind, s.number] for s, constant in zip(call.sources, call.constants, strict=True)]
            terms += [f"{name}={self._constant(value)}" for name, value in call.options.items()]
            for number in {s.number for s in call.sources if s and s.kind == "op" and last[s.number] == i}:
                free.give_back(names[number])
            names[i] = free.take()
            tape = f'vjps["{rule} {i}"]' if call.tape else "_"
            lines.append(f"    {names[i]}, {tape} = {rule}({', '.join(terms)})  # {call.shape}")
        return "\n".join([*lines, f"    return {names[len(self.calls) - 1]}"])

    def _constant(self, value):
        if type(value) in (bool, int, str, type(None)) or (type(value) is float and np.isfinite(value)):
            return repr(value)
        if type(value) is list:  # not the same as a tuple, where it is an index
            return f"[{', '.join(map(self._constant, value))}]"
        if type(value) is tuple:
            return f"({''.join(f'{self._constant(item)}, ' for item in value)})"
        return self._name("constant", value)

    def backward(self):
        """In the order of :func:`mpiml.tensor.backward`, so that sums of gradients have the same bits."""
        edges = [[(position, s) for position, s in enumerate(call.sources) if s and s.wants] for call in self.calls]
        root = len(self.calls) - 1
        uses, stack = {root: 0}, [root]
        while stack:
            for number in [s.number for _, s in edges[stack.pop()] if s.kind == "op"]:
                if number not in uses:
                    stack.append(number)
                uses[number] = uses.get(number, 0) + 1
        free = _Names("g")
        names, ready, lines = {root: free.take()}, [root], ["def backward(vjps, g, into):"]
        while ready:
            i = ready.pop()
            lines += self._vjp(i, edges[i], names, free)
            for number in [s.number for _, s in edges[i] if s.kind == "op"]:
                uses[number] -= 1
                if not uses[number]:
                    ready.append(number)
        return "\n    ".join(lines)

    def _vjp(self, i, edges, names, free):
        """The lines for op ``i``: its vjp, and where its gradients go."""
        g, vjp, lines = names.pop(i), f'vjps.pop("{self.rules[i]} {i}")', []
        joint = self.calls[i].tape == "joint"
        if joint:
            offers = ["None"] * self.calls[i].parameters
            for position, s in edges:
                offers[position] = "True" if s.kind == "op" else f"into[{self.places[s.kind, s.number]}]"
            lines.append(f"parts = {vjp}({g}, [{', '.join(offers)}])")
        elif len(edges) > 1:
            lines.append(f"each = {vjp}")
            vjp = "each"
        for position, s in edges:
            part, parts = (f"parts[{position}]", ", parts") if joint else (f"{vjp}[{position}]({g})", "")
            if (joint and position == edges[0][0]) or (not joint and position == edges[-1][0]):
                free.give_back(g)
            if s.kind != "op":
                place = self.places[s.kind, s.number]
                self.reached[place] = True
                lines.append(f"add_to(into, {place}, {part}{parts})")
            elif s.number in names:
                lines.append(f"{names[s.number]} = total({names[s.number]}, {part}{parts})")
            else:
                names[s.number] = free.take()
                lines.append(f"{names[s.number]} = {part}")
        return lines


class _Names:
    """Names for values, as few as can be: one whose value is not needed any more is given to the next."""

    def __init__(self, letter):
        self._letter, self._taken = letter, set()

    def take(self):
        number = next(i for i in range(len(self._taken) + 1) if i not in self._taken)
        self._taken.add(number)
        return f"{self._letter}{number or ''}"

    def give_back(self, name):
        self._taken.remove(int(name[1:] or 0))


# What a program does with a gradient, as mpiml.tensor.backward does: from an op with a vjp for each argument it may be one that
# others hold as well, from a joint vjp it is new unless it serves several arguments.

def _add_to(into, place, part, parts=()):
    if part is None:  # it was added
        return
    if into[place] is True:
        into[place] = part if is_own(part, parts) else np.array(part)
    else:
        into[place] += part


def _total(g, part, parts=()):
    return np.add(g, part, out=part if is_own(part, parts) else None)
