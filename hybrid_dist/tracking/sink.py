"""What a run tells, and those who listen: one interface, several sinks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from hybrid_dist.training.tasks import Task
    from hybrid_dist.training.validate import Validated

Values = Mapping[str, float | None]


@dataclass(frozen=True)
class Position:
    """Where in the run something was measured."""

    phase: str
    epoch: int
    step: int
    samples: int

    @property
    def title(self) -> str:
        """For a person."""
        return f"phase {self.phase}, epoch {self.epoch}, step {self.step}"


@dataclass(frozen=True)
class Judgement:
    """A validation: its metrics, and what the model said about each picture. Nothing in it changes later."""

    at: Position
    metrics: Values
    result: Validated
    tasks: Sequence[Task]
    filenames: Sequence[str]
    """Of the result's rows."""
    picture: Callable[[int], np.ndarray]
    """A row's pixels, uint8 (height, width, 3); reads them then."""


class HasId(Protocol):
    """What keeps the id of wandb's run in the checkpoints."""

    wandb_id: str | None


class Sink:
    """Where news of a run go. Another is a class with those of these methods that it cares about, and its config.

    Called by rank 0 from the training loop: none may wait for a network, or raise for what is wrong on its side.
    """

    def begin(self, state: HasId, keep: int) -> None:
        """Training begins, of another phase or at all; metrics.jsonl counts up to `keep` bytes. `state` is saved."""

    def validated(self, judgement: Judgement) -> None:
        """A validation is over; its metrics come through `metrics`, after this."""

    def metrics(self, at: Position, values: Values) -> None:
        """A line of metrics."""

    def warned(self, text: str) -> None:
        """Something that somebody should look at, though training goes on."""

    def published(self, folder: str, facts: Mapping[str, Any]) -> None:
        """The final model lies in `folder`; `facts` say which step it is of, and how good."""

    def ended(self, state: str, reason: str) -> None:
        """This start of the run ends: `finished`, `stopped`, `failed` or `stuck`."""

    def close(self) -> None:
        """Nothing more will come, unless training begins once more."""


class Sinks(Sink):
    """Several as one; told in their order."""

    def __init__(self, sinks: Sequence[Sink]):
        self._sinks = list(sinks)

    def begin(self, state: HasId, keep: int) -> None:
        for sink in self._sinks:
            sink.begin(state, keep)

    def validated(self, judgement: Judgement) -> None:
        for sink in self._sinks:
            sink.validated(judgement)

    def metrics(self, at: Position, values: Values) -> None:
        for sink in self._sinks:
            sink.metrics(at, values)

    def warned(self, text: str) -> None:
        for sink in self._sinks:
            sink.warned(text)

    def published(self, folder: str, facts: Mapping[str, Any]) -> None:
        for sink in self._sinks:
            sink.published(folder, facts)

    def ended(self, state: str, reason: str) -> None:
        for sink in self._sinks:
            sink.ended(state, reason)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()
