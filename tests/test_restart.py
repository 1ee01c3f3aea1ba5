"""Jobs that are started again until they have come to their end."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from launch import ROOT, environment, launcher
from safetensors.numpy import load_file

from mpiml import restart

pytestmark = pytest.mark.launch


def run(*command, restarts=2, options=(), timeout=120, **env):
    return subprocess.run([sys.executable, "-m", "mpiml", "run", "--restarts", str(restarts), *options, *command], cwd=ROOT,
                          capture_output=True, text=True, timeout=timeout, env=environment(**env))


def python(text, tmp_path):
    """A program that counts in the file ``n`` how often it was started."""
    path = tmp_path / "program.py"
    count = tmp_path / "n"
    count.touch()
    path.write_text(f"import os, sys\nn = os.path.getsize({str(count)!r})\nopen({str(count)!r}, 'a').write('x')\n{text}")
    return [sys.executable, str(path)]


def starts(tmp_path):
    return os.path.getsize(tmp_path / "n")


def test_a_job_is_started_until_it_ends_well(tmp_path):
    done = run(*python("print('try', n); sys.exit(7 if n < 2 else 0)", tmp_path), restarts=3)
    assert done.returncode == 0 and done.stdout.split() == ["try", "0", "try", "1", "try", "2"]
    assert "mpiml: the job ended with status 7; starting it again (3 restarts left)" in done.stderr
    assert "(2 restarts left)" in done.stderr and "(1 restart" not in done.stderr


@pytest.mark.parametrize("code, count", [(7, 3), (75, 1), (2, 1)])
def test_what_is_given_up_or_not_a_failure(code, count, tmp_path):
    assert run(*python(f"sys.exit({code})", tmp_path)).returncode == code
    assert starts(tmp_path) == count


def test_a_rank_that_ends_in_the_middle_is_no_success(tmp_path):
    done = run(*python("import mpiml.parallel\nif n == 0: os._exit(0)", tmp_path))
    assert done.returncode == 0 and starts(tmp_path) == 2
    assert "the job ended before rank 0 came to the end of its program; starting it again" in done.stderr


def test_a_killed_job_is_started_again_with_fewer_ranks(tmp_path):
    job = [launcher(), "-n", "3", *python("from mpi4py import MPI\nimport mpiml.parallel\n"
                                          "print('ranks', MPI.COMM_WORLD.size) if MPI.COMM_WORLD.rank == 0 else None\n"
                                          "sys.stdout.flush()\nMPI.COMM_WORLD.Barrier()\n"
                                          "if MPI.COMM_WORLD.size == 3 and MPI.COMM_WORLD.rank: os.kill(os.getpid(), 9)\n"
                                          "MPI.COMM_WORLD.Barrier()", tmp_path)]
    done = run(*job, options=["--fewer", "1"])
    assert done.returncode == 0, done.stderr
    assert "ranks 3" in done.stdout and "ranks 2" in done.stdout


def test_training_that_is_killed_ends_with_the_weights_of_one_that_is_not(tmp_path):
    def job(name, ranks):
        return [launcher(), "-n", str(ranks), sys.executable, "examples/mnist_dp.py", "--lanes", "8", "--epochs", "8",
                "--save", str(tmp_path / name), "--run", str(tmp_path / f"{name}.run"), "--every", "10", "--resume"]

    env = {"MPIML_DATA": "", "HTTPS_PROXY": "http://127.0.0.1:9", "XDG_CACHE_HOME": str(tmp_path)}
    assert run(*job("whole", 2), **env).returncode == 0
    killed = subprocess.Popen([sys.executable, "-m", "mpiml", "run", "--fewer", "1", *job("killed", 3)], cwd=ROOT, text=True,
                              stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment(**env))
    deadline = time.time() + 60
    while not (tmp_path / "killed.run" / "latest").exists() and time.time() < deadline:
        time.sleep(0.01)
    ranks = [process.pid for process in psutil.Process(killed.pid).children(recursive=True)
             if process.name().startswith("python")]
    os.kill(ranks[-1], signal.SIGKILL)
    _, said = killed.communicate(timeout=120)
    assert killed.returncode == 0, said
    assert "starting it again" in said
    ours, expected = load_file(tmp_path / "killed"), load_file(tmp_path / "whole")
    assert all((ours[name] == expected[name]).all() for name in expected)


def test_what_run_refuses(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no command 'no-such-launcher'"):
        restart.run(["no-such-launcher"], 1)
    with pytest.raises(ValueError, match=r"--fewer takes ranks off the number behind -n, which .* does not have"):
        restart.run([sys.executable, "program.py"], 1, fewer=1)
    assert "run needs the command of a job" in run().stderr
