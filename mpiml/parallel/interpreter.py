"""Running this stage's list of a schedule: the one place where forward and backward passes meet messages."""

import functools
import math
from collections import Counter, deque
from time import perf_counter
from typing import ClassVar, NamedTuple

import numpy as np

from mpiml.nn import Step
from mpiml.replay import Replay
from mpiml.schedule import B, F, W
from mpiml.tensor import Tensor, backward


def _output(chunk, loss, input, step, *target):
    output = chunk(input, step)
    return loss(output, *target) if target else output


class _Live(NamedTuple):
    """What a micro-batch keeps between its passes through a chunk."""

    input: object
    output: object  # a Tensor with its tape; None if it will be computed anew
    buffers: list  # memory of messages that the tape may mention


class Interpreter:
    """Runs lists of F, B and W on the chunks of a part.

    Parameters
    ----------
    part : Part
    loss : function of (output, target)
        Returns the sum over the samples; applied where the last chunk is.
    recompute : bool
        Keep only the inputs of the chunks, and run their forward pass again before the backward pass (Chen et al. 2016).
    watch : Watch or None
    twins : dict, optional
        From :func:`mpiml.lanes.twins`, for an interpreter in a thread of its own.
    replay : bool
        Run the chunks as programs, see :class:`mpiml.Replay`.
    """

    def __init__(self, part, loss, recompute, watch, twins=None, replay=False):
        self.part, self.recompute, self.watch = part, recompute, watch
        self.last = len(part.bounds) - 1
        self.functions = {c: functools.partial(_output, chunk, loss) for c, chunk in part.chunks.items()}
        if replay:
            self.functions = {c: Replay(function, part.chunks[c]) for c, function in self.functions.items()}
        self.twins, self.tensors = twins, twins and list(twins.values())

    def run(self, actions, x, y, parts, number, first, leaves=None):
        """Compute the loss and accumulate the gradients of all micro-batches.

        Parameters
        ----------
        actions : list of F, B, W
        x, y : arrays
            This replica's share of the batch.
        parts : list of (int, int)
            First sample of each micro-batch in them, and the one behind its last.
        number, first : int
            The step, and the first sample's place in the global batch.
        leaves : mpiml.lanes.Leaves, optional
            Keeps the gradients of the micro-batches apart, as those of its lanes; without it they are added up.

        Returns
        -------
        float
            The sum of the loss, where the last chunk is; else 0.
        """
        link, watch = self.part.link, self.watch
        self.x, self.y, self.parts, self.number, self.first = x, y, parts, number, first
        self.split = {(a.microbatch, a.chunk) for a in actions if isinstance(a, W)}
        self.live, self.later, self.losses = {}, {}, {}
        unfinished = Counter(a.microbatch for a in actions if not isinstance(a, F))
        coming = iter([message for message in map(self._awaits, actions) if message and link.remote(message)])
        ahead = next(coming, None)
        if ahead:
            link.post(ahead)
        for action in actions:
            begin = perf_counter()
            awaited, received = self._awaits(action), (None, None)
            if awaited:
                received = link.receive(awaited)
                if awaited == ahead:
                    ahead = next(coming, None)
                    if ahead:
                        link.post(ahead)
            arrived = perf_counter()
            m = action.microbatch
            if leaves and not isinstance(action, F):
                leaves.at(m, self.tensors)
                unfinished[m] -= 1
            # Each in a function of its own, whose variables keep nothing alive when it is done.
            message = self._steps[type(action)](self, m, action.chunk, *received)
            if leaves and not isinstance(action, F) and not unfinished[m]:
                leaves.close(m, self.losses.get(m, 0.0), parts[m][1] - parts[m][0])
            done = perf_counter()
            if message:
                link.deliver(*message)
            received = message = None
            if watch:
                watch.action(number, action, begin, arrived, done, perf_counter())
        begin = perf_counter()
        link.finish()
        if watch:
            watch.wait(perf_counter() - begin)
        self.x = self.y = None
        return math.fsum(self.losses.values())

    def _awaits(self, action):
        """The message that an action needs, or None."""
        m, c = action.microbatch, action.chunk
        if isinstance(action, F) and c:
            return "F", m, c
        if isinstance(action, B) and c < self.last:
            return "B", m, c
        return None

    def _compute(self, m, c, input):
        """The output of a chunk; of the last one, the loss."""
        start, stop = self.parts[m]
        target = [self.y[start:stop]] if c == self.last else []
        function = self.functions[c]
        output = function(input, Step(self.number, self.first + start, self.twins), *target)
        if isinstance(function, Replay) and function.reasons:
            raise ValueError(f"chunk {c} of this model cannot be replayed, as {function.reasons[0]}: leave out replay=True")
        return output

    def _forward(self, m, c, array, buffer):
        if c == 0:
            input = self.x[slice(*self.parts[m])]
        else:
            input = Tensor(array) if array.dtype.kind == "f" else array  # integers, say, have no gradient
        output = self._compute(m, c, input)
        self.live[m, c] = _Live(input, None if self.recompute else output, [buffer])
        value = output.value if isinstance(output, Tensor) else output
        if c == self.last:
            self.losses[m] = float(value)
            return None
        message = "F", m, c + 1
        if buffer is not None and not self.part.link.remote(message) and np.may_share_memory(value, buffer):
            value = value.copy()  # the next chunk may need it for longer than this one
        return message, value

    def _backward(self, m, c, gradient, buffer):
        input, output, buffers = self.live.pop((m, c))
        if self.recompute:
            output = self._compute(m, c, input)
        put_off = deque() if (m, c) in self.split else None
        if isinstance(output, Tensor):
            for _ in backward(output, gradient, input, put_off):
                pass
        elif c == self.last:
            raise TypeError(f"the loss depends on no parameter of the model: {output!r} is a plain number; a model must hand "
                            f"`training` on to its layers")
        buffers.append(buffer)
        if put_off is None:
            self._release(buffers)
        else:
            self.later[m, c] = put_off, buffers
        if c == 0:
            return None
        if not isinstance(input, Tensor):
            return ("B", m, c - 1), np.empty(0)  # nobody looks at it
        return ("B", m, c - 1), np.zeros_like(input.value) if input.grad is None else input.grad

    def _weights(self, m, c, *_):
        put_off, buffers = self.later.pop((m, c))
        while put_off:
            put_off.popleft()()
        self._release(buffers)

    _steps: ClassVar = {F: _forward, B: _backward, W: _weights}

    def _release(self, buffers):
        for buffer in buffers:
            self.part.link.release(buffer)
