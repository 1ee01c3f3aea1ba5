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

from .replay import Replay

__all__ = ["Replay"]
