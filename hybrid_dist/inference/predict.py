"""Answers for pictures: many from disk through loader processes, or a few in Python."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from hybrid_dist.data.dataset import Batch
from hybrid_dist.data.order import PADDING
from hybrid_dist.data.pictures import BACKGROUND, PictureError, decode_picture, read_picture
from hybrid_dist.errors import UserError
from hybrid_dist.inference.found import find_model
from hybrid_dist.inference.inputs import Inputs
from hybrid_dist.inference.opened import BATCH_SIZE, OpenedModel, open_model
from hybrid_dist.inference.outputs import open_writer
from hybrid_dist.training.tasks import Task

DIGITS = 6
"""Of a probability or score, as in predictions_val.csv."""

Picture = str | os.PathLike[str] | bytes | NDArray[np.uint8]


class Predictor:
    """A trained model, ready to be asked.

    Attributes:
        classes: Each classification task's labels, in the order of its probabilities.
        note: What is to be known about the model; empty for a finished run's.
    """

    def __init__(self, opened: OpenedModel, note: str = ""):
        """As `hybrid_dist.load` makes it."""
        self.opened, self.note = opened, note
        self.classes = opened.classes

    def predict(self, pictures: Sequence[Picture], top: int = 1, batch_size: int = BATCH_SIZE) -> list[dict[str, Any]]:
        """What the model says about each picture; the columns of `hybrid-dist predict`.

        Args:
            pictures: Paths, the bytes of files, or pixels, uint8 (height, width, 3), RGB.
            top: How many classes are named: `type_prediction`, `type_prediction_2`, …, each with its probability.

        Returns:
            A dictionary for each picture, in order. `error` says why one can't be used, and is None otherwise.
        """
        if isinstance(pictures, str | os.PathLike | bytes) or getattr(pictures, "ndim", 4) == 3:
            raise UserError("predict takes a list of pictures; [picture] would do")
        check_numbers(top, batch_size)
        rows: list[dict[str, Any]] = []
        for start in range(0, len(pictures), batch_size):
            some = pictures[start : start + batch_size]
            batch = self._batch(some)
            names = [os.fspath(one) if isinstance(one, str | os.PathLike) else None for one in some]
            rows += rows_of(self.opened.tasks, ask(self.opened, batch), names, batch.bad, top).to_pylist()
        return rows

    def probabilities(self, images: torch.Tensor) -> dict[str, NDArray[np.float32]]:
        """uint8 (B, 3, S, S), RGB, fitted into the square → task → probabilities (B, K) or scores (B,)."""
        outputs = self.opened.forward(images.to(self.opened.device))
        return {task.name: task.predict(outputs[task.name]).cpu().numpy() for task in self.opened.tasks}

    def fit(self, picture: Picture) -> NDArray[np.uint8]:
        """A picture in the square that the model sees: uint8 (S, S, 3), RGB.

        Raises:
            PictureError: it can't be used.
        """
        size = self.opened.image_size
        if isinstance(picture, np.ndarray):
            if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or 0 in picture.shape:
                raise PictureError("pixels", f"are uint8 (height, width, 3), got {picture.dtype} {picture.shape}")
            pixels = picture
        elif isinstance(picture, bytes):
            pixels = decode_picture(picture, "bytes", size)
        else:
            pixels = read_picture(os.fspath(picture), size)
        return self.opened.fit(pixels, (), 0)

    def _batch(self, pictures: Sequence[Picture]) -> Batch:
        size = self.opened.image_size
        images = np.full((len(pictures), size, size, 3), BACKGROUND, np.uint8)
        bad: dict[int, str] = {}
        for place, picture in enumerate(pictures):
            try:
                images[place] = self.fit(picture)
            except PictureError as error:
                bad[place] = error.reason
        return Batch(torch.from_numpy(images).permute(0, 3, 1, 2), {}, torch.arange(len(pictures)), bad=bad)


def load(path: str | Path, device: str | None = None) -> Predictor:
    """`hybrid_dist.load`."""
    found = find_model(path)
    return Predictor(open_model(found, device), found.note)


def check_numbers(top: int, batch_size: int) -> None:
    """Raises UserError for what is no number of classes or pictures."""
    for name, value in (("top", top), ("batch size", batch_size)):
        if value < 1:
            raise UserError(f"{name} {value}: 1 or more would do")


def ask(opened: OpenedModel, batch: Batch) -> dict[str, NDArray[np.float32]]:
    """Each task's predictions for all places of a batch: (B, K) probabilities or (B,) scores."""
    outputs = opened.forward(batch.images.to(opened.device, non_blocking=True))
    return {task.name: task.predict(outputs[task.name]).cpu().numpy() for task in opened.tasks}


def rows_of(
    tasks: Sequence[Task],
    predictions: Mapping[str, NDArray[np.float32]],
    names: Sequence[str | None] | pa.Array,
    bad: Mapping[int, str],
    top: int,
) -> pa.RecordBatch:
    """The answers' rows: `filename`, each task's columns, `error`.

    Args:
        bad: By place, why a picture can't be used; nothing is predicted of it.
    """
    errors = [" ".join(bad[place].split()) if place in bad else None for place in range(len(names))]
    unusable = pa.array([error is not None for error in errors])
    columns: dict[str, pa.Array] = {"filename": pa.array(names, pa.large_string())}
    for task in tasks:
        for name, values in task.answers(predictions[task.name], top).items():
            column = pa.array(values)
            if pa.types.is_floating(column.type):
                column = pc.round(pc.if_else(pc.is_nan(column), None, column), DIGITS)
            # Masked only now: the type is that of the values, however many are left.
            columns[name] = pc.if_else(unusable, pa.scalar(None, column.type), column)
    columns["error"] = pa.array(errors, pa.string())
    return pa.RecordBatch.from_pydict(columns)


def answers(
    opened: OpenedModel, inputs: Inputs, top: int, batch_size: int, workers: Literal["auto"] | int
) -> Iterator[pa.RecordBatch]:
    """Rows for all inputs, in their order, as `rows_of` has them.

    Raises:
        UserError: a loader process has died.
    """
    for batch in opened.loader(inputs.table, batch_size, workers):
        real = int((batch.rows != PADDING).sum())  # what pads a last batch stands at its end
        predictions = {name: values[:real] for name, values in ask(opened, batch).items()}
        first = int(batch.rows[0])
        bad = {row - first: reason for row, reason in batch.bad.items()}
        yield rows_of(opened.tasks, predictions, inputs.names[first : first + real], bad, top)


def predict_to(
    out: Path | None, rows: Iterator[pa.RecordBatch], total: int, tell: Callable[[int, int], None]
) -> tuple[int, int]:
    """Write all rows. Returns the number of pictures, and of those that can't be used.

    Raises:
        UserError: the file can't be written.
    """
    done = bad = 0
    with open_writer(out) as writer:
        tell(0, total)
        for some in rows:
            writer.write(some)
            done += len(some)
            bad += len(some) - some.column("error").null_count
            tell(done, total)
    return done, bad
