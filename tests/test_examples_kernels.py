"""The examples of kernels without the engine."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize(("name", "least"), [("kernels_in_numpy", 0.9), ("kernels_in_njit", 0.7)])
def test_example(name, least, capsys):
    pytest.importorskip("sklearn")
    assert runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]() > least
    assert capsys.readouterr().out.count("\n") == 1
