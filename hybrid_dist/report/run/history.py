"""How a run went: its lines of metrics, phase by phase, and its starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybrid_dist.config import Config
from hybrid_dist.files import read_lines, read_object
from hybrid_dist.training.publish import phase_folder
from hybrid_dist.training.starts import read_starts

POINTS = 500
"""Of a curve; of more, neighbours are taken together."""

Curve = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Steps and values, (n,) each."""


@dataclass(frozen=True)
class Phase:
    """What a phase took and brought; None where it can't be told."""

    name: str
    begins: int
    """The first step that its lines tell of."""
    steps: int
    seconds: float
    """Between its lines, without pauses between starts."""
    images_per_s: float | None
    """Median, of all processes together."""
    data_wait: float | None
    communication: float | None
    peak_memory_gb: float | None
    best_step: int | None
    best_score: float | None


@dataclass(frozen=True)
class History:
    """Lines of metrics.jsonl and of starts.jsonl."""

    lines: list[dict[str, Any]]
    starts: list[dict[str, Any]]
    phases: list[Phase]

    def curve(self, key: str) -> Curve | None:
        """A metric over all steps; None where no line has it."""
        pairs = [(line["step"], line[key]) for line in self.lines if line.get(key) is not None]
        if not pairs:
            return None
        steps, values = np.array(pairs, np.float64).T
        if len(steps) <= POINTS:
            return steps, values
        groups = np.array_split(np.arange(len(steps)), POINTS)
        return np.array([steps[g].mean() for g in groups]), np.array([values[g].mean() for g in groups])

    @property
    def begins(self) -> dict[str, int]:
        """Each phase's first step."""
        return {phase.name: phase.begins for phase in self.phases}

    @property
    def resumed(self) -> list[int]:
        """Steps at which the run was gone on with in the middle of a phase."""
        return sorted({int(start["step"]) for start in self.starts if start.get("goes_on")})


def read_history(folder: Path, config: Config) -> History:
    """Read what there is; a line that was cut off, or a file that is gone, is left out."""
    told = read_lines(folder / "metrics.jsonl")
    lines = [line for line in told if all(isinstance(line.get(key), int | float) for key in ("step", "time"))]
    starts = read_starts(folder)
    phases, begun = [], 1
    for phase in config.phases:
        own = [line for line in lines if line.get("phase") == phase.name]
        if own:
            phases.append(_phase(folder, phase.name, begun, own, starts))
            begun = own[-1]["step"] + 1
    return History(lines, starts, phases)


def _phase(
    folder: Path, name: str, begins: int, lines: Sequence[Mapping[str, Any]], starts: Sequence[Mapping[str, Any]]
) -> Phase:
    best = read_object(phase_folder(folder, name) / "best.json")
    peaks = [line["perf/peak_memory_gb"] for line in lines if line.get("perf/peak_memory_gb") is not None]
    return Phase(
        name=name, begins=begins, steps=lines[-1]["step"] - begins + 1, seconds=_seconds(name, lines, starts),
        images_per_s=_median(lines, "perf/images_per_s"), data_wait=_median(lines, "perf/data_wait"),
        communication=_median(lines, "perf/communication"),
        peak_memory_gb=max(peaks, default=None), best_step=best.get("step"), best_score=best.get("score"),
    )  # fmt: skip


def _seconds(name: str, lines: Sequence[Mapping[str, Any]], starts: Sequence[Mapping[str, Any]]) -> float:
    """From each start to its last line that counts; what a resume made again counts once."""
    begun = sorted(start["time"] for start in starts if start.get("phase") == name) or [lines[0]["time"]]
    total = 0.0
    for since, until in zip(begun, [*begun[1:], float("inf")], strict=True):
        own = [line["time"] for line in lines if since <= line["time"] < until]
        total += own[-1] - since if own else 0.0
    return total


def _median(lines: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [line[key] for line in lines if line.get(key) is not None]
    return float(np.median(values)) if values else None
