"""Where a run stands: plain values, written with every checkpoint."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from hybrid_dist.checkpoint import Damaged, Found
from hybrid_dist.config import Config


@dataclass
class TrainState:
    """The position of a run. `step` and `samples` count over all phases, `phase_step` within the phase."""

    phase: str
    phase_step: int = 0
    step: int = 0
    samples: int = 0
    finished: bool = False
    """The phase is done: its steps are made and its last validation is in."""
    validation_due: bool = False
    """The run was stopped before or in the validation that belongs to this step: it comes next."""
    stale: int = 0
    """Validations in a row, up to the last one, that brought no better score."""
    best_score: float | None = None
    best_step: int | None = None
    best_metrics: dict[str, float | None] = field(default_factory=dict)
    best_temperature: dict[str, float] = field(default_factory=dict)
    """By classification task, what its logits are divided by."""
    pending: list[list[float]] = field(default_factory=list)
    """Losses of the good steps since the last line in metrics.jsonl: the global batch's, and each task's."""
    bad_streak: int = 0
    """Bad steps in a row, up to this one,"""
    bad_since: int | None = None
    """and the first of them."""
    too_many_since: int | None = None
    """The first of too many bad steps in a row, from when they were too many: to be gone back behind."""
    positions: dict[str, int] = field(default_factory=dict)
    """Length in bytes of metrics.jsonl and trace.jsonl; a resume cuts them back to it."""
    engine: dict[str, Any] = field(default_factory=dict)
    """The backend's own: the loss scaler."""
    wandb_id: str | None = None
    """Of wandb's run: one for all phases and starts."""
    data: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each split's CSV and of each task's classes."""

    def state_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainState:
        """What `state_dict` gave; keys of other versions are left aside."""
        known = {entry.name for entry in fields(cls)}
        return cls(**{key: value for key, value in values.items() if key in known})

    def begin(self, phase: str) -> None:
        """Go on to the start of another phase; what counts over the whole run stays."""
        fresh = TrainState(
            phase, step=self.step, samples=self.samples, positions=self.positions, data=self.data,
            wandb_id=self.wandb_id,
        )  # fmt: skip
        self.become(fresh)

    def become(self, other: TrainState) -> None:
        """Stand where `other` does; whoever holds this one sees it."""
        for entry in fields(self):
            setattr(self, entry.name, getattr(other, entry.name))


def check_own(config: Config, found: Found) -> None:
    """Raises `Damaged` for a whole checkpoint that is not of the run of this config."""
    there, here = found.state.get("config") or {}, config.identity()
    differing = [key for key in there if key in here and there[key] != here[key]]
    if differing:
        key = differing[0]
        raise Damaged(f"it belongs to another config: {key} is {there[key]!r} there and {here[key]!r} here")
    if found.state.get("phase") not in [phase.name for phase in config.phases]:
        raise Damaged(f"it is of a phase {found.state.get('phase')!r}, which this config does not have")
    try:
        TrainState.from_dict(found.state)
    except TypeError as error:
        raise Damaged(f"its state can't be read ({error})") from None
