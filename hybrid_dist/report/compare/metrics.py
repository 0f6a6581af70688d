"""Metrics of several runs over the same pictures, with their differences to the first run's and intervals of both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hybrid_dist.report.compare.bootstrap import RESAMPLES, McNemar, intervals, mcnemar
from hybrid_dist.report.compare.kinds import Values, training_task
from hybrid_dist.report.compare.pairing import PairedTask, Pairing
from hybrid_dist.training.tasks import Metrics, score


@dataclass(frozen=True)
class Figure:
    """A run's value of a metric and its difference to the first run's; None where there is none.

    `low` and `high` bound the value, `difference_low` and `difference_high` the difference, at 95 %.
    """

    value: float | None = None
    low: float | None = None
    high: float | None = None
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    p: float | None = None
    """McNemar's, of an accuracy's difference."""


@dataclass(frozen=True)
class Metric:
    """A row of the comparison."""

    name: str
    better: int
    """1 where more is better, -1 where less is."""
    source: Literal["answers", "best", "measured"]
    """What it follows from: the pictures' answers, and then it has intervals; best.json; or the model itself."""
    figures: list[Figure]
    """By run."""


Tests = dict[str, list[McNemar | None]]
"""By task of classes and run, against the first run; None where either lacks the task."""

_Key = tuple[int, str]
"""Run and metric."""


def paired_metrics(pairing: Pairing, resamples: int = RESAMPLES) -> tuple[dict[str, Metric], Tests]:
    """Every metric that some run has, `score` first, and McNemar's test of each task of classes."""
    places = range(len(pairing.runs))
    sampled = [_sampled(pairing, place) for place in places]
    told = [_reported(pairing, place) | values for place, values in enumerate(sampled)]
    own, differences = _Resampled(pairing).bounds(resamples)
    tests = {name: _tests(task) for name, task in pairing.tasks.items() if _has_right(task)}
    p = {(place, f"{task}_acc1"): test.p for task, row in tests.items() for place, test in enumerate(row) if test}

    def figure(place: int, name: str) -> Figure:
        value, first = told[place].get(name), told[0].get(name)
        low, high = own.get((place, name), (None, None))
        if place == 0 or value is None or first is None or not _comparable(pairing, place, name):
            return Figure(value, low, high)
        far, near = differences.get((place, name), (None, None))
        return Figure(value, low, high, value - first, far, near, p.get((place, name)))

    metrics = {}
    for name, better in _directions(pairing).items():
        source: Literal["answers", "best"] = "answers" if any(name in values for values in sampled) else "best"
        metrics[name] = Metric(name, better, source, [figure(place, name) for place in places])
    return {name: row for name, row in metrics.items() if any(f.value is not None for f in row.figures)}, tests


def _directions(pairing: Pairing) -> dict[str, int]:
    """The names of all metrics, in the order of a table, and whether more is better."""
    names = {"score": 1}
    for task in pairing.tasks.values():
        names |= {f"{task.name}_{key}": better for key, better in task.kind.better.items()}
        names[f"loss_{task.name}"] = -1
    return names | {"loss": -1}


def _sampled(pairing: Pairing, place: int) -> Metrics:
    """What follows from a run's answers, by training's own functions."""
    values: Metrics = {}
    each: dict[str, Metrics] = {}
    for name, task in pairing.tasks.items():
        answers = task.answers[place]
        if answers is None or not task.known.any():
            continue
        each[name] = task.kind.metrics(name, task.config, task.labels[task.known], answers.predictions[task.known])
        values |= {f"{name}_{key}": value for key, value in each[name].items()}
    if each:
        config = pairing.runs[place].config
        values["score"] = score([training_task(name, config.tasks[name]) for name in each], each)
    return values


def _reported(pairing: Pairing, place: int) -> Metrics:
    """What a run's best.json has beyond that, as far as it is about the same labelled pictures."""
    run = pairing.runs[place]
    whole = {name: pairing.tasks[name].kind for name in run.answers if pairing.tasks[name].whole[place]}
    names = [f"{name}_{key}" for name, kind in whole.items() for key in kind.better] + [
        f"loss_{name}" for name in whole
    ]
    names += ["loss"] if len(whole) == len(run.answers) else []
    return {name: run.metrics[name] for name in names if name in run.metrics}


def _comparable(pairing: Pairing, place: int, name: str) -> bool:
    """`score` and `loss` are sums over tasks: of other tasks, or by other weights, they are other metrics."""
    if name not in ("score", "loss"):
        return True
    first, other = (
        {
            task: config.share(task) if name == "score" else config.weight
            for task, config in pairing.runs[n].config.tasks.items()
            if pairing.tasks[task].known.any()
        }
        for n in (0, place)
    )
    return first == other


def _has_right(task: PairedTask) -> bool:
    return task.kind.right(task.labels[:0], task.labels[:0]) is not None


def _tests(task: PairedTask) -> list[McNemar | None]:
    right = [
        None if answers is None else task.kind.right(task.labels[task.known], answers.predictions[task.known])
        for answers in task.answers
    ]
    first = right[0]
    return [None if n == 0 or first is None or own is None else mcnemar(first, own) for n, own in enumerate(right)]


class _Resampled:
    """All runs' metrics for any weights of the pictures."""

    def __init__(self, pairing: Pairing):
        self._pairing = pairing
        self._weighted = [
            {
                name: task.kind.weighted(task.labels, answers.predictions)
                for name, task in pairing.tasks.items()
                if (answers := task.answers[place]) is not None and task.known.any()
            }
            for place in range(len(pairing.runs))
        ]
        self._keys: list[_Key] = []
        self._pairs: list[_Key] = []

    def bounds(self, resamples: int) -> tuple[dict[_Key, tuple[float | None, float | None]], ...]:
        """Low and high of each value, and of each difference to the first run's; None where it has no interval."""
        count = len(self._pairing.filenames)
        self._keys = list(self._values(np.ones((count, 1))))
        self._pairs = [
            (place, name)
            for place, name in self._keys
            if place and (0, name) in self._keys and _comparable(self._pairing, place, name)
        ]
        found = [
            (None, None) if np.isnan(pair).any() else (float(pair[0]), float(pair[1]))
            for pair in intervals(self._stacked, count, resamples)
        ]
        split = len(self._keys)
        own: dict[_Key, tuple[float | None, float | None]] = dict(zip(self._keys, found[:split], strict=True))
        return own, dict(zip(self._pairs, found[split:], strict=True))

    def _stacked(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """(N, B) → (V, B): all values, then all differences."""
        values = self._values(weights)
        differences = [values[place, name] - values[0, name] for place, name in self._pairs]
        return np.stack([*values.values(), *differences])

    def _values(self, weights: NDArray[np.float64]) -> dict[_Key, NDArray[np.float64]]:
        found: dict[_Key, NDArray[np.float64]] = {}
        for place, weighted in enumerate(self._weighted):
            each = {name: values(weights) for name, values in weighted.items()}
            for name, values in each.items():
                found |= {(place, f"{name}_{key}"): value for key, value in values.items()}
            if each:
                found[place, "score"] = self._score(place, each)
        return found

    def _score(self, place: int, each: Mapping[str, Values]) -> NDArray[np.float64]:
        """`val/score` of each column: as in training a task without a label there is left out."""
        tasks, config = self._pairing.tasks, self._pairing.runs[place].config.tasks
        qualities = np.stack([tasks[name].kind.quality(values) for name, values in each.items()])  # (T, B)
        there = ~np.isnan(qualities)
        shares = there * np.array([[config[name].share(name)] for name in each])
        total = shares.sum(0)
        return np.where(total > 0, (shares * np.where(there, qualities, 0)).sum(0) / np.where(total > 0, total, 1), 0.0)
