"""Whether a config as it stands fits on the machine at hand."""

from __future__ import annotations

from dataclasses import dataclass

from hybrid_dist.config import Config
from hybrid_dist.plan.answer import Row
from hybrid_dist.plan.choose import Planner
from hybrid_dist.plan.split import look
from hybrid_dist.plan.strategies import Strategy


@dataclass(frozen=True)
class Fit:
    """The simplest launch file under which all phases fit with the config's micro batch, or what would fit instead."""

    fits: bool
    launch: str
    micro_batch: int
    """The config's own where it is a number and fits, else the largest that does under `launch`; 0: none."""
    phase: str
    """The one that needs most."""
    bytes: int
    """What it needs on each process; where nothing fits, with the config's micro batch under the last launch file."""


def fit(config: Config, processes: int, memory: int, device: str, launch: str | None = None) -> Fit:
    """Try the config's own micro batch, the simplest launch file first, and then smaller ones.

    Args:
        processes: One for each GPU, or one without.
        memory: Bytes for each of them.
        device: `cuda` or `cpu`.
        launch: A name of `launch/accelerate/`: only this one; None: whichever fits.

    Raises:
        UserError: the model can't be built, or the global batch doesn't divide.
    """
    planner = Planner(config, look(config).classes, processes, memory, device)
    recompute = bool(config.train.checkpoint_activations)
    tried = [s for s in planner.strategies if launch in (None, s.name) and s.recompute == recompute]
    sizes = planner.micro_batches()
    own = config.train.micro_batch_size
    if own == "auto":
        return _any(planner, tried, sizes)
    worst = None
    for strategy in tried:
        worst = _worst(planner, strategy, own)
        if worst.fits:
            return Fit(True, strategy.name, own, worst.phase, worst.peak)
    assert worst is not None, launch
    for size in sizes:
        for strategy in tried:
            if size < own and _worst(planner, strategy, size).fits:
                return Fit(False, strategy.name, size, worst.phase, worst.peak)
    return Fit(False, worst.launch, 0, worst.phase, worst.peak)


def _any(planner: Planner, tried: list[Strategy], sizes: list[int]) -> Fit:
    """With whichever micro batch."""
    for strategy in tried:
        for size in sizes:
            worst = _worst(planner, strategy, size)
            if worst.fits:
                return Fit(True, strategy.name, size, worst.phase, worst.peak)
    return Fit(False, worst.launch, 0, worst.phase, worst.peak)


def largest(
    config: Config, classes: dict[str, int], processes: int, memory: int, device: str, strategy: Strategy
) -> int:
    """The largest micro batch with which all phases fit; 0: none.

    Args:
        classes: Labels of each classification task.
        memory: Bytes for each process.
        device: `cuda` or `cpu`.

    Raises:
        UserError: what the model does can't be planned.
    """
    planner = Planner(config, classes, processes, memory, device)
    return next((size for size in planner.micro_batches() if _worst(planner, strategy, size).fits), 0)


def _worst(planner: Planner, strategy: Strategy, micro_batch: int) -> Row:
    """The phase that needs most."""
    return max((planner.row(phase, strategy, micro_batch) for phase in planner.rules), key=lambda row: row.peak)
