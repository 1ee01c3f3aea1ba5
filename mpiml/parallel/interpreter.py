"""Running this stage's list of a schedule: the one place where forward and backward passes meet messages."""

from time import perf_counter
from typing import NamedTuple

import numpy as np

from mpiml.nn import Step
from mpiml.schedule import B, F, W
from mpiml.tensor import Tensor, backward


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
    """

    def __init__(self, part, loss, recompute, watch):
        self.part, self.loss, self.recompute, self.watch = part, loss, recompute, watch
        self.last = len(part.bounds) - 1

    def run(self, actions, x, y, parts, number, first):
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

        Returns
        -------
        float
            The sum of the loss, where the last chunk is; else 0.
        """
        link, watch = self.part.link, self.watch
        split = {(a.microbatch, a.chunk) for a in actions if isinstance(a, W)}
        coming = iter([message for message in map(self._awaits, actions) if message and link.remote(message)])
        ahead = next(coming, None)
        if ahead:
            link.post(ahead)
        live, total, later = {}, 0.0, {}
        for action in actions:
            begin = perf_counter()
            key = m, c = action.microbatch, action.chunk
            awaited, array, buffer = self._awaits(action), None, None
            if awaited:
                array, buffer = link.receive(awaited)
                if awaited == ahead:
                    ahead = next(coming, None)
                    if ahead:
                        link.post(ahead)
            arrived = perf_counter()
            message = None
            if isinstance(action, F):
                start, stop = parts[m]
                step = Step(number, first + start)
                input = Tensor(array) if c else x[start:stop]
                output = self._forward(c, input, y[start:stop], step)
                if c == self.last:
                    total += float(_value(output))
                else:
                    message = ("F", m, c + 1), _value(output)
                live[key] = _Live(input, None if self.recompute else output, [buffer])
                output = None
            elif isinstance(action, B):
                input, output, buffers = live.pop(key)
                if self.recompute:
                    start, stop = parts[m]
                    output = self._forward(c, input, y[start:stop], Step(number, first + start))
                buffers.append(buffer)
                put_off = [] if key in split else None
                if isinstance(output, Tensor):
                    for _ in backward(output, array, input, put_off):
                        pass
                elif c == self.last:
                    raise TypeError(f"the loss depends on no parameter of the model: {output!r} is a plain number; a model "
                                    f"must hand `training` on to its layers")
                output = None
                if c:
                    message = ("B", m, c - 1), np.zeros_like(input.value) if input.grad is None else input.grad
                if key in split:
                    later[key] = put_off, buffers
                else:
                    self._release(buffers)
            else:
                put_off, buffers = later.pop(key)
                for contribute in put_off:
                    contribute()
                self._release(buffers)
            done = perf_counter()
            if message:
                link.deliver(*message)
            if watch:
                watch.action(number, action, begin, arrived, done, perf_counter())
        link.finish()
        return total

    def _awaits(self, action):
        """The message that an action needs, or None."""
        m, c = action.microbatch, action.chunk
        if isinstance(action, F) and c:
            return "F", m, c
        if isinstance(action, B) and c < self.last:
            return "B", m, c
        return None

    def _forward(self, chunk, input, target, step):
        output = self.part.chunks[chunk](input, step)
        return self.loss(output, target) if chunk == self.last else output

    def _release(self, buffers):
        for buffer in buffers:
            self.part.link.release(buffer)


def _value(output):
    return output.value if isinstance(output, Tensor) else output
