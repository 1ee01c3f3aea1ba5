"""Placing a model on a grid: which rank holds which of its layers."""

import itertools

import numpy as np

from mpiml.nn import Module, Sequential
from mpiml.schedule import check, one_f_one_b, orders

from .link import Link
from .profile import Profile


class _Held(Module):
    """Some chunks of a model, under the names they have in it."""

    def __init__(self, chunks):
        self.chunks = chunks

    def children(self):
        for chunk in self.chunks.values():
            yield "", chunk


class Part(_Held):
    """What one rank holds of a model: whole chunks of it, with their parameters in one vector.

    On a grid without a pipeline that is all of the model, and the part is used like it.

    Attributes
    ----------
    chunks : {int: mpiml.nn.Module}
        The chunks that this rank holds, by their numbers.
    bounds : list of (int, int)
        For every chunk of the model its first layer and the one behind its last.
    owner : list of int
        For every chunk the stage that holds it.
    steps : int
        Number of the next training step, which dropout depends on.
    microbatches : int or None
        Micro-batches for each replica in a step, as :func:`mpiml.parallel.gradient` was told last.
    """

    def __init__(self, model, grid, schedule, bounds, owner, costs):
        self.grid, self.schedule, self.bounds, self.owner, self.costs = grid, schedule, bounds, owner, costs
        pieces = [model] if len(bounds) == 1 else [model[start:stop] for start, stop in bounds]
        self._whole, self._pieces = model, pieces
        self.steps, self.microbatches = 0, None
        self.link = Link(grid, owner)
        super().__init__(self._of(grid.stage))

    def _of(self, stage):
        return {number: piece for number, piece in enumerate(self._pieces) if self.owner[number] == stage}

    def whole(self):
        return self._whole

    def joint_norm(self, norms):
        counts = np.empty(self.grid.pipe, np.int64)
        self.grid.stages.Allgather(np.array([len(norms)], np.int64), counts)
        everything = np.empty(counts.sum())
        self.grid.stages.Allgatherv(np.array(norms, float), [everything, counts])
        return super().joint_norm(everything)

    def __call__(self, x, training=False):
        if len(self.chunks) < len(self.bounds):
            held = ", ".join(_layers(*self.bounds[chunk]) for chunk in self.chunks)
            raise RuntimeError(f"rank {self.grid.rank} holds only {held} of {self.bounds[-1][1]}: call predict(model, x, grid) "
                               f"on all ranks")
        for chunk in self.chunks.values():
            x = chunk(x, training)
        return x

    def report(self):
        """The cut as text: for each chunk its stage, layers and parameters and, of a measured cost, time and memory."""
        profile = self.costs if isinstance(self.costs, Profile) else None
        lines = []
        for number, ((start, stop), piece) in enumerate(zip(self.bounds, self._pieces, strict=True)):
            size = sum(parameter.size for parameter in piece.named().values())
            line = f"stage {self.owner[number]}: {_layers(start, stop)}, {size:,} parameters"
            if profile:
                seconds = profile.seconds
                line += (f", {1e3 * seconds[start:stop].sum():.3g} ms ({seconds[start:stop].sum() / seconds.sum():.0%}) and "
                         f"{profile.memory[start:stop].sum() / 1e6:.3g} MB for a micro-batch")
            lines.append(line)
        return "\n".join(lines)

    def collect(self):
        """{name: array} of all parameters and statistics of the whole model, on rank 0; None on the other ranks.

        To be called on all ranks together. :func:`mpiml.save.save` writes it to a file.
        """
        if self.grid.replica:
            return None
        layouts = [_Held(self._of(stage)).layout() for stage in range(self.grid.pipe)]
        sizes = [sum(parameter.size for parameter in layout.values()) for layout in layouts]
        everything = np.empty(sum(sizes) if self.grid.rank == 0 else 0, self.vector.dtype)
        self.grid.stages.Gatherv(self.vector, [everything, sizes] if self.grid.rank == 0 else None)
        if self.grid.rank:
            return None
        arrays, start = {}, 0
        for name, parameter in itertools.chain(*(layout.items() for layout in layouts)):
            arrays[name] = everything[start:start + parameter.size].reshape(parameter.shape, order=parameter.order)
            start += parameter.size
        return {name: arrays[name] for name in self._whole.named()}


def place(model, grid, seed=0, dtype=np.float32, schedule=one_f_one_b, cuts=None, balance=None, speeds=None):
    """Give each rank its part of the model, with memory for that alone.

    The weights are functions of (seed, name), so nothing is sent but a check that all ranks build the same model. To be
    called on all ranks together.

    Parameters
    ----------
    model : mpiml.nn.Module
        A Sequential, if the grid has several stages: it is cut between its layers.
    grid : mpiml.parallel.Grid
    seed : int
    dtype : float32 or float64
    schedule : function of (stage, stages, microbatches)
        One of :mod:`mpiml.schedule`, or your own. It decides which stage holds which chunks of the model (asked here for
        two micro-batches for each stage), and the order in which :func:`mpiml.parallel.gradient` runs them.
    cuts : sequence of int, optional
        The layers with which chunk 1, chunk 2, ... begin. By default the largest chunk is as small as can be, by ...
    balance : Profile, or sequence of (layers,) numbers, optional
        ... the time that :func:`mpiml.parallel.profile` measured, or the cost you say each layer has, or else by the
        number of parameters.
    speeds : sequence of (stages,) numbers, optional
        Relative speeds of the stages' ranks, if they differ.

    Returns
    -------
    Part
        This rank's part of the model, initialised. Use it in place of the model.

    Raises
    ------
    mpiml.parallel.RankError
        The ranks were given different models, seeds, dtypes, schedules or cuts.
    mpiml.schedule.ScheduleError
        The schedule cannot run on this many stages.
    ValueError
        The model has fewer layers than the schedule has chunks, the cuts are not in order, or a parameter would lie on
        two stages.
    TypeError
        The model is no Sequential, and the schedule has several chunks.
    """
    if not callable(schedule):
        raise TypeError(f"a schedule is a function, such as mpiml.schedule.one_f_one_b, not {schedule!r}")
    microbatches = 2 * grid.pipe  # any number would do, and many schedules want as many as stages
    owner = check(orders(schedule, grid.pipe, microbatches), microbatches)
    bounds = [(0, len(model) if isinstance(model, Sequential) else 1)]
    if len(owner) > 1:
        bounds = _bounds(model, owner, grid, cuts, balance, speeds)
    grid.same("the model's seed, dtype, the stages of its chunks, and its cuts", (seed, np.dtype(dtype).name, owner, bounds))
    grid.same("the model", model)
    return Part(model, grid, schedule, bounds, owner, balance).init(seed, dtype)


def _bounds(model, owner, grid, cuts, balance, speeds):
    if not isinstance(model, Sequential):
        raise TypeError(f"a pipeline of {len(owner)} chunks cuts a Sequential between its layers; this model is one "
                        f"{type(model).__name__}")
    layers, chunks = len(model), len(owner)
    if layers < chunks:
        raise ValueError(f"a model of {layers} layers cannot be cut into {chunks} chunks for {grid.pipe} stages: "
                         f"use fewer stages, or a schedule with fewer chunks on each")
    if cuts is not None and (balance is not None or speeds is not None):
        raise ValueError("cuts says where to cut, balance and speeds are to find it out: give one or the other")
    if cuts is None:
        if balance is None:
            balance = [sum(p.size for p in model[i:i + 1].named().values()) for i in range(layers)]
        costs = balance.seconds if isinstance(balance, Profile) else np.asarray(balance, float)
        if len(costs) != layers:
            raise ValueError(f"balance has {len(costs)} costs, but the model has {layers} layers")
        speeds = [1.0] * grid.pipe if speeds is None else speeds
        if len(speeds) != grid.pipe or min(speeds) <= 0:
            raise ValueError(f"speeds are {grid.pipe} numbers above 0, one for each stage, not {speeds}")
        cuts = partition(costs, [speeds[stage] for stage in owner])
    ends = [0, *map(int, np.atleast_1d(cuts)), layers]
    if len(ends) != chunks + 1 or any(a >= b for a, b in itertools.pairwise(ends)):
        raise ValueError(f"cuts takes {chunks - 1} growing numbers from 1 to {layers - 1}, the layers with which the chunks "
                         f"after the first begin, not {ends[1:-1]}")
    bounds = list(itertools.pairwise(ends))
    home = {}
    for (start, stop), stage in zip(bounds, owner, strict=True):
        for name, parameter in model[start:stop].named().items():
            first, other = home.setdefault(id(parameter), (name, stage))
            if other != stage:
                raise ValueError(f"{name} is the same parameter as {first}, but they would lie on the stages {stage} and "
                                 f"{other}: cut the model so that one stage holds both, or give each its own")
    return bounds


def partition(costs, speeds):
    """Where to cut a line of layers so that the slowest of the runs takes the least time.

    Exact, by dynamic programming over the first layers and the first runs; of equally good cuts, the earliest.

    Parameters
    ----------
    costs : sequence of (layers,) numbers
    speeds : sequence of (runs,) numbers
        A run of layers takes the sum of their costs, divided by its speed.

    Returns
    -------
    list of runs - 1 int
        The first layers of all runs but the first; every run has one layer at least.

    Examples
    --------
    >>> partition([1, 1, 1, 9], speeds=[1, 1])
    [3]
    >>> partition([1, 1, 1, 1, 1, 1], speeds=[2, 1])
    [4]
    """
    layers, runs = len(costs), len(speeds)
    before = np.concatenate([[0.0], np.cumsum(costs, dtype=float)])
    best = np.full((runs + 1, layers + 1), np.inf)  # [r, n]: the slowest of r runs that hold the first n layers
    best[0, 0] = 0.0
    cut = np.zeros((runs + 1, layers + 1), int)
    for run in range(1, runs + 1):
        for stop in range(run, layers + 1):
            slowest = np.maximum(best[run - 1, :stop], (before[stop] - before[:stop]) / speeds[run - 1])
            cut[run, stop] = slowest.argmin()
            best[run, stop] = slowest[cut[run, stop]]
    cuts, stop = [], layers
    for run in range(runs, 1, -1):
        stop = int(cut[run, stop])
        cuts.append(stop)
    return cuts[::-1]


def _layers(start, stop):
    return f"layer {start}" if stop == start + 1 else f"layers {start} to {stop - 1}"
