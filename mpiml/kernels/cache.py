"""Machine code on disk: compiled once per node, for everybody on it.

Numba keeps what it compiles in ``NUMBA_CACHE_DIR`` if that is set, else beside the source, else in the user's cache folder.
What this file adds:

- *Once per node.* Numba's cache has no lock: two processes that compile at once do the work twice. So the process that
  finds no entry takes a lock of its node, looks again, and compiles only if nobody did so meanwhile.
- *Never stale.* Numba looks at the file of a kernel alone, but functions of other files are compiled into it. Here an
  entry counts only for the same text of all the files that the kernel's file imports from its folder.
- *Never broken.* Numba numbers its files and writes the index before them: nodes of different CPUs that share a home,
  or a process killed between the two, leave an index that points at the wrong code. Here a file is written first and
  named by its contents, so that an index can point at the right file or at none. What cannot be read is compiled anew.
- *Shared.* Where the package lies in a folder that cannot be written, entries that lie there are used all the same:
  ``python -m mpiml warmup``, run by who may write there, compiles for all.
"""

import contextlib
import functools
import glob
import hashlib
import os
import re
import tempfile
import types
from time import time

import numba
from numba.core import config, serialize
from numba.core.caching import FunctionCache, IndexDataCacheFile, NullCache
from numba.core.runtime import rtsys

try:
    import fcntl
except ImportError:  # Windows: processes compile side by side, as numba does by itself
    fcntl = None

_DAY = 24 * 3600


class NodeLock:
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


lock = NodeLock()


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
def digest(path):
    """A hash of the text of a source file and of all that it imports from its folder; elsewhere also of this package."""
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


class NoCache(NullCache):
    """Where no folder can be written: every process compiles for itself."""

    def __init__(self, function, miss):
        self._name, self._miss = function.__name__, miss

    def load_overload(self, sig, target_context):
        self._miss(self._name, sig, "a machine without a folder for the cache")


class NodeCache(FunctionCache):
    """Numba's cache of one kernel, with the files above; compiling goes through the lock of the node.

    ``digest`` is that of the texts compiled in (:func:`digest`); ``miss(name, signature, place)`` is called before the
    compiler is.
    """

    def __init__(self, function, digest, miss):
        super().__init__(function)
        self._miss = miss
        base = f"{self._impl.filename_base}.numba{numba.__version__}"
        stamp = digest, self._impl.locator.get_source_stamp()
        self._cache_file = _Files(self._cache_path, base, stamp)
        # Perhaps filled by who may write there:
        common = os.path.join(os.path.dirname(function.__code__.co_filename), "__pycache__")
        self._common = None if common == self._cache_path or config.CACHE_DIR else _Files(common, base, stamp)

    def load_overload(self, sig, target_context):
        code = self._load(sig, target_context)
        if code is None:
            self._miss(self._py_func.__name__, sig, f"the cache in {self._cache_path}")
            lock.acquire(self._cache_file._index_path)
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
