"""A task's loss, predictions and metrics, by its kind. Another kind is one class here and one in `model/heads.py`."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from hybrid_dist.config import TaskConfig
from hybrid_dist.errors import UserError
from hybrid_dist.training.calibration import calibration_error
from hybrid_dist.training.tails import TAILS, Tail

Metrics = dict[str, float | None]


class Mixed(NamedTuple):
    """What a micro batch's samples are mixed with: (B,) fp32 shares that are their own, and their partners' labels."""

    shares: Tensor
    partners: Tensor


class Task(ABC):
    """One column of the annotations as something to learn."""

    def __init__(self, name: str, config: TaskConfig, classes: tuple[str, ...], tail: Tail):
        self.name = name
        self.kind = config.kind
        self.weight = config.weight
        self.share = config.share(name)
        self.smoothing = config.smoothing
        self.tail = tail
        self.classes = classes

    @property
    @abstractmethod
    def ignorance(self) -> float:
        """What a label costs a model that knows nothing, at most; 0 where there is nothing to know."""

    @abstractmethod
    def valid(self, target: Tensor) -> Tensor:
        """(B,) bool: which samples carry this label."""

    @abstractmethod
    def losses(self, output: Tensor, target: Tensor) -> Tensor:
        """(B,) fp32 loss of each sample, 0 where it has no label; attached to the graph even if none has."""

    @abstractmethod
    def labelled(self, target: Tensor, mixed: Mixed | None) -> Tensor:
        """(B,) fp32, in 0–1: how much of each sample carries this label in training; 0 or 1 where nothing is mixed."""

    @abstractmethod
    def training_losses(self, output: Tensor, target: Tensor, mixed: Mixed | None) -> Tensor:
        """As `losses`, with what training alone adds: validation's loss stays comparable from config to config.

        A sample that is labelled in part has that part of the loss.
        """

    @abstractmethod
    def predict(self, output: Tensor) -> Tensor:
        """What the model says, from its raw output: (B, K) probabilities, or (B,) scores in 0–1."""

    @abstractmethod
    def metrics(self, prediction: NDArray[np.float32], target: NDArray[np.generic]) -> Metrics:
        """Metrics over labelled samples: `prediction` as `predict` gives it, `target` (N,), N ≥ 1."""

    @abstractmethod
    def quality(self, metrics: Metrics) -> float:
        """The task's part in `val/score`, 1 is perfect."""

    @abstractmethod
    def mean(self, outputs: Sequence[Tensor]) -> Tensor:
        """The raw output whose prediction is the mean of what these raw outputs predict, each of one shape."""

    @abstractmethod
    def answers(self, prediction: NDArray[np.float32], top: int = 1) -> dict[str, list[Any]]:
        """What is told of N predictions, by column, each of N names or numbers.

        Args:
            top: How many classes are named, the likeliest first; as many as there are at most.
        """

    @abstractmethod
    def told(self, target: NDArray[np.generic]) -> list[str]:
        """N labels as texts; blank where there is none."""

    def columns(self, prediction: NDArray[np.float32], target: NDArray[np.generic]) -> dict[str, list[str]]:
        """Columns of predictions_val.csv, each of N texts; blank where there is no label."""
        answers = self.answers(prediction).items()
        texts = {key: [v if isinstance(v, str) else f"{v:.6f}" for v in values] for key, values in answers}
        return {f"{self.name}_label": self.told(target), **texts}


_KINDS: dict[str, Callable[[str, TaskConfig, tuple[str, ...], Tail], Task]] = {}


def kind(name: str) -> Callable[[type[Task]], type[Task]]:
    """Register a task class under its `tasks.NAME.kind`."""

    def register(cls: type[Task]) -> type[Task]:
        _KINDS[name] = cls
        return cls

    return register


def make_tasks(
    configs: Mapping[str, TaskConfig],
    classes: Mapping[str, tuple[str, ...]],
    counts: Mapping[str, NDArray[np.int64]] | None = None,
) -> list[Task]:
    """The run's tasks, in the config's order.

    Args:
        counts: For training, the training table's labels of each class, (K,) by classification task: what `tail`
            follows from. Without it training's losses don't make up for rare classes.
    """
    unknown = {config.kind for config in configs.values()} - set(_KINDS)
    if unknown:
        raise UserError(f"tasks: unknown kind {', '.join(sorted(unknown))}; there is {', '.join(_KINDS)}")
    tails = {name: TAILS[configs[name].tail](numbers) for name, numbers in (counts or {}).items()}
    return [
        _KINDS[config.kind](name, config, classes.get(name, ()), tails.get(name, Tail()))
        for name, config in configs.items()
    ]


@kind("classification")
class Classification(Task):
    """One of K classes: cross-entropy."""

    def __init__(self, name: str, config: TaskConfig, classes: tuple[str, ...], tail: Tail):
        super().__init__(name, config, classes, tail)
        self._there: dict[tuple[str, torch.device], Tensor] = {}

    @property
    def ignorance(self) -> float:
        return math.log(max(len(self.classes), 1)) * self.tail.heaviest

    def valid(self, target: Tensor) -> Tensor:
        return target >= 0

    def losses(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output.float(), target, ignore_index=-1, reduction="none")

    def labelled(self, target: Tensor, mixed: Mixed | None) -> Tensor:
        own = self.valid(target).float()
        if mixed is None:
            return own
        return mixed.shares * own + (1 - mixed.shares) * self.valid(mixed.partners).float()

    def training_losses(self, output: Tensor, target: Tensor, mixed: Mixed | None) -> Tensor:
        own = self._training_losses(output, target)
        if mixed is None:
            return own
        return mixed.shares * own + (1 - mixed.shares) * self._training_losses(output, mixed.partners)

    def _training_losses(self, output: Tensor, target: Tensor) -> Tensor:
        """With what makes up for rare classes, and label smoothing.

        Smoothing is Szegedy et al.'s, Rethinking the Inception Architecture, CVPR 2016; for the rest see `tails`.
        """
        logits = output.float()
        if self.tail.shifts is not None:
            logits = logits + self._on_device("shifts", self.tail.shifts, logits.device)
        losses = F.cross_entropy(logits, target, ignore_index=-1, reduction="none", label_smoothing=self.smoothing)
        if self.tail.weights is not None:
            losses = losses * self._on_device("weights", self.tail.weights, logits.device)[target.clamp(min=0)]
        return losses

    def _on_device(self, name: str, values: NDArray[np.float32], device: torch.device) -> Tensor:
        # Brought over once: a copy in each step would make the host wait.
        if (name, device) not in self._there:
            self._there[name, device] = torch.from_numpy(values).to(device)
        return self._there[name, device]

    def predict(self, output: Tensor) -> Tensor:
        return output.float().softmax(dim=-1)

    def metrics(self, prediction: NDArray[np.float32], target: NDArray[np.generic]) -> Metrics:
        from sklearn.metrics import accuracy_score, f1_score, top_k_accuracy_score

        best = prediction.argmax(axis=1)
        labels = np.arange(prediction.shape[1])
        # With five classes or fewer the top five hold the truth always; sklearn would only warn.
        acc5 = top_k_accuracy_score(target, prediction, k=5, labels=labels) if len(labels) > 5 else 1.0
        # Classes that nobody labelled have no recall: they are left out of the mean.
        f1 = f1_score(target, best, labels=np.unique(target), average="macro", zero_division=0)
        ece = calibration_error(prediction.max(axis=1), best == target)
        return {"acc1": float(accuracy_score(target, best)), "acc5": float(acc5), "f1": float(f1), "ece": ece}

    def quality(self, metrics: Metrics) -> float:
        return metrics["acc1"] or 0.0

    def mean(self, outputs: Sequence[Tensor]) -> Tensor:
        # Logarithms of probabilities are logits of these very probabilities.
        logs = torch.stack([output.float().log_softmax(dim=-1) for output in outputs])
        return logs.logsumexp(dim=0) - math.log(len(outputs))

    def answers(self, prediction: NDArray[np.float32], top: int = 1) -> dict[str, list[Any]]:
        # Stable, so that the first of equals comes first, as with argmax.
        order = np.argsort(-prediction, axis=1, kind="stable")[:, :top]
        found: dict[str, list[Any]] = {}
        for place in range(order.shape[1]):
            index, nth = order[:, place], f"_{place + 1}" if place else ""
            found[f"{self.name}_prediction{nth}"] = [self.classes[one] for one in index]
            found[f"{self.name}_probability{nth}"] = prediction[np.arange(len(index)), index].tolist()
        return found

    def told(self, target: NDArray[np.generic]) -> list[str]:
        return [self.classes[int(label)] if label >= 0 else "" for label in target]


@kind("regression")
class Regression(Task):
    """A score in 0–1: smooth L1."""

    @property
    def ignorance(self) -> float:
        return 0.125  # half a unit off

    def valid(self, target: Tensor) -> Tensor:
        return ~torch.isnan(target)

    def losses(self, output: Tensor, target: Tensor) -> Tensor:
        known = self.valid(target)
        each = F.smooth_l1_loss(output.float(), torch.where(known, target, 0.0), reduction="none")
        return torch.where(known, each, 0.0)

    def labelled(self, target: Tensor, mixed: Mixed | None) -> Tensor:
        return self.valid(_mean(target, mixed)).float()

    def training_losses(self, output: Tensor, target: Tensor, mixed: Mixed | None) -> Tensor:
        return self.losses(output, _mean(target, mixed))

    def predict(self, output: Tensor) -> Tensor:
        return output.float()

    def metrics(self, prediction: NDArray[np.float32], target: NDArray[np.generic]) -> Metrics:
        from sklearn.metrics import mean_absolute_error, root_mean_squared_error

        truth = target.astype(np.float64)
        return {
            "mae": float(mean_absolute_error(truth, prediction)),
            "rmse": float(root_mean_squared_error(truth, prediction)),
            "corr": _correlation(prediction.astype(np.float64), truth),
        }

    def quality(self, metrics: Metrics) -> float:
        mae = metrics["mae"]
        assert mae is not None
        return 1.0 - mae

    def mean(self, outputs: Sequence[Tensor]) -> Tensor:
        return torch.stack([output.float() for output in outputs]).mean(dim=0)

    def answers(self, prediction: NDArray[np.float32], top: int = 1) -> dict[str, list[Any]]:
        return {f"{self.name}_prediction": prediction.tolist()}

    def told(self, target: NDArray[np.generic]) -> list[str]:
        return ["" if np.isnan(label) else f"{label:.6g}" for label in target.astype(np.float64)]


def _mean(target: Tensor, mixed: Mixed | None) -> Tensor:
    """(B,) scores: of a mixed sample the mean of both; none where either has none."""
    if mixed is None:
        return target
    return torch.where(mixed.shares < 1, mixed.shares * target + (1 - mixed.shares) * mixed.partners, target)


def _correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float | None:
    """Pearson's r; None where it is not defined: under two samples, or one side constant."""
    from scipy.stats import pearsonr

    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(pearsonr(a, b).statistic)


def score(tasks: list[Task], metrics: Mapping[str, Metrics]) -> float:
    """`val/score`: the tasks' qualities, weighted by their shares; a task without any label here is left out."""
    judged = [task for task in tasks if task.name in metrics and task.share > 0]
    shares = sum(task.share for task in judged)
    if shares == 0:
        return 0.0
    return sum(task.share * task.quality(metrics[task.name]) for task in judged) / shares
