"""``@kernel``: how this package compiles a function, once per node, for everybody on it.

Numba compiles a kernel when it is first called with new dtypes, and keeps the machine code in a cache on disk: in
``NUMBA_CACHE_DIR`` if that is set, else beside the source, else in the user's cache folder; without any place to
write, every process compiles for itself. What this file adds:

- *Once per node.* The cache has no lock: two processes that compile at once do the work twice. So the process that
  finds no entry takes a lock of its node, looks again, and compiles only if nobody did so meanwhile.
- *Never stale.* Numba looks at the file of a kernel alone, but functions of other files are compiled into it. Here an
  entry counts only for the same text of all the files that the kernel's file imports from its folder.
- *Never broken.* Numba numbers its files and writes the index before them: nodes of different CPUs that share a home,
  or a process killed between the two, leave an index that points at the wrong code. Here a file is written first and
  named by its contents, so that an index can point at the right file or at none. What cannot be read is compiled anew.
- *Shared.* Where the package lies in a folder that cannot be written, entries that lie there are used all the same:
  ``python -m mpiml warmup``, run by who may write there, compiles for all.

``MPIML_REQUIRE_CACHE=1`` makes it an error to compile, for checks that a start is warm.
"""

import atexit
import contextlib
import functools
import glob
import hashlib
import os
import re
import sys
import tempfile
import types
from time import perf_counter, time
from typing import NamedTuple

import numba
from numba.core import config, serialize
from numba.core.caching import FunctionCache, IndexDataCacheFile, NullCache
from numba.core.compiler_lock import global_compiler_lock
from numba.core.runtime import rtsys
from numba.extending import register_jitable

from mpiml import cores

try:
    import fcntl
except ImportError:  # Windows: processes compile side by side, as numba does by itself
    fcntl = None

# Multiplications may be fused with additions ("contract"), sums be reordered ("reassoc"), the sign of zero be lost ("nsz"),
# and a division become a product ("arcp"), which is what makes loops vectorise; NaN and infinity keep their meaning, since
# a diverging run must show as one.
FASTMATH = {"contract", "reassoc", "nsz", "arcp"}
_DAY = 24 * 3600


class _NodeLock:
    """A lock for each kernel's index among all processes of this user on this node; its holder may take it again.

    They are bytes of one file: the system frees them whatever happens to the process, and sees who waits in a circle.
    """

    def __init__(self):
        self._held, self._file = [], None

    @property
    def depth(self):
        return len(self._held)

    def acquire(self, path):
        # 7 bytes, since a position in a file is a signed number of 8.
        byte = int.from_bytes(hashlib.blake2b(path.encode(), digest_size=7).digest(), "big")
        self._held.append(byte)
        if fcntl is not None:
            with contextlib.suppress(OSError):  # no place for a lock, or a circle: compile all the same
                if self._file is None:
                    name = os.path.join(tempfile.gettempdir(), f"mpiml-{os.getuid()}.lock")
                    self._file = os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
                fcntl.lockf(self._file, fcntl.LOCK_EX, 1, byte)

    def release_to(self, depth):
        while self.depth > depth:
            byte = self._held.pop()
            if self._file is not None and byte not in self._held:
                with contextlib.suppress(OSError):
                    fcntl.lockf(self._file, fcntl.LOCK_UN, 1, byte)
        if depth == 0 and self._file is not None:
            os.close(self._file)
            self._file = None


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


_lock, _report = _NodeLock(), _Report()
_made = []  # (function, digest) of each kernel


@contextlib.contextmanager
def silent():
    """Say nothing on compiling meanwhile."""
    _report.quiet = True
    try:
        yield
    finally:
        _report.quiet = False


@functools.cache
def _read(path):
    """The text of a source file, and the files of its folder that it imports."""
    text = b""
    with contextlib.suppress(OSError):  # no such file: a notebook, a package without sources
        with open(path, "rb") as file:
            text = file.read()
    names = []
    for module, members in re.findall(rb"^\s*from \.(\w*) import ([\w, ]*)", text, re.MULTILINE):
        names += [module] if module else re.findall(rb"\w+", members)  # "from . import aligned" imports a file, too
    return text, [os.path.join(os.path.dirname(path), name.decode() + ".py") for name in names]


@functools.cache
def _digest(path):
    """Of a source file and all the files it imports, directly or not, from its folder; elsewhere also of this package."""
    here, path = os.path.dirname(os.path.abspath(__file__)), os.path.abspath(path)
    paths = [path] if os.path.dirname(path) == here else [path, os.path.join(here, "__init__.py")]
    texts = {}
    while paths:
        path = paths.pop()
        if path not in texts:
            texts[path], imported = _read(path)
            paths += imported
    return hashlib.blake2b(b"\0".join(texts[path] for path in sorted(texts)), digest_size=16).hexdigest()


class _Files(IndexDataCacheFile):
    """The entries of one kernel in one folder: an index and a file for each, named by its contents."""

    def load(self, key):
        try:
            name = self._load_index().get(key)
            if name is None:
                return None
            with open(self._data_path(name), "rb") as file:
                if self._name_of(file.read()) == name:
                    return self._load_data(name)
        except Exception:  # noqa: S110  whatever is wrong with a file, compiling helps
            pass
        return None

    def keys(self):
        try:
            return list(self._load_index())
        except Exception:  # as above
            return []

    def save(self, key, data):
        try:
            entries = self._load_index()
        except Exception:  # as above
            entries = {}
        data = self._dump(data)
        name = self._name_of(data)
        self._save_data(name, data)
        entries[key] = name
        self._save_index(entries)
        for path in glob.glob(os.path.join(glob.escape(self._cache_path), self._data_name_pattern.replace("{number:d}", "*"))):
            with contextlib.suppress(OSError):  # older texts of the kernel; another node may be about to list a new file
                if os.path.basename(path) not in entries.values() and os.stat(path).st_mtime < time() - _DAY:
                    os.unlink(path)

    def _dump(self, data):
        # save() needs the bytes for their name, and hands them to numba's _save_data, which would dump them once more.
        return data if isinstance(data, bytes) else super()._dump(data)

    def _name_of(self, data):
        return self._data_name(int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little"))


def _miss(name, signature, place):
    """What must happen before the compiler is called."""
    if os.environ.get("MPIML_REQUIRE_CACHE", "0") not in ("", "0"):
        raise RuntimeError(f"MPIML_REQUIRE_CACHE is set, but {place} does not have the kernel {name} for {signature} "
                           f"on this CPU: run python -m mpiml warmup")
    _report.start(name)


class _NoCache(NullCache):
    """Where no folder can be written."""

    def __init__(self, function):
        self._name = function.__name__

    def load_overload(self, sig, target_context):
        _miss(self._name, sig, "a machine without a folder for the cache")


class _NodeCache(FunctionCache):
    """Numba's cache of one kernel, with the files above; compiling goes through the lock of the node."""

    def __init__(self, function, digest):
        super().__init__(function)
        base = f"{self._impl.filename_base}.numba{numba.__version__}"
        stamp = digest, self._impl.locator.get_source_stamp()
        self._cache_file = _Files(self._cache_path, base, stamp)
        # Perhaps filled by who may write there:
        common = os.path.join(os.path.dirname(function.__code__.co_filename), "__pycache__")
        self._common = None if common == self._cache_path or config.CACHE_DIR else _Files(common, base, stamp)

    def load_overload(self, sig, target_context):
        code = self._load(sig, target_context)
        if code is None:
            _miss(self._py_func.__name__, sig, f"the cache in {self._cache_path}")
            _lock.acquire(self._cache_file._index_path)
            code = self._load(sig, target_context)
        return code

    def _load(self, sig, target_context):
        # Not numba's load_overload: it first imports all that compiling may need, SciPy included.
        rtsys.initialize(target_context)
        key = self._index_key(sig, target_context.codegen())
        data = self._cache_file.load(key)
        if data is None and self._common:
            data = self._common.load(key)
        return None if data is None else self._impl.rebuild(target_context, data)

    def save_overload(self, sig, data):
        with contextlib.suppress(OSError):  # a full disk: this process goes on with what it has compiled
            super().save_overload(sig, data)

    @property
    def folder(self):
        return self._cache_path

    def is_ready(self):
        """Whether there is machine code for this CPU, of any signature."""
        from numba.core.registry import cpu_target
        cpu = cpu_target.target_context.codegen().magic_tuple()
        return any(key[1] == cpu for files in (self._cache_file, self._common) if files for key in files.keys())

    def _index_key(self, sig, codegen):
        # Numba pickles what a kernel closes over, and another kernel in there differs in every process.
        return sig, codegen.magic_tuple(), _describe(self._py_func)


def _describe(value):
    """A text for what a kernel closes over, the same in every process."""
    value = getattr(value, "py_func", getattr(value, "_defn", value))  # of a kernel; of an intrinsic
    if isinstance(value, types.FunctionType):
        code = hashlib.blake2b(value.__code__.co_code, digest_size=8).hexdigest()
        cells = ", ".join(_describe(cell.cell_contents) for cell in value.__closure__ or ())
        return f"{value.__module__}.{value.__qualname__} {code} ({cells})"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_describe, value))})"
    if value is None or isinstance(value, (int, float, str, type, numba.types.Type)):
        return repr(value)
    return hashlib.blake2b(serialize.dumps(value), digest_size=8).hexdigest()


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
            cache = _NodeCache(function, digest)
            folder = folder or cache.folder
            ready += cache.is_ready()
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


# Two decorators for functions that become a part of the kernel that calls them, and are not compiled by themselves.
# ``inlined``, for short functions of arrays: numba puts their text there. A call that hands over arrays, even one that LLVM
# inlines, counts references to them, which is too much for a short run. As it stands that is true of gemm.column_of_tiles
# alone: numba 0.68 takes ``inline`` out of the options when this is first used as a decorator, and the functions that come
# later are called, or inlined by LLVM. All times were measured so.
inlined = register_jitable(inline="always")
# ``vector_function``, for functions of vectors and loops over them: LLVM puts their code there, and vectors stay in
# registers. (The opposite, a kernel that is compiled once and called, begins with simd.out_of_line.)
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
    digest = _digest(function.__code__.co_filename)  # of the text as it is imported, which may change before the first call
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
                    caches.append(_NodeCache(function, digest))
                except RuntimeError:
                    caches.append(_NoCache(function))
                dispatcher._cache = caches[0]
            depth, outermost = _lock.depth, _report.idle
            try:
                entry = compile_(wanted if result is None else result(*wanted))
            finally:
                _lock.release_to(depth)
                if outermost:
                    _report.stop()
        if wanted != given and given not in known:
            known.add(given)
            dispatcher._insert([a._code for a in given], entry)  # the next such call finds it at once
        return entry

    dispatcher.compile = compile_once
    return dispatcher
