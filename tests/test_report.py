"""What a run's log becomes: words, text and a page."""

import numpy as np
import pytest

from mpiml.balance import imbalance


def test_slow_ranks_are_named():
    assert imbalance([1, 1.4]).startswith("rank 1 computes 1.4 times as long as the median of all ranks (1.4 s, 1.0 s)")
    assert imbalance([1, 1, 2.5, 2]).startswith("ranks 2 and 3 compute up to 2.5 times")
    many = imbalance([*[1] * 60, 2, 2, 2, 1.5, 3])
    assert many.startswith("ranks 64, 60, 61 and 2 more compute up to 3.0 times") and many.endswith("wait for them")
    assert "rank 3 computes 3.0 s, and half of the ranks nothing" in imbalance([0, 0, 0, 3])


@pytest.mark.parametrize("compute", [[], [3], [4, 4, 4.1], [1, 2, 2, 2], [0.01, 0.9], [0, 0], [1, np.nan]], ids=str)
def test_balanced_or_meaningless_times_are_not_spoken_of(compute):
    assert imbalance(compute) is None


def test_what_counts_as_slow_and_as_long_can_be_chosen():
    assert imbalance([1, 1.4], threshold=1.5) is None
    assert imbalance([0.01, 0.02], least=0.01)
