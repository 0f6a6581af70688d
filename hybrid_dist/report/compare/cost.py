"""What a run's model costs: parameters, how long an answer takes, memory in training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from hybrid_dist.bench.latency import times_in_turns
from hybrid_dist.errors import UserError
from hybrid_dist.files import read_lines
from hybrid_dist.inference.found import find_model
from hybrid_dist.inference.opened import OpenedModel, open_model
from hybrid_dist.report.compare.runs import Run

TURNS, SECONDS = 50, 3.0
"""Turns of each model at most, and seconds for each, about."""


@dataclass(frozen=True)
class Cost:
    """Of one run; None where it can't be told."""

    parameters: float | None = None
    latency_ms: float | None = None
    """Median over turns: one picture, from its pixels on the device to raw outputs, in the run's precision."""
    memory_gb: float | None = None
    """The largest perf/peak_memory_gb of its training."""


def measure(runs: Sequence[Run]) -> tuple[list[Cost], list[str]]:
    """The cost of each run, and warnings about what can't be told. Latency is measured on this machine."""
    models: dict[int, OpenedModel] = {}
    warnings = []
    for place, run in enumerate(runs):
        try:
            models[place] = open_model(find_model(run.folder))
        except (UserError, torch.OutOfMemoryError) as error:
            warnings.append(f"{run.label}: neither parameters nor latency: {error}")
    times = times_in_turns([_asking(model) for model in models.values()], TURNS, SECONDS * len(models))
    latencies = {place: 1000 * float(np.median(found)) for place, found in zip(models, times, strict=True)}
    costs = [
        Cost(
            parameters=float(models[place].parameters) if place in models else None,
            latency_ms=latencies.get(place),
            memory_gb=_peak_memory(run),
        )
        for place, run in enumerate(runs)
    ]
    return costs, warnings


def _asking(opened: OpenedModel) -> Callable[[], None]:
    size, device = opened.image_size, opened.device
    image = torch.randint(0, 256, (1, 3, size, size), dtype=torch.uint8, device=device)

    def ask() -> None:
        opened.forward(image)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return ask


def _peak_memory(run: Run) -> float | None:
    """In GB, over all phases; of each process the same kind of figure, so runs on unlike devices are not alike."""
    lines = read_lines(run.folder / "metrics.jsonl")
    peaks = (line.get("perf/peak_memory_gb") for line in lines)
    return max((peak for peak in peaks if peak is not None), default=None)
