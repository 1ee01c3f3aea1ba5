"""The import rule: which room may know which, read from every file."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "mpiml"
OPTIONAL = {"matplotlib", "pooch", "requests", "safetensors", "tensorboardX", "threadpoolctl", "tqdm"}

# room: what it may import of the package, and from outside beside the standard library.
ALLOWED = {
    "__init__.py": ({"cores", "data", "kernels", "memory", "nn", "ops", "optim", "replay", "tensor"}, set()),
    "cores.py": (set(), {"threadpoolctl"}),
    "alone.py": (set(), set()),
    "memory.py": (set(), set()),
    "arguments.py": (set(), set()),
    "random.py": (set(), {"numpy"}),
    "kernels": ({"cores", "kernels"}, {"llvmlite", "numba", "numpy"}),
    "tensor.py": ({"kernels"}, {"numpy"}),
    "ops": ({"kernels", "ops", "tensor"}, {"numpy"}),
    "describe.py": ({"nn", "ops"}, {"numpy"}),
    "nn": ({"kernels", "nn", "ops", "random", "tensor"}, {"numpy"}),
    "replay": ({"nn", "replay", "tensor"}, {"numpy"}),
    "lanes.py": ({"cores", "data", "kernels", "nn", "tensor"}, {"numpy"}),
    "optim.py": ({"kernels", "nn"}, {"numpy"}),
    "metrics.py": (set(), {"numpy"}),
    "balance.py": (set(), {"numpy"}),
    "data": ({"alone", "data", "random"}, {"numpy", "pooch", "requests"}),
    "save": ({"alone", "data", "describe", "nn", "restart", "save"}, {"numpy", "safetensors"}),
    "schedule": ({"schedule"}, {"matplotlib", "numpy"}),
    "report": ({"balance", "report", "schedule"}, {"matplotlib", "numpy"}),
    "fit": ({"__version__", "balance", "data", "fit", "lanes", "optim", "parallel", "save"}, {"numpy", "tensorboardX"}),
    "predict.py": ({"alone", "data", "nn", "parallel", "patience", "save"}, {"numpy"}),
    "restart.py": (set(), set()),
    "patience.py": (set(), set()),
    "check.py": ({"__version__", "cores", "data", "kernels", "memory", "patience"},
                 {"llvmlite", "numba", "numpy", "threadpoolctl"}),
    "__main__.py": ({"arguments", "check", "cores", "kernels", "parallel", "patience", "predict", "report", "restart",
                     "schedule"}, set()),
    "parallel": ({"__version__", "check", "cores", "data", "kernels", "lanes", "nn", "parallel", "patience", "replay",
                  "restart", "schedule", "tensor"},
                 {"llvmlite", "mpi4py", "numba", "numpy", "tqdm"}),
}
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(path):
    """(module, is this an import of the package itself) for every import statement of a file."""
    folder = ("mpiml", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(folder[:len(folder) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            # "from . import abort" imports modules by their names.
            yield from ([f"{module}.{alias.name}" for alias in node.names] if module in ("mpiml", base) else [module])


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_what_its_floor_allows(path):
    room = path.relative_to(PACKAGE).parts[0]
    inside, outside = ALLOWED[room]
    for module in imported(path):
        top, *rest = module.split(".")
        if top == "mpiml":
            assert rest and rest[0] in inside, f"{room} must not import {module}"
        elif top not in sys.stdlib_module_names:
            assert top in outside, f"{room} must not import {module}"


def test_the_rule_sees_the_imports():
    found = {module for path in FILES for module in imported(path)}
    assert {"mpi4py", "numba", "mpiml.parallel.grid", "mpiml.kernels.jit", "mpiml.tensor"} <= found


def test_only_one_folder_imports_mpi():
    users = {path.relative_to(PACKAGE).parts[0] for path in FILES
             if any(module.split(".")[0] == "mpi4py" for module in imported(path))}
    assert users == {"parallel"}


def test_no_pickle_and_no_lower_case_messages():
    small = {"send", "recv", "isend", "irecv", "bcast", "gather", "allgather", "scatter", "allreduce", "reduce", "alltoall"}
    for path in FILES:
        assert not {"pickle", "shelve", "dill", "cloudpickle"} & {m.split(".")[0] for m in imported(path)}, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                assert node.func.attr not in small, f"{path}:{node.lineno} sends a pickle"
