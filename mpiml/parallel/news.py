"""News from one node to the others, which share no memory: what ends the job there, and questions who is late.

They are messages of MPI, sent and looked for by the watchdogs' threads while the programs compute, or wait in MPI themselves;
so they need an MPI that lets several threads in. Nothing is ever waited for.
"""

import numpy as np
from mpi4py import MPI

_LENGTH = 256  # bytes of a message


class News:
    """A channel to the ranks of other nodes.

    To be made on all ranks of the job together, and used by one thread of each at a time.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm
        Of all ranks.
    others : list of int
        The ranks of other nodes.
    """

    def __init__(self, comm, others):
        self._comm, self._others, self._sent = comm.Dup(), others, []
        self._open = MPI.Query_thread() == MPI.THREAD_MULTIPLE
        # Programs may end MPI before they end themselves: this is called first.
        MPI.COMM_SELF.Set_attr(MPI.Comm.Create_keyval(delete_fn=self.close), None)

    def close(self, *_):
        """Use MPI no more, which is about to end."""
        self._open = False

    def tell(self, text):
        """Send a text on its way to the ranks of other nodes."""
        if self._open:
            message = np.frombuffer(text.encode()[:_LENGTH].ljust(_LENGTH), np.uint8)
            self._sent += [(self._comm.Isend(message, rank), message) for rank in self._others]

    def heard(self):
        """Yield (rank, text) for the messages that have arrived."""
        status = MPI.Status()
        if self._open:
            self._sent = [sent for sent in self._sent if not sent[0].Test()]
        while self._open and self._comm.Iprobe(MPI.ANY_SOURCE, 0, status):
            message = np.empty(_LENGTH, np.uint8)
            self._comm.Recv(message, status.Get_source(), 0)
            yield status.Get_source(), message.tobytes().decode(errors="replace").rstrip()
