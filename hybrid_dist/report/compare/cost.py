"""What a run's model costs: parameters, how long an answer takes, memory in training."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from hybrid_dist.errors import UserError
from hybrid_dist.model.hybrid import HEAD_PREFIX, Hybrid, build_model, describe
from hybrid_dist.report.compare.runs import Run
from hybrid_dist.training.publish import BEST, phase_folder

TURNS, SECONDS = 50, 3.0
"""Turns of each model at most, and seconds for each, about; `FEWEST` turns are made in any case."""
FEWEST = 5
_WARM_UP = 2
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Cost:
    """Of one run; None where it can't be told."""

    parameters: float | None = None
    latency_ms: float | None = None
    """Median over turns: one picture, from its pixels on the device to raw outputs, in the run's precision."""
    memory_gb: float | None = None
    """The largest perf/peak_memory_gb of its training."""


def measure(runs: Sequence[Run]) -> tuple[list[Cost], list[str]]:
    """The cost of each run, and warnings about what can't be told. Latency is measured on this machine.

    The models take turns, so that a busy moment of the machine meets all of them.
    """
    models: list[Hybrid | None] = []
    warnings = []
    for run in runs:
        try:
            models.append(_build(run))
        except (UserError, OSError, SafetensorError) as error:
            warnings.append(f"{run.label}: neither parameters nor latency: {error}")
            models.append(None)
    times = _latencies(runs, models)
    costs = [
        Cost(
            parameters=None if model is None else float(describe(model)["all"]["total"]),
            latency_ms=times[place],
            memory_gb=_peak_memory(run),
        )
        for place, (run, model) in enumerate(zip(runs, models, strict=True))
    ]
    return costs, warnings


def _build(run: Run) -> Hybrid:
    """The run's model with fresh weights, which take as long as trained ones."""
    config = run.config
    with safe_open(phase_folder(run.folder, run.phase) / BEST, framework="pt") as tensors:
        classes = {
            name: tensors.get_slice(f"heads.{HEAD_PREFIX}{name}.linear.weight").get_shape()[0] for name in config.tasks
        }
    model = build_model(config.model, config.tasks, classes, config.data.image_size, config.run.seed, load=False)
    return model.eval().requires_grad_(False)


@torch.inference_mode()
def _latencies(runs: Sequence[Run], models: Sequence[Hybrid | None]) -> list[float | None]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    there = ((place, model) for place, model in enumerate(models) if model is not None)
    asked = {place: _Asked(runs[place], model, device) for place, model in there}
    times: dict[int, list[float]] = {place: [] for place in asked}
    for _ in range(_WARM_UP):
        for model in asked.values():
            model.answer()
    until = time.perf_counter() + SECONDS * len(asked)
    for turn in range(TURNS):
        if turn >= FEWEST and time.perf_counter() > until:
            break
        # There and back: what was in the caches before meets each as often.
        for place in sorted(asked, reverse=turn % 2 == 1):
            times[place].append(asked[place].answer())
    return [1000 * float(np.median(times[place])) if place in asked else None for place in range(len(runs))]


class _Asked:
    """A model and a picture on a device."""

    def __init__(self, run: Run, model: Hybrid, device: torch.device):
        side = run.config.data.image_size
        self._model, self._device = model.to(device), device
        self._image = torch.randint(0, 256, (1, 3, side, side), dtype=torch.uint8, device=device)
        dtype = _DTYPES.get(run.config.train.precision)
        usable = dtype is not None and (device.type == "cuda" or dtype is torch.bfloat16)
        self._precision: Any = torch.autocast(device.type, dtype) if usable else nullcontext()

    def answer(self) -> float:
        """Seconds of one answer."""
        began = time.perf_counter()
        with self._precision:
            self._model(self._image)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - began


def _peak_memory(run: Run) -> float | None:
    """In GB, over all phases; of each process the same kind of figure, so runs on unlike devices are not alike."""
    peak = None
    try:
        with (run.folder / "metrics.jsonl").open(encoding="utf-8") as lines:
            for line in lines:
                try:
                    value = json.loads(line).get("perf/peak_memory_gb")
                except ValueError:  # the last line of a run that was cut off
                    continue
                if value is not None:
                    peak = max(value, peak or 0.0)
    except OSError:
        return None
    return peak
