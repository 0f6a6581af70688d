"""report.html: one self-contained page about a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hybrid_dist.config import METRICS, without_logins
from hybrid_dist.data.annotations import read_table
from hybrid_dist.data.packed import Stale, open_packed
from hybrid_dist.data.pictures import PictureError
from hybrid_dist.errors import UserError
from hybrid_dist.inference.opened import OpenedModel, open_model
from hybrid_dist.report import plots
from hybrid_dist.report.album import Album
from hybrid_dist.report.compare.metrics import Figure, Metric
from hybrid_dist.report.page import render, small_copy
from hybrid_dist.report.run.history import History, Phase
from hybrid_dist.report.run.looks import looks, overlay
from hybrid_dist.report.run.report import Report
from hybrid_dist.report.run.sections import Mistake, Section

BRANCHES = {"cnn": "CNN", "transformer": "transformer"}


def report_page(report: Report) -> str:
    """The page's HTML. It asks nothing of the network and runs nothing; what comes from runs and data is escaped."""
    config, history = report.config, report.history
    try:
        opened = open_model(report.found)
    except torch.OutOfMemoryError:  # the training that this follows may still hold the GPU
        opened = open_model(report.found, "cpu")
    pixels = _pictures(report, opened.image_size)
    sections = [_section(found, opened, pixels, report) for found in report.sections]
    shown = [mistake["picture"] for found in sections for mistake in found["mistakes"]]
    gone = ["data.val_images can't be read from here, nor a packed copy: no pictures"] if not any(shown) else []
    return render(
        "report.html.j2",
        name=config.run.name,
        subtitle=_subtitle(report, opened),
        warnings=[*report.warnings, *(gone if shown else [])],
        cards=_cards(report),
        goals=[_goal_line(goal, report.metrics) for goal in report.goals],
        goals_reached=all(goal.reached for goal in report.goals),
        rows=[_metric_row(metric) for metric in report.metrics.values()],
        pictures=f"{len(report.run.filenames):,}",
        curves=_curves(report),
        phases=[_phase_row(phase) for phase in history.phases],
        starts=[_start_row(start) for start in history.starts],
        sections=sections,
        branches=[BRANCHES[part] for part in opened.model.branches()],
        tasks=list(config.tasks),
        data=_data_rows(report),
        model=_model_rows(report, opened),
        versions=_versions(history),
        config=without_logins(config.to_yaml()),
    )


Pixels = Callable[[str], NDArray[np.uint8] | None]
"""By file name, a picture of validation for the model's size; None of what can't be read."""


def _pictures(report: Report, size: int) -> Pixels:
    """From the packed copy that training reads, if there is one, else from the files."""
    data = report.config.data
    album = Album([data.val_images])
    try:
        table = read_table(Path(data.val_csv), Path(data.val_images), {}, {})
        packed = open_packed(table, size, None)
    except (UserError, Stale):
        packed = None
    if packed is None:
        return lambda name: album.pixels(name, size)
    rows = {table.filename(row): row for row in range(len(table))}

    def unpacked(name: str) -> NDArray[np.uint8] | None:
        try:
            return packed.picture(rows[name]) if name in rows else None
        except PictureError:
            return None

    return unpacked


def _subtitle(report: Report, opened: OpenedModel) -> str:
    run, status = report.run, report.status
    state = "finished" if run.finished else str(status.get("state", "not finished"))
    seconds = sum(phase.seconds for phase in report.history.phases)
    parts = [
        state, f"best of phase {run.phase}, step {run.step:,}", f"{opened.parameters / 1e6:.1f} M parameters",
        f"{duration(seconds)} of training",
    ]  # fmt: skip
    if report.history.starts:
        parts.append(str(report.history.starts[-1].get("topology")))
    return " · ".join(parts)


@dataclass(frozen=True)
class _Card:
    """A figure that is read first."""

    name: str
    value: str
    interval: str


def _cards(report: Report) -> list[_Card]:
    """The score, and the first metric of each task."""
    first = [f"{task}_{next(iter(METRICS[entry.kind]))}" for task, entry in report.config.tasks.items()]
    return [_card(name, report.metrics[name].figures[0]) for name in ("score", *first) if name in report.metrics]


def _card(name: str, figure: Figure) -> _Card:
    return _Card(name.replace("_", " "), _number(figure.value), _interval(figure))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _interval(figure: Figure) -> str:
    return "" if figure.low is None or figure.high is None else f"{figure.low:.4f} to {figure.high:.4f}"


def _metric_row(metric: Metric) -> dict[str, str]:
    figure = metric.figures[0]
    better = "↑" if metric.better > 0 else "↓"
    return {"name": metric.name, "better": better, "value": _number(figure.value), "interval": _interval(figure)}


def _goal_line(goal: Any, metrics: Mapping[str, Metric]) -> dict[str, Any]:
    figure = metrics[goal.name].figures[0] if goal.name in metrics else Figure()
    if goal.value is None:
        text = "validation tells nothing of it"
    elif not goal.reached:
        text = f"missed by {abs(goal.value - goal.wanted):.4f}"
    else:
        beyond = "reached" if goal.sure else "reached, but its interval is not all beyond it"
        text = beyond if figure.low is not None else "reached; it has no interval"
    return {
        "name": goal.name, "wanted": f"{goal.wanted:g}", "value": _number(goal.value), "interval": _interval(figure),
        "verdict": text, "mark": ("good" if goal.sure else "warn") if goal.reached else "bad",
    }  # fmt: skip


def _curves(report: Report) -> list[tuple[str, Any]]:
    """Caption and SVG of each plot."""
    from markupsafe import Markup

    config, history = report.config, report.history
    tasks = list(config.tasks)
    accuracies = [f"{name}_acc1" for name in tasks if config.tasks[name].kind == "classification"]
    errors = [f"{name}_mae" for name in tasks if config.tasks[name].kind == "regression"]
    wanted: list[tuple[str, Sequence[str], bool]] = [
        ("Loss", ("train/loss", "val/loss"), False),
        ("Score and accuracy in validation", [f"val/{name}" for name in ("score", *accuracies)], False),
        ("Mean error of scores in validation", [f"val/{name}" for name in errors], False),
        ("Training loss by task, before weights", [f"train/loss_{name}" for name in tasks], True),
        ("Learning rate", ("train/lr",), False),
        ("Gradient norm", ("train/grad_norm",), True),
        ("Pictures a second", ("perf/images_per_s",), False),
        ("Model FLOPs utilisation", ("perf/mfu",), False),
    ]
    drawn = []
    for caption, keys, log in wanted:
        found = {key: curve for key in keys if (curve := history.curve(key)) is not None}
        svg = plots.curves(caption, found, history.begins, history.resumed, log)
        if svg:
            drawn.append((caption, Markup(svg)))
    return drawn


def duration(seconds: float) -> str:
    """For people: `1 h 12 min`, `3 min 5 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _phase_row(phase: Phase) -> list[str]:
    def shown(value: float | None, form: str) -> str:
        return "" if value is None else form.format(value)

    return [
        phase.name, f"{phase.steps:,}", duration(phase.seconds), shown(phase.images_per_s, "{:.0f}"),
        shown(phase.data_wait, "{:.1%}"), shown(phase.communication, "{:.1%}"), shown(phase.peak_memory_gb, "{:.2f}"),
        shown(phase.best_step, "{:,}"), shown(phase.best_score, "{:.4f}"),
    ]  # fmt: skip


def _start_row(start: Mapping[str, Any]) -> list[str]:
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(float(start.get("time", 0))))
    how = "gone on with" if start.get("goes_on") else "begun"
    return [when, str(start.get("phase")), how, f"{start.get('step', 0):,}", str(start.get("topology"))]


def _section(found: Section, opened: OpenedModel, pixels: Pixels, report: Report) -> dict[str, Any]:
    from markupsafe import Markup

    return {
        "name": found.name, "labelled": f"{found.labelled:,}", "columns": found.columns, "rows": found.rows,
        "left_out": found.left_out, "mistakes": _mistakes(found, opened, pixels, report.run.filenames),
        # The plots are this project's own SVG, in which matplotlib has escaped the names.
        "plots": [(caption, Markup(svg)) for caption, svg in found.plots],
    }  # fmt: skip


def _mistakes(found: Section, opened: OpenedModel, pixels: Pixels, filenames: Sequence[str]) -> list[dict[str, Any]]:
    """Each with its picture, as the model sees it, and where the branches looked; without, where it can't be read."""
    names = [filenames[mistake.row] for mistake in found.mistakes]
    squares = {place: opened.fit(one, (), 0) for place, name in enumerate(names) if (one := pixels(name)) is not None}
    seen = _seen(found, opened, squares)
    return [
        {
            "filename": name, "label": mistake.label, "answer": mistake.answer, "how": mistake.how,
            "picture": small_copy(squares[place]) if place in squares else None, "looks": seen.get(place, []),
        }
        for place, (name, mistake) in enumerate(zip(names, found.mistakes, strict=True))
    ]  # fmt: skip


def _seen(found: Section, opened: OpenedModel, squares: Mapping[int, NDArray[np.uint8]]) -> dict[int, list[Any]]:
    """For each picture the branches' names, with the picture under what they looked at."""
    if not squares:
        return {}
    images = torch.from_numpy(np.stack(list(squares.values()))).permute(0, 3, 1, 2)
    heats = looks(opened, images, found.name, _chosen(opened, found, [found.mistakes[place] for place in squares]))
    # A map that the answer does not follow, as of a backbone that pools a class token, would look like a finding.
    heats = {part: heat for part, heat in heats.items() if heat.any()}
    return {
        place: [(BRANCHES[part], small_copy(overlay(square, heat[n]))) for part, heat in heats.items()]
        for n, (place, square) in enumerate(squares.items())
    }


def _chosen(opened: OpenedModel, found: Section, mistakes: Sequence[Mistake]) -> NDArray[np.int64] | None:
    """The classes that were said; None of a score."""
    if found.name not in opened.classes:
        return None
    place = {label: index for index, label in enumerate(opened.classes[found.name])}
    try:
        return np.array([place[mistake.answer] for mistake in mistakes], np.int64)
    except KeyError as error:
        raise UserError(
            f"predictions of {found.name}: {error.args[0]} is no class of the model; is it another run's?"
        ) from None


def _data_rows(report: Report) -> list[list[str]]:
    """Split, pictures and labelled pictures by task, as training found them."""
    tasks = list(report.config.tasks)
    return [
        [name, f"{split.pictures:,}", *(f"{split.labels.get(task, 0):,}" for task in tasks)]
        for name, split in report.found.description.data.items()
    ]


def _model_rows(report: Report, opened: OpenedModel) -> list[tuple[str, str]]:
    model = report.config.model
    branches = {"CNN": model.cnn, "transformer": model.transformer}
    named = [(part, f"{branch.name}, from {branch.weights}") for part, branch in branches.items() if branch is not None]
    size = f"{opened.image_size} × {opened.image_size} pixels"
    classes = [(f"classes of {task}", f"{len(labels):,}") for task, labels in opened.classes.items()]
    return [*named, ("fusion", model.fusion), ("input", size), ("validated in", opened.precision), *classes]


def _versions(history: History) -> str:
    found = history.starts[-1].get("versions", {}) if history.starts else {}
    device = [str(history.starts[-1]["device"])] if history.starts and "device" in history.starts[-1] else []
    return ", ".join([*(f"{name} {number}" for name, number in found.items()), *device])
