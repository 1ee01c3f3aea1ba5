"""Pipeline schedules: who computes what, in which order.

A model is cut into chunks, numbered from its input to its output. A schedule is a function of
``(stage, stages, microbatches)`` that returns the list of what one stage of the pipeline computes: the forward pass
``F(m, chunk)``, the backward pass ``B(m, chunk)`` and, where the backward pass is split in two, the gradients of the
weights ``W(m, chunk)``. Which stage holds which chunk, and what is sent to whom, follows from the lists. The list
that is drawn is the list that is simulated and the list that is executed.

>>> one_f_one_b(stage=1, stages=2, microbatches=2)
[F(0, 1), B(0, 1), F(1, 1), B(1, 1)]
"""

import itertools
from dataclasses import dataclass


@dataclass(frozen=True, repr=False)
class Action:
    """What a stage computes for one micro-batch with one chunk of the model."""

    microbatch: int
    chunk: int

    def __repr__(self):
        return f"{type(self).__name__}({self.microbatch}, {self.chunk})"


class F(Action):
    """The forward pass."""


class B(Action):
    """The backward pass: the gradient for the chunk's input, and those of its weights unless a W follows."""


class W(Action):
    """The gradients of the chunk's weights, which B of this micro-batch then leaves out."""


def sequential(stage, stages, microbatches):
    """One micro-batch at a time: all stages but one are idle. What the others are measured against."""
    return [action(m, stage) for m in range(microbatches) for action in (F, B)]


def gpipe(stage, stages, microbatches):
    """All forward passes, then all backward passes (Huang et al. 2019); every micro-batch is alive at once."""
    return [action(m, stage) for action in (F, B) for m in range(microbatches)]


def one_f_one_b(stage, stages, microbatches):
    """A backward pass after each forward pass as soon as can be (PipeDream-flush, Narayanan et al. 2021).

    As fast as GPipe, with ``min(stages - stage, microbatches)`` micro-batches alive instead of all.
    """
    ahead = min(stages - stage, microbatches)
    actions = [F(m, stage) for m in range(ahead)]
    for m in range(microbatches):
        actions.append(B(m, stage))
        if m + ahead < microbatches:
            actions.append(F(m + ahead, stage))
    return actions


def interleaved(stage, stages, microbatches, chunks=2):
    """1F1B with several chunks of the model on each stage (Narayanan et al. 2021): a smaller bubble, more messages.

    Stage s holds the chunks s, s + stages, s + 2 stages, ...; micro-batches pass through a chunk in groups of
    ``stages`` or a little more, so that the next chunk's input is there when a group has passed. Here the number of
    micro-batches need not be a multiple of ``stages``: the larger groups go first.
    """
    rounds = max(1, microbatches // stages)
    size, more = divmod(microbatches, rounds)
    starts = [i * size + min(i, more) for i in range(rounds + 1)]
    groups = [range(start, stop) for start, stop in itertools.pairwise(starts)]
    held = range(stage, stages * chunks, stages)
    forward = [F(m, chunk) for group in groups for chunk in held for m in group]
    backward = [B(m, chunk) for group in groups for chunk in reversed(held) for m in group]
    ahead = min((chunks - 1) * len(groups[0]) + 2 * (stages - stage - 1) + 1, len(forward))
    actions = forward[:ahead]
    for i, action in enumerate(backward):
        actions.append(action)
        actions += forward[ahead + i:ahead + i + 1]
    return actions


def zb_h1(stage, stages, microbatches):
    """ZB-H1 (Qi et al. 2023): 1F1B whose weight gradients wait until there is nothing more urgent.

    A third of 1F1B's bubble where F, B and W take the same time; on every stage as many micro-batches alive as on
    1F1B's first.
    """
    ahead = min(stages - stage, microbatches)
    actions = [F(m, stage) for m in range(ahead)]
    for m in range(microbatches):
        actions.append(B(m, stage))
        if m >= stage:
            actions.append(W(m - stage, stage))
        if m + ahead < microbatches:
            actions.append(F(m + ahead, stage))
    return actions + [W(m, stage) for m in range(max(0, microbatches - stage), microbatches)]


def zb_v(stage, stages, microbatches):
    """ZB-V (Qi et al. 2024): stage s holds the chunks s and 2 stages - 1 - s, so the model runs down the stages and up again.

    A sixth of 1F1B's bubble where F, B and W take the same time and there are 2 stages - 1 micro-batches or more, and then
    two chunks' activations of ``stages`` micro-batches are alive on every stage alike. The loss is on stage 0.
    """
    down, up = stage, 2 * stages - 1 - stage
    below = stages - stage  # stages from here to the turning point
    total = max(microbatches, 2 * stages - 1)  # fewer micro-batches run as if there were more, which are then left out
    first = [(F, down)] * (2 * below - 1) + [(F, up), (F, down)] * stage + [(F, up), (B, up), (W, up)] * below
    middle = [(B, down), (W, down), (F, up), (B, up), (W, up)]
    steady = [(F, down), *middle] * (total - stages - below + 1) + middle * (below - 1)
    last = [(B, down), (B, up)] * stage + [(B, down), (W, down)] * below + [(W, up)] * stage + [(W, down)] * stage
    numbers = {key: itertools.count() for key in set(first + steady + last)}
    actions = [kind(next(numbers[kind, chunk]), chunk) for kind, chunk in first + steady + last]
    return [action for action in actions if action.microbatch < microbatches]


SCHEDULES = {schedule.__name__: schedule for schedule in (sequential, gpipe, one_f_one_b, interleaved, zb_h1, zb_v)}
