"""A comparison as one self-contained page: figures, gates, and the pictures on which the runs disagree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hybrid_dist.report.album import Album
from hybrid_dist.report.compare.comparison import Comparison
from hybrid_dist.report.compare.disagreement import Answer, Disagreement
from hybrid_dist.report.compare.gates import Verdict
from hybrid_dist.report.compare.metrics import Figure, Metric
from hybrid_dist.report.compare.text import difference_text, legend, p_text, summaries, value_text, verdict_of
from hybrid_dist.report.page import render

PICTURES = 24
"""Of a task, on the page; `--json` has more."""


def comparison_page(comparison: Comparison, verdicts: Sequence[Verdict]) -> str:
    """The page's HTML. It asks nothing of the network and runs nothing; what comes from runs and data is escaped."""
    album = Album(run.config.data.val_images for run in comparison.runs)
    return render(
        "compare.html.j2",
        runs=comparison.runs,
        warnings=comparison.warnings,
        verdicts=verdicts,
        held=all(verdict.held for verdict in verdicts),
        legend=legend(comparison),
        rows=[_row(metric) for metric in comparison.metrics.values()],
        disagreements=[_disagreement(comparison, found, album) for found in comparison.disagreements if found.examples],
    )


@dataclass(frozen=True)
class _Bar:
    """An interval of a difference on a scale of 0 to 100, no difference at 50."""

    low: float
    high: float
    point: float


def _row(metric: Metric) -> dict[str, Any]:
    """A metric's cells by run; the intervals of a row share one scale."""
    edges = [abs(edge) for f in metric.figures for edge in (f.difference_low, f.difference_high) if edge is not None]
    scale = max(edges, default=0.0) * 1.1 or 1.0
    cells = [
        {
            "value": value_text(metric, figure.value), "difference": difference_text(metric, figure),
            "p": p_text(figure.p), "verdict": verdict_of(metric, figure), "bar": _bar(figure, scale),
        }
        for figure in metric.figures
    ]  # fmt: skip
    return {"name": metric.name, "better": "more" if metric.better > 0 else "less", "cells": cells}


def _bar(figure: Figure, scale: float) -> _Bar | None:
    if figure.difference is None or figure.difference_low is None or figure.difference_high is None:
        return None
    return _Bar(*(50 + 50 * x / scale for x in (figure.difference_low, figure.difference_high, figure.difference)))


def _disagreement(comparison: Comparison, found: Disagreement, album: Album) -> dict[str, Any]:
    shown = found.examples[:PICTURES]
    examples = [
        {
            "filename": example.filename, "label": example.label, "picture": album.copy(example.filename),
            "answers": [
                {"run": run.label, "text": _sure(answer), "mark": _mark(answer)}
                for run, answer in zip(comparison.runs, example.answers, strict=True)
                if answer is not None
            ],
        }
        for example in shown
    ]  # fmt: skip
    more = found.count - len(shown) if found.counted else 0
    return {"task": found.task, "summaries": summaries(comparison, found), "examples": examples, "more": more}


def _sure(answer: Answer) -> str:
    return answer.text if answer.probability is None else f"{answer.text} ({answer.probability:.2f})"


def _mark(answer: Answer) -> str:
    return "" if answer.right is None else "better" if answer.right else "worse"
