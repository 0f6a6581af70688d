"""How the answers to a task are compared, by its kind. Another kind is one class here, beside training/tasks.py."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from hybrid_dist.config import METRICS, TaskConfig
from hybrid_dist.errors import UserError
from hybrid_dist.training.tasks import Metrics, Task, make_tasks

Values = dict[str, NDArray[np.float64]]
"""Metrics by name, each (B,): one for each column of weights."""

Weighted = Callable[[NDArray[np.float64]], Values]
"""From (N, B), how often each picture counts in each of B resamples, to the metrics; NaN where there is none."""


@dataclass(frozen=True, eq=False)
class Answers:
    """A run's rows of one task: labels and predictions (N,), and how sure it was (N,) where the kind says so."""

    labels: NDArray[Any]
    predictions: NDArray[Any]
    probabilities: NDArray[np.float64] | None

    def take(self, rows: NDArray[np.int64]) -> Answers:
        """These rows alone, in this order."""
        sure = None if self.probabilities is None else self.probabilities[rows]
        return Answers(self.labels[rows], self.predictions[rows], sure)


class Kind(ABC):
    """What comparing asks of a kind of task."""

    better: ClassVar[Mapping[str, int]]
    """Each metric: 1 where more is better, -1 where less is."""
    parts: ClassVar[tuple[str, ...]] = ("label", "prediction")
    """Columns of predictions_val.csv, after the task's name."""

    @abstractmethod
    def read(self, columns: Sequence[Sequence[str]]) -> Answers:
        """Cells of `parts`, each (N,), as values. Raises ValueError at one that is none."""

    @abstractmethod
    def known(self, labels: NDArray[Any]) -> NDArray[np.bool_]:
        """(N,): which pictures carry a label."""

    @abstractmethod
    def same(self, labels: NDArray[Any], others: NDArray[Any]) -> NDArray[np.bool_]:
        """(N,): which labels agree; asked where both are known."""

    @abstractmethod
    def metrics(self, name: str, config: TaskConfig, labels: NDArray[Any], predictions: NDArray[Any]) -> Metrics:
        """Training's own metrics over N ≥ 1 labelled pictures, those that predictions_val.csv suffices for."""

    @abstractmethod
    def weighted(self, labels: NDArray[Any], predictions: NDArray[Any]) -> Weighted:
        """The same metrics for any weights of the pictures at once; blank labels count nowhere."""

    @abstractmethod
    def quality(self, values: Values) -> NDArray[np.float64]:
        """(B,): the task's part in `val/score`, as in training."""

    def right(self, labels: NDArray[Any], predictions: NDArray[Any]) -> NDArray[np.bool_] | None:
        """(N,): which answers are right, where there is a right and a wrong."""
        return None

    @abstractmethod
    def apart(self, labels: NDArray[Any], answers: Sequence[Answers]) -> NDArray[np.float64]:
        """(N,): how far several runs' answers lie apart; 0 where they agree."""

    @abstractmethod
    def text(self, value: Any) -> str:
        """A label or a prediction, for people; blank for no label."""


_KINDS: dict[str, type[Kind]] = {}


def register(name: str) -> Callable[[type[Kind]], type[Kind]]:
    """Make a class the one of this `tasks.NAME.kind`."""

    def add(cls: type[Kind]) -> type[Kind]:
        _KINDS[name] = cls
        return cls

    return add


def find_kind(name: str) -> Kind:
    """The kind of that name.

    Raises:
        UserError: tasks of this kind can't be compared.
    """
    if name not in _KINDS:
        raise UserError(f"tasks of kind {name} can't be compared; {', '.join(_KINDS)} can")
    return _KINDS[name]()


def training_task(name: str, config: TaskConfig, classes: tuple[str, ...] = ()) -> Task:
    """The task as training has it: its metrics are the ones to compare by."""
    return make_tasks({name: config}, {name: classes})[0]


@register("classification")
class Classification(Kind):
    """Classes by name, the most probable one of each run."""

    better: ClassVar[Mapping[str, int]] = METRICS["classification"]
    parts: ClassVar[tuple[str, ...]] = ("label", "prediction", "probability")

    def read(self, columns: Sequence[Sequence[str]]) -> Answers:
        labels, predictions, sure = columns
        if not all(predictions):
            raise ValueError("a prediction is blank")
        probabilities = np.array(sure, np.float64)
        if not ((probabilities >= 0) & (probabilities <= 1)).all():
            raise ValueError("a probability is not between 0 and 1")
        return Answers(np.array(labels, object), np.array(predictions, object), probabilities)

    def known(self, labels: NDArray[Any]) -> NDArray[np.bool_]:
        return np.asarray(labels != "", np.bool_)

    def same(self, labels: NDArray[Any], others: NDArray[Any]) -> NDArray[np.bool_]:
        return np.asarray(labels == others, np.bool_)

    def metrics(self, name: str, config: TaskConfig, labels: NDArray[Any], predictions: NDArray[Any]) -> Metrics:
        classes, codes = np.unique(np.concatenate([labels, predictions]), return_inverse=True)
        told = np.zeros((len(labels), len(classes)), np.float32)
        told[np.arange(len(labels)), codes[len(labels) :]] = 1
        found = training_task(name, config, tuple(classes)).metrics(told, codes[: len(labels)])
        return {key: found[key] for key in ("acc1", "f1")}  # the five most probable are not in the file

    def weighted(self, labels: NDArray[Any], predictions: NDArray[Any]) -> Weighted:
        from scipy.sparse import csr_array

        rows = np.flatnonzero(self.known(labels))
        truth, said = labels[rows], predictions[rows]
        classes, codes = np.unique(np.concatenate([truth, said]), return_inverse=True)
        true, told = codes[: len(rows)], codes[len(rows) :]
        hit = true == told
        # (3, K) rows over N pictures: right, labelled and predicted of each class; three entries a picture at most.
        count = len(classes)
        lines = np.concatenate([true[hit], count + true, 2 * count + told])
        places = np.concatenate([rows[hit], rows, rows])
        table = csr_array((np.ones(len(lines)), (lines, places)), shape=(3 * count, len(labels)))

        def values(weights: NDArray[np.float64]) -> Values:
            right, labelled, predicted = (table @ weights).reshape(3, count, -1)
            there = labelled > 0  # a class that nobody labelled has no recall: as in training it is left out
            with np.errstate(invalid="ignore", divide="ignore"):
                f1 = np.where(there, 2 * right / (labelled + predicted), 0).sum(0) / there.sum(0)
                return {"acc1": right.sum(0) / labelled.sum(0), "f1": f1}

        return values

    def quality(self, values: Values) -> NDArray[np.float64]:
        return values["acc1"]

    def right(self, labels: NDArray[Any], predictions: NDArray[Any]) -> NDArray[np.bool_]:
        return np.asarray(labels == predictions, np.bool_)

    def apart(self, labels: NDArray[Any], answers: Sequence[Answers]) -> NDArray[np.float64]:
        """Over 2 where some are right and others not, over 1 where all are wrong; the surer, the further apart."""
        said = np.stack([answer.predictions for answer in answers])
        sure = np.mean([answer.probabilities for answer in answers if answer.probabilities is not None], axis=0)
        differ = (said != said[0]).any(axis=0)
        decided = (said == labels).any(axis=0)
        return np.where(differ, 1 + sure + decided, 0.0)

    def text(self, value: Any) -> str:
        return str(value)


@register("regression")
class Regression(Kind):
    """Scores in 0–1."""

    better: ClassVar[Mapping[str, int]] = METRICS["regression"]

    def read(self, columns: Sequence[Sequence[str]]) -> Answers:
        labels, predictions = columns
        known = np.array([float(cell) if cell else np.nan for cell in labels], np.float64)
        told = np.array(predictions, np.float64)
        if not np.isfinite(told).all():
            raise ValueError("a prediction is not a number")
        return Answers(known, told, None)

    def known(self, labels: NDArray[Any]) -> NDArray[np.bool_]:
        return ~np.isnan(labels)

    def same(self, labels: NDArray[Any], others: NDArray[Any]) -> NDArray[np.bool_]:
        return np.isclose(labels, others, rtol=0, atol=1e-5)  # the file has six digits

    def metrics(self, name: str, config: TaskConfig, labels: NDArray[Any], predictions: NDArray[Any]) -> Metrics:
        return training_task(name, config).metrics(predictions, labels)

    def weighted(self, labels: NDArray[Any], predictions: NDArray[Any]) -> Weighted:
        known = self.known(labels)
        truth, told = np.where(known, labels, 0), np.where(known, predictions, 0)
        error = told - truth
        # Around their means: sums of squares of what is far from zero would leave few digits for the correlation.
        far, near = (np.where(known, side - side[known].mean(), 0) for side in (told, truth))
        constant = any(np.ptp(side[known]) == 0 for side in (told, truth))
        sums = np.stack([known, np.abs(error), error**2, far, near, far**2, near**2, far * near])  # (8, N)

        def values(weights: NDArray[np.float64]) -> Values:
            with np.errstate(invalid="ignore", divide="ignore"):
                total, absolute, square, x, y, xx, yy, xy = sums @ weights
                spread = (xx - x * x / total) * (yy - y * y / total)
                corr = (xy - x * y / total) / np.sqrt(np.where(spread > 1e-18, spread, np.nan))
                corr = np.full_like(corr, np.nan) if constant else np.clip(corr, -1, 1)
                return {"mae": absolute / total, "rmse": np.sqrt(square / total), "corr": corr}

        return values

    def quality(self, values: Values) -> NDArray[np.float64]:
        return 1 - values["mae"]

    def apart(self, labels: NDArray[Any], answers: Sequence[Answers]) -> NDArray[np.float64]:
        return np.asarray(np.ptp(np.stack([answer.predictions for answer in answers]), axis=0), np.float64)

    def text(self, value: Any) -> str:
        return "" if np.isnan(value) else f"{value:.3f}"
