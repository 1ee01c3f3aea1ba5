"""Ranks as threads of one process, with what data asks of a Grid: to see in milliseconds what many ranks make of a file."""

import threading

import numpy as np

from mpiml.alone import Alone


class Rank(Alone):
    """One of several ranks, each a thread."""

    def __init__(self, rank, size, barrier, slots):
        self.rank, self.size, self._barrier, self._slots = rank, size, barrier, slots

    def _exchange(self, thing):
        self._slots[self.rank] = thing
        self._barrier.wait(timeout=30)
        things = list(self._slots)
        self._barrier.wait(timeout=30)
        return things

    def texts(self, text):
        assert isinstance(text, str)
        return self._exchange(text)

    def rows(self, array):
        return np.concatenate(self._exchange(array))

    def together(self, what, function, *args):
        result, failure = None, None
        try:
            result = function(*args)
        except Exception as error:
            failure = error
        failures = self._exchange(failure)
        for error in failures:
            if error is not None:
                raise error
        return result


def on_ranks(size, function):
    """[function(grid) for each of ``size`` ranks], run together; the first rank's error is raised."""
    barrier, slots = threading.Barrier(size), [None] * size
    results, errors = [None] * size, [None] * size

    def run(rank):
        try:
            results[rank] = function(Rank(rank, size, barrier, slots))
        except Exception as error:
            errors[rank] = error
            barrier.abort()  # so that nobody waits for this rank

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for error in errors:
        if error is not None and not isinstance(error, threading.BrokenBarrierError):
            raise error
    assert errors == [None] * size
    return results
