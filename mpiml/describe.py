"""Models as plain JSON, and built again from it: which layers there are, and with what arguments they were made.

A description reads like the program that made the model:

>>> from mpiml.nn import Conv2d, Linear, Residual, Sequential
>>> from mpiml.ops import relu
>>> describe(Sequential(Linear(4, 4), relu, Residual(Linear(4, 4, bias=False))))
['Sequential', ['Linear', 4, 4], 'relu', ['Residual', ['Linear', 4, 4, {'bias': False}]]]
>>> build(describe(Conv2d(1, 8, (3, 5), padding=1))).options
(1, 1, 1, 1)

A list is a call, of its first entry: a layer of :mod:`mpiml.nn`, or one of ``tuple``, ``list``, ``dict``, ``str`` and
``partial``; an object at its end holds keywords. A text is the name of a function of :mod:`mpiml.ops`. Numbers, truth values
and null are themselves. Nothing else has a meaning, so that a description from a stranger runs nothing but constructors of
layers, on arguments with which they take no memory.
"""

import functools
import math

import numpy as np

from . import nn, ops
from .nn import Module

_LAYERS = {name: layer for name, layer in vars(nn).items()
           if isinstance(layer, type) and issubclass(layer, Module) and layer is not Module}
_FUNCTIONS = {name: getattr(ops, name) for name in ops.__all__}
_VALUES = {"tuple": lambda *items: items, "list": lambda *items: [*items], "dict": dict, "partial": functools.partial}
_OURS = _LAYERS | _FUNCTIONS | _VALUES | {"str": str}


def describe(model):
    """The layers of a model as numbers, texts, lists and dicts, from which :func:`build` makes it again, without its weights.

    Layers and functions of your own are described, too, by their names: a Module by the arguments that it was made with.

    Parameters
    ----------
    model : mpiml.nn.Module
        On many ranks what :func:`mpiml.parallel.place` returned: the whole model is described.

    Returns
    -------
    list

    Raises
    ------
    ValueError
        A part has no description: a lambda, an array; or the model is no longer what its constructors made.
    """
    model, own = model.whole(), {}
    description = _expression(model, own, "the model")
    _compare(model, build(description, own), own)
    return description


def build(description, layers=None):
    """The model that :func:`describe` has described, without memory.

    Parameters
    ----------
    description : list
    layers : {name: class or function}, optional
        Those of your own that it names.

    Raises
    ------
    ValueError
        It is no description of a model, or names a layer that is not known.
    """
    layers = layers or {}
    taken = sorted(set(layers) & set(_OURS))
    if taken:
        raise ValueError(f"{taken[0]} is a name of mpiml's own: give your layer another one")
    try:
        model = _value(description, layers)
        if not isinstance(model, Module):
            raise ValueError(f"it describes no model, but {_short(description)}")
        for name, parameter in model.named().items():
            if not all(isinstance(n, int) and n >= 0 for n in parameter.shape):
                raise ValueError(f"{name} cannot have the shape {_short(parameter.shape)}")
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return model


# --- From a model to its description --------------------------------------------------------------------------------

def _expression(thing, own, where):
    """The description of a layer, a function or an argument; those that are not mpiml's are noted in ``own``."""
    if isinstance(thing, Module):
        return _call(_name(type(thing), own, where), *thing._arguments, own, where)
    if isinstance(thing, np.generic):
        thing = thing.item()
    if thing is None or isinstance(thing, (bool, int)) or (isinstance(thing, float) and math.isfinite(thing)):
        return thing
    if isinstance(thing, str):
        return ["str", thing]
    if type(thing) in (tuple, list):
        return _call(type(thing).__name__, thing, {}, own, where)
    if type(thing) is dict and all(isinstance(key, str) for key in thing):
        return _call("dict", (), thing, own, where)
    if isinstance(thing, functools.partial) and not isinstance(thing.func, Module):
        return _call("partial", (thing.func, *thing.args), thing.keywords, own, where)
    if callable(thing) and getattr(thing, "__name__", "").isidentifier():
        return _name(thing, own, where)
    what = "a lambda" if getattr(thing, "__name__", "") == "<lambda>" else f"{_short(thing)}, of {type(thing).__name__}"
    raise ValueError(f"{what}, an argument of {where}, has no description: use layers of mpiml.nn, functions of mpiml.ops and "
                     f"functools.partial of them; or a function of your own that has a name, or a Module of your own that is "
                     f"made of numbers, texts and layers")


def _call(name, args, options, own, where):
    inside = where if name in _VALUES else name
    args = [_expression(arg, own, inside) for arg in args]
    options = {key: _expression(option, own, inside) for key, option in options.items()}
    return [name, *args, options] if options else [name, *args]


def _name(thing, own, where):
    """The name of a class or function; the same one for nothing else."""
    name = thing.__name__
    known = _OURS.get(name) or own.setdefault(name, thing)
    if known is not thing:
        whose = "mpiml's own" if name in _OURS else "another part of the model"
        raise ValueError(f"{thing.__module__}.{name}, in {where}, has the name of {whose}: give it another one")
    return name


def _compare(model, built, own):
    """Refuse a model that was changed after it was made, or that shares layers: its description would make another one."""
    layers, described = model.named(Module), built.named(Module)
    for name, layer in layers.items():
        twin = described.get(name)
        if type(layer) is not type(twin):
            raise ValueError(_changed(f"{name} is of {type(layer).__name__}"))
        if type(layer) not in _LAYERS.values():
            continue
        for key, value in vars(twin).items():
            if key != "_arguments" and not isinstance(value, nn.Parameter):
                now, then = (_expression(a, own, name) for a in (getattr(layer, key), value))
                if now != then:
                    raise ValueError(_changed(f"{'.'.join(filter(None, (name, key)))} is {_short(getattr(layer, key))} instead "
                                              f"of {_short(value)}"))
    mine, theirs = ({name: p.shape for name, p in m.named().items()} for m in (model, built))
    if mine != theirs:
        odd = sorted(name for name in mine | theirs if mine.get(name) != theirs.get(name))
        raise ValueError(_changed(f"{odd[0]} has the shape {mine.get(odd[0])} instead of {theirs.get(odd[0])}"
                                  if odd[0] in mine else f"{odd[0]} is shared with another layer, or was removed"))


def _changed(what):
    return (f"the model is not what its constructors make of their arguments: {what}; only what is said when a layer is made "
            f"can be described")


# --- From a description to a model ------------------------------------------------------------------------------------

def _value(expression, own):
    if expression is None or isinstance(expression, (bool, int, float)):
        return expression
    if isinstance(expression, str):
        return _lookup(expression, _FUNCTIONS | _LAYERS, own, "function of mpiml.ops")
    if not isinstance(expression, list) or not expression or not isinstance(expression[0], str):
        raise ValueError(f"{_short(expression)} is neither a number, the name of a function nor a list that begins with a name")
    name, *args = expression
    if name == "str" and len(args) == 1 and isinstance(args[0], str):
        return args[0]
    options = args.pop() if args and isinstance(args[-1], dict) else {}
    args = [_value(arg, own) for arg in args]
    options = {key: _value(option, own) for key, option in options.items()}
    make = _lookup(name, _LAYERS | _VALUES, own, "layer of mpiml.nn")
    if name in _LAYERS and not all(_modest(arg) for arg in (*args, *options.values())):
        raise ValueError(f"{_short(expression)}: the layers of mpiml.nn take numbers, tuples of numbers, layers and functions")
    try:
        if name in _LAYERS:
            make(*map(_guarded, args), **{key: _guarded(option) for key, option in options.items()})
        return make(*args, **options)
    except Exception as error:
        raise ValueError(f"{_short(expression)} cannot be made: {type(error).__name__}: {error}") from error


def _modest(arg):
    """Whether this may be given to a layer of mpiml's, that takes it for a number and multiplies: texts become long by that."""
    items = arg if isinstance(arg, (tuple, list)) else [arg]
    return all(item is None or isinstance(item, (int, float)) or (item is arg and callable(item)) for item in items)


class _Guarded(tuple):
    """A tuple that does not become long by being multiplied."""

    def __mul__(self, factor):
        raise TypeError("a tuple stands for a number")

    __rmul__ = __mul__


def _guarded(arg):
    return _Guarded(arg) if isinstance(arg, (tuple, list)) else arg


def _lookup(name, ours, own, kind):
    if name not in ours and name not in own:
        raise ValueError(f"{_short(name)} is no {kind}: if it is your own, say what it is by layers={{{_short(name)}: ...}}")
    return ours[name] if name in ours else own[name]


def _short(value):
    text = repr(value)
    return text if len(text) < 80 else f"{text[:76]} ..."
