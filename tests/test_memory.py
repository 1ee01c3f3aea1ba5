"""Freed memory stays with the process, where its C library is glibc and the user has not set it otherwise."""

import gc
import platform
import subprocess
import sys

import pytest
from launch import environment

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")

PROGRAM = """
import resource
import mpiml
import numpy as np

def step():
    arrays = [np.ones(1 << 21, np.float32) for _ in range(3)]  # 24 MB

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

step()
before = faults()
for _ in range(20):
    step()
print(faults() - before)
"""


def pages(**variables):
    """Page faults of 20 steps."""
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120,
                         env=environment(**variables))
    assert run.returncode == 0, run.stderr
    return int(run.stdout)


@glibc
def test_the_second_step_finds_the_pages_of_the_first():
    assert pages() < 1000


@glibc
def test_what_the_user_set_stays():
    assert pages(MALLOC_MMAP_THRESHOLD_="1000000") > 1000


def test_another_c_library_is_left_alone(monkeypatch):
    from mpiml import memory
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    assert memory.keep_freed_memory() is False


def test_the_collector_rests_while_nothing_can_be_freed():
    from mpiml import memory
    made = []
    with memory.without_collector():
        assert not gc.isenabled()
        made.append([[] for _ in range(10000)])
    assert gc.isenabled() and gc.get_freeze_count() == 0
    assert any(thing is made for thing in gc.get_objects(generation=2))


def test_a_collector_that_the_user_switched_off_stays_off():
    from mpiml import memory
    gc.disable()
    try:
        with memory.without_collector():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
