"""The doctor, ``python -m mpiml check``, and the agreement of the ranks at the start."""

import os
import re
import subprocess
import sys
import types

import pytest
from launch import ROOT, environment, mpirun

from mpiml import check, cores

pytestmark = pytest.mark.launch


@pytest.fixture
def env(monkeypatch):
    """Set variables; those of launchers and thread caps are gone."""
    for name in list(os.environ):
        if re.match("PMI|OMPI|PRTE|MPI_|SLURM|MALLOC_|NUMBA_|OPENBLAS|MPIML_", name) or name in cores.THREAD_CAPS:
            monkeypatch.delenv(name)
    return monkeypatch.setenv


def only(findings):
    """(mark, text, fix) of the one finding."""
    finding, = findings
    return finding.mark, finding.text, finding.fix


def doctor(**variables):
    """The doctor on one process."""
    return subprocess.run([sys.executable, "-m", "mpiml", "check"], cwd=ROOT, capture_output=True, text=True, timeout=120,
                          env=environment(**variables))


def flat(text):
    """The report without its line breaks."""
    return re.sub(r"\s+", " ", text)


# --- One process ---------------------------------------------------------------------------------------------------

def test_versions(monkeypatch):
    mark, text, _ = only(check.versions())
    assert mark == "ok" and f"numba {check.numba.__version__}" in text
    monkeypatch.setitem(check.LEAST, "numpy", "99.1")
    mark, text, fix = only(check.versions())
    assert mark == "problem" and "is older than 99.1" in text and "'numpy>=99.1'" in fix


def test_the_least_versions_are_those_of_the_package():
    asked = re.search(r"install_requires=\[(.*)\]", (ROOT / "setup.py").read_text())[1]
    for name, least in check.LEAST.items():
        assert f'"{name}>={least.removesuffix(".0") if name == "numpy" else least}"' in asked


@pytest.mark.parametrize("name", check.COSTS)
def test_variables_that_cost_speed(name, env):
    assert check.variables() == []
    env(name, "Haswell")
    mark, text, fix = only(check.variables())
    assert mark == "warning" and f"{name}=Haswell: " in text and f"unset {name}" in fix


def test_malloc(env, monkeypatch):
    monkeypatch.setattr(check.memory, "keep_freed_memory", lambda: True)
    assert only(check.malloc())[0] == "ok"
    monkeypatch.undo()
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    mark, text, fix = only(check.malloc())
    assert mark == "warning" and "MALLOC_ARENA_MAX is set" in text and "unset" in fix


def test_threads(env, monkeypatch):
    pools = [{"user_api": "blas", "internal_api": "blas", "version": "1", "num_threads": 4}]
    monkeypatch.setitem(sys.modules, "threadpoolctl", types.SimpleNamespace(threadpool_info=lambda: pools))
    monkeypatch.setattr(cores, "cores_of_node", lambda: 8)
    assert only(check.threads())[:2] == ("ok", "no cap; NumPy's BLAS: blas 1 (any CPU), 4 threads")
    for name in cores.THREAD_CAPS:
        env(name, "4")
    env("MPI_LOCALNRANKS", "4")
    mark, text, fix = only(check.threads())
    assert mark == "warning" and text.startswith("4 each") and "4 ranks on this node start 16 threads for 8 cores" in text
    assert "OMP_NUM_THREADS=2" in fix
    monkeypatch.setitem(sys.modules, "threadpoolctl", None)
    assert "with threadpoolctl its threads would be seen" in only(check.threads())[1]


@pytest.mark.parametrize("text, limit", [("max 100000", None), ("150000 100000", 1.5), ("-1", None)])
def test_the_quota_of_a_container(text, limit, monkeypatch):
    monkeypatch.setattr(check.Path, "read_text", lambda path: "100000" if "period" in path.name else text)
    monkeypatch.setattr(cores, "cores_of_node", lambda: 8)
    assert check._quota() == limit
    mark, text, fix = only(check.quota())
    assert mark == "ok" if limit is None else (mark == "warning" and "may use 1.5 of them" in text and "--cpus=8" in fix)


@pytest.mark.parametrize("size, free, mark, fix", [(64, 60, "warning", "--shm-size"), (9000, 10, "warning", "see what lies in"),
                                                   (9000, 8000, "ok", "")])
def test_shared_memory(size, free, mark, fix, monkeypatch):
    monkeypatch.setattr(os, "statvfs", lambda path: types.SimpleNamespace(f_frsize=1000000, f_blocks=size, f_bavail=free))
    monkeypatch.setattr(os, "access", lambda path, mode: True)
    found = only(check.shared_memory())
    assert found[0] == mark and fix in found[2]
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "cannot be written to" in only(check.shared_memory())[1]
    monkeypatch.undo()
    assert "gradients are summed by MPI" in only(check.shared_memory("/nowhere"))[1]


def test_data(env, tmp_path, monkeypatch):
    env("MPIML_DATA", str(tmp_path / "nowhere"))
    mark, text, fix = only(check.data())
    assert mark == "problem" and "no such folder" in text and "unset MPIML_DATA" in fix
    env("MPIML_DATA", str(tmp_path))
    assert "without MNIST (no train-images-idx3-ubyte, plain or .gz" in only(check.data())[1]
    (tmp_path / "mnist").mkdir()
    for name in check.FILES:
        (tmp_path / "mnist" / name).touch()
    assert only(check.data())[:2] == ("ok", f"MNIST is in {tmp_path / 'mnist'} (MPIML_DATA)")
    monkeypatch.delenv("MPIML_DATA")
    monkeypatch.setattr(check, "cache_folder", lambda name: tmp_path)
    assert "no MNIST yet: it will be downloaded" in only(check.data())[1]
    monkeypatch.setattr(check, "cache_folder", lambda name: tmp_path / "mnist")
    assert only(check.data())[1].startswith("MNIST is in")
    monkeypatch.delattr(check, "cache_folder")
    monkeypatch.setattr(check, "cache_folder", lambda name: __import__("a_package_that_is_missing"), raising=False)
    assert "scikit-learn's 1,797 digits" in only(check.data())[1]


def test_extras(monkeypatch):
    monkeypatch.setattr(check, "_installed", lambda name: None if name == "matplotlib" else "1.0")
    mark, text, fix = only(check.extras())
    assert mark == "ok" and "not installed: matplotlib (pictures of timelines)" in text and "'mpiml[draw]'" in fix


# --- MPI and its launcher --------------------------------------------------------------------------------------------

def test_mpi_is_missing(monkeypatch):
    monkeypatch.setattr(check, "_installed", lambda name: None)
    mark, text, fix = only(check.mpi())
    assert mark == "warning" and "mpi4py is not installed" in text and "'mpiml[mpi]'" in fix


def test_the_mpi_library_is_missing(monkeypatch):
    monkeypatch.setattr(check, "_ask", lambda *command: (1, "RuntimeError: cannot load MPI library"))
    mark, text, fix = only(check.mpi())
    assert mark == "problem" and "RuntimeError: cannot load" in text and "load its MPI module" in fix


def test_the_launcher_of_another_mpi(env, tmp_path):
    program = tmp_path / "mpirun"
    program.write_text("#!/bin/sh\necho 'mpirun (Open MPI) 5.0.11'\n")
    program.chmod(0o755)
    env("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert only(check.launcher("Open MPI")) == ("ok", f"{program}, of Open MPI", "")
    mark, text, fix = only(check.launcher("MPICH"))
    assert mark == "problem" and f"{program} belongs to Open MPI, but mpi4py loads MPICH" in text and "use " in fix
    env("PATH", str(tmp_path / "empty"))
    assert "neither mpirun nor srun" in only(check.launcher("MPICH"))[1]
    env("PMI_SIZE", "2")
    assert only(check.launcher("MPICH"))[0] == "ok"
    mark, text, fix = only(check.launcher("Open MPI"))
    assert mark == "problem" and "the mpirun of MPICH started this, but mpi4py loads Open MPI" in text and "use " in fix


@pytest.mark.parametrize("variables, size, told", [
    ({"PMI_SIZE": "4"}, 1, "started 4 processes"), ({"PMI_SIZE": "4"}, 4, None), ({}, 1, None),
    ({"SLURM_STEP_NUM_TASKS": "4"}, 1, "srun --mpi="), ({"SLURM_STEP_NUM_TASKS": "1", "OMPI_COMM_WORLD_SIZE": "4"}, 4, None),
    ({"PMIX_RANK": "2"}, 1, r"as number 2 \(PMIX_RANK\)"), ({"PMIX_RANK": "2"}, 3, None), ({"SLURM_NTASKS": "4"}, 1, None)])
def test_the_world_of_another_launcher(variables, size, told, env):
    from mpiml.parallel.start import wrong_launcher
    for name, value in variables.items():
        env(name, value)
    problem = wrong_launcher(size)
    assert problem is None if told is None else re.search(told, problem)


# --- The whole report --------------------------------------------------------------------------------------------------

def test_a_machine_with_problems(tmp_path):
    (tmp_path / "file").touch()
    run = doctor(NUMBA_CACHE_DIR=str(tmp_path / "file" / "cache"), MPIML_DATA=str(tmp_path), OPENBLAS_CORETYPE="Haswell",
                 SLURM_NTASKS="4")
    assert run.returncode == 1, run.stdout + run.stderr
    text = flat(run.stdout)
    assert "cache cannot be written to -> export NUMBA_CACHE_DIR=FOLDER" in text
    assert "Slurm gave this job 4 tasks, but this process runs alone -> start it with srun" in text
    assert "without MNIST" in text and "OPENBLAS_CORETYPE=Haswell: NumPy's" in text
    assert re.search(r"[23] problems, \d+ warnings?: see the lines with an arrow$", run.stdout.strip())
    assert all(len(line) <= check.WIDTH or str(tmp_path) in line for line in run.stdout.splitlines())


def test_a_cold_cache_and_no_mpi(tmp_path):
    code = "import sys; sys.argv = ['mpiml', 'check']; sys.modules['mpi4py'] = None; from mpiml.__main__ import main; main()"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120,
                         env=environment(NUMBA_CACHE_DIR=str(tmp_path)))
    assert run.returncode == 1, run.stderr
    assert re.search(r"warning kernels 0 of \d+ kernels .* -> python -m mpiml warmup", flat(run.stdout))
    assert "problem MPI mpiml.parallel needs mpi4py and an MPI library -> pip install 'mpiml[mpi]'" in flat(run.stdout)


def test_a_job():
    run = mpirun(1, "-m", "mpiml", "check", ":", "-n", "1", "env", "OPENBLAS_CORETYPE=Haswell", sys.executable, "-m", "mpiml",
                 "check")
    assert run.code == 0, run.out + run.err
    text = flat(run.out)
    assert run.out.count("ok       Python") == 1 and "ranks 2, all on" in text
    assert "warning variable on rank 1: OPENBLAS_CORETYPE=Haswell" in text
    assert "all run the same program with the same packages" in text
    assert re.search(r"ok sum right; .* for 8 bytes, .* for 4 MB \(in shared memory; MPI alone", text)
    assert not run.left


def test_a_job_of_another_launcher():
    foreign = "PMI_SIZE" if "Open MPI" in check._ask(sys.executable, "-m", "mpi4py", "--mpi-lib-version")[1] else \
        "OMPI_COMM_WORLD_SIZE"
    run = doctor(**{foreign: "2"})
    assert run.returncode == 1
    assert "started this, but mpi4py loads" in flat(run.stdout) and "has started" not in run.stdout


AWAKE = """
import sys
from mpiml import __main__, check

sys.argv[1:] = ["check"]
check.PATIENCE = 1
__main__.main()
"""


@pytest.mark.parametrize("program, told", [
    ("import time, mpi4py.MPI\ntime.sleep(60)\n", "an answer of all ranks did not come within 1 s"),
    ("raise ImportError('on this node only')\n", "the start of MPI on all ranks did not come within 1 s")],
    ids=["asleep", "failed early"])
def test_a_rank_that_never_answers(program, told, tmp_path):
    (tmp_path / "awake.py").write_text(AWAKE)
    (tmp_path / "other.py").write_text(program)
    run = mpirun(1, str(tmp_path / "awake.py"), ":", "-n", "1", sys.executable, str(tmp_path / "other.py"), timeout=30)
    assert run.code != 0 and not run.left
    # Open MPI's launcher ends a job at once if a rank fails before it starts MPI.
    assert told in flat(run.out) or "prterun detected" in run.err, run.out + run.err


# --- What ranks find together --------------------------------------------------------------------------------------------

def place(cores_, of=4, threads=1, node="a"):
    return {"node": node, "cores": cores_, "of": of, "threads": threads}


@pytest.mark.parametrize("places, mark, text", [
    ([place([0, 1, 2, 3])] * 2, "ok", "not bound: each rank may run on all 4 cores"),
    ([place([0, 1]), place([2, 3])], "ok", "bound: each rank has 2 cores of its own"),
    ([place([0]), place([1, 2])], "ok", "1 to 2 cores"),
    ([place([0]), place([1]), place([0])], "problem", "ranks 0, 2 are bound to core 0 of a, which has 4"),
    ([place([0])] * 2 + [place([0], node="b")], "problem", "ranks 0-1 on a are bound to core 0"),
    ([place([0, 1, 2, 3])] * 5, "warning", "5 ranks share 4 cores"),
    ([place([0], of=1)] * 2 + [place([0], of=1, node="b")] * 2, "warning", "share 1 core of a: good for a test"),
    ([place([0, 1, 2, 3], threads=4)] * 2, "warning", "2 ranks with 4 threads each share 4 cores")])
def test_cores_that_ranks_share(places, mark, text):
    from mpiml.parallel.check import shared_cores
    found = only(shared_cores(places))
    assert found[0] == mark and text in found[1]


def test_nodes():
    from mpiml.parallel.check import nodes_and_ranks
    assert only(nodes_and_ranks(list("aabb")))[:2] == ("ok", "4, 2 on each of 2 nodes: a, b")
    mark, text, fix = only(nodes_and_ranks(list("aab")))
    assert mark == "warning" and "2 on a, 1 on b" in text and "as many ranks on every node" in fix


def test_what_other_ranks_found():
    from mpiml.parallel.check import differences
    mine = check.ok("CPU", "fast") + check.ok("shared", "1 GB free")
    theirs = check.ok("CPU", "old") + check.ok("shared", "none")
    cold = check.warning("kernels", "cold", "warm up")
    told = differences([mine, theirs, mine + cold, theirs], ["a", "b", "a", "b"])
    assert [finding.text for finding in told] == ["on ranks 1, 3 on b: old", "on rank 2 on a: cold"]


# --- Agreement at the start ------------------------------------------------------------------------------------------------

PROGRAM = "from mpiml.parallel import Grid\nprint(f'together {Grid().size}\\n', end='')\n"


def start(tmp_path, one, other, **variables):
    """Two programs, each a text and its arguments, as two ranks and one."""
    commands = []
    for i, (text, *arguments) in enumerate((one, other)):
        (tmp_path / f"{i}").mkdir()
        (tmp_path / f"{i}" / "program.py").write_text(text)
        commands.append([str(tmp_path / f"{i}" / "program.py"), *arguments])
    env = environment(**variables)
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *env.get("PYTHONPATH", "").split(os.pathsep)])
    return mpirun(2, *commands[0], ":", "-n", "1", sys.executable, *commands[1], env=env, timeout=60)


def test_ranks_with_other_arguments_and_packages(tmp_path):
    other = "import mpiml, numpy\nnumpy.__version__ = '1.26.4'\n" + PROGRAM
    run = start(tmp_path, (PROGRAM, "--lr", "0.1"), (other, "--lr", "0.2"))
    assert run.code != 0 and "together" not in run.out
    assert re.search(r"RankError: the ranks of this job differ in\n  numpy +\S+ +ranks 0-1\n +1\.26\.4 +rank 2\n"
                     r"  script +program.py \w+ +ranks 0-1\n +program.py \w+ +rank 2\n"
                     r"  arguments +--lr 0.1 +ranks 0-1\n +--lr 0.2 +rank 2\nstart all ranks with one command line; if they "
                     r"are meant to differ, export MPIML_MAY_DIFFER=numpy,script,arguments", run.err), run.err
    assert f"rank {2} of 3" in run.err  # the odd one speaks


def test_ranks_that_may_differ(tmp_path):
    run = start(tmp_path, (PROGRAM, "server"), ("# another\n" + PROGRAM, "client"), MPIML_MAY_DIFFER="script,arguments")
    assert run.code == 0 and run.out.count("together 3") == 3, run.err


def test_ranks_with_other_sources(tmp_path):
    from mpiml.parallel.start import _digest, _sources
    for path in (ROOT / "mpiml").rglob("*.py"):
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text())
    assert _digest(_sources(tmp_path / "mpiml")) == _digest(_sources(ROOT / "mpiml"))  # as on two nodes
    with open(tmp_path / "mpiml" / "optim.py", "a") as file:
        file.write("# a local change\n")
    one, other = (f"import sys\nsys.path.insert(0, {str(folder)!r})\n{PROGRAM}" for folder in (ROOT, tmp_path))
    run = start(tmp_path, (one,), (other,), MPIML_MAY_DIFFER="script")
    assert run.code != 0
    assert re.search(r"differ in\n  mpiml +0\S+, sources \w+ +ranks 0-1\n +0\S+, sources \w+ +rank 2\n"
                     r"give all ranks the same installation", run.err), run.err


def test_ranks_that_ask_for_other_grids(tmp_path):
    program = "from mpi4py import MPI\nfrom mpiml.parallel import Grid\nGrid(pipe=1 + MPI.COMM_WORLD.rank)\n"
    (tmp_path / "program.py").write_text(program)
    run = mpirun(2, str(tmp_path / "program.py"), timeout=60)
    assert re.search(r"differ in\n  pipe +1 +rank 0\n +2 +rank 1\ngive Grid the same arguments on all ranks", run.err), run.err


def test_slurm_tasks_without_srun():
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, cwd=ROOT,
                         env=environment(SLURM_NTASKS="4"))
    assert run.returncode == 0 and "Slurm gave this job 4 tasks, but this process runs alone" in run.stderr


def test_values_are_cut_to_where_they_differ():
    from mpiml.parallel.start import _shortened, ranks_text
    long = "--option value " * 20
    assert _shortened([long + "--lr 1", long + "--lr 2", ""]) == [long[:60] + "...", long[:60] + "...", ""]
    first, second = _shortened([long + "--lr 1", long + "--lr 2"])
    assert first.endswith("--lr 1") and second.endswith("--lr 2") and len(first) < 70
    assert ranks_text([0, 2, 3, 4, 8], ["a"] * 9) == "ranks 0, 2-4, 8"
    assert ranks_text([1], ["a", "b"]) == "rank 1 on b"
