"""How sure a difference is: percentile intervals from resampled pictures, and McNemar's test."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
CONFIDENCE = 0.95
SEED = 0
"""The same predictions give the same intervals, and a gate the same verdict."""

_CELLS = 1 << 19
"""Pictures times resamples that are held at a time: 4 MB of each array."""


def intervals(
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]], pictures: int, resamples: int = RESAMPLES
) -> NDArray[np.float64]:
    """Percentile intervals of several values at once, over the same resamples of the pictures.

    Pictures are drawn with replacement, each with the answers of all runs, so that what makes a picture hard for all
    of them cancels out of a difference (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 8, 13).

    Args:
        statistic: From (N, B), how often each picture was drawn in each of B resamples, to (V, B) values.

    Returns:
        (V, 2): low and high; NaN for a value that some resample lacks, for want of labels.
    """
    from scipy.stats import bootstrap

    def of_rows(rows: NDArray[np.int64], axis: int) -> NDArray[np.float64]:
        # What was drawn (B, N) becomes how often (N, B), pictures in rows: sums over them are then products.
        flat = rows.T * len(rows) + np.arange(len(rows))
        return statistic(np.bincount(flat.ravel(), minlength=rows.size).reshape(-1, len(rows)).astype(np.float64))

    if pictures < 2:
        return np.full((len(statistic(np.ones((pictures, 1)))), 2), np.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of values that have no interval
        found = bootstrap(
            (np.arange(pictures),), of_rows, vectorized=True, n_resamples=resamples, method="percentile",
            batch=max(1, _CELLS // pictures), confidence_level=CONFIDENCE, rng=np.random.default_rng(SEED),
        )  # fmt: skip
    return np.stack(found.confidence_interval, axis=-1)


@dataclass(frozen=True)
class McNemar:
    """Two runs over the same labelled pictures: those that one of them alone has right."""

    first: int
    second: int
    p: float
    """Two-sided, exact: how likely is so unequal a share of them, were both equally good?"""


def mcnemar(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> McNemar:
    """McNemar's test (Psychometrika 12, 1947) in its exact form, a binomial test, for any counts.

    Args:
        first, second: (N,), where each is right.
    """
    from scipy.stats import binomtest

    one, other = int((first & ~second).sum()), int((second & ~first).sum())
    p = float(binomtest(one, one + other).pvalue) if one + other else 1.0
    return McNemar(one, other, p)
