"""Validation: every picture once, on any number of ranks."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hybrid_dist.distributed import Control, Engine
from hybrid_dist.training.frozen import on_device
from hybrid_dist.training.tasks import Metrics, Task, score

if TYPE_CHECKING:
    from hybrid_dist.data.dataset import Batch


@dataclass(frozen=True)
class Validated:
    """What the model said about each labelled or unlabelled picture, in row order; on rank 0."""

    rows: NDArray[np.int64]
    predictions: dict[str, NDArray[np.float32]]
    targets: dict[str, NDArray[Any]]
    losses: dict[str, NDArray[np.float32]]

    def not_finite(self) -> list[str]:
        """The tasks for which some answer is no number."""
        return [name for name, values in self.predictions.items() if not np.isfinite(values).all()]


Part = tuple[NDArray[np.int64], dict[str, tuple[NDArray[np.float32], NDArray[Any], NDArray[np.float32]]]]
"""A batch's rows; and for each task predictions, targets and losses."""


def validate(
    engine: Engine,
    tasks: Sequence[Task],
    batches: Iterable[Batch],
    control: Control,
    device: torch.device,
    tick: Callable[[int], None] = lambda samples: None,
) -> Validated | None:
    """Run the model over this rank's batches and bring the results together on rank 0 (None elsewhere).

    Args:
        batches: Equally many on every rank. What they raise, they raise on all ranks together: under ZeRO 3 one that
            left alone would let the others wait for its weights.
        tick: Told the number of samples after each batch.
    """
    engine.model.eval()
    return gather(judge(engine.forward, tasks, batches, device, tick), tasks, control)


@torch.no_grad()
def judge(
    forward: Callable[..., Mapping[str, Tensor]],
    tasks: Sequence[Task],
    batches: Iterable[Batch],
    device: torch.device,
    tick: Callable[[int], None] = lambda samples: None,
) -> list[Part]:
    """What a model in eval mode says about each batch, and what it costs.

    Args:
        forward: uint8 (B, 3, S, S) on `device` → task → raw output; told as well what is known of a batch's features.
        batches: Rows of -1 are padding, bad pictures are left out.
        tick: Told the number of samples after each batch.
    """
    parts: list[Part] = []
    for batch in batches:
        outputs = forward(batch.images.to(device, non_blocking=True), **on_device(batch, device))
        part: dict[str, Any] = {}
        for task in tasks:
            target = batch.labels[task.name]
            losses = task.losses(outputs[task.name], target.to(device, non_blocking=True))
            part[task.name] = (task.predict(outputs[task.name]).cpu().numpy(), target.numpy(), losses.cpu().numpy())
        rows = batch.rows.numpy()
        # A prediction for a picture that can't be seen would be none.
        parts.append((np.where(np.isin(rows, list(batch.bad)), -1, rows), part))
        tick(len(batch.rows))
    return parts


def gather(parts: list[Part], tasks: Sequence[Task], control: Control) -> Validated | None:
    """Bring what the ranks have found together on rank 0, in row order; None elsewhere. All ranks together."""
    gathered = control.to_main(parts)
    return None if gathered is None else _join([part for rank in gathered for part in rank], tasks)


def _join(parts: list[Part], tasks: Sequence[Task]) -> Validated:
    rows = np.concatenate([part_rows for part_rows, _ in parts])
    real = np.flatnonzero(rows >= 0)
    order = real[np.argsort(rows[real], kind="stable")]
    columns = {}
    for task in tasks:
        each = zip(*(part[task.name] for _, part in parts), strict=True)
        columns[task.name] = [np.concatenate(column)[order] for column in each]
    return Validated(
        rows=rows[order],
        predictions={name: column[0] for name, column in columns.items()},
        targets={name: column[1] for name, column in columns.items()},
        losses={name: column[2] for name, column in columns.items()},
    )


def metrics_of(result: Validated, tasks: Sequence[Task]) -> Metrics:
    """`val/…` metrics by their names in metrics.jsonl. A task without any label here has none."""
    each: dict[str, Metrics] = {}
    out: Metrics = {"val/loss": 0.0}
    total = 0.0
    for task in tasks:
        known = task.valid(torch.from_numpy(result.targets[task.name])).numpy()
        if not known.any():
            continue
        loss = float(result.losses[task.name][known].astype(np.float64).mean())
        total += task.weight * loss
        out[f"val/loss_{task.name}"] = loss
        each[task.name] = task.metrics(result.predictions[task.name][known], result.targets[task.name][known])
        out.update({f"val/{task.name}_{key}": value for key, value in each[task.name].items()})
    out["val/loss"] = total
    out["val/score"] = score(list(tasks), each)
    return out


def predictions_csv(result: Validated, tasks: Sequence[Task], filenames: Sequence[str]) -> str:
    """The text of predictions_val.csv: each picture's file, and each task's label, prediction and probability."""
    columns: dict[str, Sequence[str]] = {"filename": filenames}
    for task in tasks:
        columns.update(task.columns(result.predictions[task.name], result.targets[task.name]))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return out.getvalue()
