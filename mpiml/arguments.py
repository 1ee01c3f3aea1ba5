"""Kinds of values on a command line: what ``type`` may be in ``argparse``'s ``add_argument``."""

import argparse
from pathlib import Path


def count(text):
    """A whole number above 0."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"a whole number above 0, not {text}")
    return number


def duration(text):
    """A time, 0 or more."""
    number = float(text)
    if not number >= 0:
        raise argparse.ArgumentTypeError(f"a time is 0 or more, not {text}")
    return number


def new_file(text):
    """The path of a file that will be written, in a folder that there is."""
    if not Path(text).absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: there is no such folder")
    return text
