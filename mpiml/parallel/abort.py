"""One failing rank ends the whole job.

MPI alone would leave the others waiting for ever for a rank that is gone. Here an exception that nobody
caught prints its traceback under its rank, in one piece, and aborts the job; so does ``sys.exit`` with a status
other than 0.
"""

import fcntl
import os
import sys
import termios
import threading
import time
import traceback

from mpi4py import MPI, run

# When an error is found together, those who did not cause it let the one who did speak first.
_COURTESY = 2.0  # seconds


def _drain(stream):
    """Wait until the launcher has read what was written to ``stream``: what is in its pipe dies with the job."""
    stream.flush()
    deadline = time.monotonic() + 1
    unread = bytearray(4)
    while time.monotonic() < deadline:
        try:
            fcntl.ioctl(stream.fileno(), termios.FIONREAD, unread)
        except (OSError, ValueError, AttributeError):
            break  # no pipe, or a stream that a test has put in its place
        if not any(unread):
            break
        time.sleep(0.01)
    time.sleep(0.2)  # from the launcher's agent on this node to the user


def _forget_segments():
    """Take the names off MPICH's shared memory on this node, which would stay behind when the job is aborted."""
    try:
        with open("/proc/self/maps") as file:
            names = {line.split()[-1] for line in file if "/dev/shm/mpich_shm_" in line}  # noqa: S108
        for name in names:
            os.unlink(name)
    except OSError:
        pass  # no /proc, or another rank was first


def install(comm):
    """Abort ``comm``'s job on uncaught exceptions of this process, in any thread; nothing changes on one rank."""
    if comm.size == 1:
        return

    def report(kind, error, trace):
        if comm.rank not in getattr(error, "ranks", (comm.rank,)):
            time.sleep(_COURTESY)
        lines = "".join(traceback.format_exception(kind, error, trace))
        where = f"rank {comm.rank} of {comm.size} on {MPI.Get_processor_name()}"
        sys.stdout.flush()
        sys.stderr.write(f"\nmpiml: {where} failed and ends the job\n{lines}")
        _drain(sys.stderr)
        _forget_segments()
        comm.Abort(130 if issubclass(kind, KeyboardInterrupt) else 1)

    def leave(status=None):
        if status not in (None, 0):
            run.set_abort_status(status if isinstance(status, int) else 1)
        raise SystemExit(status)

    sys.excepthook = report
    threading.excepthook = lambda args: report(args.exc_type, args.exc_value, args.exc_traceback)
    sys.exit = leave
