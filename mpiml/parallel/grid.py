"""The Grid: which ranks work together. The only maker of communicators."""

import hashlib
import json

import numpy as np
from mpi4py import MPI

from . import start
from .error import RankError

_LONG = 500  # characters of a value that an error shows


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
    RankError
        The ranks run different programs, packages or arguments; see :mod:`mpiml.parallel.start`.
    RuntimeError
        The launcher belongs to another MPI than the one that was loaded: every process would train alone.
    """

    def __init__(self, data=None, pipe=1, comm=None, lanes=None):
        self.comm = (MPI.COMM_WORLD if comm is None else comm).Dup()
        start.check(self.comm, data=data, pipe=pipe, lanes=lanes)
        self.data, self.pipe = _factors(data, pipe, self.comm.size)
        if lanes is not None and (not isinstance(lanes, (int, np.integer)) or lanes < self.data):
            raise ValueError(f"lanes is a whole number of pieces of a batch, one at least for each of the {self.data} "
                             f"replicas, not {lanes!r}")
        self.lanes = lanes
        self.rank, self.size = self.comm.rank, self.comm.size
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
        return start.texts(self.comm, text)

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
        result, failure = None, None
        if self.node.rank == 0:
            try:
                result = function(*args)
            except Exception as error:
                failure = error
        problems = self.texts("" if failure is None else f"{type(failure).__name__}: {failure}")
        ranks = [rank for rank, problem in enumerate(problems) if problem]
        if ranks:
            raise RankError(f"rank {ranks[0]} failed in {function.__name__}: {problems[ranks[0]]}", ranks) from failure
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
