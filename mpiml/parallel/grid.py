"""The Grid: which ranks work together. The only maker of communicators."""

import hashlib
import json
import os

import numpy as np
from mpi4py import MPI

_LONG = 500  # characters of a value that an error shows
_WORLD_SIZE = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_SLURM_SIZE = ("SLURM_STEP_NUM_TASKS",)  # also in what an mpirun inside of a step starts, so it counts if it stands alone


class RankError(RuntimeError):
    """An error that all ranks found together; ``ranks`` are those that caused it."""

    def __init__(self, message, ranks):
        super().__init__(message)
        self.ranks = ranks


class Grid:
    """All ranks of a communicator as a grid of data x pipe: replicas of the model, each cut into stages.

    The ranks that hold the same stage, which sum their gradients, are neighbours: rank = replica + data * stage. The
    library speaks on duplicates of the communicator, never on the caller's own.

    Parameters
    ----------
    data : int, optional
        Number of replicas of the model; by default as many as there are ranks for.
    pipe : int
        Number of stages that a model is cut into; 1 is data parallelism.
    comm : mpi4py.MPI.Comm, optional
        ``MPI.COMM_WORLD`` by default.
    lanes : int, optional
        Cut each global batch into this many lanes, whatever the number of ranks: with equal lanes, training gives the same
        bits on any grid, see :mod:`mpiml.lanes`.

    Attributes
    ----------
    rank, size : int
        This rank and the number of ranks.
    replica, data : int
        This rank's replica of the model and the number of replicas.
    stage, pipe : int
        This rank's stage of the pipeline and the number of stages.
    lanes : int or None

    Raises
    ------
    ValueError
        The grid does not fit the number of processes, and the message lists those that do; or there are fewer lanes than
        replicas.
    RuntimeError
        The launcher belongs to another MPI than the one that was loaded: every process would train alone.
    """

    def __init__(self, data=None, pipe=1, comm=None, lanes=None):
        if comm is None:
            comm = MPI.COMM_WORLD
            _check_launcher(comm.size)
        self.data, self.pipe = _factors(data, pipe, comm.size)
        if lanes is not None and (not isinstance(lanes, (int, np.integer)) or lanes < self.data):
            raise ValueError(f"lanes is a whole number of pieces of a batch, one at least for each of the {self.data} "
                             f"replicas, not {lanes!r}")
        self.lanes = lanes
        self.comm = comm.Dup()
        self.rank, self.size = comm.rank, comm.size
        self.stage, self.replica = divmod(self.rank, self.data)
        self.node = self.comm.Split_type(MPI.COMM_TYPE_SHARED)
        self.stages = self.comm.Split(self.replica)  # the stages of this replica, in their order
        self.replicas = self.comm.Split(self.stage)  # the replicas of this stage
        self.near = self.replicas.Split_type(MPI.COMM_TYPE_SHARED)  # those on this node
        self.across = self.replicas.Split(self.near.rank)  # one of each node

    def __repr__(self):
        return f"Grid(data={self.data}, pipe={self.pipe}), rank {self.rank} of {self.size}"

    def texts(self, text):
        """Every rank's ``text``, on every rank; for start-up and errors, not for the training loop."""
        mine = np.frombuffer(text.encode(), np.uint8)
        lengths = np.empty(self.size, np.int64)
        self.comm.Allgather(np.array([mine.size], np.int64), lengths)
        everything = np.empty(lengths.sum(), np.uint8)
        self.comm.Allgatherv(mine, [everything, lengths])
        return [part.tobytes().decode() for part in np.split(everything, np.cumsum(lengths)[:-1])]

    def same(self, what, value):
        """Make sure that ``repr(value)`` is the same on all ranks.

        Raises
        ------
        RankError
            It is not; the message says who has what.
        """
        text = repr(value)
        digests = np.empty(self.size, np.uint64)
        self.comm.Allgather(np.frombuffer(hashlib.blake2b(text.encode(), digest_size=8).digest(), np.uint64), digests)
        if (digests != digests[0]).any():
            texts = self.texts(text if len(text) < _LONG else f"{text[:_LONG]}... (digest {digests[self.rank]:x})")
            groups = {}
            for rank, text in enumerate(texts):
                groups.setdefault(text, []).append(rank)
            odd = min(groups.values(), key=len)
            raise RankError(f"{what} must be the same on all ranks, but " + "; ".join(
                (f"rank {ranks[0]} has " if len(ranks) == 1 else f"ranks {_list(ranks)} have ") + text
                for text, ranks in groups.items()), odd)

    def all(self, flag):
        """True on every rank if ``flag`` is true on every rank."""
        verdict = np.array([bool(flag)], np.int64)
        self.comm.Allreduce(MPI.IN_PLACE, verdict, MPI.MIN)
        return bool(verdict[0])

    def maximum(self, *numbers):
        """The largest of all ranks' first numbers, of their second ones, and so on, on every rank."""
        numbers = np.array(numbers, np.int64)
        self.comm.Allreduce(MPI.IN_PLACE, numbers, MPI.MAX)
        return numbers.tolist()

    def together(self, what, function, *args):
        """Call ``function`` on every rank; to be called on all ranks together.

        Parameters
        ----------
        what : str
            What is being done, for the message: "rank 2 failed in ...".
        function : callable
            May differ from rank to rank, and must not wait for another rank.

        Returns
        -------
        object
            What the function returned on this rank.

        Raises
        ------
        RankError
            On every rank, if the function raised on one; chained to that exception where it happened.
        """
        result, failure = None, None
        try:
            result = function(*args)
        except Exception as error:
            failure = error
        problems = self.texts("" if failure is None else f"{type(failure).__name__}: {failure}")
        ranks = [rank for rank, problem in enumerate(problems) if problem]
        if ranks:
            others = f" (and {len(ranks) - 1} more)" if len(ranks) > 1 else ""
            raise RankError(f"rank {ranks[0]}{others} failed in {what}: {problems[ranks[0]]}", ranks) from failure
        return result

    def once_per_node(self, function, *args):
        """Call ``function`` on one rank of each node while the others wait; return its node's result on every rank.

        Parameters
        ----------
        function : callable
            Returns what JSON can carry: numbers, text, None, lists of these.

        Raises
        ------
        RankError
            On every rank, if the function raised on one; chained to that exception where it happened.
        """
        result = self.together(function.__name__, lambda: None if self.node.rank else function(*args))
        length = np.zeros(1, np.int64)
        text = np.frombuffer(json.dumps(result).encode(), np.uint8)
        if self.node.rank == 0:
            length[0] = text.size
        self.node.Bcast(length)
        buffer = text.copy() if self.node.rank == 0 else np.empty(length[0], np.uint8)
        self.node.Bcast(buffer)
        return json.loads(buffer.tobytes())


def _factors(data, pipe, size):
    """(data, pipe), checked against the number of processes."""
    for name, value in ("data", 1 if data is None else data), ("pipe", pipe):
        if not isinstance(value, (int, np.integer)) or value < 1:
            raise ValueError(f"{name} is a whole number above 0, not {value!r}")
    if data is None and size % pipe == 0:
        data = size // pipe
    if data is None or data * pipe != size:
        fit = ", ".join(f"{size // p}x{p}" for p in range(1, size + 1) if size % p == 0)
        asked = (f"a grid of data={data} x pipe={pipe} needs {data * pipe}" if data else
                 f"a grid of pipe={pipe} needs a multiple of {pipe}")
        start = f"start it with mpirun -n {data * pipe}, or " if data else ""
        raise ValueError(f"{asked} processes, but there are {size}: {start}choose data x pipe among {fit}")
    return int(data), int(pipe)


def _list(ranks):
    return ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")


def _check_launcher(size):
    for names in _WORLD_SIZE, _SLURM_SIZE:
        started = {name: int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit()}
        if size in started.values():
            return  # another launcher around this one left the other number
        if started:
            name, number = next(iter(started.items()))
            library = MPI.Get_library_version().strip("\0\n ").splitlines()[0]
            raise RuntimeError(f"the launcher started {number} processes ({name}), but the MPI library that mpi4py loaded "
                               f"({library}) sees {size}: use the mpirun that belongs to this library, or the mpi4py that "
                               f"belongs to this mpirun")
