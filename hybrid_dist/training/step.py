"""One optimizer step: micro batches in, a sum of losses out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hybrid_dist.data.mix import WHOLE
from hybrid_dist.distributed import BACKWARD, FORWARD, OPTIMIZER, Control, Engine, span
from hybrid_dist.model.noise import sample_keys, seed_draws
from hybrid_dist.training.frozen import on_device
from hybrid_dist.training.objective import Objective, mixed_with
from hybrid_dist.training.tasks import Task

if TYPE_CHECKING:
    from hybrid_dist.data.dataset import Batch
    from hybrid_dist.model.hybrid import Hybrid


def label_counts(tasks: Sequence[Task], batches: Sequence[Batch]) -> list[int]:
    """This rank's labels of each task in the step, in parts of a `WHOLE`th, and its samples without padding.

    Whole numbers, for their sum is the same in whatever order ranks and micro batches add it up.
    """

    def parts(task: Task, batch: Batch) -> int:
        mixed = mixed_with(batch, task.name)
        labelled = task.labelled(batch.labels[task.name], mixed)
        return int(labelled.sum()) * WHOLE if mixed is None else int((labelled.double() * WHOLE).round().sum())

    counts = [sum(parts(task, batch) for batch in batches) for task in tasks]
    return [*counts, sum(int((batch.rows >= 0).sum()) for batch in batches)]


@dataclass(frozen=True)
class StepLosses:
    """What a step has cost, on the device."""

    totals: Tensor
    """(2 + tasks,) fp32: the global batch's loss with the tasks' own weights, each task's, and 1 where the gradients
    were no numbers and so the update was left out, else 0."""
    samples: list[Tensor]
    """By micro batch, (B,): what each of this rank's samples has cost."""


def train_step(
    engine: Engine,
    objective: Objective,
    batches: Sequence[Batch],
    counts: Mapping[str, float],
    seed: int,
    device: torch.device,
    beat: Callable[[str], None],
    meanwhile: Callable[[], None] | None = None,
) -> StepLosses:
    """Forward and backward over the step's micro batches, and the update, unless the loss or a gradient is no number.

    The loss of a task is the sum over its labels divided by their number in the whole global batch, over ranks and
    micro batches: a mean of means would weigh a label by how few others came along in its micro batch.

    Args:
        counts: Labels of each task in the global batch; of mixed samples the share that is labelled.
        seed: Of this step: what dropout and stochastic depth follow from, for each sample by its place in the global
            batch, whichever rank and micro batch that is in.
        beat: Told of each thing that is done.
        meanwhile: Begins what need not wait for the last backward pass to end.

    Returns:
        The global batch's losses, the same on all ranks. Nothing here waits for the device.
    """
    if not engine.model.training:  # to say it again to a thousand modules takes 2 ms
        engine.model.train()
    noise = cast("Hybrid", engine.model).noise
    world, rank = engine.topology.world_size, engine.topology.rank
    shares = torch.zeros(1 + len(objective.tasks), device=device)
    samples = []
    for index, batch in enumerate(batches):
        last, size = index == len(batches) - 1, len(batch.rows)
        first = (index * world + rank) * size
        seed_draws(seed + first, device)
        beat(f"in micro batch {index + 1} of {len(batches)}")
        with engine.accumulating(last):
            with span(FORWARD):
                noise.begin(sample_keys(seed, first, size, device))
                outputs = engine.forward(batch.images.to(device, non_blocking=True), **on_device(batch, device))
                micro = objective(outputs, batch, counts)
                shares += micro.shares
                samples.append(micro.samples)
                if last:  # under way while gradients are made; under ZeRO `backward` makes the update, too
                    totals = engine.total(shares, objective.bad)
            if last and meanwhile is not None:
                meanwhile()
            with span(BACKWARD):
                engine.backward(micro.loss, last)
    with span(OPTIMIZER):
        engine.step()
    noise.end()
    return StepLosses(torch.cat([totals(), engine.left_out().view(1)]), samples)


def step_seed(seed: int, phase: str, step: int) -> int:
    """62 bits that a step's dropout and stochastic depth follow from: a resume needs no random state of the past."""
    digest = hashlib.blake2b(f"dropout/{seed}/{phase}/{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2


@dataclass(frozen=True)
class Made:
    """A step that has been made, on the host."""

    step: int
    """Over the whole run."""
    losses: list[float]
    """The global batch's loss, and each task's."""
    left_out: bool
    """Whether its gradients were no numbers."""
    rows: NDArray[np.int64]
    """This rank's samples, -1 for padding,"""
    partners: NDArray[np.int64]
    """those that they are mixed with, -1 for none,"""
    costs: NDArray[np.float32]
    """and what each has cost."""


class LossLog:
    """The losses of the steps since the last line in metrics.jsonl; they wait on the device until they are wanted."""

    def __init__(self, kept: list[list[float]]):
        self.kept = list(kept)
        """Of each step that counts: the global batch's loss, and each task's."""
        self._waiting: list[tuple[int, StepLosses, Tensor, Tensor]] = []

    def add(self, step: int, losses: StepLosses, batches: Sequence[Batch]) -> None:
        """Keep what a step has cost, on the device."""
        partners = [torch.full_like(batch.rows, -1) if batch.mix is None else batch.mix.rows for batch in batches]
        self._waiting.append((step, losses, torch.cat([batch.rows for batch in batches]), torch.cat(partners)))

    def settle(self) -> list[Made]:
        """The steps since the last call. Waits for the device."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return []
        totals = torch.stack([losses.totals for _, losses, *_ in waiting]).to("cpu", torch.float64).tolist()
        costs = torch.cat([cost for _, losses, *_ in waiting for cost in losses.samples]).cpu().numpy()
        made, at = [], 0
        for (step, _, rows, partners), (*each, left_out) in zip(waiting, totals, strict=True):
            own = costs[at : at + len(rows)]
            made.append(Made(step, each, bool(left_out), rows.numpy(), partners.numpy(), own))
            at += len(rows)
        return made

    def take_mean(self) -> list[float] | None:
        """The mean over the steps that count, None if there is none; starts anew."""
        rows, self.kept = self.kept, []
        return [sum(column) / len(rows) for column in zip(*rows, strict=True)] if rows else None


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
