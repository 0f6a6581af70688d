"""Runs beside each other: the whole comparison, as plain values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid_dist.report.compare.bootstrap import CONFIDENCE, RESAMPLES, SEED
from hybrid_dist.report.compare.cost import Cost, measure
from hybrid_dist.report.compare.disagreement import Disagreement, disagreements
from hybrid_dist.report.compare.metrics import Figure, Metric, Tests, paired_metrics
from hybrid_dist.report.compare.pairing import pair
from hybrid_dist.report.compare.runs import Run, read_runs

COSTS = ("parameters", "latency_ms", "memory_gb")
"""Rows below the metrics; they have no intervals."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """Runs on the pictures that they share; the first is what the others are compared with."""

    runs: list[Run]
    pictures: int
    labelled: dict[str, int]
    """By task."""
    metrics: dict[str, Metric]
    tests: Tests
    disagreements: list[Disagreement]
    warnings: list[str]

    def to_json(self) -> dict[str, Any]:
        """For a script."""
        runs = [
            {
                "name": run.label, "folder": str(run.folder), "phase": run.phase, "step": run.step,
                "finished": run.finished, "predictions": str(run.predictions),
                "metrics": {name: vars(metric.figures[place]) for name, metric in self.metrics.items()},
                "mcnemar": {task: vars(test) if (test := row[place]) else None for task, row in self.tests.items()},
            }
            for place, run in enumerate(self.runs)
        ]  # fmt: skip
        return {
            "runs": runs, "pictures": self.pictures, "labelled": self.labelled, "confidence": CONFIDENCE,
            "resamples": RESAMPLES, "seed": SEED, "warnings": self.warnings,
            "disagreements": [found.to_json() for found in self.disagreements],
        }  # fmt: skip


def compare(folders: Sequence[Path], tell: Callable[[str], None] = lambda what: None) -> Comparison:
    """Compare runs by their predictions for validation, and by what they cost.

    Args:
        tell: Told what is being done.

    Raises:
        UserError: a run can't be read, or they can't be compared.
    """
    runs = read_runs(folders)
    pairing = pair(runs)
    unfinished = [
        f"{run.label} is not finished: this is the best of its phase {run.phase}" for run in runs if not run.finished
    ]
    tell("drawing pictures anew")
    metrics, tests = paired_metrics(pairing)
    tell("measuring how long an answer takes")
    costs, lacking = measure(runs)
    return Comparison(
        runs=runs, pictures=len(pairing.filenames),
        labelled={name: int(task.known.sum()) for name, task in pairing.tasks.items()},
        metrics=metrics | {name: _cost(name, costs) for name in COSTS}, tests=tests,
        disagreements=disagreements(pairing), warnings=unfinished + pairing.warnings + lacking,
    )  # fmt: skip


def _cost(name: str, costs: Sequence[Cost]) -> Metric:
    values: list[float | None] = [getattr(cost, name) for cost in costs]
    first = values[0]
    figures = [
        Figure(value, difference=None if place == 0 or value is None or first is None else value - first)
        for place, value in enumerate(values)
    ]
    return Metric(name, -1, "measured", figures)
