"""An epoch in which rare classes come more often: which rows it draws, before their order is shuffled."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hybrid_dist.data.shuffle import shuffled


@dataclass(frozen=True, eq=False)
class Balance:
    """Square-root sampling: a class is drawn in proportion to the root of its number of rows.

    Mahajan et al., Exploring the Limits of Weakly Supervised Pretraining, ECCV 2018. An epoch is as long as the table,
    and rows without the label come once in it, as ever. A class's draws go round its rows, in a new order each round,
    and go on where the epoch before left off: in the long run no row of a class is seen more often than another.

    Args:
        rows: int64 (labelled,), class by class, rising within each.
        numbers: int64 (K,), rows of each class, 0 allowed.
        rest: int64 (unlabelled,).
    """

    rows: np.ndarray
    numbers: np.ndarray
    rest: np.ndarray

    @classmethod
    def of(cls, labels: np.ndarray) -> Balance:
        """By the labels of one classification task, int64 (rows,), -1 for none."""
        order = np.argsort(labels, kind="stable")
        rest = int(np.count_nonzero(labels < 0))
        return cls(order[rest:], np.bincount(labels[order[rest:]]), order[:rest])

    @cached_property
    def quotas(self) -> np.ndarray:
        """Draws of each class in an epoch, int64 (K,): as many as there are labelled rows, at least one a class."""
        roots = np.sqrt(self.numbers)
        exact = roots * (len(self.rows) / max(roots.sum(), 1.0))
        # No class's part is below 1: it is its root times rows over the sum of roots, and that is 1 or more.
        quotas = np.floor(exact + 1e-9).astype(np.int64)
        left = len(self.rows) - quotas.sum()
        quotas[np.argsort(quotas - exact, kind="stable")[:left]] += 1  # the largest remainders
        return quotas

    def epoch(self, seed: int, phase: str, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows that an epoch draws, and how often each has been drawn before in the phase: int64 (rows,) each.

        Not in the order that they are trained in. A pair is the same in no other epoch.
        """
        turns, rows = [np.full(len(self.rest), epoch)], [self.rest]
        starts = np.cumsum(self.numbers) - self.numbers
        for index in np.flatnonzero(self.numbers):
            start, number, quota = int(starts[index]), int(self.numbers[index]), int(self.quotas[index])
            own = self.rows[start : start + number]
            at, end = epoch * quota, (epoch + 1) * quota
            while at < end:
                turn, within = divmod(at, number)
                if within == 0 and end - at >= number:  # whole rounds: their order does not matter
                    whole = (end - at) // number
                    turns.append(np.repeat(np.arange(turn, turn + whole), number))
                    rows.append(np.tile(own, whole))
                    at += whole * number
                    continue
                some = shuffled(number, f"class/{seed}/{phase}/{index}/{turn}")[within : within + end - at]
                turns.append(np.full(len(some), turn))
                rows.append(own[some])
                at += len(some)
        return np.concatenate(turns), np.concatenate(rows)

    def draw(self, chance: random.Random) -> int:
        """One row, as likely as an epoch has it."""
        place = chance.randrange(len(self.rows) + len(self.rest))
        if place < len(self.rest):
            return int(self.rest[place])
        ends = self._ends
        index = int(np.searchsorted(ends, place - len(self.rest), side="right"))
        start = int(self.numbers[:index].sum())
        return int(self.rows[start + chance.randrange(int(self.numbers[index]))])

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum(self.quotas)
