"""One failing rank ends the whole job.

MPI alone would leave the others waiting for ever for a rank that is gone. Here an exception that nobody
caught prints its traceback under its rank, in one piece, and aborts the job; so does ``sys.exit`` with a status
other than 0.
"""

import atexit
import fcntl
import os
import sys
import termios
import threading
import time
import traceback

from mpi4py import MPI

# Of several ranks with an error only the first needs to speak: it ends the job before the others' turn. Those who
# did not cause an error that all found together wait longer.
_TURN, _COURTESY = 0.5, 2.0  # seconds


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
    status = []

    def report(kind, error, trace):
        ranks = getattr(error, "ranks", range(comm.size))
        if comm.rank != min(ranks):
            time.sleep(_TURN if comm.rank in ranks else _COURTESY)
        end("".join(traceback.format_exception(kind, error, trace)), 130 if issubclass(kind, KeyboardInterrupt) else 1)

    def report_thread(args):
        if args.exc_type is not SystemExit:  # ends its thread alone
            report(args.exc_type, args.exc_value, args.exc_traceback)

    def end(text, code):
        where = f"rank {comm.rank} of {comm.size} on {MPI.Get_processor_name()}"
        sys.stdout.flush()
        sys.stderr.write(f"\nmpiml: {where} failed and ends the job\n{text}")
        _drain(sys.stderr)
        _forget_segments()
        comm.Abort(code)

    def leave(code=None):
        if code not in (None, 0) and threading.current_thread() is threading.main_thread():
            status[:] = [code]
        raise SystemExit(code)

    def goodbye():
        if status:
            code = status[0] if isinstance(status[0], int) else 1
            end(f"sys.exit({status[0]!r})\n", code)

    sys.excepthook = report
    threading.excepthook = report_thread
    sys.exit = leave
    atexit.register(goodbye)
