"""``@kernel``: how this package compiles a function.

Numba compiles a kernel when it is first called with new dtypes. What this file adds: the machine code is kept on disk, once
per node (:mod:`mpiml.kernels.cache`); arrays of any strides share one compilation where a kernel says so; dtypes are looked
at when types are new, which costs later calls nothing; and somebody tells the user what takes so long.

``MPIML_REQUIRE_CACHE=1`` makes it an error to compile, for checks that a start is warm.
"""

import atexit
import contextlib
import functools
import os
import sys
from time import perf_counter
from typing import NamedTuple

import numba
from numba.core.compiler_lock import global_compiler_lock
from numba.extending import register_jitable

from mpiml import cores

from . import cache

# Multiplications may be fused with additions ("contract"), sums be reordered ("reassoc"), the sign of zero be lost ("nsz"),
# and a division become a product ("arcp"), which is what makes loops vectorise; NaN and infinity keep their meaning, since
# a diverging run must show as one.
FASTMATH = {"contract", "reassoc", "nsz", "arcp"}


class _Report:
    """Tells on stderr, once per node, that kernels are compiled, which, and for how long.

    On a terminal a line shows the kernel at work and goes when it is done; elsewhere one line stands at the start.
    """

    def __init__(self):
        self.count, self.seconds, self._started = 0, 0.0, None
        self.quiet = False

    @property
    def idle(self):
        return self._started is None

    def start(self, name):
        if self.quiet or self._started is not None or cores.rank_on_node():
            return
        self._started = perf_counter()
        text = "mpiml: compiling kernels for this CPU (first use only)"
        if sys.stderr.isatty():
            print(f"\r{text}: {name.strip('_')}\033[K", end="", file=sys.stderr, flush=True)
        elif not self.count:
            print(text, file=sys.stderr, flush=True)
        if not self.count:
            atexit.register(self._end)
        self.count += 1

    def stop(self):
        if self._started is not None:
            self.seconds += perf_counter() - self._started
            self._started = None
            if sys.stderr.isatty():
                print("\r\033[K", end="", file=sys.stderr, flush=True)

    def _end(self):
        with contextlib.suppress(OSError, ValueError):  # stderr may be closed by now
            print(f"mpiml: compiled {self.count} kernel{'s' * (self.count > 1)} in {self.seconds:.1f} s; from now on they "
                  f"are loaded", file=sys.stderr, flush=True)


_report = _Report()
_made = []  # (function, digest) of each kernel


@contextlib.contextmanager
def silent():
    """Say nothing on compiling meanwhile."""
    _report.quiet = True
    try:
        yield
    finally:
        _report.quiet = False


def _miss(name, signature, place):
    """What must happen before the compiler is called, for code that is in no ``place``."""
    if os.environ.get("MPIML_REQUIRE_CACHE", "0") not in ("", "0"):
        raise RuntimeError(f"MPIML_REQUIRE_CACHE is set, but {place} does not have the kernel {name} for {signature} "
                           f"on this CPU: run python -m mpiml warmup")
    _report.start(name)


class CacheState(NamedTuple):
    """What :func:`cache_state` found."""

    folder: str | None  #: where kernels are written to; None: nowhere
    ready: int  #: kernels with machine code for this CPU
    kernels: int  #: kernels there are


def cache_state():
    """Where the kernels that were imported so far are kept, and how many of them are there, ready for this CPU.

    Nothing is compiled. Not every kernel is needed by every program, and a kernel counts from its first dtype on.
    """
    folder, ready = None, 0
    for function, digest in _made:
        with contextlib.suppress(RuntimeError):  # as in kernel: no folder
            code = cache.NodeCache(function, digest, _miss)
            folder = folder or code.folder
            ready += code.is_ready()
    return CacheState(folder, ready, len(_made))


def one_dtype(name, arrays):
    """Refuse arrays (or their types) that are not of one dtype, float32 or float64."""
    dtypes = [str(getattr(a, "dtype", a)) for a in arrays]  # numba takes an array of foreign byte order for some object
    for dtype in dtypes:
        if dtype not in ("float32", "float64"):
            raise TypeError(f"{name} takes float32 or float64, not {dtype}: convert it with .astype(np.float32)")
        if dtype != dtypes[0]:
            raise TypeError(f"{name} got arrays of {dtypes[0]} and {dtype}: convert the first with .astype(np.{dtype}), or the "
                            f"other")


# For functions of vectors, and loops over them: LLVM puts their code into the kernel that calls them, so that vectors stay in
# registers. (The opposite, a kernel that is compiled once and called, begins with simd.out_of_line.) Short functions of
# arrays are numba's ``register_jitable``: compiled along, and called, or inlined where LLVM thinks so.
vector_function = register_jitable(error_model="numpy", forceinline=True)


def kernel(function=None, *, exact=False, reads="", writes="", floats="", name=""):
    """Compile ``function`` with numba at its first call: no Python objects, no GIL, cached on disk.

    Parameters
    ----------
    exact : bool
        Keep every operation as written: for kernels that say themselves what is fused and in which order sums
        are taken. Otherwise sums may be reordered, so that plain loops become vector instructions.
    reads, writes : str
        Names of array parameters that may have any strides, and that this kernel reads or writes. Numba would
        compile anew for each combination of memory layouts and of read-only arrays; for these it compiles once.
    floats : str
        Names of array parameters that must be float32 or float64, and all the same. This is looked at when arrays of new
        types come, and costs the calls nothing.
    name : str
        What errors call the kernel: the public function it serves. By default its own name.

    Raises
    ------
    TypeError, ValueError
        From the kernel: arrays in ``floats`` are of other dtypes; one in ``writes`` is read-only.
    """
    if function is None:
        return functools.partial(kernel, exact=exact, reads=reads, writes=writes, floats=floats, name=name)
    function.__name__ = name or function.__name__
    dispatcher = numba.njit(nogil=True, error_model="numpy", no_cfunc_wrapper=True,
                            fastmath=False if exact else FASTMATH)(function)
    names = function.__code__.co_varnames[:function.__code__.co_argcount]
    any_strides = {names.index(name): name in reads.split() for name in (reads + " " + writes).split()}
    digest = cache.digest(function.__code__.co_filename)  # of the text as imported: it may change before the first call
    _made.append((function, digest))
    compile_ = dispatcher.compile
    known, caches = set(), []  # looking for a folder takes time, so it waits for the first call

    def general(i, kind):
        """The type that the kernel is compiled for where its argument ``i`` is of this kind."""
        if i in any_strides and isinstance(kind, numba.types.Array) and (any_strides[i] or kind.mutable):
            return numba.types.Array(kind.dtype, kind.ndim, "A", readonly=any_strides[i])
        return numba.types.unliteral(kind)  # a number written in a call is no reason to compile for it alone

    def compile_once(signature):
        given, result = numba.core.sigutils.normalize_signature(signature)
        kinds = dict(zip(names, given, strict=True))
        halves = [kind for kind in given if getattr(kind, "dtype", None) == numba.types.float16]  # numba has no code for them
        one_dtype(function.__name__.strip("_"), [kinds[name] for name in floats.split()] + halves)
        for name in writes.split():
            if not kinds[name].mutable:
                raise ValueError(f"{name} is to be written to and is read-only: pass a copy")
        wanted = tuple(general(i, kind) for i, kind in enumerate(given))
        with global_compiler_lock:  # the lock counts for this process: one thread at a time
            if not caches:
                try:
                    caches.append(cache.NodeCache(function, digest, _miss))
                except RuntimeError:
                    caches.append(cache.NoCache(function, _miss))
                dispatcher._cache = caches[0]
            depth, outermost = cache.lock.depth, _report.idle
            try:
                entry = compile_(wanted if result is None else result(*wanted))
            finally:
                cache.lock.release_to(depth)
                if outermost:
                    _report.stop()
        if wanted != given and given not in known:
            known.add(given)
            dispatcher._insert([a._code for a in given], entry)  # the next such call finds it at once
        return entry

    dispatcher.compile = compile_once
    return dispatcher
