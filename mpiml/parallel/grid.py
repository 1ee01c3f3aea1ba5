"""The Grid: which ranks work together. The only maker of communicators."""

import contextlib
import functools
import hashlib
import json
import math
import mmap
import shutil
import tempfile

import numpy as np
from mpi4py import MPI

from . import abort, start
from .error import RankError, RanksLost, names
from .group import Group
from .recorder import ELASTIC, recorder

_SHARED = "/dev/shm"  # noqa: S108  a folder in memory
_AGAIN = "To try the same batch again: try: loss = step(x, y); except RanksLost: continue"
_LONG = 500  # characters of a value that an error shows


def _on_those_left(method):
    @functools.wraps(method)
    def tried(self, *args):
        return self.again(method, self, *args)

    return tried


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
    elastic : bool
        Whether the grid outlives its ranks: where MPI was started fault-tolerant (Open MPI: ``mpirun --with-ft ulfm``), and
        without a pipeline.
    generation : int
        How many times ranks were lost.
    undone : int
        How many times the program was told so by a RanksLost, and is to try again what it was at.
    stale : bool or None
        Whether ranks were lost since :class:`mpiml.data.batches` has shared out a batch; None if it never did.

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
        comm = MPI.COMM_WORLD if comm is None else comm
        if MPI.Comm.Compare(comm, MPI.COMM_WORLD) in (MPI.IDENT, MPI.CONGRUENT):
            recorder.start(MPI.COMM_WORLD)
        comm = Group(comm).Dup()
        start.check(comm, data=data, pipe=pipe, lanes=lanes)
        self.data, self.pipe = _factors(data, pipe, comm.size)
        if lanes is not None and (not isinstance(lanes, (int, np.integer)) or lanes < self.data):
            raise ValueError(f"lanes is a whole number of pieces of a batch, one at least for each of the {self.data} "
                             f"replicas, not {lanes!r}")
        self.lanes = lanes
        self.generation, self.undone, self.stale, self._attempting = 0, 0, None, False
        self.elastic = ELASTIC and pipe == 1
        self._divide(comm)

    def _divide(self, comm):
        """Make the communicators of the grid's parts."""
        self.comm, self.rank, self.size = comm, comm.rank, comm.size
        self.stage, self.replica = divmod(self.rank, self.data)
        self.node = self.comm.Split_type(MPI.COMM_TYPE_SHARED)
        self.stages = self.comm.Split(self.replica)  # the stages of this replica, in their order
        self.replicas = self.comm.Split(self.stage)  # the replicas of this stage
        self.near = self.replicas.Split_type(MPI.COMM_TYPE_SHARED)  # those on this node
        self.across = self.replicas.Split(self.near.rank)  # one of each node

    def __repr__(self):
        return f"Grid(data={self.data}, pipe={self.pipe}), rank {self.rank} of {self.size}"

    def attempt(self, work, *args):
        """``work(*args)``; if ranks die meanwhile and the grid is elastic, go on without them.

        To be called on all ranks together. Either all that live end it, or none.

        Raises
        ------
        RanksLost
            On all ranks that are left: some died. The grid is then a smaller one, and ``generation`` one more.
        """
        try:
            return self._attempt(work, *args)
        except RanksLost:
            self.undone += not self._attempting
            raise

    def _attempt(self, work, *args):
        if not self.elastic or self._attempting:
            return work(*args)
        self._attempting = True
        try:
            result, problem, refusal = None, None, None
            try:
                result = work(*args)
            except RankError as error:
                refusal = error  # of all ranks, if none of them lost another on the way
            except RanksLost as error:
                problem = error
                self.comm.Revoke()  # wakes the ranks that wait for others
                self.replicas.Revoke()
            try:
                with self.comm.waiting("agreeing on what was done"):
                    done = self.comm.Agree(problem is None)
            except MPI.Exception:
                done = False  # on all ranks alike
            if not done:
                lost = self._go_on_without()
                if not lost and problem:
                    raise problem.__cause__  # nobody died: MPI failed, and would fail again
                raise RanksLost(f"{names(lost)} died: {self.size} ranks are left, and go on. {_AGAIN}") from problem
            if refusal:
                raise refusal
            return result
        finally:
            self._attempting = False

    def take_shares(self):
        """Raise a RanksLost, on all ranks, if some died since the last batch was shared out: its shares are too few, then."""
        if self.stale:
            self.undone += 1
            raise RanksLost(f"ranks died since this batch was shared out: {self.size} are left, and go on. {_AGAIN}")

    def again(self, work, *args):
        """:meth:`attempt`, and on as many ranks as are left until it is done: for work that changes nothing."""
        while True:
            try:
                return self._attempt(work, *args)
            except RanksLost:
                if self._attempting or not self.elastic:
                    raise

    def _go_on_without(self):
        """Become a grid of the ranks that live; the numbers of those that died."""
        before, size = self.comm.ranks, self.size
        self.comm.Revoke()
        comm = self.comm
        while True:
            comm = Group(comm.Shrink())
            self.data = comm.size
            try:
                self._divide(comm)
                break
            except (MPI.Exception, RanksLost):  # one more
                comm.Revoke()
        self.generation += 1
        self.stale = None if self.stale is None else True
        lost = sorted(set(before) - set(self.comm.ranks))
        if lost:
            abort.farewells_of_survivors[:] = [self._leave]
            if self.rank == 0:
                abort.say(f"mpiml: {names(lost)} died: {self.size} of {size} ranks are left, and go on\n")
        return lost

    def _leave(self):
        """Wait at the end of the program for all that are left."""
        with contextlib.suppress(MPI.Exception, RanksLost):
            self.comm.Barrier()

    @_on_those_left
    def texts(self, text):
        """Every rank's ``text``, on every rank; for start-up and errors, not for the training loop."""
        return start.texts(self.comm, text)

    @_on_those_left
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
                f"{names(ranks)} ha{'s' if len(ranks) == 1 else 've'} {text}"
                for text, ranks in groups.items()), odd)

    @_on_those_left
    def all(self, flag):
        """True on every rank if ``flag`` is true on every rank."""
        verdict = np.array([bool(flag)], np.int64)
        self.comm.Allreduce(MPI.IN_PLACE, verdict, MPI.MIN)
        return bool(verdict[0])

    @_on_those_left
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

    @_on_those_left
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

    @_on_those_left
    def arrays_once_per_node(self, function, *args):
        """The arrays that ``function`` returns, made on one rank of each node, in memory that its ranks share.

        To each rank they are its own: what it writes to them the others do not see. Where ranks cannot share memory, or
        the function raises, all ranks of the node call it themselves.

        Parameters
        ----------
        function : callable
            Returns a list of arrays, the same on all ranks.
        """
        arrays = self._from_shared_memory(function, *args)
        return function(*args) if arrays is None else arrays

    def rows(self, array):
        """The rows of all ranks, in the order of the ranks, as one array on every rank; to be called on all ranks together.

        The ranks of a node share its memory where they can, and to each rank it is its own: what it writes to it the others
        do not see. A rank that died has taken its rows with it: an elastic grid is to read its data again.

        Parameters
        ----------
        array : array (n, ...)
            This rank's rows, any number of them; numbers, whose dtype and shape of a row all ranks share.

        Returns
        -------
        array (sum of all n, ...)

        Raises
        ------
        RankError
            The ranks have rows of different dtypes or shapes.
        """
        return self.attempt(self._rows, np.ascontiguousarray(array))

    def _rows(self, array):
        self.same("dtype and shape of a row", (array.dtype.str, array.shape[1:]))
        counts = [int(text) for text in self.texts(str(len(array)))]
        leads = [text == "0" for text in self.texts(str(self.node.rank))]
        everything = None
        if self.node.rank == 0:
            everything = np.empty((sum(counts), *array.shape[1:]), array.dtype)
        row = math.prod(array.shape[1:]) * array.itemsize
        for root in np.flatnonzero(leads).tolist():
            whole = [_bytes(everything), [n * row for n in counts]] if root == self.rank else None
            self.comm.Gatherv(_bytes(array), whole, root)
        shared = self._from_shared_memory(lambda: [everything])
        if self.all(shared is not None or self.node.size == 1):
            return shared[0] if shared else everything
        if everything is None:
            everything = np.empty((sum(counts), *array.shape[1:]), array.dtype)
        self.node.Bcast(_bytes(everything))
        return everything

    def _from_shared_memory(self, function, *args):
        """The arrays that ``function`` returns on one rank of each node; None if it raises, or memory cannot be shared."""
        if self.all(self.node.size == 1):
            return None
        files, arrays = [], None

        def write():
            try:
                made, plan = function(*args), []
                if 2 * sum(array.nbytes for array in made) > shutil.disk_usage(_SHARED).free:
                    return None  # MPI and the gradient sum need some, too
                files.append(tempfile.NamedTemporaryFile(dir=_SHARED, prefix="mpiml-"))
                for array in made:
                    plan.append((array.dtype.str, array.shape, files[0].tell()))
                    files[0].write(np.ascontiguousarray(array))
                    files[0].write(bytes(64 - files[0].tell() % 64))  # one at least, as an empty file cannot be mapped
                files[0].flush()
            except Exception:
                return None  # the same happens to all, each for itself
            return files[0].name, plan

        found = self.once_per_node(write)
        if found:
            with contextlib.suppress(OSError), open(found[0], "rb") as file:  # ranks may be in containers of their own
                memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
                arrays = [np.frombuffer(memory, dtype, math.prod(shape), offset).reshape(shape)
                          for dtype, shape, offset in found[1]]
        self.node.Barrier()
        for file in files:
            file.close()  # and its name is gone, so that nothing is left behind however the job ends
        return arrays


def _bytes(array):
    return array.reshape(-1).view(np.uint8)


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
