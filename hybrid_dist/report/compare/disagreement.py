"""Pictures on which runs disagree, those first that tell most about them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from hybrid_dist.report.compare.pairing import PairedTask, Pairing

EXAMPLES = 200
"""Of a task, that are kept; the terminal and the page show fewer."""


@dataclass(frozen=True)
class Answer:
    """What a run said."""

    text: str
    right: bool | None
    """None where there is no right and wrong."""
    probability: float | None


@dataclass(frozen=True)
class Example:
    """A picture, its label, and each run's answer; None of a run that lacks the task."""

    filename: str
    label: str
    answers: list[Answer | None]


@dataclass(frozen=True)
class Disagreement:
    """The labelled pictures of a task on which runs' answers differ."""

    task: str
    count: int
    """Of classes: how many pictures. Scores all differ a little, so there it is None in `to_json`."""
    counted: bool
    examples: list[Example]

    def to_json(self) -> dict[str, Any]:
        """For a script."""
        return {
            "task": self.task, "count": self.count if self.counted else None,
            "examples": [asdict(example) for example in self.examples],
        }  # fmt: skip


def disagreements(pairing: Pairing) -> list[Disagreement]:
    """Of each task that two runs or more have, in the order of the tasks."""
    tasks = [task for task in pairing.tasks.values() if sum(answers is not None for answers in task.answers) > 1]
    return [_of_task(task, pairing.filenames) for task in tasks]


def _of_task(task: PairedTask, filenames: list[str]) -> Disagreement:
    there = [answers for answers in task.answers if answers is not None]
    apart = np.where(task.known, task.kind.apart(task.labels, there), 0)
    differing = int(np.count_nonzero(apart))
    rows = np.argsort(-apart, kind="stable")[: min(differing, EXAMPLES)]
    counted = task.kind.right(task.labels[:0], task.labels[:0]) is not None
    return Disagreement(task.name, differing, counted, [_example(task, int(row), filenames[row]) for row in rows])


def _example(task: PairedTask, row: int, filename: str) -> Example:
    kind, one = task.kind, slice(row, row + 1)
    answers: list[Answer | None] = []
    for found in task.answers:
        if found is None:
            answers.append(None)
            continue
        right = kind.right(task.labels[one], found.predictions[one])
        sure = None if found.probabilities is None else float(found.probabilities[row])
        answers.append(Answer(kind.text(found.predictions[row]), None if right is None else bool(right[0]), sure))
    return Example(filename, kind.text(task.labels[row]), answers)
