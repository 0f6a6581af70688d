"""Augmentation that keeps labels true, keyed to the sample. The one module that knows Albumentations.

The rule is data: each operation names what it changes in a picture, each task what its label depends on. A sample gets
the operations that change nothing its own labels depend on; a blank label forbids nothing.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from hashlib import blake2b

import cv2
import numpy as np

from hybrid_dist.config import TaskConfig
from hybrid_dist.data.pictures import BACKGROUND
from hybrid_dist.data.resize import bounds, fitted, resize, shrink

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it would ask PyPI for news while it is imported
import albumentations as A

EFFECTS = frozenset({"sharpness", "occlusion", "colour"})

SENSITIVE_COLUMNS: dict[str, frozenset[str]] = {
    "clarity": frozenset({"sharpness"}),
    "block": frozenset({"occlusion"}),
    "airlinename": frozenset({"colour"}),  # the livery tells the airline
    "airlineid": frozenset({"colour"}),
    "typename": frozenset(),
    "typeid": frozenset(),
}

RESAMPLING = frozenset({"sharpness"})
"""What another scale or a turn changes: shrinking makes a blurred picture look sharper, a turn a sharp one softer."""
SMALLEST = 0.85
"""Of the scales that training draws from, up to 1."""
STEEPEST = 7.0
"""Of the angles that training draws from, in degrees to either side."""


@dataclass(frozen=True)
class Operation:
    """An operation on the pixels, before the picture is placed into its square."""

    changes: frozenset[str]
    make: Callable[[], A.BasicTransform | A.BaseCompose]


# No vertical flip: aircraft don't fly upside down. No crop: the whole aircraft stays in view.
OPERATIONS = (
    Operation(frozenset(), lambda: A.HorizontalFlip(p=0.5)),
    Operation(frozenset(), lambda: A.RandomBrightnessContrast(0.15, 0.15, p=0.5)),
    Operation(frozenset(), lambda: A.RandomGamma((85, 118), p=0.3)),
    Operation(frozenset({"colour"}), lambda: A.HueSaturationValue(10, 30, 0, p=0.4)),
    Operation(
        frozenset({"sharpness"}),
        lambda: A.OneOf(
            [
                A.GaussianBlur(blur_limit=0, sigma_limit=(0.3, 1.2), p=1),
                A.GaussNoise(std_range=(0.01, 0.04), per_channel=False, p=1),
                A.ImageCompression(quality_range=(40, 90), p=1),
            ],
            p=0.3,
        ),
    ),
    Operation(
        frozenset({"occlusion"}),
        lambda: A.CoarseDropout(
            num_holes_range=(1, 3), hole_height_range=(0.08, 0.2), hole_width_range=(0.08, 0.2), fill=BACKGROUND, p=0.3
        ),
    ),
)


def sensitivity(task: TaskConfig) -> frozenset[str]:
    """What a task's label depends on: as its config says, else by its column, else everything."""
    if task.sensitive_to is not None:
        return frozenset(task.sensitive_to)
    return SENSITIVE_COLUMNS.get(task.column, EFFECTS)


def sample_key(seed: int, phase: str, epoch: int, row: int, purpose: str = "sample") -> int:
    """128 bits that depend on these five alone, the same on every machine and in every process."""
    text = f"{purpose}/{seed}/{phase}/{epoch}/{row}"
    return int.from_bytes(blake2b(text.encode(), digest_size=16).digest(), "little")


def _harmed(content: np.ndarray, harm: Callable[[np.ndarray], np.ndarray] | None) -> np.ndarray:
    return content if harm is None else harm(content)


class Augment:
    """Fits a picture into a square and, when training, varies it within what its labels allow.

    The aspect ratio is kept and nothing is cut: wide pictures stand in bars of the mean colour. A constant, not the
    stretched edge, because streaks of the edge look like blur and carry its colours; and this constant, because after
    normalisation it is about zero. The bars are drawn last, so no operation makes them tell anything.
    """

    def __init__(self, image_size: int, tasks: Mapping[str, TaskConfig], train: bool) -> None:
        self.image_size = image_size
        self.train = train
        self.sensitive = {name: sensitivity(task) for name, task in tasks.items()}
        self._pipelines: dict[frozenset[str], A.Compose] = {}

    def forbidden(self, present: Collection[str]) -> frozenset[str]:
        """The effects that a sample with labels for the tasks `present` must not see."""
        return frozenset().union(*(self.sensitive[task] for task in present))

    def __call__(
        self,
        picture: np.ndarray,
        present: Collection[str],
        key: int,
        harm: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> np.ndarray:
        """One sample's pixels; the same for the same arguments, whatever was called before.

        Args:
            picture: uint8 (height, width, 3), RGB; `shrink`ed to the square or not, the result is the same.
            present: the tasks that the sample has a label for.
            key: from `sample_key`; without effect unless training.
            harm: What is done to the picture, once it has the size that it is seen at, before anything else.

        Returns:
            uint8 (image_size, image_size, 3).
        """
        picture = shrink(picture, self.image_size)
        if not self.train:
            height, width = fitted(picture, self.image_size, 1.0, 0.0)
            content = _harmed(resize(picture, width, height), harm)
            return self._place(content, (self.image_size - width) // 2, (self.image_size - height) // 2)
        forbidden = self.forbidden(present)
        draw = random.Random(key)
        scale, angle = 1.0, 0.0
        if not RESAMPLING & forbidden:
            scale = draw.uniform(SMALLEST, 1.0)
            angle = draw.uniform(-STEEPEST, STEEPEST) if draw.random() < 0.5 else 0.0
        height, width = fitted(picture, self.image_size, scale, angle)
        pipeline = self._pipeline(forbidden)
        pipeline.set_random_state(np.random.default_rng(key), draw)
        content = pipeline(image=_harmed(resize(picture, width, height), harm))["image"]
        if angle:
            return self._turn(content, angle, draw)
        return self._place(content, draw.randint(0, self.image_size - width), draw.randint(0, self.image_size - height))

    def _pipeline(self, forbidden: frozenset[str]) -> A.Compose:
        if forbidden not in self._pipelines:
            allowed = [operation.make() for operation in OPERATIONS if not operation.changes & forbidden]
            self._pipelines[forbidden] = A.Compose(allowed)
        return self._pipelines[forbidden]

    def _place(self, content: np.ndarray, left: int, top: int) -> np.ndarray:
        below, right = self.image_size - top - content.shape[0], self.image_size - left - content.shape[1]
        return cv2.copyMakeBorder(content, top, below, left, right, cv2.BORDER_CONSTANT, value=BACKGROUND)

    def _turn(self, content: np.ndarray, angle: float, draw: random.Random) -> np.ndarray:
        """Turn about the centre and place anywhere that keeps all four corners inside."""
        height, width = content.shape[:2]
        matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), angle, 1.0)
        tall, wide = bounds(height, width, angle)
        # The centre's place: half the bounds from either side, and anywhere between.
        matrix[0, 2] += draw.uniform(wide / 2, self.image_size - wide / 2) - width / 2
        matrix[1, 2] += draw.uniform(tall / 2, self.image_size - tall / 2) - height / 2
        size = (self.image_size, self.image_size)
        return cv2.warpAffine(content, matrix, size, flags=cv2.INTER_LINEAR, borderValue=BACKGROUND)
