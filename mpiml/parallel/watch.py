"""What each rank was doing: time spent computing, communicating and waiting, as numbers, a drawing and a trace."""

import json
from array import array
from collections import deque
from time import perf_counter

import numpy as np
from mpi4py import MPI

from mpiml.schedule import B, F, Span, Timeline, W, alive, costs, picture, replay, text

_KINDS = (F, B, W)


class Watch:
    """What this rank computes, sends and waits for, compared with the other ranks when asked.

    An all-reduce lasts from a rank's arrival until the sum is there. The last rank to arrive waits for nobody, so
    the shortest time among the replicas is communication, and what the others spent beyond it is waiting. No
    barrier is needed to tell the two apart. Waiting for a message of another stage is waiting.

    Parameters
    ----------
    keep : int
        Number of latest computations to remember in detail, for :meth:`trace` and :meth:`timeline`.
    """

    def __init__(self, keep=100_000):
        self._actions = deque(maxlen=keep)
        self._sums = deque(maxlen=keep)
        self.restart()

    def restart(self):
        """Forget what was recorded and start anew."""
        self._actions.clear()
        self._sums.clear()
        self._compute = self._receive = self._send = 0.0
        self._reduce = array("d")
        self.start = perf_counter()

    @property
    def steps(self):
        """Number of steps that were recorded since the start."""
        return len(self._reduce)

    def action(self, step, action, begin, arrived, done, sent):
        """Note a computation of a step: when it began to wait for its message, had it, was done, and had sent its own."""
        self._actions.append((step, action, begin, arrived, done, sent))
        self._receive += arrived - begin
        self._compute += done - arrived
        self._send += sent - done

    def wait(self, seconds):
        """Note time in which this rank waited for the other stages, at the end of a step."""
        self._receive += seconds

    def all_reduce(self, step, begin, end):
        """Note the all-reduce of a step."""
        self._sums.append((step, begin, end))
        self._reduce.append(end - begin)

    def times(self, grid):
        """{"compute", "communicate", "wait", "other"}: seconds since the start, (ranks,) arrays, on every rank.

        To be called on all ranks together.
        "other" is all that is not in a step: reading data, the optimizer, evaluation.
        """
        wall = perf_counter() - self.start
        reduce = np.array(self._reduce)
        grid.same("the number of recorded steps", len(reduce))
        shortest = np.empty_like(reduce)
        grid.replicas.Allreduce(reduce, shortest, MPI.MIN)
        sums = np.empty((grid.size, 4))
        wait = self._receive + (reduce - shortest).sum()
        grid.comm.Allgather(np.array([self._compute, self._send + shortest.sum(), wait, wall]), sums)
        compute, communicate, wait, walls = sums.T
        return {"compute": compute, "communicate": communicate, "wait": wait,
                "other": walls - compute - communicate - wait}

    def report(self, grid):
        """Two lines that compare the rank that computed longest with the one that computed shortest.

        To be called on all ranks together.
        """
        times = self.times(grid)
        compute = times["compute"]
        lines = []
        for word, rank in ("slowest", compute.argmax()), ("fastest", compute.argmin()):
            total = sum(part[rank] for part in times.values())
            lines.append(f"{word} rank {rank}: " + ", ".join(
                f"{name} {part[rank]:.2f} s ({part[rank] / total:.0%})" for name, part in times.items()))
        return "\n".join(lines)

    def timeline(self, grid, step=None):
        """What the stages of replica 0 computed when, in one step; by default in one of median length.

        To be called on all ranks together.

        Returns
        -------
        mpiml.schedule.Timeline
            The same on every rank.
        """
        chosen = np.array([-1 if grid.rank or not self._actions else self._typical() if step is None else step], np.int64)
        grid.comm.Bcast(chosen)
        mine = [row for row in self._rows(_clock(grid)) if row[0] == chosen[0] and grid.replica == 0]
        rows = _gather(grid, mine, 8, everywhere=True)
        if not all(rows[::grid.data]):
            raise ValueError("nothing was recorded" + (f" of step {step}" if step is not None else "") + ": give the watch to "
                             "gradient(..., watch=watch), and train a step in which replica 0 has samples")
        spans = [[Span(_KINDS[int(kind)](int(m), int(c)), arrived, done) for _, kind, m, c, _, arrived, done, _ in rows[rank]]
                 for rank in range(0, grid.size, grid.data)]
        return Timeline(spans, [alive([span.action for span in stage]) for stage in spans])

    def _typical(self):
        """A step of median length among those with the most micro-batches."""
        steps = {}
        for step, _, begin, _, _, sent in self._actions:
            first, _, count = steps.get(step, (begin, sent, 0))
            steps[step] = first, sent, count + 1
        most = max(count for _, _, count in steps.values())
        lengths = sorted((sent - begin, step) for step, (begin, sent, count) in steps.items() if count == most)
        return lengths[len(lengths) // 2][1]

    def draw(self, grid, path=None, step=None):
        """The measured timeline of a step below the simulated one, for computations that took as long, and instant messages.

        To be called on all ranks together.

        Parameters
        ----------
        grid : mpiml.parallel.Grid
        path : str, optional
            Rank 0 writes a picture to it (.svg, .png, .pdf), which needs matplotlib.
        step : int, optional
            By default one of median length.

        Returns
        -------
        str
            Both as text, with their bubbles.
        """
        measured = self.timeline(grid, step)
        simulated = replay([[span.action for span in spans] for spans in measured.spans], **costs(measured))
        both = {"simulated": simulated, "measured": measured}
        if path and grid.rank == 0:
            picture(both, path, "s")
        return "\n".join(f"{name}: {1e3 * timeline.makespan:.3g} ms, bubble {timeline.bubble:.1%}\n{text(timeline, 150)}"
                         for name, timeline in both.items())

    def trace(self, grid, path, steps=20):
        """Write what all ranks did in the last ``steps`` steps as a trace, to open in ui.perfetto.dev or chrome://tracing.

        To be called on all ranks together; rank 0 writes.
        """
        clock = _clock(grid)
        first = self._sums[-1][0] - steps if self._sums else 0
        actions = _gather(grid, [row for row in self._rows(clock) if row[0] > first], 8)
        sums = _gather(grid, [(step, begin - clock, end - clock) for step, begin, end in self._sums if step > first], 3)
        if grid.rank:
            return
        events = []
        for rank in range(grid.size):
            stage, replica = divmod(rank, grid.data)
            place = {"pid": replica, "tid": stage}
            events += [{"name": "process_name", "ph": "M", "args": {"name": f"replica {replica}"}} | place,
                       {"name": "thread_name", "ph": "M", "args": {"name": f"stage {stage} (rank {rank})"}} | place]
            for step, kind, m, c, begin, arrived, done, sent in actions[rank]:
                name, args = f"{_KINDS[int(kind)].__name__}{int(m)}", {"step": int(step), "chunk": int(c)}
                events += [_event(place, "receive", begin, arrived, args), _event(place, name, arrived, done, args),
                           _event(place, "send", done, sent, args)]
            events += [_event(place, "all-reduce", begin, end, {"step": int(step)}) for step, begin, end in sums[rank]]
        events = [event for event in events if event.get("dur", 1) >= 0.5]  # shorter ones (in us) hide the others
        first = min((event["ts"] for event in events if event["ph"] == "X"), default=0.0)
        for event in events:
            if event["ph"] == "X":
                event["ts"] -= first
        with open(path, "w") as file:
            json.dump({"traceEvents": events}, file)

    def _rows(self, clock):
        return [(step, _KINDS.index(type(action)), action.microbatch, action.chunk,
                 begin - clock, arrived - clock, done - clock, sent - clock)
                for step, action, begin, arrived, done, sent in self._actions]


def _event(place, name, begin, end, args):
    return {"name": name, "ph": "X", "ts": 1e6 * begin, "dur": 1e6 * (end - begin), "args": args} | place


def _gather(grid, rows, columns, everywhere=False):
    """Every rank's rows of numbers, on rank 0 or everywhere."""
    mine = np.array(rows, float).reshape(-1, columns)
    lengths = np.empty(grid.size, np.int64)
    grid.comm.Allgather(np.array([mine.size], np.int64), lengths)
    if everywhere:
        everything = np.empty(lengths.sum())
        grid.comm.Allgatherv(mine, [everything, lengths])
    else:
        everything = np.empty(0 if grid.rank else lengths.sum())
        grid.comm.Gatherv(mine, None if grid.rank else [everything, lengths])
        if grid.rank:
            return None
    return [part.reshape(-1, columns).tolist() for part in np.split(everything, np.cumsum(lengths)[:-1])]


def _clock(grid):
    """What this rank's clock is ahead of that of rank 0, from the quickest of some exchanges (Cristian 1989).

    The ranks of a node have one clock, so that only the first of each node asks.
    """
    ahead = np.zeros(1)
    asks = np.empty(grid.size, np.int64)
    grid.comm.Allgather(np.array([grid.node.rank == 0], np.int64), asks)
    for rank in np.flatnonzero(asks).tolist()[1:]:
        quickest = np.inf
        for _ in range(10):
            now = np.array([perf_counter()])
            if grid.rank == 0:
                grid.comm.Recv(np.empty(0), rank)
                now[0] = perf_counter()
                grid.comm.Send(now, rank)
            elif grid.rank == rank:
                asked = now[0]
                grid.comm.Send(np.empty(0), 0)
                grid.comm.Recv(now, 0)
                answered = perf_counter()
                if answered - asked < quickest:
                    quickest = answered - asked
                    ahead[0] = (asked + answered) / 2 - now[0]
    grid.node.Bcast(ahead)
    return float(ahead[0])
