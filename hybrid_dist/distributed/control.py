"""The control plane: small facts that ranks agree on, over host memory, so that no device has to wait."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


class Control:
    """Collectives on plain values over gloo. With one process each returns its argument."""

    def __init__(self, rank: int, world_size: int, patience: timedelta | None = None):
        """A collective fails after `patience`; None: after as long as gloo thinks right."""
        self.rank = rank
        self.world_size = world_size
        self.group: Any = None
        if world_size > 1:
            # Under NCCL a group of its own; under gloo the default group would do, but a separate one never
            # interleaves with an engine's collectives that run from another thread.
            self.group = dist.new_group(backend="gloo", timeout=patience)

    def total(self, values: Sequence[int]) -> list[int]:
        """Sum each integer over the ranks."""
        return self.begin_total(values)()

    def begin_total(self, values: Sequence[int]) -> Callable[[], list[int]]:
        """Begin to sum each integer over the ranks; what is returned waits for the sums, and gives them."""
        if self.world_size == 1:
            return lambda: list(values)
        tensor = torch.tensor(values, dtype=torch.int64)
        work = dist.all_reduce(tensor, group=self.group, async_op=True)

        def sums() -> list[int]:
            work.wait()
            return tensor.tolist()

        return sums

    def total_rows(self, values: torch.Tensor) -> torch.Tensor:
        """Sum a host tensor of any shape over the ranks, element by element."""
        if self.world_size > 1:
            dist.all_reduce(values, group=self.group)
        return values

    def from_main(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def to_main(self, value: T) -> list[T] | None:
        """Every rank's value in rank order, on rank 0; None elsewhere."""
        if self.world_size == 1:
            return [value]
        box: list[Any] | None = [None] * self.world_size if self.rank == 0 else None
        dist.gather_object(value, box, dst=0, group=self.group)
        return box

    def to_all(self, value: T) -> list[T]:
        """Every rank's value in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        box: list[Any] = [None] * self.world_size
        dist.all_gather_object(box, value, group=self.group)
        return box

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        if self.world_size > 1:
            dist.barrier(group=self.group)
