"""Any model on any labelled CSV, over any number of processes, by validation's own metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from hybrid_dist.config import Config, TaskConfig, parse_config
from hybrid_dist.data.annotations import Table, check_pictures, describe_unseen, read_table, tasks_in
from hybrid_dist.data.dataset import Batch
from hybrid_dist.data.packed import choose_packed
from hybrid_dist.data.source import Source
from hybrid_dist.distributed import Place, agree, decide
from hybrid_dist.errors import UserError
from hybrid_dist.files import write_atomic
from hybrid_dist.inference.found import FoundModel, find_model
from hybrid_dist.inference.inputs import images_beside
from hybrid_dist.inference.opened import OpenedModel, open_model
from hybrid_dist.inference.outputs import check_place
from hybrid_dist.training.calibration import calibrated, errors_told
from hybrid_dist.training.tasks import Metrics, Task
from hybrid_dist.training.validate import Validated, gather, judge, metrics_of, predictions_csv

KEYS = (
    "data.val_csv", "data.val_images", "data.workers", "data.packed", "data.max_bad",
    "train.micro_batch_size", "train.precision",
)  # fmt: skip
"""Of the config; the others are the model's own."""

_SHOWN = 3


@dataclass(frozen=True)
class Wish:
    """What is to be evaluated, and how."""

    model: Path
    csv: Path | None = None
    """The run's validation split if there is none."""
    images: Path | None = None
    """Its pictures' folder; by default the one beside the CSV that has its name."""
    flip: bool = False
    """Take the mean over each picture and its mirror image."""
    overrides: tuple[str, ...] = ()
    """`key=value` of the run's config."""
    out: Path | None = None
    """Where predictions go, in the format of predictions_val.csv."""


@dataclass(frozen=True)
class Evaluation:
    """The outcome, as plain values."""

    model: str
    csv: str
    images: str
    pictures: int
    unusable: int
    """Pictures that are missing or broken, and left out."""
    flip: bool
    precision: str
    processes: int
    metrics: Metrics
    """By their names in metrics.jsonl; a task without any label here has none."""

    def to_json(self) -> dict[str, Any]:
        """For a script."""
        return asdict(self)


def evaluate(wish: Wish, place: Place, say: Callable[[str], None], tell: Callable[[int, int], None]) -> Evaluation:
    """Each process takes its share of the pictures; all together.

    Args:
        say: Told what is to be known, the same on every rank; may be told an empty text.
        tell: Told how many pictures are done, and of how many.

    Raises:
        UserError: the model, the CSV or too many pictures can't be used; the same on all ranks.
    """
    found, config = agree(place, lambda: _find(wish))
    decide(place, lambda: check_place(wish.out, wish.model, [config.data.val_csv, config.data.train_csv]))
    table = agree(place, lambda: _table(found, config))
    opened = agree(place, lambda: open_model(found, place.device, config.train.precision))
    for text in (found.note, *(f"warning: {line}" for line in describe_unseen(table.unseen))):
        say(text)
    forward = mirrored(opened.raw, opened.tasks) if wish.flip else opened.raw
    bad: dict[int, str] = {}
    total, seen = len(table), 0

    def tick(samples: int) -> None:
        nonlocal seen
        seen += samples * place.world_size
        tell(min(seen, total), total)

    batches = agree(place, lambda: _batches(opened, table, config, place, say))
    # What stops one rank's loader is told to the others before they meet.
    parts = agree(place, lambda: judge(forward, opened.tasks, _noting(batches, bad), place.device, tick))
    result = gather(parts, opened.tasks, place.control)
    everyone = place.control.to_main(bad)

    def conclude() -> Evaluation:
        assert result is not None and everyone is not None  # rank 0
        unusable = {row: reason for part in everyone for row, reason in part.items()}
        _check_bad(table, unusable, config.data.max_bad, say)
        return _conclude(wish, opened, table, result, len(unusable), place)

    return decide(place, conclude)


def mirrored(
    forward: Callable[[Tensor], Mapping[str, Tensor]], tasks: Sequence[Task]
) -> Callable[[Tensor], dict[str, Tensor]]:
    """As `forward`, but what it predicts is the mean over each picture and its mirror image."""

    def both(images: Tensor) -> dict[str, Tensor]:
        outputs = [forward(images), forward(images.flip(-1))]  # (B, 3, S, S), by width
        return {task.name: task.mean([output[task.name] for output in outputs]) for task in tasks}

    return both


def _find(wish: Wish) -> tuple[FoundModel, Config]:
    for override in wish.overrides:
        key = override.partition("=")[0]
        if key not in KEYS:
            raise UserError(f"{override}: what can be changed here is {', '.join(KEYS)}; the rest is the model's own")
    found = find_model(wish.model)
    config = _config(found, wish.overrides)
    data = config.data
    if wish.csv is not None:
        images = str(wish.images or images_beside(wish.csv))
        data = data.model_copy(update={"val_csv": str(wish.csv), "val_images": images})
    elif wish.images is not None:
        data = data.model_copy(update={"val_images": str(wish.images)})
    if not data.val_csv:
        raise UserError(f"{wish.model} is an exported model, which brings no data along; --csv FILE would name it")
    return found, config.model_copy(update={"data": data})


def _config(found: FoundModel, overrides: Sequence[str]) -> Config:
    """The run's config, or for an export one that says as much."""
    if found.config is not None:
        return parse_config(found.config.model_dump(mode="json"), str(found.folder / "config.yaml"), overrides)
    description = found.description
    architecture = description.architecture.model_dump(mode="json")
    data = dict.fromkeys(("train_csv", "train_images", "val_csv", "val_images"), "")
    values: dict[str, Any] = {
        "run": {"name": "exported"},
        "data": {**data, "image_size": architecture.pop("image_size")},
        "model": architecture,
        "tasks": {name: task.model_dump(mode="json") for name, task in description.tasks.items()},
        "train": {"precision": description.precision},
    }
    return parse_config(values, str(found.source), overrides)


def _table(found: FoundModel, config: Config) -> Table:
    """The split, read with the model's own classes. A task that it has no column for is one without any label."""
    csv, images = Path(config.data.val_csv), Path(config.data.val_images)
    tasks = found.description.tasks
    there = tasks_in(csv, tasks)
    table = read_table(csv, images, there, found.description.class_maps)
    if not any(table.valid_counts().values()):
        raise UserError(
            f"{csv}: no row has a label of the model's tasks ({', '.join(tasks)}) to judge it by; predict would do"
        )
    labels = {name: table.labels.get(name, _no_labels(task, len(table))) for name, task in tasks.items()}
    return replace(table, labels=labels)


def _no_labels(task: TaskConfig, rows: int) -> np.ndarray:
    """As a blank column is read: int64 -1, or float32 NaN, (rows,)."""
    return np.full(rows, -1, np.int64) if task.kind == "classification" else np.full(rows, np.nan, np.float32)


def _batches(
    opened: OpenedModel, table: Table, config: Config, place: Place, say: Callable[[str], None]
) -> Iterable[Batch]:
    data, source = config.data, Source(config.data.val_images)
    # A copy holds the same pictures to the bit: it does not matter which of the ranks has one.
    packed = choose_packed(data.packed, table, source, opened.image_size, say)
    if packed is None:
        missing = check_pictures(table, data.max_bad)
        if missing is not None:
            say(f"warning: {missing}")
    ranks = (place.rank, place.world_size, place.local_world_size)
    return opened.loader(table, config.train.micro_batch(EVALUATED), data.workers, ranks, packed)


EVALUATED = 32
"""Pictures at a time where the config names no number: without gradients they take little."""


def _noting(batches: Iterable[Batch], bad: dict[int, str]) -> Iterator[Batch]:
    for batch in batches:
        bad |= batch.bad
        yield batch


def _check_bad(table: Table, unusable: Mapping[int, str], max_bad: float, say: Callable[[str], None]) -> None:
    if not unusable:
        return
    rows = sorted(unusable)
    shown = "; ".join(f"line {table.line(row)}: {table.filename(row)!r} {unusable[row]}" for row in rows[:_SHOWN])
    more = f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
    text = f"{table.csv}: {len(rows)} of {len(table)} pictures can't be used: {shown}{more}"
    if len(rows) > max_bad * len(table):
        raise UserError(f"{text}; data.max_bad={max_bad:g} allows fewer")
    say(f"warning: {text}; they are left out")


def _conclude(
    wish: Wish, opened: OpenedModel, table: Table, result: Validated, unusable: int, place: Place
) -> Evaluation:
    if wish.out is not None:
        names = [table.filename(int(row)) for row in result.rows]
        try:
            told = calibrated(result, opened.description.temperature)
            write_atomic(wish.out, predictions_csv(told, opened.tasks, names))
        except OSError as error:
            raise UserError(f"{wish.out}: can't be written: {error.strerror}") from None
    return Evaluation(
        model=str(wish.model), csv=str(table.csv), images=str(table.images), pictures=len(result.rows),
        unusable=unusable, flip=wish.flip, precision=opened.precision, processes=place.world_size,
        metrics=metrics_of(result, opened.tasks) | errors_told(result, opened.tasks, opened.description.temperature),
    )  # fmt: skip
