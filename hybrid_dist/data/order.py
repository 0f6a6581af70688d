"""Which sample when. Pure functions of (seed, phase, epoch): ranks, workers and micro batches only share the order out.

An epoch is one permutation, cut into global batches; the last one is short: nothing is dropped or seen twice. With a
`Balance` it is one of the rows that the balance draws, of which some come twice and others not at all. Within a
global batch, micro step `k` of rank `r` of `W` takes positions `[(k * W + r) * m, … + m)`, for micro batches of `m`.
Positions past the batch's end are padding, row -1, so that every rank takes the same number of micro steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from hybrid_dist.data.balance import Balance
from hybrid_dist.data.shuffle import shuffled
from hybrid_dist.errors import UserError

PADDING = -1
"""The row of a place in a micro batch that no sample fills."""

Key = tuple[int, int]
"""(turn, row): all that a loader process has to be told about a sample. How often the row has come in the phase before:
the epoch, unless there is a `Balance`."""


def epoch_order(length: int, seed: int, phase: str, epoch: int) -> np.ndarray:
    """The epoch's permutation of the rows: int64, shape (length,)."""
    return shuffled(length, f"order/{seed}/{phase}/{epoch}")


def steps_per_epoch(length: int, global_batch: int) -> int:
    """Optimizer steps in an epoch, the short last one included."""
    return -(-length // global_batch)


def samples_in_step(length: int, global_batch: int, step: int) -> int:
    """Samples in the phase's optimizer step `step`: the global batch, or what is left at an epoch's end."""
    return min(global_batch, length - step % steps_per_epoch(length, global_batch) * global_batch)


def micro_steps(real: int, world_size: int, micro_batch: int) -> int:
    """Micro steps, the same on every rank, that it takes to see `real` samples."""
    return -(-real // (world_size * micro_batch))


def check_divides(global_batch: int, micro_batch: int, world_size: int) -> int:
    """Micro steps in a full global batch.

    Raises:
        UserError: the global batch isn't a whole number of micro batches on every rank; names values that would do.
    """
    if global_batch % (micro_batch * world_size) == 0:
        return global_batch // (micro_batch * world_size)
    hints = []
    if global_batch % world_size == 0:
        hints.append(f"train.micro_batch_size {_listed(_divisors(global_batch // world_size))}")
    if global_batch % micro_batch == 0:
        hints.append(f"{_listed(_divisors(global_batch // micro_batch))} processes")
    unit = micro_batch * world_size
    near = sorted({max(unit, global_batch // unit * unit), (global_batch // unit + 1) * unit})
    hints.append(f"train.global_batch_size {_listed(near)}")
    raise UserError(
        f"train.global_batch_size {global_batch} does not divide into train.micro_batch_size {micro_batch} on "
        f"{world_size} process{'es' if world_size > 1 else ''}; with the rest as it is, {'; or '.join(hints)} would do"
    )


def _divisors(number: int) -> list[int]:
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]


def _listed(values: list[int]) -> str:
    shown = [str(value) for value in (values if len(values) <= 12 else [*values[:6], *values[-6:]])]
    return f"{', '.join(shown[:-1])} or {shown[-1]}" if len(shown) > 1 else shown[0]


@dataclass(frozen=True)
class TrainSampler:
    """One rank's micro batches for the phase's optimizer steps `[start_step, end_step)`, counted over epochs.

    Iterating yields lists of `micro_batch` keys `(turn, row)`; starting late costs one permutation.

    Raises:
        UserError: the global batch doesn't divide, or there are more processes than samples.
    """

    length: int
    global_batch: int
    micro_batch: int
    rank: int
    world_size: int
    seed: int
    phase: str
    start_step: int
    end_step: int
    balance: Balance | None = None

    def __post_init__(self) -> None:
        check_divides(self.global_batch, self.micro_batch, self.world_size)
        if self.world_size > self.length:
            raise UserError(
                f"{self.world_size} processes, but the training split has {self.length} samples; "
                f"start {self.length} processes or fewer"
            )

    def __len__(self) -> int:
        """Micro batches from `start_step` to `end_step`."""
        return max(0, self.end_step - self.start_step) * self.accumulation

    def __iter__(self) -> Iterator[list[Key]]:
        per_epoch = steps_per_epoch(self.length, self.global_batch)
        turns, rows, order_of = np.empty(0, np.int64), np.empty(0, np.int64), -1
        for step in range(self.start_step, self.end_step):
            epoch, within = divmod(step, per_epoch)
            if epoch != order_of:
                turns, rows, order_of = *self._epoch(epoch), epoch
            chosen = slice(within * self.global_batch, (within + 1) * self.global_batch)
            keys = list(zip(turns[chosen].tolist(), rows[chosen].tolist(), strict=True))
            for micro_step in range(self.accumulation):
                first = (micro_step * self.world_size + self.rank) * self.micro_batch
                yield _padded(keys[first : first + self.micro_batch], epoch, self.micro_batch)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Turns and rows in the epoch's order: int64 (length,) each."""
        order = epoch_order(self.length, self.seed, self.phase, epoch)
        if self.balance is None:
            return np.broadcast_to(np.int64(epoch), order.shape), order
        turns, rows = self.balance.epoch(self.seed, self.phase, epoch)
        return turns[order], rows[order]

    @property
    def accumulation(self) -> int:
        """Micro steps in an optimizer step; a short last one has as many, for ZeRO's offload counts on their number."""
        return self.global_batch // (self.micro_batch * self.world_size)

    def samples(self, step: int) -> int:
        """Samples over all ranks in the phase's optimizer step `step`."""
        return samples_in_step(self.length, self.global_batch, step)


@dataclass(frozen=True)
class ValSampler:
    """One rank's micro batches of a split in row order: every row once over all ranks, as many batches on each.

    Batch `k` of rank `r` takes rows `[(k * W + r) * m, … + m)`; rows past the end are padding.
    """

    length: int
    micro_batch: int
    rank: int
    world_size: int

    def __len__(self) -> int:
        return micro_steps(self.length, self.world_size, self.micro_batch)

    def __iter__(self) -> Iterator[list[Key]]:
        for batch in range(len(self)):
            first = (batch * self.world_size + self.rank) * self.micro_batch
            rows = range(self.length)[first : first + self.micro_batch]
            yield _padded([(0, row) for row in rows], 0, self.micro_batch)


def _padded(keys: list[Key], epoch: int, micro_batch: int) -> list[Key]:
    return keys + [(epoch, PADDING)] * (micro_batch - len(keys))
