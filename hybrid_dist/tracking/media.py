"""What a validation looks like on a dashboard: confusions, classes, scatter, and pictures with what was said of them.

Made in wandb's thread, from the predictions that a validation has anyway. What a task gets follows from the shape of
its predictions: (N, K) probabilities or (N,) scores.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from hybrid_dist.data.pictures import PictureError
from hybrid_dist.tracking.sink import Judgement

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hybrid_dist.training.tasks import Task

CLASSES = 40
"""A matrix of more can't be read: it shows those with the most mistakes."""
POINTS = 1000
"""Of a scatter."""
EACH = 8
"""Pictures of each kind in the table."""
SIDE = 160
"""The longer side of a picture there, in pixels."""


def load() -> None:
    """Have all that is imported on the way to a picture imported now."""
    import wandb

    wandb.Table(columns=["picture"], data=[[wandb.Image(np.zeros((2, 2, 3), np.uint8), file_type="jpg")]])


def media(judgement: Judgement) -> dict[str, Any]:
    """wandb's objects by their names on the dashboard."""
    import torch

    out: dict[str, Any] = {}
    for task in judgement.tasks:
        target = judgement.result.targets[task.name]
        known = task.valid(torch.from_numpy(target)).numpy()
        if not known.any():
            continue
        prediction = judgement.result.predictions[task.name][known]
        draw = _classes if prediction.ndim == 2 else _scores
        out |= draw(task, prediction, target[known])
    out["val/pictures"] = _pictures(judgement)
    return out


def _classes(task: Task, prediction: NDArray[Any], target: NDArray[Any]) -> dict[str, Any]:
    """The confusion matrix, and the recall of each class that has labels."""
    import wandb

    best = prediction.argmax(axis=1)
    wrong = best != target
    count = len(task.classes)
    mistakes = np.bincount(target[wrong], minlength=count) + np.bincount(best[wrong], minlength=count)
    often = np.bincount(target, minlength=count) / (len(target) + 1)  # decides between equals
    shown = np.sort(np.argsort(-(mistakes + often), kind="stable")[:CLASSES])
    place = {int(index): number for number, index in enumerate(shown)}
    pairs = [(place[int(t)], place[int(b)]) for t, b in zip(target, best, strict=True) if t in place and b in place]
    names = [task.classes[index] for index in shown]
    title = f"{task.name}: confusion" + (f", the {CLASSES} most confused" if count > CLASSES else "")
    matrix = wandb.plot.confusion_matrix(
        y_true=[true for true, _ in pairs], preds=[said for _, said in pairs], class_names=names, title=title
    )
    recall = wandb.Table(columns=["class", "recall", "pictures"])
    for index in np.unique(target):
        own = target == index
        recall.add_data(task.classes[int(index)], float((best[own] == index).mean()), int(own.sum()))
    bars = wandb.plot.bar(recall, "class", "recall", title=f"{task.name}: recall by class")
    return {f"val/confusion_{task.name}": matrix, f"val/classes_{task.name}": bars}


def _scores(task: Task, prediction: NDArray[Any], target: NDArray[Any]) -> dict[str, Any]:
    """Labels against predictions."""
    import wandb

    rows = np.linspace(0, len(target) - 1, min(len(target), POINTS)).astype(int)
    pairs = [[float(target[row]), float(prediction[row])] for row in rows]
    table = wandb.Table(columns=["label", "prediction"], data=pairs)
    chart = wandb.plot.scatter(table, "label", "prediction", title=f"{task.name}: prediction by label")
    return {f"val/scatter_{task.name}": chart}


def _pictures(judgement: Judgement) -> Any:
    import wandb

    result = judgement.result
    columns: dict[str, list[str]] = {}
    for task in judgement.tasks:
        columns |= task.columns(result.predictions[task.name], result.targets[task.name])
    table = wandb.Table(columns=["picture", "why", "filename", "loss", "confidence", *columns])
    losses, confidence = _losses(judgement), _confidence(judgement)
    for why, places in _chosen(losses, confidence).items():
        for place in places:
            with contextlib.suppress(PictureError, OSError):
                image = wandb.Image(_small(judgement.picture(int(result.rows[place]))), file_type="jpg")
                facts = (float(losses[place]), float(confidence[place]))
                cells = [column[place] for column in columns.values()]
                table.add_data(image, why, judgement.filenames[place], *facts, *cells)
    return table


def _losses(judgement: Judgement) -> NDArray[np.float64]:
    """(N,) each picture's loss over its tasks; where a label is blank it is 0."""
    result = judgement.result
    each = [task.weight * result.losses[task.name].astype(np.float64) for task in judgement.tasks]
    return np.sum(each, axis=0)


def _confidence(judgement: Judgement) -> NDArray[np.float64]:
    """(N,) the mean probability of what was said; 1 where no task has probabilities."""
    found = [values for values in judgement.result.predictions.values() if values.ndim == 2]
    if not found:
        return np.ones(len(judgement.result.rows))
    return np.mean([values.max(axis=1).astype(np.float64) for values in found], axis=0)


def _chosen(losses: NDArray[np.float64], confidence: NDArray[np.float64]) -> dict[str, list[int]]:
    """Places of the pictures to show. The sample is the same in every validation, so that one can watch it."""
    sample = np.random.default_rng(0).permutation(len(losses))[:EACH]
    chosen = {"worst": np.argsort(-losses, kind="stable")[:EACH], "sample": np.sort(sample)}
    if (confidence < 1).any():
        chosen["most uncertain"] = np.argsort(confidence, kind="stable")[:EACH]
    return {why: [int(place) for place in places] for why, places in chosen.items()}


def _small(picture: NDArray[np.uint8]) -> NDArray[Any]:
    height, width = picture.shape[:2]
    scale = SIDE / max(height, width)
    if scale >= 1:
        return picture
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
