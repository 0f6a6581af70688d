"""Runs laid side by side: the pictures that all of them have, and the labels that all of them agree on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybrid_dist.config import TaskConfig
from hybrid_dist.errors import UserError
from hybrid_dist.report.compare.kinds import Answers, Kind, find_kind
from hybrid_dist.report.compare.runs import Run

ENOUGH = 10
"""Pictures that runs with different validation sets must share."""

FEW = 100
"""Labelled pictures below which an interval is told to be rough."""


@dataclass(frozen=True, eq=False)
class PairedTask:
    """A task over the shared pictures."""

    name: str
    kind: Kind
    config: TaskConfig
    """Of the first run that has it."""
    labels: NDArray[Any]
    """(N,): blank where a run that has the task has none, so that all runs are judged by the same pictures."""
    known: NDArray[np.bool_]
    answers: list[Answers | None]
    """By run; None where it lacks the task."""
    whole: list[bool]
    """By run: whether these are all the labelled pictures that its own validation had."""


@dataclass(frozen=True, eq=False)
class Pairing:
    """N shared pictures, as the first run has them in order."""

    runs: list[Run]
    filenames: list[str]
    tasks: dict[str, PairedTask]
    warnings: list[str]


def pair(runs: Sequence[Run]) -> Pairing:
    """Match rows by file name; the n-th row of a name goes with the n-th of the others.

    Raises:
        UserError: too few pictures are shared, a picture's labels differ, or a task is of two kinds.
    """
    keys = [_keys(run.filenames) for run in runs]
    shared = [key for key in keys[0] if all(key in other for other in keys[1:])]
    warnings = _check_shared(runs, len(shared))
    rows = [np.array([places[key] for key in shared], np.int64) for places in keys]
    names = list(dict.fromkeys(name for run in runs for name in run.answers))
    filenames = [name for name, _ in shared]
    tasks = {name: _pair_task(name, runs, rows, filenames, warnings) for name in names}
    return Pairing(list(runs), filenames, tasks, warnings)


def _keys(filenames: Sequence[str]) -> dict[tuple[str, int], int]:
    """Row by file name and how many rows of that name came before."""
    seen: Counter[str] = Counter()
    places = {}
    for row, name in enumerate(filenames):
        places[name, seen[name]] = row
        seen[name] += 1
    return places


def _check_shared(runs: Sequence[Run], shared: int) -> list[str]:
    counts = ", ".join(f"{run.label} has {len(run.filenames):,}" for run in runs)
    if all(len(run.filenames) == shared for run in runs):
        return []
    if shared < ENOUGH:
        few = f"only {shared} of their pictures are" if shared else "not one picture is"
        raise UserError(
            f"{' and '.join(str(run.predictions) for run in runs)}: {few} the same ({counts});"
            f" runs that were validated on {ENOUGH} of the same pictures or more would do"
        )
    return [f"validated on different pictures: the {shared:,} that all runs share are compared ({counts})"]


def _pair_task(
    name: str, runs: Sequence[Run], rows: Sequence[NDArray[np.int64]], filenames: Sequence[str], warnings: list[str]
) -> PairedTask:
    having = [place for place, run in enumerate(runs) if name in run.answers]
    kinds = {runs[place].config.tasks[name].kind: runs[place].label for place in having}
    if len(kinds) > 1:
        told = ", ".join(f"{kind} in {label}" for kind, label in kinds.items())
        raise UserError(f"task {name} is {told}: tasks of one name must be of one kind to be compared")
    config = runs[having[0]].config.tasks[name]
    kind = find_kind(config.kind)
    answers = [run.answers[name].take(rows[n]) if name in run.answers else None for n, run in enumerate(runs)]
    there = [answer for answer in answers if answer is not None]
    each = [kind.known(answer.labels) for answer in there]
    for place, answer, known in zip(having[1:], there[1:], each[1:], strict=True):
        _check_labels(name, kind, (runs[having[0]], there[0]), (runs[place], answer), each[0] & known, filenames)
    known = np.logical_and.reduce(each)
    partly = int((np.logical_or.reduce(each) & ~known).sum())
    if partly:
        warnings.append(f"{name}: {partly:,} pictures have a label in some of the runs alone, and count nowhere")
    if 0 < known.sum() < FEW:
        warnings.append(f"{name}: {int(known.sum()):,} labelled pictures are few; intervals are rough below {FEW}")
    whole = [
        name in run.answers and int(kind.known(run.answers[name].labels).sum()) == int(known.sum()) for run in runs
    ]
    # A blank label is what the first run that lacks it has: one of the kind's own.
    labels = there[0].labels.copy()
    for answer, mask in zip(there[1:], each[1:], strict=True):
        labels[~mask] = answer.labels[~mask]
    return PairedTask(name, kind, config, labels, known, answers, whole)


def _check_labels(
    name: str, kind: Kind, one: tuple[Run, Answers], other: tuple[Run, Answers], both: NDArray[np.bool_],
    filenames: Sequence[str],
) -> None:  # fmt: skip
    wrong = np.flatnonzero(both)[~kind.same(one[1].labels[both], other[1].labels[both])]
    if len(wrong):
        row = int(wrong[0])
        more = f" (and {len(wrong) - 1:,} more pictures)" if len(wrong) > 1 else ""
        told = " and ".join(f"{kind.text(answers.labels[row])!r} in {run.predictions}" for run, answers in (one, other))
        raise UserError(f"{filenames[row]}: its {name} is {told}{more}; runs with the same labels would do")
