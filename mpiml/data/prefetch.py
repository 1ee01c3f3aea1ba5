"""Reading ahead: what is wanted next is made in a thread, while the model computes on what there is."""

import contextlib
from concurrent.futures import ThreadPoolExecutor


@contextlib.contextmanager
def prefetching(function):
    """A function ``get(arguments, *next)`` that returns ``function(*arguments)``, and lets a thread go on to the next.

    What was made ahead and is not asked for any more, because the next call says otherwise, is dropped. An exception in the
    thread is raised by the ``get`` whose value it was to be, with its traceback. With the block the thread ends, after what
    it is at.

    Parameters
    ----------
    function : callable
        Called in the thread, in the order of what is asked for; it must not call MPI.

    Examples
    --------
    >>> with prefetching(lambda number: number ** 2) as get:
    ...     get((3,), (4,), (5,)), get((4,), (5,))
    (9, 16)
    """
    pool, pending = ThreadPoolExecutor(1, "mpiml-prefetch"), {}

    def get(*wanted):
        for arguments in pending.keys() - set(wanted):
            pending.pop(arguments).cancel()
        for arguments in wanted:
            if arguments not in pending:
                pending[arguments] = pool.submit(function, *arguments)
        return pending.pop(wanted[0]).result()

    try:
        yield get
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # a disk that hangs must not keep an error from being told
