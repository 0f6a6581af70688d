"""What the page says about a task, by its kind. Another kind is one function here, beside compare/kinds.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybrid_dist.report import plots
from hybrid_dist.report.compare.kinds import Answers
from hybrid_dist.training.calibration import bins, calibration_error

WORST = 8
"""Mistakes of a task that are shown with their pictures."""
CLASSES = 40
"""In a matrix: those with the most mistakes."""
ROWS = 100
"""Of a table; the weakest classes."""
POINTS = 1500
"""Of a scatter."""


@dataclass(frozen=True)
class Mistake:
    """A picture that the model is furthest off with."""

    row: int
    label: str
    answer: str
    how: str
    """How sure it was, or how far off."""


@dataclass(frozen=True)
class Section:
    """A task over its labelled pictures."""

    name: str
    labelled: int
    plots: list[tuple[str, str]]
    """Caption and SVG."""
    columns: list[str]
    """Of the table; the first is text, the others figures or text."""
    rows: list[list[str]]
    left_out: str
    """What the table leaves out, if anything."""
    mistakes: list[Mistake]
    facts: dict[str, Any]
    """The same for a script."""


Build = Callable[[str, Answers, NDArray[np.bool_]], Section]
_KINDS: dict[str, Build] = {}


def register(kind: str) -> Callable[[Build], Build]:
    """Make a function the one for `tasks.NAME.kind`: of the task's name, its answers, and which have labels."""

    def add(build: Build) -> Build:
        _KINDS[kind] = build
        return build

    return add


def section(kind: str, name: str, answers: Answers, known: NDArray[np.bool_]) -> Section:
    """The section of a task with at least one label.

    Args:
        known: (N,), which of the answers' pictures carry a label.
    """
    return _KINDS[kind](name, answers, known)


@register("classification")
def _classes(name: str, answers: Answers, known: NDArray[np.bool_]) -> Section:
    places = np.flatnonzero(known)
    labels, said = answers.labels[places].astype(str), answers.predictions[places].astype(str)
    assert answers.probabilities is not None
    sure, right = answers.probabilities[places], labels == said
    rows, each = _by_class(labels, said)
    points = bins(sure, right)
    error = calibration_error(sure, right)
    wrong = np.flatnonzero(~right)
    worst = wrong[np.argsort(-sure[wrong], kind="stable")][:WORST]
    classes, counts = _confusions(labels, said)
    total = len(np.unique(np.concatenate([labels, said])))
    most = f", the {CLASSES} of {total} classes with the most mistakes" if total > CLASSES else ""
    matrix = (f"What is taken for what{most}", plots.confusion(f"confusion {name}", classes, counts))
    trust = (
        f"Calibration: expected error {error:.3f}; the larger a dot, the more answers",
        plots.reliability(f"calibration {name}", *points),
    )
    more = f"and {len(rows) - ROWS} more classes, with a higher recall" if len(rows) > ROWS else ""
    return Section(
        name, len(places), [matrix, trust],
        ["class", "labelled", "recall", "precision", "F1", "most often taken for"], rows[:ROWS], more,
        [Mistake(int(places[w]), labels[w], said[w], f"{100 * sure[w]:.0f} % sure") for w in worst],
        {"calibration_error": error, "classes": each},
    )  # fmt: skip


def _by_class(labels: NDArray[Any], said: NDArray[Any]) -> tuple[list[list[str]], dict[str, dict[str, Any]]]:
    """Table and plain values of each class that has labels, the weakest first."""
    from sklearn.metrics import precision_recall_fscore_support

    classes = np.unique(labels)
    figures = precision_recall_fscore_support(labels, said, labels=classes, zero_division=0)
    found = []
    for label, precision, recall, f1, count in zip(classes, *figures, strict=True):
        others, times = np.unique(said[(labels == label) & (said != label)], return_counts=True)
        taken = f"{others[times.argmax()]} ({times.max()})" if len(others) else ""
        found.append((str(label), int(count), float(recall), float(precision), float(f1), taken))
    found.sort(key=lambda entry: (entry[2], -entry[1], entry[0]))
    rows = [[label, f"{n:,}", f"{r:.3f}", f"{p:.3f}", f"{f:.3f}", taken] for label, n, r, p, f, taken in found]
    each = {label: {"labelled": n, "recall": r, "precision": p, "f1": f} for label, n, r, p, f, _ in found}
    return rows, each


def _confusions(labels: NDArray[Any], said: NDArray[Any]) -> tuple[list[str], NDArray[np.int64]]:
    """Classes, and how often each (row) is taken for each (column); those with the most mistakes if there are many."""
    classes, codes = np.unique(np.concatenate([labels, said]), return_inverse=True)
    true, told = codes[: len(labels)], codes[len(labels) :]
    wrong = true != told
    mistakes = np.bincount(true[wrong], minlength=len(classes)) + np.bincount(told[wrong], minlength=len(classes))
    shown = np.sort(np.argsort(-mistakes, kind="stable")[:CLASSES])
    place = np.full(len(classes), -1)
    place[shown] = np.arange(len(shown))
    both = (place[true] >= 0) & (place[told] >= 0)
    counts = np.zeros((len(shown), len(shown)), np.int64)
    np.add.at(counts, (place[true[both]], place[told[both]]), 1)
    return [str(label) for label in classes[shown]], counts


@register("regression")
def _scores(name: str, answers: Answers, known: NDArray[np.bool_]) -> Section:
    places = np.flatnonzero(known)
    labels, said = answers.labels[places], answers.predictions[places]
    off = said - labels
    worst = np.argsort(-np.abs(off), kind="stable")[:WORST]
    shown = np.linspace(0, len(places) - 1, min(len(places), POINTS)).astype(int)
    few = f", {POINTS:,} of them" if len(places) > POINTS else ""
    edges = np.linspace(0, 1, 6)
    rows, each = _by_range(labels, off, edges)
    cloud = plots.scatter(f"scatter {name}", labels[shown], said[shown])
    return Section(
        name, len(places), [(f"Prediction by label{few}", cloud)],
        ["labels from", "labelled", "mean error", "prediction − label"], rows, "",
        [Mistake(int(places[w]), f"{labels[w]:.3f}", f"{said[w]:.3f}", f"off by {off[w]:+.3f}") for w in worst],
        {"ranges": each},
    )  # fmt: skip


def _by_range(
    labels: NDArray[np.float64], off: NDArray[np.float64], edges: Sequence[float] | NDArray[np.float64]
) -> tuple[list[list[str]], list[dict[str, Any]]]:
    """Table and plain values of each range of labels that has any."""
    place = np.clip(np.digitize(labels, edges) - 1, 0, len(edges) - 2)
    rows, each = [], []
    for index in np.unique(place):
        own = off[place == index]
        low, high = float(edges[index]), float(edges[index + 1])
        rows.append([f"{low:.1f} to {high:.1f}", f"{len(own):,}", f"{np.abs(own).mean():.4f}", f"{own.mean():+.4f}"])
        mae, bias = float(np.abs(own).mean()), float(own.mean())
        each.append({"from": low, "to": high, "labelled": len(own), "mae": mae, "bias": bias})
    return rows, each
