"""The text of a program."""

import keyword
import re

import numpy as np

from mpiml.tensor import is_own


class Writer:
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
