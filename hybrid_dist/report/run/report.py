"""A run judged: everything that its page shows, as plain values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hybrid_dist.config import Config
from hybrid_dist.errors import UserError
from hybrid_dist.files import read_object
from hybrid_dist.inference.found import FoundModel, find_model
from hybrid_dist.report.compare.bootstrap import CONFIDENCE
from hybrid_dist.report.compare.metrics import Figure, Metric, paired_metrics
from hybrid_dist.report.compare.pairing import pair
from hybrid_dist.report.compare.runs import Run, read_best
from hybrid_dist.report.run.history import History, read_history
from hybrid_dist.report.run.sections import Section, section


@dataclass(frozen=True)
class Goal:
    """One of `tracking.goals`."""

    name: str
    wanted: float
    value: float | None
    reached: bool
    sure: bool
    """Its whole interval reaches it."""


@dataclass(frozen=True, eq=False)
class Report:
    """A run's newest best, judged by its validation."""

    run: Run
    found: FoundModel
    status: Mapping[str, Any]
    """status.json."""
    metrics: dict[str, Metric]
    goals: list[Goal]
    sections: list[Section]
    history: History
    warnings: list[str]

    @property
    def config(self) -> Config:
        """The run's."""
        return self.run.config

    def to_json(self) -> dict[str, Any]:
        """For a script."""
        return {
            "run": str(self.run.folder), "phase": self.run.phase, "step": self.run.step, "finished": self.run.finished,
            "pictures": len(self.run.filenames), "confidence": CONFIDENCE,
            "metrics": {name: _value(metric.figures[0]) for name, metric in self.metrics.items()},
            "goals": [asdict(goal) for goal in self.goals],
            "tasks": {found.name: {"labelled": found.labelled, **found.facts} for found in self.sections},
            "phases": [asdict(phase) for phase in self.history.phases], "starts": self.history.starts,
            "warnings": self.warnings,
        }  # fmt: skip


def _value(figure: Figure) -> dict[str, float | None]:
    return {"value": figure.value, "low": figure.low, "high": figure.high}


def make_report(folder: Path, tell: Callable[[str], None] = lambda what: None) -> Report:
    """Judge a run's newest best by its predictions_val.csv.

    Args:
        tell: Told what is being done.

    Raises:
        UserError: it is no run, or it has no best yet.
    """
    found = find_model(folder)
    if found.config is None:
        raise UserError(f"{folder} is an exported model; a run's folder would do")
    config, phase = found.config, found.description.phase
    if phase not in {entry.name for entry in config.phases}:
        raise UserError(f"{found.source}: does not say which phase the model is of; the run's best is gone")
    tell("reading predictions")
    finished = not found.note
    run = read_best(folder, config.run.name, config, phase, finished)
    pairing = pair([run])
    tell("drawing pictures anew")
    metrics, _ = paired_metrics(pairing)
    tell("looking at each task")
    sections = [
        section(config.tasks[name].kind, name, run.answers[name], task.known)
        for name, task in pairing.tasks.items()
        if task.known.any()
    ]
    return Report(
        run, found, read_object(folder / "status.json"), metrics, _goals(config, metrics), sections,
        read_history(folder, config), ([found.note] if found.note else []) + pairing.warnings,
    )  # fmt: skip


def _goals(config: Config, metrics: Mapping[str, Metric]) -> list[Goal]:
    directions = config.metrics()
    return [
        _goal(name, wanted, directions[name], metrics[name].figures[0] if name in metrics else Figure())
        for name, wanted in config.tracking.goals.items()
    ]


def _goal(name: str, wanted: float, better: int, figure: Figure) -> Goal:
    worst = figure.low if better > 0 else figure.high
    reached = figure.value is not None and better * (figure.value - wanted) >= 0
    return Goal(name, wanted, figure.value, reached, reached and worst is not None and better * (worst - wanted) >= 0)
