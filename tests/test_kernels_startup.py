"""How kernels are compiled and kept: once per node, never stale, never broken, and nothing at import."""

import inspect
import os
import subprocess
import sys
import textwrap

import numba
import numpy as np
import pytest

from mpiml import kernels
from mpiml.kernels import cache, warmup
from mpiml.kernels.jit import kernel
from mpiml.kernels.simd import flat, load, out_of_line, reduce_add

HELPER = """
from mpiml.kernels.jit import kernel

@kernel
def add_constant(x):
    return x + 1.0
"""
USER = """
from .helper import add_constant
from mpiml.kernels.jit import kernel

def make(step):
    @kernel
    def twice(x):
        return step(step(x))
    return twice

twice = make(add_constant)
"""
CALL = "from family.user import twice; print(twice(3.0))"


@pytest.fixture
def family(tmp_path):
    """A folder of two files, of which one kernel is compiled into the other; its runs have caches of their own."""
    folder = tmp_path / "family"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "helper.py").write_text(HELPER)
    (folder / "user.py").write_text(USER)
    return folder


def launch(folder, *code, stderr=subprocess.PIPE, **env):
    env = {"PYTHONPATH": str(folder.parent), "PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": str(folder.parent),
           "NUMBA_CACHE_DIR": str(folder.parent / "cache"), **env}
    return subprocess.Popen([sys.executable, "-c", "\n".join(map(textwrap.dedent, code))], env={**os.environ, **env}, text=True,
                            stdout=subprocess.PIPE, stderr=stderr)


def finish(process, code=0):
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    return out, err


def run(folder, *code, **env):
    return finish(launch(folder, *code, **env))


def warm(folder, **env):
    return run(folder, CALL, MPIML_REQUIRE_CACHE="1", **env)


def test_import_compiles_nothing(family):
    out, _ = run(family, """
        from numba.core import event
        compiled = []
        class Count(event.Listener):
            def on_start(self, happened): compiled.append(happened.data)
            def on_end(self, happened): pass
        event.register("numba:compile", Count())
        import mpiml.kernels, mpiml.kernels.warmup
        print(len(compiled))
        mpiml.kernels.jit.kernel(lambda x: x + 1)(1)
        print(len(compiled))
    """)
    assert out == "0\n1\n"
    assert not (family.parent / "cache").exists() or [p.name for p in family.parent.rglob("*.nbi")] == []


def test_a_second_process_compiles_nothing_and_says_nothing(family):
    out, err = run(family, CALL)
    assert out == "5.0\n"
    first, last = err.splitlines()
    assert first == "mpiml: compiling kernels for this CPU (first use only)"
    assert last.startswith("mpiml: compiled 1 kernel in ")
    assert warm(family) == ("5.0\n", "")


def test_ranks_beside_the_first_say_nothing(family):
    assert run(family, CALL, MPI_LOCALRANKID="1", MPI_LOCALNRANKS="2")[1] == ""


def test_on_a_terminal_a_line_shows_the_kernel_at_work(family):
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    finish(launch(family, CALL, stderr=theirs))
    os.close(theirs)
    shown = os.read(ours, 10000).decode()
    os.close(ours)
    assert shown.startswith("\rmpiml: compiling kernels for this CPU (first use only): twice\x1b[K\r\x1b[Kmpiml: compiled 1 ")


@pytest.mark.parametrize(("line", "name"), [("from .helper import add_constant", "add_constant"),
                                            ("from . import helper", "helper.add_constant")])
def test_an_edit_of_a_file_that_is_compiled_in_counts(family, line, name):
    user = USER.replace("from .helper import add_constant", line).replace("make(add_constant)", f"make({name})")
    (family / "user.py").write_text(user)
    assert run(family, CALL)[0] == "5.0\n"
    (family / "other.py").write_text("nothing = 0\n")
    assert warm(family)[0] == "5.0\n"
    (family / "helper.py").write_text(HELPER.replace("1.0", "10.0"))
    assert run(family, CALL)[0] == "23.0\n"
    (family / "helper.py").write_text(HELPER)
    assert run(family, CALL)[0] == "5.0\n"


def test_it_may_be_required_that_nothing_is_compiled(family):
    process = launch(family, CALL, MPIML_REQUIRE_CACHE="1")
    assert "does not have the kernel twice" in finish(process, code=1)[1]


@pytest.mark.parametrize("ending", ["nbi", "nbc"])
def test_a_damaged_cache_heals(family, ending):
    run(family, CALL)
    for damage in (lambda data: b"", lambda data: data[:len(data) // 2], lambda data: data[:-99] + bytes(99),
                   lambda data: b"nonsense"):
        files = list((family.parent / "cache").rglob(f"*.{ending}"))
        assert files
        for path in files:
            path.write_bytes(damage(path.read_bytes()))
        assert run(family, CALL)[0] == "5.0\n"
    assert warm(family)[0] == "5.0\n"


def test_cpus_and_versions_of_numba_share_a_folder(family):
    others = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
    version = "import numba; numba.__version__ = '0.1'"
    run(family, CALL)
    run(family, CALL, **others)
    run(family, version, CALL)
    for start, env in ("", {}), ("", others), (version, {}):
        assert run(family, start, CALL, MPIML_REQUIRE_CACHE="1", **env) == ("5.0\n", "")


def unwritable(path):
    """Code that makes a folder look like one that cannot be written (permissions do not stop the superuser)."""
    return f"""
        import tempfile
        make = tempfile.TemporaryFile
        def refuse(*args, dir=None, **options):
            if str(dir).startswith({str(path)!r}):
                raise PermissionError(13, "read-only", dir)
            return make(*args, dir=dir, **options)
        tempfile.TemporaryFile = refuse
    """


def test_without_a_folder_to_write_it_compiles_in_each_process(family):
    env = {"NUMBA_CACHE_DIR": "", "XDG_CACHE_HOME": "/dev/null/cache", "HOME": "/dev/null"}
    for _ in range(2):
        out, err = run(family, unwritable(family), CALL, **env)
        assert out == "5.0\n" and "compiling kernels" in err
    process = launch(family, unwritable(family), CALL, **env, MPIML_REQUIRE_CACHE="1")
    assert "kernel twice" in finish(process, code=1)[1]


def test_from_a_read_only_folder_it_goes_to_the_users_cache(family, tmp_path):
    env = {"NUMBA_CACHE_DIR": "", "XDG_CACHE_HOME": str(tmp_path / "user")}
    assert run(family, unwritable(family), CALL, **env)[0] == "5.0\n"
    assert list((tmp_path / "user").rglob("user.make.locals.twice*.nbc"))
    assert run(family, unwritable(family), CALL, **env, MPIML_REQUIRE_CACHE="1") == ("5.0\n", "")


def test_what_lies_in_a_read_only_folder_is_used(family, tmp_path):
    run(family, CALL, NUMBA_CACHE_DIR="")  # by who may write beside the source
    assert list((family / "__pycache__").glob("*.nbc"))
    env = {"NUMBA_CACHE_DIR": "", "XDG_CACHE_HOME": str(tmp_path / "user")}
    assert run(family, unwritable(family), CALL, **env, MPIML_REQUIRE_CACHE="1") == ("5.0\n", "")


def test_a_folder_given_for_the_cache_is_the_only_one(family):
    run(family, CALL, NUMBA_CACHE_DIR="")
    process = launch(family, CALL, MPIML_REQUIRE_CACHE="1")
    assert "kernel twice" in finish(process, code=1)[1]


def test_a_disk_that_is_full(family):
    full = """
        from numba.core.caching import IndexDataCacheFile
        def refuse(*args):
            raise OSError(28, "No space left on device")
        IndexDataCacheFile._save_data = refuse
    """
    assert run(family, full, CALL)[0] == "5.0\n"


def test_old_files_go(family):
    run(family, CALL)
    old = next(family.parent.rglob("helper.*.nbc"))
    os.utime(old, (0, 0))
    (family / "helper.py").write_text(HELPER.replace("1.0", "10.0"))
    run(family, CALL)
    assert not old.exists()


def test_eight_processes_compile_each_kernel_once(family):
    code = """
        import sys, numpy as np
        from family.user import add_constant, twice
        print("ready", flush=True)
        sys.stdin.readline()
        assert twice(np.float32(3)) == twice(3.0) == 5
        print(sum(sum(f.stats.cache_misses.values()) for f in (twice, add_constant)))
    """
    env = {**os.environ, "PYTHONPATH": str(family.parent), "TMPDIR": str(family.parent),
           "NUMBA_CACHE_DIR": str(family.parent / "cache")}
    processes = [subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], env=env, text=True, stdin=subprocess.PIPE,
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(8)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    # The inner kernel takes a float64 in both cases: float32 + 1.0 is one.
    assert sum(int(finish(process)[0]) for process in processes) == len(["twice float32", "twice float64"]) + 2


@pytest.fixture
def uncached(monkeypatch):
    """Every kernel is compiled here: loaded ones do not tell how they were made."""
    monkeypatch.setattr(cache.NodeCache, "load_overload", lambda *args: None)
    monkeypatch.setattr(cache.NodeCache, "save_overload", lambda *args: None)


def test_a_number_written_in_a_call_is_no_reason_to_compile_again(uncached):
    @kernel
    def inner(x, n, flag):
        return x + n if flag else x

    @kernel
    def outer(x, n):
        return inner(x, 1, True) + inner(x, 2, False) + inner(x, n, n > 1)

    assert outer(1.0, 5) == 9
    assert len(inner.signatures) == 1


def test_a_function_may_stay_out_of_its_callers(uncached):
    @kernel
    def apart(x):
        out_of_line()
        return x * x + 1

    @kernel
    def caller(x):
        return apart(x) + apart(x + x)

    assert caller(3.0) == 47
    llvm = caller.inspect_llvm(caller.signatures[0])
    assert sum("call" in line and "apart" in line for line in llvm.splitlines()) >= 2


def test_a_kernel_of_flat_positions_is_compiled_once_for_any_number_of_axes(uncached):
    @kernel(exact=True, reads="x")
    def first_sum(x, i):
        return reduce_add(load(x, i))

    @kernel
    def caller(x, y):
        return first_sum(flat(x), 0) + first_sum(flat(y), 1) + first_sum(flat(y * 2), 1)  # the last lives on in the view

    x, y = np.ones((8, 8), np.float32), np.ones((4, 4, 4), np.float32)
    width = 2 * first_sum(x.reshape(-1), 0)
    assert caller(x, y) == 2 * width
    assert len(first_sum.signatures) == 1


def test_the_table_has_an_example_of_every_kernel():
    assert set(warmup.EXAMPLES) | warmup.WITHOUT_KERNEL == set(kernels.__all__)


@pytest.mark.parametrize("name", warmup.EXAMPLES)
def test_an_example_runs(name):
    warmup.EXAMPLES[name](warmup.array(np.float32))


@pytest.fixture(scope="module")
def calls():
    """The arguments of a call of each kernel."""
    calls = {}

    class Recorder:
        def __getattr__(self, name):
            function = getattr(kernels, name)

            def call(*args, **options):
                bound = inspect.signature(function).bind(*args, **options)
                bound.apply_defaults()
                calls.setdefault(name, bound.args)
                return function(*args, **options)

            return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warmup, "k", Recorder())
        for example in warmup.EXAMPLES.values():
            example(warmup.array(np.float32))
    return calls


@pytest.mark.parametrize("name", [name for name in warmup.EXAMPLES if not name.endswith("float16")])
def test_a_kernel_takes_floats_of_one_dtype(name, calls):
    function, args = getattr(kernels, name), calls[name]
    compiled = numba.njit(lambda args: function(*args))
    floats = [i for i, a in enumerate(args) if isinstance(a, np.ndarray) and a.dtype == np.float32]
    for dtype in "int64", "float16":
        with pytest.raises(TypeError, match=f"takes float32 or float64, not {dtype}"):
            function(*(a.astype(dtype) if i in floats else a for i, a in enumerate(args)))
    for place in floats if len(floats) > 1 else ():
        mixed = tuple(a.astype(float) if i == place else a for i, a in enumerate(args))
        for call in (lambda: function(*mixed)), (lambda: compiled(mixed)):  # noqa: B023
            with pytest.raises(TypeError, match=r"got arrays of float(32 and float64|64 and float32): convert") as error:
                call()
            said = str(error.value).split()[0]  # kernels that several functions share say what these have in common
            assert set(said.split("_")) <= set(name.split("_"))


@pytest.mark.parametrize("call", [
    kernels.relu, kernels.softmax, kernels.log_softmax, kernels.logsumexp, kernels.layer_norm, kernels.linear_vjp_bias,
    lambda x: kernels.softmax_vjp(x, x), lambda x: kernels.logsumexp_vjp(x[:, 0], x, x[:, 0]),
    lambda x: kernels.dropout(x, 0.5, 1), lambda x: kernels.squared(x, x), lambda x: kernels.attention(x, x, x),
    lambda x: kernels.label_loss(x, np.zeros(0, int)), lambda x: kernels.embedding(np.zeros(0, int), x),
    lambda x: kernels.embedding_vjp(x, np.zeros(0, int), 2), lambda x: kernels.standardize(x[:, :, None]),
    lambda x: kernels.standardize_by(x[:, :, None], np.ones(3, x.dtype), np.ones(3, x.dtype)),
    lambda x: kernels.layer_norm_vjp(x, x, x[:, 0], x[:, 0])])
def test_an_array_without_elements_has_a_dtype_all_the_same(call):
    call(np.zeros((0, 3), np.float32))
    with pytest.raises(TypeError, match="takes float32 or float64, not int64"):
        call(np.zeros((0, 3), int))


def test_what_is_rearranged_keeps_its_dtype():
    x, y = np.zeros((3, 4), np.float32), np.zeros((3, 8))[:, ::2]
    for call in (lambda: kernels.relu_vjp(y, x)), (lambda: kernels.squared(x, y)):
        with pytest.raises(TypeError, match="got arrays of float32 and float64"):
            call()


def test_warm_up_tells_what_it_did(capsys, monkeypatch):
    monkeypatch.setattr(warmup.cores, "rank_on_node", lambda: 0)
    warmup.warm_up(["float32", "float64"], ["relu", "norm"])
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("float32: 2 kernels in ") and second.startswith("float64: 2 kernels in ")
