"""Rare classes in the loss: what their rarity in the training table is made up for by. Another way is one function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BETA = 0.999
"""Of the effective number: classes of much fewer than 1 / (1 − β) samples count by their number, larger ones alike."""
TAU = 1.0
"""Of logit adjustment; at 1 it is consistent for the mean of the classes' accuracies."""


@dataclass(frozen=True)
class Tail:
    """What training's loss of a task does about rare classes: float32 (K,) each, or None for nothing.

    weights: factors of the samples' losses, by true class; their mean over the training labels is 1, so that the
        loss is normalised as without them.
    shifts: what is added to the logits in training.
    """

    weights: NDArray[np.float32] | None = None
    shifts: NDArray[np.float32] | None = None

    @property
    def heaviest(self) -> float:
        """The largest factor."""
        return float(self.weights.max()) if self.weights is not None else 1.0


def balanced(counts: NDArray[np.int64]) -> Tail:
    """Weights by the inverse of the effective number of samples, (1 − βⁿ) / (1 − β).

    Cui et al., Class-Balanced Loss Based on Effective Number of Samples, CVPR 2019. A class that training never saw
    has no sample to weigh: 0.
    """
    seen = counts > 0
    inverse = np.zeros(len(counts))
    inverse[seen] = (1 - BETA) / -np.expm1(counts[seen] * np.log(BETA))
    return Tail(weights=(inverse * counts.sum() / (inverse * counts).sum()).astype(np.float32))


def logit_adjusted(counts: NDArray[np.int64]) -> Tail:
    """Logits plus τ · log of the class's share: the head learns what is left when rarity is taken out.

    Menon et al., Long-Tail Learning via Logit Adjustment, ICLR 2021. A class that training never saw
    counts as if it had been seen once: log 0 would make a smoothed loss infinite.
    """
    seen = np.maximum(counts, 1)
    return Tail(shifts=(TAU * np.log(seen / seen.sum())).astype(np.float32))


TAILS: dict[str, Callable[[NDArray[np.int64]], Tail]] = {
    "none": lambda counts: Tail(),
    "balanced": balanced,
    "logit_adjusted": logit_adjusted,
}
"""By `tasks.NAME.tail`: from the training labels of each class, int64 (K,)."""
