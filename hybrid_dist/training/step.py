"""One optimizer step: micro batches in, a sum of losses out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hybrid_dist.data.mix import WHOLE
from hybrid_dist.distributed import Control, Engine
from hybrid_dist.training.tasks import Mixed, Task

if TYPE_CHECKING:
    from hybrid_dist.data.dataset import Batch


def label_counts(tasks: Sequence[Task], batches: Sequence[Batch]) -> list[int]:
    """This rank's labels of each task in the step, in parts of a `WHOLE`th, and its samples without padding.

    Whole numbers, for their sum is the same in whatever order ranks and micro batches add it up.
    """

    def parts(task: Task, batch: Batch) -> int:
        labelled = task.labelled(batch.labels[task.name], _mixed(batch, task.name))
        return int((labelled.double() * WHOLE).round().sum())

    counts = [sum(parts(task, batch) for batch in batches) for task in tasks]
    return [*counts, sum(int((batch.rows >= 0).sum()) for batch in batches)]


def train_step(
    engine: Engine,
    tasks: Sequence[Task],
    batches: Sequence[Batch],
    counts: Mapping[str, float],
    seeds: Sequence[int],
    device: torch.device,
    beat: Callable[[str], None],
) -> Tensor:
    """Forward and backward over the step's micro batches, and the update.

    The loss of a task is the sum over its labels divided by their number in the whole global batch, over ranks and
    micro batches: a mean of means would weigh a label by how few others came along in its micro batch.

    Args:
        counts: Labels of each task in the global batch; of mixed samples the share that is labelled.
        seeds: For each micro batch, what its dropout and stochastic depth follow from.
        beat: Told of each thing that is done.

    Returns:
        (1 + tasks,) fp32 on the device: this rank's share of the total loss, then of each task's, unweighted. Nothing
        here waits for the device.
    """
    engine.model.train()
    shares = torch.zeros(1 + len(tasks), device=device)
    for index, (batch, seed) in enumerate(zip(batches, seeds, strict=True)):
        last = index == len(batches) - 1
        torch.manual_seed(seed)
        beat(f"in micro batch {index + 1} of {len(batches)}")
        with engine.accumulating(last):
            outputs = engine.forward(batch.images.to(device, non_blocking=True))
            parts = []
            for task in tasks:
                target = batch.labels[task.name].to(device, non_blocking=True)
                losses = task.training_losses(outputs[task.name], target, _mixed(batch, task.name, device))
                parts.append(losses.sum() / (counts[task.name] or 1))
            total = sum(
                (task.weight * part for task, part in zip(tasks, parts, strict=True)), start=shares.new_zeros(())
            )
            shares += torch.stack([total, *parts]).detach()
            engine.backward(total, last)
    engine.step()
    return shares


def _mixed(batch: Batch, task: str, device: torch.device | None = None) -> Mixed | None:
    """What the batch's samples are mixed with, as a task sees it, on the host or a device."""
    if batch.mix is None:
        return None
    mixed = Mixed(batch.mix.shares, batch.mix.labels[task])
    return mixed if device is None else Mixed(*(tensor.to(device, non_blocking=True) for tensor in mixed))


def dropout_seed(seed: int, phase: str, step: int, micro_batch: int) -> int:
    """63 bits that a micro batch's dropout and stochastic depth follow from.

    `micro_batch` counts within the global batch, over ranks and micro steps: with the same micro batch size the masks
    are the same on any number of processes, and a resume needs no random state of the past.
    """
    digest = hashlib.blake2b(f"dropout/{seed}/{phase}/{step}/{micro_batch}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class LossLog:
    """The losses of the steps since the last line in metrics.jsonl; reduced over the ranks when they are asked for."""

    def __init__(self, control: Control, reduced: list[list[float]]):
        self.control = control
        self.reduced = list(reduced)
        self._waiting: list[Tensor] = []

    def add(self, shares: Tensor) -> None:
        """Keep a step's shares, on the device."""
        self._waiting.append(shares)

    def rows(self) -> list[list[float]]:
        """Each step's losses, summed over the ranks; all ranks ask together. Waits for the device."""
        if self._waiting:
            local = torch.stack(self._waiting).to("cpu", torch.float64)
            self.reduced.extend(self.control.total_rows(local).tolist())
            self._waiting = []
        return self.reduced

    def take_mean(self) -> list[float]:
        """The mean over those steps; starts anew."""
        rows = self.rows()
        self.reduced = []
        return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def trace_of(batches: Sequence[Batch], control: Control) -> tuple[list[int], str] | None:
    """The global batch's rows in order, and a digest of their augmented pixels; on rank 0, None elsewhere."""
    local = [(batch.rows.tolist(), batch.digests.tolist()) for batch in batches if batch.digests is not None]
    ranks = control.to_main(local)
    if ranks is None:
        return None
    rows: list[int] = []
    digest = hashlib.blake2b(digest_size=16)
    for micro in zip(*ranks, strict=True):  # micro step by micro step, rank by rank: the order of the global batch
        for micro_rows, digests in micro:
            for row, pixels in zip(micro_rows, digests, strict=True):
                if row >= 0:
                    rows.append(row)
                    digest.update(pixels.to_bytes(8, "little", signed=True))
    return rows, digest.hexdigest()
