"""Starting a job again until it has come to its end: ``python -m mpiml run``.

A launcher's exit status alone cannot be trusted: MPICH reports success when a rank's C library calls ``exit(0)`` in the
middle of a training. So rank 0 leaves a mark when it starts MPI, and another when it has come to the end of its program.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time

STOPPED = 75  # EX_TEMPFAIL of <sysexits.h>: a job that was told to stop has saved its state, and is to be started again later
_USAGE = 2  # of a program that was given wrong options
MARK = "MPIML_MARK"  # names the folder for the marks
_PAUSE = 1.0  # seconds before a restart


def run(command, restarts, fewer=0):
    """Run a command, and again if it fails; what it prints goes where this process prints.

    Parameters
    ----------
    command : list of str
        Such as ``mpirun -n 8 python train.py --run FOLDER --resume``.
    restarts : int
        How often it is started again.
    fewer : int
        So many ranks less at each restart: the number behind ``-n`` or ``-np``, but one at least.

    Returns
    -------
    int
        Its exit status in the end: 0 if it has come to its end, 75 if it was told to stop (which is not a failure).

    Raises
    ------
    FileNotFoundError
        There is no such command.
    ValueError
        Fewer ranks are asked for, but the command does not say how many there are.
    """
    if shutil.which(command[0]) is None:
        raise FileNotFoundError(f"there is no command {command[0]!r}")
    if fewer:
        _with_fewer(command, fewer)
    for left in range(restarts, -1, -1):
        code, finished = _once(command)
        if finished or code in (STOPPED, _USAGE):
            return code
        how = f"ended with status {code}" if code else "ended before rank 0 came to the end of its program"
        if left:
            command = _with_fewer(command, fewer) if fewer else command
            how += f"; starting it again ({left} restart{'s' * (left > 1)} left)"
        print(f"mpiml: the job {how}", file=sys.stderr, flush=True)
        if left:
            time.sleep(_PAUSE)
    return code or 1


def _once(command):
    """The exit status of a command, and whether it came to its end."""
    # In the current folder, which is one that all nodes share, if any is.
    where = os.getcwd() if os.access(os.getcwd(), os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix=".mpiml-run-", dir=where) as folder:
        job = subprocess.Popen(command, env=os.environ | {MARK: folder})  # noqa: S603
        old = {number: signal.signal(number, lambda number, _: job.send_signal(number))
               for number in (signal.SIGTERM, signal.SIGUSR1)}
        try:
            code = job.wait()
        except KeyboardInterrupt:
            code = job.wait()  # the job has got it too
            raise
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
        marks = os.listdir(folder)
    code = 128 - code if code < 0 else code  # as a shell counts signals
    return code, code == 0 and ("finished" in marks or "started" not in marks)  # a program without MPI leaves none


def mark(text):
    """Leave a mark for :func:`run`, if this process runs under it."""
    folder = os.environ.get(MARK)
    if folder and os.path.isdir(folder):
        with open(os.path.join(folder, text), "w"):
            pass


def _with_fewer(command, fewer):
    for i, word in enumerate(command[:-1]):
        if word in ("-n", "-np", "--ntasks") and command[i + 1].isdigit():
            return [*command[:i + 1], str(max(1, int(command[i + 1]) - fewer)), *command[i + 2:]]
    raise ValueError(f"--fewer takes ranks off the number behind -n, which {' '.join(command)} does not have")
