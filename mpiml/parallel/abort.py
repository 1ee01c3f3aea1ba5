"""One failing rank ends the whole job.

MPI alone would leave the others waiting for ever for a rank that is gone. Here an exception that nobody
caught prints its traceback under its rank, in one piece, and aborts the job; so does ``sys.exit`` with a status
other than 0.
"""

import atexit
import builtins
import contextlib
import faulthandler
import fcntl
import os
import sys
import termios
import threading
import time
import traceback

from mpi4py import MPI

from mpiml import restart

# Of several ranks with an error only the first needs to speak: it ends the job before the others' turn. Those who
# did not cause an error that all found together wait longer.
TURN, _COURTESY = 1.2, 2.5  # seconds
_LAST = 20  # seconds that the words at the end, and MPI, may take

farewells_of_survivors = []  # in place of partings, a barrier of the ranks that are left, if any were lost
farewells = []  # functions of a line of text, to be called before the job is ended
partings = []  # functions, to be called when this rank has come to the end of its program


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


def forget_segments():
    """Take the names off MPICH's shared memory on this node, which would stay behind however the job is ended.

    Nobody needs them any more when all ranks of the node have started MPI.
    """
    try:
        with open("/proc/self/maps") as file:
            names = {line.split()[-1] for line in file if "/dev/shm/mpich_shm_" in line}  # noqa: S108
        for name in names:
            os.unlink(name)
    except OSError:
        pass  # no /proc, or another rank was first


class _Exit(SystemExit):
    """What sys.exit raises here; it counts unless the program catches it."""

    pending = None

    def __init__(self, code):
        super().__init__(code)
        _Exit.pending = code

    def __del__(self):
        if sys._getframe().f_back is not None:  # somebody caught it and runs on; else it dies after the last frame
            _Exit.pending = None


def say(text):
    """Write to stderr, or to what the process started with if the program has closed or replaced it."""
    for stream in sys.stdout, sys.__stdout__:
        with contextlib.suppress(Exception):
            stream.flush()
    for stream in sys.stderr, sys.__stderr__:
        with contextlib.suppress(Exception):
            stream.write(text)
            _drain(stream)
            return


def end(text, code, summary=None):
    """Print what happened here, and abort the job; the summary is by default the last line."""
    comm = MPI.COMM_WORLD
    faulthandler.dump_traceback_later(_LAST, exit=True, file=2)  # whatever happens
    try:
        where = f"rank {comm.rank} of {comm.size} on {MPI.Get_processor_name()}"
        say(f"\nmpiml: {where} failed and ends the job\n{text}")
        for farewell in farewells:
            farewell(summary or text.strip().splitlines()[-1])
        forget_segments()
    finally:
        comm.Abort(code)
        time.sleep(_LAST)  # MPICH's may return before the launcher ends the job, and the program must not go on


def leave(text):
    """End the program with an error that all ranks have found, and rank 0 writes down; to be called on all of them together."""
    first = MPI.COMM_WORLD.rank == 0
    MPI.Finalize()
    sys.exit(text if first else 0)


def install(comm):
    """Abort ``comm``'s job on uncaught exceptions of this process, in any thread; nothing changes on one rank."""
    first = comm.rank == 0
    if first:
        restart.mark("started")
    if comm.size == 1:
        atexit.register(restart.mark, "finished")
        return

    def report(kind, error, trace):
        if MPI.Is_finalized():
            return sys.__excepthook__(kind, error, trace)
        ranks = getattr(error, "ranks", None)
        if not isinstance(ranks, list) or not ranks:
            ranks = range(comm.size)
        revoked = isinstance(error, MPI.Exception) and error.Get_error_class() == MPI.ERR_REVOKED  # by one who knows why
        if comm.rank != min(ranks) or revoked:
            time.sleep(TURN if comm.rank in ranks and not revoked else _COURTESY)
        end("".join(traceback.format_exception(kind, error, trace)), 130 if issubclass(kind, KeyboardInterrupt) else 1)

    def report_thread(args):
        if not issubclass(args.exc_type, SystemExit):  # ends its thread alone
            report(args.exc_type, args.exc_value, args.exc_traceback)

    def leave(code=None):
        raise (_Exit if threading.current_thread() is threading.main_thread() else SystemExit)(code)

    def goodbye():
        code = _Exit.pending
        if code not in (None, 0, restart.STOPPED) and not MPI.Is_finalized():
            end(f"sys.exit({code!r})\n", code if isinstance(code, int) else 1)
        if first or farewells_of_survivors:
            restart.mark("finished")
        for part in farewells_of_survivors or partings:
            part()
        if farewells_of_survivors:
            # Open MPI 5.0 often hangs in MPI_Finalize for ever when it has lost two ranks or more.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code or 0)

    sys.excepthook = report
    threading.excepthook = report_thread
    sys.exit = builtins.exit = builtins.quit = leave
    atexit.register(goodbye)
