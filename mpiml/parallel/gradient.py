"""The training step: the gradient of the mean loss over the global batch, on any grid."""

import contextlib
import functools
import hashlib
import math
import warnings
from time import perf_counter

import numpy as np
from mpi4py import MPI

from mpiml import cores
from mpiml import kernels as k
from mpiml.data.batches import share
from mpiml.lanes import Leaves, in_threads, samples_together, twins
from mpiml.nn import BatchNorm2d, Dropout
from mpiml.schedule import ScheduleError, W, orders, owners, simulate
from mpiml.tensor import value_of

from .error import RankError, RanksLost
from .interpreter import Interpreter
from .place import Part
from .recorder import recorder
from .sum import held, summation


def gradient(model, loss, grid, microbatches=None, *, recompute=False, watch=None, first_step=None, threads=None, replay=False):
    """A function ``step(x, y)`` that leaves the gradient of the global mean loss in ``model.gradient``.

    Each replica cuts its share of the batch into micro-batches, and its stages run the model's schedule: the *sum* of
    the loss over the share and its gradient. Then the replicas of each stage add up gradients, losses and numbers of
    samples, as soon as the stage is done; one division makes means of them. So the result is that of one rank with the
    whole batch, however unevenly the batch is shared; a replica may even have none. On a grid of one rank, several
    micro-batches are gradient accumulation.

    Parameters
    ----------
    model : Part
        What :func:`mpiml.parallel.place` returned.
    loss : function of (output, target)
        Returns the *sum* over the samples, such as :func:`mpiml.ops.cross_entropy`; a mean is refused.
    grid : mpiml.parallel.Grid
        The one that the model was placed on.
    microbatches : int, optional
        Micro-batches for each replica in a step; by default 2 for each stage, or 1 without a pipeline. A share of fewer
        samples gives fewer. On a grid with lanes, a replica's lanes are its micro-batches.
    recompute : bool or collection of int
        True, or the stages that keep only their chunks' inputs from the forward to the backward pass and compute the rest
        anew: a forward pass more, and the memory of all activations but of one micro-batch less.
    watch : mpiml.parallel.Watch, optional
        Records what this rank does.
    first_step : int, optional
        Number of the first step, which dropout depends on; by default ``model.steps``, which counts all steps of the model
        and is part of a checkpoint.
    threads : int, optional
        Threads of this rank that compute its lanes, where there are lanes and no pipeline; by default one for each core that
        falls to this rank. The bits do not depend on it. A watch sees what the first of them does.
    replay : bool
        Record what the model does in two steps, and then repeat it as a program, see :class:`mpiml.Replay`: the same bits in
        less time where the layers are small. The model must do the same in each step, without dropout, and the schedule not
        split its backward passes.

    Returns
    -------
    step : function of (x, y)
        To be called on all ranks together. Takes this replica's share, the same on all its stages (the first needs x, the
        last y, and all the number of samples), replaces the model's gradient and returns the mean loss, a float, the same
        on all ranks. It raises :class:`~mpiml.parallel.RankError` on all ranks, with the ranks at fault, if the loss or
        the gradient is not finite or the whole batch is empty; the model's gradient is then zero, so that training may
        go on with the next batch. An error in a rank's own share (a shape, a label) is raised on that rank. On an elastic
        grid, :class:`~mpiml.parallel.RanksLost` says that ranks died, on all that are left, and that this step was not
        taken; :class:`mpiml.data.batches` then yields the same batch again, in other shares.

    Raises
    ------
    mpiml.schedule.ScheduleError
        The schedule would never end with this many micro-batches; nothing was sent yet.
    RankError
        The replicas of a stage hold different weights, or the ranks were told different numbers of micro-batches.
    ValueError, RuntimeError
        The model was placed on another grid, or not at all; a BatchNorm2d would see its batch in pieces; the number of
        micro-batches is none. From ``step``: the model is to be replayed and did not do the same twice.
    """
    if not isinstance(model, Part):
        raise RuntimeError("gradient takes what place(model, grid) returned: call place(model, grid) before gradient(...)")
    if model.grid is not grid:
        raise ValueError(f"the model was placed on {model.grid}, but gradient is to run on {grid}: use one Grid for both")
    if grid.lanes and microbatches is not None:
        raise ValueError(f"a grid with lanes has those as its micro-batches, here {grid.lanes}: leave out "
                         f"microbatches={microbatches}")
    if microbatches is None and not grid.lanes:
        microbatches = 1 if grid.pipe == 1 else 2 * grid.pipe
    if not grid.lanes and (not isinstance(microbatches, (int, np.integer)) or microbatches < 1):
        raise ValueError(f"microbatches is a whole number above 0, not {microbatches!r}")
    if threads is None:
        threads = cores.threads() if grid.lanes and grid.pipe == 1 else 1
    if not isinstance(threads, (int, np.integer)) or threads < 1 or (threads > 1 and not (grid.lanes and grid.pipe == 1)):
        raise ValueError(f"threads is a whole number above 0, and 1 on a grid without lanes or with a pipeline, not "
                         f"{threads!r}")
    if replay and any(isinstance(a, W) for order in orders(model.schedule, grid.pipe, microbatches or 1) for a in order):
        raise ValueError("replay=True repeats backward passes as a whole, but this schedule splits them (W): use another one, "
                         "such as one_f_one_b, or leave out replay")
    make = functools.partial(_Plan, model, loss, grid, microbatches, recompute, watch, threads, replay)
    plan = make()
    model.steps, model.microbatches = model.steps if first_step is None else first_step, microbatches

    def take(number, x, y):
        nonlocal plan
        if plan.generation != grid.generation:  # ranks were lost
            plan = make()
        return plan.take(number, x, y)

    def step(x, y):
        grid.take_shares()
        number, model.steps = model.steps, model.steps + 1
        with recorder.at(f"step {number}"):
            try:
                return grid.attempt(take, number, x, y)
            except RanksLost:
                model.steps = number  # it was not taken
                raise

    return step


class _Plan:
    """What the step of a model is made of, on the ranks that the grid has now."""

    def __init__(self, model, loss, grid, microbatches, recompute, watch, threads, replay):
        self.model, self.grid, self.watch, self.generation = model, grid, watch, grid.generation
        self.started = False
        loss = _Sum(loss)
        self.lanes = range(*held(grid, grid.replica)) if grid.lanes else None
        self.microbatches = len(self.lanes) if self.lanes else microbatches
        self.multiple = samples_together(model.whole(), grid.lanes or grid.data * microbatches)
        spans = [held(grid, replica) for replica in range(grid.data)] if self.lanes else [(0, microbatches)]
        counts = {stop - start for start, stop in spans}
        for count in counts:
            simulate(model.schedule, grid.pipe, count)  # refuses a schedule that would hang
            owner = owners(orders(model.schedule, grid.pipe, count))
            if owner != model.owner:
                raise ScheduleError(f"with {count} micro-batches the schedule has the chunks on the stages {owner}, but when "
                                    f"the model was placed they were on {model.owner}: a chunk stays where it is")
        grid.same("the schedule and the number of micro-batches",
                  [grid.lanes, *(orders(model.schedule, grid.pipe, count) for count in sorted(counts))])
        _same_weights(model, grid)
        self.actions = model.schedule(grid.stage, grid.pipe, self.microbatches)
        recomputed = recompute if isinstance(recompute, bool) else grid.stage in recompute
        more = min(threads, self.microbatches) - 1
        self.interpreters = [Interpreter(model, loss, recomputed, watch, replay=replay)] + [
            Interpreter(model, loss, recomputed, None, twins(model), replay) for _ in range(more)]
        self.total = summation(grid, len(model.sums), model.sums.dtype)
        self.sums = self.total.rows[0]
        model.accumulate_in(self.sums)
        self.leaves = Leaves(model, self.total.rows, self.lanes, grid.lanes) if self.lanes else None
        # Only these depend on where a share lies in the batch; without them nobody needs to ask.
        self.positioned = bool(self.lanes or model.whole().named((BatchNorm2d, Dropout)))

    def take(self, number, x, y):
        """One step; see :func:`gradient`."""
        if len(x) != len(y):
            raise ValueError(f"x has {len(x)} samples but y has {len(y)}")
        model, grid, watch, sums = self.model, self.grid, self.watch, self.sums
        if not self.started:
            self.started = True
            _warn_of_equal_shares(grid, x)
        if model.sums is not sums:  # another step, for another loss, say, was made or used since
            model.accumulate_in(sums)
        local = self._local(number, x, y)
        ready = perf_counter()
        self.total()
        if watch:
            watch.all_reduce(number, ready, perf_counter())
        loss, count = float(sums[-2]), float(sums[-1])
        # The sum of all elements is not finite if one of them is not.
        check = k.scale(model.gradient, sums.dtype.type(1 / count)) if count else math.nan
        finite = math.isfinite(loss + check)
        if grid.pipe > 1:
            begin = perf_counter()
            loss, bad = _over_stages(grid, loss, 0.0 if finite else 1.0)
            finite = not bad
            if watch:
                watch.wait(perf_counter() - begin)
        if not finite:
            _explain(grid, model, number, x, y, local, loss, count)
        return loss / count

    def _local(self, number, x, y):
        """Put the sums of this rank's share in their rows; return its loss."""
        first = 0
        parts = [share(len(x), m, self.microbatches, self.multiple) for m in range(self.microbatches)]
        if self.positioned:
            first, batch = _position(self.grid, len(x), self.multiple)
            if self.lanes:
                bounds = [share(batch, lane, self.grid.lanes, self.multiple) for lane in self.lanes]
                parts = [(start - first, stop - first) for start, stop in bounds]
        # Some may be empty, and are left out by all stages alike.
        actions = [a for a in self.actions if parts[a.microbatch][0] < parts[a.microbatch][1]]
        if not self.lanes:
            self.sums[:] = 0
            local = self.interpreters[0].run(actions, x, y, parts, number, first)
            self.sums[-2:] = local, len(x)
            return local
        self.leaves.clear()
        for m, (start, stop) in enumerate(parts):
            if start == stop:
                self.leaves.close(m)
        threads = len(self.interpreters)

        def run(thread):
            mine = [a for a in actions if a.microbatch % threads == thread]
            return self.interpreters[thread].run(mine, x, y, parts, number, first, self.leaves)

        losses = in_threads(run, threads)
        self.leaves.finish()
        return math.fsum(losses)


class _Sum:
    """A loss that, at its first call, is refused if it is a mean: then it would be divided by the number of samples twice."""

    def __init__(self, loss):
        self.loss, self.checked = loss, False

    def __call__(self, output, target):
        value = self.loss(output, target)
        if not self.checked:
            self.checked = True
            some = [value_of(a)[:8] for a in (output, target)]
            once = twice = math.nan
            with contextlib.suppress(TypeError, ValueError):  # it has its reasons not to take other numbers of samples
                once, twice = float(self.loss(*some)), float(self.loss(*[np.concatenate([a, a]) for a in some]))
            if once and math.isclose(once, twice, rel_tol=1e-5):
                raise ValueError(f"the loss of {len(some[1])} samples is {once:g}, and that of the same samples twice as well: "
                                 f"it is a mean, but gradient and fit take the sum over the samples, such as "
                                 f"mpiml.ops.cross_entropy, and divide it by their number")
        return value


def _warn_of_equal_shares(grid, x):
    """Each replica should have samples of its own."""
    if grid.data == 1:
        return
    x = np.asarray(x)
    told_apart = len(x) >= 8 and (x != x[:1]).any()  # a handful, or ones everywhere, prove nothing
    texts = grid.texts(hashlib.blake2b(x.tobytes(), digest_size=8).hexdigest() if told_apart else "")
    if told_apart and len(set(texts)) == 1 and grid.rank == 0:
        warnings.warn(f"all {grid.data} replicas got the same {len(x)} samples, so each computes what one could: give batches "
                      f"the grid, batches(..., grid=grid)", stacklevel=2)


def _same_weights(model, grid):
    """Make sure that the replicas of each stage hold the same weights."""
    mine = hashlib.blake2b(model.vector.tobytes(), digest_size=8).hexdigest()
    texts = grid.texts(mine)
    odd = [rank for rank, text in enumerate(texts) if text != texts[rank - rank % grid.data]]
    if odd:
        raise RankError(f"the weights must be the same on all replicas of a stage, but rank {odd[0]} has others than rank "
                        f"{odd[0] - odd[0] % grid.data}: place with one seed on all ranks, and load the same files", odd)


def _over_stages(grid, *values):
    """The sums of numbers over the stages."""
    values = np.array(values)
    grid.stages.Allreduce(MPI.IN_PLACE, values, MPI.SUM)
    return values.tolist()


def _position(grid, samples, multiple):
    """First sample of this replica's share in the global batch, and the samples in that; they must suit the model."""
    sizes = np.empty(grid.data, np.int64)
    grid.replicas.Allgather(np.array([samples], np.int64), sizes)
    starts = np.cumsum(sizes) - sizes
    batch = int(sizes.sum())
    odd = np.flatnonzero(starts % multiple * sizes).tolist()
    if odd:
        ranks = [replica + grid.data * grid.stage for replica in odd]
        raise RankError(f"rank {ranks[0]}'s share starts at sample {starts[odd[0]]} of the batch, which is not a multiple "
                        f"of BatchNorm2d's samples={multiple}: use batches(..., multiple={multiple})", ranks)
    if grid.lanes:
        due = [stop - start for start, stop in
               (share(batch, replica, grid.data, multiple, grid.lanes) for replica in range(grid.data))]
        odd = [replica for replica in range(grid.data) if sizes[replica] != due[replica]]
        if odd:
            ranks = [replica + grid.data * grid.stage for replica in odd]
            raise RankError(f"rank {ranks[0]} has {sizes[odd[0]]} samples of a batch of {batch}, but its lanes have "
                            f"{due[odd[0]]}: use batches(..., grid=grid), with the grid that has the lanes", ranks)
    return int(starts[grid.replica]), batch


def _explain(grid, model, number, x, y, local, total, count):
    # Every rank has seen the same reduced sums, so all come here or none.
    if not count:
        raise RankError(f"the batch of step {number} is empty on all {grid.size} ranks", list(range(grid.size)))
    if grid.all(math.isfinite(total) and np.isfinite(model.gradient).all()):
        return  # only the check itself overflowed
    problem = ""
    looked_at = [("input", x)] * (0 in model.chunks) + [("target", y)] * (len(model.bounds) - 1 in model.chunks)
    for name, array in looked_at:
        array = np.asarray(array)
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            bad = ~np.isfinite(array)
            place = tuple(int(i) for i in np.unravel_index(bad.argmax(), bad.shape))
            problem = f"{bad.sum()} of the {bad.size} values of its {name} are not finite, the first at {place}"
            break
    else:
        if not math.isfinite(local):
            problem = f"its loss is {local}, of finite inputs"
    problems = grid.texts(problem)
    model.sums[:] = 0
    ranks = [rank for rank, text in enumerate(problems) if text]
    if any("values" in problems[rank] for rank in ranks):
        ranks = [rank for rank in ranks if "values" in problems[rank]]  # a loss that follows from them is no news
    said = "; ".join(f"rank {rank}: {problems[rank]}" for rank in ranks[:5]) or "all inputs and losses are finite"
    fix = ("clean the data" if any("values" in text for text in problems) else
           "training diverges: lower the learning rate, or clip the gradient's norm")
    what = (f"the gradient of step {number} is not finite" if math.isfinite(total) else
            f"the loss of step {number} is {total / count}")
    raise RankError(f"{what} ({said}): {fix}", ranks or list(range(grid.size)))
