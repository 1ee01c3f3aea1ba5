"""Messages between the chunks of one pipeline.

A chunk sends its output on to the next chunk, and the gradient for its input back to the one before. Sends and
receives are non-blocking, so no order of them can deadlock. Nobody declares shapes: a receive is posted for the
shape and dtype that the same message had the last time; if that has changed, a header comes in its place, which
is told by its length, and the array after it. An array arrives as it lay in memory (images: batch innermost), so that the
next stage computes with it what one rank would have.
"""

import math
import os
from collections import defaultdict, deque

import numpy as np
from mpi4py import MPI

_SIZES = 16  # kept in memory; more are those of batches gone by
_HEADER = 101  # bytes: an odd number, so no array of floats has this length


class Link:
    """The messages of one rank to and from the other stages of its replica.

    Parameters
    ----------
    grid : mpiml.parallel.Grid
    owner : list of int
        For every chunk of the model the stage that holds it.
    """

    def __init__(self, grid, owner):
        self._comm, self._stage, self._owner = grid.stages, grid.stage, owner
        self._slots = (self._comm.Get_attr(MPI.TAG_UB) or 32767) // (2 * len(owner))
        self._told, self._heard = {}, {}  # message: the dtype, shape and order of axes it had last
        self._here = defaultdict(deque)  # what one chunk of this rank handed to another
        self._sent = []  # (request, array) of sends that may not be through
        self._posted = {}  # message: (request, buffer)
        self._free = defaultdict(list)  # size: buffers
        self._status = MPI.Status()

    def source(self, message):
        """The stage that a message comes from."""
        kind, _, chunk = message
        return self._owner[chunk - 1 if kind == "F" else chunk + 1]

    def remote(self, message):
        """Whether a message comes from another rank."""
        return self.source(message) != self._stage

    def _tag(self, message):
        kind, microbatch, chunk = message
        return (microbatch % self._slots * len(self._owner) + chunk) * 2 + (kind == "B")

    def deliver(self, message, array, matched=False):
        """Send an array on its way; it must not change any more.

        Parameters
        ----------
        message : (kind, microbatch, chunk)
            The computation that waits for it, such as ("F", 3, 1).
        array : array
        matched : bool
            Count as through only when the other stage has it, not when it is on its way.
        """
        to = self._owner[message[2]]
        if to == self._stage:
            self._here[message].append(array)
            return
        axes = tuple(sorted(range(array.ndim), key=lambda axis: -abs(array.strides[axis])))
        form, array = (array.dtype, array.shape, axes), np.ascontiguousarray(array.transpose(axes))
        if self._sent:
            self._sent = [sent for sent in self._sent if not sent[0].Test()]
        tag = self._tag(message)
        if self._told.get(message) != form or array.nbytes == _HEADER:
            self._told[message] = form
            header = _pack(*form)
            self._sent.append((self._comm.Isend([header, MPI.BYTE], to, tag), header))
        start = self._comm.Issend if matched else self._comm.Isend
        self._sent.append((start([array, MPI.BYTE], to, tag), array))

    def post(self, message):
        """Start to receive what will come, so that it can arrive while this rank computes."""
        form = self._heard.get(message)
        buffer = self._take(_bytes(form) if form else _HEADER)
        self._posted[message] = self._comm.Irecv([buffer, MPI.BYTE], self.source(message), self._tag(message)), buffer

    def receive(self, message):
        """Wait for an array.

        Returns
        -------
        array, buffer
            The buffer is the array's memory: give it back by :meth:`release` when nobody needs the array any more.
        """
        if not self.remote(message):
            return self._here[message].popleft(), None
        if message not in self._posted:
            self.post(message)
        request, buffer = self._posted.pop(message)
        status, form = self._status, self._heard.get(message)
        wait(request, status)
        length = status.Get_count(MPI.BYTE)
        if length == _HEADER:
            form = self._heard[message] = _unpack(buffer)
            self.release(buffer)
            buffer = self._take(_bytes(form))
            self._comm.Recv([buffer, MPI.BYTE], self.source(message), self._tag(message), status)
            length = status.Get_count(MPI.BYTE)
        if length != _bytes(form):
            raise RuntimeError(f"stage {self._stage} expected {_bytes(form)} bytes for {message} but got {length}: the stages "
                               f"are no longer in step")
        dtype, shape, axes = form
        return np.ndarray([shape[axis] for axis in axes], dtype, buffer).transpose(np.argsort(axes)), buffer

    def release(self, buffer):
        """Take back a buffer for other messages."""
        if buffer is not None:
            self._free[len(buffer)].append(buffer)

    def _take(self, size):
        size = max(size, _HEADER)
        if self._free[size]:
            return self._free[size].pop()
        if len(self._free) > _SIZES:
            self._free.clear()
        return np.empty(size, np.uint8)

    def finish(self, keep=0):
        """Wait until all sends but the last ``keep`` are through."""
        while len(self._sent) > keep:
            wait(self._sent.pop(0)[0])


def wait(request, status=None):
    """Wait for a request, and let other ranks have the core meanwhile.

    MPI would either spin or, told that ranks share cores, sleep for 100 microseconds and more.
    """
    while not request.Test(status):
        os.sched_yield()


def _bytes(form):
    dtype, shape, _ = form
    return math.prod(shape) * dtype.itemsize


def _pack(dtype, shape, axes):
    code = dtype.str.encode()
    count = len(shape)
    if count > 10 or len(code) > 8 or dtype.hasobject:
        raise ValueError(f"a chunk's output of shape {shape} and dtype {dtype} cannot be sent: at most 10 axes, of numbers")
    header = np.zeros(_HEADER, np.uint8)
    header[:len(code)] = np.frombuffer(code, np.uint8)
    header[8] = count
    header[9:9 + count] = axes
    header[19:19 + 8 * count] = np.array(shape, "<i8").view(np.uint8)
    return header


def _unpack(header):
    count = int(header[8])
    dtype = np.dtype(header[:8].tobytes().rstrip(b"\0").decode())
    return dtype, tuple(header[19:19 + 8 * count].copy().view("<i8").tolist()), tuple(header[9:9 + count].tolist())
