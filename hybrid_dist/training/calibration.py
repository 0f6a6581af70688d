"""Probabilities that mean what they say: temperature scaling on the validation split, and how far off they are.

Guo et al., On Calibration of Modern Neural Networks, ICML 2017: logits are divided by one number a task, the one with
the least negative log-likelihood. What is most probable stays so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from hybrid_dist.training.tasks import Metrics, Task
    from hybrid_dist.training.validate import Validated

BINS = 10
FEWEST = 50
"""Labelled pictures, below which a temperature would follow from chance."""
_MOST = 5_000
"""Pictures that it is found by; more would take longer, and say the same."""
_RANGE = 0.05, 20.0


def fit_temperature(probabilities: NDArray[np.float32], target: NDArray[np.int64]) -> float:
    """What logits are to be divided by; 1 where there are fewer than `FEWEST` labels.

    Args:
        probabilities: (N, K), before.
        target: (N,) classes, all known.
    """
    from scipy.optimize import minimize_scalar

    if len(target) < FEWEST:
        return 1.0
    if len(target) > _MOST:
        rows = np.linspace(0, len(target) - 1, _MOST).astype(int)
        probabilities, target = probabilities[rows], target[rows]
    logits = _logits(probabilities)
    of_truth = logits[np.arange(len(target)), target]

    def cost(log_temperature: float) -> float:
        scaled = logits / np.exp(log_temperature)
        # The largest is 0: nothing overflows.
        return float((np.log(np.exp(scaled).sum(axis=1)) - of_truth / np.exp(log_temperature)).mean())

    found = minimize_scalar(cost, bounds=tuple(np.log(_RANGE)), method="bounded", options={"xatol": 1e-4})
    return float(np.exp(found.x))


def tempered(probabilities: NDArray[np.float32], temperature: float) -> NDArray[np.float32]:
    """(N, K) → (N, K): of the same logits, divided by it."""
    powers = np.exp(_logits(probabilities) / temperature)
    return np.asarray(powers / powers.sum(axis=1, keepdims=True), np.float32)


def _logits(probabilities: NDArray[np.float32]) -> NDArray[np.float64]:
    """(N, K), the largest 0. Logarithms of probabilities are logits of these very probabilities."""
    logs = np.log(np.maximum(probabilities.astype(np.float64), 1e-38))  # fp32 has none that are smaller
    return logs - logs.max(axis=1, keepdims=True)


def calibration_error(sure: NDArray[Any], right: NDArray[np.bool_]) -> float:
    """Expected calibration error over bins of equal width: Σ share · |share that is right − mean probability|.

    Args:
        sure: (N,) probabilities of what was said.
        right: (N,)
    """
    means, shares, counts = bins(sure, right)
    return float(sum(n * abs(r - p) for p, r, n in zip(means, shares, counts, strict=True)) / max(len(sure), 1))


def bins(sure: NDArray[Any], right: NDArray[np.bool_]) -> tuple[list[float], list[float], list[int]]:
    """Mean probability, share of right answers, and number, of each bin that has any."""
    place = np.minimum((sure * BINS).astype(int), BINS - 1)
    filled = [place == index for index in np.unique(place)]
    means = [float(sure[own].mean()) for own in filled]
    return means, [float(right[own].mean()) for own in filled], [int(own.sum()) for own in filled]


def fit(result: Validated, tasks: Sequence[Task]) -> tuple[dict[str, float], Metrics]:
    """Each classification task's temperature, and `val/TASK_ece_calibrated`: the error that is left.

    The error is that of temperatures that were found by the other half of the pictures: by the same, it would look
    better than it is.
    """
    temperatures: dict[str, float] = {}
    left: Metrics = {}
    for task, prediction, target in _classified(result, tasks):
        temperatures[task.name] = fit_temperature(prediction, target)
        halves = (np.arange(len(target)) % 2 == 0), (np.arange(len(target)) % 2 == 1)
        told = np.empty_like(prediction)
        for own, other in (halves, halves[::-1]):
            told[own] = tempered(prediction[own], fit_temperature(prediction[other], target[other]))
        left[f"val/{task.name}_ece_calibrated"] = calibration_error(told.max(axis=1), told.argmax(axis=1) == target)
    return temperatures, left


def calibrated(result: Validated, temperatures: Mapping[str, float]) -> Validated:
    """The same result with the probabilities that these temperatures give."""
    predictions = {
        name: tempered(values, temperatures[name]) if name in temperatures else values
        for name, values in result.predictions.items()
    }
    return replace(result, predictions=predictions)


def errors_told(result: Validated, tasks: Sequence[Task], temperatures: Mapping[str, float]) -> Metrics:
    """`val/TASK_ece_told`: the error of what is told with these temperatures, which come from elsewhere."""
    left: Metrics = {}
    for task, prediction, target in _classified(calibrated(result, temperatures), tasks):
        error = calibration_error(prediction.max(axis=1), prediction.argmax(axis=1) == target)
        left[f"val/{task.name}_ece_told"] = error
    return left


def _classified(result: Validated, tasks: Sequence[Task]) -> list[tuple[Task, NDArray[np.float32], NDArray[np.int64]]]:
    """Tasks that tell probabilities, with those of the labelled pictures (N, K), and their classes (N,)."""
    found = []
    for task in tasks:
        prediction, target = result.predictions[task.name], result.targets[task.name]
        if prediction.ndim == 2 and (known := target >= 0).any():
            found.append((task, prediction[known], target[known]))
    return found
