"""What a run's log becomes: text for the terminal, and one HTML page; needs neither MPI nor numba.

>>> from mpiml.report import page, read, text           # doctest: +SKIP
>>> print(text([read("run")]))                          # doctest: +SKIP
"""

from .log import LogError, Run, read
from .page import page
from .words import text

__all__ = ["LogError", "Run", "page", "read", "text"]
