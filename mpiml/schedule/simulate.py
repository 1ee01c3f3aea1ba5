"""A schedule run without a model: whether it ends, how long it takes, how much it keeps alive."""

from typing import NamedTuple

import numpy as np

from .orders import Action, B, F, W


class Span(NamedTuple):
    """What one stage did from ``start`` to ``end``."""

    action: object
    start: float
    end: float


class Timeline(NamedTuple):
    """When each stage does what.

    Attributes
    ----------
    spans : list of list of Span
        Of each stage, in order of time.
    peak : list of int
        For each stage the largest number of micro-batches, counted for each of its chunks, whose forward pass has
        begun and whose gradients are not complete.
    """

    spans: list
    peak: list

    @property
    def makespan(self):
        """Time from the start of the first computation to the end of the last."""
        spans = [span for spans in self.spans for span in spans]
        return max(span.end for span in spans) - min(span.start for span in spans) if spans else 0.0

    @property
    def bubble(self):
        """Share of all stages' time in which they compute nothing."""
        busy = sum(span.end - span.start for spans in self.spans for span in spans)
        return 1 - busy / (len(self.spans) * self.makespan) if self.makespan else 0.0


class ScheduleError(ValueError):
    """A schedule that would never end, or would not compute the gradient."""


def orders(schedule, stages, microbatches):
    """The lists of all stages."""
    return [list(schedule(stage, stages, microbatches)) for stage in range(stages)]


def owners(lists):
    """The stage that holds each chunk.

    Raises
    ------
    ScheduleError
        The chunks are not 0, 1, 2, ... with one stage for each.
    """
    owner = {}
    for stage, actions in enumerate(lists):
        for action in actions:
            if not isinstance(action, Action):
                raise ScheduleError(f"stage {stage} is to compute {action!r}: a schedule lists F(microbatch, chunk), B and W "
                                    f"of mpiml.schedule")
            if owner.setdefault(action.chunk, stage) != stage:
                raise ScheduleError(f"chunk {action.chunk} is held by stage {owner[action.chunk]}, but stage {stage} "
                                    f"computes {action}: a chunk belongs to one stage")
    if sorted(owner) != list(range(len(owner))):
        raise ScheduleError(f"the chunks of a schedule are numbered 0, 1, 2, ...: these are {sorted(owner)}")
    return [owner[chunk] for chunk in range(len(owner))]


def needs(action, chunks):
    """What must be done before an action, wherever."""
    m, c = action.microbatch, action.chunk
    if isinstance(action, F):
        return [F(m, c - 1)] if c else []
    if isinstance(action, B):
        return [F(m, c), B(m, c + 1)] if c + 1 < chunks else [F(m, c)]
    return [B(m, c)]


def check(lists, microbatches):
    """Make sure that the lists compute each micro-batch once with each chunk; the owners of the chunks.

    Raises
    ------
    ScheduleError
        With the stage at fault and what it lacks or repeats.
    """
    owner = owners(lists)
    for stage, actions in enumerate(lists):
        held = [chunk for chunk, of in enumerate(owner) if of == stage]
        if not held:
            raise ScheduleError(f"stage {stage} of {len(lists)} has nothing to do")
        wanted = {kind(m, chunk) for kind in (F, B) for m in range(microbatches) for chunk in held}
        seen = set()
        for action in actions:
            if action in seen:
                raise ScheduleError(f"stage {stage} computes {action} twice")
            if action not in wanted and not (isinstance(action, W) and 0 <= action.microbatch < microbatches):
                raise ScheduleError(f"stage {stage} computes {action}, which is not one of {microbatches} micro-batches")
            seen.add(action)
        missing = sorted(wanted - seen, key=lambda a: (a.microbatch, a.chunk))
        if missing:
            raise ScheduleError(f"stage {stage} never computes {missing[0]}")
    return owner


def simulate(schedule, stages, microbatches, forward=1.0, backward=1.0, weight=1.0, message=0.0):
    """The timeline of a schedule.

    A backward pass that no W follows takes ``backward + weight``.

    Parameters
    ----------
    schedule : function of (stage, stages, microbatches)
        Returns a list of F, B and W.
    stages, microbatches : int
    forward, backward, weight : float, or (chunks,) array
        Time of F, B and W, for each chunk.
    message : float, or (chunks - 1,) array
        Time from the end of a computation until another stage has what it sends; entry c is for the boundary between
        the chunks c and c + 1. Chunks of one stage hand over at no cost.

    Returns
    -------
    Timeline

    Raises
    ------
    ScheduleError
        The schedule would never end; the message names the stages that are stuck and what they wait for.
    """
    if stages < 1 or microbatches < 1:
        raise ValueError(f"a pipeline has 1 stage and 1 micro-batch at least, not {stages} and {microbatches}")
    lists = orders(schedule, stages, microbatches)
    check(lists, microbatches)
    name = f"{getattr(schedule, '__name__', repr(schedule))} with {stages} stages and {microbatches} micro-batches"
    return replay(lists, forward, backward, weight, message, name)


def replay(lists, forward=1.0, backward=1.0, weight=1.0, message=0.0, name="this list"):
    """The timeline of the lists of all stages; the costs are those of :func:`simulate`."""
    owner = owners(lists)
    chunks = len(owner)
    forward, backward, weight = (_each("the cost", cost, chunks) for cost in (forward, backward, weight))
    message = _each("the time of a message", message, chunks - 1)
    split = {(a.microbatch, a.chunk) for actions in lists for a in actions if isinstance(a, W)}

    def duration(action):
        c = action.chunk
        if isinstance(action, F):
            return forward[c]
        if isinstance(action, W):
            return weight[c]
        return backward[c] if (action.microbatch, c) in split else backward[c] + weight[c]

    def delay(before, action):
        if owner[before.chunk] == owner[action.chunk]:
            return 0.0
        return message[min(before.chunk, action.chunk)]

    done, spans, clock = {}, [[] for _ in lists], [0.0] * len(lists)
    progress = True
    while progress:
        progress = False
        for stage, actions in enumerate(lists):
            while len(spans[stage]) < len(actions):
                action = actions[len(spans[stage])]
                before = needs(action, chunks)
                if not all(b in done for b in before):
                    break
                start = max([clock[stage], *(done[b] + delay(b, action) for b in before)])
                done[action] = clock[stage] = start + duration(action)
                spans[stage].append(Span(action, start, clock[stage]))
                progress = True
    stuck = [stage for stage, actions in enumerate(lists) if len(spans[stage]) < len(actions)]
    if stuck:
        waits = []
        for stage in stuck:
            action = lists[stage][len(spans[stage])]
            missing = next(b for b in needs(action, chunks) if b not in done)
            waits.append(f"stage {stage} with {action}, entry {len(spans[stage])} of its list, waits for {missing} of "
                         f"stage {owner[missing.chunk]}")
        raise ScheduleError(f"{name} never ends: " + "; ".join(waits))
    return Timeline(spans, [alive(actions) for actions in lists])


def _each(what, value, count):
    """``value`` as a list of ``count`` numbers."""
    array = np.asarray(value, float)
    if (array.ndim and array.shape != (count,)) or not (array >= 0).all():
        raise ValueError(f"{what} is a number >= 0 or one for each of {count}, not {value}")
    return np.broadcast_to(array, count).tolist()


def costs(timeline):
    """The mean times of F, B and W of each chunk in a timeline, as :func:`simulate` takes them.

    Where no W follows, half of the time of a B counts as that of W.
    """
    lasted = {}
    for spans in timeline.spans:
        for span in spans:
            lasted.setdefault((type(span.action), span.action.chunk), []).append(span.end - span.start)
    chunks = 1 + max(chunk for _, chunk in lasted)
    mean = {key: sum(times) / len(times) for key, times in lasted.items()}
    split = {chunk: (mean[B, chunk], mean[W, chunk]) if (W, chunk) in mean else (mean[B, chunk] / 2,) * 2
             for chunk in range(chunks)}
    return {"forward": [mean[F, chunk] for chunk in range(chunks)], "backward": [split[chunk][0] for chunk in range(chunks)],
            "weight": [split[chunk][1] for chunk in range(chunks)]}


def alive(actions):
    """The largest number of micro-batches, counted for each chunk, that a list keeps from their F to their B and W."""
    last = {(a.microbatch, a.chunk): i for i, a in enumerate(actions)}
    alive = peak = 0
    for i, action in enumerate(actions):
        alive += isinstance(action, F)
        peak = max(peak, alive)
        alive -= last[action.microbatch, action.chunk] == i
    return peak
