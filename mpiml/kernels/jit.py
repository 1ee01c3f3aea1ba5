"""``@kernel``: how this package compiles a function, once per node, for everybody on it.

Numba compiles a kernel when it is first called with new dtypes, and keeps the machine code in a cache on
disk. That cache has no lock: two processes that compile at once do the work twice. So the process that finds
the cache without an entry takes a lock of its node (a file lock, freed by the system whatever happens to the
process), looks again, and compiles only if nobody did so meanwhile.

The files of that cache are numbered, and its index is written before them: nodes of different CPUs that share
a home, or a process killed between the two after an update of this package, leave an index that points at the
wrong code. So here a file is written first, under a name that belongs to its contents alone.
"""

import contextlib
import functools
import hashlib
import os
import sys
import tempfile

import numba
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.compiler_lock import global_compiler_lock

from mpiml import cores

try:
    import fcntl
except ImportError:  # Windows: processes compile side by side, as numba does by itself
    fcntl = None

# Sums may be reordered and multiplications fused, which is what makes loops vectorise; NaN and infinity keep
# their meaning, since a diverging run must show as one.
FASTMATH = {"contract", "reassoc", "nsz", "arcp"}


class _NodeLock:
    """One lock for all processes of this user on this node; may be taken again by its holder."""

    def __init__(self):
        self.depth = 0
        self._file = None
        self._said = False

    def acquire(self):
        if self.depth == 0 and fcntl is not None:
            self._say()
            user = os.getuid()
            path = os.path.join(tempfile.gettempdir(), f"mpiml-{user}.lock")
            try:
                self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
                fcntl.flock(self._file, fcntl.LOCK_EX)
            except OSError:
                pass  # no place for a lock: compile all the same
        self.depth += 1

    def release_to(self, depth):
        if self.depth > depth == 0 and self._file is not None:
            os.close(self._file)
            self._file = None
        self.depth = depth

    def _say(self):
        if not self._said and cores.rank_on_node() == 0:
            print("mpiml: compiling kernels for this CPU (first use only)", file=sys.stderr, flush=True)
        self._said = True


_lock = _NodeLock()


class _CacheFiles(IndexDataCacheFile):
    def save(self, key, data):
        digest = hashlib.blake2b(repr((self._source_stamp, key)).encode(), digest_size=8).digest()
        name = self._data_name(int.from_bytes(digest, "little"))
        self._save_data(name, data)
        self._save_index({**self._load_index(), key: name})


class _NodeCache(FunctionCache):
    def __init__(self, function):
        super().__init__(function)
        old = self._cache_file
        self._cache_file = _CacheFiles(old._cache_path, self._impl.filename_base, old._source_stamp)

    def load_overload(self, sig, target_context):
        code = super().load_overload(sig, target_context)
        if code is None:
            _lock.acquire()
            code = super().load_overload(sig, target_context)
        return code


def kernel(function=None, *, exact=False, reads="", writes=""):
    """Compile ``function`` with numba at its first call: no Python objects, no GIL, cached on disk.

    Parameters
    ----------
    exact : bool
        Keep every operation as written: for kernels that say themselves what is fused and in which order sums
        are taken. Otherwise sums may be reordered, so that plain loops become vector instructions.
    reads, writes : str
        Names of array parameters that may have any strides, and that this kernel reads or writes. Numba would
        compile anew for each combination of memory layouts and of read-only arrays; for these it compiles once.
    """
    if function is None:
        return functools.partial(kernel, exact=exact, reads=reads, writes=writes)
    dispatcher = numba.njit(nogil=True, error_model="numpy", fastmath=False if exact else FASTMATH)(function)
    names = function.__code__.co_varnames[:function.__code__.co_argcount]
    any_strides = {names.index(name): name in reads.split() for name in (reads + " " + writes).split()}
    with contextlib.suppress(RuntimeError):  # no writable place for a cache: compile in every process
        dispatcher._cache = _NodeCache(function)
    compile_ = dispatcher.compile
    known = set()

    def compile_once(signature):
        given, result = numba.core.sigutils.normalize_signature(signature)
        wanted = tuple(
            numba.types.Array(a.dtype, a.ndim, "A", readonly=any_strides[i]) if isinstance(a, numba.types.Array)
            and i in any_strides and (any_strides[i] or a.mutable) else a for i, a in enumerate(given))
        with global_compiler_lock:  # the lock counts for this process: one thread at a time
            depth = _lock.depth
            try:
                entry = compile_(wanted if result is None else result(*wanted))
            finally:
                _lock.release_to(depth)
        if wanted != given and given not in known:
            known.add(given)
            dispatcher._insert([a._code for a in given], entry)  # the next such call finds it at once
        return entry

    dispatcher.compile = compile_once
    return dispatcher
