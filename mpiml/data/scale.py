"""Standardising: mean 0 and standard deviation 1, from sums that are exact and so the same however the rows are divided."""

import json
import math
from fractions import Fraction

import numpy as np

from mpiml.alone import Alone

_DIGITS, _LIMBS = 18, 3  # a mantissa of 53 bits as 3 digits of 18 bits
_BLOCK = 2**20  # rows: sums of so many products of two digits fit in 64 bits


class StandardScaler:
    """Numbers with the mean taken out, divided by the standard deviation (that of all numbers: the sum is divided by n).

    Mean and deviation come from exact sums, rounded once: they have the same bits on any number of ranks, however the
    rows are divided among them and in whatever order they come.

    Parameters
    ----------
    mean, deviation : float64 arrays (k,)

    Examples
    --------
    >>> scaler = StandardScaler.fit(np.array([[1.0, 5.0], [3.0, 5.0]]))
    >>> scaler.mean.tolist(), scaler.deviation.tolist()
    ([2.0, 5.0], [1.0, 1.0])
    >>> scaler.transform(np.array([[4.0, 5.0]])).tolist()
    [[2.0, 0.0]]
    """

    def __init__(self, mean, deviation):
        self.mean, self.deviation = np.array(mean, np.float64), np.array(deviation, np.float64)

    @classmethod
    def fit(cls, x, grid=None):
        """The scaler of the columns of x, whose NaNs are missing values and are left out.

        Parameters
        ----------
        x : array (n, k)
            This rank's rows; of n = 0, too, if another rank has some.
        grid : mpiml.parallel.Grid, optional
            The ranks that hold the rows together.

        Returns
        -------
        StandardScaler
            Of a column of equal numbers the deviation is taken to be 1, so that they become 0.

        Raises
        ------
        ValueError
            A column has no numbers, an infinite one, or ones so large that their squares cannot be written down.
        """
        grid, x = grid or Alone(), np.asarray(x, np.float64)
        mine = grid.together("adding up columns", lambda: [_sums(column) for column in x.T])
        everyones = [json.loads(text) for text in grid.texts(json.dumps([list(map(str, sums)) for sums in mine]))]
        mean, deviation = [], []
        for column, parts in enumerate(zip(*everyones, strict=True)):
            n, total, squares = (sum(map(Fraction, values)) for values in zip(*parts, strict=True))
            if n == 0:
                raise ValueError(f"column {column} has no numbers to take the mean of: leave it out")
            try:
                mean.append(float(total / n))
                deviation.append(math.sqrt((n * squares - total**2) / n**2) or 1.0)
            except OverflowError as error:
                raise ValueError(f"the numbers of column {column} are too large to be standardised in float64") from error
        return cls(mean, deviation)

    def transform(self, x):
        """(x - mean) / deviation, float64 (n, k); NaNs stay."""
        return (x - self.mean) / self.deviation

    def inverse(self, z):
        """The x of which :meth:`transform` makes z."""
        return z * self.deviation + self.mean


def _sums(column):
    """(count, sum, sum of squares) of float64 numbers that are not NaN, as exact Fractions."""
    column = column[~np.isnan(column)]
    if np.isinf(column).any():
        raise ValueError("an infinite number has no place in a mean: clean(table) takes such values for missing")
    mantissas, exponents = np.frexp(column)
    mantissas = (mantissas * 2.0**53).astype(np.int64)
    weights = [2**(_DIGITS * i) for i in range(_LIMBS)]
    total = squares = Fraction(0)
    for exponent in np.unique(exponents).tolist():
        of_it = mantissas[exponents == exponent]
        unit = Fraction(2)**(exponent - 53)
        for start in range(0, len(of_it), _BLOCK):
            block = of_it[start:start + _BLOCK]
            # The last digit has the sign.
            digits = np.stack([block & 2**18 - 1, block >> 18 & 2**18 - 1, block >> 36])
            total += unit * sum(w * int(d) for w, d in zip(weights, digits.sum(axis=1), strict=True))
            products = digits @ digits.T
            squares += unit**2 * sum(weights[i] * weights[j] * int(products[i, j])
                                     for i in range(_LIMBS) for j in range(_LIMBS))
    return Fraction(len(column)), total, squares
