"""Groups of ranks, and their collectives, which find out when the ranks do not do the same."""

import functools
import zlib

import numpy as np
from mpi4py import MPI

from .error import RankError, RanksLost
from .recorder import ELASTIC, Wait, apart, recorder

_LOST = MPI.ERR_PROC_FAILED, MPI.ERR_PROC_FAILED_PENDING, MPI.ERR_REVOKED


class Group(MPI.Intracomm):
    """A communicator that notes what its rank waits for, and compares before each collective what all ranks are about to do.

    MPI itself would mix up a sum of one step with that of another, or hang. The comparison is an all-reduce of 16 bytes.
    """

    def Dup(self):
        with self.waiting("Dup"):
            return Group(super().Dup())

    def Split(self, color=0, key=0):
        with self.waiting("Split"):
            return Group(super().Split(color, key))

    def Split_type(self, split_type, key=0):
        with self.waiting("Split_type"):
            return Group(super().Split_type(split_type, key))

    @functools.cached_property
    def ranks(self):
        """The numbers of its ranks in the whole job."""
        return self.group.Translate_ranks(None, MPI.COMM_WORLD.group)

    @functools.cached_property
    def _whom(self):
        return recorder.whom(self.ranks)

    def waiting(self, what):
        """A context in which this rank waits for the others; inside a :meth:`Recorder.at`, say, a step."""
        return Wait(recorder, recorder.told(what), self._whom)

    def compare(self, text):
        """Raise a RankError on all ranks if they do not all come with the same text."""
        mark = zlib.crc32(text.encode())  # the largest of all, and the largest of all negated: minus the smallest
        marks = np.array([mark, -mark], np.int64)
        super().Allreduce(MPI.IN_PLACE, marks, MPI.MAX)
        if marks[0] != -marks[1]:
            self.tell_apart(text)

    def tell_apart(self, text):
        """Raise the RankError that says which ranks came with which text."""
        mine = np.zeros(256, np.uint8)
        encoded = text.encode()[:256]
        mine[:len(encoded)] = np.frombuffer(encoded, np.uint8)
        everyones = np.empty((self.size, 256), np.uint8)
        super().Allgather(mine, everyones)
        text, odd = apart({rank: line.tobytes().rstrip(b"\0").decode(errors="replace")
                           for rank, line in zip(self.ranks, everyones, strict=True)})
        raise RankError(f"the ranks are no longer in step: {text}", odd)


def _checked(name, form=None):
    """The collective of this name, with a comparison; ``form`` is the argument whose size and dtype all ranks share."""
    collective = getattr(MPI.Intracomm, name)

    def checked(self, *args):
        if self.size == 1:
            return collective(self, *args)
        text = name
        if form is not None and isinstance(args[form], np.ndarray):
            text = f"{name} of {args[form].size} {args[form].dtype}"
        try:
            with self.waiting(text) as wait:
                self.compare(wait.what)
                return collective(self, *args)
        except MPI.Exception as error:
            # Some of Open MPI's collectives say MPI_ERR_OTHER; whether somebody died is seen when those left meet.
            if error.Get_error_class() in _LOST or ELASTIC:
                raise RanksLost(f"{error} in {recorder.told(text)}") from error
            raise

    checked.__doc__ = collective.__doc__
    return checked


for _name, _form in {"Allgather": 0, "Allgatherv": None, "Allreduce": 1, "Alltoallv": None, "Barrier": None, "Bcast": 0,
                     "Gatherv": None}.items():
    setattr(Group, _name, _checked(_name, _form))

