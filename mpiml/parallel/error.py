"""What all ranks raise together, and how ranks are written down."""

_SPANS = 6  # of numbers in a line


class RankError(RuntimeError):
    """An error that all ranks found together; ``ranks`` are those that caused it."""

    def __init__(self, message, ranks):
        super().__init__(message)
        self.ranks = ranks


class RanksLost(RuntimeError):
    """Ranks died, and the others go on as a smaller grid: what was under way was undone and is to be tried again."""


def names(ranks):
    """Ranks as people write them: ``rank 3``, or ``ranks 0-2, 5``."""
    return f"rank{'s' * (len(ranks) > 1)} {spans(ranks)}"


def spans(numbers):
    """Whole numbers in ascending order as ``0-2, 5``."""
    runs = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    more = sum(last - first + 1 for first, last in runs[_SPANS:])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs[:_SPANS]) + (
        f" and {more} more" if more else "")
