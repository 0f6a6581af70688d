"""Whether labels of what is one picture agree."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hybrid_dist.data.check.tables import Split

TOLERANCE = 0.1
"""Scores of one picture may differ by so much: people don't see more exactly, and no model is asked to."""


def contradiction(rows: Sequence[tuple[Split, int]], scores: bool = True) -> str:
    """In which tasks the rows' labels contradict each other, such as `type: 'A320', 'ATR72'`; empty if in none.

    A blank contradicts nothing. Without `scores`, classes alone count: a blurred copy rightly has another clarity.
    """
    told = []
    for task in dict.fromkeys(task for split, _ in rows if split.table is not None for task in split.table.labels):
        values = [
            (split, split.table.labels[task][row])
            for split, row in rows
            if split.table is not None and task in split.table.labels
        ]
        if values[0][1].dtype.kind == "f":
            numbers = np.array([value for _, value in values])
            numbers = numbers[~np.isnan(numbers)]
            if scores and len(numbers) and numbers.max() - numbers.min() > TOLERANCE:
                told.append(f"{task}: {numbers.min():g}, {numbers.max():g}")
            continue
        # By name: where training's map could not be had, each split has its own.
        classes = sorted({split.survey.class_maps[task].classes[value] for split, value in values if value >= 0})
        if len(classes) > 1:
            shown = ", ".join(repr(name) for name in classes[:4]) + (", …" if len(classes) > 4 else "")
            told.append(f"{task}: {shown}")
    return "; ".join(told)
