"""A run's best of its last finished phase: where it is, and what it said about each picture of validation."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hybrid_dist.config import Config, load_config
from hybrid_dist.errors import UserError
from hybrid_dist.files import read_object
from hybrid_dist.report.compare.kinds import Answers, find_kind
from hybrid_dist.training.publish import PREDICTIONS, phase_folder


@dataclass(frozen=True, eq=False)
class Run:
    """One of the runs that are compared."""

    label: str
    """What it is called: its folder's name, or the whole path where two have the same."""
    folder: Path
    config: Config
    phase: str
    """The last finished one."""
    step: int | None
    """Of its best, whose answers these are."""
    finished: bool
    metrics: dict[str, float | None]
    """As in best.json, without `val/`."""
    filenames: list[str]
    answers: dict[str, Answers]
    """By task, rows as in `filenames`."""

    @property
    def predictions(self) -> Path:
        """The file that the answers come from."""
        return phase_folder(self.folder, self.phase) / PREDICTIONS


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read several runs.

    Raises:
        UserError: as `read_run`; or fewer than two.
    """
    if len(folders) < 2:
        raise UserError(f"{', '.join(map(str, folders))}: one run has nothing to be compared with; name two or more")
    return [read_run(folder, label) for folder, label in zip(folders, _labels(folders), strict=True)]


def _labels(folders: Sequence[Path]) -> list[str]:
    names = [folder.resolve().name for folder in folders]
    labels = [name if names.count(name) == 1 else str(folder) for folder, name in zip(folders, names, strict=True)]
    # A run beside itself is told apart by its place.
    return [
        label if labels.count(label) == 1 else f"{label} ({labels[: place + 1].count(label)})"
        for place, label in enumerate(labels)
    ]


def read_run(folder: Path, label: str) -> Run:
    """Read a run's config, best and predictions.

    Raises:
        UserError: it is no run, no phase of it is finished, or a file of the best is gone or not as it was written.
    """
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is not a run's folder (it has no config.yaml)")
    config = load_config(folder / "config.yaml")
    phases = [phase.name for phase in config.phases]
    done = _finished_phases(folder, phases)
    if not done:
        raise UserError(f"{folder}: no phase is finished yet; when {phases[0]} is, its best can be compared")
    return read_best(folder, label, config, done[-1], finished=done == phases)


def read_best(folder: Path, label: str, config: Config, phase: str, finished: bool) -> Run:
    """Read a phase's best and its predictions.

    Raises:
        UserError: a file of the best is gone or not as it was written.
    """
    best_file = phase_folder(folder, phase) / "best.json"
    best = read_object(best_file)
    if not isinstance(best.get("metrics"), dict):
        raise UserError(f"{best_file}: can't be read as what training writes; the run's best is gone")
    filenames, answers = _read_predictions(phase_folder(folder, phase) / PREDICTIONS, config)
    return Run(
        label=label, folder=folder, config=config, phase=phase, step=best.get("step"), finished=finished,
        metrics={key.removeprefix("val/"): value for key, value in best["metrics"].items()},
        filenames=filenames, answers=answers,
    )  # fmt: skip


def _finished_phases(folder: Path, phases: list[str]) -> list[str]:
    """Phases come in order: those before the one in status.json are finished, and all where there is a model."""
    if (folder / "model" / "model.json").is_file():
        return phases
    status = read_object(folder / "status.json")
    if status.get("phase") not in phases:
        return []
    return phases[: phases.index(status["phase"]) + (status.get("state") == "finished")]


def _read_predictions(file: Path, config: Config) -> tuple[list[str], dict[str, Answers]]:
    columns = _columns(file)
    filenames = columns.get("filename")
    if not filenames:
        raise UserError(f"{file}: no column filename, or no row; hybrid-dist evaluate RUN --out FILE writes it anew")
    answers = {}
    for name, task in config.tasks.items():
        kind = find_kind(task.kind)
        needed = [f"{name}_{part}" for part in kind.parts]
        missing = [column for column in needed if column not in columns]
        if missing:
            raise UserError(f"{file}: no column {', '.join(missing)} for task {name}; there are {', '.join(columns)}")
        try:
            answers[name] = kind.read([columns[column] for column in needed])
        except ValueError as error:
            raise UserError(f"{file}: {name}: {error}; training does not write that") from None
    return filenames, answers


def _columns(file: Path) -> dict[str, list[str]]:
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            header, *rows = csv.reader(stream)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file}: can't be read: {error}") from None
    except ValueError:  # nothing to unpack
        raise UserError(f"{file}: is empty") from None
    odd = next((line for line, row in enumerate(rows, start=2) if len(row) != len(header)), None)
    if odd is not None:
        raise UserError(f"{file}: row {odd} has another number of cells than the header; was it cut off?")
    return {name: [row[place] for row in rows] for place, name in enumerate(header)}
