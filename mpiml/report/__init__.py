"""What a run's log becomes: text for the terminal, and one HTML page; it needs neither MPI nor kernels.

``print(text([read("run")]))`` is what ``python -m mpiml report run --text`` does.
"""

from .log import LogError, Run, read
from .page import page
from .words import text

__all__ = ["LogError", "Run", "page", "read", "text"]
