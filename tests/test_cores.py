"""Sharing the cores of a node: thread caps, imports that do not start MPI, kernels that are compiled once."""

import json
import os
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest
from numba.core.errors import TypingError

from mpiml import cores
from mpiml.kernels import cache, jit

CAPS = ["OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS",
        "NUMBA_NUM_THREADS"]
YIELDS = ["MPIR_CVAR_ENABLE_HEAVY_YIELD", "OMPI_MCA_mpi_yield_when_idle"]
LAUNCHERS = ("MPI", "OMPI", "PMI", "PMIX", "PRTE", "MV2", "SLURM", "HYDRA", "MPIR")


def unlaunched():
    """The environment of a process that no launcher started, without thread caps."""
    return {name: value for name, value in os.environ.items()
            if name.split("_")[0] not in LAUNCHERS and name not in CAPS and name != "NUMBA_CACHE_DIR"}


@pytest.fixture
def env(monkeypatch):
    """os.environ, as no launcher left it, on a machine of 8 cores; ``env(NAME="value")`` adds to it."""
    clean = unlaunched()
    monkeypatch.setattr(os, "environ", clean)
    monkeypatch.setattr(cores, "cores", lambda: 8)
    monkeypatch.delitem(sys.modules, "mpi4py.MPI", raising=False)
    monkeypatch.setattr(cores, "_cap_loaded_blas", lambda count: clean.update(LOADED_BLAS=str(count)))

    def add(**variables):
        clean.update(variables)
        return clean

    return add


def start(*code, **variables):
    """A process of Python that no launcher started."""
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent("\n".join(code))], env=unlaunched() | variables,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process, code=0):
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    return out, err


# --- What the launcher says -----------------------------------------------------------------------------------

@pytest.mark.parametrize("name, value, ranks", [
    ("MPI_LOCALNRANKS", "4", 4), ("OMPI_COMM_WORLD_LOCAL_SIZE", "3", 3), ("MV2_COMM_WORLD_LOCAL_SIZE", "2", 2),
    ("SLURM_STEP_TASKS_PER_NODE", "6", 6), ("SLURM_STEP_TASKS_PER_NODE", "4(x2),3", 4),
    ("SLURM_STEP_TASKS_PER_NODE", "2,16(x12)", 16), ("MPI_LOCALNRANKS", "", 1), ("PATH", "8", 1)])
def test_ranks_on_node(name, value, ranks, env):
    env(**{name: value})
    assert cores.ranks_on_node() == ranks


@pytest.mark.parametrize("name", ["MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK",
                                  "SLURM_LOCALID"])
def test_rank_on_node(name, env):
    assert cores.rank_on_node() == 0
    env(**{name: "5"})
    assert cores.rank_on_node() == 5


def test_the_launcher_goes_before_the_scheduler(env):
    env(MPI_LOCALNRANKS="2", SLURM_STEP_TASKS_PER_NODE="1", MPI_LOCALRANKID="1", SLURM_LOCALID="0")
    assert (cores.ranks_on_node(), cores.rank_on_node()) == (2, 1)


@pytest.mark.parametrize("variables, count", [
    ({}, 8), ({"MPI_LOCALNRANKS": "3"}, 2), ({"MPI_LOCALNRANKS": "8"}, 1), ({"MPI_LOCALNRANKS": "100"}, 1),
    ({"MPI_LOCALNRANKS": "8", "OMP_NUM_THREADS": "5"}, 5), ({"OMP_NUM_THREADS": "0"}, 1),
    ({"MPI_LOCALNRANKS": "2", "OMP_NUM_THREADS": "many"}, 4), ({"MPI_LOCALNRANKS": "2", "SLURM_CPUS_PER_TASK": "3"}, 3),
    ({"OMP_NUM_THREADS": "2", "SLURM_CPUS_PER_TASK": "3"}, 2)])
def test_threads(variables, count, env):
    env(**variables)
    assert cores.threads() == count


def test_cores_are_those_of_the_affinity(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3, 5}, raising=False)
    assert cores.cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    assert cores.cores() == os.cpu_count()


# --- What is set ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("variables", [{}, {"MPI_LOCALNRANKS": "1"}, {"OMP_NUM_THREADS": "3"}])
def test_a_lone_process_is_left_as_it_is(variables, env):
    environment = env(**variables)
    before = dict(environment)
    cores.share_cores()
    assert environment == before


@pytest.mark.parametrize("ranks, count", [(2, "4"), (4, "2"), (8, "1")])
def test_ranks_share_the_cores(ranks, count, env):
    environment = env(MPI_LOCALNRANKS=str(ranks))
    cores.share_cores()
    assert [environment[name] for name in CAPS] == [count] * len(CAPS)
    assert environment["LOADED_BLAS"] == count  # NumPy is loaded here
    assert not any(name in environment for name in YIELDS)


def test_what_the_user_set_stays(env):
    environment = env(MPI_LOCALNRANKS="4", OMP_NUM_THREADS="3", MKL_NUM_THREADS="7")
    cores.share_cores()
    assert [environment[name] for name in CAPS] == ["3", "3", "7", "3", "3", "3"]
    assert "LOADED_BLAS" not in environment  # it has obeyed OMP_NUM_THREADS


def test_more_ranks_than_cores_yield(env):
    environment = env(MPI_LOCALNRANKS="9", OMPI_MCA_mpi_yield_when_idle="0")
    cores.share_cores()
    assert [environment[name] for name in YIELDS] == ["1", "0"]


def test_mpi_was_started_too_early(env, monkeypatch):
    env(MPI_LOCALNRANKS="9")
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", object())
    with pytest.warns(UserWarning, match="9 ranks share 8 cores .*: import mpiml before mpi4py"):
        cores.share_cores()


def test_blas_is_loaded_and_threadpoolctl_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "threadpoolctl", None)
    with pytest.warns(UserWarning, match="NumPy was imported before mpiml, so its BLAS threads cannot be capped at 2"):
        cores._cap_loaded_blas(2)


COUNT = """
    import json, os, threadpoolctl
    blas = [pool["num_threads"] for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]
    print(json.dumps([blas, os.environ.get("OMP_NUM_THREADS")]))
"""


@pytest.mark.parametrize("order", [
    # Without threadpoolctl the caps count only if they are set before NumPy loads.
    "import sys; sys.modules['threadpoolctl'] = None; import mpiml, numpy; del sys.modules['threadpoolctl']",
    "import numpy, mpiml"], ids=["mpiml first", "numpy first"])
def test_blas_obeys(order):
    pytest.importorskip("threadpoolctl")
    alone, ranked = (start(order, textwrap.dedent(COUNT), **launcher) for launcher in ({}, {"MPI_LOCALNRANKS": "1000"}))
    blas, cap = json.loads(finish(ranked)[0])
    assert blas and set(blas) == {1} and cap == "1"
    blas, cap = json.loads(finish(alone)[0])
    assert set(blas) == {cores.cores()} and cap is None


# --- Without MPI ----------------------------------------------------------------------------------------------

def test_importing_the_package_does_not_import_mpi():
    out, _ = finish(start("import sys, mpiml, mpiml.metrics", "print([m for m in sys.modules if 'mpi4py' in m])"))
    assert out == "[]\n"


BLOCK = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "mpi4py":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Block())
"""


def test_training_where_mpi4py_is_not_installed():
    out, _ = finish(start(BLOCK, """
import numpy as np
from mpiml.data import batches
from mpiml.nn import Linear, Sequential
from mpiml.ops import cross_entropy, relu
from mpiml.optim import SGD

x = np.random.default_rng(0).standard_normal((64, 5)).astype(np.float32)
y = (x[:, 0] > 0).astype(np.int64)
model = Sequential(Linear(5, 8), relu, Linear(8, 2)).init(seed=0)
optimizer = SGD(model, lr=0.5)
losses = []
for epoch in range(5):
    for images, labels in batches(x, y, 16, epoch=epoch):
        loss = cross_entropy(model(images, training=True), labels) / len(labels)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
print(losses[0], losses[-1])
"""))
    first, last = map(float, out.split())
    assert last < 0.6 * first


def test_the_parallel_part_says_what_it_needs():
    _, err = finish(start(BLOCK, "import mpiml", "import mpiml.parallel"), code=1)
    assert "ImportError: mpiml.parallel needs mpi4py and an MPI library: pip install 'mpiml[mpi]' brings MPICH" in err
    assert "No module named 'mpi4py'" in err


# --- Compiling ------------------------------------------------------------------------------------------------

KERNELS = """
from mpiml.kernels.jit import kernel

@kernel
def inner(x):
    return x * x + 1

@kernel
def outer(x):
    return inner(x) + inner(x + x)

@kernel
def total(x):
    s = x.dtype.type(0)
    for i in range(x.size):
        s += x[i]
    return s
"""
CALL = """
    import json, sys, numpy as np
    import some_kernels as k
    print("ready", flush=True)
    sys.stdin.readline()
    results = [float(k.outer(t(3))) for t in TYPES] + [float(k.total(np.ones(4, t))) for t in TYPES]
    assert results == [47, 47, 4, 4], results
    print(json.dumps([[d.__name__, str(sig), hits.get(sig, 0)] for d in (k.inner, k.outer, k.total)
                      for hits, misses in [(d.stats.cache_hits, d.stats.cache_misses)] for sig in hits | misses]))
"""


def caller(tmp_path, types, *first):
    return start(*first, f"import numpy as np; TYPES = {types}", textwrap.dedent(CALL), PYTHONPATH=str(tmp_path),
                 NUMBA_CACHE_DIR=str(tmp_path / "cache"), TMPDIR=str(tmp_path))


def compiled(out):
    """(kernel, signature) of what a process compiled itself."""
    return [(name, sig) for name, sig, hits in json.loads(out.splitlines()[-1]) if not hits]


def test_processes_that_start_at_once_compile_each_kernel_once(tmp_path):
    (tmp_path / "some_kernels.py").write_text(KERNELS)
    both = [caller(tmp_path, types) for types in ("(np.float32, np.float64)", "(np.float64, np.float32)")]
    for process in both:
        assert process.stdout.readline() == "ready\n"
    for process in both:
        process.stdin.write("go\n")
        process.stdin.flush()
    done = [compiled(finish(process)[0]) for process in both]
    assert len(done[0] + done[1]) == len(set(done[0] + done[1])) == 6  # three kernels of two dtypes

    out, err = finish(caller(tmp_path, "(np.float32, np.float64)"))
    assert compiled(out) == [] and err == ""


def test_a_process_killed_while_it_writes_its_cache(tmp_path):
    # After an update of the package the cache still holds the old machine code, which must not come back.
    def run(constant, code, *kill):
        (tmp_path / "one.py").write_text(f"from mpiml.kernels.jit import kernel\n\n@kernel\ndef f(x):\n"
                                         f"    return x + {constant}\n")
        return finish(start("import os", "from numba.core.caching import IndexDataCacheFile as Files", *kill,
                            "import one", "print(one.f(1.0))", PYTHONPATH=str(tmp_path), TMPDIR=str(tmp_path),
                            PYTHONDONTWRITEBYTECODE="1", NUMBA_CACHE_DIR=str(tmp_path / "cache")), code)[0]

    assert run("1.0", 0) == "2.0\n"
    for step in "_save_data", "_save_index":
        run("10.0", 9, f"Files.{step} = lambda *args: os._exit(9)")
    assert run("10.0", 0) == "11.0\n"
    assert run("10.0", 0) == "11.0\n"


def test_the_lock_of_a_killed_process_is_free(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / "some_kernels.py").write_text(KERNELS)
    process = caller(tmp_path, "(np.float32, np.float64)", "import os", "from numba.core.caching import IndexDataCacheFile",
                     "IndexDataCacheFile._save_data = lambda *args: os._exit(9)")
    finish(process, code=9)
    with open(tmp_path / f"mpiml-{os.getuid()}.lock", "r+") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.fixture
def own_lock(tmp_path, monkeypatch):
    """A lock that no other process uses."""
    lock = cache.NodeLock()
    monkeypatch.setattr(cache.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(cache, "lock", lock)
    return lock


@jit.kernel
def cannot_compile(x):
    return x.there_is_no_such_thing


@jit.kernel
def calls_one_that_cannot(x):
    return cannot_compile(x) + 1


@pytest.mark.parametrize("function", [cannot_compile, calls_one_that_cannot])
def test_a_kernel_that_fails_to_compile_frees_the_lock(function, own_lock, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    with pytest.raises(TypingError):
        function(np.ones(3))
    assert own_lock.depth == 0
    with open(tmp_path / f"mpiml-{os.getuid()}.lock", "r+") as lock:  # it was taken
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_threads_that_compile_at_once(own_lock, monkeypatch):
    compiling = threading.Event()

    def load(*args):
        if own_lock.depth:
            compiling.set()
            time.sleep(0.1)  # the other thread comes in meanwhile

    monkeypatch.setattr(cache.NodeCache, "save_overload", lambda *args: None)
    monkeypatch.setattr(cache.NodeCache, "_load", load)
    first, second = jit.kernel(lambda x: x + 1), jit.kernel(lambda x: x * 2)
    thread = threading.Thread(target=first, args=(10.0,))
    thread.start()
    assert compiling.wait(10)
    assert second(10.0) == 20
    thread.join()
    assert first(10.0) == 11
    assert own_lock.depth == 0 and own_lock._file is None


@pytest.mark.parametrize("trouble", ["folder", "lock"])
def test_without_a_lock_it_compiles_all_the_same(trouble, own_lock, tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(cache.NodeCache, "save_overload", lambda *args: None)
    monkeypatch.setattr(cache.NodeCache, "_load", lambda *args: None)
    if trouble == "folder":
        monkeypatch.setattr(cache.tempfile, "tempdir", str(tmp_path / "nowhere"))
    else:
        def refuse(*args):
            raise OSError(37, "No locks available")
        monkeypatch.setattr(fcntl, "lockf", refuse)
    assert jit.kernel(lambda x: x + 1)(2.0) == 3
    assert own_lock.depth == 0 and own_lock._file is None


def test_one_rank_of_a_node_says_that_it_compiles(monkeypatch, capsys):
    monkeypatch.setattr(jit.atexit, "register", lambda function: None)
    for rank, said in (0, "mpiml: compiling kernels for this CPU (first use only)\n"), (1, ""):
        monkeypatch.setattr(cores, "rank_on_node", lambda rank=rank: rank)
        report = jit._Report()
        for _ in range(2):
            report.start("relu")
            report.stop()
        assert capsys.readouterr().err == said
