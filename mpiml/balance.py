"""Whether all ranks have as much to compute: ranks that have more keep the others waiting in every step."""

import numpy as np

_NAMED = 3  # ranks in a sentence


def imbalance(compute, threshold=1.2, least=1.0):
    """Which ranks compute longer than most, in words.

    Parameters
    ----------
    compute : (ranks,) array of seconds
        What each rank spent on computing in the same steps, such as ``Watch.times(grid)["compute"]``.
    threshold : float
        Ranks above so many times the median are named. Of an even number of ranks it is the lower of the two in the
        middle: of two ranks, the slower is compared with the faster.
    least : float
        Seconds; if no rank has computed as long, differences mean nothing.

    Returns
    -------
    str or None
        None if all is well.

    Examples
    --------
    >>> imbalance([4.0, 4.1, 3.9, 5.6])
    'rank 3 computes 1.4 times as long as the median of all ranks (5.6 s, 4.0 s): the others wait for it'
    >>> imbalance([4.0, 4.1, 3.9, 4.2])
    """
    compute = np.asarray(compute, float)
    if compute.size < 2 or not np.isfinite(compute).all() or compute.max() < least:
        return None
    median = np.sort(compute)[(compute.size - 1) // 2]
    slowest = np.argsort(-compute, kind="stable")
    slow = slowest[compute[slowest] > threshold * median].tolist()
    if not slow:
        return None
    named = [str(rank) for rank in slow[:_NAMED]]
    last = named.pop() if len(slow) == len(named) else f"{len(slow) - _NAMED} more"
    one = len(slow) == 1
    who = f"rank{'' if one else 's'} {' and '.join([', '.join(named), last] if named else [last])}"
    longest = f"{compute[slow[0]]:.1f} s"
    if median == 0:
        how = f"{'' if one else 'up to '}{longest}, and half of the ranks nothing"
    else:
        how = (f"{'' if one else 'up to '}{compute[slow[0]] / median:.1f} times as long as the median of all ranks "
               f"({longest}, {median:.1f} s)")
    return f"{who} compute{'s' if one else ''} {how}: the others wait for {'it' if one else 'them'}"
